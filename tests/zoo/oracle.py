"""Models ready to be judged, and the oracle: each sample alone, by plain autograd.

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
    model.to(case.dtype).to(dtype or case.dtype)  # the same weights in each dtype
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


def norms(grads: Grads) -> Grads:
    """Each sample's norm of each parameter, ``{name: [B]}``."""
    return {name: g.double().reshape(len(g), -1).norm(dim=1) for name, g in grads.items()}


def distances(found: Grads, want: Grads) -> Grads:
    return norms({name: found[name].double() - w.double() for name, w in want.items()})


def whole(grads: Grads) -> Tensor:
    """The norm of each sample's gradient of all parameters, ``[B]``."""
    return torch.stack(list(norms(grads).values())).norm(dim=0)


def dtypes(losses: Tensor) -> set[torch.dtype]:
    """The types that the graph of the losses computes in."""
    seen, stack, found = set(), [losses.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {kind.dtype for kind in node._input_metadata}
            stack += [below for below, _ in node.next_functions]
    return found


def expect(case: Case, B: int) -> tuple[nn.Module, Any, Any, Grads, Grads, str]:
    """Model, inputs, target, the gradients they should give, how far each may be off, and that bound in words.

    In fp64 the relative error of each parameter of each sample is at most 1e-9, or 1e-6 where the model computes some
    of it in fp32, whatever the dtype of its weights (routers of experts, some normalisations): its graph says so. A
    parameter whose gradient is zero but for rounding (a key's bias under softmax) is measured by a millionth of the
    sample's whole gradient. In lower precision the error against fp64, with the same weights, is at most twice that of
    the sample alone in the same dtype, with one unit of rounding added.
    """
    model, loss, x, target = make(case, B)
    want = alone(model, loss, x, target)
    if case.dtype == torch.float64:
        itself = distances(together(model, loss, x, target), want)
        size = {name: norm.maximum(1e-6 * whole(want)) for name, norm in norms(want).items()}
        tolerance = 1e-6 if torch.float32 in dtypes(loss(call(model, x), target)) else 1e-9
        bound = {name: tolerance * s for name, s in size.items()}
        if not all((itself[name] <= bound[name]).all() for name in bound):
            raise AssertionError("the model mixes its samples: in a batch their gradients are others than alone")
        return model, x, target, want, bound, f"{tolerance:.0e}"
    exact = alone_in_fp64(case, B)
    own, size, unit = distances(want, exact), norms(exact), torch.finfo(case.dtype).eps
    bound = {name: 2 * own[name] + unit * (size[name] + 0.01 * whole(exact)) for name in exact}
    return model, x, target, exact, bound, f"twice that of {case.dtype} alone"


def alone_in_fp64(case: Case, B: int) -> Grads:
    """Each sample alone, with the same weights in fp64."""
    model, loss, x, target = make(case, B, torch.float64)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the only one that knows fp64
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of constants that a model makes
    try:
        return alone(model, loss, x, target)
    finally:
        torch.set_default_dtype(default)
