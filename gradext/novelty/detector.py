"""`NoveltyDetector`: model, representation, score and calibration as one scikit-learn estimator."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from ..losses import resolve
from . import guards
from .calibration import Calibration, benjamini_hochberg
from .fitted import CLASSIFIER_SCORES, FittedScore, fit_score
from .models import VAE
from .representations import RECONSTRUCTION_LOSSES, Characterization, characterize, distort, parts_of
from .scores import SCORES
from .training import Checkpoint, train

__all__ = ["CLASSIFIER_SCORES", "FittedScore", "NoveltyDetector", "fit_score"]

SCORED_AT_A_TIME = 1024
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class NoveltyDetector(OutlierMixin, BaseEstimator):
    """Novelty detection by what a sample would change in an autoencoder that was trained on normal samples only.

    An autoencoder is trained on ``X``; a sample's novelty is read from the gradient of its reconstruction error with
    respect to one decoder layer (or, for comparison, from the error and the latent loss themselves).

    Parameters:
        novelty_score: a label-free score, ``"gradient_norm"``, ``"delta_norm"``, ``"gradient_cosine"``,
            ``"reconstruction_error"`` or ``"latent_loss"``; or the paper's classifier trained against noise,
            ``"gradient_classifier"``, ``"reconstruction_classifier"`` or ``"latent_classifier"``.
        model: an autoencoder of your own, ``x -> reconstruction`` or ``x -> (reconstruction, mu, logvar)``; None: a
            `VAE`. It is copied, never changed. If it has a method ``loss(x) -> [B]``, that is what is trained.
        input_shape: a sample's shape as ``model`` takes it, such as (1, 28, 28); None: the shape in ``X``.
        layer: the decoder layer, ``"first"`` (novel classes), ``"last"`` (novel conditions), or a module's name.
        loss: the reconstruction error, ``"bce"``, ``"mse"``, or ``"auto"``: bce where the output ends in a sigmoid
            and ``X`` lies in [0, 1].
        scaling: ``"none"``; ``"minmax"``: every feature's training range becomes [0, 1]; ``"auto"``: 8-bit integers
            are divided by 255, values in [0, 1] stay, all others are scaled as by minmax.
        hidden_dim, latent_dim: sizes of the VAE.
        epochs: training epochs; None: 50, more on small sets; 0: ``model`` is trained already.
        batch_size, learning_rate: of Adam.
        noise_std, noise_clip: the classifier's training outliers, ``X + N(0, noise_std²)``, clipped to [0, 1] or not.
        validation_fraction: share of ``X`` held out to choose the epoch (none with ``epochs=0``).
        calibration_fraction: share of ``X`` held out for threshold and p-values.
        target_fpr: the wanted rate of false alarms on normal samples; sets ``offset_``.
        contamination: the share of ``X`` that is novel, in (0, 0.5]: sets ``offset_`` in place of ``target_fpr`` so
            that this share of the training samples is called novel. p-values need clean data all the same.
        random_state: None, an integer or a RandomState.
        device: where to compute, such as ``"cuda"``; None: the CPU.
        dtype: in which scores are computed: with ``"float64"`` they do not depend on order or batching beyond 1e-9 of
            their size; ``"float32"`` is faster.
        verbose: whether to show a progress bar (on terminals).

    Attributes: ``model_`` the trained autoencoder, ``history_`` its losses (None with ``epochs=0``), ``score_`` the
    `FittedScore`, ``calibration_`` the held-out novelties, ``offset_`` the threshold on `score_samples`, ``loss_``,
    ``input_shape_``, ``shift_`` and ``scale_`` [D] (the model sees ``(X - shift_) / scale_``), ``n_features_in_``,
    ``feature_names_in_`` (of data frames).

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
        layer: str = "first",
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
        random_state=None,
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

    def fit(self, X, y=None, *, X_calibration=None, checkpoint: Checkpoint | None = None) -> NoveltyDetector:
        """Train on normal samples ``X`` [N, ...], flat or image-shaped: arrays, tensors, data frames.

        ``X_calibration``: normal samples that replace the part held out for threshold and p-values. ``checkpoint``:
        where the training goes on if it was stopped before. ``y`` is ignored.
        """
        self._check_parameters()
        X = self._validated(X, reset=True)
        if X_calibration is not None:
            X_calibration = self._validated(X_calibration)
        seed = int(check_random_state(self.random_state).randint(2**31))
        training, validation, calibration = self._split(len(X), seed, X_calibration is not None)
        self.shift_, self.scale_ = self._fit_scaling(X[training])
        samples = self._as_samples(X[training], torch.float32)
        self.profile_ = guards.Profile.of(samples)
        self._make_model(samples, seed)
        self.history_ = None
        if self.epochs != 0:
            self.history_ = train(
                self.model_, samples, self._as_samples(X[validation], torch.float32), epochs=self.epochs,
                batch_size=self.batch_size, learning_rate=self.learning_rate, loss=self._objective(), seed=seed,
                progress=self.verbose, checkpoint=checkpoint,
            )  # fmt: skip
        self.model_.to(DTYPES[self.dtype])
        self.score_ = self._fit_score(self._as_samples(X[training], DTYPES[self.dtype]), training, seed)
        self.calibration_ = Calibration(self._novelty(X[calibration] if X_calibration is None else X_calibration))
        if self.contamination is None:
            self._warn_where_too_few()
            self.offset_ = -self.calibration_.threshold(self.target_fpr)
        else:
            self.offset_ = float(np.percentile(-self._novelty(X), 100 * self.contamination))
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
        if self.epochs == 0 and self.model is None:
            raise ValueError("epochs: expected a positive integer or None, but got 0, which is for a trained model=")

    def _split(self, N: int, seed: int, calibration_given: bool) -> tuple[Tensor, Tensor, Tensor]:
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
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).numpy()
        validation, calibration, training = np.split(order, np.cumsum(held_out))
        return training, validation, calibration

    def _fit_scaling(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shift [D], scale [D])."""
        D = X.shape[1]
        low, high = X.min(0).astype(np.float64), X.max(0).astype(np.float64)
        in_bytes = self.scaling == "auto" and X.dtype == np.uint8
        as_is = self.scaling == "none" or (self.scaling == "auto" and low.min() >= 0 and high.max() <= 1)
        _warn(guards.of_features(low, high, minmax=not (in_bytes or as_is)))
        if in_bytes or as_is:
            return np.zeros(D), np.full(D, 255.0 if in_bytes else 1.0)
        return low, np.where(high > low, high - low, 1.0)

    def _make_model(self, samples: Tensor, seed: int) -> None:
        """``model_`` and ``loss_``, tried on the first samples."""
        device = torch.device(self.device or "cpu")
        in_unit_range = bool(samples.min() >= 0) and bool(samples.max() <= 1)
        if self.model is None:
            if not in_unit_range:
                raise ValueError("scaling: expected values in [0, 1] for the VAE; use scaling='auto' or 'minmax'")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = VAE(self.n_features_in_, self.hidden_dim, self.latent_dim)
        else:
            model = copy.deepcopy(self.model).float()
        self.model_ = model.to(device).eval()
        first = samples[:2].to(device).requires_grad_()
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

    def _objective(self):
        """What is trained, x [B, ...] -> [B]: the model's own ``loss``, else reconstruction error and latent loss."""
        own = getattr(self.model_, "loss", None)
        if callable(own):
            return own

        def summed(x: Tensor) -> Tensor:
            reconstruction, latent = parts_of(self.model_(x))
            return RECONSTRUCTION_LOSSES[self.loss_](reconstruction, x).flatten(1).sum(1) + latent.sum(1)

        return summed

    def _fit_score(self, samples: Tensor, rows: np.ndarray, seed: int) -> FittedScore:
        inliers, distorted = self._characterize(samples), None
        if self.novelty_score in CLASSIFIER_SCORES:
            distorted = self._characterize(distort(samples, std=self.noise_std, clip=self.noise_clip, seed=seed))
        score = fit_score(self.novelty_score, inliers, distorted, seed=seed)
        _warn(guards.of_representations(inliers, self.novelty_score, self.layer))
        if self.contamination is None:
            _warn(guards.of_training_scores(score(inliers).double().cpu().numpy(), rows))
        return score

    def _warn_where_too_few(self) -> None:
        attainable = self.calibration_.attainable_fpr
        if attainable > self.target_fpr:
            warnings.warn(
                f"target_fpr={self.target_fpr:g} cannot be promised with {len(self.calibration_.scores)} held-out "
                f"samples: the threshold is the largest of their scores, for false alarms at up to {attainable:.3g}; "
                f"hold out {math.ceil(1 / self.target_fpr) - 1} or more (calibration_fraction=, X_calibration=)",
                guards.DetectorWarning,
                stacklevel=3,
            )

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_samples(self, X) -> np.ndarray:
        """How normal each sample is, [N]; higher is more normal, as in scikit-learn."""
        check_is_fitted(self)
        X = self._validated(X)
        if self.profile_ is not None:
            _warn(guards.of_input(self._as_samples(X[:SCORED_AT_A_TIME], torch.float32), self.profile_))
        return -self._novelty(X)

    def decision_function(self, X) -> np.ndarray:
        """``score_samples(X) - offset_``: negative for novel samples."""
        return self.score_samples(X) - self.offset_

    def predict(self, X) -> np.ndarray:
        """+1 for normal samples, -1 for novel ones."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X) -> np.ndarray:
        """Conformal p-values [N]: a normal sample gets one of at most t with probability at most t."""
        return self.calibration_.p_values(-self.score_samples(X))

    def discoveries(self, X, *, fdr: float = 0.1) -> np.ndarray:
        """Which samples to call novel so that about ``fdr`` of the calls are false at most (Benjamini-Hochberg)."""
        return benjamini_hochberg(self.p_values(X), fdr)

    # --- data --------------------------------------------------------------------------------------------------------

    def _validated(self, X, *, reset: bool = False) -> np.ndarray:
        """``X`` as an array [N, D] of its own type, not copied where that can be; the errors are scikit-learn's."""
        if isinstance(X, Tensor):
            X = X.detach().cpu()
            X = (X.float() if X.dtype in (torch.bfloat16, torch.float16) else X).numpy()
        if isinstance(X, np.ndarray) and X.ndim > 2:
            shape = X.shape[1:]
            X = X.reshape(len(X), math.prod(shape))
        else:
            shape = None
        X = validate_data(self, X, reset=reset, ensure_all_finite=False)
        for start in range(0, len(X), 4096):  # in blocks, so that a memory map is not read into memory
            block = X[start : start + 4096]
            if block.dtype.kind == "f" and not (finite := np.isfinite(block).all(1)).all():
                bad = (start + np.flatnonzero(~finite)).tolist()
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
        samples = torch.empty(X.shape, dtype=torch.float64)  # torch's alignment: on it depend the last bits of products
        scaled = samples.numpy()
        np.subtract(X, self.shift_, out=scaled)
        scaled /= self.scale_
        return samples.to(dtype).reshape(len(X), *self.input_shape_)

    def _batches(self, X: np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(X), SCORED_AT_A_TIME):
            yield self._as_samples(X[start : start + SCORED_AT_A_TIME], DTYPES[self.dtype])

    def _characterize(self, samples: Tensor) -> Characterization:
        return characterize(self.model_, samples, layer=self.layer, loss=self.loss_, batch_size=SCORED_AT_A_TIME)

    def _novelty(self, X: np.ndarray) -> np.ndarray:
        parts = [self.score_(self._characterize(batch)) for batch in self._batches(X)]
        return torch.cat(parts).double().cpu().numpy()


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        warnings.warn(message, guards.DetectorWarning, stacklevel=3)
