"""`NoveltyDetector` as a PyOD detector (`pip install pyod`): the same scores by PyOD's methods."""

from __future__ import annotations

import numpy as np
from pyod.models.base import BaseDetector
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from .detector import NoveltyDetector, Rows


class GradientNovelty(BaseDetector):
    """PyOD's `decision_function`, `predict`, `predict_proba`, ... on ``-NoveltyDetector.score_samples``.

    Parameters: ``detector``, an unfitted `NoveltyDetector` (None: one of defaults), is cloned; ``contamination`` is
    PyOD's, the share of training samples that are called outliers, which sets ``threshold_``.

    Attributes: ``detector_`` the fitted `NoveltyDetector`; of PyOD ``decision_scores_``, ``threshold_``, ``labels_``.
    """

    def __init__(self, detector: NoveltyDetector | None = None, contamination: float = 0.1) -> None:
        super().__init__(contamination=contamination)
        self.detector = detector

    def fit(self, X: Rows, y: object = None) -> GradientNovelty:
        """Train on ``X`` [N, D]; ``y`` is ignored."""
        self._set_n_classes(y)
        self.detector_ = (NoveltyDetector() if self.detector is None else clone(self.detector)).fit(X)
        self.decision_scores_ = -self.detector_.score_samples(X)
        self._process_decision_scores()
        return self

    def decision_function(self, X: Rows) -> np.ndarray:
        """Novelty [N]; higher is more novel."""
        check_is_fitted(self, ["detector_", "decision_scores_"])
        return -self.detector_.score_samples(X)
