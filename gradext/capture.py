"""One forward and a partial backward: the ``(input, output delta)`` of every use of every chosen weight.

The only file that touches autograd. Uses are caught at the call, not at the module: a `TorchFunctionMode` sees every
torch function that is handed a chosen parameter, from wherever it is called, and knows the parameter by identity. So
reuse, tied weights and functional calls come out right, and nothing is left on the model.

The graph is no larger than it must be. Parameters are replaced, at each call that takes them, by detached aliases,
so that no weight gradient is part of the graph and the model itself is left as it was. The first use of a chosen weight
whose input needs no gradient is where the graph begins: the alias handed to that one call requires grad, which makes
its output a non-leaf without a copy, and nothing before it is differentiated. One `torch.autograd.grad` from the
per-sample losses to the recorded outputs gives every delta.

What the mode cannot see (custom autograd functions, scripted code, a weight's view made beforehand) still shows in the
graph: no path may lead from the losses to a chosen parameter other than through its alias. Frozen parameters require
grad during the forwards for that purpose alone.

Which rows of a use are which sample's is read from the shapes, and proved by a second backward, from losses of
different weights: always where the shapes leave a choice, else once for each model and arrangement of shapes.

All that watching costs several times what a small model does. Where the graph of a first call is one that `reading`
understands, later calls of the model run it as it is, and read the uses off what autograd has recorded.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import closed_form, reading
from . import layers as rules
from .borrowing import Afterwards, Loans, function_modes, torch_state
from .errors import CaptureError, UnsupportedLayerError
from .factors import GradFactors
from .layers import Chosen
from .losses import Root
from .uses import Form, Use, memory, names_of, select, without

# Functions whose result is the same weight in another form: transposed, or of another type or layout.
_TRANSPOSES = {Tensor.t, torch.t, *(getattr(Tensor, name).__get__ for name in ("T", "mT"))}
_SWAPS = {Tensor.transpose, torch.transpose}
_CASTS = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.contiguous}
_ROWS = {Tensor.split, torch.split, Tensor.chunk, torch.chunk}
# Functions of torch's, written in Python, that call other functions with parameters.
_COMPOSED = {F.multi_head_attention_forward}
# Functions whose result never depends on a parameter differentiably, passed on at once as they are the most frequent,
# and assignments, which are meant for the parameter itself.
_CONSTANTS = {
    *(getattr(Tensor, name).__get__ for name in ("data", "device", "dtype", "grad", "is_cuda", "is_leaf", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_nested", "ndim", "requires_grad", "shape")),
    *(Tensor.__len__, Tensor.detach, Tensor.dim, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.numel),
    *(Tensor.size, Tensor.stride, torch.is_floating_point, torch.is_tensor, torch.numel),
    *(getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")),
}
_DERIVATIVES = {torch.autograd.grad, Tensor.backward}
_MIXING = (
    "{} normalises with the statistics of the batch, so that the samples mix and per-sample gradients do not exist; "
    "call model.eval(), or use GroupNorm"
)
# Of each model, by training or not: what its modules were, and for each loss the arrangements of uses whose rows have
# been proved to be the samples'.
_proved = WeakIdKeyDictionary()
# Of each model, by (training or not, pick, names of the chosen parameters), whether its graph has been found readable.
_readable = WeakIdKeyDictionary()
# Reading keeps what comes before the chosen layers in the graph too, which the watched forward does not; up to so many
# elements of input that is a matter of megabytes.
READ_ELEMENTS = 1 << 18


class _Record(NamedTuple):
    forms: dict[str, Form]
    gradient: Callable[[str, Tensor, Tensor], GradFactors | Tensor]
    input: Tensor
    input_version: int
    rows: int  # leading dimensions that hold the samples and their positions
    time_major: int | None  # the batch size, where it is known to be [T, B, ...], or [T·B, ...]
    output: Tensor
    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype

    def __str__(self) -> str:
        return " and ".join(sorted(names_of(self)))


@dataclass(eq=False)
class _Known:
    """A parameter of the model, or another form of a chosen one."""

    tensor: Tensor  # held, so that no other tensor gets its id
    form: Form | None  # of the chosen parameter; None for the others
    alias: Tensor | None = None  # what functions get in its place


class _HiddenError(UnsupportedLayerError):
    """What chosen parameters meet cannot be seen at all, so that the forward has to be run without them."""

    def __init__(self, names: set[str], message: str):
        super().__init__(message)
        self.names = names


class _Capture(TorchFunctionMode):
    def __init__(self, parameters: Mapping[str, Tensor], chosen: Collection[str], keep_graph: bool):
        super().__init__()
        self.keep_graph = keep_graph  # leave the parameters in the graph, for derivatives of the deltas
        self.known = {
            id(p): _Known(p, Form(name, p.shape) if name in chosen else None) for name, p in parameters.items()
        }
        self.records: list[_Record] = []
        self.unruled: dict[str, str] = {}  # parameter name -> the function that used it without a rule
        self.hooked = False  # whether some tensor got a hook
        self.opaque = 0  # depth of layers with a rule of their user's own, inside which nothing is recorded
        self.time_major: int | None = None  # the batch size inside a function that works on [T, B, ...]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.register_hook:
            self.hooked = True
        if func in _CONSTANTS or not torch.is_grad_enabled():  # where the model turned gradients off no use counts
            return func(*args, **kwargs)
        if func in _COMPOSED:
            return self._look_inside(func, args, kwargs)
        rule = rules.FUNCTIONS.get(func)
        if rule is not None and not self.opaque:
            call = rule.bind(func, args, kwargs)
            if call is not None and id(call.input) not in self.known and _is_ordinary(call.input):
                known = {role: self.known.get(id(parameter)) for role, parameter in call.parameters.items()}
                if any(entry is not None and entry.form for entry in known.values()):
                    return self._record_call(call, known)
        if func is F.batch_norm:
            _refuse_batch_statistics(*args, **kwargs)
        elif func in _DERIVATIVES and kwargs.get("create_graph") and self.records:
            raise _HiddenError(
                {name for record in self.records for name in names_of(record)},
                "the model's forward differentiates with create_graph=True after a chosen layer, so that the loss "
                "depends on its weight through a backward pass, for which there is no exact rule; choose only layers "
                'that run later, or pass fallback="loop"',
            )
        used: list[tuple[Tensor, Form]] = []  # chosen parameters among the arguments
        new_args, new_kwargs = self._replace(args, used), self._replace_values(kwargs, used)
        if not used:
            return func(*new_args, **new_kwargs)
        if args and args[0] is used[0][0]:
            forms = _forms(func, args, kwargs, used[0][1])
            if forms is not None:
                result = func(*new_args, **new_kwargs)
                for part, form in zip(result if isinstance(result, (tuple, list)) else [result], forms, strict=True):
                    if part.is_floating_point() or part.is_complex():  # integers have no derivative
                        self.known[id(part)] = _Known(part, form, part)
                return result
        if all(form.name in self.unruled for _, form in used) and not self.opaque:
            return func(*new_args, **new_kwargs)
        # A chosen parameter in a function without a rule. Autograd itself says whether it counts: zeros_like() and
        # the like give results that do not depend on it differentiably.
        names = [form.name for _, form in used]
        try:
            result = func(*self._replace(args, used, probe=True), **self._replace_values(kwargs, used, probe=True))
            counts = _requires_grad(result)
        except RuntimeError:  # in-place functions take no leaf that requires grad, and change another form of a weight
            result, counts = func(*new_args, **new_kwargs), True
        if counts and not self.opaque:
            self.unruled |= dict.fromkeys(names, getattr(func, "__qualname__", None) or str(func))
        return result

    def _look_inside(self, func, args, kwargs):
        """Run a function of torch's that is written in Python so that the calls it makes are seen one by one."""
        former = self.time_major
        query = args[0] if args else kwargs["query"]
        self.time_major = query.shape[1] if query.ndim == 3 else 1
        # Its own first step would ask the modes, this one among them, to take over the whole of it again.
        names = {**func.__globals__, "has_torch_function": lambda arguments: False}
        inside = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        inside.__kwdefaults__ = func.__kwdefaults__
        end = Afterwards(function_modes())
        try:
            with end, end:
                self.__enter__()
                return inside(*args, **kwargs)
        finally:
            self.time_major = former

    def _replace(self, values, used: list[tuple[Tensor, Form]], probe: bool = False):
        """Aliases in place of parameters, in lists and tuples too; appends the chosen ones to ``used``.

        With ``probe`` the chosen ones require grad.
        """
        changed = None
        for k, value in enumerate(values):
            if type(value) in (list, tuple):
                new = self._replace(value, used, probe)
            else:
                entry = self.known.get(id(value))
                if entry is None:
                    continue
                new = self._alias(entry)
                if entry.form is not None:
                    used.append((entry.tensor, entry.form))
                    new = new.detach().requires_grad_() if probe and not new.requires_grad else new
            if new is not value:
                changed = list(values) if changed is None else changed
                changed[k] = new
        return values if changed is None else type(values)(changed)

    def _replace_values(self, kwargs: dict, used: list[tuple[Tensor, Form]], probe: bool = False) -> dict:
        return dict(zip(kwargs, self._replace(list(kwargs.values()), used, probe), strict=True)) if kwargs else kwargs

    def _alias(self, entry: _Known) -> Tensor:
        if entry.alias is None:
            parameter = entry.tensor
            keep = self.keep_graph and parameter.requires_grad
            entry.alias = parameter.view_as(parameter) if keep else parameter.detach()
        return entry.alias

    def _record_call(self, call: rules.Call, known: dict[str, _Known | None]) -> Tensor:
        forms = {role: entry.form for role, entry in known.items() if entry is not None and entry.form}
        if _inside_transform():
            raise _HiddenError(
                {form.name for form in forms.values()},
                "a chosen layer runs inside a torch.func transform or forward-mode differentiation, which hides its "
                "input and delta; call the model without the transform, leave this layer out with layers=, or pass "
                'fallback="vmap"',
            )
        arguments = {
            role: parameter if (entry := known[role]) is None else self._alias(entry)
            for role, parameter in call.parameters.items()
        }
        if not _requires_grad((call.input, *arguments.values())):  # here the graph begins
            role = next(iter(arguments))
            arguments[role] = arguments[role].detach().requires_grad_()
        output = call.run(**arguments)
        self.record(forms, call.gradient, call.input, call.input._version, output, call.rows)
        return output

    def record(self, forms: dict[str, Form], gradient, input: Tensor, version: int, output: Tensor, rows: int) -> None:
        # An in-place activation on a view rewrites the history of the view, but not that of its base.
        source = output if output._base is None else output._base
        if source.numel() != output.numel():
            source = output
        self.records.append(
            _Record(
                forms=forms,
                gradient=gradient,
                input=input if self.keep_graph else input.detach(),
                input_version=version,
                rows=rows,
                time_major=self.time_major,
                output=output,
                edge=get_gradient_edge(source),
                shape=output.shape,
                dtype=output.dtype,
            )
        )


def _forms(func, args, kwargs, form: Form) -> list[Form] | None:
    """What ``func`` makes of a parameter's form args[0]: plain forms again, or None if they are not."""
    if func in _CASTS:
        return [form]
    if func in _TRANSPOSES or (func in _SWAPS and len(args) == 3 and {d % 2 for d in args[1:]} == {0, 1}):
        return [form._replace(turned=not form.turned)] if args[0].ndim == 2 else None
    if func is Tensor.__getitem__ and not form.turned and type(args[1]) is slice:
        start, stop, step = args[1].indices(args[0].shape[0])
        return [form._replace(start=form.start + start, rows=max(0, stop - start))] if step == 1 else None
    if func in _ROWS and not form.turned:
        start, forms = form.start, []
        for part in func(args[0].detach(), *args[1:], **kwargs):
            if part.shape[1:] != args[0].shape[1:]:  # split along another dimension
                return None
            forms.append(form._replace(start=start, rows=part.shape[0]))
            start += part.shape[0]
        return forms
    return None


def _is_ordinary(input: Tensor) -> bool:
    """Whether the rules' products, of dense real numbers, hold for it."""
    return input.layout is torch.strided and not (input.is_complex() or input.is_nested)


def _requires_grad(value) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(_requires_grad(v) for v in value)


def _inside_transform() -> bool:
    # Torch has no public way to ask; both names are the same in every version that the package supports.
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


class Captured(NamedTuple):
    """What one forward and partial backward gave."""

    uses: list[Use]  # in order of execution
    missing: dict[str, CaptureError]  # chosen parameters without exact factors, and why
    batch: int


def capture(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    objective: Callable[[object], Root],
    chosen: Chosen,
    *,
    loss: object = None,
    named_loss: tuple[str, Tensor] | None = None,
    check_samples: bool = False,
    create_graph: bool = False,
) -> Captured:
    """Run ``model(*args, **kwargs)`` and find every use of the chosen parameters.

    ``objective`` maps the model's output to where the backward of the per-sample losses begins; ``loss`` tells one that
    does otherwise from it; ``named_loss`` are the loss and the target of an objective that is one of `losses`' own and
    uses no parameter. A parameter that is used in a way for which there is no rule, that never ran, or whose input was
    overwritten, is missing in the result. Raises CaptureError where samples mix. An interrupt can leave torch's state
    changed: the caller puts it back.
    """
    untouched = Untouched((*args, *kwargs.values()))
    if not (check_samples or create_graph) and _is_undisturbed(chosen):
        forms = {id(chosen.parameters[name]): Form(name, chosen.parameters[name].shape) for name in chosen.owners}
        if named_loss is not None and type(model) is nn.Sequential and len(args) == 1 and not kwargs:
            uses = closed_form.uses(model, as_constant(args[0]), *named_loss, forms, chosen)
            if uses:
                return Captured(uses, {}, len(args[0]))
        if _may_be_read(model, (*args, *kwargs.values()), chosen):
            captured = _read(model, args, kwargs, objective, forms, chosen)
            if captured is not None:
                return captured
            untouched.check()
    hidden: dict[str, CaptureError] = {}
    while True:
        try:
            captured = _captured(
                model, args, kwargs, objective, chosen.without(hidden), loss, named_loss, check_samples, create_graph
            )
            return captured._replace(missing=captured.missing | hidden)
        except _HiddenError as error:
            if error.names <= hidden.keys():
                raise
            hidden |= dict.fromkeys(error.names, error)
            untouched.check()


