"""`watch`: per-sample gradients of every parameter, from the user's own forward and one partial backward.

A `TorchFunctionMode` sees every torch function and tells three kinds of tensors apart: parameters and *values* of
parameters alone (``W.t()``, ``1 + w``, ``W + B @ A``, ``table[index]``), samples, and constants. A function of values
and constants gives a new value, which stays attached to the parameters. A call where a value meets samples is an
*entry*: it is given the value detached, so that no gradient of weights is computed, and its output's gradient, the
delta, is taken from one backward of the losses. `rules` turns an entry into per-sample gradients of its values, and a
batched vjp carries these back to the parameters.

What the mode does not see (custom autograd functions, scripted code) leaves a path in the graph from the losses to the
parameter itself. Its share is ∂ losses[b] along that path: one backward of the same graph a sample. Nothing is ever run
again with other inputs.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import rows as row_rules
from . import rules
from .errors import CaptureError, UnsupportedLayerError
from .factors import GradFactors, LayerFactors, LayerGrads
from .losses import Root
from .rows import Rows, Shared, State, Structure, Unproved
from .rules import Entry, Share
from .selection import Coverage, LayerChoice, Selection, select

# Functions of torch's that are written in Python and call others with parameters: each of these is seen by itself.
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
_CASTS = {"to", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "type", "alias", "view_as"}
# Functions that take of their second tensor its type or its shape alone.
_LIKE = {"to", "type_as", "view_as", "reshape_as", "expand_as"}
_NEW = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
_SAME_NUMBERS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"}

_DERIVATIVES = {torch.autograd.grad, Tensor.backward}
_APPLY = torch.autograd.Function.apply.__func__.__code__

_locks = WeakIdKeyDictionary()
_locks_guard = threading.Lock()
_tokens = iter(range(1, 1 << 62))


def lock_of(model: nn.Module) -> threading.RLock:
    """Calls on one model take turns: its parameters' flags and buffers are changed for their time."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


@dataclass(eq=False)
class _Value:
    """A parameter, or a value of parameters alone."""

    tensor: Tensor  # held, so that no other tensor gets its id
    names: frozenset[str]  # the chosen parameters that it depends on; none for a parameter that was not chosen
    made: Entry | None = None  # the call that gave it
    version: int = 0

    @property
    def maker(self) -> Entry | None:
        """The call that gave it; None where that is not known, or it was changed in place since."""
        return self.made if self.made is not None and self.tensor._version == self.version else None


