"""From one watched call to the per-sample gradient of each value of parameters among its arguments.

An `Entry` is a call of a torch function where values of parameters meet samples. Its gradient comes from

1. a fast rule, where the function has one: a `Call`, which gives `GradFactors` or one reduction;
2. the general rule: a vmapped vjp of that one call, each sample with its own slices of the arguments;
3. where nothing can be sliced: the graph that the call itself has left, by cotangents of one sample's rows at a time.

Nothing here knows about modules, models or how calls are seen.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from . import rows as row_rules
from .errors import BEFORE, CaptureError, listed
from .factors import ConvFactors, EmbeddingFactors, GradFactors, Gradient, Windows
from .rows import Rows, Shared, State, Structure, Unproved, by_sample, own_rows, state_of_view

# Elements of cotangents, for masked rows, at a time.
_MASKED_ELEMENTS = 1 << 24
# What a call raises under `vmap`, or on slices that it cannot take.
_NOT_VECTORISED = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul", "floordiv", "mod")}


def is_in_place(func: Callable) -> bool:
    """Whether a function writes into its first argument, by its name."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


@dataclass(eq=False)
class Entry:
    """One call of a torch function with values of parameters among its arguments."""

    func: Callable
    args: tuple
    kwargs: dict
    named: list[frozenset[str]]  # the names of the parameters that each value depends on
    values: dict[int, Tensor]  # by id of what the function was given: the value of parameters that it stands for
    outputs: list[Tensor]  # those with a gradient; without their numbers (meta) where no rule needs these
    edges: list[GradientEdge]  # where the losses' graph meets them: of a view, its base's
    ends: list[GradientEdge] = field(default_factory=list)  # their own, from before anything is done to them in place
    versions: list[tuple[Tensor, int]] = field(default_factory=list)  # of the tensors among the arguments
    autocast: tuple | None = None
    direct: bool = False  # the edges are the outputs' own, not their bases'
    spent: bool = False  # its graph is freed
    # Of each output that the losses depend on, see `live`:
    states: list[State] = field(default_factory=list)  # where the samples lie, as the graph tells
    rows: list[Rows] = field(default_factory=list)  # the same, where it is settled
    deltas: list[Tensor] = field(default_factory=list)

    @functools.cached_property
    def call(self) -> Call | None:
        """The call as a fast rule reads it; None where there is none."""
        return _bound(self)

    @functools.cached_property
    def is_elementwise(self) -> bool:
        """Whether its gradient is a reduction of δ, or of δ ⊙ the other operand."""
        plain = (isinstance(o, Tensor) and o.layout is torch.strided and not o.is_complex() for o in self.args[:2])
        known = self.name in _ELEMENTWISE and len(self.args) > 1 and self.kwargs in ({}, {"alpha": 1}) and all(plain)
        return known or self.name in _EXPAND

    @property
    def is_known(self) -> bool:
        """Whether a rule of this module gives its gradients, and the call the same once more."""
        return not hasattr(self.func, "rule") and (self.call is not None or self.is_elementwise)

    def needs_graph(self) -> bool:
        """Whether its own graph, or a second backward to it, may be needed."""
        told = all(isinstance(state, Rows) for state in self.states)
        return not (told and (self.is_known or self.name in _REPEATABLE)) or self.overwritten()

    def under_autocast(self) -> contextlib.AbstractContextManager:
        """As the call was made."""
        return torch.autocast(self.autocast[0], self.autocast[1]) if self.autocast else contextlib.nullcontext()

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", None) or str(self.func)

    @property
    def names(self) -> list[str]:
        return sorted(frozenset().union(*self.named))

    @property
    def device(self) -> torch.device:
        return next(iter(self.values.values())).device

    def overwritten(self) -> bool:
        return any(tensor._version != version for tensor, version in self.versions)

    def stand_ins(self) -> list[Tensor]:
        """What stands for the values among the arguments, each once."""
        return list({id(x): x for x in tensors_of([self.args, self.kwargs]) if id(x) in self.values}.values())

    def live(self, structure: Structure) -> Entry:
        """The entry with those of its outputs that the losses depend on: the others have no gradient."""
        states = [structure.of(edge) for edge in self.edges]
        kept = [k for k, state in enumerate(states) if state is not None]
        entry = copy.copy(self) if len(kept) < len(states) else self
        for name in ("outputs", "edges", "ends") if entry is not self else ():
            setattr(entry, name, [getattr(self, name)[k] for k in kept])
        entry.states, entry.rows, entry.deltas = [s for s in states if s is not None], [], []
        if not self.direct:
            pairs = zip(entry.outputs, entry.states, strict=True)
            entry.states = [state_of_view(output, state, structure.batch) for output, state in pairs]
        return entry

    def reason(self) -> str:
        """Where in the graph the samples were lost."""
        for state in self.states:
            if isinstance(state, Unproved) and state.reason:
                return state.reason
        return "a sum over samples" if any(isinstance(s, Shared) for s in self.states) else self.name

    def holds_samples(self, batch: int) -> bool:
        """Whether something with rows of samples is among its arguments, not only constants."""
        tensors = [t for t in tensors_of([self.args, self.kwargs]) if id(t) not in self.values]
        return any(t.requires_grad or any(size and size % batch == 0 for size in t.shape) for t in tensors)


