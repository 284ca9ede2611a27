"""Checks for what makes a detector useless without an error. Each returns a warning with its evidence, or None.

Every message begins with the name of its kind, up to the colon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import joined

ACTIVE_NATS = 0.01  # a latent dimension whose mean divergence is below carries nothing (Burda et al., ICLR 2016)
IMAGE_FEATURES = 64  # features from which on rows may be flat images, whose edges never change
FEW = 0.02  # share of the training samples that may be left out of the training for lying far out
FAR_SQUARE = 16.0  # mean square in standard deviations from which on a sample may lie far out
CHANGEABLE = ("target_fpr", "verbose")  # parameters that count without a new fit
FENCE = 3.0  # interquartile ranges beyond the upper quartile: "far out" in Tukey, Exploratory Data Analysis, 1977


class DetectorWarning(UserWarning):
    """The detector works, but its results may be useless."""


@dataclass(frozen=True)
class Profile:
    """The scaled training samples: their range, and mean and spread of the means of every channel over an image.

    channel_mean, channel_std: for three channels, else empty.
    """

    low: float
    high: float
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()

    @staticmethod
    def of(blocks: Iterable[Tensor]) -> Profile:
        """blocks of samples: [n, D] or [n, C, H, W] each."""
        low, high = math.inf, -math.inf

        def channel_means() -> Iterator[np.ndarray]:
            nonlocal low, high
            for samples in blocks:
                low, high = min(low, samples.min().item()), max(high, samples.max().item())
                if samples.ndim == 4 and samples.shape[1] == 3:
                    yield samples.double().mean((2, 3)).numpy()

        channels = torch.from_numpy(joined(channel_means()))
        if not len(channels):
            return Profile(low, high)
        return Profile(low, high, tuple(channels.mean(0).tolist()), tuple(channels.std(0, correction=0).tolist()))

    @property
    def span(self) -> float:
        return self.high - self.low


# --- in fit ----------------------------------------------------------------------------------------------------------


def of_features(low: np.ndarray, high: np.ndarray, alone: bool) -> Iterator[str]:
    """low, high [D]: each feature's training range; alone: whether features are separate quantities, not pixels."""
    constant = np.flatnonzero(low == high)
    if len(constant) == len(low):
        yield "constant data: all training samples are the same, so that nothing can be learned from them"
    elif alone and len(constant) and len(low) < IMAGE_FEATURES:
        yield (
            f"constant features: {len(constant)} of {len(low)} are the same in all training samples, first "
            f"{constant[:5].tolist()}; a change in one counts by its own size, so that small ones pass: leave them out"
        )


def far_out(spread: np.ndarray) -> np.ndarray:
    """Which training samples, by their `Scaling.spread` [N], would dominate the training, bool [N].

    Those beyond ``Q3 + 3 (Q3 - Q1)`` of the logarithms, if they are at most `FEW` of all: more form their own kind.
    """
    logs = np.log(np.maximum(spread, np.finfo(np.float64).tiny))
    lower, upper = np.quantile(logs, [0.25, 0.75])
    far = logs > max(upper + FENCE * (upper - lower), math.log(FAR_SQUARE))
    return far if far.sum() <= FEW * len(far) else np.zeros(len(far), bool)


def of_far_out(rows: np.ndarray, N: int) -> Iterator[str]:
    """rows: those of N training samples that were left out."""
    if len(rows):
        yield (
            f"far-out samples: {len(rows)} of {N} training samples lie far from all others, rows {rows[:5].tolist()}; "
            "the model is trained without them; look at them"
        )


def of_representations(N: int, dead: int, latent: Tensor, score: str, layer: object) -> Iterator[str]:
    """Of N training samples: how many have a gradient of zero; latent [L], the mean divergence of each dimension."""
    if dead > 0.01 * N and not score.startswith(("reconstruction", "latent")):
        yield (
            f"dead gradients: that of the layer {layer!r} is exactly zero for {dead} of {N} training samples (dead or "
            "saturated units); choose another layer, lower learning_rate, or scale the data"
        )
    if latent.numel() and bool((latent < ACTIVE_NATS).all()):
        yield (
            f"collapsed posterior: the {latent.numel()} latent dimensions carry {latent.sum().item():.2g} nats "
            "together, so that the decoder gives the same image for all; train longer, or with fewer latent dimensions"
        )


