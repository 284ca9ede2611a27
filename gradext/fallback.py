"""Gradients for which there is no rule: one backward a sample through the graph of the run, or an error that says why.

An entry is *lost* where it is not known which row belongs to which sample. A parameter is *unseen* where the losses
depend on it by code that the mode does not see (custom autograd functions, scripted code). ∂ losses[b] along the graph
of the run is exact for both. This file does not know how parameters are chosen, nor what the gradients are used for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from types import FrameType

import torch
from torch import Tensor, nn

from .errors import CaptureError, UnsupportedLayerError, listed
from .losses import Root
from .mode import WatchMode
from .rows import Structure
from .rules import Entry, Share, cut, dense

_ADVICE = "; leave it out with exclude=, use torch's own functions, or pass fallback=None for one backward a sample"


def gradients(
    mode: WatchMode, root: Root, lost: list[Entry], unseen: dict, fallback: str | None, mixing: str, create_graph: bool
) -> tuple[list[Share], dict[str, Tensor]]:
    """The gradients of the values of ``lost``, and those of the parameters ``unseen`` along all paths of the graph."""
    reasons: list[tuple[str, str | None]] = [(listed(entry.names), entry.reason()) for entry in lost]
    reasons += [(name, None) for name in unseen]
    if fallback == "error":
        raise UnsupportedLayerError("; ".join(_explained(names, reason) for names, reason in reasons) + _ADVICE)
    batch = len(root.gradient)
    given = {x: entry.values[id(x)] for entry in lost for x in entry.stand_ins()}
    judged = [entry for entry in lost if mixing == "error" and entry.holds_samples(batch)]
    found = _each_sample(mode, root, [*given, *unseen.values()], judged, create_graph)
    by_name = dict(zip(unseen, found[len(given) :], strict=True))
    _refuse_one_for_all(root, by_name)
    if batch > 1 and (mixing == "error" or unseen):
        _warn(reasons, batch)
    return list(map(Share, given.values(), found)), by_name


def _each_sample(
    mode: WatchMode, root: Root, inputs: list[Tensor], judged: list[Entry], create_graph: bool
) -> list[Tensor]:
    """The gradients [B, *x.shape] of each loss by ``inputs``; refuses samples that mix at the entries ``judged``."""
    gradient = root.gradient if create_graph else root.gradient.detach()
    if len(gradient) == 1:
        row = mode.differentiate(root, gradient, inputs, create_graph=create_graph)
        return [x.new_zeros(1, *x.shape) if g is None else dense(g)[None] for x, g in zip(inputs, row, strict=True)]
    edges = [edge for entry in judged for edge in entry.edges]
    found = [x.new_zeros(len(gradient), *x.shape) for x in inputs]
    touched: list[Tensor | int] = [0] * len(edges)  # for each element, how many samples' losses depend on it
    for b in range(len(gradient)):
        own = torch.zeros_like(gradient)
        own[b] = gradient[b]
        row = mode.differentiate(root, own, [*inputs, *edges], create_graph=create_graph)
        for k, g in enumerate(row):
            if g is None:
                continue
            if k < len(inputs):
                found[k][b] = dense(g)
            else:
                touched[k - len(inputs)] += (g != 0).to(torch.int32)
    for entry, counts in zip(judged, cut(touched, (len(entry.edges) for entry in judged)), strict=True):
        if any(isinstance(count, Tensor) and count.numel() and int(count.max()) > 1 for count in counts):
            refuse_mixing(entry, mode.model)
    return found


def refuse_mixing(entry: Entry, model: nn.Module) -> None:
    reason = entry.reason()
    if "BatchNorm" in reason or reason == "batch_norm":
        reason = _batch_norms(model) or reason
    raise CaptureError(
        f"{listed(entry.names)}: samples mix: at {entry.name} the loss of a sample depends on rows of others "
        f"(at {reason}), so that per-sample gradients in the sense of privacy or attribution do not exist; detach what "
        "the samples share, see that the samples lie where each layer expects them (batch_first), tell ragged rows by "
        'segments=, or pass mixing="allow" for ∂ losses[b] as it stands'
    )


def _batch_norms(model: nn.Module) -> str | None:
    found = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    if not found:
        return None
    return f"{', '.join(found[:4])}, which normalises with the statistics of the batch: call model.eval()"


def refuse_hidden(hidden: Mapping[str, str], reached: Iterable[str], structure: Structure) -> None:
    """Refuse parameters that are used where a custom autograd function hides its graph.

    hidden: by parameter, the function in whose forward it is used; reached: the parameters that the graph leads to.
    """
    seen = set(reached)
    # A checkpoint whose inputs need no gradient leaves no node, but all parameters may be chosen, which then need one.
    hidden = {
        name: function
        for name, function in hidden.items()
        if name not in seen and (f"{function}Backward" in structure.kinds or function == "CheckpointFunction")
    }
    advice = "pass the parameters to the function as arguments, or leave them out with exclude="
    if "CheckpointFunctionBackward" in structure.kinds or "CheckpointFunction" in hidden.values():
        hidden = hidden or {"what they hold": "CheckpointFunction"}
        advice = (
            "these are reentrant checkpoints: pass use_reentrant=False to torch.utils.checkpoint "
            "(gradient_checkpointing_kwargs={'use_reentrant': False} in transformers)"
        )
    if hidden:
        raise CaptureError(
            f"{listed(sorted(hidden))}: used inside {', '.join(sorted(set(hidden.values())))}, a custom autograd "
            f"function that hides its graph, so that the gradient cannot be found; {advice}"
        )


def _refuse_one_for_all(root: Root, gradients: Mapping[str, Tensor]) -> None:
    """Refuse a custom function of the losses that gives one sample the gradient of all."""
    node = None if root.edge is None else root.edge.node
    if len(root.gradient) < 2 or not isinstance(node, torch.autograd.function.BackwardCFunction):
        return
    for name, gradient in gradients.items():
        silent = (gradient.flatten(1) == 0).all(1)
        if silent.any() and not silent.all():
            raise CaptureError(
                f"{name}: {node.name().removesuffix('Backward')} gives some samples no gradient at all: its backward "
                "takes one number of the losses' gradient for all samples; write the losses by torch's own functions"
            )


def _explained(names: str, reason: str | None) -> str:
    if reason is None:
        return f"{names} is used where gradext cannot see it (a custom autograd function, scripted or compiled code)"
    return f"{names}: which rows are whose cannot be told (at {reason})"


def _warn(reasons: list[tuple[str, str | None]], batch: int) -> None:
    shown = "; ".join(_explained(names, reason) for names, reason in reasons[:3])
    more = f"; and {len(reasons) - 3} more uses" if len(reasons) > 3 else ""
    warnings.warn(
        f"{shown}{more}. What cannot be told takes one backward a sample ({batch} here): exact, and slow",
        stacklevel=_user_level(),
    )


def _user_level() -> int:
    """The stack level of the first frame outside of the package, for warnings."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("gradext"):
        frame, level = frame.f_back, level + 1
    return level
