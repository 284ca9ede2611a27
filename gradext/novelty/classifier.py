"""The paper's classifier: two linear layers with a sigmoid between, inliers against noise-distorted inliers.

Its first layer is applied to the factors of gradients: no [N, O, I] tensor is formed, in training or in scoring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..factors import GradFactors
from .representations import Characterization
from .scores import whitener

REPRESENTATIONS = ("reconstruction", "latent", "gradient")
# Weights of direction and magnitude among the gradient features: length of the direction, spread of the magnitude.
DIRECTION_LENGTH, MAGNITUDE_SPREAD = 30.0, 10.0


@dataclass(frozen=True, eq=False)
class GradientFeatures:
    """Magnitude and direction of gradients as separate inputs, ``[30 g/‖g‖, 10 z(log ‖g‖)]`` -> [N, O·I + 1].

    Norms of raw gradients differ by orders of magnitude, which hides their direction from a classifier and saturates
    its sigmoids. z standardises with the mean and standard deviation of the training inliers' log-norms. The direction
    is stored as factors with scaled deltas; its length 30 is an option of `features`.
    """

    direction: GradFactors
    magnitude: Tensor  # [N]

    @staticmethod
    def of(
        gradient: GradFactors, mean: float, std: float, direction_length: float = DIRECTION_LENGTH
    ) -> GradientFeatures:
        norm = gradient.norm()
        scale = torch.where(norm > 0, direction_length / norm, torch.zeros_like(norm))
        delta = gradient.delta * scale.reshape(-1, *[1] * (gradient.delta.ndim - 1))
        magnitude = MAGNITUDE_SPREAD * (log_norm(gradient) - mean) / std
        return GradientFeatures(GradFactors(gradient.activation, delta), magnitude)

    @property
    def dim(self) -> int:
        _, O, I = self.direction.shape
        return O * I + 1

    def __len__(self) -> int:
        return len(self.magnitude)

    def __getitem__(self, index: Any) -> GradientFeatures:
        return GradientFeatures(self.direction[index], self.magnitude[index])

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear(self.materialize(), weight, bias)`` with weight [H, O·I + 1] -> [N, H], from the factors."""
        direction = self.direction.linear(weight[:, :-1].reshape(-1, *self.direction.shape[1:]), bias)
        return direction + torch.outer(self.magnitude, weight[:, -1])

    def materialize(self) -> Tensor:
        """The features written out, [N, O·I + 1]: the reference that `linear` is tested against."""
        return torch.cat([self.direction.materialize().flatten(1), self.magnitude[:, None]], dim=1)


def log_norm(gradient: GradFactors) -> Tensor:
    """log ‖g‖, with the smallest normal number in place of zero."""
    norm = gradient.norm()
    return norm.clamp_min(torch.finfo(norm.dtype).tiny).log()


@dataclass(frozen=True, eq=False)
class Features:
    """The inputs of a classifier, from a `Characterization`.

    Gradients are whitened, ``g -> L_D⁻¹ g L_A⁻ᵀ`` with the Cholesky factors of the training inliers' Kronecker factors
    (`GradFactors.kron_fisher`, a ridge added): on the factors, ``a -> L_A⁻¹ a`` and ``δ -> L_D⁻¹ δ``. Their length
    is then the Kronecker Fisher norm, and directions in which inliers do not vary count as much as the others.

    mean and std: of the training inliers' log-norms; activation_whitener [I, I] and delta_whitener [O, O]: the
    transposes of ``L_A⁻¹`` and ``L_D⁻¹``; None: gradients are not whitened. direction_length: see `features`.
    """

    representation: str
    mean: float = 0.0
    std: float = 1.0
    activation_whitener: Tensor | None = None
    delta_whitener: Tensor | None = None
    direction_length: float = DIRECTION_LENGTH

    def __call__(self, sample: Characterization) -> Tensor | GradientFeatures:
        if self.representation != "gradient":
            return getattr(sample, self.representation)
        return GradientFeatures.of(self.whitened(sample.gradient), self.mean, self.std, self.direction_length)

    def whitened(self, gradient: GradFactors) -> GradFactors:
        if self.activation_whitener is None or self.delta_whitener is None:
            return gradient
        return GradFactors(gradient.activation @ self.activation_whitener, gradient.delta @ self.delta_whitener)


def features(
    representation: str,
    inliers: Characterization,
    *,
    whiten: bool = True,
    direction_length: float = DIRECTION_LENGTH,
) -> Features:
    """The classifier's features, scaled by the training inliers; ``whiten``: gradients, see `Features`.

    direction_length: of a gradient's direction, beside a magnitude of spread 10. A classifier learns the noise by the
    direction, what noise and novelty have in common by the magnitude.
    """
    if representation not in REPRESENTATIONS:
        raise ValueError(f"representation: expected one of {REPRESENTATIONS}, but got {representation!r}")
    if representation != "gradient":
        return Features(representation)
    made = Features(representation, direction_length=direction_length)
    if whiten:
        activation, delta = (whitener(factor) for factor in inliers.gradient.kron_fisher())
        made = replace(made, activation_whitener=activation, delta_whitener=delta)
    logs = log_norm(made.whitened(inliers.gradient))
    return replace(made, mean=logs.mean().item(), std=logs.std(correction=0).item() or 1.0)


class NoiseClassifier(nn.Module):
    """``logit = w · sigmoid(W f + b) + c``: positive is an outlier; f [N, dim] or `GradientFeatures` -> [N]."""

    def __init__(self, dim: int, hidden_dim: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, 1)

    def forward(self, f: Tensor | GradientFeatures) -> Tensor:
        """The logits [N]."""
        layer = self.hidden
        hidden = f.linear(layer.weight, layer.bias) if isinstance(f, GradientFeatures) else layer(f)
        return self.output(torch.sigmoid(hidden)).squeeze(-1)


def train_classifier(
    inliers: Tensor | GradientFeatures,
    outliers: Tensor | GradientFeatures,
    *,
    hidden_dim: int = 64,
    epochs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> NoiseClassifier:
    """Fit a `NoiseClassifier` by binary cross entropy and Adam; half of every batch are inliers, half outliers.

    ``epochs`` None: 4, or on small sets as many as make 250 steps. Seeded; the global random state is left as it was.
    """
    count = min(len(inliers), len(outliers))
    if count == 0:
        raise ValueError("inliers, outliers: expected at least one sample of each, but got none")
    half = max(1, batch_size // 2)
    epochs = max(4, math.ceil(250 / math.ceil(count / half))) if epochs is None else epochs
    reference = inliers.magnitude if isinstance(inliers, GradientFeatures) else inliers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dim = inliers.dim if isinstance(inliers, GradientFeatures) else inliers.shape[1]
        classifier = NoiseClassifier(dim, hidden_dim)
    classifier.to(reference.device, reference.dtype)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=learning_rate)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        pairs = zip(
            torch.randperm(len(inliers), generator=order, device="cpu")[:count].split(half),
            torch.randperm(len(outliers), generator=order, device="cpu")[:count].split(half),
            strict=True,
        )
        for inside, outside in pairs:
            logits = torch.cat([classifier(inliers[inside]), classifier(outliers[outside])])
            labels = torch.cat([logits.new_zeros(len(inside)), logits.new_ones(len(outside))])
            optimizer.zero_grad(set_to_none=True)
            F.binary_cross_entropy_with_logits(logits, labels).backward()
            optimizer.step()
    return classifier.eval()
