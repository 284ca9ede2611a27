"""`NoveltyDetector`: model, representation and score as one scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from .classifier import REPRESENTATIONS, features, train_classifier
from .models import VAE
from .representations import Characterization, characterize, distort
from .scores import SCORES, Statistics
from .training import train

CLASSIFIER_SCORES = {f"{name}_classifier": name for name in REPRESENTATIONS}


def fit_score(
    name: str, inliers: Characterization, distorted: Characterization | None, *, seed: int = 0, **classifier
) -> Callable[[Characterization], Tensor]:
    """The score called ``name`` (of `SCORES`, or ``"<representation>_classifier"``) with what it keeps of the inliers.

    ``distorted``: the characterised training outliers, needed by classifiers only; further arguments go to
    `train_classifier`.
    """
    if name in SCORES:
        score, statistics = SCORES[name], Statistics.of(inliers)
        return lambda sample: score(sample, statistics)
    if name not in CLASSIFIER_SCORES:
        raise ValueError(f"score: expected one of {sorted([*SCORES, *CLASSIFIER_SCORES])}, but got {name!r}")
    if distorted is None:
        raise ValueError(f"score {name!r}: expected characterised training outliers, but got None")
    featurize = features(CLASSIFIER_SCORES[name], inliers)
    model = train_classifier(featurize(inliers), featurize(distorted), seed=seed, **classifier)
    return torch.no_grad()(lambda sample: model(featurize(sample)))


class NoveltyDetector(OutlierMixin, BaseEstimator):
    """Novelty detection by what a sample would change in an autoencoder that was trained on normal samples only.

    A `VAE` is trained on ``X``; a sample's novelty is read from the gradient of its reconstruction error with respect
    to one decoder layer (or, for comparison, from the error and the latent loss themselves).

    Parameters:
        score: a label-free score, ``"gradient_norm"``, ``"delta_norm"``, ``"gradient_cosine"``,
            ``"reconstruction_error"`` or ``"latent_loss"``; or the paper's classifier trained against noise,
            ``"gradient_classifier"``, ``"reconstruction_classifier"`` or ``"latent_classifier"``.
        layer: the decoder layer, ``"first"`` (novel classes), ``"last"`` (novel conditions), or a module's name.
        hidden_dim, latent_dim: sizes of the VAE.
        epochs: training epochs; None: 50, more on small sets.
        batch_size, learning_rate: of Adam.
        noise_std, noise_clip: the classifier's training outliers, ``X + N(0, noise_std²)``, clipped to [0, 1] or not.
        validation_fraction: share of ``X`` held out to choose the epoch and the threshold.
        target_fpr: the wanted rate of false alarms on normal samples; sets ``offset_``.
        random_state: None, an integer or a RandomState.
        device: where to compute, such as ``"cuda"``; None: the CPU.
        verbose: whether to show a progress bar (on terminals).

    Attributes: ``model_`` the trained VAE, ``history_`` its losses, ``offset_`` the threshold on `score_samples`,
    ``n_features_in_``.

    >>> import numpy as np
    >>> from gradext.novelty import NoveltyDetector
    >>> X = np.random.default_rng(0).random((200, 16)) * 0.2
    >>> detector = NoveltyDetector(hidden_dim=16, latent_dim=2, epochs=5, random_state=0).fit(X)
    >>> detector.predict(np.vstack([X[:1], np.ones((1, 16))]))
    array([ 1, -1])
    """

    def __init__(
        self,
        score: str = "gradient_norm",
        *,
        layer: str = "first",
        hidden_dim: int = 400,
        latent_dim: int = 20,
        epochs: int | None = None,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        noise_std: float = 0.1,
        noise_clip: bool = False,
        validation_fraction: float = 0.25,
        target_fpr: float = 0.05,
        random_state=None,
        device: str | None = None,
        verbose: bool = False,
    ) -> None:
        self.score = score
        self.layer = layer
        self.hidden_dim = hidden_dim
        self.latent_dim = latent_dim
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.noise_std = noise_std
        self.noise_clip = noise_clip
        self.validation_fraction = validation_fraction
        self.target_fpr = target_fpr
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X, y=None, *, X_validation=None) -> NoveltyDetector:
        """Train on normal samples ``X`` [N, ...] in [0, 1], flat or image-shaped, numpy arrays or tensors.

        ``X_validation`` replaces the held-out part. ``y`` is ignored.
        """
        if self.score not in SCORES and self.score not in CLASSIFIER_SCORES:
            raise ValueError(f"score: expected one of {sorted([*SCORES, *CLASSIFIER_SCORES])}, but got {self.score!r}")
        if not 0 < self.target_fpr < 1:
            raise ValueError(f"target_fpr: expected a number between 0 and 1, but got {self.target_fpr!r}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction: expected a number in (0, 1), but got {self.validation_fraction!r}")
        samples = as_samples(X, "X")
        if X_validation is None:
            if len(samples) < 2:
                raise ValueError(f"X: expected at least 2 samples, to train on and to hold out, but got {len(samples)}")
            seed = int(check_random_state(self.random_state).randint(2**31))
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
            held_out = min(max(1, round(self.validation_fraction * len(samples))), len(samples) - 1)
            validation, samples = samples[order[:held_out]], samples[order[held_out:]]
        else:
            seed = int(check_random_state(self.random_state).randint(2**31))
            validation = as_samples(X_validation, "X_validation", n_features=samples.shape[1])
        device = torch.device(self.device or "cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model_ = VAE(samples.shape[1], self.hidden_dim, self.latent_dim).to(device).eval()
        self.n_features_in_ = samples.shape[1]
        self.history_ = train(
            self.model_, samples, validation, epochs=self.epochs, batch_size=self.batch_size,
            learning_rate=self.learning_rate, seed=seed, progress=self.verbose,
        )  # fmt: skip
        inliers = self._characterize(samples)
        distorted = None
        if self.score in CLASSIFIER_SCORES:
            noisy = distort(samples, std=self.noise_std, clip=self.noise_clip, seed=seed)
            distorted = self._characterize(noisy)
        self.score_ = fit_score(self.score, inliers, distorted, seed=seed)
        held_out_scores = -self.score_(self._characterize(validation)).double().cpu().numpy()
        self.offset_ = float(np.quantile(held_out_scores, self.target_fpr))
        return self

    def score_samples(self, X) -> np.ndarray:
        """How normal each sample is, [N]; higher is more normal, as in scikit-learn."""
        check_is_fitted(self)
        samples = as_samples(X, "X", n_features=self.n_features_in_)
        return -self.score_(self._characterize(samples)).double().cpu().numpy()

    def decision_function(self, X) -> np.ndarray:
        """``score_samples(X) - offset_``: negative for novel samples."""
        return self.score_samples(X) - self.offset_

    def predict(self, X) -> np.ndarray:
        """+1 for normal samples, -1 for novel ones."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _characterize(self, samples: Tensor) -> Characterization:
        return characterize(self.model_, samples, layer=self.layer)


