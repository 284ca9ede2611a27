"""`NoveltyDetector`: scaling, model, representation, score and calibration as one scikit-learn estimator."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from ..losses import checked
from ..sources import AUTO_SIDE, ImageFormat
from . import guards
from .batches import BLOCK_ROWS, NO_SAMPLES, as_array, blocks, comes_in_batches, joined, rows_at_a_time, spooled
from .calibration import Calibration, benjamini_hochberg
from .fitted import CLASSIFIER_SCORES, FittedScore, fit_score
from .models import VAE, WIDE_INPUT, Autoencoder, ConvVAE, RotationNet
from .passes import Blocks, Processes
from .representations import RECONSTRUCTION_LOSSES, Characterization, characterize, distort, layer_names, parts_of
from .scaling import CHOICES, Scaling, fit_scaling, is_image
from .scores import SCORES
from .training import Checkpoint, History, auto_epochs, train

__all__ = ["CLASSIFIER_SCORES", "Batches", "FittedScore", "NoveltyDetector", "Rows", "fit_score"]

NEEDS_LATENT = frozenset(("combined_evidence", "joint_density"))
FITS = 0.6  # share of the machine's memory that a model may take
HELD_BYTES = 1 << 28  # of single precision: larger training sets are read again for each batch
DTYPES = {"float32": torch.float32, "float64": torch.float64}
MODELS: dict[str, type[nn.Module]] = {"autoencoder": Autoencoder, "vae": VAE, "conv": ConvVAE, "rotation": RotationNet}
# Training of an `Autoencoder` without epochs=: steps at least, epochs at least, and steps without progress at its end.
STEPS, WIDE_STEPS, EPOCHS, PATIENCE = 300, 500, 5, 100
# Training steps of a `RotationNet`, with batches of 64: as asked for, and as ``model="auto"`` tries one.
TURN_STEPS, TRIAL_STEPS, TRIAL_CHANNELS = 1200, 60, 12
TRIAL_LEAST, TRIAL_SIDES = 100, range(8, 65, 4)  # images at least and pixels a side with which it is tried
TOLD_GREY, TOLD_COLOUR = 0.85, 0.6  # share of held-out turns that it must tell after that
EXPLAINED, DIRECTIONS, EXPLAINED_BY = 0.9, 32, 1000  # share of held-out images that leading directions may explain


class Rows(Protocol):
    """Samples by row: a NumPy array, a tensor, a data frame, or nested lists of numbers."""

    def __len__(self) -> int: ...


Batches: TypeAlias = Iterable[Any]  # of arrays or tensors [n, ...], or of tuples that begin with one

Arguments = ParamSpec("Arguments")
Detector = TypeVar("Detector", bound="NoveltyDetector")


def _whole_or_not_at_all(
    fit: Callable[Concatenate[Detector, Arguments], Detector],
) -> Callable[Concatenate[Detector, Arguments], Detector]:
    """A fit that trains in any gradient mode of the caller, and that leaves the detector unchanged if it fails."""

    @functools.wraps(fit)
    def fitted(self: Detector, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Detector:
        former = dict(self.__dict__)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return fit(self, *args, **kwargs)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(former)
            raise

    return fitted


class NoveltyDetector(OutlierMixin, BaseEstimator):
    """Novelty detection by the gradient that a sample has in an autoencoder trained on normal samples only.

    An autoencoder is trained on ``X``. The novelty of a sample is computed from the gradient of its reconstruction
    error with respect to one decoder layer (or, for comparison, from the error and the latent loss themselves).

    Parameters:
        novelty_score: ``"auto"``: ``"local_gradient"`` for an `Autoencoder` of images (from 196 values on),
            ``"gradient_mahalanobis"`` for a `RotationNet`, ``"whitened_gradient"`` for all else; a label-free score of
            the gradient, these, ``"gradient_norm"``, ``"delta_norm"``, ``"gradient_cosine"``, ``"diagonal_fisher"``,
            ``"kronecker_fisher"``, ``"whitened_delta_norm"``; of several layers' gradients,
            ``"log_norm_density"``, ``"combined_delta_norm"``, ``"combined_whitened_norm"``; of these and both losses,
            ``"joint_density"``, ``"combined_evidence"``; of the losses alone, ``"reconstruction_error"``,
            ``"latent_loss"``; or the paper's classifiers trained against noise,
            ``"gradient_classifier"``, ``"reconstruction_classifier"``, ``"latent_classifier"``. Formulas: `SCORES`.
        model: ``"autoencoder"``, an `Autoencoder`; ``"vae"``, a `VAE`; ``"conv"``, a `ConvVAE` (images);
            ``"rotation"``, a `RotationNet` (natural images, whose turn is visible); ``"auto"``: for images a
            `RotationNet`, if held-out ones show that it is of use (docs/detection.md), else an `Autoencoder`, or a
            `VAE` if the score needs a latent loss; or an autoencoder of your own, ``x -> reconstruction`` or
            ``x -> (reconstruction, mu, logvar)``. It is copied, never changed. If it has a method ``loss(x) -> [B]``,
            that loss is trained.
        input_shape: the shape of a sample as ``model`` takes it, such as (1, 28, 28); None: the shape in ``X``. Images
            [N, H, W, C] become [N, C, H, W], unless this shape says otherwise.
        layer: the decoder layer, ``"first"`` (the paper's for novel classes), ``"last"`` (for novel conditions, and of
            the `Autoencoder` for all), or a module's name; or several, such as ``("first", "last")``: scores of one
            layer take the first of them. ``"auto"``: the last of an `Autoencoder`, for ``"local_gradient"`` the first
            of its encoder; the first of all others.
        loss: the reconstruction error, ``"bce"``, ``"mse"``, or ``"auto"``: bce if the output ends in a sigmoid and
            ``X`` lies in [0, 1].
        scaling: ``"none"``; ``"minmax"``: the training range of every feature becomes [0, 1]; ``"robust"``: by the
            quantiles of each feature, with a logarithm for values far outside; ``"auto"``: images in 0..255 of any type
            are divided by 255, images in [0, 1] are unchanged, tables are scaled as by robust (all cases:
            `fit_scaling`).
        hidden_dim, latent_dim: sizes of the model; None: the model's defaults (`Autoencoder`, `VAE`).
        epochs: training epochs; None: as many as the held-out loss asks for, a few hundred steps on most sets; 0:
            ``model`` is trained already.
        batch_size, learning_rate: of Adam; None: 128, less on small sets, and 1e-3, or 2e-3 for an `Autoencoder` of
            tables.
        noise_std, noise_clip: the classifier's training outliers, ``X + N(0, noise_std²)``, clipped to [0, 1] or not.
        validation_fraction: share of ``X`` held out from training to choose the epoch (none with ``epochs=0``). The
            statistics of label-free scores (`Statistics`) are of the training and the validation part together: the
            errors of training samples are too small, but the validation part alone has too few samples for some scores.
        calibration_fraction: share of ``X`` held out from all of that, for threshold and p-values, which are valid
            because nothing else uses these samples.
        target_fpr: the rate of false alarms on normal samples; sets ``offset_``. `predict` and `decision_function` take
            another rate without a new fit.
        contamination: the share of ``X`` that is novel, in (0, 0.5]: sets ``offset_`` in place of ``target_fpr`` so
            that this share of the training samples is called novel. p-values still need clean data.
        random_state: None, an integer or a RandomState.
        device: where to compute, such as ``"cuda"``; None: the CPU.
        dtype: of the scores' computation: with ``"float64"`` they depend on order and batching by at most 1e-9 of their
            size; ``"float32"`` is faster.
        verbose: whether to show a progress bar (on terminals).

    Attributes:
        kind_: what ``model`` came to, one of its names, or ``"own"``.
        trial_: of ``model="auto"`` and images what was read off held-out ones, the share that leading directions
            ``explained`` and the share of turns ``told``; empty where nothing was tried.
        model_: the trained model, in ``dtype`` on ``device``.
        history_: the `History` of its losses; None with ``epochs=0``.
        layers_: the names of the layers that ``layer`` chose, in its order.
        score_: the `FittedScore`, with its statistics or its classifier.
        calibration_: the `Calibration`, novelties [n] of held-out normal samples.
        offset_: the threshold on `score_samples`, below which a sample is called novel.
        fitted_fpr_: the ``target_fpr`` of the fit.
        fitted_parameters_: all parameters of the fit. Of those changed since, ``target_fpr`` and ``verbose`` count at
            once; `score_samples` warns of the others, which need a new fit.
        loss_: the reconstruction error that ``loss`` chose, ``"bce"`` or ``"mse"``.
        input_shape_: a sample's shape as the model takes it.
        scaling_: the `Scaling` by which the model sees the samples, with ``shift``, ``scale``, ``low``, ``high`` [D].
        channels_last_: whether samples come as [H, W, C] and the model sees [C, H, W].
        ceiling_: highest and median novelty of the training samples. A sample far outside of their range
            (`Scaling.excess`) gets a higher novelty than all of them, even if the model is saturated.
        profile_: the `guards.Profile` of the scaled training samples, which `score_samples` compares with.
        warnings_: the warnings of `fit`, for the report.
        image_format_: the `ImageFormat` to which ``gradext fit`` converted image files; None if there were none.
        n_features_in_: D, the number of values in a sample.
        feature_names_in_: [D], of data frames only.

    Raises in `fit`: ValueError for a wrong parameter or wrong data; TypeError for a ``model`` that is not a module;
    RuntimeError if the training loss becomes infinite or NaN. In the other methods: NotFittedError before `fit`;
    ValueError for samples of another shape, of other feature names, or with NaN or infinity. Data that make a detector
    useless without an error cause a `DetectorWarning`.

    >>> import numpy as np
    >>> from gradext.novelty import NoveltyDetector
    >>> X = np.random.default_rng(0).random((200, 16)) * 0.2
    >>> detector = NoveltyDetector(hidden_dim=16, latent_dim=2, epochs=5, random_state=0).fit(X)
    >>> detector.predict(np.vstack([X[:1], np.ones((1, 16))]))
    array([ 1, -1])
    """

    def __init__(
        self,
        novelty_score: str = "auto",
        *,
        model: nn.Module | str = "auto",
        input_shape: Sequence[int] | None = None,
        layer: str | Sequence[str] | None = "auto",
        loss: str = "auto",
        scaling: str = "auto",
        hidden_dim: int | None = None,
        latent_dim: int | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        noise_std: float = 0.1,
        noise_clip: bool = False,
        validation_fraction: float = 0.15,
        calibration_fraction: float = 0.2,
        target_fpr: float = 0.05,
        contamination: float | None = None,
        random_state: int | np.random.RandomState | None = None,
        device: str | None = None,
        dtype: str = "float64",
        verbose: bool = False,
    ) -> None:
        self.novelty_score = novelty_score
        self.model = model
        self.input_shape = input_shape
        self.layer = layer
        self.loss = loss
        self.scaling = scaling
        self.hidden_dim = hidden_dim
        self.latent_dim = latent_dim
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.noise_std = noise_std
        self.noise_clip = noise_clip
        self.validation_fraction = validation_fraction
        self.calibration_fraction = calibration_fraction
        self.target_fpr = target_fpr
        self.contamination = contamination
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    # --- fitting -----------------------------------------------------------------------------------------------------

    @_whole_or_not_at_all
    def fit(
        self,
        X: Rows | Batches,
        y: object = None,
        *,
        X_calibration: Rows | Batches | None = None,
        process_group: dist.ProcessGroup | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> NoveltyDetector:
        """Train on normal samples ``X`` [N, ...], flat or image-shaped.

        ``X``: arrays, tensors, data frames, memory maps; or batches [n, ...] (of tuples the first part): a
        `DataLoader`, a `Dataset`, a generator, any iterable that cannot be indexed. Batches are read once, in their
        order, into a temporary file of their size (in `TMPDIR`), so that rows that are held out stay held out. Memory
        holds blocks of at most 1,024 samples and a few numbers for each sample; also the training part if it has at
        most 256 MB in single precision. The fitted detector is bit for bit that of an array in memory. For larger data,
        classifiers are trained on as many training samples as are characterised in 256 MB.

        ``X_calibration``: normal samples that replace the part held out for threshold and p-values. ``y`` is ignored.

        ``process_group``: a group of `torch.distributed` (gloo) whose processes all call this with the same data. They
        divide the passes for statistics and calibration; the first one trains, because the rounding of gradients summed
        by several would depend on their number. All end with the same detector, bit for bit that of one process.

        ``checkpoint``: from which a stopped training resumes, to the same bits; needs an integer random_state.

        Raises ValueError for wrong data or parameters, OSError for a full disk, RuntimeError if the loss becomes NaN.
        Then the detector keeps its former fit.
        """
        self._check_parameters()
        processes = Processes(process_group)
        X = self._validated(spooled(X) if comes_in_batches(X) else X, reset=True)
        if X_calibration is not None:
            X_calibration = self._validated(
                spooled(X_calibration) if comes_in_batches(X_calibration) else X_calibration
            )
        seed = processes.by_first(lambda: int(check_random_state(self.random_state).randint(2**31)))
        if checkpoint is not None:  # one of another split has seen what is held out here
            checkpoint = replace(checkpoint, run=f"{checkpoint.run} {seed}")
        training, validation, calibration = self._split(len(X), seed, X_calibration is not None)
        self.image_format_: ImageFormat | None = None
        self.warnings_: list[str] = []
        self.kind_ = self._choose_kind()
        self._check_memory(self.input_shape_)
        if not self._tells_turns(X, training, validation, seed, processes):
            self.scaling_ = self._fit_scaling(X, training)
            training, validation = self._without_far_out(X, training), self._without_far_out(X, validation, tell=False)
            samples = _Samples(self, X, training, torch.float32)
            self._make_model(samples[:2], seed, in_unit_range=self.scaling_.within_unit)
            self._train(samples, _Samples(self, X, validation, torch.float32), seed, processes, checkpoint)
        parts = _cut(training, X.shape[1])
        self.profile_: guards.Profile | None = guards.Profile.of(self._in_units(X[part]) for part in parts)
        self.ceiling_: tuple[float, float] | None = None
        self.model_.to(torch.float32 if self.kind_ == "rotation" else DTYPES[self.dtype])
        self.score_ = self._fit_score(X, training, np.concatenate([training, validation]), seed, processes)
        if X_calibration is None:
            novelty = self._novelty(X, calibration, processes)
        else:
            novelty = self._novelty(X_calibration, np.arange(len(X_calibration)), processes)
        self.calibration_ = Calibration(novelty)
        self.fitted_fpr_, self.fitted_parameters_ = self.target_fpr, self.get_params(deep=False)
        if self.contamination is None:
            _warn(guards.of_calibration(len(self.calibration_.scores), self.target_fpr), self.warnings_)
            self.offset_ = -_just_above(self.calibration_.threshold(self.target_fpr))
        else:
            novelty = self._novelty(X, np.arange(len(X)), processes)
            with np.errstate(invalid="ignore"):  # beside an infinity it is NaN, below which there is nothing
                self.offset_ = float(np.percentile(-novelty, 100 * self.contamination))
            if not math.isfinite(self.offset_):
                raise ValueError(
                    f"contamination: expected a share of the {len(X)} samples that is larger than of those which "
                    f"overflow, {np.isinf(novelty).sum()}, but got {self.contamination:g}"
                )
        return self

    def _check_parameters(self) -> None:
        choices = {
            "novelty_score": ["auto", *SCORES, *CLASSIFIER_SCORES],
            "loss": ["auto", *RECONSTRUCTION_LOSSES],
            "scaling": list(CHOICES),
            "dtype": list(DTYPES),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {sorted(allowed)}, but got {value!r}")
        for name in ("target_fpr", "validation_fraction", "calibration_fraction"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, but got {value!r}")
        if self.validation_fraction + self.calibration_fraction >= 1:
            raise ValueError("validation_fraction, calibration_fraction: expected a sum below 1, to train on the rest")
        if self.contamination is not None and not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination: expected None or a number in (0, 0.5], but got {self.contamination!r}")
        if isinstance(self.model, str) and self.model not in ("auto", *MODELS):
            raise ValueError(
                f"model: expected one of {sorted(['auto', *MODELS])} or a torch.nn.Module, but got {self.model!r}"
            )
        if not isinstance(self.model, (nn.Module, str)):
            raise TypeError(
                f"model: expected a torch.nn.Module or one of {sorted(['auto', *MODELS])}, but got "
                f"{type(self.model).__name__}"
            )
        working_device(self.device)
        if self.epochs == 0 and not isinstance(self.model, nn.Module):
            raise ValueError("epochs: expected a positive integer or None, but got 0, which is for a trained model=")

    def _split(self, N: int, seed: int, calibration_given: bool) -> tuple[np.ndarray, ...]:
        """Shuffled indices of the training, validation and calibration part; at least one in each that is needed."""
        shares = (
            0 if self.epochs == 0 else self.validation_fraction,
            0 if calibration_given else self.calibration_fraction,
        )
        held_out = [max(1, round(share * N)) if share else 0 for share in shares]
        needed = 1 + sum(share > 0 for share in shares)
        if needed > N:
            raise ValueError(
                f"X: expected at least {needed} samples, to train on and to hold out, but got n_samples = {N}"
            )
        while sum(held_out) >= N:
            held_out[held_out.index(max(held_out))] -= 1
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed), device="cpu").numpy()
        validation, calibration, training = np.split(order, np.cumsum(held_out))
        return training, validation, calibration

    def _choose_kind(self) -> str:
        """The model's name in `MODELS`; "own" for a module."""
        if isinstance(self.model, nn.Module):
            return "own"
        if self.model != "auto":
            return self.model
        return "vae" if "latent" in self.novelty_score or NEEDS_LATENT & {self.novelty_score} else "autoencoder"

    def _tells_turns(
        self, X: np.ndarray, training: np.ndarray, validation: np.ndarray, seed: int, processes: Processes
    ) -> bool:
        """Of ``model="auto"`` and images: whether a `RotationNet`, trained for seconds, tells held-out turns well.

        Then it is the model. Left to the autoencoder is what looks alike turned (digits 0 and 8), and what it explains
        well, tried by linear directions: textures, parts that always lie alike, of which a defect changes little.
        """
        self.trial_: dict[str, float] = {}
        shape = self.input_shape_
        asked = (self.novelty_score, self.layer, self.loss, self.hidden_dim, self.latent_dim, self.epochs)
        if self.model != "auto" or asked != ("auto", "auto", "auto", None, None, None) or not is_image(shape):
            return False
        side, colours = shape[-1], len(shape) == 3 and shape[0] >= 3
        if shape[-2] != side or side not in TRIAL_SIDES or len(training) < TRIAL_LEAST:
            return False
        kind, self.kind_, device = self.kind_, "rotation", working_device(self.device)
        parts = list(_cut(training, X.shape[1]))
        self.scaling_ = fit_scaling(X, parts, shape, self.scaling, centred=False)
        if self.scaling_.within_unit:
            samples = _Samples(self, X, training[: 64 * TRIAL_STEPS], torch.float32)
            held_out = _Samples(self, X, validation[: 64 * TRIAL_STEPS], torch.float32)
            self.trial_["explained"] = processes.by_first(lambda: _explained(samples, held_out))
            if self.trial_["explained"] < EXPLAINED:
                self._make_model(samples[:2], seed, in_unit_range=True)
                self._train(samples, held_out, seed, processes, None, steps=TRIAL_STEPS)
                network: Any = self.model_
                self.trial_["told"] = processes.by_first(
                    lambda: float(np.mean([network.accuracy(block.to(device)) for block in held_out.blocks()]))
                )
                if self.trial_["told"] >= (TOLD_COLOUR if colours else TOLD_GREY):
                    _warn(guards.of_features(self.scaling_.low, self.scaling_.high, alone=False), self.warnings_)
                    return True
        self.kind_ = kind
        return False

    @property
    def _score(self) -> str:
        """The score's name in `SCORES` or `CLASSIFIER_SCORES`."""
        if self.novelty_score != "auto":
            return self.novelty_score
        if self.kind_ == "rotation":
            return "gradient_mahalanobis"
        wide = self.kind_ == "autoencoder" and self.n_features_in_ >= WIDE_INPUT
        return "local_gradient" if wide else "whitened_gradient"

    def _chosen_layer(self) -> str | Sequence[str] | None:
        if self.layer != "auto":
            return self.layer
        if self.kind_ != "autoencoder":
            return "first"
        return "encoder.0" if self._score == "local_gradient" else "last"

    def _fit_scaling(self, X: np.ndarray, rows: np.ndarray) -> Scaling:
        parts = list(_cut(rows, X.shape[1]))
        scaling = fit_scaling(X, parts, self.input_shape_, self.scaling, centred=self.kind_ == "autoencoder")
        _warn(guards.of_features(scaling.low, scaling.high, alone=not is_image(self.input_shape_)), self.warnings_)
        return scaling

    def _without_far_out(self, X: np.ndarray, rows: np.ndarray, *, tell: bool = True) -> np.ndarray:
        """The rows without a few extreme ones that would dominate the training: one spike can equal a hundred rows."""
        if not self.scaling_.bent or len(rows) < 2 or self.epochs == 0:
            return rows
        spread = np.concatenate([self.scaling_.spread(X[part]) for part in _cut(rows, X.shape[1])])
        far = guards.far_out(spread)
        if tell and self.contamination is None:
            _warn(guards.of_far_out(np.sort(rows[far]), len(rows)), self.warnings_)
        return rows[~far]

    @property
    def shift_(self) -> np.ndarray:
        """`scaling_`'s shift [D]."""
        return self.scaling_.shift

    @property
    def scale_(self) -> np.ndarray:
        """`scaling_`'s scale [D]."""
        return self.scaling_.scale

    def _make_model(self, first: Tensor, seed: int, *, in_unit_range: bool) -> None:
        """``model_`` and ``loss_``, tried on the ``first`` samples."""
        device, kind = working_device(self.device), self.kind_
        if isinstance(self.model, nn.Module):
            model: nn.Module = copy.deepcopy(self.model).float()
        else:
            if kind != "autoencoder" and not in_unit_range:
                raise ValueError("scaling: expected values in [0, 1] for the VAE; use scaling='auto' or 'minmax'")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = self._new_model(kind).float()
        self.model_ = model.to(device).eval()
        first = first.to(device).requires_grad_()
        with torch.enable_grad():
            reconstruction, latent = parts_of(self.model_(first))
        if kind == "rotation":
            self.loss_, self.layers_ = "rotation", ["head.weight"]
            return
        if reconstruction.shape[:1] != first.shape[:1] or reconstruction.numel() != first.numel():
            raise ValueError(
                f"model: expected a reconstruction of {list(first.shape)}, but got {list(reconstruction.shape)}; "
                "input_shape= says how samples reach the model"
            )
        if latent.shape[1] == 0 and self.novelty_score.startswith("latent"):
            raise ValueError(
                f"novelty_score: {self.novelty_score!r} needs a model that returns (reconstruction, mu, logvar)"
            )
        self.loss_ = self.loss
        if self.loss == "auto":
            self.loss_ = "mse"
            if in_unit_range and kind != "autoencoder":
                self.loss_, _ = checked("auto", reconstruction, first.detach())
        self.layers_ = layer_names(self.model_, first[:1].detach(), self._chosen_layer(), self.loss_)

    def _new_model(self, kind: str) -> nn.Module:
        sizes = {"hidden_dim": self.hidden_dim, "latent_dim": self.latent_dim}
        given = {name: value for name, value in sizes.items() if value is not None}
        if kind == "conv":
            given.pop("hidden_dim", None)
            return ConvVAE((1, *self.input_shape_)[-3:], **given)
        if kind == "rotation":
            if not is_image(self.input_shape_):
                raise ValueError(f"model: 'rotation' is of images, but samples have shape {list(self.input_shape_)}")
            return RotationNet(
                (1, *self.input_shape_)[-3:], **({} if self.model == kind else {"channels": TRIAL_CHANNELS})
            )
        return MODELS[kind](self.n_features_in_, **given)

    def _check_memory(self, shape: tuple[int, ...], what: str = "X") -> None:
        """Raise ValueError if a perceptron of samples of this shape needs more memory than there is. what: the data."""
        if self._choose_kind() not in ("autoencoder", "vae"):
            return
        # Weights of both ends in single precision with their gradients and Adam's two moments, in double for scores.
        needed, there = 2 * math.prod(shape) * (self.hidden_dim or 256) * (4 * 4 + 8), memory()
        if needed <= FITS * there:
            return
        advice = "take fewer columns, or a smaller hidden_dim"
        if is_image(shape):
            smaller = (max(4, 4 * round(side * AUTO_SIDE / max(shape[-2:]) / 4)) for side in shape[-2:])
            advice = f"bring them to another size, such as --size {'x'.join(map(str, smaller))}"
        raise ValueError(
            f"{what}: a model of samples of {'x'.join(map(str, shape))} values needs about {needed / 1e9:.0f} GB of "
            f"memory, and this machine has {there / 1e9:.0f}; {advice}"
        )

    def _objective(self) -> Callable[[Tensor], Tensor]:
        """The training objective, x [B, ...] -> [B]: the model's ``loss``, or reconstruction error and latent loss."""
        own = getattr(self.model_, "loss", None)
        if callable(own):
            return own

        def summed(x: Tensor) -> Tensor:
            reconstruction, latent = parts_of(self.model_(x))
            return RECONSTRUCTION_LOSSES[self.loss_](reconstruction, x).flatten(1).sum(1) + latent.sum(1)

        return summed

    def _train(
        self,
        training: _Samples,
        validation: _Samples,
        seed: int,
        processes: Processes,
        checkpoint: Checkpoint | None,
        *,
        steps: int = TURN_STEPS,
    ) -> None:
        """``history_``, and the weights of ``model_``: those of the first process. steps: of a `RotationNet`."""
        self.history_ = None
        if self.epochs == 0:
            return
        plain, wide = self.kind_ == "autoencoder", self.n_features_in_ >= WIDE_INPUT
        turned = self.kind_ == "rotation"
        rate = self.learning_rate or (0.1 if turned else 2e-3 if plain and not wide else 1e-3)
        batch = self.batch_size or (min(64 if turned else 128, max(16, len(training) // 4)) if plain or turned else 128)
        epochs, patience = self.epochs, None
        if epochs is None:
            length = {"steps": WIDE_STEPS if wide else STEPS, "least": EPOCHS} if plain else {}
            length = {"steps": steps, "least": 1} if turned else length
            epochs = auto_epochs(len(training), batch, **length)
            if not turned:  # whose rate falls to the end
                patience = max(2, math.ceil((PATIENCE if plain else 4 * PATIENCE) / math.ceil(len(training) / batch)))

        def trained() -> tuple[History, dict[str, Tensor]]:
            history = train(
                self.model_, training.held_where_small(), validation.held_where_small(), epochs=epochs,
                batch_size=batch, learning_rate=rate, loss=self._objective(), seed=seed,
                progress=self.verbose, checkpoint=checkpoint, patience=patience, one_cycle=turned,
            )  # fmt: skip
            return history, {name: value.cpu() for name, value in self.model_.state_dict().items()}

        self.history_, weights = processes.by_first(trained)
        self.model_.load_state_dict(weights)

    def _fit_score(
        self, X: np.ndarray, training: np.ndarray, inliers: np.ndarray, seed: int, processes: Processes
    ) -> FittedScore:
        """training, inliers: rows to train a classifier on, and to take statistics of; the latter begin with these."""
        blocks = self._characterized(X, inliers, processes, held=True)
        device = blocks.like.device
        if self._score in CLASSIFIER_SCORES:
            score = processes.by_first(lambda: self._fit_classifier(X, training, seed).to("cpu")).to(device)
        else:
            score = fit_score(self._score, blocks, None, seed=seed)

        dead, latent = 0, torch.zeros((), device="cpu")

        def of_block(seen: Characterization) -> Tensor:
            nonlocal dead, latent
            dead, latent = dead + int((seen.gradient.norm() == 0).sum()), latent + seen.latent.sum(0).cpu()
            return score(seen).double()

        novelty, N = blocks.concatenate(of_block).numpy()[: len(training)], len(inliers)
        finite = novelty[np.isfinite(novelty)]
        if len(finite):
            self.ceiling_ = float(finite.max()), float(np.median(finite))
        counts, sums = zip(*processes.gather((dead, latent)), strict=True)
        dead, latent = sum(counts), reduce(torch.add, sums)
        _warn(guards.of_representations(N, dead, latent / N, self._score, self.layer), self.warnings_)
        if self.contamination is None:
            _warn(guards.of_training_scores(novelty, training), self.warnings_)
        return score

    def _fit_classifier(self, X: np.ndarray, training: np.ndarray, seed: int) -> FittedScore:
        samples = _Samples(self, X, training, DTYPES[self.dtype])
        if not samples.is_small():
            each = self._characterize(samples[:1]).nbytes
            samples = _Samples(self, X, training[: max(1, HELD_BYTES // (2 * each))], DTYPES[self.dtype])
        held = samples.held()
        distorted = distort(held, std=self.noise_std, clip=self.noise_clip, seed=seed)
        return fit_score(self._score, self._characterize(held), self._characterize(distorted), seed=seed)

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_samples(self, X: Rows | Batches) -> np.ndarray:
        """How normal each sample is, [N]; higher is more normal, as in scikit-learn. -inf if numbers overflow.

        ``X``: as in `fit`; batches are scored one by one, in their order, without a file.
        """
        check_is_fitted(self)
        if not comes_in_batches(X):
            return -self._novelty_of(X)
        starts = itertools.count(step=rows_at_a_time(self.n_features_in_))
        found = joined(map(self._novelty_of, blocks(X), starts))
        if not len(found):
            raise ValueError(NO_SAMPLES)
        return -found

    def _novelty_of(self, X: Any, start: int = 0) -> np.ndarray:
        """The novelty of an array whose first row is sample ``start``; warns about the first samples of all."""
        X = self._validated(X, start=start)
        if start == 0:
            _warn(guards.of_changes(self.fitted_parameters_, self.get_params(deep=False)))
        if start == 0 and self.profile_ is not None:
            first = X[: rows_at_a_time(self.n_features_in_)]
            _warn(guards.of_input(self._in_units(first), self.scaling_.excess(first) > 0, self.profile_))
        return self._novelty(X, np.arange(len(X)))

    def decision_function(self, X: Rows | Batches, *, target_fpr: float | None = None) -> np.ndarray:
        """``score_samples(X) - offset_``: negative for novel samples. ``target_fpr``: as for `threshold`."""
        return self.score_samples(X) - (-self.threshold(target_fpr))

    def predict(self, X: Rows | Batches, *, target_fpr: float | None = None) -> np.ndarray:
        """+1 for normal samples, -1 for novel ones. ``target_fpr``: as for `threshold`."""
        return np.where(self.decision_function(X, target_fpr=target_fpr) < 0, -1, 1)

    def threshold(self, target_fpr: float | None = None) -> float:
        """The novelty above which a sample is novel: as fitted, or for another rate of false alarms, without a fit.

        A parameter ``target_fpr`` that was changed since the fit is used as if it were given here.
        """
        check_is_fitted(self)
        if target_fpr is None:
            if self.contamination is not None or self.target_fpr == self.fitted_fpr_:
                return -self.offset_
            target_fpr = self.target_fpr
        threshold = _just_above(self.calibration_.threshold(target_fpr))
        _warn(guards.of_calibration(len(self.calibration_.scores), target_fpr))
        return threshold

    def p_values(self, X: Rows | Batches) -> np.ndarray:
        """Conformal p-values [N]: a normal sample gets one of at most t with probability at most t."""
        return self.calibration_.p_values(-self.score_samples(X))

    def discoveries(self, X: Rows | Batches, *, fdr: float = 0.1) -> np.ndarray:
        """Which samples to call novel so that at most about ``fdr`` of the calls are false (Benjamini-Hochberg)."""
        return benjamini_hochberg(self.p_values(X), fdr)

    # --- data --------------------------------------------------------------------------------------------------------

    def _validated(self, X: Any, *, reset: bool = False, start: int = 0) -> np.ndarray:
        """``X`` as an array [N, D] of its own type, not copied if possible; the errors are scikit-learn's.

        start: the number of its first row, for errors.
        """
        if isinstance(X, Tensor):
            X = as_array(X)
        if isinstance(X, np.ndarray) and X.ndim > 2:
            shape = X.shape[1:]
            X = X.reshape(len(X), math.prod(shape))
        else:
            shape = None
        X = validate_data(self, X, reset=reset, ensure_all_finite=False)
        if X.dtype.kind == "f":
            for rows in _cut(np.arange(len(X)), X.shape[1]):  # so that a memory map is not read into memory
                if not (finite := np.isfinite(X[rows[0] : rows[-1] + 1]).all(1)).all():
                    bad = rows[~finite]
                    feature = int((~np.isfinite(X[bad[0]])).argmax())
                    names = getattr(self, "feature_names_in_", None)
                    where = f"feature {feature}" if names is None else str(names[feature])
                    raise ValueError(
                        f"X: expected finite values, but {len(bad)} samples hold NaN or infinity, first "
                        f"{(start + bad[:5]).tolist()}, and of this in {where}; fill them or leave these samples out"
                    )
        if reset:
            own = None if self.input_shape is None else tuple(int(size) for size in self.input_shape)
            if own is None and isinstance(self.model, nn.Module):
                own = getattr(self.model, "sample_shape", None)
                own = own if own is not None and len(own) == 3 and math.prod(own) == X.shape[1] else None
            self.input_shape_, self.channels_last_ = _arrangement(shape or (X.shape[1],), own)
            if math.prod(self.input_shape_) != X.shape[1]:
                raise ValueError(f"input_shape: expected {X.shape[1]} values as in X, but got {self.input_shape_}")
        elif shape is not None and len(self.input_shape_) > 1:
            expected = self.input_shape_
            if self.channels_last_:
                expected = (*expected[1:], expected[0])
            if _squeezed(shape) != _squeezed(expected):
                raise ValueError(f"X: expected samples of shape {list(expected)}, but got {list(shape)}")
        return X

    def _as_samples(self, X: np.ndarray, dtype: torch.dtype) -> Tensor:
        """``scaling_(X)`` in the model's shape [N, *input_shape_]."""
        # Torch's alignment, on which the last bits of products depend.
        samples = torch.empty(X.shape, dtype=torch.float64, device="cpu")
        self.scaling_(X, samples.numpy())
        return self._arranged(samples.to(dtype))

    def _in_units(self, X: np.ndarray) -> Tensor:
        """``scaling_.units(X)``: pixels in [0, 1], or standard deviations, in the model's shape."""
        return self._arranged(torch.from_numpy(self.scaling_.units(X)).float())

    def _arranged(self, samples: Tensor) -> Tensor:
        if not self.channels_last_:
            return samples.reshape(len(samples), *self.input_shape_)
        C, H, W = self.input_shape_
        return samples.reshape(len(samples), H, W, C).permute(0, 3, 1, 2).contiguous()

    def _characterize(self, samples: Tensor) -> Characterization:
        return characterize(self.model_, samples, layer=self.layers_, loss=self.loss_, batch_size=BLOCK_ROWS)

    def _characterized(
        self, X: np.ndarray, rows: np.ndarray, processes: Processes | None = None, *, held: bool = False
    ) -> Blocks[Characterization]:
        """The ``rows`` of ``X``, in their order, block by block. held: kept for further passes, if that is little."""
        like = next(self.model_.parameters()).detach().new_empty(0)
        samples, parts = _Samples(self, X, rows, like.dtype), list(_cut(np.arange(len(rows)), X.shape[1]))
        processes = processes or Processes()

        def read(k: int) -> Characterization:
            return self._characterize(samples[parts[k]])

        if held and self._characterize(samples[:1]).nbytes * len(rows) <= HELD_BYTES:
            return Blocks(functools.cache(read), len(parts), like, processes)
        return Blocks(read, len(parts), like, processes)

    def _novelty(self, X: np.ndarray, rows: np.ndarray, processes: Processes | None = None) -> np.ndarray:
        novelty = self._characterized(X, rows, processes).concatenate(self.score_).double().numpy()
        novelty = np.where(np.isnan(novelty), np.inf, novelty)  # a score that overflows is not normal
        if self.ceiling_ is not None:
            excess = np.concatenate([self.scaling_.excess(X[part]) for part in _cut(rows, X.shape[1])])
            novelty = raised(novelty, excess, *self.ceiling_)
        return novelty


def _explained(training: _Samples, held_out: _Samples) -> float:
    """The share of held-out images' variance about one grey that the training mean and leading directions explain."""
    seen, new = (part[:EXPLAINED_BY].flatten(1) for part in (training, held_out))
    mean = seen.mean(0)
    _, vectors = torch.linalg.eigh((seen - mean) @ (seen - mean).mT)
    directions = torch.linalg.qr((seen - mean).mT @ vectors[:, -DIRECTIONS:]).Q
    centred = new - mean
    unexplained = (centred - centred @ directions @ directions.mT).square().sum()
    return 1 - float(unexplained / (new - seen.mean()).square().sum().clamp_min(1e-12))


def _just_above(threshold: float) -> float:
    """Higher by more than a score changes with the other samples of its batch, so that a sample stays on one side."""
    return threshold + 1e-9 * abs(threshold)


def raised(novelty: np.ndarray, excess: np.ndarray, highest: float, median: float) -> np.ndarray:
    """Novelties [N]; those of samples with an ``excess`` (`Scaling.excess`) are raised above ``highest`` of training.

    A sample that saturates the model has a gradient of zero, and would otherwise be the most normal of all.
    """
    unit = max(highest - median, abs(highest), np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        return np.where(excess > 0, np.maximum(novelty, highest + unit * np.log1p(excess)), novelty)


def memory() -> int:
    """Bytes of the machine's memory; a terabyte if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 40


def working_device(name: str | None) -> torch.device:
    """The device called ``name``, or the CPU for None; ValueError if torch cannot compute on it here."""
    try:
        return torch.empty(0, device=torch.device(name or "cpu")).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0].split(". ")[0]
        if reason.startswith("Could not run"):  # an operator of the dispatcher's table
            reason = "this torch is built without it, or the machine has none"
        raise ValueError(f"device: expected one that works here, such as 'cpu', but got {name!r}: {reason}") from None


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _arrangement(shape: tuple[int, ...], own: tuple[int, ...] | None) -> tuple[tuple[int, ...], bool]:
    """The shape in which the model takes samples of ``shape``, and whether these have their channels last.

    own: the shape that the model takes. Raises ValueError if a reshape would scramble the pixels.
    """
    if own is None:
        channels_last = len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] > 4
        return ((shape[2], *shape[:2]), True) if channels_last else (shape, False)
    if len(shape) == 3 and len(own) == 3 and shape != own and (shape[2], *shape[:2]) == own:
        return own, True
    if len(shape) > 1 and len(own) > 1 and _squeezed(shape) != _squeezed(own):
        raise ValueError(f"input_shape: expected the arrangement of X, {list(shape)}, but got {list(own)}")
    return own, False


class _Samples:
    """Rows of ``X`` as the model takes them, read and scaled on access: ``samples[index]`` [n, *input_shape_]."""

    def __init__(self, detector: NoveltyDetector, X: np.ndarray, rows: np.ndarray, dtype: torch.dtype) -> None:
        self.detector, self.X, self.rows, self.dtype = detector, X, rows, dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | np.ndarray | slice) -> Tensor:
        if isinstance(index, Tensor):
            index = index.cpu().numpy()
        return self.detector._as_samples(self.X[self.rows[index]], self.dtype)

    def blocks(self) -> Iterator[Tensor]:
        for rows in _cut(np.arange(len(self)), self.X.shape[1]):
            yield self[rows]

    def is_small(self) -> bool:
        return 4 * len(self) * self.X.shape[1] <= HELD_BYTES

    def held(self) -> Tensor:
        """All of them in memory."""
        whole = torch.empty(len(self), *self.detector.input_shape_, dtype=self.dtype, device="cpu")
        start = 0
        for block in self.blocks():
            whole[start : start + len(block)] = block
            start += len(block)
        return whole

    def held_where_small(self) -> Tensor | _Samples:
        return self.held() if self.is_small() else self


def _cut(rows: np.ndarray, features: int) -> Iterator[np.ndarray]:
    size = rows_at_a_time(features)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _warn(messages: Iterable[str], kept: list[str] | None = None) -> None:
    """Raise each as a `DetectorWarning`, and store it for the report."""
    for message in messages:
        if kept is not None:
            kept.append(message)
        warnings.warn(message, guards.DetectorWarning, stacklevel=3)
