"""Uses of weights read off the graph that autograd has recorded: what networks of plain layers need, and no more.

Where linear layers and convolutions are joined by activations, reshapes, sums and the like alone, the recorded nodes
tell what `capture` finds out by watching every call: each use of a parameter is an edge to it, and the node at the
other end keeps the layer's input.

The rows need no proof there. With the samples' elements one after another, as the losses have them, every node of the
kinds below gives elements that depend on the same sample's alone, in the same order; so the rows of a delta are the
samples', and with them those of the input that the node multiplies them by. A node of another kind, or one that cannot
be told to keep the order, on any path from the losses to a chosen parameter makes the graph unreadable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .factors import GradFactors
from .layers import ConvRule, LinearRule, per_dimension
from .uses import Form

LAYERS = (*LinearRule.module_types, *ConvRule.module_types)  # those whose nodes `read` knows

# Kinds of nodes by what they ask of the shapes, each with the places where an edge may lead on to chosen parameters.
# Values in the order of the input's: activations, dropout, views, copies.
_ELEMENTWISE = dict.fromkeys(
    f"{name}Backward{k}"
    for name in (
        "Relu", "Sigmoid", "Tanh", "Gelu", "Silu", "Elu", "Softplus", "LeakyRelu", "Hardtanh", "Hardswish", "Mish",
        "Hardsigmoid", "LogSigmoid", "Pow", "Abs", "Threshold", "NativeDropout", "Exp", "Neg",
        "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias", "Clone",
    )
    for k in (0, 1, 2)
)  # fmt: skip
# As these, where nothing was broadcast.
_JOINING = {
    *(f"{name}Backward0" for name in ("Add", "Sub", "Mul", "Div", "MseLoss", "BinaryCrossEntropy")),
    *("MulBackward1", "DivBackward1", "PowBackward1", "BinaryCrossEntropyWithLogitsBackward0"),
}
# Images [B, ...] one by one.
_BY_IMAGE = {f"{name}Backward0" for name in ("MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D")}


class Reading(NamedTuple):
    """One use of chosen parameters: at ``edge`` the delta of the node is to be had, whose rows are the samples'."""

    forms: dict[str, Form]
    edge: GradientEdge
    gradient: Callable[[str, Tensor, Tensor], GradFactors | Tensor]  # (role, input, delta)
    input: Tensor


def read(root: Node, chosen: Mapping[int, Form], batch: int) -> list[Reading] | None:
    """Every use of the chosen parameters, by id, between them and ``root``, in order of execution; None: unreadable.

    ``batch``: the number of samples, whose elements lie one after another in the output of ``root``.
    """
    parents, leaves = _graph(root)
    uses: dict[Node, dict[str, Form]] = {}
    for leaf in leaves:
        form = chosen.get(id(leaf.variable))
        if form is None:
            continue
        for node, place in parents.get(leaf, ()):
            if node.name() == "TBackward0":
                found = [(user, _role(user, place, turned=True)) for user, place in parents[node]]
            else:
                found = [(node, _role(node, place, turned=False))]
            for user, role in found:
                if role is None:
                    return None
                uses.setdefault(user, {})[role] = form
    if not _keeps_samples(root, uses, parents, batch):
        return None
    try:
        return [
            _reading(node, {role: forms[role] for role in ("weight", "bias") if role in forms}, batch)
            for node, forms in sorted(uses.items(), key=lambda use: use[0]._sequence_nr())
        ]
    except (_UnreadableError, RuntimeError):  # the latter where an input was modified in place afterwards
        return None


def is_readable(root: Node, outputs: Iterable[Node], batch: int) -> bool:
    """Whether `read` can follow the graph from ``root`` to the nodes that gave the layers' outputs."""
    parents, _ = _graph(root)
    return _keeps_samples(root, outputs, parents, batch)


class _UnreadableError(Exception):
    pass


