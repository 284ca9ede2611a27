"""One forward and a partial backward: the ``(input, output delta)`` of every use of every chosen weight.

The only file that touches autograd. Uses are caught at the call, not at the module: a `TorchFunctionMode` sees every
torch function that is handed a chosen parameter, from wherever it is called, and knows the parameter by identity. So
reuse, tied weights and functional calls come out right, and nothing is left on the model.

The graph is no larger than it must be. Parameters are replaced, at each call that takes them, by detached aliases,
so that no weight gradient is part of the graph and the model itself (its ``requires_grad`` flags too) is never
written to. The first use of a chosen weight whose input needs no gradient is where the graph begins: the alias handed
to that one call requires grad, which makes its output a non-leaf without a copy, and nothing before it is
differentiated. One `torch.autograd.grad` from the per-sample losses to the recorded outputs gives every delta.

What the mode cannot see (compiled code, a weight's view made beforehand) still shows in the graph: no path may lead
from the losses to a chosen parameter other than through its alias. Only for a frozen parameter is there no such trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from . import layers as rules
from .errors import CaptureError, UnsupportedLayerError
from .losses import Root

# Functions whose result is the same weight in another form: transposed, or of another type or layout.
_TRANSPOSES = {Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__}
_SWAPS = {Tensor.transpose, torch.transpose}
_CASTS = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.contiguous}
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


class Use(NamedTuple):
    """One call with a chosen weight. ``delta`` is the gradient of Σ_b loss_b with respect to the call's output."""

    weight: str | None  # the parameter's name, None where only the bias was chosen
    bias: str | None
    rule: type
    input: Tensor  # [B, ..., I]
    delta: Tensor  # [B, ..., O]
    swapped: bool  # the weight was used transposed: y = x W, so that the roles of input and delta are exchanged


class _Record(NamedTuple):
    weight: str | None
    bias: str | None
    rule: type
    input: Tensor
    input_version: int
    output: Tensor
    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    swapped: bool


@dataclass(eq=False)
class _Known:
    """A parameter of the model, or another form of a chosen one."""

    tensor: Tensor  # held, so that no other tensor gets its id
    name: str | None  # of the chosen parameter; None for the others
    turned: bool = False  # the form is the parameter's transpose
    alias: Tensor | None = None  # what functions get in its place