def cut(flat: Iterable, sizes: Iterable[int]) -> Iterator[list]:
    """A flat list in consecutive parts."""
    rest = iter(flat)
    return (list(itertools.islice(rest, size)) for size in sizes)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples, sets and mappings."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if not isinstance(value, (list, tuple, set)):
        value = value.values() if callable(getattr(value, "values", None)) and not isinstance(value, type) else ()
    for item in value:
        if isinstance(item, Tensor):
            found.append(item)
        elif item is not None and not isinstance(item, (int, float, str)):
            found += tensors_of(item)
    return found


class Call(NamedTuple):
    """A call of a function that has a fast rule, as the rule reads it."""

    rule: str
    input: Tensor
    parameters: dict[str, Tensor]  # by role, the rule's own name of an argument
    rows: int  # leading dimensions of input and output that can hold samples and their positions
    gradient: Callable[[str, Tensor, Tensor], Gradient]  # (role, input, delta) [B, ...]; see `positions`
    positions: bool = True  # whether any number of dimensions of positions may follow the samples; else none may


class Share(NamedTuple):
    """The gradient of one value: of every sample [B, *shape]; with ``rows``, the value's own rows are the samples'."""

    value: Tensor
    gradient: Gradient
    rows: Rows | None = None


# --- fast rules ------------------------------------------------------------------------------------------------------