def _captured(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    objective: Callable[[object], Root],
    chosen: Chosen,
    loss: object,
    named_loss: tuple[str, Tensor] | None,
    check_samples: bool,
    create_graph: bool,
) -> Captured:
    owners, pick = chosen.owners, chosen.pick
    mode = _Capture(chosen.parameters, owners, create_graph)
    loans, shared, state = Loans(), _SHARED_ROWS.get(), torch_state()
    contexts = contextlib.ExitStack()

    def put_back() -> None:
        contexts.close()
        state()
        _SHARED_ROWS.set(shared)
        loans.put_back()

    def watched() -> Captured:
        if torch.is_inference_mode_enabled():
            contexts.enter_context(torch.inference_mode(False))
        torch._C._set_grad_enabled(True)
        # It keeps the cast of every leaf that requires grad until its context ends: for aliases, a leak.
        torch.set_autocast_cache_enabled(False)
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            contexts.enter_context(torch.compiler.set_stance("force_eager"))
        _SHARED_ROWS.set(None)  # a call inside the model has rows of its own
        changing = _changing({"": model, **chosen.modules})
        loans.keep(changing)
        lent = {memory(b) for module in changing for b in module._buffers.values() if b is not None}
        output = _forward(mode, model, as_constant(args), as_constant(kwargs), chosen)
        modes = Afterwards(function_modes())
        with modes, modes:
            if named_loss is None:
                mode.__enter__()
            root = objective(output)
        batch = root.gradient.shape[0]
        nodes, unseen = _walk(mode, root)
        records = select(_reached(mode.records, nodes, pick), pick, owners)
        missing = _missing(mode, unseen, records, owners, pick)
        mode.records, mode.unruled = [], {}
        records = without(records, missing)
        for record in records:
            if not _layouts(record, batch):
                missing |= dict.fromkeys(names_of(record), _no_batch(record, batch))
        records = without(records, missing)
        proved = _proved_so_far(model, chosen, loss)
        uses = _uses(mode, root, nodes, records, shared, check_samples, create_graph, proved) if records else []
        if records and batch and root.edge and not (missing or create_graph):
            known = all(isinstance(layer, reading.LAYERS) for layer in chosen.layers.values())
            ends = [record.edge.node for record in records]
            # A use that the losses do not depend on is not in the graph: reading would have to give up, and what the
            # forward of its try has drawn would be gone.
            readable = known and nodes.issuperset(ends) and reading.is_readable(root.edge.node, ends, batch)
            _readable.setdefault(model, {}).setdefault(_kind(model, chosen), readable)
        # What is put back below may have been a layer's input.
        uses = [use._replace(input=use.input.clone()) if lent and memory(use.input) in lent else use for use in uses]
        return Captured(uses, missing, batch)

    end = Afterwards(put_back)
    with end, end:
        return watched()


def _forward(mode: _Capture, model: nn.Module, args: tuple, kwargs: dict, chosen: Chosen):
    """The watched forward, for whose time frozen parameters require grad: a use that the mode misses leaves a trace."""
    loans, modes = Loans(), function_modes()
    hooks: list[tuple[nn.Module, Callable]] = []

    def put_back() -> None:
        modes()
        loans.put_back()
        for module, hook in hooks:
            _unhook(module, hook)

    end = Afterwards(put_back)
    with end, end:
        loans.thaw(_leaves(chosen))
        _watch_registered_layers(mode, chosen.layers, hooks)
        mode.__enter__()
        return model(*args, **kwargs)


def _is_undisturbed(chosen: Chosen) -> bool:
    """Whether functions of torch's do what they say, now and with these parameters."""
    return (
        chosen.ordinary
        and torch._C._len_torch_function_stack() == 0
        and not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
        and _SHARED_ROWS.get() is None
        and not _inside_transform()
    )


