"""Per-sample losses: ``(output [B, ...], target) -> loss [B]``, summed over the sample's own elements.

They are never divided by the batch size, so that the gradient of a sample does not depend on its company.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]

# Nodes that move values without changing them: looked through when asking what an output ends in.
_LAYOUT_NODES = {"BackwardHookFunctionBackward"} | frozenset(
    f"{name}Backward{k}"
    for name in (
        "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias", "Clone", "ToCopy", "Transpose",
        "Permute", "T", "Unflatten",
    )
    for k in (0, 1, 2)
)  # fmt: skip


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


LOSSES: dict[str, PerSampleLoss] = {
    "bce": bce,
    "bce_logits": bce_logits,
    "mse": mse,
    "cross_entropy": cross_entropy,
}


def per_sample_loss(loss: str | PerSampleLoss, output: Tensor, target: Tensor) -> Tensor:
    """Apply ``loss``, a name of `LOSSES`, ``"auto"`` or a callable, and check that it gives one value a sample.

    ``"auto"`` is reconstruction: `bce` where the output ends in a sigmoid and the target lies in [0, 1], else `mse`.
    """
    batch = output.shape[0]
    if callable(loss):
        value = loss(output, target)
        if not isinstance(value, Tensor) or value.shape != (batch,):
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss: expected a tensor of shape ({batch},), one value for each sample, but the callable returned "
                f"{came}; use reduction='none' and sum over each sample's own elements: .flatten(1).sum(1)"
            )
        return value
    if loss != "auto" and loss not in LOSSES:
        raise ValueError(f"loss: expected 'auto', one of {sorted(LOSSES)} or a callable, but got {loss!r}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor for loss={loss!r}, but got {type(target).__name__}")
    if loss == "cross_entropy":
        return _in_full_precision(cross_entropy, output, target)
    if not output.is_floating_point():
        raise TypeError(f"output: expected a floating-point tensor for loss={loss!r}, but got {output.dtype}")
    if not target.is_floating_point():
        raise TypeError(
            f"target: expected a floating-point tensor for loss={loss!r}, but got {target.dtype}; for class indices "
            "use loss='cross_entropy', for 8-bit images pass x.float() / 255"
        )
    if target.shape != output.shape:
        # Image-shaped targets of flat models (and the reverse) are the same numbers in the same order.
        if target.shape[:1] != output.shape[:1] or target.numel() != output.numel():
            raise ValueError(
                f"target: expected the model output's shape {tuple(output.shape)} (or as many elements a sample), "
                f"but got {tuple(target.shape)}; pass target= if the model does not reconstruct its input"
            )
        target = target.reshape(output.shape)
    if loss == "auto":
        loss = "bce" if _ends_in_sigmoid(output) and _in_unit_interval(target) else "mse"
    elif loss in ("bce", "bce_logits") and target.device.type == "cpu" and not _in_unit_interval(target):
        # Only on the CPU: on a GPU the check would stall the stream.
        low, high = target.min().item(), target.max().item()
        raise ValueError(
            f"target: expected values in [0, 1] for loss={loss!r}, but they span [{low:g}, {high:g}] (NaN included); "
            "scale the data, or use loss='mse'"
        )
    return _in_full_precision(LOSSES[loss], output, target)


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def _in_full_precision(loss: PerSampleLoss, output: Tensor, target: Tensor) -> Tensor:
    # Losses sum many terms: half precision would lose them, and autocast refuses some of these operators.
    device = output.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext():
        half = output.dtype in (torch.float16, torch.bfloat16)
        output = output.float() if half else output
        if target.is_floating_point():
            target = target.to(output.dtype)
        return loss(output, target)


def _in_unit_interval(values: Tensor) -> bool:
    if values.numel() == 0:
        return True
    low, high = torch.stack(torch.aminmax(values.detach())).tolist()  # at once, to wait for a GPU only once
    return low >= 0 and high <= 1  # NaN propagates and fails both comparisons


def _ends_in_sigmoid(output: Tensor) -> bool:
    node = output.grad_fn
    while node is not None and node.name() in _LAYOUT_NODES:
        node = node.next_functions[0][0]
    return node is not None and node.name() == "SigmoidBackward0"
