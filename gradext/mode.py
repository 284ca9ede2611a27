"""The torch-function mode that watches a forward: it tells values of parameters, samples and constants apart.

A function of values and constants gives a new value, which stays attached to the parameters. A call where a value meets
samples is an *entry*: it gets the value detached, so that no gradient of weights is computed. Here calls are recorded;
nothing here knows how gradients are made of them, and no backward is begun here but for others.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from . import rows as row_rules
from .losses import Root
from .rules import Entry, is_in_place, tensors_of
from .selection import Selection

# Functions of torch's that are written in Python and call others with parameters: the mode sees each of these calls.
_COMPOSED = {F.multi_head_attention_forward}
# Functions whose result never depends on a parameter differentiably, or that are meant for the parameter itself: the
# most frequent, passed on at once.
_PASSED = {
    *(getattr(Tensor, name).__get__ for name in ("data", "device", "dtype", "grad", "is_cuda", "is_leaf", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_nested", "ndim", "requires_grad", "shape", "grad_fn", "_base")),
    *(Tensor.__len__, Tensor.dim, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.numel),
    *(Tensor.size, Tensor.stride, torch.is_floating_point, torch.is_tensor, torch.numel, Tensor.__hash__),
    *(getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")),
    *(Tensor.register_hook, Tensor.requires_grad_, Tensor.backward, torch.autograd.grad, Tensor.retain_grad),
}
# Functions that use only the type or shape of later arguments: how many of the first they use whole.
_WHOLE = dict.fromkeys((Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as), 1) | (
    dict.fromkeys((Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor), 0)
)

# Functions whose results are data where they are called outside of every module, and constants inside of one.
_DATA = {torch.tensor, torch.as_tensor, torch.rand, torch.randn, torch.randint, torch.normal, torch.randperm}

_DERIVATIVES = {torch.autograd.grad, Tensor.backward}
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_CALL = nn.Module._call_impl.__code__

# On a tensor: the run's token if it depends on samples, -token if it is a constant made in the run.
_MARK = "_gradext_mark"
_tokens = iter(range(1, 1 << 62))


@dataclass(eq=False)
class Value:
    """A parameter, or a value of parameters alone."""

    tensor: Tensor  # held, so that no other tensor gets its id
    names: frozenset[str]  # the chosen parameters that it depends on; none for a parameter that was not chosen
    made: Entry | None = None  # the call that gave it
    version: int = 0

    @property
    def maker(self) -> Entry | None:
        """The call that gave it; None where that is not known, or it was changed in place since."""
        return self.made if self.made is not None and self.tensor._version == self.version else None


class WatchMode(TorchFunctionMode):
    """What one run of a model does with its parameters.

    attached: values stay in the graph, for training or for derivatives of the deltas. train: the gradients of a
    backward that the user runs are captured.
    """

    handles = 0  # of hooks that modes have registered, in all threads

    def __init__(self, model: nn.Module, selection: Selection, *, attached: bool, train: bool) -> None:
        super().__init__()
        self.model, self.chosen, self.attached, self.train = model, selection.chosen, attached, train
        self.values: dict[int, Value] = {
            **{id(p): Value(p, frozenset([name]), None, p._version) for name, p in selection.chosen.items()},
            **{id(p): Value(p, frozenset()) for p in selection.others.values()},
        }
        self.entries: list[Entry] = []
        self.ends: set[Node] = set()  # where values are attached: the graph of the parameters begins
        self.token = next(_tokens)  # on tensors that depend on samples; its negative on constants made meanwhile
        self.given: set[int] = set()  # ids of the stand-ins
        self.owned: set[int] | None = None  # ids of the tensors that the model holds, read on first use
        self.told = False  # whether the inputs were marked
        self.replay = False  # in a backward that runs a checkpointed forward again
        self.opaque = False  # nothing is recorded: inside a layer with a user's own rule, or in a run of one sample
        self.one_dimensional: list[Tensor] = []  # results that may be the losses, where a training step is watched
        self.hooked = False  # whether the run has registered hooks
        self.captured: dict[tuple[Node, int], Tensor | None] = {}  # of the last backward, by its id
        self.task = -1
        self.hidden: dict[str, str] = {}  # parameter -> the custom autograd function whose forward uses it
        self.differentiated = 0  # how many entries the forward has taken derivatives through, with their graph

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _PASSED:
            if func in _DERIVATIVES and kwargs.get("create_graph"):
                self.differentiated = len(self.entries)
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            if not self.replay:
                values, _, sampled = self._told_apart(func, args, kwargs)
                self._note_hidden(values)
                self._mark(result, sampled, args)
            return result
        # Torch has no public function for this; both names are the same in every version that the package supports.
        if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        if self.opaque:
            return func(*args, **kwargs)
        if func in _DATA and not self.told and _frame_of(_CALL) is None:
            return func(*args, **kwargs)
        if func in _COMPOSED:
            return self._look_inside(func, args, kwargs)
        values, others, sampled = self._told_apart(func, args, kwargs)
        if values:
            if not sampled or func in _WHOLE:
                return self._derive(func, args, kwargs, values)
            if any(value.names for value in values):
                return self._enter(func, args, kwargs, values, others)
            args, kwargs = self._replaced(args), self._replaced(kwargs)
        result = func(*args, **kwargs)
        self._mark(result, sampled, args)
        if self.train:
            self._note_losses(result)
        return result

    def _look_inside(self, func, args, kwargs):
        """Run a function of torch's that is written in Python so that the calls it makes are seen one by one."""
        # Its first step would hand the whole function to the modes again.
        names = {**func.__globals__, "has_torch_function": lambda arguments: False}
        inside = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        inside.__kwdefaults__ = func.__kwdefaults__
        with self:
            return inside(*args, **kwargs)

    # --- telling tensors apart ----------------------------------------------------------------------------------------

    def mark_inputs(self, tensors: Iterable[Tensor]) -> None:
        """Mark the samples: these tensors and what is computed from them, no other tensor from outside."""
        self.told = True
        for tensor in tensors:
            if id(tensor) not in self.values:
                setattr(tensor, _MARK, self.token)

    def _told_apart(self, func, args: tuple, kwargs: dict) -> tuple[list[Value], list[Tensor], bool]:
        """The values among the arguments of a call, the other tensors, and whether these hold samples."""
        values: list[Value] = []
        others: list[Tensor] = []
        sampled, token = False, self.token
        for tensor in tensors_of((args, kwargs) if kwargs else args):
            mark = getattr(tensor, _MARK, None)
            if mark == token:
                others.append(tensor)
                sampled = sampled or tensor.ndim > 0 or tensor.is_floating_point()
            else:
                value = self.values.get(id(tensor))
                # A constant with a history may have been written to by way of a view of it.
                if value is None and tensor.requires_grad and (mark != -token or tensor.grad_fn is not None):
                    value = self._adopted(tensor)
                if value is None:
                    others.append(tensor)
                    sampled = sampled or self._is_sample(tensor)
                else:
                    values.append(value)
        if func in _WHOLE:
            sampled = any(map(self._is_sample, others[: _WHOLE[func]]))
        return values, others, sampled

    def _adopted(self, tensor: Tensor) -> Value | None:
        """The value that unseen code computed from parameters alone: custom functions, an earlier forward.

        What is made of tensors that are neither parameters nor samples, though they require grad, is constant.
        """
        names = self._names_below(tensor)
        if not names:
            setattr(tensor, _MARK, self.token if names is None else -self.token)
            return None
        self.values[id(tensor)] = value = Value(tensor, names)
        return value

    def _names_below(self, tensor: Tensor) -> frozenset[str] | None:
        """The chosen parameters that a tensor is made of; None where it is made of anything else too."""
        if tensor.grad_fn is None:
            return frozenset() if self._is_foreign(tensor) else None
        seen: set[Node] = set()
        names: set[str] = set()
        stack: list[Node | None] = [tensor.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            value = None if leaf is None else self.values.get(id(leaf))
            if node in self.ends or (leaf is not None and value is None and not self._is_foreign(leaf)):
                return None
            if value is not None:
                names |= value.names
            stack += [below for below, _ in node.next_functions]
        return frozenset(names)

    def _is_foreign(self, leaf: Tensor) -> bool:
        """Whether a tensor that requires grad is neither a parameter nor a sample."""
        if id(leaf) in self.given or getattr(leaf, _MARK, None) == self.token:
            return False
        return self.told or isinstance(leaf, nn.Parameter) or id(leaf) in self._held_by_model()

    def _held_by_model(self) -> set[int]:
        """The ids of buffers and plain attributes."""
        if self.owned is None:
            self.owned = {id(v) for m in self.model.modules() for v in (*m._buffers.values(), *vars(m).values())}
        return self.owned

    def _is_sample(self, tensor: Tensor) -> bool:
        if tensor.ndim == 0 and not tensor.is_floating_point():
            return False  # an index that data have chosen has no rows, and is a constant of this run
        mark = getattr(tensor, _MARK, None)
        if mark == self.token or mark == -self.token:
            return mark == self.token
        if tensor.requires_grad or self.told:
            return tensor.requires_grad
        return id(tensor) not in self._held_by_model()  # from outside: the caller's, unless the model holds it

    def _mark(self, result, sampled: bool, args: tuple) -> None:
        """Remember of a result whether it depends on samples."""
        mark = self.token if sampled else -self.token
        # Without a graph, a view requires grad as its base does, but has no history.
        recorded = torch.is_grad_enabled()
        if isinstance(result, Tensor) and result.requires_grad and recorded:
            if sampled and id(result) not in self.values:
                setattr(result, _MARK, mark)
            return
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            plain = isinstance(tensor, Tensor) and not (tensor.requires_grad and recorded)
            if plain and (sampled or not hasattr(tensor, _MARK)):  # in place it may come from outside
                setattr(tensor, _MARK, mark)
        written = args[0] if args and (result is None or result is args[0]) else None  # None: __setitem__
        if sampled and isinstance(written, Tensor):
            for tensor in (written, written._base):
                if tensor is not None:
                    setattr(tensor, _MARK, mark)

    def _note_hidden(self, values: list[Value]) -> None:
        """Remember parameters that the forward of a custom autograd function uses: this leaves no graph."""
        names = {name for value in values for name in value.names}
        if names - self.hidden.keys() and (function := _custom_function()) is not None:
            self.hidden |= dict.fromkeys(names, function)

    # --- calls with values --------------------------------------------------------------------------------------------

    def _replaced(self, items, stand_ins: dict[int, Tensor] | None = None):
        """The arguments of a call, with stand-ins for values where ``stand_ins`` gathers them (by id of the value)."""
        if type(items) is dict:
            return dict(zip(items, self._replaced(tuple(items.values()), stand_ins), strict=True)) if items else items
        replaced = []
        for item in items:
            if isinstance(item, Tensor):
                item = self._in_place_of(item, stand_ins)
            elif type(item) in (list, tuple, dict):
                item = self._replaced(item, stand_ins)
            replaced.append(item)
        return type(items)(replaced)

    def _in_place_of(self, tensor: Tensor, stand_ins: dict[int, Tensor] | None) -> Tensor:
        value = self.values.get(id(tensor))
        if value is None:
            return tensor
        if not value.names:  # not chosen: no gradient, unless one is wanted outside
            return tensor.detach() if tensor.requires_grad and not self.attached else tensor
        if stand_ins is None:
            return tensor
        if id(tensor) not in stand_ins:
            if self.attached:
                new = tensor.view_as(tensor)
                self.ends.add(get_gradient_edge(new).node)
            else:
                new = tensor.detach().requires_grad_()
            self.given.add(id(new))
            stand_ins[id(tensor)] = new
        return stand_ins[id(tensor)]

    def _derive(self, func, args, kwargs, values: list[Value]):
        """A function of values and constants gives a value."""
        result = func(*args, **kwargs)  # what the model keeps of it goes on training the parameters
        found = result if isinstance(result, (list, tuple)) else (result,)
        if result is None:  # __setitem__
            found = args[:1]
        made = [t for t in found if isinstance(t, Tensor) and t.requires_grad]
        if not made:
            self._mark(result, False, args)
            return result
        names = frozenset().union(*(value.names for value in values))
        own = {id(v.tensor): v.tensor for v in values if v.names}
        maker = Entry(func, args, kwargs, [names], own, made, [])
        for tensor in made:
            if id(tensor) in self.values and (tensor.is_leaf or not is_in_place(maker.func)):
                continue  # returned unchanged, or the parameter itself: an assignment to it
            # In place, only its own history says how it was made.
            self.values[id(tensor)] = Value(tensor, names, None if is_in_place(maker.func) else maker, tensor._version)
        return result

    def _enter(self, func, args, kwargs, found: list[Value], others: list[Tensor]):
        """An entry: values meet samples."""
        target = self.values.get(id(args[0])) if args else None
        if (target is not None and is_in_place(func)) or any(t.is_nested for t in others):
            # Samples written into a value, ragged tensors of torch's own: the graph tells of the parameter.
            result = func(*args, **kwargs)
            for tensor in tensors_of(args[0] if result is None else result):
                self.values.pop(id(tensor), None)
                setattr(tensor, _MARK, self.token)
            return result
        stand_ins: dict[int, Tensor] = {}
        args, kwargs = self._replaced(args, stand_ins), self._replaced(kwargs, stand_ins)
        result = func(*args, **kwargs)
        outputs = [t for t in tensors_of(args[0] if result is None else result) if t.requires_grad]
        inner = None
        if len(outputs) > 1:
            # One output may be made of another (h of c in a cell): views tell what comes from outside of the call.
            inner = outputs
            result = pytree.tree_map_only(Tensor, lambda t: t.view_as(t) if t.requires_grad else t, result)
            outputs = [t for t in tensors_of(result) if t.requires_grad]
        for output in outputs:
            setattr(output, _MARK, self.token)
        if not outputs:
            self._mark(result, True, args)
        elif not self.replay:
            values = {id(new): self.values[i].tensor for i, new in stand_ins.items()}
            named = [self.values[i].names for i in stand_ins]
            # A later in-place operation on a view of the same base rewrites the view's history, but not the base's.
            bases = outputs if inner else [t if (base := row_rules.base_of(t)) is None else base for t in outputs]
            edges, ends = list(map(get_gradient_edge, bases)), list(map(get_gradient_edge, inner or outputs))
            entry = Entry(func, args, kwargs, named, values, outputs, edges, ends, direct=inner is not None)
            if not is_in_place(entry.func):
                if len(outputs) == 1 and entry.is_known:
                    entry.outputs = [row_rules.form_of(outputs[0])]
                used = (*others, *(value.tensor for value in found if not value.names))
                entry.versions = [(t, t._version) for t in used]
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    entry.autocast = (kind, torch.get_autocast_dtype(kind))
            self.entries.append(entry)
            if self.train:
                for edge in edges:
                    self._capture(edge)
                self._note_losses(result)
        return result

    def _capture(self, edge: GradientEdge) -> None:
        def keep(grads, key=(edge.node, edge.output_nr)):
            if self.task != (task := torch._C._current_graph_task_id()):  # another backward: of other weights
                self.task = task
                self.captured.clear()
            self.captured[key] = None if (gradient := grads[key[1]]) is None else gradient.detach()

        edge.node.register_prehook(keep)
        WatchMode.handles += 1

    def _note_losses(self, result) -> None:
        if isinstance(result, Tensor) and result.ndim == 1 and result.requires_grad and not self.replay:
            self.one_dimensional.append(result)
            self._capture(get_gradient_edge(result))

    # --- after the run ------------------------------------------------------------------------------------------------

    def differentiate(self, root: Root, gradient: Tensor, inputs: Sequence, retain=True, create_graph=False) -> list:
        """The gradients at ``inputs`` for one at the root; a checkpointed forward meets the same stand-ins again."""
        assert root.edge is not None  # as the losses depend on something
        self.replay = True
        try:
            with contextlib.nullcontext() if self.opaque else self:
                options = retain, create_graph
                return list(torch.autograd.grad((root.edge,), inputs, (gradient,), *options, allow_unused=True))
        finally:
            self.replay = False


def _custom_function() -> str | None:
    """The name of the custom autograd function whose forward is running."""
    frame = _frame_of(_APPLY)
    return None if frame is None else getattr(frame.f_locals.get("cls"), "__name__", "a custom autograd function")


def _frame_of(code: CodeType) -> FrameType | None:
    """The innermost frame that runs this code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame
