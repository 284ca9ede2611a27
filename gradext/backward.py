"""The partial backward: from the losses and the entries of a watched run to each parameter's per-sample gradient.

One backward gives the deltas of all entries. Which sample each row belongs to is read from the graph, else proved by a
second backward from losses of other weights, else the entry is left to `fallback`. `rules` makes gradients of values,
and a batched vjp carries these back to the parameters. Nothing here knows about arguments, modules or how calls are
seen.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import fallback, rules
from . import rows as row_rules
from .errors import BEFORE, CaptureError, listed
from .factors import Coverage, GradFactors, Gradient
from .factors.layers import held_elsewhere, memory
from .losses import Root
from .mode import WatchMode
from .rows import Rows, Shared, Structure, Unproved
from .rules import Entry, Share, cut

_CASTS = {"to", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "type", "alias", "view_as"}
_ADDED = {"add", "__add__", "__radd__"}
_SAME_NUMBERS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"}
_T, _MT, _H = (getattr(Tensor, name).__get__ for name in ("T", "mT", "H"))


@dataclass(eq=False)
class Backward:
    """One partial backward of a run."""

    mode: WatchMode
    coverage: Coverage
    root: Root
    weights: Tensor | None  # [B] where the user's own backward has run: what each sample's loss was multiplied by in it
    keep_graph: bool
    fallback: str | None  # these as for `watch`
    mixing: str
    segments: Tensor | None
    create_graph: bool
    shares: dict[int, list[Share]] = field(default_factory=dict)  # by id of the value
    rules: dict[str, list[str]] = field(default_factory=dict)  # by parameter

    def __post_init__(self) -> None:
        self.batch = self.root.gradient.shape[0]
        self.parameter_names = {id(p): name for name, p in self.mode.chosen.items()}

    def run(self) -> dict[str, Gradient]:
        """The gradient of every chosen parameter, after the user's hooks, applied to each sample's gradient."""
        with _hooks_apart(self.mode.chosen.values()) as hooks:
            found = self._run()
        return {name: _hooked(gradient, hooks.get(id(self.mode.chosen[name]))) for name, gradient in found.items()}

    def _run(self) -> dict[str, Gradient]:
        structure = self._structure() if self.batch else Structure(0)
        unseen = [name for i, name in self.parameter_names.items() if i in structure.leaves]
        fallback.refuse_hidden(self.mode.hidden, unseen, structure)
        former = self.mode.entries[: self.mode.differentiated]
        work = [entry.live(structure) for entry in self.mode.entries[len(former) :]]
        work = [entry for entry in work if entry.states]
        if self.mode.hooked:  # each sample's own gradient goes through the hooks
            lost = work
            for entry in lost:
                entry.states = [Unproved("a hook that the run registers")]
        else:
            self._segments(work)
            self._deltas(work, bool(unseen))
            lost = self._settle_rows(work, structure)
        told = [entry for entry in work if entry not in lost]
        if structure.states:  # the losses may depend on these through a backward pass too, which only the graph knows
            lost = lost + [entry.live(structure) for entry in former]
        if self.weights is not None:
            self._undo_weights(told, lost, unseen)
        for entry in told:
            if self.mixing == "error" and self.batch > 1 and rules.mixes(entry, entry.rows):
                fallback.refuse_mixing(entry, self.mode.model)
            self._take(*rules.shares(entry, entry.deltas, entry.rows, self.batch, self.create_graph))
            entry.deltas = []
        whole: dict[str, Tensor] = {}
        if lost or unseen:
            leaves = {name: self.mode.chosen[name] for name in unseen}
            options = self.fallback, self.mixing, self.create_graph
            found, whole = fallback.gradients(self.mode, self.root, lost, leaves, *options)
            if not self.mode.attached:  # else the graph leads to the parameters through the entries too
                found, whole = found + [Share(leaves[name], g) for name, g in whole.items()], {}
            self._take("backward a sample", found)
        return self._to_parameters(whole)

    def _structure(self) -> Structure:
        # The user's own backward has freed what the checks read.
        checked = self.weights is None and not row_rules.capturing(self.root.gradient)
        found = row_rules.read_structure(self.root.edge, self.batch, self.mode.ends, checked)
        if not all(row_rules.verdicts(found.checks)):
            found = row_rules.read_structure(self.root.edge, self.batch, self.mode.ends, checked=False)
        return found

    def _segments(self, work: list[Entry]) -> None:
        if (segments := self.segments) is None:
            return
        if len(segments) and not (int(segments.min()) >= 0 and int(segments.max()) < self.batch):
            raise ValueError(
                f"segments: expected samples in 0..{self.batch - 1}, as there are {self.batch} losses, but they span "
                f"{int(segments.min())}..{int(segments.max())}"
            )
        for entry in work:
            for k, output in enumerate(entry.outputs):
                dims = [d for d, size in enumerate(output.shape) if size == len(segments)]
                if dims and not isinstance(entry.states[k], Rows):
                    rows = Rows(dims[0], owners=segments.to(entry.device).long())
                    entry.states[k] = Unproved("segments", rows)

    # --- deltas -------------------------------------------------------------------------------------------------------

    def _deltas(self, work: list[Entry], unseen: bool) -> None:
        edges = [edge for entry in work for edge in entry.edges]
        if not edges:
            return
        if self.weights is not None:
            captured = self.mode.captured
            for entry in work:
                if any((edge.node, edge.output_nr) not in captured for edge in entry.edges):
                    raise CaptureError(f"{listed(entry.names)}: the last backward did not reach {entry.name}; {BEFORE}")
            keep = False
            found = [captured[edge.node, edge.output_nr] for edge in edges]
        else:
            keep = self.keep_graph or unseen or self.create_graph or self.mode.differentiated > 0
            keep = keep or row_rules.capturing(self.root.gradient) or any(entry.needs_graph() for entry in work)
            found = self.mode.differentiate(self.root, self.root.gradient, edges, keep, self.create_graph)
        for entry, deltas in zip(work, _by_entry(work, found), strict=True):
            entry.deltas, entry.spent = deltas, not keep

    def _undo_weights(self, told: list[Entry], lost: list[Entry], unseen: list[str]) -> None:
        """From the deltas of weighted losses those of each sample's own loss; in place where nobody else holds them."""
        assert self.weights is not None
        if lost or unseen:
            names = [name for entry in lost for name in entry.names] + unseen
            at = f"at {lost[0].reason()}" if lost else "in a custom autograd function or scripted code, unseen"
            raise CaptureError(f"{listed(dict.fromkeys(names))}: used {at}: it takes one backward a sample; {BEFORE}")
        scale, done = self.weights.reciprocal(), set()
        deltas = [delta for entry in told for delta in entry.deltas]
        places = {id(delta): _place(delta) for delta in deltas}
        parts = Counter(place[0] for place in set(places.values()))  # different ones of one storage
        shared = held_elsewhere([*filter(torch.is_tensor, self.mode.captured.values()), *deltas])
        for entry in told:
            for k, (delta, rows) in enumerate(zip(entry.deltas, entry.rows, strict=True)):
                place = places[id(delta)]
                if place in done:
                    continue
                own = scale.to(delta.dtype)
                if self.batch > 1:
                    if rows.owners is not None or delta.shape[rows.dim] > self.batch:
                        own = own[rows.owners_of(delta.shape[rows.dim], self.batch, delta.device)]
                    own = own.reshape(-1, *[1] * (delta.ndim - rows.dim - 1))
                if shared(delta) or 0 in delta.stride() or parts[place[0]] > 1:
                    entry.deltas[k] = delta * own
                else:
                    delta.mul_(own)
                    done.add(place)

    # --- which sample each row belongs to -----------------------------------------------------------------------------

    def _settle_rows(self, work: list[Entry], structure: Structure) -> list[Entry]:
        """Settle which sample each row belongs to. Returns the entries of which this cannot be told."""
        lost, doubtful = [], []
        for entry in work:
            if self.batch == 1:
                entry.rows = [Rows(0, 1, o.shape[0] if o.ndim else 1) for o in entry.outputs]
            elif any(isinstance(state, Shared) for state in entry.states):
                lost.append(entry)
            else:
                entry.rows = [state for state in entry.states if isinstance(state, Rows)]
                if len(entry.rows) < len(entry.states):
                    doubtful.append(entry)
        return lost + self._proved(doubtful, structure) if doubtful else lost

    def _proved(self, doubtful: list[Entry], structure: Structure) -> list[Entry]:
        """Prove rows by a second backward, from losses of other weights. Returns the entries without a proof."""
        root, entry = self.root, doubtful[0]
        advice = None
        if row_rules.capturing(root.gradient):
            advice = (
                "the proof waits for the device, which a CUDA graph cannot record; call batch_layer_grads itself, or "
                "leave the parameter out with exclude="
            )
        elif self.weights is not None:
            advice = "it takes a second backward to prove; call watch.factors(losses) before the training step's"
        if advice:
            raise CaptureError(
                f"{listed(entry.names)}: at {entry.name} the graph does not tell which sample each row belongs to (at "
                f"{entry.reason()}), and {advice}"
            )
        weights, tolerance = row_rules.proof_weights(self.batch, root.gradient, structure.dtypes)
        own = root.gradient.detach() * weights.view(-1, *[1] * (root.gradient.ndim - 1))
        edges = [edge for entry in doubtful for edge in entry.edges]
        weighted = _by_entry(doubtful, self.mode.differentiate(root, own, edges))
        ways, flags = [], []
        for entry, parts in zip(doubtful, weighted, strict=True):
            for delta, part, state in zip(entry.deltas, parts, entry.states, strict=True):
                hint = state if isinstance(state, Rows) else state.hint if isinstance(state, Unproved) else None
                ways.append(row_rules.candidates(delta.shape, self.batch, hint))
                flags += [
                    row_rules.weighs(delta.detach(), part.detach(), rows, weights, tolerance) for rows in ways[-1]
                ]
        told = iter(row_rules.verdicts(flags))
        right = [[rows for rows in own if next(told)] for own in ways]
        left = []
        for entry, found in zip(doubtful, cut(right, (len(entry.deltas) for entry in doubtful)), strict=True):
            if all(found):
                entry.rows = [rows[0] for rows in found]
            else:
                left.append(entry)
        return left

    # --- gradients of values ------------------------------------------------------------------------------------------

    def _take(self, rule: str, shares: Sequence[Share]) -> None:
        for share in shares:
            value = self.mode.values[id(share.value)]
            for name in value.names:
                self.rules.setdefault(name, []).append(rule)
            gradient, maker = share.gradient, value.maker
            if share.rows is not None and isinstance(gradient, Tensor):
                if maker is not None and self.batch > 1 and len(maker.outputs) == 1:
                    rows = [share.rows]
                    self._take(*rules.shares(maker, [gradient], rows, self.batch, self.create_graph))
                    continue
                gradient = row_rules.own_rows(gradient, share.rows, self.batch) if self.batch > 1 else gradient[None]
            self.shares.setdefault(id(share.value), []).append(Share(share.value, gradient))

    # --- from values to parameters ------------------------------------------------------------------------------------

    def _to_parameters(self, whole: dict[str, Tensor]) -> dict[str, Gradient]:
        """The gradients of all parameters; ``whole``: of those of which all uses are known together."""
        parts: dict[str, list[Gradient]] = {}
        for found in self.shares.values():
            for name, gradient in self._by_parameter(found[0].value, _sum([share.gradient for share in found])):
                parts.setdefault(name, []).append(gradient)
        for name, gradient in whole.items():
            parts[name], self.rules[name] = [gradient], ["backward a sample"]
        result: dict[str, Gradient] = {}
        for name in [*parts, *(name for name in self.mode.chosen if name not in parts)]:
            parameter = self.mode.chosen[name]
            if name in parts:
                result[name] = _sum(parts[name])
                self.coverage.rules[name] = " + ".join(dict.fromkeys(self.rules.get(name, ["general"])))
            else:
                result[name] = parameter.new_zeros(self.batch, *parameter.shape, requires_grad=False)
                self.coverage.rules[name] = "unused"
        return result

    def _by_parameter(self, value: Tensor, gradient: Gradient) -> list[tuple[str, Gradient]]:
        """The gradients of the parameters that a value depends on, by name."""
        value, gradient = self._carried(value, gradient)
        if id(value) in self.parameter_names:
            return [(self.parameter_names[id(value)], gradient)]
        names = sorted(self.mode.values[id(value)].names)
        leaves = [self.mode.chosen[name] for name in names]
        again = value if self.weights is None else self._rebuilt(value)  # the training step has freed its graph
        changed = any(leaf._version != self.mode.values[id(leaf)].version for leaf in leaves)
        if again is not value and (changed or not rules.close(again.detach()[None], value.detach()[None])):
            raise CaptureError(f"{listed(names)}: changed since the forward, or made at random; {BEFORE}")
        found = rules.batched_grad((again,), leaves, (self._written(value, gradient),), self.create_graph)
        return [(name, g) for name, g in zip(names, found, strict=True) if g is not None]

    def _carried(self, value: Tensor, gradient: Gradient) -> tuple[Tensor, Gradient]:
        """Gradients follow a value through transposes, slices, casts, reshapes and look-ups, as far as these go."""
        while id(value) not in self.parameter_names:
            maker = self.mode.values[id(value)].maker
            if maker is None or len(maker.values) > 1:
                break
            (source,) = maker.values.values()
            moved = _moved(maker, value, source, gradient)
            if moved is None and not self.create_graph:
                call = maker.call
                if call is not None and call.rule == "embedding" and source.ndim == 2:
                    index = call.input.expand(self.batch, *call.input.shape)
                    moved = call.gradient("weight", index, self._written(value, gradient))
            if moved is None:
                break
            value, gradient = source, moved
        return value, gradient

    def _written(self, value: Tensor, gradient: Gradient) -> Tensor:
        written = gradient if isinstance(gradient, Tensor) else gradient.materialize()
        return written.reshape(self.batch, *value.shape).to(value.dtype)

    def _rebuilt(self, value: Tensor) -> Tensor:
        """A value computed again by the same calls."""
        if id(value) in self.parameter_names:
            return value
        known = self.mode.values.get(id(value))
        maker = None if known is None else known.maker
        if known is None or (maker is None and not known.names):
            return value.detach()
        if maker is None:
            raise CaptureError(f"{listed(sorted(known.names))}: a value of it was changed in place; {BEFORE}")
        again = {i: self._rebuilt(source) for i, source in maker.values.items()}
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: again.get(id(t), t), (maker.args, maker.kwargs))
        results = [t for t in rules.tensors_of(maker.func(*args, **kwargs)) if t.requires_grad]
        return results[next(k for k, made in enumerate(maker.outputs) if made is value)]