class _Mode(TorchFunctionMode):
    def __init__(self, selection: Selection, attached: bool, train: bool, owned: Callable[[], set[int]]) -> None:
        super().__init__()
        self.attached = attached  # values stay in the graph: for training, or for derivatives of the deltas
        self.train = train
        self.values: dict[int, _Value] = {
            **{id(p): _Value(p, frozenset([name])) for name, p in selection.chosen.items()},
            **{id(p): _Value(p, frozenset()) for p in selection.others.values()},
        }
        self.entries: list[Entry] = []
        self.ends: set[Node] = set()  # where values are attached: the graph of the parameters begins
        self.token = next(_tokens)  # on tensors that depend on samples; its negative on constants made meanwhile
        self.owned = owned
        self.told = False  # whether the inputs were marked
        self.replay = False  # in a backward that runs a checkpointed forward again
        self.opaque = 0  # depth of layers with a rule of their user's own
        self.one_dimensional: list[Tensor] = []  # results that may be the losses, where a training step is watched
        self.handles = 0  # of hooks of its own
        self.captured: dict[tuple[Node, int], Tensor] = {}
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
                values, others = [], []
                self._scan((*args, *kwargs.values()), values, others)
                self._note_hidden(values)
                self._mark(func, result, others, args)
            return result
        if _inside_transform():
            return func(*args, **kwargs)
        if func in _COMPOSED:
            return self._look_inside(func, args, kwargs)
        values: list[_Value] = []
        others: list[Tensor] = []
        self._scan(args, values, others)
        if kwargs:
            self._scan(kwargs.values(), values, others)
        if not values:
            result = func(*args, **kwargs)
            self._mark(func, result, others, args)
            if self.train:
                self._note_losses(result)
            return result
        if self.opaque:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in _LIKE or not any(map(self._is_sample, others)):
            return self._derive(func, args, kwargs, values)
        if any(value.names for value in values):
            return self._enter(func, args, kwargs)
        result = self._call(func, args, kwargs)
        self._mark(func, result, others, args)
        if self.train:
            self._note_losses(result)
        return result

    # --- telling tensors apart ----------------------------------------------------------------------------------------

    def _scan(self, items, values: list[_Value], others: list[Tensor]) -> None:
        for item in items:
            if isinstance(item, Tensor):
                value = self.values.get(id(item))
                if value is None and item.requires_grad and getattr(item, "_gradext_mark", None) != self.token:
                    value = self._adopted(item)
                if value is None:
                    others.append(item)
                else:
                    values.append(value)
            elif type(item) in (list, tuple):
                self._scan(item, values, others)
            elif type(item) is dict:
                self._scan(item.values(), values, others)

    def _adopted(self, tensor: Tensor) -> _Value | None:
        """The value that something unseen has made of parameters alone: custom functions, an earlier forward."""
        seen, stack, names = set(), [tensor.grad_fn], []
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                value = self.values.get(id(leaf))
                if value is None:
                    names = []
                    break
                names += value.names
            elif node in self.ends:
                names = []
                break
            stack += [below for below, _ in node.next_functions]
        if not names:
            tensor._gradext_mark = self.token
            return None
        self.values[id(tensor)] = value = _Value(tensor, frozenset(names))
        return value

    def _is_sample(self, tensor: Tensor) -> bool:
        if tensor.requires_grad:
            return True
        mark = getattr(tensor, "_gradext_mark", None)
        if mark == self.token:
            return True
        if mark == -self.token or self.told:
            return False
        return id(tensor) not in self.owned()  # from outside: the caller's, unless the model holds it

    def _mark(self, func, result, others: Sequence[Tensor], args: tuple) -> None:
        """Remember of a result whether it depends on samples."""
        name = getattr(func, "__name__", "")
        if name in _LIKE:
            others = others[:1]
        elif name in _NEW:
            others = ()
        if isinstance(result, Tensor):
            if result.requires_grad:
                if id(result) not in self.values:
                    result._gradext_mark = self.token
                return
            plain = [result]
        else:
            plain = (
                [t for t in result if isinstance(t, Tensor) and not t.requires_grad]
                if (isinstance(result, (list, tuple)))
                else []
            )
            if not plain and result is not None:
                return
        mark = self.token if any(map(self._is_sample, others)) else -self.token
        for tensor in plain:
            # Results that are arguments (in place) may come from outside.
            if mark == self.token or not hasattr(tensor, "_gradext_mark"):
                with contextlib.suppress(AttributeError, RuntimeError):
                    tensor._gradext_mark = mark
        if result is None and mark == self.token and args and isinstance(args[0], Tensor):  # __setitem__
            args[0]._gradext_mark = mark

    def mark_inputs(self, tensors: Iterable[Tensor]) -> None:
        self.told = True
        for tensor in tensors:
            if id(tensor) not in self.values:
                tensor._gradext_mark = self.token

    def _note_hidden(self, values: list[_Value]) -> None:
        """What the forward of a custom autograd function does with a parameter leaves no graph."""
        names = {name for value in values for name in value.names}
        if names - self.hidden.keys():
            function = _custom_function()
            if function is not None:
                self.hidden |= dict.fromkeys(names, function)

    # --- calls with values --------------------------------------------------------------------------------------------

    def _call(self, func, args, kwargs):
        """``func`` with parameters that were not chosen detached, unless their gradients are wanted too."""
        if kwargs:
            kwargs = dict(zip(kwargs, self._replaced(list(kwargs.values()), {}), strict=True))
        return func(*self._replaced(args, {}), **kwargs)

    def _replaced(self, items, stand_ins: dict[int, Tensor]):
        changed = None
        for k, item in enumerate(items):
            if type(item) in (list, tuple):
                new = self._replaced(item, stand_ins)
            elif isinstance(item, Tensor):
                new = stand_ins.get(id(item), item)
                if new is item and not self.attached and item.requires_grad:
                    value = self.values.get(id(item))
                    if value is not None and not value.names:
                        new = item.detach()
            else:
                continue
            if new is not item:
                changed = list(items) if changed is None else changed
                changed[k] = new
        return items if changed is None else type(items)(changed)

    def _derive(self, func, args, kwargs, values: list[_Value]):
        """A function of values and constants gives a value."""
        result = self._call(func, args, kwargs)
        results = result if type(result) in (list, tuple) else (result,)
        if isinstance(result, tuple) and type(result) is not tuple:  # a named one
            results = tuple(result)
        if result is None and args and isinstance(args[0], Tensor):  # __setitem__
            results = (args[0],)
        made = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
        if not made:
            self._mark(func, result, (), args)
            return result
        names = frozenset().union(*(value.names for value in values))
        own = {id(v.tensor): v.tensor for v in values if v.names}
        maker = Entry(func, args, kwargs, own, made, [])
        for tensor in made:
            if id(tensor) in self.values and tensor.is_leaf:
                continue  # the parameter itself: an assignment to it
            if id(tensor) in self.values and not maker.in_place:
                continue  # given back as it is
            # In place, only its own history says how it was made.
            self.values[id(tensor)] = _Value(tensor, names, None if maker.in_place else maker, tensor._version)
        return result

    def _enter(self, func, args, kwargs):
        """An entry: values meet samples."""
        stand_ins: dict[int, Tensor] = {}
        entry_values: dict[int, Tensor] = {}
        self._stand_in(args, stand_ins, entry_values)
        if kwargs:
            self._stand_in(kwargs.values(), stand_ins, entry_values)
        args = self._replaced(args, stand_ins)
        if kwargs:
            kwargs = dict(zip(kwargs, self._replaced(list(kwargs.values()), stand_ins), strict=True))
        result = func(*args, **kwargs)
        outputs = self._with_gradient(result if result is not None else args[0])
        for output in outputs:
            output._gradext_mark = self.token
        if not outputs or self.replay:
            if not outputs:
                self._mark(func, result, [t for t in args if isinstance(t, Tensor)], args)
            return result
        versions = [(t, t._version) for t in args if isinstance(t, Tensor) and id(t) not in entry_values]
        edges = [_edge_of(t) for t in outputs]
        ends = [get_gradient_edge(t) for t in outputs]
        entry = Entry(func, args, kwargs, entry_values, outputs, edges, ends, versions)
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                entry.autocast = (kind, torch.get_autocast_dtype(kind))
        if entry.in_place:
            entry.versions = []
        self._record(entry)
        if self.train:
            self._note_losses(result)
        return result

    def _record(self, entry: Entry) -> None:
        self.entries.append(entry)
        if self.train:
            for edge in entry.edges:
                self._capture(edge)

    def _capture(self, edge: GradientEdge) -> None:
        def keep(grads, key=(edge.node, edge.output_nr)):
            if grads[key[1]] is not None:
                self.captured[key] = grads[key[1]].detach()

        edge.node.register_prehook(keep)
        self.handles += 1

    def _note_losses(self, result) -> None:
        if isinstance(result, Tensor) and result.ndim == 1 and result.requires_grad and not self.replay:
            self.one_dimensional.append(result)
            self._capture(get_gradient_edge(result))

    def _stand_in(self, items, stand_ins: dict[int, Tensor], entry_values: dict[int, Tensor]) -> None:
        for item in items:
            if type(item) in (list, tuple):
                self._stand_in(item, stand_ins, entry_values)
            elif isinstance(item, Tensor) and id(item) not in stand_ins:
                value = self.values.get(id(item))
                if value is not None and value.names:
                    new = self.stand_in(item)
                    stand_ins[id(item)] = new
                    entry_values[id(new)] = item

    def stand_in(self, value: Tensor) -> Tensor:
        """What one call gets in place of a value."""
        if not self.attached:
            return value.detach().requires_grad_()
        new = value.view_as(value)
        self.ends.add(new.grad_fn)
        return new

    def _with_gradient(self, result) -> list[Tensor]:
        if isinstance(result, Tensor):
            return [result] if result.requires_grad else []
        if isinstance(result, (list, tuple)):
            return [t for part in result for t in self._with_gradient(part)]
        return []

    def held(self) -> list[Tensor]:
        """The tensors that the entries hold, but for those that come from outside."""
        found = [t for entry in self.entries for t in (*_tensors_of([entry.args, entry.kwargs]), *entry.outputs)]
        return [t for t in (*found, *self.captured.values()) if t.requires_grad or t.grad_fn is not None]

    def _look_inside(self, func, args, kwargs):
        """Run a function of torch's that is written in Python so that the calls it makes are seen one by one."""
        # Its own first step would ask the modes, this one among them, to take over the whole of it again.
        names = {**func.__globals__, "has_torch_function": lambda arguments: False}
        inside = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        inside.__kwdefaults__ = func.__kwdefaults__
        with self:
            return inside(*args, **kwargs)


def _edge_of(output: Tensor) -> GradientEdge:
    # A later in-place operation on a view, or on another of its base, rewrites the view's history, but not the base's.
    base = output._base
    return get_gradient_edge(output if base is None or not base.requires_grad else base)


def _seen_from(output: Tensor, delta: Tensor) -> Tensor:
    """The delta of an output, from that of its base."""
    base = output._base
    if base is None or not base.requires_grad:
        return delta
    if base.shape == output.shape and base.stride() == output.stride():
        return delta
    if base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        return delta.reshape(output.shape)
    if delta.stride() != base.stride():
        delta = torch.empty_strided(base.shape, base.stride(), dtype=delta.dtype, device=delta.device).copy_(delta)
    offset = output.storage_offset() - base.storage_offset()
    return delta.as_strided(output.shape, output.stride(), delta.storage_offset() + offset)


def _rows_from(output: Tensor, state: State, batch: int) -> State:
    """Where the samples lie in an output, from where they lie in its base."""
    base = output._base
    if base is None or not base.requires_grad or isinstance(state, Shared):
        return state
    if isinstance(state, Unproved):
        hint = None if state.hint is None else _rows_from(output, state.hint, batch)
        return state._replace(hint=hint if isinstance(hint, Rows) else None)
    if base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        return row_rules._reshaped(state, tuple(base.shape), tuple(output.shape), batch)
    same = base.stride(state.dim), base.shape[state.dim]
    dims = [d for d in range(output.ndim) if (output.stride(d), output.shape[d]) == same]
    return state.at(dims[0]) if len(dims) == 1 else Unproved("a view")


def _custom_function() -> str | None:
    """The name of the custom autograd function whose forward is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            return getattr(frame.f_locals.get("cls"), "__name__", "a custom autograd function")
        frame = frame.f_back
    return None


def _inside_transform() -> bool:
    # Torch has no public way to ask; both names are the same in every version that the package supports.
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


@contextlib.contextmanager
def requiring_grad(parameters: Iterable[Tensor]):
    """The parameters require grad: a use that the mode misses leaves a trace. Restores the flags on exit."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextlib.contextmanager
