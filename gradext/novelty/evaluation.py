"""How well scores separate labelled samples: AUROC with its interval, by label, and by pixel against masks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from ..sources import Source
from . import explain
from .detector import NoveltyDetector

PIXELS_FROM = 64  # images with a mask that are read together


@dataclass(frozen=True)
class Kind:
    """Samples of one label. auroc: against all normal ones, with its interval; None for normal labels."""

    label: str
    normal: bool
    samples: int
    called_novel: float
    auroc: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict:
        return asdict(self)


def auroc_interval(novel: np.ndarray, novelty: np.ndarray) -> tuple[float, float, float]:
    """(AUROC, low, high): with the 95% interval of DeLong's variance, on the logit's scale; ends within [0, 1].

    Source: DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
    characteristic curves", Biometrics 1988.

    >>> auroc_interval(np.array([0, 0, 1, 1], bool), np.array([1.0, 3.0, 2.0, 4.0]))[0]
    0.75
    """
    m, n = int(novel.sum()), int((~novel).sum())
    ranks = rankdata(novelty)
    of_novel = (ranks[novel] - rankdata(novelty[novel])) / n
    of_normal = 1 - (ranks[~novel] - rankdata(novelty[~novel])) / m
    area = float(of_novel.mean())
    spread = lambda values: float(values.var(ddof=1)) if len(values) > 1 else 0.25  # noqa: E731
    # The variance is zero if the classes do not overlap: one more sample, on the other side, bounds it.
    variance = max(spread(of_novel) / m + spread(of_normal) / n, (0.5 / (m * n)) ** 2)
    inside = min(max(area, 0.5 / (m * n)), 1 - 0.5 / (m * n))
    logit, width = math.log(inside / (1 - inside)), 1.96 * math.sqrt(variance) / (inside * (1 - inside))
    low, high = (1 / (1 + math.exp(-min(max(logit + sign * width, -50), 50))) for sign in (-1, 1))
    return area, min(low, area), max(high, area)


def by_label(labels: np.ndarray, normal: np.ndarray, novelty: np.ndarray, threshold: float) -> list[Kind]:
    """One `Kind` a label, normal ones first; normal: [N], which samples are."""
    kinds = []
    for label in sorted(set(labels.tolist()), key=lambda name: (not normal[labels == name].any(), name)):
        own = labels == label
        is_normal, called = bool(normal[own].all()), float((novelty[own] > threshold).mean())
        area = low = high = None
        if not is_normal and normal.any():
            chosen = own | normal
            area, low, high = auroc_interval(own[chosen], novelty[chosen])
        kinds.append(Kind(label, is_normal, int(own.sum()), called, area, low, high))
    return kinds


def pixel_auroc(detector: NoveltyDetector, source: Source) -> float | None:
    """Mean over the images with a mask of the AUROC of their `explain.heat` against it; None where there are none."""
    found = []
    rows = np.asarray(sorted(source.masks), np.int64)
    for block in source.blocks(rows, PIXELS_FROM):
        maps = explain.heat(detector, block.samples) if len(block.index) else ()
        for row, values in zip(block.index.tolist(), maps, strict=True):
            mask = mask_of(source.masks[row], values.shape)
            if mask.any() and not mask.all():
                found.append(roc_auc_score(mask.ravel(), values.ravel()))
    return float(np.mean(found)) if found else None


def mask_of(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A mask in the size of the model's images, bool [H, W]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((shape[1], shape[0]), Image.Resampling.NEAREST)) > 0