def _linear(entry, input, weight, bias=None) -> Call | None:
    """``y = x Wᵀ + b`` with W [O, I], x [..., I], y [..., O]: factors δ and x; Σ over positions of δ for the bias."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):  # a bias may be broadcast
        return None
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return Call("linear", input, parameters, input.ndim - 1, _linear_gradient)


def _linear_gradient(role: str, input: Tensor, delta: Tensor) -> Gradient:
    """x [B, ..., I], δ [B, ..., O]."""
    if role == "bias":
        return _sum_to(delta, (delta.shape[-1],))
    input = input if input.dtype is delta.dtype else input.to(delta.dtype)
    return GradFactors(_positions(input), _positions(delta))


def _turned(role: str, input: Tensor, delta: Tensor) -> Gradient:
    found = _linear_gradient(role, input, delta)
    return found.transposed() if isinstance(found, GradFactors) else found


def _matmul(entry: Entry, first, second) -> Call | None:
    """``x W`` with W [I, O], and ``W x`` with W [O, I] and x [..., I, T] of at least three dimensions."""
    if id(second) in entry.values:
        if second.ndim != 2 or first.ndim < 1:
            return None
        return Call("linear", first, {"weight": second}, first.ndim - 1, _turned)
    if first.ndim != 2 or second.ndim < 3:
        return None

    def gradient(role: str, input: Tensor, delta: Tensor) -> Gradient:
        return _linear_gradient("weight", input.mT, delta.mT)

    return Call("linear", second, {"weight": first}, second.ndim - 2, gradient)


def _addmm(entry: Entry, bias, input, weight, *, beta=1, alpha=1) -> Call | None:
    """``b + x W`` with W [I, O]."""
    if beta != 1 or alpha != 1 or weight.ndim != 2 or bias.shape != weight.shape[1:]:
        return None
    return Call("linear", input, {"weight": weight, "bias": bias}, input.ndim - 1, _turned)


def _convolution(transposed: bool):
    """The weight's gradient is Σ_t δ_t u_tᵀ over the output positions t, u_t the input's window there.

    The transposed ones exchange the roles: Σ_t x_t v_tᵀ over the input's positions, v_t the window of δ.
    """

    names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")

    def bind(entry, input, weight, bias=None, stride=1, padding=0, *rest, **named) -> Call | None:
        options = dict(zip(names, rest, strict=False)) | named
        dilation, groups = options.get("dilation", 1), options.get("groups", 1)
        dimensions = weight.ndim - 2
        if input.ndim != dimensions + 2:  # one image without a batch dimension
            return None
        kernel = tuple(weight.shape[2:])
        stride, dilation = _per_dimension(stride, dimensions), _per_dimension(dilation, dimensions)
        if padding == "same":
            extra = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = tuple((n // 2, n - n // 2) for n in extra)
        else:
            pads = tuple((n, n) for n in _per_dimension(0 if padding == "valid" else padding, dimensions))
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        windows, shape = Windows(kernel, stride, dilation, pads), tuple(weight.shape)

        def gradient(role, input, delta):
            if role == "bias":
                return delta.flatten(2).sum(2)
            image, plain = (delta, input.to(delta.dtype)) if transposed else (input.to(delta.dtype), delta)
            return ConvFactors(image, plain, windows, groups, shape)

        return Call("convolution", input, parameters, 1, gradient, positions=False)

    return bind


def _embedding(
    entry, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
) -> Call | None:
    """``y = W[index]`` with W [V, D], index [...], y [..., D]: δ goes to the rows that were looked up."""
    if scale_grad_by_freq:  # by what is in the whole batch
        return None
    rows = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % rows

    def gradient(role: str, index: Tensor, delta: Tensor) -> EmbeddingFactors:
        B, T = index.shape[0], math.prod(index.shape[1:])  # -1 says nothing of an empty batch
        index = index.long() % max(rows, 1)  # negative ones count from the end
        delta = delta if padding is None else delta * (index != padding).unsqueeze(-1)
        return EmbeddingFactors(index.reshape(B, T), delta.reshape(B, T, delta.shape[-1]), rows)

    return Call("embedding", input, {"weight": weight}, input.ndim, gradient)


def _rows_of_table(entry, table, index) -> Call | None:
    """``W[index]`` with an integer index: an embedding."""
    whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and table.ndim == 2
    return _embedding(entry, index, table) if whole else None


# The names of the arguments, in order.
_NORMS: dict[Callable, tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.instance_norm: ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}


def _norm(entry: Entry, *args, **kwargs) -> Call | None:
    """``y = x̂ ⊙ w + b``: Σ over a sample's positions of δ ⊙ x̂, and of δ."""
    options = dict(zip(_NORMS[entry.func], args, strict=False)) | kwargs
    input, func = options.pop("input"), entry.func
    given = ((role, options.pop(role, None)) for role in ("weight", "bias"))
    parameters = {role: parameter for role, parameter in given if parameter is not None}
    if options.get("training"):  # by what is in the whole batch
        return None
    if func is F.instance_norm and options.get("use_input_stats", True):
        # Statistics of the input are the sample's own, and the running ones are only updated then, by the call itself.
        options |= {"running_mean": None, "running_var": None}
    positions = "normalized_shape" in options
    rows = input.ndim - len(options["normalized_shape"]) if positions else 1

    def gradient(role: str, input: Tensor, delta: Tensor) -> Tensor:
        if role == "weight":
            normalised = func(input, **options).to(delta.dtype)
            delta = delta * normalised if torch.is_grad_enabled() else normalised.mul_(delta)
        if positions:  # the normalised dimensions lie at the end
            return _sum_to(delta, tuple(parameters[role].shape))
        return delta.flatten(2).sum(2) if delta.ndim > 2 else delta  # channels lie behind the samples

    return Call("normalisation", input, parameters, rows, gradient, positions)


def _positions(x: Tensor) -> Tensor:
    """[B, ..., I] -> [B, (T,) I]."""
    return x if x.ndim == 2 else x.flatten(1, -2)


def _sum_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B, ..., *shape] -> [B, *shape], summed over what lies between."""
    inner = x.ndim - len(shape) - 1
    return x if inner == 0 else x.flatten(1, inner).sum(1)


def _per_dimension(value, dimensions: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dimensions if len(value) == 1 else value


_FAST: dict[Callable, Callable[..., Call | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    Tensor.__rmatmul__: lambda entry, second, first: _matmul(entry, first, second),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution(False)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _convolution(True)),
    F.embedding: _embedding,
    torch.embedding: lambda entry, weight, indices, padding_idx=-1, by_frequency=False, sparse=False: _embedding(
        entry, indices, weight, None if padding_idx == -1 else padding_idx, scale_grad_by_freq=by_frequency
    ),
    Tensor.__getitem__: _rows_of_table,
    **dict.fromkeys(_NORMS, _norm),
}


def _bound(entry: Entry) -> Call | None:
    try:
        rule = getattr(entry.func, "rule", None) or _FAST[entry.func]
        call = rule(entry, *entry.args, **entry.kwargs)
    except (KeyError, TypeError, AttributeError):  # no rule, or called with arguments that the rule does not take
        return None
    if call is None or id(call.input) in entry.values:
        return None
    # The rules' products are those of dense real numbers.
    if call.input.layout is not torch.strided or call.input.is_nested:
        return None
    if any(t.is_complex() for t in (call.input, *call.parameters.values(), *entry.outputs)):
        return None
    return call if {id(parameter) for parameter in call.parameters.values()} >= entry.values.keys() else None


# --- products and sums with broadcasting -----------------------------------------------------------------------------

_ADD = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_SUB = {"sub", "subtract", "__sub__", "sub_", "__isub__"}
_RSUB = {"rsub", "__rsub__"}
_MUL = {"mul", "multiply", "__mul__", "__rmul__"}
_EXPAND = {"expand", "expand_as", "broadcast_to"}
# Functions without a rule of their own that can be repeated, so that their graph need not be kept.
_REPEATABLE = {"cat", "concat", "concatenate", "stack", "where", "matmul", "__matmul__", "bmm", "baddbmm", "einsum"} | {
    "div", "__truediv__", "true_divide", "index_put", "scatter", "masked_fill"
}  # fmt: skip
_ELEMENTWISE = _ADD | _SUB | _RSUB | _MUL | _EXPAND


def _elementwise(entry: Entry, delta: Tensor, rows: Rows, batch: int) -> list[Share]:
    """One reduction for each value."""
    name, operands = entry.name, entry.args[:2]
    if name in _EXPAND:
        return [_reduced(delta, entry.args[0], entry, rows, batch)]
    negative = 1 if name in _SUB else 0 if name in _RSUB else None
    found = []
    for k, operand in enumerate(operands):
        if id(operand) in entry.values:
            weighted = delta * operands[1 - k] if name in _MUL else delta
            found.append(_reduced(-weighted if k == negative else weighted, operand, entry, rows, batch))
    return found


def _reduced(delta: Tensor, operand: Tensor, entry: Entry, rows: Rows, batch: int) -> Share:
    """δ summed over the dimensions along which ``operand`` was broadcast, but for the samples'."""
    value, shape = entry.values[id(operand)], tuple(operand.shape)
    lead = delta.ndim - len(shape)
    spread = [k for k in range(delta.ndim) if k < lead or (shape[k - lead] == 1 and delta.shape[k] != 1)]
    if rows.dim not in spread:  # the operand has rows of its own for each sample
        summed = delta.sum(spread, dtype=delta.dtype) if spread else delta
        return Share(value, summed.reshape(shape).to(operand.dtype), rows.at(rows.dim - lead))
    ordered = by_sample(delta, rows, batch)
    extra = ordered.ndim - delta.ndim  # dimensions left in the samples' place: 0, 1 or 2
    axes = [k + 1 for k in spread if k < rows.dim] + [k + extra for k in spread if k > rows.dim]
    axes += range(rows.dim + 1, rows.dim + 1 + extra)
    summed = ordered.sum(axes, dtype=delta.dtype) if axes else ordered
    return Share(value, summed.reshape(batch, *shape).to(operand.dtype))


