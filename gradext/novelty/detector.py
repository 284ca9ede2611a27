"""`NoveltyDetector`: model, representation, score and calibration as one scikit-learn estimator."""

from __future__ import annotations

import copy
import functools
import itertools
import math
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

from ..losses import resolve
from ..sources import ImageFormat
from . import guards
from .batches import BLOCK_ROWS, NO_SAMPLES, as_array, blocks, comes_in_batches, joined, rows_at_a_time, spooled
from .calibration import Calibration, benjamini_hochberg
from .fitted import CLASSIFIER_SCORES, FittedScore, fit_score
from .models import VAE
from .passes import Blocks, Processes
from .representations import RECONSTRUCTION_LOSSES, Characterization, characterize, distort, layer_names, parts_of
from .scores import SCORES
from .training import Checkpoint, History, train

__all__ = ["CLASSIFIER_SCORES", "Batches", "FittedScore", "NoveltyDetector", "Rows", "fit_score"]

HELD_BYTES = 1 << 28  # of single precision: training samples beyond are read anew for each batch
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Rows(Protocol):
    """Samples by row: a NumPy array, a tensor, a data frame, or nested lists of numbers."""

    def __len__(self) -> int: ...


Batches: TypeAlias = Iterable[Any]  # of arrays or tensors [n, ...], or of tuples that begin with one

Arguments = ParamSpec("Arguments")
Detector = TypeVar("Detector", bound="NoveltyDetector")


def _whole_or_not_at_all(
    fit: Callable[Concatenate[Detector, Arguments], Detector],
) -> Callable[Concatenate[Detector, Arguments], Detector]:
    """A fit that trains whatever the caller's gradient mode, and after a failure of which the detector is as before."""

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
    """Novelty detection by what a sample would change in an autoencoder that was trained on normal samples only.

    An autoencoder is trained on ``X``; a sample's novelty is read from the gradient of its reconstruction error with
    respect to one decoder layer (or, for comparison, from the error and the latent loss themselves).

    Parameters:
        novelty_score: a label-free score of the gradient, ``"gradient_norm"``, ``"delta_norm"``, ``"gradient_cosine"``,
            ``"diagonal_fisher"``, ``"kronecker_fisher"``, ``"whitened_delta_norm"``; of several layers' gradients,
            ``"log_norm_density"``, ``"combined_delta_norm"``, ``"combined_whitened_norm"``; of these and both losses,
            ``"joint_density"``, ``"combined_evidence"``; of the losses alone, ``"reconstruction_error"``,
            ``"latent_loss"``; or the paper's classifiers trained against noise,
            ``"gradient_classifier"``, ``"reconstruction_classifier"``, ``"latent_classifier"``. Formulas: `SCORES`.
        model: an autoencoder of your own, ``x -> reconstruction`` or ``x -> (reconstruction, mu, logvar)``; None: a
            `VAE`. It is copied, never changed. If it has a method ``loss(x) -> [B]``, that is what is trained.
        input_shape: a sample's shape as ``model`` takes it, such as (1, 28, 28); None: the shape in ``X``.
        layer: the decoder layer, ``"first"`` (novel classes), ``"last"`` (novel conditions), or a module's name; or
            several, such as ``("first", "last")``: scores of one layer take the first of them.
        loss: the reconstruction error, ``"bce"``, ``"mse"``, or ``"auto"``: bce where the output ends in a sigmoid
            and ``X`` lies in [0, 1].
        scaling: ``"none"``; ``"minmax"``: every feature's training range becomes [0, 1]; ``"auto"``: 8-bit integers
            are divided by 255, values in [0, 1] stay, all others are scaled as by minmax.
        hidden_dim, latent_dim: sizes of the VAE.
        epochs: training epochs; None: 50, more on small sets; 0: ``model`` is trained already.
        batch_size, learning_rate: of Adam.
        noise_std, noise_clip: the classifier's training outliers, ``X + N(0, noise_std²)``, clipped to [0, 1] or not.
        validation_fraction: share of ``X`` held out from training to choose the epoch (none with ``epochs=0``). The
            statistics of label-free scores (`Statistics`) are of the training and the validation part together: a model
            explains the samples it was trained on too well, but the validation part alone is too small for some.
        calibration_fraction: share of ``X`` held out from all of that, for threshold and p-values, which are valid
            since nothing else has seen these samples.
        target_fpr: the wanted rate of false alarms on normal samples; sets ``offset_``.
        contamination: the share of ``X`` that is novel, in (0, 0.5]: sets ``offset_`` in place of ``target_fpr`` so
            that this share of the training samples is called novel. p-values need clean data all the same.
        random_state: None, an integer or a RandomState.
        device: where to compute, such as ``"cuda"``; None: the CPU.
        dtype: in which scores are computed: with ``"float64"`` they do not depend on order or batching beyond 1e-9 of
            their size; ``"float32"`` is faster.
        verbose: whether to show a progress bar (on terminals).

    Attributes:
        model_: the trained autoencoder, in ``dtype`` on ``device``.
        history_: the `History` of its losses; None with ``epochs=0``.
        layers_: the names of the layers that ``layer`` came to, in its order.
        score_: the `FittedScore`, with its statistics or its classifier.
        calibration_: the `Calibration`, novelties [n] of held-out normal samples.
        offset_: the threshold on `score_samples`, below which a sample is called novel.
        loss_: the reconstruction error that ``loss`` came to, ``"bce"`` or ``"mse"``.
        input_shape_: a sample's shape as the model takes it.
        shift_, scale_: [D]; the model sees ``(X - shift_) / scale_``.
        profile_: the `guards.Profile` of the scaled training samples, which `score_samples` compares with; None in old
            files.
        image_format_: the `ImageFormat` that ``gradext fit`` brought image files to; None where there were none.
        n_features_in_: D, the number of values in a sample.
        feature_names_in_: [D], of data frames only.

    Raises in `fit`: ValueError for a parameter or data that do not fit, naming them, what was expected and what came;
    TypeError for a ``model`` that is no module; RuntimeError where the training loss is no longer finite. In the other
    methods: NotFittedError before `fit`; ValueError for samples of another shape, of other feature names, or with NaN
    or infinity. Data that make a detector worthless without an error are told by `DetectorWarning`.

    >>> import numpy as np
    >>> from gradext.novelty import NoveltyDetector
    >>> X = np.random.default_rng(0).random((200, 16)) * 0.2
    >>> detector = NoveltyDetector(hidden_dim=16, latent_dim=2, epochs=5, random_state=0).fit(X)
    >>> detector.predict(np.vstack([X[:1], np.ones((1, 16))]))
    array([ 1, -1])
    """

    def __init__(
        self,
        novelty_score: str = "gradient_norm",
        *,
        model: nn.Module | None = None,
        input_shape: Sequence[int] | None = None,
        layer: str | Sequence[str] | None = "first",
        loss: str = "auto",
        scaling: str = "auto",
        hidden_dim: int = 400,
        latent_dim: int = 20,
        epochs: int | None = None,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
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

        ``X``: arrays, tensors, data frames, memory maps; or what comes in batches [n, ...] (of tuples the first part is
        taken): a `DataLoader`, a `Dataset`, a generator, any iterable that cannot be indexed. It is gone through once,
        in its order, into a temporary file of its own size (`TMPDIR` says where), so that what is held out stays so.
        Memory holds blocks of at most 1,024 samples and a few numbers for each sample; the training part too where it
        is at most 256 MB in single precision. The fitted detector is the same, bit for bit, as that of an array in
        memory. Classifiers beyond that size are trained on as many training samples as are characterised in 256 MB.

        ``X_calibration``: normal samples that replace the part held out for threshold and p-values. ``y`` is ignored.

        ``process_group``: a group of `torch.distributed` (gloo) whose processes all call this with the same data. They
        share the passes over it for statistics and calibration; the first one trains, since gradients summed by several
        would round otherwise for each number of them. All end with the same detector, bit for bit that of one process.

        ``checkpoint``: where the training goes on, to the same bits, if it was stopped before; needs an integer
        random_state.

        Raises ValueError for data or parameters that do not fit, OSError for a full disk, RuntimeError if the loss
        becomes NaN. What was fitted before is kept then.
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
        self.shift_, self.scale_ = self._fit_scaling(X, training)
        samples = _Samples(self, X, training, torch.float32)
        self.profile_: guards.Profile | None = guards.Profile.of(samples.blocks())
        self._make_model(samples[:2], seed, in_unit_range=self.profile_.low >= 0 and self.profile_.high <= 1)
        self._train(samples, _Samples(self, X, validation, torch.float32), seed, processes, checkpoint)
        self.model_.to(DTYPES[self.dtype])
        self.score_ = self._fit_score(X, training, np.concatenate([training, validation]), seed, processes)
        if X_calibration is None:
            novelty = self._novelty(X, calibration, processes)
        else:
            novelty = self._novelty(X_calibration, np.arange(len(X_calibration)), processes)
        self.calibration_ = Calibration(novelty)
        if self.contamination is None:
            self._warn_where_too_few()
            self.offset_ = -self.calibration_.threshold(self.target_fpr)
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
            "novelty_score": [*SCORES, *CLASSIFIER_SCORES],
            "loss": ["auto", *RECONSTRUCTION_LOSSES],
            "scaling": ["auto", "minmax", "none"],
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
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module or None, but got {type(self.model).__name__}")
        working_device(self.device)
        if self.epochs == 0 and self.model is None:
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

    def _fit_scaling(self, X: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shift [D], scale [D])."""
        D = X.shape[1]
        low, high = np.full(D, np.inf), np.full(D, -np.inf)
        for part in _cut(rows, D):
            block = X[part]
            low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        in_bytes = self.scaling == "auto" and X.dtype == np.uint8
        as_is = self.scaling == "none" or (self.scaling == "auto" and low.min() >= 0 and high.max() <= 1)
        _warn(guards.of_features(low, high, minmax=not (in_bytes or as_is)))
        if in_bytes or as_is:
            return np.zeros(D), np.full(D, 255.0 if in_bytes else 1.0)
        return low, np.where(high > low, high - low, 1.0)

    def _make_model(self, first: Tensor, seed: int, *, in_unit_range: bool) -> None:
        """``model_`` and ``loss_``, tried on the ``first`` samples."""
        device = working_device(self.device)
        if self.model is None:
            if not in_unit_range:
                raise ValueError("scaling: expected values in [0, 1] for the VAE; use scaling='auto' or 'minmax'")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model: nn.Module = VAE(self.n_features_in_, self.hidden_dim, self.latent_dim).float()
        else:
            model = copy.deepcopy(self.model).float()
        self.model_ = model.to(device).eval()
        first = first.to(device).requires_grad_()
        with torch.enable_grad():
            reconstruction, latent = parts_of(self.model_(first))
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
            self.loss_ = resolve("auto", reconstruction, first.detach()) if in_unit_range else "mse"
        self.layers_ = layer_names(self.model_, first[:1].detach(), self.layer, self.loss_)

    def _objective(self) -> Callable[[Tensor], Tensor]:
        """What is trained, x [B, ...] -> [B]: the model's own ``loss``, else reconstruction error and latent loss."""
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
    ) -> None:
        """``history_``, and the weights of ``model_``: those of the first process."""
        self.history_ = None
        if self.epochs == 0:
            return

        def trained() -> tuple[History, dict[str, Tensor]]:
            history = train(
                self.model_, training.held_where_small(), validation.held_where_small(), epochs=self.epochs,
                batch_size=self.batch_size, learning_rate=self.learning_rate, loss=self._objective(), seed=seed,
                progress=self.verbose, checkpoint=checkpoint,
            )  # fmt: skip
            return history, {name: value.cpu() for name, value in self.model_.state_dict().items()}

        self.history_, weights = processes.by_first(trained)
        self.model_.load_state_dict(weights)

    def _fit_score(
        self, X: np.ndarray, training: np.ndarray, inliers: np.ndarray, seed: int, processes: Processes
    ) -> FittedScore:
        """training, inliers: rows to train a classifier on, and to take statistics of."""
        blocks = self._characterized(X, training, processes)
        device = blocks.like.device
        if self.novelty_score in CLASSIFIER_SCORES:
            score = processes.by_first(lambda: self._fit_classifier(X, training, seed).to("cpu")).to(device)
        else:
            score = fit_score(self.novelty_score, self._characterized(X, inliers, processes), None, seed=seed)

        dead, latent = 0, torch.zeros((), device="cpu")

        def of_block(seen: Characterization) -> Tensor:
            nonlocal dead, latent
            dead, latent = dead + int((seen.gradient.norm() == 0).sum()), latent + seen.latent.sum(0).cpu()
            return score(seen).double()

        novelty, N = blocks.concatenate(of_block).numpy(), len(training)
        counts, sums = zip(*processes.gather((dead, latent)), strict=True)
        dead, latent = sum(counts), reduce(torch.add, sums)
        _warn(guards.of_representations(N, dead, latent / N, self.novelty_score, self.layer))
        if self.contamination is None:
            _warn(guards.of_training_scores(novelty, training))
        return score

    def _fit_classifier(self, X: np.ndarray, training: np.ndarray, seed: int) -> FittedScore:
        samples = _Samples(self, X, training, DTYPES[self.dtype])
        if not samples.is_small():
            each = self._characterize(samples[:1]).nbytes
            samples = _Samples(self, X, training[: max(1, HELD_BYTES // (2 * each))], DTYPES[self.dtype])
        held = samples.held()
        distorted = distort(held, std=self.noise_std, clip=self.noise_clip, seed=seed)
        return fit_score(self.novelty_score, self._characterize(held), self._characterize(distorted), seed=seed)

    def _warn_where_too_few(self) -> None:
        attainable = self.calibration_.attainable_fpr
        if attainable > self.target_fpr:
            warnings.warn(
                f"target_fpr={self.target_fpr:g} cannot be promised with {len(self.calibration_.scores)} held-out "
                f"samples: the threshold is the largest of their scores, for false alarms at up to {attainable:.3g}; "
                f"hold out {math.ceil(1 / self.target_fpr) - 1} or more (calibration_fraction=, X_calibration=)",
                guards.DetectorWarning,
                stacklevel=4,
            )

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_samples(self, X: Rows | Batches) -> np.ndarray:
        """How normal each sample is, [N]; higher is more normal, as in scikit-learn. -inf where numbers overflow.

        ``X``: as in `fit`; what comes in batches is scored as it comes, in its order, without a file.
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
        """Of an array whose first row is sample ``start``; with warnings about the first samples of all."""
        X = self._validated(X, start=start)
        if start == 0 and self.profile_ is not None:
            first = X[: rows_at_a_time(self.n_features_in_)]
            _warn(guards.of_input(self._as_samples(first, torch.float32), self.profile_))
        return self._novelty(X, np.arange(len(X)))

    def decision_function(self, X: Rows | Batches) -> np.ndarray:
        """``score_samples(X) - offset_``: negative for novel samples."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Rows | Batches) -> np.ndarray:
        """+1 for normal samples, -1 for novel ones."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X: Rows | Batches) -> np.ndarray:
        """Conformal p-values [N]: a normal sample gets one of at most t with probability at most t."""
        return self.calibration_.p_values(-self.score_samples(X))

    def discoveries(self, X: Rows | Batches, *, fdr: float = 0.1) -> np.ndarray:
        """Which samples to call novel so that about ``fdr`` of the calls are false at most (Benjamini-Hochberg)."""
        return benjamini_hochberg(self.p_values(X), fdr)

    # --- data --------------------------------------------------------------------------------------------------------

    def _validated(self, X: Any, *, reset: bool = False, start: int = 0) -> np.ndarray:
        """``X`` as an array [N, D] of its own type, not copied where that can be; the errors are scikit-learn's.

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
                    bad = (start + rows[~finite]).tolist()
                    raise ValueError(
                        f"X: expected finite values, but {len(bad)} samples hold NaN or infinity, first {bad[:5]}"
                    )
        if reset:
            own = None if self.input_shape is None else tuple(int(size) for size in self.input_shape)
            self.input_shape_ = own or shape or (X.shape[1],)
            if math.prod(self.input_shape_) != X.shape[1]:
                raise ValueError(f"input_shape: expected {X.shape[1]} values as in X, but got {self.input_shape_}")
        elif shape is not None and len(self.input_shape_) > 1:
            squeezed, expected = ([size for size in s if size != 1] for s in (shape, self.input_shape_))
            if squeezed != expected:
                raise ValueError(f"X: expected samples of shape {list(self.input_shape_)}, but got {list(shape)}")
        return X

    def _as_samples(self, X: np.ndarray, dtype: torch.dtype) -> Tensor:
        """``(X - shift_) / scale_`` in the model's shape [N, *input_shape_]."""
        # Torch's alignment: on it depend the last bits of products.
        samples = torch.empty(X.shape, dtype=torch.float64, device="cpu")
        scaled = samples.numpy()
        np.subtract(X, self.shift_, out=scaled)
        scaled /= self.scale_
        return samples.to(dtype).reshape(len(X), *self.input_shape_)

    def _characterize(self, samples: Tensor) -> Characterization:
        return characterize(self.model_, samples, layer=self.layers_, loss=self.loss_, batch_size=BLOCK_ROWS)

    def _characterized(
        self, X: np.ndarray, rows: np.ndarray, processes: Processes | None = None
    ) -> Blocks[Characterization]:
        """The ``rows`` of ``X``, in their order, block by block."""
        like = next(self.model_.parameters()).detach().new_empty(0)
        samples, parts = _Samples(self, X, rows, like.dtype), list(_cut(np.arange(len(rows)), X.shape[1]))
        return Blocks(lambda k: self._characterize(samples[parts[k]]), len(parts), like, processes or Processes())

    def _novelty(self, X: np.ndarray, rows: np.ndarray, processes: Processes | None = None) -> np.ndarray:
        novelty = self._characterized(X, rows, processes).concatenate(self.score_).double().numpy()
        return np.where(np.isnan(novelty), np.inf, novelty)  # what overflows is not normal


def working_device(name: str | None) -> torch.device:
    """The device called ``name``, None being the CPU; ValueError where torch cannot compute on it here."""
    try:
        return torch.empty(0, device=torch.device(name or "cpu")).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device: expected one that works here, such as 'cpu', but got {name!r}: {error}") from None


class _Samples:
    """Rows of ``X`` as the model takes them, read and scaled when asked for: ``samples[index]`` [n, *input_shape_]."""

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


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        warnings.warn(message, guards.DetectorWarning, stacklevel=3)
