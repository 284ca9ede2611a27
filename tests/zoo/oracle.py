"""Models ready to be judged, and what they are judged by: each sample alone, by plain autograd.

Knows nothing of gradext.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .models import Case, classes

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Grads = dict[str, Tensor]  # {parameter name: [B, *shape]}


def make(case: Case, B: int, dtype: torch.dtype | None = None) -> tuple[nn.Module, Callable, Any, Any]:
    """The model, its loss as a function, and B samples' inputs and targets; in ``dtype``, by default the case's own."""
    torch.manual_seed(0)
    model = case.build().double().eval()
    if case.checkpoint:  # which transformers does in training mode alone
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    with torch.no_grad():  # what starts as zero or one would hide errors
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(torch.bfloat16 if case.dtype == torch.bfloat16 else torch.float64).to(dtype or case.dtype)
    x, target = case.data(B)
    loss = {"cross_entropy": classes}.get(case.loss, case.loss)
    return model, loss, cast(x, dtype or case.dtype), target


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def rows(tree: Any, b: int) -> Any:
    return pytree.tree_map(lambda t: t[b : b + 1], tree)


def call(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, Mapping) else model(x)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def backward(losses: Tensor, parameters: dict[str, nn.Parameter], b: int) -> list[Tensor]:
    grads = torch.autograd.grad(losses[b], list(parameters.values()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True)]


@contextmanager
def sound_batch_norm(model: nn.Module) -> Iterator[None]:
    """torch 2.13 on a CPU: the backward of batch norm is wrong where B is 1 and the gradient comes transposed.

    A single image's gradient can have strides (3, 1, 6, 3), from `y.flatten(2).transpose(1, 2)`; its bias's gradient
    then differs from the sum over positions. A contiguous copy is right.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def contiguous(module, args, output):
        output.register_hook(Tensor.contiguous)

    handles = [norm.register_forward_hook(contiguous) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def alone(model: nn.Module, loss: Callable, x: Any, target: Any) -> Grads:
    """Each sample in a batch of its own."""
    parameters = trained(model)
    B = len(pytree.tree_leaves(x)[0])
    with sound_batch_norm(model):
        samples = [backward(loss(call(model, rows(x, b)), rows(target, b)), parameters, 0) for b in range(B)]
    return {name: torch.stack(grads) for name, *grads in zip(parameters, *samples, strict=True)}


def together(model: nn.Module, loss: Callable, x: Any, target: Any) -> Grads:
    """∂ losses[b] / ∂ parameter of one run of the batch: differs from `alone` where samples mix."""
    parameters = trained(model)
    losses = loss(call(model, x), target)
    samples = [backward(losses, parameters, b) for b in range(len(losses))]
    return {name: torch.stack(grads) for name, *grads in zip(parameters, *samples, strict=True)}


def rows_of(grads: Tensor) -> Tensor:
    return grads.double().reshape(len(grads), -1)


def errors(found: Grads, want: Grads) -> dict[str, float]:
    """By parameter, the largest over samples of ‖found − want‖ / ‖want‖.

    A parameter whose gradient is zero in exact arithmetic (a key's bias under softmax) has only rounding; it is
    measured by a millionth of the norm of the sample's whole gradient.
    """
    whole = torch.stack([rows_of(g).square().sum(1) for g in want.values()]).sum(0).sqrt()
    result = {}
    for name, w in want.items():
        if found[name].shape != w.shape:
            result[name] = float("inf")
            continue
        w, g = rows_of(w), rows_of(found[name])
        result[name] = ((g - w).norm(dim=1) / w.norm(dim=1).maximum(1e-6 * whole)).nan_to_num(float("inf")).max().item()
    return result
