"""Why a sample is novel: which layers, which inputs, and which training samples its gradient is nearest to."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..layer_grads import batch_layer_factors
from .detector import NoveltyDetector, Rows
from .representations import RECONSTRUCTION_LOSSES, Characterization, factors_of, in_order, layer_names, parts_of

ROWS_AT_A_TIME = 256


def layer_shares(detector: NoveltyDetector, X: Rows) -> dict[str, np.ndarray]:
    """Each decoder weight's share of the squared gradient norm, ``‖G_l‖² / Σ_k ‖G_k‖²``: name -> [N].

    Where all gradients are zero so are shares.
    """
    samples = _samples(detector, X)
    names = layer_names(detector.model_, samples[:1], None, detector.loss_)
    parts: list[dict[str, Tensor]] = []
    for batch in samples.split(ROWS_AT_A_TIME):
        factors = factors_of(detector.model_, batch, detector.loss_, names)
        parts.append({name: f.sq_norm().detach() for name, f in factors.items()})
    squares = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    total = functools.reduce(torch.add, squares.values())
    return {n: torch.where(total > 0, s / total, torch.zeros_like(s)).cpu().numpy() for n, s in squares.items()}


def saliency(detector: NoveltyDetector, X: Rows) -> np.ndarray:
    """``∂ novelty / ∂ x`` of each sample, x the scaled sample as input and as target -> [N, *input_shape]."""
    batches = _samples(detector, X).split(ROWS_AT_A_TIME)
    return torch.cat([_saliency(detector, batch).cpu() for batch in batches]).numpy()


def _saliency(detector: NoveltyDetector, batch: Tensor) -> Tensor:
    shifted = _Shifted(detector.model_, batch).eval()

    def error(output: Tensor, target: Tensor) -> Tensor:
        return RECONSTRUCTION_LOSSES[detector.loss_](output, target + shifted.shift).flatten(1)

    layers = [f"model.{name}" for name in detector.layers_]
    factors = batch_layer_factors(
        shifted, batch, loss=lambda output, target: error(parts_of(output)[0], target).sum(1), layers=layers,
        create_graph=True,
    )  # fmt: skip
    reconstruction, latent = parts_of(shifted(batch))
    sample = Characterization(error(reconstruction, batch), latent, in_order(factors, layers))
    (gradient,) = torch.autograd.grad(detector.score_.differentiable(sample).sum(), shifted.shift)
    return gradient


def nearest_training(
    detector: NoveltyDetector, X: Rows, X_training: Rows, *, k: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``X_training`` whose gradients point most nearly the same way, and the cosines: two times [N, k].

    ``cos(G_i, G_j)`` of the detector's layers, from the factored Gram matrix: no gradient is written.
    """
    samples, training = _samples(detector, X), _samples(detector, X_training)
    if not 1 <= k <= len(training):
        raise ValueError(f"k: expected 1 to {len(training)}, the number of training samples, but got {k!r}")
    of_samples = factors_of(detector.model_, samples, detector.loss_, detector.layers_)
    cosines = []
    for batch in training.split(ROWS_AT_A_TIME):
        factors = factors_of(detector.model_, batch, detector.loss_, detector.layers_)
        gram = sum(of_samples[name].gram(factors[name]) for name in factors)
        norms = torch.outer(of_samples.norm(), factors.norm())
        cosines.append((gram / norms.clamp_min(torch.finfo(norms.dtype).tiny)).detach())
    best = torch.cat(cosines, dim=1).topk(k, dim=1)
    return best.indices.cpu().numpy(), best.values.cpu().numpy()


class _Shifted(nn.Module):
    """``model(x + shift)``: an input to differentiate by, since gradext takes inputs as constants."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model, self.shift = model, nn.Parameter(torch.zeros_like(x))

    def forward(self, x: Tensor) -> Any:
        return self.model(x + self.shift)


def _samples(detector: NoveltyDetector, X: Rows) -> Tensor:
    like = next(detector.model_.parameters())
    return detector._as_samples(detector._validated(X), like.dtype).to(like.device)
