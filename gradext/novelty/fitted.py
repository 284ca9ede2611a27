"""`FittedScore`: a score together with what it has learned from the training inliers. Plain data, no closures."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .classifier import DIRECTION_LENGTH, REPRESENTATIONS, Features, NoiseClassifier, features, train_classifier
from .passes import Blocks
from .representations import Characterization
from .scores import SCORES, Statistics

WHITENERS = ("activation_whitener", "delta_whitener")
CLASSIFIER_SCORES = {f"{name}_classifier": name for name in REPRESENTATIONS}


@dataclass(frozen=True, eq=False)
class FittedScore:
    """``score(sample) -> [N]``, higher is more novel: label-free with `Statistics`, or features and a classifier."""

    name: str
    statistics: Statistics = field(default_factory=Statistics)
    features: Features | None = None
    classifier: NoiseClassifier | None = None

    @torch.no_grad()
    def __call__(self, sample: Characterization) -> Tensor:
        return self.differentiable(sample)

    def differentiable(self, sample: Characterization) -> Tensor:
        """The same, differentiable if ``sample`` is."""
        if self.classifier is None or self.features is None:
            return SCORES[self.name](sample, self.statistics)
        return self.classifier(self.features(sample))

    def tensors(self) -> dict[str, Tensor]:
        """Everything learned, by name: the fields of the statistics, or the features' scale and the weights."""
        if self.classifier is None or self.features is None:
            return self.statistics.tensors()
        scale = torch.tensor([self.features.mean, self.features.std], dtype=torch.float64, device="cpu")
        whiteners = {name: getattr(self.features, name) for name in WHITENERS}
        whiteners = {name: value for name, value in whiteners.items() if value is not None}
        return {"features": scale, **whiteners, **self.classifier.state_dict()}

    def with_tensors(self, tensors: dict[str, Tensor]) -> FittedScore:
        """The same score with other learned values, by the names of `tensors`."""
        if self.classifier is None or self.features is None:
            return replace(self, statistics=Statistics.from_tensors(tensors))
        state = dict(tensors)
        mean, std = state.pop("features").tolist()
        whiteners: Any = {name: state.pop(name, None) for name in WHITENERS}
        classifier = copy.deepcopy(self.classifier)
        classifier.load_state_dict(state)
        featurize = replace(self.features, mean=mean, std=std, **whiteners)
        return replace(self, features=featurize, classifier=classifier)

    def to(self, device: torch.device | str) -> FittedScore:
        """The same score on another device."""
        moved = self.with_tensors({name: value.to(device) for name, value in self.tensors().items()})
        return moved if moved.classifier is None else replace(moved, classifier=moved.classifier.to(device))


def fit_score(
    name: str,
    inliers: Characterization | Blocks[Characterization],
    distorted: Characterization | None,
    *,
    seed: int = 0,
    direction_length: float = DIRECTION_LENGTH,
    **classifier: Any,
) -> FittedScore:
    """The score ``name`` (of `SCORES`, or ``"<representation>_classifier"``), fitted to the inliers.

    ``distorted``: the characterised training outliers, which only classifiers need (these take no blocks);
    ``direction_length``: see `features`; further arguments go to `train_classifier`.
    """
    if name in SCORES:
        return FittedScore(name, Statistics.of(inliers, [name]))
    if name not in CLASSIFIER_SCORES:
        raise ValueError(f"score: expected one of {sorted([*SCORES, *CLASSIFIER_SCORES])}, but got {name!r}")
    if distorted is None or isinstance(inliers, Blocks):
        raise ValueError(
            f"score {name!r}: expected characterised inliers and training outliers, but got None or blocks"
        )
    featurize = features(CLASSIFIER_SCORES[name], inliers, direction_length=direction_length)
    model = train_classifier(featurize(inliers), featurize(distorted), seed=seed, **classifier)
    return FittedScore(name, features=featurize, classifier=model)
