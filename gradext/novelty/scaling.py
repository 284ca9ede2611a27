"""From raw samples to the model's inputs: one scale for a whole image, one for each column of a table.

Real tables have spikes, sentinels such as -9999 and heavy tails. The scale of a column is taken from its quantiles, and
values far outside are compressed by a logarithm, which keeps their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SOFT = 3.0  # standard deviations up to which the scale is linear
TAILS = (0.02, 0.98)  # quantiles between which spread is measured
WIDE = 2.0  # a spread of more than this many times the quartiles' is that of another kind of value in the column
SAMPLED = 1 << 22  # quantiles are taken of at most so many numbers; of more, of a sample
FLAT_IMAGE = 64  # rows in [0, 1] of at least this many columns are treated as flat images, which keep their scale
FLAT_BYTES = 196  # so are whole numbers up to 255 of at least this many columns
MARGIN = 2.0  # a feature may leave its training range by this many widths of it without a warning
IMAGE_SPREAD = 3.0  # pixels are divided by this many of their standard deviations for models of centred values
CHOICES = ("auto", "robust", "minmax", "none")
VECTORS = ("shift", "scale", "low", "high", "floor", "span")


@dataclass(frozen=True, eq=False)
class Scaling:
    """``y = (soft((x - shift) / scale) - floor) / span`` by feature; all vectors are [D].

    bent: whether soft is applied. low, high: the training range of x. floor and span scale the result to [0, 1] or to a
    mean of zero, as the model takes it.
    """

    bent: bool
    shift: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    floor: np.ndarray
    span: np.ndarray

    def units(self, X: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """``soft((X - shift) / scale)``, float64 [N, D]: pixels in [0, 1], or standard deviations."""
        out = np.empty(X.shape, np.float64) if out is None else out
        np.subtract(X, self.shift, out=out)
        out /= self.scale
        if self.bent:
            far = np.abs(out) > SOFT
            out[far] = soft(out[far])
        return out

    def __call__(self, X: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """X [N, D] -> float64 [N, D]."""
        out = self.units(X, out)
        out -= self.floor
        out /= self.span
        return out

    def inverse(self, Y: np.ndarray) -> np.ndarray:
        """The x that is scaled to y, [N, D]."""
        u = np.asarray(Y, np.float64) * self.span + self.floor
        if self.bent:
            far = np.sign(u) * (SOFT + np.expm1(np.clip(np.abs(u) - SOFT, 0, 700)))
            u = np.where(np.abs(u) > SOFT, far, u)
        return u * self.scale + self.shift

    @property
    def width(self) -> np.ndarray:
        """The width of the training range of each feature, [D]; for a constant its absolute value, at least 1."""
        width = self.high - self.low
        return np.where(width > 0, width, _own_size(self.high))

    def spread(self, X: np.ndarray) -> np.ndarray:
        """The mean square of each sample's features in standard deviations, [N]."""
        return np.square(self.units(X)).mean(1)

    @property
    def within_unit(self) -> bool:
        """Whether the training samples are scaled into [0, 1]."""
        ends = self(np.stack([self.low, self.high]))
        return bool(ends.min() >= 0 and ends.max() <= 1)

    def excess(self, X: np.ndarray) -> np.ndarray:
        """How far the most extreme feature of each sample lies outside of its training range, [N].

        In widths of that range, beyond the first `MARGIN`: 0 for everything within them.
        """
        X = np.asarray(X, np.float64)
        beyond = np.maximum(X - self.high, self.low - X) / self.width - MARGIN
        return np.maximum(beyond.max(1, initial=0.0), 0.0)


def soft(u: Any) -> Any:
    """``u`` within `SOFT`, beyond it ``±(SOFT + log(1 + |u| - SOFT))``."""
    return np.where(np.abs(u) <= SOFT, u, np.sign(u) * (SOFT + np.log1p(np.maximum(np.abs(u) - SOFT, 0))))