# --- the general rule ------------------------------------------------------------------------------------------------


def shares(
    entry: Entry, deltas: list[Tensor], rows: list[Rows], batch: int, create_graph: bool = False
) -> tuple[str, list[Share]]:
    """The name of the rule, and the gradients of an entry's values: ``deltas`` [*output.shape] of each output."""
    call = entry.call
    if entry.overwritten() and (call is not None or entry.name in _MUL):
        raise CaptureError(
            f"{listed(entry.names)}: the input of {entry.name} was modified in place after the call had used "
            "it, so that the gradient can no longer be computed; make that operation out of place"
        )
    with torch.set_grad_enabled(create_graph):
        if call is not None:
            call = call if create_graph else call._replace(input=call.input.detach())
            found = _by_rule(entry, call, deltas[0], rows[0], batch)
            if found is not None:
                return call.rule, found
        if entry.is_elementwise:
            return "elementwise", _elementwise(entry, deltas[0], rows[0], batch)
        return "general", _general(entry, deltas, rows, batch, create_graph)


def _by_rule(entry: Entry, call: Call, delta: Tensor, rows: Rows, batch: int) -> list[Share] | None:
    input, grouped = call.input, False
    if batch == 1:
        if call.rows < 1 or delta.shape[0] != 1:
            if not call.positions:
                return None
            input, delta = input.unsqueeze(0), delta.unsqueeze(0)
    elif rows.dim >= call.rows:
        return None
    else:
        input, delta = by_sample(input, rows, batch), by_sample(delta, rows, batch)
        grouped = not call.positions and (rows.pre * rows.post > 1 or rows.owners is not None)
    if grouped:  # each of a sample's images by itself
        last = 2 if rows.pre > 1 and rows.post > 1 else 1
        input, delta = input.flatten(0, last), delta.flatten(0, last)
    found = []
    for role, parameter in call.parameters.items():
        value = entry.values.get(id(parameter))
        if value is None:
            continue
        gradient = call.gradient(role, input, delta)
        if grouped and isinstance(gradient, Tensor):
            gradient = gradient.unflatten(0, (batch, -1)).sum(1)
        elif grouped and isinstance(gradient, GradFactors):
            gradient = gradient.regrouped(batch)
        found.append(Share(value, gradient))
    return found


def _general(entry: Entry, deltas: list[Tensor], rows: list[Rows], batch: int, create_graph: bool) -> list[Share]:
    sliceable = batch > 1 and not (create_graph or is_in_place(entry.func) or entry.overwritten())
    sliceable = sliceable and all(r.owners is None for r in rows) and not entry.outputs[0].is_meta
    # Slices are compared with what the call gave, by a look at them. A gradient that is scaled by what is in the whole
    # batch shows in no output.
    if sliceable and not row_rules.capturing(deltas[0]) and entry.name not in ("embedding", "embedding_bag"):
        with entry.under_autocast():
            found = _sliced(entry, deltas, rows, batch)
        if found is not None:
            return found
    if entry.spent:
        entry = _again(entry)
    given, ends = entry.stand_ins(), entry.ends or entry.outputs
    if batch == 1:
        gradients = batched_grad(ends, given, [delta.unsqueeze(0) for delta in deltas], create_graph)
    else:
        gradients = _masked(ends, given, deltas, rows, batch, create_graph)
    return [
        Share(entry.values[id(x)], x.new_zeros(batch, *x.shape) if g is None else g)
        for x, g in zip(given, gradients, strict=True)
    ]