def _may_be_read(model: nn.Module, inputs: tuple, chosen: Chosen) -> bool:
    """Whether a call of the model can do without being watched, as far as that is known before it."""
    if not _readable.get(model, {}).get(_kind(model, chosen)):
        return False
    for module in (model, *chosen.modules.values()):
        if module.training and module._buffers:
            return False
    elements = sum(value.numel() for value in inputs if isinstance(value, Tensor))
    return elements <= READ_ELEMENTS or not any(parameter.requires_grad for parameter in chosen.others)


def _kind(model: nn.Module, chosen: Chosen) -> tuple:
    return (model.training, chosen.pick, *chosen.owners)


def _read(model, args, kwargs, objective, forms: dict[int, Form], chosen: Chosen) -> Captured | None:
    """As `_captured`, from the graph of an unwatched forward; None where that cannot be read after all."""
    handles = RemovableHandle.next_id
    loans = Loans()
    end = Afterwards(loans.put_back)
    with end, end, torch.enable_grad():
        loans.thaw(_leaves(chosen))
        root = objective(model(*as_constant(args), **as_constant(kwargs)))
    hooked = RemovableHandle.next_id != handles  # a hook was registered on the way
    batch = root.gradient.shape[0]
    uses = None
    if batch > 0 and root.edge is not None and root.edge.output_nr == 0:
        uses = reading.read(root.edge.node, forms, batch)
    if not uses or (chosen.pick is None and len(forms) > len({name for use in uses for name in names_of(use)})):
        if batch:  # else nothing is said of other batches
            # The model does something else than it did, and may have come to mix samples.
            _readable[model][_kind(model, chosen)] = False
            _proved.pop(model, None)
        return None
    uses = select(uses, chosen.pick, chosen.owners)
    edges = [use.edge for use in uses]
    if edges == [root.edge] and not hooked:
        deltas: Sequence[Tensor] = [root.gradient]  # the backward begins where it would end
    else:
        # Nothing that ran later lies below the first use: the backward ends there, and is captured after its hooks.
        with _after_hooks({k: edge for k, edge in enumerate(edges) if k and hooked}) as found:
            deltas = torch.autograd.grad((root.edge,), edges, (root.gradient,))
        deltas = [found.get(k, delta) for k, delta in enumerate(deltas)]
    found = [Use(use.forms, use.gradient, use.input, delta) for use, delta in zip(uses, deltas, strict=True)]
    return Captured(found, {}, batch)


# --- which rows are whose --------------------------------------------------------------------------------------------

Layout = Callable[[Tensor], Tensor]  # to [B·n, ...], sample by sample


class SampleRows:
    """Which rows are whose, as a first call has proved; later ones of the same shapes take it from there unproved.

    A CUDA graph cannot wait for a proof.
    """

    def __init__(self) -> None:
        self.layouts: list[Layout] | None = None

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        token = _SHARED_ROWS.set(self)
        try:
            yield
        finally:
            _SHARED_ROWS.reset(token)


_SHARED_ROWS: ContextVar[SampleRows | None] = ContextVar("gradext_sample_rows", default=None)


def _batch_first(x: Tensor) -> Tensor:
    return x


