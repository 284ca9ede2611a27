"""Per-sample losses: ``(output [B, ...], target) -> loss [B]``, summed over the sample's own elements.

They are never divided by the batch size, so that the gradient of a sample does not depend on how many others there are.
A partial backward needs not the value of a loss but where it begins, and with which gradient: `backward_root`. Nothing
here knows about parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]

# Nodes that move values without changing them: looked through to find the last function of an output.
_MOVES = {
    "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias", "Clone", "ToCopy", "Transpose", "Permute",
    "T", "Unflatten", "BackwardHookFunction",
}  # fmt: skip
_SIGMOID = "SigmoidBackward0"


def bce(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of probabilities, ``-Σ_d [t log p + (1 - t) log(1 - p)]`` -> [B]; nats."""
    return _sum(F.binary_cross_entropy(output, target, reduction="none"))


def bce_logits(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of logits, ``bce(sigmoid(output), target)`` computed stably -> [B]; nats."""
    return _sum(F.binary_cross_entropy_with_logits(output, target, reduction="none"))


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, ``Σ_d (output - target)²`` -> [B]; no factor one half."""
    return _sum(F.mse_loss(output, target, reduction="none"))


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Softmax cross entropy, output [B, C, ...] and target [B, ...] as for `F.cross_entropy` -> [B]; nats."""
    return _sum(F.cross_entropy(output, target, reduction="none"))


LOSSES: dict[str, PerSampleLoss] = {f.__name__: f for f in (bce, bce_logits, mse, cross_entropy)}


class Root(NamedTuple):
    """Where the backward of Σ_b loss_b begins: an edge of the graph (None: no graph), and the gradient [B, ...] there.

    Row b of the gradient is that of loss_b alone.
    """

    edge: GradientEdge | None
    gradient: Tensor


def root_of(losses: Tensor) -> Root:
    """The root for the losses [B] themselves."""
    edge = get_gradient_edge(losses) if losses.requires_grad else None
    return Root(edge, torch.ones_like(losses, requires_grad=False))


def backward_root(loss: str, output: Tensor, target: Tensor, *, create_graph: bool = False) -> Root:
    """The root for ``loss``, a name of `LOSSES` or ``"auto"``.

    ``"auto"`` is reconstruction: `bce` where the output ends in a sigmoid, else `mse`. The backward of `bce` begins at
    the input of that sigmoid, with ``p - t``, which stays exact where the sigmoid saturates. With ``create_graph`` the
    gradient itself keeps its graph.
    Raises ValueError or TypeError for a loss, output or target that do not fit.
    """
    loss, target = checked(loss, output, target)
    node = output.grad_fn
    if loss != "bce" or node is None or node.name() != _SIGMOID or output._backward_hooks:
        return root_of(in_full_precision(LOSSES[loss], output, target))
    before, place = node.next_functions[0]
    with torch.set_grad_enabled(create_graph):
        gradient = _widened(output) - target
    return Root(None if before is None else GradientEdge(before, place), gradient.to(output.dtype))


def _widened(output: Tensor) -> Tensor:
    """Losses sum many terms, whose digits half precision would lose."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def checked_losses(losses: Any, argument: str) -> Tensor:
    """They themselves; raises for what is not one number a sample."""
    if isinstance(losses, Tensor) and losses.ndim == 1 and losses.is_floating_point():
        return losses
    came = f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
    raise (TypeError if getattr(losses, "ndim", 0) == 1 else ValueError)(
        f"{argument}: expected a floating-point tensor of shape (B,), one value for each sample, but got {came}; use "
        "reduction='none' and sum over each sample's own elements: .flatten(1).sum(1)"
    )


def checked(loss: str, output: Tensor, target: Tensor) -> tuple[str, Tensor]:
    """The name of the loss with "auto" resolved, and the target in the output's shape; raises where they do not fit."""
    if loss != "auto" and loss not in LOSSES:
        raise ValueError(f"loss: expected 'auto', one of {sorted(LOSSES)} or a callable, but got {loss!r}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor for loss={loss!r}, but got {type(target).__name__}")
    if loss == "cross_entropy":
        classes, probabilities = output.shape[:1] + output.shape[2:], output.shape
        if target.shape != (probabilities if target.is_floating_point() else classes):
            raise ValueError(
                f"target: expected class indices of shape {tuple(classes)} or probabilities of shape "
                f"{tuple(probabilities)} for loss='cross_entropy', but got {target.dtype} of shape "
                f"{tuple(target.shape)}; pass target=labels (without target= it is the model's input)"
            )
        return loss, target
    if not output.is_floating_point():
        raise TypeError(f"output: expected a floating-point tensor for loss={loss!r}, but got {output.dtype}")
    if not target.is_floating_point():
        raise TypeError(
            f"target: expected a floating-point tensor for loss={loss!r}, but got {target.dtype}; for class indices "
            "use loss='cross_entropy', for 8-bit images pass x.float() / 255"
        )
    if target.shape != output.shape:
        # Image-shaped targets of flat models (and the reverse) are the same numbers in the same order.
        flat = min(target.ndim, output.ndim) <= 2
        if target.shape[:1] != output.shape[:1] or target.numel() != output.numel() or not flat:
            raise ValueError(
                f"target: expected the model output's shape {tuple(output.shape)} (or one of both flat, [B, "
                f"elements]), but got {tuple(target.shape)}; pass target= if the model does not reconstruct its input"
            )
        target = target.reshape(output.shape)
    asked = loss
    if loss == "auto":  # by the model alone: no sample's values decide over another's gradient
        loss = "bce" if _ends_in_sigmoid(output) else "mse"
    if loss in ("bce", "bce_logits") and target.device.type == "cpu" and target.numel():
        _refuse_outside_unit_interval(target, asked)  # on a GPU the check would stall the stream
    return loss, target


def _refuse_outside_unit_interval(target: Tensor, asked: str) -> None:
    low, high = (bound.item() for bound in target.aminmax())
    if not (low >= 0 and high <= 1):
        inside = ((target >= 0) & (target <= 1)).reshape(len(target), -1).all(1)
        wrong = (~inside).nonzero().flatten().tolist()
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        because = " (the model ends in a sigmoid)" if asked == "auto" else ""
        raise ValueError(
            f"target: expected values in [0, 1] for loss={asked!r}{because}, but those of samples {shown} span "
            f"[{target[wrong].min().item():g}, {target[wrong].max().item():g}] (NaN included); scale the data, or use "
            "loss='mse'"
        )


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def in_full_precision(loss: PerSampleLoss, output: Tensor, target: Tensor) -> Tensor:
    output = _widened(output)
    target = target.to(output.dtype) if target.is_floating_point() else target
    with torch.autocast(output.device.type, enabled=False):  # which refuses some of these operators
        return loss(output, target)


def _ends_in_sigmoid(output: Tensor) -> bool:
    node = output.grad_fn
    while node is not None and node.name().rstrip("012").removesuffix("Backward") in _MOVES:
        node = node.next_functions[0][0]
    return node is not None and node.name() == _SIGMOID