def mixes(entry: Entry, rows: Sequence[Rows]) -> bool:
    """Whether the call itself makes samples depend on each other: what its output's rows alone do not show."""
    if entry.name == "batch_norm":
        given = dict(zip(_NORMS[F.batch_norm], entry.args, strict=False)) | entry.kwargs
        return bool(given.get("training", False))
    if entry.name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        data, batch_first = entry.args[0], entry.args[-1] is True
        if data.ndim != 3:  # packed
            return False
        for output, where in zip(entry.outputs, rows, strict=True):
            is_state = output.shape[:2] != data.shape[:2]
            if where.dim != (0 if batch_first and not is_state else 1):
                return True
    return False


def _again(entry: Entry) -> Entry:
    """The call once more on the same arguments: its own graph is freed."""
    stand_ins = {i: value.detach().requires_grad_() for i, value in entry.values.items()}

    def again(t: Tensor) -> Tensor:
        return stand_ins[id(t)] if id(t) in stand_ins else t.detach()

    args, kwargs = pytree.tree_map_only(Tensor, again, (entry.args, entry.kwargs))
    outputs: list[Tensor] = []
    if not is_in_place(entry.func):
        with torch.enable_grad(), entry.under_autocast():
            outputs = [t for t in tensors_of(entry.func(*args, **kwargs)) if t.requires_grad]
    pairs = zip(outputs, entry.outputs, strict=False)
    same = all(former.is_meta or close(new[None], former.detach()[None]) for new, former in pairs)
    if len(outputs) != len(entry.outputs) or not same:
        raise CaptureError(f"{listed(entry.names)}: at {entry.name} the graph is freed that tells of them; {BEFORE}")
    values = {id(stand_ins[i]): value for i, value in entry.values.items()}
    ends = [get_gradient_edge(output) for output in outputs]
    return Entry(entry.func, args, kwargs, entry.named, values, outputs, ends, ends)