def _batch_second(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _layouts(record: _Record, batch: int) -> list[Layout]:
    """The ways in which the leading dimensions of a call can hold the samples, the usual one first."""

    def flat_time_major(x: Tensor) -> Tensor:  # [T·B, ...]
        return x.unflatten(0, (-1, batch)).transpose(0, 1).flatten(0, 1)

    if record.rows < 1:
        return []
    first, second = record.shape[0], record.shape[1] if record.rows > 1 else None
    flat = first != batch and batch > 0 and first > 0 and first % batch == 0
    if record.time_major is not None:
        if record.time_major != batch:
            return []
        return [_batch_second] if second == batch else [flat_time_major] if flat else [_batch_first]
    if batch == 1:
        return [_batch_first] if first > 0 else []
    found: list[Layout] = [_batch_first] if first == batch else []
    found += [_batch_second] if second == batch else []
    found += [_batch_first, flat_time_major] if flat else []  # [B·T, ...] or [T·B, ...]
    return found


def _ambiguous(record: _Record, layouts: list[Layout], batch: int) -> bool:
    if record.time_major is not None:
        return record.shape[0] == batch**2 or (record.rows > 1 and record.shape[0] == batch)
    return len(layouts) > 1 or record.shape[0] != batch or batch in record.shape[1 : record.rows]


def _arrangement(record: _Record, batch: int) -> tuple:
    """What a use has in common with those in other calls whose rows lie in the same way."""
    return (*sorted(names_of(record)), record.time_major is None, *(n == batch for n in record.shape[: record.rows]))


def _no_batch(record: _Record, batch: int) -> CaptureError:
    return CaptureError(
        f"{record}: expected an input of shape [B, ..., I] with B = {batch} samples, but the layer saw "
        f"{tuple(record.input.shape)}; per-sample gradients need the batch among the layer's leading dimensions; "
        'leave this layer out with layers=, or pass fallback="vmap"'
    )


def _proved_so_far(model: nn.Module, chosen: Chosen, loss: object) -> set[tuple]:
    """The arrangements proved of the model as it is; other layers, modes, hooks and losses may come to mix samples."""
    modules = (model, *chosen.modules.values())
    kinds = [(type(m), m.training, *m._forward_pre_hooks, *m._forward_hooks) for m in modules]
    former, proved = _proved.setdefault(model, {}).get(model.training, (None, {}))
    if former != kinds:
        _proved[model][model.training] = kinds, (proved := {})
    return proved.setdefault(loss, set())


def _uses(
    mode: _Capture,
    root: Root,
    nodes: set[Node | None],
    records: list[_Record],
    shared: SampleRows | None,
    check_samples: bool,
    create_graph: bool,
    proved: set[tuple],
) -> list[Use]:
    """The inputs and the deltas, the gradients of the summed losses with respect to every recorded output.

    ``nodes`` are those of the graph; ``proved`` holds the arrangements of uses that were found to be right in earlier
    calls, and new ones are added.
    """
    batch = root.gradient.shape[0]
    known = None if shared is None else shared.layouts
    layouts = [_layouts(record, batch) for record in records] if known is None else [[layout] for layout in known]
    edges = [record.edge for record in records]
    arrangements = [_arrangement(record, batch) if record.edge.node in nodes else None for record in records]
    # What the losses do not depend on has no gradient to get wrong.
    unproved = {arrangement for arrangement in arrangements if arrangement is not None} - proved
    ends = edges == [root.edge] and not create_graph and not mode.hooked
    roots = () if root.edge is None else (root.edge,)
    # Another order than the usual one has to be proved, and where there are as many positions as samples, any order:
    # theirs could be exchanged, and the shapes would not tell. The usual one can be a coincidence too (an embedding of
    # as many positions, a loop over the samples, a permutation), which one proof for each arrangement rules out.
    check_samples = (batch > 1 and known is None) and (
        check_samples
        or any(_ambiguous(record, layout, batch) for record, layout in zip(records, layouts, strict=True))
        or (bool(unproved) and not ends and not _is_capturing(root.gradient))
    )

    def backward(gradient: Tensor, **options) -> list[Tensor]:
        # The backward of a checkpointed module runs its forward again, which has to meet the same aliases. Given
        # edges only, torch.autograd.grad stays below the mode, which then sees what the backward itself calls.
        end = Afterwards(function_modes())
        with end, end, _after_hooks(dict(enumerate(edges)) if mode.hooked else {}) as hooked:
            mode.__enter__()
            found = torch.autograd.grad(roots, edges, (gradient,), allow_unused=True, **options)
        # A layer's output that the loss does not depend on has delta zero, as in torch.func.
        return [
            r.output.new_zeros(r.shape, dtype=r.dtype) if delta is None else hooked.get(k, delta).reshape(r.shape)
            for k, (r, delta) in enumerate(zip(records, found, strict=True))
        ]

    if not roots:  # the losses do not depend on the chosen layers at all
        deltas = [record.output.new_zeros(record.shape, dtype=record.dtype) for record in records]
    elif ends and not check_samples:
        deltas = [root.gradient]  # the backward begins where it would end
    else:
        deltas = backward(root.gradient, retain_graph=check_samples or create_graph, create_graph=create_graph)
        if check_samples:
            layouts = _proved_layouts(records, layouts, [delta.detach() for delta in deltas], root.gradient, backward)
            proved |= {
                arrangement
                for arrangement, delta in zip(arrangements, deltas, strict=True)
                if arrangement is not None and arrangement in unproved and (delta.abs() > 0).any()
            }
    if shared is not None:
        shared.layouts = [layout[0] for layout in layouts]
    return [
        Use(record.forms, record.gradient, layout[0](record.input), layout[0](delta))
        for record, layout, delta in zip(records, layouts, deltas, strict=True)
    ]


@contextlib.contextmanager
def _after_hooks(edges: dict[int, GradientEdge]):
    """The gradients at edges as hooks on them leave them; torch's engine captures some of them before.

    Yields a dict with the edges' keys that a backward fills; those where it ends are captured after their hooks.
    """
    found: dict[int, Tensor] = {}
    handles = [
        edge.node.register_prehook(lambda grads, k=k, n=edge.output_nr: found.update({k: grads[n]}))
        for k, edge in edges.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being made, in which values cannot be looked at."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _proved_layouts(
    records: list[_Record], layouts: list[list[Layout]], deltas: list[Tensor], gradient: Tensor, backward
) -> list[list[Layout]]:
    """For each record the layouts by which a sample's deltas, and no others, weigh what its loss weighs."""
    batch = gradient.shape[0]
    # All different for up to eight samples, and in no order that a model might have.
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch), device="cpu")
    levels = (order % 8).to(gradient.device)
    # One backward from losses that weigh nothing, or a power of two, by which even rounding errors are multiplied
    # exactly; or, where a hook changes gradients in proportion to nothing (clips them), one for each bit of the level.
    for ways in [torch.where(levels == 0, 0, 0.5**levels)], [levels >> bit & 1 for bit in range(3)]:
        weights = [weight.to(gradient.dtype) for weight in ways]
        parts = [
            backward(gradient.detach() * weight.view(-1, *[1] * (gradient.ndim - 1)), retain_graph=True)
            for weight in weights
        ]
        found = [
            [
                layout
                for layout in possible
                if all(_weighs(layout, delta, part[k], weight) for part, weight in zip(parts, weights, strict=True))
            ]
            for k, (possible, delta) in enumerate(zip(layouts, deltas, strict=True))
        ]
        if all(found):
            return found
    record = records[found.index([])]
    raise CaptureError(
        f"{record}: the loss of a sample depends on other rows of the layer's input {tuple(record.input.shape)} than "
        "its own, so that samples mix or the batch is not where it was looked for; see that the layer's input is "
        'of shape [B, ..., I] in the order of the losses, or pass fallback="vmap" where samples do not mix'
    )