def _gradient_mode() -> Iterator[None]:
    """Gradients are recorded, and compiled code runs as Python."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class watch:
    """Per-sample gradients of whatever runs inside: ``with gradext.watch(model) as watch: losses = ...``.

    Any forward, any loss, any inputs: the user's own code. Then `factors` and `grads` give, for each parameter, row b as
    ∂ losses[b] / ∂ parameter of this very run, with its dropout, its routing and its constants. B is the length of the
    losses, in whatever dimension the model has its samples.

    Args:
        model: the module whose parameters are meant; it may be called, or parts of it, any number of times.
        layers, exclude: which parameters, see `gradext.batch_layer_grads`.
        train: watch a training step: the losses keep their graph to the parameters, and after the user's own
            ``losses.mean().backward()`` ``watch.factors()`` gives the factors of that very backward, for each sample's
            own loss, without a second forward or backward. Samples whose loss had weight 0 in it come out as NaN.
        fallback: None: uses of parameters that cannot be seen are added by one backward a sample, with one warning;
            ``"error"`` raises instead.
        mixing: ``"error"`` refuses samples whose losses depend on other samples' rows beyond constants; ``"allow"``
            gives their exact gradients, by one backward a sample.
        segments: for ragged rows, the sample of each row: integers [N] in 0..B-1.
        inputs: the tensors that hold samples (nested); by default all that come from outside of the model.
        create_graph: results can be differentiated with respect to the parameters.

    Raises:
        CaptureError: samples that mix, an input overwritten in place, a reentrant checkpoint.
        UnsupportedLayerError: with ``fallback="error"``, a use of a parameter that cannot be seen.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    >>> x, y = torch.rand(5, 6), torch.tensor([0, 1, 2, 0, 1])
    >>> with gradext.watch(model, train=True) as watch:
    ...     losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    >>> losses.mean().backward()
    >>> watch.factors().norm().shape
    torch.Size([5])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerChoice = None,
        exclude: LayerChoice = None,
        train: bool = False,
        fallback: str | None = None,
        mixing: str = "error",
        segments: Tensor | None = None,
        inputs: Any = None,
        create_graph: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
        if fallback not in (None, "error"):
            raise ValueError(f"fallback: expected None or 'error', but got {fallback!r}")
        if mixing not in ("error", "allow"):
            raise ValueError(f"mixing: expected 'error' or 'allow', but got {mixing!r}")
        if segments is not None and (
            not isinstance(segments, Tensor) or segments.ndim != 1 or segments.is_floating_point()
        ):
            raise ValueError(
                "segments: expected the sample of each row, a one-dimensional tensor of integers, but got "
                + (
                    f"shape {tuple(segments.shape)}, {segments.dtype}"
                    if isinstance(segments, Tensor)
                    else repr(segments)
                )
            )
        if train and create_graph:
            raise ValueError("create_graph: expected False with train=True; use watch(model, create_graph=True)")
        self._model, self._train, self._create_graph = model, train, create_graph
        self._fallback, self._mixing, self._segments, self._inputs = fallback, mixing, segments, inputs
        self._selection = select(model, layers, exclude)
        self._mode: _Mode | None = None
        self._context: Any = None
        self._hooked = False
        self._retain = True  # the graph of the losses, for further calls
        self.coverage = Coverage(left_out=dict(self._selection.left_out))

    # --- watching -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> watch:
        if self._context is not None:
            raise RuntimeError("watch: expected to be entered once at a time; make another one for another block")
        context = self._watching()
        context.__enter__()
        self._context = context
        return self

    def __exit__(self, *error) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(*error)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        with lock_of(self._model), _gradient_mode(), requiring_grad(self._selection.chosen.values()):
            mode = _Mode(self._selection, self._train or self._create_graph, self._train, _Owned(self._model).__call__)
            self._mode = mode
            if self._inputs is not None:
                mode.mark_inputs(_tensors_of(self._inputs))
            handles = RemovableHandle.next_id
            with self._registered_layers(mode), mode:
                yield
            self._hooked = RemovableHandle.next_id - mode.handles != handles

    @contextlib.contextmanager
    def _registered_layers(self, mode: _Mode) -> Iterator[None]:
        """Record layers that have a rule of their user's own as wholes."""
        handles: list[RemovableHandle] = []
        try:
            self._watch_registered(mode, handles)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch_registered(self, mode: _Mode, handles: list[RemovableHandle]) -> None:
        thread = threading.get_ident()
        for name, module in rules.registered_modules(self._model):
            own = {role: p for role, p in module.named_parameters() if self._is_chosen(p)}
            if not own:
                continue
            former: list[tuple] = []

            def before(module, args, kwargs, own=own, former=former):
                if threading.get_ident() != thread or not torch.is_grad_enabled():
                    return
                mode.opaque += 1
                if mode.opaque == 1:
                    given = {role: mode.stand_in(p) for role, p in own.items()}
                    versions = [(t, t._version) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
                    former.append((given, versions, _exchange(module, given)))

            def after(module, args, kwargs, output, name=name, own=own, former=former):
                if threading.get_ident() != thread or not torch.is_grad_enabled():
                    return
                mode.opaque -= 1
                if mode.opaque:
                    return
                given, versions, old = former.pop()
                _exchange(module, old)
                inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
                if not inputs or output is None or mode.replay:  # None where the forward has failed
                    return
                if not isinstance(output, Tensor) or not output.requires_grad:
                    raise CaptureError(
                        f"layer {name!r} ({type(module).__name__}): expected one tensor that depends on its parameters "
                        f"from a layer with a rule of its own, but it returned {type(output).__name__}"
                    )
                call = rules.registered_call(name, module, inputs[0], given)
                values = {id(t): own[role] for role, t in given.items()}
                mode._record(
                    Entry(
                        _no_function,
                        tuple(given.values()),
                        {},
                        values,
                        [output],
                        [_edge_of(output)],
                        [get_gradient_edge(output)],
                        versions,
                        call=call,
                        bound=True,
                    )  # fmt: skip
                )

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
            mode.handles += 2

    def _is_chosen(self, parameter: Tensor) -> bool:
        return any(parameter is p for p in self._selection.chosen.values())

    # --- results ------------------------------------------------------------------------------------------------------

    def factors(self, losses: Tensor | None = None) -> LayerFactors:
        """The gradients of every chosen parameter in factored form, by the parameter's name.

        losses [B]: each sample's own loss, from inside the block. After a training step's backward they may be left
        out: the last one-dimensional result of the block is taken.
        """
        found = self._gradients_of(losses)
        result = LayerFactors((name, _as_factors(name, gradient)) for name, gradient in found.items())
        result.coverage = self.coverage
        return kept_apart(result, self._mode.held())

    def grads(self, losses: Tensor | None = None) -> LayerGrads:
        """The gradients themselves, {parameter name: [B, *parameter.shape]}."""
        found = self._gradients_of(losses)
        apart, result = Apart(found), LayerGrads()
        for name, gradient in found.items():
            kind = self._selection.chosen[name].dtype
            written = isinstance(gradient, Tensor)
            result[name] = apart(gradient.to(kind)) if written else gradient.materialize(dtype=kind)
        result.coverage = self.coverage
        return result

    def _gradients_of(self, losses: Tensor | None) -> dict[str, GradFactors | Tensor]:
        mode = self._mode
        if mode is None or self._context is not None:
            raise RuntimeError("watch: expected the block to have ended; ask for gradients after it")
        if losses is None:
            if not self._train:
                raise ValueError("losses: expected the losses [B]; only with train=True they may be left out")
            if not mode.one_dimensional:
                raise ValueError(
                    "losses: expected one loss for each sample, [B], from inside the block, but nothing there gave a "
                    "one-dimensional tensor; use reduction='none', and pass the losses to watch.factors"
                )
            losses = mode.one_dimensional[-1]
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.is_floating_point():
            came = (
                f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
            )
            raise ValueError(
                f"losses: expected a floating-point tensor of shape (B,), one value for each sample, but got {came}; use "
                "reduction='none' and sum over each sample's own elements: .flatten(1).sum(1)"
            )
        edge = get_gradient_edge(losses) if losses.requires_grad else None
        root = Root(edge, torch.ones_like(losses, requires_grad=False))
        weights = None if edge is None else mode.captured.get((edge.node, edge.output_nr))
        return self.gradients(root, weights)

    def gradients(self, root: Root, weights: Tensor | None = None) -> dict[str, GradFactors | Tensor]:
        """From where the backward begins; ``weights`` [B] are those of a backward that has run, by `train`."""
        assert self._mode is not None
        with _gradient_mode(), requiring_grad(self._selection.chosen.values()):
            return _Backward(self, self._mode, root, weights).run()


def _no_function(*args, **kwargs):
    raise TypeError("a layer with a rule of its user's own is no function")


def _exchange(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors in place of parameters, by their names in the module; returns what was there."""
    former = {}
    for role, tensor in tensors.items():
        owner, _, name = role.rpartition(".")
        parameters = module.get_submodule(owner)._parameters
        former[role] = parameters[name]
        parameters[name] = tensor
    return former


class _Owned:
    """The ids of tensors that the model holds: buffers, and plain attributes; found when first asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.ids = model, None

    def __call__(self) -> set[int]:
        if self.ids is None:
            self.ids = set()
            for module in self.model.modules():
                self.ids.update(id(b) for b in module._buffers.values())
                self.ids.update(id(v) for v in module.__dict__.values() if isinstance(v, Tensor))
        return self.ids


def _tensors_of(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple, set)) else ()
    return [t for item in items for t in _tensors_of(item)]


def _as_factors(name: str, gradient: GradFactors | Tensor) -> GradFactors:
    if isinstance(gradient, Tensor) and gradient.is_complex():
        raise UnsupportedLayerError(
            f"{name}: expected a real parameter, as factors hold real numbers, but it is {gradient.dtype}; leave it out "
            "with exclude=, or take the gradients themselves (batch_layer_grads, watch.grads)"
        )
    return GradFactors.of(gradient) if isinstance(gradient, Tensor) else gradient.compact()


def kept_apart(factors: LayerFactors, held: Iterable[Tensor] = ()) -> LayerFactors:
    """Factors outlive the call: what somebody else holds too (an input, a buffer, a model's memory) is copied.

    ``held``: other tensors that are known to share memory with them, and stay as they are.
    """
    parts = [t for f in factors.values() for t in f._tensors()]
    holders: dict[int, int] = {}
    for t in {id(t): t for t in (*parts, *held)}.values():
        holders[memory(t)] = holders.get(memory(t), 0) + 1
    copies: dict[int, Tensor] = {}

    def own(t: Tensor) -> Tensor:
        if id(t) in copies:
            return copies[id(t)]
        storage = t.untyped_storage()
        shared = torch._C._storage_Use_Count(storage._cdata) > holders[memory(t)] + 1
        copies[id(t)] = t.clone() if shared else t
        return copies[id(t)]

    result = type(factors)((name, f._map(own)) for name, f in factors.items())
    result.coverage = factors.coverage
    return result


class Apart:
    """Results with memory of their own: a bias's gradient is a delta, which autograd may have given others too."""

    def __init__(self, found: dict[str, GradFactors | Tensor]) -> None:
        self.taken = {memory(t) for f in found.values() if isinstance(f, GradFactors) for t in f._tensors()}

    def __call__(self, gradient: Tensor) -> Tensor:
        if memory(gradient) in self.taken or 0 in gradient.stride():
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        self.taken.add(memory(gradient))
        return gradient


def memory(tensor: Tensor) -> int:
    """The address of the tensor's storage, by which it is found out who shares it."""
    return tensor.untyped_storage().data_ptr()


# --- the partial backward ---------------------------------------------------------------------------------------------


class _Backward:
    """From the losses and the entries of a run to the gradients of the parameters."""

    def __init__(self, watched: watch, mode: _Mode, root: Root, weights: Tensor | None) -> None:
        self.watched, self.mode, self.root, self.weights = watched, mode, root, weights
        self.batch = root.gradient.shape[0]
        self.selection, self.coverage = watched._selection, watched.coverage
        self.shares: dict[int, list[Share]] = {}  # by id of the value
        self.rules: dict[str, list[str]] = {}  # by parameter
        self.trained = weights is not None
        self.ids = {id(p): name for name, p in self.selection.chosen.items()}

    def run(self) -> dict[str, GradFactors | Tensor]:
        structure = self._structure() if self.batch else Structure(0)
        self._refuse_hidden(structure)
        # Hooks get the deltas themselves, and may keep them.
        self.exposed = self.watched._hooked or "BackwardHookFunctionBackward" in structure.kinds
        differentiated = self.mode.entries[: self.mode.differentiated]
        live = [entry for entry in self.mode.entries if any(structure.of(edge) is not None for edge in entry.edges)]
        unseen = [name for i, name in self.ids.items() if i in structure.leaves]
        work = [_Live.of(entry, structure) for entry in live if entry not in differentiated]
        # The losses may depend on these through a backward pass too, which only the whole graph knows.
        twice = [_Live.of(entry, structure) for entry in differentiated] if structure.states else []
        for item in work if self.trained else ():
            item.entry.spent = True
        self._segments(work)
        self._deltas(work, unseen)
        lost = self._proved(work, structure.dtypes)
        watched_graph = self.watched._create_graph
        if self.trained:
            self._undo_weights(work)
        totals = self._totals(work) if self.watched._hooked else {}
        for item in work:
            if item not in lost:
                if self.watched._mixing == "error" and self.batch > 1 and rules.mixes(item.entry, item.rows):
                    self._refuse_mixing(item)
                if item.entry.overwritten() and (rules.bind(item.entry) is not None or item.entry.name in rules._MUL):
                    raise CaptureError(
                        f"{item.names(self.mode)}: the input of {item} was modified in place after the call had used it, "
                        "so that the gradient can no longer be computed; make that operation out of place"
                    )
                rule, found = rules.shares(item.entry, item.deltas, item.rows, self.batch, watched_graph)
                self._compare(item, found, totals)
                self._take(rule, found)
        if lost or unseen or twice:
            self._by_backwards(lost + twice, unseen)
        return self._to_parameters()

    def _totals(self, work: list[_Live]) -> dict[int, Tensor]:
        """Where hooks were registered: autograd's own gradients of what stands for the values, by id."""
        given = list({id(x): x for item in work for x in rules._given(item.entry) if not x.is_complex()}.values())
        if not given or self.trained or self.watched._create_graph:
            return {}
        found = self._backward_to(given, self.root.gradient)
        return {id(x): g.to_dense() if g.is_sparse else g for x, g in zip(given, found, strict=True) if g is not None}

    def _compare(self, item: _Live, shares: list[Share], totals: dict[int, Tensor]) -> None:
        """Refuse what a hook on a node has made of a gradient in a way that cannot be seen."""
        by_value = {id(value): totals.get(i) for i, value in item.entry.values.items()}
        for share in shares:
            total = by_value.get(id(share.value))
            if total is None or share.rows is not None:
                continue
            gradient = share.gradient
            own = gradient.sum() if isinstance(gradient, GradFactors) else gradient.sum(0)
            difference = (own.reshape(total.shape).to(total.dtype) - total).abs().max() if total.numel() else 0
            if difference > torch.finfo(total.dtype).eps ** 0.5 * (total.abs().max() + own.abs().max()):
                raise CaptureError(
                    f"{item.names(self.mode)}: a hook on a node of the graph changes the gradient of {item} in a way that "
                    "cannot be followed; register hooks on tensors, or leave the parameter out with exclude="
                )

    def _refuse_hidden(self, structure: Structure) -> None:
        seen = {self.ids[i] for i in structure.leaves if i in self.ids}
        # A checkpoint of what needs no gradient leaves no node, though it may need one where all parameters are chosen.
        hidden = {
            name: function
            for name, function in self.mode.hidden.items()
            if name not in seen and (f"{function}Backward" in structure.kinds or function == "CheckpointFunction")
        }
        reentrant = "CheckpointFunctionBackward" in structure.kinds or "CheckpointFunction" in hidden.values()
        if not hidden and not reentrant:
            return
        if reentrant:
            hidden = hidden or {"what they hold": "CheckpointFunction"}
            advice = (
                "these are reentrant checkpoints: pass use_reentrant=False to torch.utils.checkpoint "
                "(gradient_checkpointing_kwargs={'use_reentrant': False} in transformers)"
            )
        else:
            advice = "pass the parameters to the function as arguments, or leave them out with exclude="
        raise CaptureError(
            f"{_listed(hidden)}: used inside {', '.join(sorted(set(hidden.values())))}, a custom autograd function that hides its "
            f"graph, so that the gradient cannot be found; {advice}"
        )

    def _structure(self) -> Structure:
        checked = not row_rules.capturing(self.root.gradient)
        found = row_rules.read_structure(self.root.edge, self.batch, self.mode.ends, checked)
        if not all(row_rules.verdicts(found.checks)):
            found = row_rules.read_structure(self.root.edge, self.batch, self.mode.ends, checked=False)
        return found

    def _segments(self, work: list[_Live]) -> None:
        segments = self.watched._segments
        if segments is None:
            return
        if len(segments) and not (int(segments.min()) >= 0 and int(segments.max()) < self.batch):
            raise ValueError(
                f"segments: expected samples in 0..{self.batch - 1}, as there are {self.batch} losses, but they span "
                f"{int(segments.min())}..{int(segments.max())}"
            )
        for item in work:
            for k, output in enumerate(item.outputs):
                dims = [d for d, size in enumerate(output.shape) if size == len(segments)]
                if dims and not isinstance(item.states[k], Rows):
                    rows = Rows(dims[0], owners=segments.to(output.device).long())
                    item.states[k] = Unproved("segments", rows)

    def _deltas(self, work: list[_Live], unseen: list[str]) -> None:
        edges = [edge for item in work for edge in item.edges]
        if not edges:
            return
        if self.trained:
            found = [self.mode.captured.get((edge.node, edge.output_nr)) for edge in edges]
        else:
            keep = self.watched._retain or bool(unseen) or self._must_prove() or self.watched._create_graph
            keep = keep or not all(
                rules.bind(item.entry) is not None and all(isinstance(s, Rows) for s in item.states) for item in work
            )
            keep = keep or bool(self.mode.differentiated)
            found = self._backward(edges, self.root.gradient, keep, create_graph=self.watched._create_graph)
        position = 0
        for item in work:
            part = found[position : position + len(item.edges)]
            position += len(item.edges)
            if self.exposed:
                part = [None if delta is None else delta.clone() for delta in part]
            item.deltas = [
                o.new_zeros(o.shape) if delta is None else _seen_from(o, delta)
                for o, delta in zip(item.outputs, part, strict=True)
            ]

    def _backward(self, edges, gradient: Tensor, retain: bool, create_graph: bool = False) -> list[Tensor | None]:
        """The gradients at edges; a checkpointed forward that runs again meets the same stand-ins."""
        mode = self.mode
        mode.replay = True
        try:
            with _after_hooks(edges if self.watched._hooked else []) as hooked, mode:
                found = torch.autograd.grad(
                    (self.root.edge,), edges, (gradient,), retain, create_graph, allow_unused=True
                )
        finally:
            mode.replay = False
        return [hooked.get(k, delta) for k, delta in enumerate(found)]

    def _must_prove(self) -> bool:
        return self.watched._hooked and self.batch > 1

    def _proved(self, work: list[_Live], dtypes: set[torch.dtype]) -> list[_Live]:
        """Settle which rows are whose. Returns the entries of which this cannot be told."""
        if self.batch <= 1:
            for item in work:
                item.rows = [Rows(0, 1, o.shape[0] if o.ndim else 1) for o in item.outputs]
            return []
        doubtful = [
            item for item in work if self._must_prove() or any(isinstance(state, Unproved) for state in item.states)
        ]
        lost = [item for item in work if any(isinstance(state, Shared) for state in item.states)]
        doubtful = [item for item in doubtful if item not in lost]
        for item in work:
            if item not in lost and item not in doubtful:
                item.rows = list(item.states)
        if doubtful and row_rules.capturing(self.root.gradient):
            raise CaptureError(
                f"{doubtful[0]}: the graph does not tell which rows are whose (at {doubtful[0].reason()}), and the proof "
                "waits for the device, which a CUDA graph cannot record; call batch_layer_grads itself, or leave the "
                "parameter out with exclude="
            )
        if doubtful and self.trained:
            raise CaptureError(
                f"{doubtful[0]}: the graph does not tell which rows are whose (at {doubtful[0].reason()}), which takes a "
                "second backward to prove; call watch.factors(losses) before the training step's backward"
            )
        if doubtful:
            lost += self._by_weights(doubtful, dtypes)
        if lost and self.trained:
            raise CaptureError(
                f"{lost[0]}: its gradient takes one backward a sample; call watch.factors(losses) before the training "
                "step's backward"
            )
        return lost

    def _undo_weights(self, work: list[_Live]) -> None:
        """From the deltas of weighted losses those of each sample's own loss; in place where nobody else holds them."""
        assert self.weights is not None
        scale, done = self.weights.reciprocal(), set()
        holders: dict[int, int] = {}
        for t in {
            id(t): t for t in (*self.mode.captured.values(), *(d for item in work for d in item.deltas))
        }.values():
            holders[memory(t)] = holders.get(memory(t), 0) + 1
        for item in work:
            for k, (delta, rows) in enumerate(zip(item.deltas, item.rows, strict=True)):
                place = memory(delta), delta.storage_offset(), delta.numel()
                if place in done:
                    continue
                own = scale.to(delta.dtype)
                if self.batch > 1:
                    own = own[rows.owners_of(delta.shape[rows.dim], self.batch, delta.device)]
                    own = own.reshape(-1, *[1] * (delta.ndim - rows.dim - 1))
                storage = delta.untyped_storage()
                if torch._C._storage_Use_Count(storage._cdata) > holders[memory(delta)] + 1 or 0 in delta.stride():
                    item.deltas[k] = delta * own
                else:
                    delta.mul_(own)
                    done.add(place)

    def _by_weights(self, doubtful: list[_Live], dtypes: set[torch.dtype]) -> list[_Live]:
        """Prove the rows by a second backward, from losses of other weights. Returns those without a proof."""
        gradient = self.root.gradient.detach()
        edges = [edge for item in doubtful for edge in item.edges]

        def weighted(weights: row_rules.Weights) -> list[list[Tensor]]:
            found = self._backward(edges, gradient * weights.values.view(-1, *[1] * (gradient.ndim - 1)), True)
            parts, position = [], 0
            for item in doubtful:
                part = found[position : position + len(item.edges)]
                position += len(item.edges)
                parts.append(
                    [
                        o.new_zeros(o.shape) if p is None else _seen_from(o, p)
                        for o, p in zip(item.outputs, part, strict=True)
                    ]
                )
            return parts

        possible = [
            [
                row_rules.candidates(o.shape, self.batch, s if isinstance(s, Rows) else getattr(s, "hint", None))
                for o, s in zip(item.outputs, item.states, strict=True)
            ]
            for item in doubtful
        ]
        trials = [row_rules.proof_weights(self.batch, gradient, dtypes)]
        left = self._settle(doubtful, possible, [weighted(w) for w in trials], trials)
        if left and self.watched._hooked:
            # A hook may change gradients in proportion to nothing (clip them): then by losses that count or do not.
            index = torch.arange(self.batch, device=gradient.device)
            bits = range((self.batch - 1).bit_length())
            trials = [row_rules.Weights((index >> bit & 1).to(gradient.dtype), trials[0].tolerance) for bit in bits]
            left = self._settle(doubtful, possible, [weighted(w) for w in trials], trials)
        return left

    def _settle(self, doubtful, possible, parts, trials) -> list[_Live]:
        flags = [
            functools.reduce(
                torch.logical_and,
                [
                    row_rules.weighs(delta.detach(), part[j][k].detach(), rows, weights)
                    for part, weights in zip(parts, trials, strict=True)
                ],
            )
            for j, item in enumerate(doubtful)
            for k, delta in enumerate(item.deltas)
            for rows in possible[j][k]
        ]
        told = iter(row_rules.verdicts(flags))
        left = []
        for j, item in enumerate(doubtful):
            found = []
            for k in range(len(item.deltas)):
                right = [rows for rows in possible[j][k] if next(told)]
                found.append(right[0] if right else None)
            if all(rows is not None for rows in found):
                item.rows = found
            else:
                left.append(item)
        return left

    # --- one backward a sample ----------------------------------------------------------------------------------------

    def _by_backwards(self, lost: list[_Live], unseen: list[str]) -> None:
        """∂ losses[b] of the same graph, one backward a sample, to what the rules cannot do."""
        if self.trained:
            raise CaptureError(
                f"{', '.join(unseen)}: used where gradext cannot see it (a custom autograd function, scripted code), so "
                "that its gradient takes one backward a sample; call watch.factors(losses) before the training step's "
                "backward"
            )
        reasons = [(item.names(self.mode), item.reason()) for item in lost] + [(name, None) for name in unseen]
        if self.watched._fallback == "error":
            raise UnsupportedLayerError("; ".join(_explained(names, reason) for names, reason in reasons) + _ADVICE)
        given = [x for item in lost for x in rules._given(item.entry)]
        leaves = [self.selection.chosen[name] for name in unseen]
        judged = [item for item in lost if self.watched._mixing == "error" and item.holds_samples(self.batch)]
        gradients = self._each_sample(given + leaves, [edge for item in judged for edge in item.edges], judged)
        self._refuse_one_for_all(unseen, gradients[len(given) :])
        position = 0
        for item in lost:
            mine = rules._given(item.entry)
            found = [Share(item.entry.values[id(x)], gradients[position + k]) for k, x in enumerate(mine)]
            position += len(mine)
            self._take("backward a sample", found)
        self._take(
            "backward a sample",
            [Share(leaf, g) for leaf, g in zip(leaves, gradients[len(given) :], strict=True)],
        )
        if self.watched._mixing == "error" or unseen:
            shown = [_explained(names, reason) for names, reason in reasons[:3]]
            more = f"; and {len(reasons) - 3} more uses" if len(reasons) > 3 else ""
            warnings.warn(
                f"{'; '.join(shown)}{more}. What cannot be told takes one backward a sample ({self.batch} here): exact, and "
                "slow",
                stacklevel=_user_level(),
            )

    def _each_sample(self, inputs: list[Tensor], edges: list[GradientEdge], judged: list[_Live]) -> list[Tensor]:
        """The gradients [B, *x.shape] of each loss by ``inputs``; refuses samples that mix at ``edges``."""
        gradient, batch = self.root.gradient.detach(), self.batch
        found = [x.new_zeros(batch, *x.shape) for x in inputs]
        hits: list[Tensor | None] = [None] * len(edges)
        for b in range(batch):
            own = torch.zeros_like(gradient)
            own[b] = gradient[b]
            row = self._backward_to([*inputs, *edges], own)
            for k, g in enumerate(row[: len(inputs)]):
                if g is not None:
                    found[k][b] = g.to_dense() if g.is_sparse else g
            for k, g in enumerate(row[len(inputs) :]):
                if g is not None:
                    hit = (g != 0).to(torch.int32)
                    hits[k] = hit if hits[k] is None else hits[k] + hit
        position = 0
        for item in judged:
            for _ in item.edges:
                hit = hits[position]
                position += 1
                if hit is not None and hit.numel() and int(hit.max()) > 1:
                    self._refuse_mixing(item)
        return found

    def _backward_to(self, inputs, gradient: Tensor) -> list[Tensor | None]:
        self.mode.replay = True
        try:
            with self.mode:
                return list(
                    torch.autograd.grad((self.root.edge,), inputs, (gradient,), retain_graph=True, allow_unused=True)
                )
        finally:
            self.mode.replay = False

    def _refuse_mixing(self, item: _Live) -> None:
        raise CaptureError(
            f"{item.names(self.mode)}: samples mix: at {item} the loss of a sample depends on rows of others (at "
            f"{self._culprit(item)}), so that per-sample gradients in the sense of privacy or attribution do not exist; "
            "detach what the samples share, see that the samples lie where each layer expects them (batch_first), tell "
            'ragged rows by segments=, or pass mixing="allow" for ∂ losses[b] as it stands'
        )

    def _culprit(self, item: _Live) -> str:
        reason = item.reason()
        if "BatchNorm" in reason or reason == "batch_norm":
            found = [
                f"{name or 'the model'} ({type(module).__name__})"
                for name, module in self.watched._model.named_modules()
                if isinstance(module, nn.modules.batchnorm._BatchNorm)
                and (module.training or module.running_mean is None)
            ]
            if found:
                return f"{', '.join(found[:4])}, which normalises with the statistics of the batch: call model.eval()"
        return reason

    def _refuse_one_for_all(self, unseen: list[str], gradients: list[Tensor]) -> None:
        """Refuse a custom function of the losses that gives one sample the gradient of all."""
        node = None if self.root.edge is None else self.root.edge.node
        if (
            node is None
            or self.batch < 2
            or not unseen
            or not isinstance(node, torch.autograd.function.BackwardCFunction)
        ):
            return
        for name, gradient in zip(unseen, gradients, strict=True):
            silent = (gradient.flatten(1) == 0).all(1)
            if silent.any() and not silent.all():
                raise CaptureError(
                    f"{name}: {node.name().removesuffix('Backward')} gives some samples no gradient at all: its backward "
                    "takes one number of the losses' gradient for all samples; write the losses by torch's own functions"
                )

    # --- from values to parameters ------------------------------------------------------------------------------------

    def _take(self, rule: str, shares: Sequence[Share]) -> None:
        for share in shares:
            value = self.mode.values[id(share.value)]
            for name in value.names:
                self.rules.setdefault(name, []).append(rule)
            if share.rows is not None and value.maker is not None and self.batch > 1:
                maker = value.maker
                if len(maker.outputs) == 1:
                    _, found = rules.shares(
                        maker, [share.gradient], [share.rows], self.batch, self.watched._create_graph
                    )
                    self._take(rule, found)
                    continue
            gradient = share.gradient
            if share.rows is not None:
                gradient = row_rules.own_rows(gradient, share.rows, self.batch) if self.batch > 1 else gradient[None]
            self.shares.setdefault(id(share.value), []).append(Share(share.value, gradient))

    def _to_parameters(self) -> dict[str, GradFactors | Tensor]:
        parts: dict[str, list[GradFactors | Tensor]] = {}
        for found in self.shares.values():
            value = found[0].value
            gradient = _sum([share.gradient for share in found])
            value, gradient = self._carried(value, gradient)
            if id(value) in self.ids:
                parts.setdefault(self.ids[id(value)], []).append(gradient)
                continue
            names = sorted(self.mode.values[id(value)].names)
            leaves = [self.selection.chosen[name] for name in names]
            written = self._written(value, gradient)
            again = self._rebuilt(value) if self.trained else value  # whose graph the training step has freed
            back = rules.batched_grad((again,), leaves, (written,), self.watched._create_graph)
            for name, leaf_gradient in zip(names, back, strict=True):
                if leaf_gradient is not None:
                    parts.setdefault(name, []).append(leaf_gradient)
        result: dict[str, GradFactors | Tensor] = {}
        for name in [*parts, *(name for name in self.selection.chosen if name not in parts)]:
            parameter = self.selection.chosen[name]
            if name in parts:
                result[name] = self._hooked_gradient(parameter, _sum(parts[name]))
                self.coverage.rules[name] = " + ".join(dict.fromkeys(self.rules.get(name, ["general"])))
            else:
                result[name] = parameter.new_zeros(self.batch, *parameter.shape, requires_grad=False)
                self.coverage.rules[name] = "unused"
        return result

    def _hooked_gradient(self, parameter: Tensor, gradient: GradFactors | Tensor) -> GradFactors | Tensor:
        """What the user's hooks on the parameter make of each sample's gradient."""
        hooks = parameter._backward_hooks
        if not hooks:
            return gradient
        written = gradient if isinstance(gradient, Tensor) else gradient.materialize()
        samples = []
        for own in written:
            for hook in list(hooks.values()):
                changed = hook(own)
                own = own if changed is None else changed
            samples.append(own)
        return torch.stack(samples) if samples else written

    def _written(self, value: Tensor, gradient: GradFactors | Tensor) -> Tensor:
        written = gradient if isinstance(gradient, Tensor) else gradient.materialize()
        return written.reshape(self.batch, *value.shape).to(value.dtype)

    def _rebuilt(self, value: Tensor) -> Tensor:
        """A value made once more by the same calls."""
        if id(value) in self.ids:
            return value
        known = self.mode.values.get(id(value))
        maker = None if known is None else known.maker
        if maker is None:
            if known is None or not known.names:
                return value.detach()
            raise CaptureError(
                f"{', '.join(sorted(known.names))}: a value of it was changed in place, so that its gradient cannot be "
                "carried back after the training step's backward; call watch.factors(losses) before it"
            )
        again = {i: self._rebuilt(source) for i, source in maker.values.items()}
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: again.get(id(t), t), (maker.args, maker.kwargs))
        result = maker.func(*args, **kwargs)
        results = self.mode._with_gradient(result)
        return results[next(k for k, made in enumerate(maker.outputs) if made is value)]

    def _carried(self, value: Tensor, gradient: GradFactors | Tensor) -> tuple[Tensor, GradFactors | Tensor]:
        """Gradients follow a value back through transposes, slices, casts, reshapes and look-ups, as far as these go."""
        while id(value) not in self.ids:
            maker = self.mode.values[id(value)].maker
            if maker is None or len(maker.values) > 1:
                break
            (source,) = maker.values.values()
            moved = None
            if isinstance(gradient, GradFactors) and maker.args and maker.args[0] is source:
                moved = _moved(maker, value, source, gradient)
            if moved is None and not self.watched._create_graph:
                call = rules.bind(maker)
                if call is not None and call.rule == "embedding" and source.ndim == 2:
                    index = call.input.expand(self.batch, *call.input.shape)
                    moved = call.gradient("weight", index, self._written(value, gradient))
            if moved is None:
                break
            value, gradient = source, moved
        return value, gradient