def of_training_scores(novelty: np.ndarray, rows: np.ndarray) -> Iterator[str]:
    """Training samples far above the others: novelties that the training data already hold.

    More than 0.8% beyond ``Q3 + 3 (Q3 - Q1)``, of the logarithm where all scores are positive, or one beyond
    ``Q3 + 4.5 (Q3 - Q1)``. Both limits lie between those of clean tables and of planted noise in the tests.
    """
    values = np.log(novelty) if (novelty > 0).all() else novelty
    lower, upper = np.quantile(values, [0.25, 0.75])
    fence = FENCE * (upper - lower)
    far = np.flatnonzero(values > upper + fence)
    if upper > lower and (len(far) > 0.008 * len(values) or values.max() > upper + 1.5 * fence):
        far = far[np.argsort(-novelty[far])]
        yield (
            f"novelties in the training data: {len(far)} of {len(values)} samples score far above the others, rows "
            f"{rows[far[:5]].tolist()} the most ({novelty[far[0]]:.4g}, where the median is {np.median(novelty):.4g}); "
            "look at them, or say contamination="
        )


def of_calibration(n: int, target_fpr: float) -> Iterator[str]:
    """n samples, from which a threshold for ``target_fpr`` was taken."""
    if 1 / (n + 1) > target_fpr:
        yield (
            f"target_fpr={target_fpr:g} cannot be promised with {n} held-out samples: the threshold is the largest of "
            f"their scores, for false alarms at up to {1 / (n + 1):.3g}; hold out {math.ceil(1 / target_fpr) - 1} or "
            "more (calibration_fraction=, X_calibration=)"
        )


# --- in scoring ------------------------------------------------------------------------------------------------------


def of_changes(fitted: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Parameters of the fit and those now, by name: which ones were changed and have no effect without a new fit."""
    told = [
        f"{name}={fitted[name]!r} is now {value!r}"
        for name, value in now.items()
        if name not in CHANGEABLE and value is not fitted[name] and value != fitted[name]
    ]
    if told:
        yield f"changed parameters: {', '.join(told)}; scores are those of the last fit, call fit again"


def of_input(samples: Tensor, beyond: np.ndarray, profile: Profile) -> Iterator[str]:
    """Samples [N, *input_shape] in units of the scale that do not look like the training samples.

    beyond: [N], which of them lie far outside of the training range of a feature. One such sample may be a novelty; if
    half of them are, they are on another scale.
    """
    low, high, span = samples.min().item(), samples.max().item(), profile.span
    if span == 0:
        return
    seen = f"[{low:.3g}, {high:.3g}], where the training samples spanned [{profile.low:.3g}, {profile.high:.3g}]"
    outside = torch.from_numpy(np.asarray(beyond))
    if 2 * int(outside.sum()) >= max(len(samples), 2):
        yield (
            f"inputs outside the training range: scaled values span {seen}, far outside in {int(outside.sum())} of "
            f"{len(samples)} samples; are they on the scale of fit, such as 0 to 1 or 0 to 255?"
        )
    elif high - low < span / 50 and high < profile.low + span / 50:
        yield f"inputs of a smaller scale: scaled values span {seen}; were they divided by 255 once too often?"
    if len(profile.channel_mean) == 3 and len(samples) >= 8 and outside.logical_not().any():
        means = samples.double().mean((0, 2, 3)).cpu()
        trained = torch.tensor(profile.channel_mean, dtype=torch.float64, device="cpu")
        spread = torch.tensor(profile.channel_std, dtype=torch.float64, device="cpu").clamp_min(1e-6)
        as_is, reversed_ = (((m - trained) / spread).norm().item() for m in (means, means.flip(0)))
        if as_is * math.sqrt(len(samples)) > 15 and reversed_ < as_is / 3:
            yield (
                f"channels in another order: their means are {_shown(means)}, in fit they were {_shown(trained)}, "
                "which the reversed order fits better; RGB or BGR?"
            )


def _shown(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values.tolist()) + ")"
