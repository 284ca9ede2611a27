"""Which rows of a tensor belong to which sample: read from the graph, else proved by a second backward.

Row b of the losses is sample b's. Walking the graph back from there, each node's kind and shapes say where the samples
lie in its inputs. What no rule here knows is *unproved*: those tensors are tried by a second backward from losses of
other weights. Nothing here knows about parameters, modules or rules of gradients.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


class Rows(NamedTuple):
    """The samples lie in dimension ``dim``, of size pre · B · post: index i belongs to sample ``(i // post) % B``.

    With ``owners`` [size of dim], index i belongs to sample ``owners[i]``, and ``pre`` and ``post`` mean nothing.
    """

    dim: int
    pre: int = 1
    post: int = 1
    owners: Tensor | None = None

    def size(self, batch: int) -> int:
        """Of the dimension."""
        return self.pre * batch * self.post if self.owners is None else len(self.owners)

    def at(self, dim: int) -> Rows:
        return self._replace(dim=dim)

    def owners_of(self, size: int, batch: int, device: torch.device) -> Tensor:
        """The sample of each index [size]."""
        if self.owners is not None:
            return self.owners
        return torch.arange(size, device=device) // self.post % batch


class Shared(NamedTuple):
    """Every element takes part in the losses of several samples."""


class Unproved(NamedTuple):
    """The graph does not tell; ``reason`` names the node where the samples were lost."""

    reason: str
    hint: Rows | None = None


State = Rows | Shared | Unproved
SHARED, _LOST = Shared(), Unproved("")
_LEAF = "torch::autograd::AccumulateGrad"


@dataclass(eq=False)
class Structure:
    """What the graph of the losses tells."""

    batch: int
    checked: bool = False  # whether states may depend on values, by `checks`
    states: dict[Node, dict[int, State]] = field(default_factory=dict)  # of each output of a node's function
    leaves: dict[int, Tensor] = field(default_factory=dict)  # reached, by id
    checks: list[Tensor] = field(default_factory=list)  # booleans on the device that the states depend on
    kinds: set[str] = field(default_factory=set)

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {output.dtype for node in self.states for output in node._input_metadata}

    def of(self, edge: GradientEdge) -> State | None:
        """None where the losses do not depend on the edge's tensor."""
        return self.states.get(edge.node, {}).get(edge.output_nr)


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, so that nothing may wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def read_structure(root: GradientEdge | None, batch: int, ends: set[Node], checked: bool = True) -> Structure:
    """Walk the graph from ``root``, whose first dimension holds the samples, to its leaves and to ``ends``.

    With ``checked`` states may depend on values, which `Structure.checks` gathers; without, these are unproved.
    """
    found = Structure(batch, checked)
    if root is None:
        return found
    first = Rows(0)
    found.states[root.node] = {root.output_nr: first}
    below, uses = _graph(root.node, ends)
    ready = [root.node]
    while ready:  # each node after all that its function's outputs go to
        node = ready.pop()
        name, inputs, states = node.name(), below[node], None
        found.kinds.add(name)
        if name == _LEAF:
            found.leaves[id(node.variable)] = node.variable  # type: ignore[attr-defined]
        elif inputs and node in found.states:
            # All that the loss of one sample depends on is that sample's.
            states = [first] * len(inputs) if batch == 1 else _input_states(node, name, inputs, found)
        for k, (source, place) in enumerate(inputs):
            if source is None:
                continue
            uses[source] -= 1
            if not uses[source]:
                ready.append(source)
            state = states[k] if states else None
            if state is not None:
                state = Unproved(name) if state is _LOST else state
                arrived = found.states.setdefault(source, {})
                arrived[place] = _merged(arrived[place], state, name) if place in arrived else state
    return found


def _graph(root: Node, ends: set[Node]) -> tuple[dict[Node, tuple], dict[Node, int]]:
    """Of each node, what its inputs come from, and how many inputs its outputs go to."""
    below: dict[Node, tuple] = {}
    uses: dict[Node, int] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        below[node] = inputs = () if node in ends else node.next_functions
        for source, _ in inputs:
            if source is not None:
                if source not in uses:
                    uses[source] = 0
                    stack.append(source)
                uses[source] += 1
    return below, uses


def _merged(a: State, b: State, name: str) -> State:
    """The state of a tensor with several uses."""
    if a is b:
        return a
    if isinstance(a, Rows) and isinstance(b, Rows):
        if a[:3] == b[:3] and a.owners is b.owners:
            return a
    elif isinstance(a, Shared) and isinstance(b, Shared):
        return a
    reasons = [state.reason for state in (a, b) if isinstance(state, Unproved)] or [name]
    hints = [s.hint if isinstance(s, Unproved) else s for s in (a, b) if not isinstance(s, Shared)]
    return Unproved(reasons[0], next((hint for hint in hints if hint is not None), None))


# --- what each kind of node does -------------------------------------------------------------------------------------


_GROUPS = {
    "pointwise": """
        Abs Acos Acosh Add Addcdiv Addcmul Alias Angle Asin Asinh Atan Atan2 Atanh BinaryCrossEntropy
        BinaryCrossEntropyWithLogits Ceil Celu Clamp ClampMax ClampMin Clone Complex Conj ConjPhysical Contiguous Copy
        CopyBackwards Copysign Cos Cosh Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Floor Fmod Frac FusedDropout Gelu
        GluJvp Hardshrink Hardsigmoid Hardswish Hardtanh Huber HuberLoss Hypot LeakyRelu Lerp Lgamma LiftFresh Log Log10
        Log1P Log2 LogSigmoid Logaddexp Logaddexp2 Logit MaskedFill Maximum Minimum Mish MseLoss Mul NanToNum
        NativeDropout Neg Polar Positive Pow PreluKernel RRelu Real Reciprocal Relu Remainder Round RreluWithNoise Rsqrt
        Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh SmoothL1Loss Softplus Softshrink Special SpecialEntr SpecialErfcx
        SpecialExpit SpecialXlog1Py Sqrt Square Sub Tan Tanh Threshold ToCopy ToDense Trunc ViewAs Where Xlogy""",
    "same order": "View UnsafeView ReshapeAlias Reshape Unsqueeze Squeeze Flatten Unflatten",
    "reduction": """
        Sum Mean Var Std Norm LinalgVectorNorm Amax Amin Logsumexp Max Min Prod Median Nanmedian Nansum Kthvalue Mode
        VarMean StdMean""",
    "along": """
        Softmax LogSoftmax SafeSoftmax MaskedSoftmax Cumsum Cumprod Cummax Cummin Logcumsumexp Sort Topk Flip Roll
        Glu""",
    "by channel": """
        MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D
        AdaptiveMaxPool2D AdaptiveMaxPool3D MkldnnMaxPool2D MkldnnAdaptiveAvgPool2D FractionalMaxPool2D MaxUnpool2D
        UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D
        UpsampleBilinear2D UpsampleBicubic2D UpsampleLinear1D UpsampleTrilinear3D UpsampleBilinear2DAa
        UpsampleBicubic2DAa ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D
        ReplicationPad3D""",
    "by image": "NativeGroupNorm GridSampler2D GridSampler3D Im2Col Col2Im PixelShuffle PixelUnshuffle",
    "batch norm": "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm",
}
_GROUP_OF = {kind: group for group, kinds in _GROUPS.items() for kind in kinds.split()}
_OFFSET = 1 << 63


def _signed(value: int, ndim: int) -> int:
    return (value - 2 * _OFFSET if value >= _OFFSET else value) % max(1, ndim)


@functools.cache
def _kind_of(name: str) -> str:
    """Of a node, by its name: a group of kinds that do the same, or its own."""
    kind = name.rstrip("0123456789").removesuffix("Backward")
    kind = next((start for start in ("Fft", "ScaledDotProduct") if kind.startswith(start)), kind)
    return _GROUP_OF.get(kind, kind)


# Of a node's inputs; None for one on which the losses do not depend through the node.
States = Sequence[State | None]


def _input_states(node: Node, name: str, inputs: tuple, found: Structure) -> States:
    """The states of a node's inputs, from those of its outputs."""
    states: States = []
    for k, state in found.states[node].items():
        if isinstance(state, Unproved):
            return [state._replace(hint=None)] * len(inputs)
        here: States | None = [SHARED] * len(inputs)
        if isinstance(state, Rows):
            here = _states_of(node, _kind_of(name), k, state, inputs, found)
        if here is None:
            return [Unproved(name, state if isinstance(state, Rows) else None)] * len(inputs)
        pairs = zip(states, here, strict=True) if states else ()
        states = [b if a is None else a if b is None else _merged(a, b, name) for a, b in pairs] or here
    return states


def _states_of(node: Any, kind: str, k: int, rows: Rows, inputs: tuple, found: Structure) -> States | None:
    """The states of the inputs where output ``k`` has ``rows``; None where the kind is not known."""
    if kind == "pointwise" and len(inputs) == 1:
        return [rows]
    d, n, batch, shape = rows.dim, len(inputs), found.batch, node._input_metadata[k].shape
    rank = len(shape)
    first_alone: States = [rows, *[SHARED] * (n - 1)]
    match kind:  # what needs no shapes of the inputs
        case "Mm" | "Bmm":
            return _of_product(rows, rank)
        case "T" | "Numpy_T":
            return [rows.at(rank - 1 - d)]
        case "Transpose":
            a, b = _signed(node._saved_dim0, rank), _signed(node._saved_dim1, rank)
            return [rows.at(b if d == a else a if d == b else d)]
        case "Permute":
            return [rows.at(_signed(node._saved_dims[d], rank))]
        case "Mv":
            return [rows, SHARED]
        case "NllLoss" | "NllLoss2D" | "NllLoss2d":
            return [rows if d == 0 or kind == "NllLoss" else rows.at(d + 1), *[None] * (n - 1)]
        case "Embedding" | "EmbeddingDenseBackward":
            return [SHARED]
        case "Select" | "Unbind":
            return [rows.at(d if d < _signed(node._saved_dim, rank + 1) else d + 1)]
        case "NativeLayerNorm" | "FusedRmsNorm" | "RmsNorm":
            return first_alone if k == 0 and d < rank - len(node._saved_normalized_shape) else None
        case "Convolution":
            return first_alone if d == 0 else [_LOST] * n
        case "batch norm":  # whose statistics in training are of a channel
            if getattr(node, "_saved_training", True):
                return [rows, *[rows.at(0)] * (n - 1)] if d == 1 else None
            return first_alone if d == 0 else None
    shapes = [None if below is None else below._input_metadata[place].shape for below, place in inputs]
    before = shapes[0]
    match kind:
        case "pointwise" | "Expand":
            return [_aligned(rows, shape, s) for s in shapes]
        case "Addmm" | "Baddbmm":
            return [_aligned(rows, shape, before), *_of_product(rows, rank)]
        case "ScaledDotProduct":
            if d > 1 or rank != 4 or (d == 1 and len({s[1] for s in shapes[:3] if s}) > 1):
                return None
            return [rows] * 3 + [_aligned(rows, shape, s) for s in shapes[3:]]
        case "MkldnnRnnLayer":
            if d != rank - 2:
                return None
            return [rows.at(len(s) - 2) if s and j in (0, 5, 6) else SHARED for j, s in enumerate(shapes)]
        case "Cdist" | "EuclideanDist" | "CdistForward":
            if d < rank - 2:
                return [rows if s and len(s) == rank else _LOST for s in shapes]
            return first_alone if d == rank - 2 else [SHARED, rows.at(rank - 2)]
    if before is None:
        return _along_one(node, kind, k, rows, shape, shapes, found)
    match kind:
        case "same order":
            return [_reshaped(rows, shape, before, batch)]
        case "reduction" if len(before) == rank:  # keepdim
            return [rows] if before[d] == shape[d] else None
        case "reduction":
            along = _saved_dims(node, len(before))
            return [rows.at([dim for dim in range(len(before)) if dim not in along][d])] if along else None
        case "along" | "Fft":
            along = _saved_dims(node, rank)
            return None if along is None else [_LOST if d in along else rows]
        case "ViewAsReal" | "ViewAsComplex":  # whose last dimension holds the two parts
            return [rows] if d < min(rank, len(before)) else None
        case "by channel" | "by image":  # each image by itself, and each channel by itself
            by_itself = (d == 0 and rank > 2) or (d == 1 and kind == "by channel")
            return [rows if s is not None and len(s) == rank else SHARED for s in shapes] if by_itself else None
        case "ConstantPadNd":
            pads = list(node._saved_pad)[2 * (rank - 1 - d) :][:2]  # from the last dimension on; cut where negative
            return [_LOST if any(pads) else rows]
        case "Unfold":
            return [rows] if before[d] == shape[d] else None
        case "CtcLoss" | "CudnnCtcLoss":
            return [rows.at(1) if len(before) == 3 else _LOST]
        case "Repeat":
            return [_repeated(rows, node._saved_repeats[d], shape, before)]
        case "Index" if found.checked:
            indices = list(node._saved_indices)
            used = [j for j, index in enumerate(indices) if index is not None]
            if not used or used != list(range(used[0], used[-1] + 1)):
                return None
            return [_taken(rows, used[0], indices[used[0] : used[-1] + 1], shape, before, found)]
    return _along_one(node, kind, k, rows, shape, shapes, found)


def _along_one(node: Any, kind: str, k: int, rows: Rows, shape, shapes: list[Any], found: Structure) -> States | None:
    """Of what takes or places parts of a tensor along one dimension."""
    saved = getattr(node, "_saved_dim", None)
    if not isinstance(saved, int):
        return None
    d, batch, n, before = rows.dim, found.batch, len(shapes), shapes[0]
    dim = _signed(saved, len(shape))
    match kind:
        case "Slice" | "Split" | "SplitWithSizes" | "Chunk" | "Cat" | "IndexAdd" if dim != d:
            return [rows] * n
        case "Slice":
            start = node._saved_start or 0
            start = start - 2 * _OFFSET if start >= _OFFSET else start
            start = start + before[d] if start < 0 else start
            return [_part(rows, start, before[d], batch) if node._saved_step == 1 else _LOST]
        case "Split" | "SplitWithSizes" | "Chunk":
            start = sum(node._input_metadata[j].shape[dim] for j in range(k))
            return [_part(rows, start, before[d], batch)]
        case "Cat" if None not in shapes:  # else of unknown size
            starts = itertools.accumulate((s[dim] for s in shapes), initial=0)
            return [_cut(rows, start, s[dim], batch) for start, s in zip(starts, shapes, strict=False)]
        case "Stack" if dim != d:
            return [rows.at(d if d < dim else d - 1)] * n
        case "Gather":
            return [rows if dim != d and before[d] == shape[d] else _LOST]
        case "Scatter" | "ScatterAdd" | "ScatterReduce" if dim != d:
            return [rows if s is None or s[d] == shape[d] else _LOST for s in shapes]
        case "IndexAdd" if found.checked:
            index = node._saved_index
            return [rows, Rows(d, owners=rows.owners_of(shape[d], batch, index.device)[index])][:n]
        case "IndexSelect" if found.checked:
            return [_taken(rows, dim, [node._saved_index], shape, before, found)]
    return None


def _saved_dims(node: Any, rank: int) -> set[int] | None:
    """The dimensions along which a node's function works; None where it does not tell."""
    saved = getattr(node, "_saved_dims", None) or getattr(node, "_saved_dim", None)
    if saved is None:
        return None
    return {_signed(dim, rank) for dim in ((saved,) if isinstance(saved, int) else saved)}


def _of_product(rows: Rows, rank: int) -> States:
    """Of the two matrices of a product, or of two batches of them."""
    if rows.dim == rank - 2:
        return [rows, SHARED]
    return [SHARED if rows.dim == rank - 1 else rows, rows]


def _repeated(state: Rows, times: int, shape, before) -> State | None:
    inner = state.dim - (len(shape) - len(before))
    if times == 1:
        return _aligned(state, shape, before)
    if inner < 0 or before[inner] == 1:
        return SHARED
    regular = state.owners is None and state.pre % times == 0
    return Rows(inner, state.pre // times, state.post) if regular else _LOST


def _aligned(state: Rows, shape: Sequence[int], other: Sequence[int] | None) -> State | None:
    """Of an operand that is broadcast to ``shape``."""
    if other is None:
        return None
    dim = state.dim - (len(shape) - len(other))
    if dim < 0 or other[dim] != shape[state.dim]:
        return SHARED
    return state.at(dim)


def _reshaped(state: Rows, shape: Sequence[int], before: Sequence[int], batch: int) -> State:
    """Where the samples lie in a tensor of the same elements in the same order."""
    outer, inner = math.prod(shape[: state.dim]), math.prod(shape[state.dim + 1 :])
    if state.owners is not None:
        for dim, size in enumerate(before):
            if size == shape[state.dim] and math.prod(before[:dim]) == outer and math.prod(before[dim + 1 :]) == inner:
                return state.at(dim)
        return _LOST
    outer, inner = outer * state.pre, inner * state.post
    behind = 1
    for dim in reversed(range(len(before))):
        if behind and inner % behind == 0:
            post = inner // behind
            pre, rest = divmod(before[dim], batch * post) if post else (0, 1)
            if rest == 0 and pre and math.prod(before[:dim]) * pre == outer:
                return Rows(dim, pre, post)
        behind *= before[dim]
    return _LOST


def _part(state: Rows, start: int, size: int, batch: int) -> State:
    """Of the whole, where a part of its dimension from ``start`` on has ``state``."""
    period = batch * state.post
    if state.owners is not None or start % period or size % period:
        return _LOST
    return Rows(state.dim, size // period, state.post)


def _cut(state: Rows, start: int, size: int, batch: int) -> State:
    """Of a part of the dimension, where the whole has ``state``."""
    if state.owners is not None:
        return state._replace(owners=state.owners[start : start + size])
    return _part(state, start, size, batch)


def _taken(state: Rows, first: int, indices, shape, before, found: Structure) -> State:
    """Of a tensor whose dimensions from ``first`` on were indexed by tensors that were broadcast together."""
    block = len(torch.broadcast_shapes(*(index.shape for index in indices)))
    d = state.dim
    if d < first:
        return state
    if d >= first + block:
        return state.at(d - block + len(indices))
    # The samples lie in what was taken: the first index tells of which rows.
    index, size = indices[0], before[first]
    dim = d - first - (block - index.ndim)  # the samples' dimension in the index
    if dim < 0 or index.shape[dim] != shape[d] or size % found.batch:
        return _LOST
    owners = state.owners_of(shape[d], found.batch, index.device)
    n = size // found.batch
    expected = owners.reshape(-1, *[1] * (index.ndim - 1 - dim))
    index = torch.where(index < 0, index + size, index)
    found.checks.append((index // n == expected).all())
    return Rows(first, 1, n)


# --- views -----------------------------------------------------------------------------------------------------------


def base_of(output: Tensor) -> Tensor | None:
    """The tensor that an output is a view of, where the graph has the output's history there."""
    base = output._base
    return base if base is not None and base.requires_grad else None


def form_of(output: Tensor) -> Tensor:
    """An output without its numbers, whose memory it does not hold: on the meta device, and a view where it is one."""
    base = base_of(output)
    held = output if base is None else base
    form = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta", requires_grad=True)
    offset = output.storage_offset() - held.storage_offset()
    return form if base is None else form.as_strided(output.shape, output.stride(), offset)


def _as_base(output: Tensor, base: Tensor) -> bool:
    return base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()


def delta_of_view(output: Tensor, delta: Tensor) -> Tensor:
    """The delta of an output, from that of its base where it has one."""
    base = base_of(output)
    if base is None or (base.shape == output.shape and base.stride() == output.stride()):
        return delta
    if _as_base(output, base):
        return delta.reshape(output.shape)
    if delta.stride() != base.stride():
        delta = torch.empty_strided(base.shape, base.stride(), dtype=delta.dtype, device=delta.device).copy_(delta)
    offset = output.storage_offset() - base.storage_offset()
    return delta.as_strided(output.shape, output.stride(), delta.storage_offset() + offset)


def state_of_view(output: Tensor, state: State, batch: int) -> State:
    """Where the samples lie in an output, from where they lie in its base where it has one."""
    base = base_of(output)
    if base is None or isinstance(state, Shared):
        return state
    if isinstance(state, Unproved):
        hint = None if state.hint is None else state_of_view(output, state.hint, batch)
        return state._replace(hint=hint if isinstance(hint, Rows) else None)
    if _as_base(output, base):
        return _reshaped(state, base.shape, output.shape, batch)
    same = base.stride(state.dim), base.shape[state.dim]
    dims = [d for d in range(output.ndim) if (output.stride(d), output.shape[d]) == same]
    return state.at(dims[0]) if len(dims) == 1 else Unproved("a view")


# --- samples brought to the front ------------------------------------------------------------------------------------


def by_sample(x: Tensor, rows: Rows, batch: int) -> Tensor:
    """[..., pre · B · post, ...] -> [B, ..., pre, post, ...], without the last two where they are one.

    Ragged rows lie in one dimension in their place.
    """
    if rows.owners is not None:
        return _padded(x, rows, batch)
    if rows.pre == rows.post == 1:
        return x if rows.dim == 0 else x.movedim(rows.dim, 0)
    if rows.dim == 0 and rows.pre == 1:
        return x.unflatten(0, (batch, rows.post))
    if rows.post == 1:
        return x.unflatten(rows.dim, (rows.pre, batch)).movedim(rows.dim + 1, 0)
    return x.unflatten(rows.dim, (rows.pre, batch, rows.post)).movedim(rows.dim + 1, 0)


def _padded(x: Tensor, rows: Rows, batch: int) -> Tensor:
    """Ragged rows -> [B, ..., n, ...], n the most that a sample has; zeros fill up."""
    assert rows.owners is not None
    order, counts = rows.owners.argsort(stable=True), rows.owners.bincount(minlength=batch)
    most = int(counts.max()) if len(order) else 0
    starts = counts.cumsum(0) - counts
    owner = rows.owners[order]
    place = torch.arange(len(order), device=x.device) - starts[owner]
    moved = x.movedim(rows.dim, 0)
    padded = x.new_zeros(batch, most, *moved.shape[1:]).index_put((owner, place), moved[order])
    return padded.movedim(1, rows.dim + 1)


def own_rows(x: Tensor, rows: Rows, batch: int) -> Tensor:
    """[B, *x.shape]: of each sample ``x`` with zeros in the rows of others."""
    owners = rows.owners_of(x.shape[rows.dim], batch, x.device)
    mask = owners == torch.arange(batch, device=x.device).unsqueeze(1)
    mask = mask.reshape(batch, *[1] * rows.dim, -1, *[1] * (x.ndim - rows.dim - 1))
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


# --- the proof -------------------------------------------------------------------------------------------------------


def candidates(shape: Sequence[int], batch: int, hint: Rows | None = None) -> list[Rows]:
    """The ways in which a tensor of ``shape`` can hold the samples, the usual ones first."""
    found = []
    if hint is not None and hint.dim < len(shape) and shape[hint.dim] == hint.size(batch):
        found.append(hint)
    for dim, size in enumerate(shape):
        if size and size % batch == 0:
            n = size // batch
            found += [Rows(dim, 1, n)] + ([Rows(dim, n, 1)] if n > 1 else [])
    return list(dict.fromkeys(found)) if all(rows.owners is None for rows in found) else found


def proof_weights(batch: int, like: Tensor, dtypes: Iterable[torch.dtype]) -> tuple[Tensor, float]:
    """[B] different positive weights, in no order that a model might have; ``dtypes`` are those of the graph.

    Powers of two, by which even rounding errors are multiplied exactly, as long as there are enough of them. With them
    comes how far a right delta may be from its multiple, in proportion.
    """
    kinds = {like.dtype, *(dtype for dtype in dtypes if dtype.is_floating_point)}
    eps = max(torch.finfo(dtype).eps for dtype in kinds)
    most = 6 if torch.float16 in kinds else 30
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch), device="cpu")
    levels = 2 * most + 1
    mantissa = 1 + (order // levels) / (1 + (batch - 1) // levels)
    values = ((order % levels) - most).double().exp2() * mantissa
    values = values.to(device=like.device, dtype=like.dtype, non_blocking=True)  # nothing waits for what is sent
    return values, 64 * eps if batch <= levels else eps**0.5


def weighs(delta: Tensor, part: Tensor, rows: Rows, weights: Tensor, tolerance: float) -> Tensor:
    """Whether each sample's rows of ``part`` are those of ``delta`` times its weight [B]: a boolean on the device.

    Each sample is judged by its own largest number; NaN tells nothing.
    """
    batch = len(weights)
    owners = rows.owners_of(delta.shape[rows.dim], batch, delta.device)
    delta, part = (t.movedim(rows.dim, 0).reshape(t.shape[rows.dim], -1) for t in (delta, part))
    difference = (part - delta * weights.to(delta.dtype)[owners].unsqueeze(1)).abs()
    largest = delta.abs().nan_to_num(0, 0).amax(1) if delta.shape[1] else delta.real.new_zeros(len(delta))
    scale = largest.new_zeros(batch).scatter_reduce(0, owners, largest, "amax") * weights.to(largest.dtype)
    return ~(difference > scale[owners].unsqueeze(1) * tolerance).any()


def verdicts(flags: Iterable[Tensor]) -> list[bool]:
    """Several booleans on a device by one read of it."""
    flags = list(flags)
    return torch.stack(flags).tolist() if flags else []