def _place(tensor: Tensor) -> tuple:
    """Where a tensor lies, in whatever order its dimensions are."""
    return memory(tensor), tensor.storage_offset(), tuple(sorted(zip(tensor.shape, tensor.stride(), strict=True)))


def _by_entry(work: list[Entry], found: list[Tensor | None]) -> list[list[Tensor]]:
    """The deltas of each entry's outputs, from a flat list of the gradients at all edges."""

    def delta_of(entry: Entry, output: Tensor, found: Tensor | None) -> Tensor:
        if found is None:  # the losses do not depend on this output
            return torch.zeros(output.shape, dtype=output.dtype, device=entry.device)
        return found if entry.direct else row_rules.delta_of_view(output, found)

    parts = cut(found, (len(entry.edges) for entry in work))
    return [
        [delta_of(entry, output, delta) for output, delta in zip(entry.outputs, part, strict=True)]
        for entry, part in zip(work, parts, strict=True)
    ]


@contextlib.contextmanager
def _hooks_apart(parameters: Iterable[Tensor]) -> Iterator[dict[int, dict]]:
    """The user's hooks on parameters, by id, removed during the backward: each sample's gradient goes through them."""
    hooks = {id(p): (p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks}
    try:
        for own, _ in hooks.values():
            own.clear()
        yield {i: copy for i, (_, copy) in hooks.items()}
    finally:
        for own, copy in hooks.values():
            own.update(copy)


def _hooked(gradient: Gradient, hooks: dict | None) -> Gradient:
    if not hooks:
        return gradient
    written, samples = gradient if isinstance(gradient, Tensor) else gradient.materialize(), []
    for own in written:
        for hook in list(hooks.values()):
            changed = hook(own)
            own = own if changed is None else changed
        samples.append(own)
    return torch.stack(samples) if samples else written


def _moved(maker: Entry, value: Tensor, source: Tensor, gradient: Gradient) -> Gradient | None:
    """The gradient for ``source`` of which ``maker`` made ``value``; None where it has no such form."""
    name, func, shape, batch = maker.name, maker.func, tuple(source.shape), gradient.shape[0]
    first = bool(maker.args) and maker.args[0] is source
    added = name in _ADDED and len(maker.args) == 2 and not maker.kwargs
    added = added and maker.args[0] is not maker.args[1]
    if (added or (first and name in _CASTS)) and value.shape == source.shape and not source.is_complex():
        return gradient.to(source.dtype) if isinstance(gradient, Tensor) else gradient
    if not first:
        return None
    if isinstance(gradient, Tensor):
        return gradient.reshape(batch, *shape) if name in _SAME_NUMBERS else None
    if gradient.weight_shape is None and tuple(gradient.shape[1:]) != tuple(value.shape):
        return None
    dims: list[int] | None = None
    if name in ("t", "T", "mT", "adjoint", "H") or func in (_T, _MT, _H):
        dims = [-2, -1] if source.ndim >= 2 else []
        if source.ndim > 2 and func not in (_MT, Tensor.adjoint):
            return None
    elif name in ("transpose", "swapaxes", "swapdims"):
        dims = list(maker.args[1:3]) if len(maker.args) == 3 else None
    if dims is not None and not source.is_complex():
        return gradient.transposed(*dims) if dims else gradient
    if func is Tensor.__getitem__ and type(maker.args[1]) is slice and value.shape[1:] == source.shape[1:]:
        start, _, step = maker.args[1].indices(shape[0])
        return gradient.placed(start, shape[0]) if step == 1 else None
    if name in ("split", "chunk", "split_with_sizes", "tensor_split") and value.shape[1:] == source.shape[1:]:
        start = 0
        for part in maker.outputs:
            if part is value:
                return gradient.placed(start, shape[0])
            start += part.shape[0]
    if name in _SAME_NUMBERS:
        return gradient.reshaped(shape)
    return None


def _sum(parts: list[Gradient]) -> Gradient:
    if len(parts) == 1:
        return parts[0]
    written = [part for part in parts if isinstance(part, Tensor)]
    if len(written) == len(parts):
        return functools.reduce(torch.add, written)
    return GradFactors.add([GradFactors.of(p) if isinstance(p, Tensor) else p for p in parts])