def _graph(root: Node) -> tuple[dict[Node, list[tuple[Node, int]]], list[Any]]:
    """The edges to every node from ``root`` on, as (the node above, the place there), and the parameters' nodes."""
    parents: dict[Node, list[tuple[Node, int]]] = {root: []}
    leaves: list[Any] = []
    stack = [root]
    while stack:
        node = stack.pop()
        edges = node.next_functions
        if not edges and hasattr(node, "variable"):
            leaves.append(node)
        for place, (child, _) in enumerate(edges):
            if child is None:
                continue
            known = parents.get(child)
            if known is None:
                parents[child] = [(node, place)]
                stack.append(child)
            else:
                known.append((node, place))
    return parents, leaves


def _role(node: Node, place: int, turned: bool) -> str | None:
    """What the node takes from a parameter at that place, if it is a layer that can be read."""
    name = node.name()
    if name == "AddmmBackward0":
        return "weight" if turned and place == 2 else "bias" if place == 0 and not turned else None
    if name == "MmBackward0":
        return "weight" if turned and place == 1 else None
    if name == "ConvolutionBackward0" and not turned:
        return {1: "weight", 2: "bias"}.get(place)
    return None


def _keeps_samples(root: Node, below: Iterable[Node], parents: dict[Node, list[tuple[Node, int]]], batch: int) -> bool:
    """Whether all nodes above these keep the samples' elements one after another."""
    climbed, climbing = set(), list(below)
    while climbing:
        node = climbing.pop()
        if node in climbed:
            continue
        climbed.add(node)
        for parent, place in parents.get(node, ()):
            if not _keeps(parent, place, node, batch):
                return False
            climbing.append(parent)
    return True


def _keeps(node: Any, place: int, child: Node, batch: int) -> bool:  # of a node what its kind alone has saved
    name = node.name()
    if name in _JOINING:
        return _shape(node) == _shape(child)
    if name in _ELEMENTWISE:
        return place == 0
    if name in ("AddmmBackward0", "ConvolutionBackward0", "MmBackward0"):
        return place == (1 if name == "AddmmBackward0" else 0) and _shape(node)[0] % batch == 0
    if name in _BY_IMAGE:
        return len(_shape(node)) == 4 and _shape(node)[0] % batch == 0
    if name == "LogSoftmaxBackward0":
        return len(_shape(node)) == 2 and _shape(node)[0] % batch == 0 and node._saved_dim % 2 == 1
    if name == "NllLossBackward0":
        return place == 0 and _shape(node) == (batch,)
    if name == "SumBackward1":  # over dimensions, negative ones as unsigned numbers
        rank = len(_shape(child))
        summed = {dim if dim < 2**63 else dim - 2**64 + rank for dim in node._saved_dim}
        return _shape(child)[:1] == (batch,) and 0 not in summed and len(summed) > 0
    return name == "NativeBatchNormBackward0" and place == 0 and not node._saved_training


def _shape(node: Node) -> tuple[int, ...]:
    """Of the node's first output."""
    return tuple(node._input_metadata[0].shape)


def _reading(node: Any, forms: dict[str, Form], batch: int) -> Reading:
    edge = GradientEdge(node, 0)
    shape = _shape(node)
    if shape[0] % batch:
        raise _UnreadableError
    if node.name() == "ConvolutionBackward0":
        weight = node._saved_weight.shape
        # Of "valid" there is one number.
        pads = tuple((n, n) for n in per_dimension(node._saved_padding, len(weight) - 2))
        stride, dilation = tuple(node._saved_stride), tuple(node._saved_dilation)
        gradient = ConvRule.gradient(weight, stride, pads, dilation, node._saved_groups, node._saved_transposed)
        return Reading(forms, edge, gradient, node._saved_input.detach())
    linear = node.name() == "AddmmBackward0"
    if linear and (node._saved_alpha != 1 or node._saved_beta != 1):
        raise _UnreadableError
    if "bias" in forms and forms["bias"].shape != shape[1:]:
        raise _UnreadableError
    input = (node._saved_mat1 if linear else node._saved_self).detach()
    if input.is_complex() or input.layout is not torch.strided:
        raise _UnreadableError
    return Reading(forms, edge, LinearRule.gradient, input)