def fit_scaling(
    X: np.ndarray, parts: Sequence[np.ndarray], shape: tuple[int, ...], choice: str, *, centred: bool
) -> Scaling:
    """The scaling of ``choice``, of `CHOICES`, for the rows of ``X`` [N, D] that ``parts`` index.

    shape: of a sample, channels first. centred: whether the model wants values about zero; else they end in [0, 1].

    auto: bytes, and images of any type in 0..255, are divided by 255; images in [0, 1], flat ones too, are unchanged;
    images of other whole numbers are divided by a power of two less 1; everything else is robust, by feature for tables
    and by channel for images.
    """
    D = X.shape[1]
    low, high = np.full(D, np.inf), np.full(D, -np.inf)
    N = sum(map(len, parts))
    step = max(1, -(-N * D // SAMPLED))
    whole, sample, seen = True, [], 0
    for part in parts:
        block = X[part]
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        if X.dtype.kind == "f" and whole:
            whole = bool((block == np.rint(block)).all())
        if choice in ("auto", "robust") and X.dtype != np.uint8:
            sample.append(block[-seen % step :: step].astype(np.float64))
        seen += len(block)
    image, most = is_image(shape), float(high.max())
    positive = float(low.min()) >= 0
    factor, bent = None, False
    shift = np.zeros(D)
    if choice == "none":
        factor = 1.0
    elif choice == "auto" and X.dtype == np.uint8:
        factor = 255.0
    elif choice == "auto" and positive and most <= 1 and (image or D >= FLAT_IMAGE):
        factor = 1.0
    elif choice == "auto" and positive and 127 < most <= 255 and (image or (whole and D >= FLAT_BYTES)):
        factor = 255.0
    elif choice == "auto" and positive and image and whole:
        factor = float((1 << int(most).bit_length()) - 1)
    if factor is not None:
        scale = np.full(D, factor)
    elif choice == "minmax":
        shift, scale = low, np.where(high > low, high - low, _own_size(high))
    else:
        channels = shape[0] if image and len(shape) == 3 else D
        shift, scale = _robust(np.concatenate(sample), low, high, channels)
        bent = True
    made = Scaling(bent, *(np.asarray(v, np.float64) for v in (shift, scale, low, high, np.zeros(D), np.ones(D))))
    if not bent and choice != "minmax":  # a pixel's own range says little: one that was always blank may be inked
        low, high = np.full(D, low.min()), np.full(D, high.max())
    made = replace(made, low=low.astype(np.float64), high=high.astype(np.float64))
    if choice == "none" or (centred and bent):
        return made
    if centred:  # pixels: each one's own mean, one spread for all
        mean = sum((made.units(X[part]).sum(0) for part in parts), np.zeros(D)) / N
        square = sum(((made.units(X[part]) - mean) ** 2).sum() for part in parts) / (N * D)
        spread = IMAGE_SPREAD * float(np.sqrt(square)) or 1.0
        return replace(made, floor=mean, span=np.full(D, spread))
    if bent:
        ends = made.units(np.stack([low, high]).astype(np.float64))
        span = np.where(high > low, ends[1] - ends[0], 1.0)
        return replace(made, floor=ends[0], span=span)
    return made


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether a sample is an image: [H, W], or [C, H, W] with up to 4 channels, with at least 4 pixels on each side."""
    return (len(shape) == 2 or (len(shape) == 3 and shape[0] <= 4)) and min(shape[-2:]) >= 4


def _robust(sample: np.ndarray, low: np.ndarray, high: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre and spread of each column, [D]: mean and standard deviation between the `TAILS`.

    If these are wide compared with the quartiles, the column has values of another kind, and only the quartiles are
    used; if nothing lies between (mostly zeros), the plain standard deviation. groups: how many groups of neighbouring
    columns have a common scale.
    """
    D = len(low)
    each = D // groups
    table = sample.reshape(len(sample), groups, each).transpose(0, 2, 1).reshape(-1, groups)
    low, high = low.reshape(groups, each).min(1), high.reshape(groups, each).max(1)
    first, last, q1, median, q3 = np.quantile(table, [*TAILS, 0.25, 0.5, 0.75], axis=0)
    inner = np.clip(table, first, last)
    centre, spread = inner.mean(0), inner.std(0)
    quartile = WIDE * (q3 - q1) / 1.349
    foreign = (quartile > 0) & (spread > quartile)
    centre, spread = np.where(foreign, median, centre), np.where(foreign, quartile, spread)
    tiny = 1e-12 * np.maximum(np.abs(low), np.abs(high))  # rounding of equal numbers is no spread
    spread = np.where(spread > tiny, spread, np.minimum(table.std(0), high - low))
    spread = np.where(spread > tiny, spread, _own_size(high))
    return np.repeat(centre, each), np.repeat(spread, each)


def _own_size(value: np.ndarray) -> np.ndarray:
    """The scale of a constant feature: its absolute value, at least 1."""
    return np.maximum(1.0, np.abs(value))