def _weighs(layout: Layout, delta: Tensor, part: Tensor, weights: Tensor) -> bool:
    """Whether each sample's rows of ``part`` are those of ``delta`` times its weight; NaN tells nothing.

    (A sample's own NaN reaches the rows of others as zero times NaN.)
    """
    ordered, ordered_part = layout(delta), layout(part)
    weight = weights.repeat_interleave(max(1, ordered.shape[0] // weights.shape[0])).to(ordered.dtype)
    difference = ordered_part - ordered * weight.view(-1, *[1] * (ordered.ndim - 1))
    scale = delta.abs().nan_to_num(0, 0).amax() if part.numel() else 0
    wrong = difference.abs() > torch.finfo(part.dtype).eps ** 0.5 * scale
    return not (wrong.any() or (ordered_part[weight == 0].abs() > 0).any())


# --- what was found, and what was not --------------------------------------------------------------------------------


def _missing(
    mode: _Capture, unseen: Iterable[str], records: list[_Record], owners: dict[str, str], pick: str | None
) -> dict[str, CaptureError]:
    """The chosen parameters of which some use is not in the records as it should be, and what to say of it."""
    found: dict[str, CaptureError] = {}
    seen = {name for record in records for name in names_of(record)}
    for name, func in mode.unruled.items():
        if pick is None or name in seen:
            found[name] = UnsupportedLayerError(
                f"{name} is used by {func}, for which there is no exact rule, so its per-sample gradient would be "
                "wrong; leave this layer out with layers=, call the layer through its module or its torch function, or "
                'pass fallback="vmap"'
            )
    for name in unseen:
        if pick is None or name in seen:
            found[name] = UnsupportedLayerError(
                f"{name} is used where gradext cannot see it (a custom autograd function, compiled or scripted code, a "
                "view made before the call), so that its per-sample gradient would be wrong; leave the layer "
                f'{owners[name]!r} out with layers=, or pass fallback="vmap"'
            )
    for name, layer in owners.items():
        if name not in found and ((pick is None and name not in seen) or not records):
            found[name] = CaptureError(
                f"layer {layer!r} ({name}) never ran with gradients enabled during the model's forward; choose the "
                "layers that do run with layers=, and see that no torch.no_grad() or compiled code hides the call"
            )
    for record in records:
        if record.input._version != record.input_version:
            found |= dict.fromkeys(
                names_of(record),
                CaptureError(
                    f"{record}: the layer's input was modified in place after the layer had used it, so that its "
                    "gradient can no longer be computed; make that operation out of place"
                ),
            )
    return found


def _walk(mode: _Capture, root: Root) -> tuple[set[Node | None], list[str]]:
    """The graph's nodes, and the chosen parameters that it reaches by another way than their aliases."""
    seen = {known.alias.grad_fn for known in mode.known.values() if mode.keep_graph and known.alias is not None}
    unseen: list[str] = []
    stack: list[Node | None] = [] if root.edge is None else [root.edge.node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [child for child, _ in node.next_functions]
        leaf = mode.known.get(id(getattr(node, "variable", None)))
        if leaf is not None and leaf.form is not None:
            unseen.append(leaf.form.name)
    return seen, unseen


def _reached(records: list[_Record], nodes: set[Node | None], pick: str | None) -> list[_Record]:
    """Without the uses that the losses do not depend on, where others of the same parameters, or to pick from, are."""
    found = [record for record in records if record.edge.node in nodes]
    if pick is not None:
        return found or records
    names = {name for record in found for name in names_of(record)}
    return [record for record in records if record.edge.node in nodes or not names_of(record) <= names]


def _watch_registered_layers(mode: _Capture, layers: dict[str, nn.Module], hooks: list[tuple]) -> None:
    """Record the layers that have a rule of their user's own as wholes, by (module, hook), which are appended."""
    thread = threading.get_ident()
    versions: list[list[int]] = []  # of the inputs of the layers that are running

    def watched(layer, module, rule, include):
        def before(module, args, kwargs):
            if threading.get_ident() == thread and torch.is_grad_enabled():
                mode.opaque += 1
                versions.append([value._version for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])

        def after(module, args, kwargs, output):
            if threading.get_ident() != thread or not torch.is_grad_enabled():
                return
            mode.opaque -= 1
            version = versions.pop()
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if mode.opaque or not inputs or output is None:  # None where the forward has failed
                return
            if not isinstance(output, Tensor) or not output.requires_grad:
                raise CaptureError(
                    f"layer {layer!r} ({type(module).__name__}): expected one tensor that depends on its parameters "
                    f"from a layer with a rule of its own, but it returned {type(output).__name__}"
                )
            found: dict[int, dict] = {}

            def gradient(role, input, delta):
                gradients = found.get(id(delta))
                if gradients is None:
                    gradients = found[id(delta)] = rule(module, input, delta)
                return _checked_gradient(layer, module, role, gradients, delta.shape[0])

            mode.record(include, gradient, inputs[0], version[0], output, 1)

        hooks.extend(((module, before), (module, after)))
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True, always_call=True)

    for layer, module in layers.items():
        rule = rules.registered(module)
        if rule is not None:
            own = {role: mode.known[id(p)].form for role, p in module.named_parameters()}
            watched(layer, module, rule, {role: form for role, form in own.items() if form is not None})


def _unhook(module: nn.Module, hook: Callable) -> None:
    """By the hook itself, since an interrupt can come before its handle is returned."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, value in hooks.items() if value is hook]:
            module._forward_hooks_always_called.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            del hooks[key]


def _checked_gradient(layer: str, module: nn.Module, role: str, gradients, rows: int) -> GradFactors | Tensor:
    gradient = gradients.get(role) if isinstance(gradients, dict) else None
    shape = (rows, *dict(module.named_parameters())[role].shape)
    came = None
    if isinstance(gradient, GradFactors):
        form = gradient.weight_shape or gradient.shape[1:]
        came = (len(gradient), *form)
    elif isinstance(gradient, Tensor):
        came = tuple(gradient.shape)
    if came != shape or gradient is None:
        raise ValueError(
            f"layer {layer!r}: expected the rule registered for {type(module).__name__} to give the gradient of "
            f"{role!r} as a tensor or GradFactors of shape {shape}, but got {came or type(gradients).__name__}"
        )
    return gradient


def _refuse_batch_statistics(input, mean, var, weight=None, bias=None, training=False, *args, **kwargs) -> None:
    if training:
        raise CaptureError(_MIXING.format("F.batch_norm with training=True"))


class Untouched:
    """Whether a model has left its inputs as they were."""

    def __init__(self, inputs: Iterable[object]) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor) and not value.is_inference()]
        self.versions = [(tensor, tensor._version) for tensor in tensors]

    def check(self, instead: str = "") -> None:
        """Raise CaptureError where they are needed again, and are other numbers now."""
        if any(tensor._version != version for tensor, version in self.versions):
            raise CaptureError(
                "x: the model overwrites its input in place, which is needed once more as it was; make that operation "
                f"out of place{instead and ', or '}{instead}"
            )


def as_constant(value):
    """Model inputs that need no gradient and may be used in a graph, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value.detach() if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(as_constant(v) for v in value)
    return {key: as_constant(v) for key, v in value.items()} if type(value) is dict else value


def _changing(modules: dict[str, nn.Module]) -> list[nn.Module]:
    """Those whose buffers a forward in training mode may update: power iterations, running statistics."""
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise CaptureError(_MIXING.format(f"{name or 'the model'} ({type(module).__name__})"))
    return [module for module in modules.values() if module.training and module._buffers]


def _leaves(chosen: Chosen) -> list[Tensor]:
    return [chosen.parameters[name] for name in chosen.owners]