class _Capture(TorchFunctionMode):
    def __init__(self, parameters: dict[str, Tensor], chosen: Iterable[str], keep_graph: bool):
        super().__init__()
        self.keep_graph = keep_graph  # leave the parameters in the graph, for derivatives of the deltas
        self.known = {id(p): _Known(p, name if name in chosen else None) for name, p in parameters.items()}
        self.records: list[_Record] = []
        self.unruled: dict[str, str] = {}  # parameter name -> the function that used it without a rule

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _CONSTANTS or not torch.is_grad_enabled():  # where the model turned gradients off no use counts
            return func(*args, **kwargs)
        rule = rules.FUNCTIONS.get(func)
        if rule is not None:
            bound = rule.bind(func, args, kwargs)
            if bound is not None:
                weight, bias = self.known.get(id(bound.weight)), self.known.get(id(bound.bias))
                chosen = (weight is not None and weight.name) or (bias is not None and bias.name)
                if chosen and id(bound.input) not in self.known:
                    return self._record(func, rule, bound, weight, bias)
        elif func is F.batch_norm:
            _refuse_batch_statistics(*args, **kwargs)
        elif func in _DERIVATIVES and kwargs.get("create_graph") and self.records:
            raise UnsupportedLayerError(
                "the model's forward differentiates with create_graph=True after a chosen layer, so that the loss "
                "depends on its weight through a backward pass, for which there is no exact rule; choose only layers "
                "that run later"
            )
        used: list[_Known] = []
        new_args, new_kwargs = self._replace(args, used), self._replace_values(kwargs, used)
        if not used:
            return func(*new_args, **new_kwargs)
        turns = _turns(func, args)
        if turns is not None and args[0] is used[0].tensor:
            result = func(*new_args, **new_kwargs)
            self.known[id(result)] = _Known(result, used[0].name, used[0].turned != turns, result)
            return result
        if all(entry.name in self.unruled for entry in used):
            return func(*new_args, **new_kwargs)
        # A chosen parameter in a function without a rule. Autograd itself says whether it counts: zeros_like() and
        # the like give results that do not depend on it differentiably.
        names = [entry.name for entry in used]
        result = func(*self._replace(args, used, probe=True), **self._replace_values(kwargs, used, probe=True))
        if _requires_grad(result):
            self.unruled |= dict.fromkeys(names, getattr(func, "__qualname__", None) or str(func))
        return result

    def _replace(self, values, used: list[_Known], probe: bool = False):
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
                if entry.name is not None:
                    used.append(entry)
                    new = new.detach().requires_grad_() if probe and not new.requires_grad else new
            if new is not value:
                changed = list(values) if changed is None else changed
                changed[k] = new
        return values if changed is None else type(values)(changed)

    def _replace_values(self, kwargs: dict, used: list[_Known], probe: bool = False) -> dict:
        return dict(zip(kwargs, self._replace(list(kwargs.values()), used, probe), strict=True)) if kwargs else kwargs

    def _alias(self, entry: _Known) -> Tensor:
        if entry.alias is None:
            parameter = entry.tensor
            keep = self.keep_graph and parameter.requires_grad
            entry.alias = parameter.view_as(parameter) if keep else parameter.detach()
        return entry.alias

    def _record(self, func, rule, bound: rules.Bound, known_weight: _Known | None, known_bias: _Known | None):
        if _inside_transform():
            raise UnsupportedLayerError(
                "a chosen layer runs inside a torch.func transform or forward-mode differentiation, which hides its "
                "input and delta; call the model without the transform, or leave this layer out with layers="
            )
        weight = bound.weight if known_weight is None else self._alias(known_weight)
        bias = bound.bias if known_bias is None else self._alias(known_bias)
        arguments = (weight,) if bias is None else (weight, bias)
        if not _requires_grad((bound.input, *arguments)):  # here the graph begins
            arguments = (weight.detach().requires_grad_(), *arguments[1:])
        output = func(bound.input, *arguments)
        # An in-place activation on a view rewrites the history of the view, but not that of its base.
        source = output if output._base is None else output._base
        if source.numel() != output.numel():
            source = output
        self.records.append(
            _Record(
                weight=None if known_weight is None else known_weight.name,
                bias=None if known_bias is None else known_bias.name,
                rule=rule,
                input=bound.input if self.keep_graph else bound.input.detach(),
                input_version=bound.input._version,
                output=output,
                edge=get_gradient_edge(source),
                shape=output.shape,
                dtype=output.dtype,
                # y = x Wᵀ with W itself is the plain form.
                swapped=(known_weight is not None and known_weight.turned) == bound.transposed,
            )
        )
        return output


def _turns(func, args) -> bool | None:
    """Whether func transposes the matrix args[0]; None if its result is no plain form of it."""
    if func in _CASTS:
        return False
    if func in _TRANSPOSES or (func in _SWAPS and len(args) == 3 and {d % 2 for d in args[1:]} == {0, 1}):
        return args[0].ndim == 2 or None
    return None


def _requires_grad(value) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(_requires_grad(v) for v in value)