def _masked(outputs, given, cotangents, rows, batch: int, create_graph: bool) -> list[Tensor | None]:
    """By the graph that the call has left, from cotangents that are zero but for one sample's rows."""
    step = max(1, _MASKED_ELEMENTS // max(1, sum(c.numel() for c in cotangents) + sum(x.numel() for x in given)))
    masks = [own_rows(c, r, batch) for c, r in zip(cotangents, rows, strict=True)]
    steps = [[mask[b : b + step] for mask in masks] for b in range(0, batch, step)]
    parts = zip(*(batched_grad(outputs, given, some, create_graph) for some in steps), strict=True)
    return [None if all(g is None for g in found) else torch.cat(found) for found in parts]


def batched_grad(outputs, inputs, cotangents: Sequence[Tensor], create_graph: bool = False) -> list[Tensor | None]:
    """`torch.autograd.grad` for each of n cotangents [n, *output.shape] -> [n, *input.shape], the graph retained."""
    n = len(cotangents[0])
    if n > 1 and not create_graph:
        try:
            found = torch.autograd.grad(
                outputs, inputs, tuple(cotangents), retain_graph=True, allow_unused=True, is_grads_batched=True
            )
            return [None if g is None else dense(g) for g in found]
        except (RuntimeError, NotImplementedError, ValueError):
            pass  # torch cannot vectorise some node: one after the other
    rows = [
        torch.autograd.grad(outputs, inputs, [c[b] for c in cotangents], True, create_graph, allow_unused=True)
        for b in range(n)
    ]
    stacked: list[Tensor | None] = []
    for found in zip(*rows, strict=True) if rows else [[]] * len(inputs):
        known = [None if g is None else dense(g) for g in found]
        zero = next((torch.zeros_like(g) for g in known if g is not None), None)
        stacked.append(None if zero is None else torch.stack([zero if g is None else g for g in known]))
    return stacked


def dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _sliced(entry: Entry, deltas: Sequence[Tensor], rows: Sequence[Rows], batch: int) -> list[Share] | None:
    """A vmapped vjp of the call over the samples' slices of its arguments; None where it is no function of these.

    An argument is taken for samples where it has their dimension's size, counted from the left or from the right; a
    value only where it has as many dimensions as the output, and first so: rows that are alike would pass for a whole.
    """
    out, first = entry.outputs[0], rows[0]
    leaves, structure = pytree.tree_flatten((entry.args, entry.kwargs))
    tried = []
    for own_values in (True, False):
        for from_left in (True, False):
            dims = {}
            for k, t in enumerate(leaves):
                if not isinstance(t, Tensor) or t.layout is not torch.strided:
                    continue
                if id(t) not in entry.values or (own_values and t.ndim == out.ndim):
                    dim = first.dim if from_left else first.dim - (out.ndim - t.ndim)
                    if 0 <= dim < t.ndim and t.shape[dim] == out.shape[first.dim]:
                        dims[k] = dim
            if dims and dims not in tried:
                tried.append(dims)
                found = _vmapped(entry, leaves, structure, dims, deltas, rows, batch)
                if found is not None:
                    return found
    return None


def _vmapped(entry: Entry, leaves, structure, dims: dict[int, int], deltas, rows, batch: int) -> list[Share] | None:
    """``dims``: of those of the arguments ``leaves`` that are cut, the samples' dimension."""
    pre, post = rows[0].pre, rows[0].post

    def cut_rows(t: Tensor, dim: int) -> Tensor:
        """[..., pre · B · post, ...] -> [B, ..., pre · post, ...]."""
        return t.detach().unflatten(dim, (pre, batch, post)).movedim(dim + 1, 0).flatten(dim + 1, dim + 2)

    plain = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
    values = [k for k, t in enumerate(leaves) if isinstance(t, Tensor) and id(t) in entry.values]
    slices = {k: cut_rows(leaves[k], dim) for k, dim in dims.items()}
    cotangents = [cut_rows(d, r.dim) for d, r in zip(deltas, rows, strict=True)]
    expected = [cut_rows(o, r.dim) for o, r in zip(entry.outputs, rows, strict=True)]

    def one(slices: dict[int, Tensor], cotangents: list[Tensor]):
        def run(given: dict[int, Tensor]) -> tuple[Tensor, ...]:
            new = [given.get(k, slices.get(k, t)) for k, t in enumerate(plain)]
            args, kwargs = pytree.tree_unflatten(new, structure)
            tensors = [t for t in tensors_of(entry.func(*args, **kwargs)) if t.is_floating_point()]
            return tuple(tensors[: len(entry.outputs)])

        outputs, back = torch.func.vjp(run, {k: slices.get(k, plain[k]) for k in values})  # type: ignore[misc]
        return outputs, back(tuple(cotangents))[0]

    try:
        try:
            outputs, gradients = torch.func.vmap(one)(slices, cotangents)
        except _NOT_VECTORISED:  # the same, one sample after the other
            parts = [one({k: t[b] for k, t in slices.items()}, [c[b] for c in cotangents]) for b in range(batch)]
            outputs = tuple(map(torch.stack, zip(*(part[0] for part in parts), strict=True)))
            gradients = {k: torch.stack([part[1][k] for part in parts]) for k in values}
    except _NOT_VECTORISED:
        return None
    # The slices were taken by shape. That the call treats each sample by itself shows in what it gives.
    if any(o.shape != e.shape or not close(o, e) for o, e in zip(outputs, expected, strict=True)):
        return None
    found = []
    for k, gradient in gradients.items():
        own = None
        if k in dims:
            gradient = gradient.unflatten(dims[k] + 1, (pre, post)).movedim(0, dims[k] + 1).reshape(leaves[k].shape)
            own = rows[0].at(dims[k])
        found.append(Share(entry.values[id(leaves[k])], gradient, own))
    return found


def close(got: Tensor, expected: Tensor) -> bool:
    """Whether each sample's rows are equal up to rounding, in proportion to its own largest number."""
    if got.numel() == 0:
        return True
    got, expected = got.flatten(1), expected.flatten(1)
    bound = expected.abs().nan_to_num(0, 0).amax(1, keepdim=True) * torch.finfo(expected.dtype).eps ** 0.5
    return not ((got - expected).abs() > bound).any().item()