def _moved(maker: Entry, value: Tensor, source: Tensor, gradient: GradFactors) -> GradFactors | None:
    """The factors for ``source`` of which ``maker`` made ``value``; None where they have no such form."""
    name, func, shape = maker.name, maker.func, tuple(source.shape)
    if name in _CASTS and value.shape == source.shape:
        return gradient
    if gradient.weight_shape is None and tuple(gradient.shape[1:]) != tuple(value.shape):
        return None
    dims: list[int] | None = None
    if name in ("t", "T", "mT", "adjoint", "H") or func in _TRANSPOSED:
        dims = [-2, -1] if source.ndim >= 2 else []
        if source.ndim > 2 and func not in (Tensor.mT.__get__, Tensor.adjoint):
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


_TRANSPOSED = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__}


@dataclass(eq=False)
class _Live:
    """An entry that the losses depend on, by those of its outputs that they depend on."""

    entry: Entry
    outputs: list[Tensor]
    edges: list[GradientEdge]
    states: list
    deltas: list[Tensor]
    rows: list[Rows]

    @staticmethod
    def of(entry: Entry, structure: Structure) -> _Live:
        states = [structure.of(edge) for edge in entry.edges]
        kept = [k for k, state in enumerate(states) if state is not None]
        if len(kept) < len(states):  # what the losses do not depend on has no gradient
            parts = {name: [getattr(entry, name)[k] for k in kept] for name in ("outputs", "ends")}
            entry = Entry(**{**vars(entry), **parts})
        outputs = list(entry.outputs)
        found = []
        for k, output in zip(kept, outputs, strict=True):
            found.append(_rows_from(output, states[k], structure.batch))
        return _Live(entry, outputs, [entry.edges[k] for k in kept], found, [], [])

    def names(self, mode: _Mode) -> str:
        return _listed({name for value in self.entry.values.values() for name in mode.values[id(value)].names})

    def reason(self) -> str:
        for state in self.states:
            if isinstance(state, Unproved) and state.reason:
                return state.reason
        return "a sum over samples" if any(isinstance(s, Shared) for s in self.states) else self.entry.name

    def holds_samples(self, batch: int) -> bool:
        """Whether something with rows of samples is among its arguments, not only constants."""
        tensors = [t for t in _tensors_of([self.entry.args, self.entry.kwargs]) if id(t) not in self.entry.values]
        return any(t.requires_grad or any(size and size % batch == 0 for size in t.shape) for t in tensors)

    def __str__(self) -> str:
        return self.entry.name


_ADVICE = "; leave it out with exclude=, use torch's own functions, or pass fallback=None for one backward a sample"


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _explained(names: str, reason: str | None) -> str:
    if reason is None:
        return f"{names} is used where gradext cannot see it (a custom autograd function, scripted or compiled code)"
    return f"{names}: which rows are whose cannot be told (at {reason})"


def _user_level() -> int:
    """The stack level of the first frame outside of the package, for warnings."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("gradext"):
        frame, level = frame.f_back, level + 1
    return level


def _sum(parts: list[GradFactors | Tensor]) -> GradFactors | Tensor:
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return functools.reduce(torch.add, parts)
    return GradFactors.add([GradFactors.of(p) if isinstance(p, Tensor) else p for p in parts])


@contextlib.contextmanager
def _after_hooks(edges: Sequence[GradientEdge]):
    """The gradients at edges as hooks on them leave them; torch's engine captures some of them before."""
    found: dict[int, Tensor] = {}
    handles = [
        edge.node.register_prehook(lambda grads, k=k, n=edge.output_nr: found.update({k: grads[n]}))
        for k, edge in enumerate(edges)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
