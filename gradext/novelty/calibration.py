"""From scores to decisions: thresholds, p-values and selections with guaranteed rates of error.

If n calibration scores and the score of one normal sample are exchangeable (the samples are drawn in the same way, and
none of them was trained on), the rank of that score among all n + 1 is uniform. Here scores are novelties: higher is
more novel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Calibration:
    """The novelties of n normal samples that were held out. scores: [n], sorted here.

    >>> calibration = Calibration(np.arange(1, 20))
    >>> calibration.threshold(target_fpr=0.1), calibration.attainable_fpr
    (18.0, 0.05)
    >>> calibration.p_values(np.array([0.5, 18.5, 30.0])).tolist()
    [1.0, 0.1, 0.05]
    """

    scores: np.ndarray

    def __post_init__(self) -> None:
        scores = np.sort(np.asarray(self.scores, dtype=np.float64))
        if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
            raise ValueError(f"scores: expected finite values [n], n >= 1, but got {scores.dtype} {list(scores.shape)}")
        object.__setattr__(self, "scores", scores)

    def threshold(self, target_fpr: float) -> float:
        """The k-th smallest score, ``k = ⌈(n + 1)(1 - target_fpr)⌉``: normal samples exceed it at that rate at most.

        If ``(n + 1) target_fpr < 1`` no score is high enough: the result is the largest score, which normal samples
        exceed at a rate of at most `attainable_fpr`. Source: Vovk, Gammerman and Shafer, "Algorithmic Learning in a
        Random World", 2005.
        """
        if not 0 < target_fpr < 1:
            raise ValueError(f"target_fpr: expected a number between 0 and 1, but got {target_fpr!r}")
        n = len(self.scores)
        k = math.ceil((n + 1) * (1 - target_fpr) - 1e-9)  # 20 · 0.95 is 19 up to rounding
        return float(self.scores[min(max(k, 1), n) - 1])

    @property
    def attainable_fpr(self) -> float:
        """``1 / (n + 1)``, the lowest rate of false alarms that n scores can promise."""
        return 1 / (len(self.scores) + 1)

    def p_values(self, novelty: np.ndarray) -> np.ndarray:
        """Conformal p-values, ``(1 + #{i: scores_i >= novelty}) / (n + 1)`` -> [N].

        For a normal sample ``P(p <= t) <= t`` at every t, over the draw of calibration and sample together. Source:
        Bates, Candès, Lei, Romano and Sesia, "Testing for outliers with conformal p-values", Annals of Statistics 2023.
        """
        above = len(self.scores) - np.searchsorted(self.scores, novelty, side="left")
        return (1 + above) / (len(self.scores) + 1)


def benjamini_hochberg(p_values: np.ndarray, fdr: float) -> np.ndarray:
    """Which hypotheses to reject so that the expected share of false ones among them is at most ``fdr`` -> bool [N].

    Rejects the k smallest p-values, k the largest with ``p_(k) <= k fdr / N``. Holds for conformal p-values, whose
    dependence is positive (Bates et al., 2023). Source: Benjamini and Hochberg, JRSS B 1995.

    >>> benjamini_hochberg(np.array([0.01, 0.6, 0.04, 0.2]), fdr=0.1)
    array([ True, False,  True, False])
    """
    if not 0 < fdr < 1:
        raise ValueError(f"fdr: expected a number between 0 and 1, but got {fdr!r}")
    p_values = np.asarray(p_values, dtype=np.float64)
    if p_values.ndim != 1 or not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p_values: expected numbers in [0, 1], shape [N], but got shape {list(p_values.shape)}")
    if not p_values.size:
        return np.zeros(0, bool)
    from scipy.stats import false_discovery_control  # takes half a second to import

    # Conformal p-values lie on a grid that meets the bounds: 0.1 is 0.3 · 1/3 up to rounding.
    return false_discovery_control(p_values) <= fdr * (1 + 1e-9)