def _inside_transform() -> bool:
    # Torch has no public way to ask; both names are the same in every version that the package supports.
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def capture(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    objective: Callable[[object], Root],
    candidates: dict[str, nn.Module],
    modules: dict[str, nn.Module],
    parameters: dict[str, nn.Parameter],
    *,
    pick: str | None = None,
    include_bias: bool = False,
    watch_objective: bool = True,
    check_samples: bool = False,
    create_graph: bool = False,
) -> list[Use]:
    """Run ``model(*args, **kwargs)`` and return every use of the candidates' weights, in order of execution.

    ``objective`` maps the model's output to where the backward of the per-sample losses begins; ``modules`` and
    ``parameters`` are the model's, by name; ``pick`` keeps only the first or last weight executed;
    ``watch_objective=False`` promises that the objective uses no parameter. Raises CaptureError where the result could
    be wrong: samples that mix, a layer that never ran, an input overwritten after use; UnsupportedLayerError for a use
    without a rule.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners: dict[str, str] = {}  # chosen parameter -> layer
    for layer, module in candidates.items():
        for parameter in (module.weight, module.bias if include_bias else None):
            if parameter is not None:
                owners.setdefault(names[id(parameter)], layer)

    mode = _Capture(parameters, owners, create_graph)
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_restored_buffers(modules))
        stack.enter_context(_autocast_uncached())
        args, kwargs = as_constant(args), as_constant(kwargs)
        with mode:
            output = model(*args, **kwargs)
        with mode if watch_objective else contextlib.nullcontext():
            root = objective(output)
        _refuse_unseen(mode, root, owners)
        records = _select(mode.records, pick)
        _verify(mode, records, owners, pick, batch=root.gradient.shape[0])
        if not records:
            return []
        mode.records, mode.unruled = [], {}
        deltas = _deltas(mode, root, records, check_samples, create_graph)
    return [
        Use(
            record.weight,
            record.bias,
            record.rule,
            record.input.to(record.dtype),  # as the layer itself saw it under autocast
            delta,
            record.swapped,
        )
        for record, delta in zip(records, deltas, strict=True)
    ]


def _deltas(
    mode: _Capture, root: Root, records: list[_Record], check_samples: bool, create_graph: bool
) -> list[Tensor]:
    """The gradient of the summed losses with respect to every recorded output."""
    batch = root.gradient.shape[0]
    # With as many positions as samples their order could be exchanged, and the shapes would not tell.
    exchangeable = any(batch in record.shape[1:-1] for record in records) and not _becomes_a_graph(root.gradient)
    check_samples = batch > 1 and (check_samples or exchangeable)
    if root.edge is None:  # the losses do not depend on the chosen layers at all
        return [record.input.new_zeros(record.shape, dtype=record.dtype) for record in records]

    edges = [record.edge for record in records]
    if edges == [root.edge] and not (check_samples or create_graph or records[0].output._backward_hooks):
        return [root.gradient]  # the backward begins where it would end

    def backward(gradient: Tensor, **options) -> list[Tensor]:
        # The backward of a checkpointed module runs its forward again, which has to meet the same aliases. Given
        # edges only, torch.autograd.grad stays below the mode, which then sees what the backward itself calls.
        with mode:
            found = torch.autograd.grad((root.edge,), edges, (gradient,), allow_unused=True, **options)
        # A layer's output that the loss does not depend on has delta zero, as in torch.func.
        return [
            r.input.new_zeros(r.shape, dtype=r.dtype) if delta is None else delta.reshape(r.shape)
            for r, delta in zip(records, found, strict=True)
        ]

    deltas = backward(root.gradient, retain_graph=check_samples or create_graph, create_graph=create_graph)
    if check_samples:
        half = (
            torch.randperm(batch, generator=torch.Generator().manual_seed(batch)).to(root.gradient.device) < batch // 2
        )
        rows = half.to(root.gradient.dtype).view(-1, *[1] * (root.gradient.ndim - 1))
        for record, whole, part in zip(records, deltas, backward(root.gradient * rows), strict=True):
            # The losses of one half must have all of the deltas of that half, and none of the other's.
            difference = part - whole.detach() * half.view(-1, *[1] * (part.ndim - 1))
            bound = torch.finfo(part.dtype).eps ** 0.5 * whole.detach().abs().amax() if part.numel() else 0
            if (difference.abs() > bound).any() or (part[~half] != 0).any():
                raise CaptureError(
                    f"{record.weight or record.bias}: the loss of a sample depends on other rows of the layer's input "
                    f"{tuple(record.shape[:-1])} than its own, so that samples mix or the batch is not the first "
                    "dimension; see that the layer's input is [B, ..., I] in the order of the losses"
                )
    return deltas


def _becomes_a_graph(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which cannot wait for a check; the calls that warm up for it have."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _select(records: list[_Record], pick: str | None) -> list[_Record]:
    if pick is None:
        return records
    weights = [record.weight for record in records if record.weight is not None]
    if not weights:
        return []
    name = weights[0] if pick == "first" else weights[-1]
    biases = {record.bias for record in records if record.weight == name}
    # Another layer may share the bias alone.
    kept = (
        record._replace(
            weight=record.weight if record.weight == name else None,
            bias=record.bias if record.bias in biases else None,
        )
        for record in records
    )
    return [record for record in kept if record.weight or record.bias]


def _refuse_unseen(mode: _Capture, root: Root, owners: dict[str, str]) -> None:
    """Walk the graph for chosen parameters that it reaches by another way than their aliases."""
    seen = {known.alias.grad_fn for known in mode.known.values() if mode.keep_graph and known.alias is not None}
    seen.add(None)
    stack = [] if root.edge is None else [root.edge.node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += [child for child, _ in node.next_functions]
        leaf = mode.known.get(id(getattr(node, "variable", None)))
        if leaf is not None and leaf.name is not None:
            raise UnsupportedLayerError(
                f"{leaf.name} is used where gradext cannot see it (a custom autograd function, compiled or scripted "
                "code, a view made before the call), so that its per-sample gradient would be wrong; leave the layer "
                f"{owners[leaf.name]!r} out with layers="
            )


def _verify(mode: _Capture, records: list[_Record], owners: dict[str, str], pick: str | None, batch: int) -> None:
    seen = {record.weight for record in records} | {record.bias for record in records}
    for name, func in mode.unruled.items():
        if pick is None or name in seen:
            raise UnsupportedLayerError(
                f"{name} is used by {func}, for which there is no exact rule, so its per-sample gradient would be "
                "wrong; leave this layer out with layers=, or call the layer through nn.Linear or F.linear"
            )
    for name, layer in owners.items():
        if (pick is None and name not in seen) or not records:
            raise CaptureError(
                f"layer {layer!r} ({name}) never ran with gradients enabled during the model's forward; choose the "
                "layers that do run with layers=, and see that no torch.no_grad() or compiled code hides the call"
            )
    for record in records:
        name = record.weight or record.bias
        if record.input.ndim < 2 or record.input.shape[0] != batch:
            raise CaptureError(
                f"{name}: expected an input of shape [B, ..., I] with B = {batch} samples first, but the layer saw "
                f"{tuple(record.input.shape)}; per-sample gradients need the batch as the layer's first dimension"
            )
        if record.input._version != record.input_version:
            raise CaptureError(
                f"{name}: the layer's input was modified in place after the layer had used it, so that its gradient "
                "can no longer be computed; make that operation out of place"
            )


def _refuse_batch_statistics(input, mean, var, weight=None, bias=None, training=False, *args, **kwargs) -> None:
    if training:
        raise CaptureError(_MIXING.format("F.batch_norm with training=True"))


def as_constant(value):
    """Model inputs that need no gradient and may be used in a graph, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value.detach() if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(as_constant(v) for v in value)
    return {key: as_constant(v) for key, v in value.items()} if type(value) is dict else value


@contextlib.contextmanager
def _restored_buffers(modules: dict[str, nn.Module]):
    """Buffers that a forward in training mode updates (power iterations, running statistics) are put back."""
    kept = []
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise CaptureError(_MIXING.format(f"{name or 'the model'} ({type(module).__name__})"))
        if module.training and module._buffers:
            kept += [(b, b._version, b.clone()) for b in module._buffers.values() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in kept:
                if buffer._version != version:
                    buffer.copy_(value)


@contextlib.contextmanager
def _autocast_uncached():
    """Autocast caches the cast of every leaf that requires grad until its context ends: for aliases, a leak."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
