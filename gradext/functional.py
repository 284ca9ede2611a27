"""Gradients through torch's own machinery: slower and exact, for what gradext has no rule for, and to check by.

Parameters are handed to the model by `torch.func.functional_call`, so that its own are never written to.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.utils._pytree as pytree  # what torch.func itself takes nested inputs apart with
from torch import Tensor, nn

from .errors import CaptureError

Objective = Callable[[object, object], Tensor]  # (model output, target) -> the sum of the samples' losses
# Of gradients at a time. vmap holds about twice as much besides.
CHUNK_BYTES = 1 << 28


def vmap_grads(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping,
    target,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    chosen: Iterable[str],
    batch: int,
) -> dict[str, Tensor]:
    """``vmap(grad)`` over the chosen parameters, in chunks of samples -> {name: [B, *parameter.shape]}.

    ``args``, ``kwargs`` and ``target`` hold a sample in each row of those tensors that have ``batch`` rows; all else is
    the same for every sample. Randomness is each sample's own. Where torch cannot vectorise it warns, and loops.
    """
    constant, varied = _parted(parameters, chosen)
    samples = Samples((args, dict(kwargs), target), batch)

    def sample_loss(varied, rows):
        args, kwargs, target = samples.with_rows([row.unsqueeze(0) for row in rows])
        return objective(torch.func.functional_call(model, {**constant, **varied}, args, kwargs), target)

    size = sum(value.numel() * value.element_size() for value in varied.values())
    gradients = torch.func.vmap(
        torch.func.grad(sample_loss),
        (None, 0),
        randomness="different",
        chunk_size=max(1, CHUNK_BYTES // max(1, size)),
    )
    if batch == 0:
        return {name: value.new_zeros(0, *value.shape) for name, value in varied.items()}
    try:
        return gradients(varied, samples.rows)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        warnings.warn(
            f"torch.func cannot vectorise this model ({error}), so that the gradients of {', '.join(varied)} are "
            'computed sample by sample; fallback="loop" does so without trying',
            stacklevel=4,
        )
        return loop_grads(model, args, kwargs, target, objective, parameters, varied, batch)


def loop_grads(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping,
    target,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    chosen: Iterable[str],
    batch: int,
) -> dict[str, Tensor]:
    """As `vmap_grads`, one sample after the other: the slowest way, which works for every model."""
    constant, varied = _parted(parameters, chosen)
    grads = {name: value.new_zeros(batch, *value.shape) for name, value in varied.items()}
    leaves = {name: value.requires_grad_() for name, value in varied.items()}
    samples = Samples((args, dict(kwargs), target), batch)
    with torch.enable_grad():
        for b in range(batch):
            one_args, one_kwargs, one_target = samples.with_rows([rows[b : b + 1] for rows in samples.rows])
            output = torch.func.functional_call(model, {**constant, **leaves}, one_args, one_kwargs)
            found = torch.autograd.grad(objective(output, one_target), tuple(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    grads[name][b] = gradient.to_dense() if gradient.is_sparse else gradient
    return grads


def batch_grads(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping,
    target,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    chosen: Iterable[str],
) -> dict[str, Tensor | None]:
    """Autograd's gradient of Σ_b loss_b with respect to the chosen parameters; None where nothing depends on one.

    The parameters themselves require grad meanwhile, so that no use of them is missed.
    """
    leaves = [parameters[name] for name in chosen]
    frozen = [leaf for leaf in leaves if not leaf.requires_grad]
    try:
        for leaf in frozen:
            leaf.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            total = objective(model(*args, **kwargs), target)
            found = (
                torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
            )
    finally:
        for leaf in frozen:
            leaf.requires_grad_(False)
    return dict(zip(chosen, found, strict=True))


@contextlib.contextmanager
def same_randomness(state: list[tuple[torch.device | None, Tensor]]):
    """Draw again what was drawn after `random_state` gave ``state``, and leave the generators as they were."""
    now = random_state([device for device, _ in state if device is not None])
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


def random_state(devices: Iterable[torch.device]) -> list[tuple[torch.device | None, Tensor]]:
    cuda = sorted({device for device in devices if device.type == "cuda"}, key=str)
    return [(None, torch.get_rng_state()), *((device, torch.cuda.get_rng_state(device)) for device in cuda)]


def _set_random_state(state: list[tuple[torch.device | None, Tensor]]) -> None:
    for device, value in state:
        if device is None:
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, device)


def _parted(parameters, chosen: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    constant = {name: parameter.detach() for name, parameter in parameters.items()}
    return constant, {name: constant.pop(name).clone() for name in chosen}


class Samples:
    """Nested inputs of a model, the tensors in them that have a row for each sample, and the same for other rows."""

    def __init__(self, values, batch: int) -> None:
        self.leaves, self.structure = pytree.tree_flatten(values)
        self.places = [
            k
            for k, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        ]
        if not self.places:
            raise CaptureError(
                f"fallback: expected an input with B = {batch} rows, one for each sample, but found none"
            )
        self.rows = [self.leaves[k] for k in self.places]

    def with_rows(self, rows: list[Tensor]):
        leaves = list(self.leaves)
        for k, row in zip(self.places, rows, strict=True):
            leaves[k] = row
        return pytree.tree_unflatten(leaves, self.structure)
