"""Per-sample gradients by a loop and by `vmap(grad)`: oracles of tests, baselines of the benchmarks and the demo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .losses import PerSampleLoss


def loop_layer_grads(model: nn.Module, x: Tensor, loss: PerSampleLoss, names: Sequence[str]) -> dict[str, Tensor]:
    """One full backward pass for each sample alone: ``{name: [B, *parameter.shape]}``."""
    parameters = dict(model.named_parameters())
    grads: dict[str, list[Tensor]] = {name: [] for name in names}
    for sample in x.split(1):
        model.zero_grad(set_to_none=True)
        loss(_first(model(sample)), sample).sum().backward()
        for name in names:
            gradient = parameters[name].grad
            if gradient is None:
                raise ValueError(f"{name}: the loss does not depend on it")
            grads[name].append(gradient)
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(values) for name, values in grads.items()}


def vmap_layer_grads(model: nn.Module, x: Tensor, loss: PerSampleLoss, names: Sequence[str]) -> dict[str, Tensor]:
    """``torch.func.vmap(torch.func.grad(...))`` over the named parameters: torch's own fastest route."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    chosen = {name: parameters.pop(name) for name in names}

    def sample_loss(chosen: dict[str, Tensor], sample: Tensor) -> Tensor:
        output = torch.func.functional_call(model, {**parameters, **chosen}, (sample[None],))
        return loss(_first(output), sample[None]).sum()

    return torch.func.vmap(torch.func.grad(sample_loss), (None, 0))(chosen, x)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output