def as_samples(X, name: str, n_features: int | None = None) -> Tensor:
    """``X`` [N, ...] as a float32 tensor [N, D] on the CPU or its own device, after checking its values.

    Raises TypeError for integer data, ValueError for wrong shapes, empty data, NaN, infinity, or values outside [0, 1].
    """
    samples = X if isinstance(X, Tensor) else torch.as_tensor(np.ascontiguousarray(X))
    if samples.ndim < 2:
        raise ValueError(f"{name}: expected shape [N, D] or [N, ...], but got {list(samples.shape)}")
    if samples.shape[0] == 0 or samples[0].numel() == 0:
        raise ValueError(f"{name}: expected at least one sample of at least one value, but got {list(samples.shape)}")
    if not samples.is_floating_point():
        raise TypeError(
            f"{name}: expected floating-point values in [0, 1], but got {samples.dtype}; for 8-bit images pass X / 255"
        )
    samples = samples.detach().flatten(1)
    if n_features is not None and samples.shape[1] != n_features:
        raise ValueError(f"{name}: expected {n_features} values a sample, as in fit, but got {samples.shape[1]}")
    finite = samples.isfinite().all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{name}: expected finite values, but {len(bad)} samples hold NaN or infinity, first {bad[:5]}"
        )
    low, high = samples.min().item(), samples.max().item()
    if low < 0 or high > 1:
        raise ValueError(f"{name}: expected values in [0, 1], but they span [{low:g}, {high:g}]; scale the data")
    return samples.float()
