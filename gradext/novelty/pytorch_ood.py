"""pytorch-ood's gradient detectors (`pip install pytorch-ood`) from factors: equal values, no gradient is written.

pytorch-ood forms the gradients of every sample by ``vmap(grad)``, [B, O, I] numbers a layer; here norms are computed
from B(O + I). It imports torchvision, which must be built for the installed torch: for CUDA, or for the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytorch_ood.detector as theirs
import torch
import torch.nn.functional as F
from torch import Tensor

from ..factors import GradFactors
from ..layer_grads import batch_layer_factors
from ..losses import PerSampleLoss


class GradNorm(theirs.GradNorm):
    """``-‖∂L/∂w‖₁``, L the mean over the classes of ``-log softmax(f(x) / T)``; arguments as pytorch-ood's.

    Source: Huang, Geng and Li, "On the importance of gradients for detecting distributional shifts in the wild",
    NeurIPS 2021.
    """

    def _predict_batched(self, x: Tensor) -> Tensor:
        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return -(logits / self.temperature).log_softmax(1).mean(1)

        return -_sum_over_parameters(self, x, loss, lambda factors: factors.norm(1))


class GradUncertainty(theirs.GradUncertainty):
    """``-‖∂L/∂w‖²``, L the binary cross entropy of the softmax with ones; arguments as pytorch-ood's.

    Source: Lee and AlRegib, "Gradients as a measure of uncertainty in neural networks", ICIP 2020.
    """

    def _predict_batched(self, x: Tensor) -> Tensor:
        def loss(logits: Tensor, target: Tensor) -> Tensor:
            p = logits.softmax(1)
            return F.binary_cross_entropy(p, torch.ones_like(p), reduction="none").sum(1)

        return -_sum_over_parameters(self, x, loss, GradFactors.sq_norm)


def _sum_over_parameters(
    detector: GradNorm | GradUncertainty, x: Tensor, loss: PerSampleLoss, of: Callable[[GradFactors], Tensor]
) -> Tensor:
    """``of`` each selected parameter's gradients, added up -> [B]."""
    names = list(detector._selected_params())
    factors = batch_layer_factors(detector.model, x, loss=loss, layers=names, target=x)
    return functools.reduce(torch.add, [of(factors[name]) for name in names]).detach()
