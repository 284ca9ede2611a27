"""Label-free scores: one function each, from a `Characterization` to a novelty [N]; higher is more novel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .representations import Characterization


@dataclass(frozen=True, eq=False)
class Statistics:
    """What scores keep of the training inliers. mean_gradient: [O, I], the mean per-sample gradient."""

    mean_gradient: Tensor

    @staticmethod
    def of(inliers: Characterization) -> Statistics:
        return Statistics(inliers.gradient.mean())


def gradient_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``‖∇_W L‖``, how far the sample would move the weights (the paper's Fig. 2c)."""
    return sample.gradient.norm()


def delta_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(Σ_t ‖δ_t‖²)^½``: the gradient's norm without the activation's."""
    return torch.linalg.vector_norm(sample.gradient.delta.flatten(1), dim=1)


def gradient_cosine(sample: Characterization, statistics: Statistics) -> Tensor:
    """``1 - cos(∇_W L, mean training gradient)``, after GradCon (Kwon et al., ECCV 2020); in [0, 2]."""
    return 1 - sample.gradient.cosine(statistics.mean_gradient)


def reconstruction_error(sample: Characterization, statistics: Statistics) -> Tensor:
    """The summed binary cross entropy (Fig. 2a); nats."""
    return sample.reconstruction.sum(1)


def latent_loss(sample: Characterization, statistics: Statistics) -> Tensor:
    """The summed Kullback-Leibler divergence (Fig. 2b); nats."""
    return sample.latent.sum(1)


SCORES: dict[str, Callable[[Characterization, Statistics], Tensor]] = {
    score.__name__: score for score in (gradient_norm, delta_norm, gradient_cosine, reconstruction_error, latent_loss)
}
