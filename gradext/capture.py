"""One forward and a partial backward: the ``(input, output delta)`` of every use of every chosen weight.

The only file that touches autograd. Uses are caught at the call, not at the module: a `TorchFunctionMode` sees every
torch function that is handed a chosen parameter, from wherever it is called, and knows the parameter by identity. So
reuse, tied weights and functional calls come out right, and nothing is left on the model.

The graph is no larger than it must be. Parameters are replaced, at each call that takes them, by detached aliases,
so that no weight gradient is part of the graph and the model itself (its ``requires_grad`` flags too) is never
written to. The first use of a chosen weight whose input needs no gradient is where the graph begins: the alias handed
to that one call requires grad, which makes its output a non-leaf without a copy, and nothing before it is
differentiated. One `torch.autograd.grad` from the summed per-sample losses to the recorded outputs gives every delta.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from . import layers as rules
from .errors import CaptureError, UnsupportedLayerError

# Functions whose result is the same weight in another form: transposed, or of another type or layout.
_TRANSPOSES = {Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__}
_SWAPS = {Tensor.transpose, torch.transpose}
_CASTS = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.contiguous}


@dataclass(frozen=True)
class Use:
    """One call with a chosen weight. ``delta`` is the gradient of Σ_b loss_b with respect to the call's output."""

    weight: str | None  # the parameter's name, None where only the bias was chosen
    bias: str | None
    rule: type
    input: Tensor  # [B, ..., I]
    delta: Tensor  # [B, ..., O]
    swapped: bool  # the weight was used transposed: y = x W, so that the roles of input and delta are exchanged


@dataclass(frozen=True)
class _Record:
    weight: str | None
    bias: str | None
    rule: type
    input: Tensor
    input_version: int
    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    swapped: bool


class _Capture(TorchFunctionMode):
    def __init__(self, targets: dict[int, str], keep_graph: bool):
        super().__init__()
        self.targets = targets  # id of a chosen parameter -> its name
        self.keep_graph = keep_graph  # leave the parameters in the graph, for derivatives of the deltas
        self.records: list[_Record] = []
        self.unruled: dict[str, str] = {}  # parameter name -> the function that used it without a rule
        self._aliases: dict[int, tuple[Tensor, Tensor]] = {}  # id(parameter) -> (parameter, detached)
        self._forms: dict[int, tuple[Tensor, Tensor, bool]] = {}  # id(form) -> (form, parameter, transposed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # the model turned gradients off: no use counts
            return func(*args, **kwargs)
        rule = rules.FUNCTIONS.get(func)
        if rule is not None:
            bound = rule.bind(func, args, kwargs)
            if bound is not None:
                weight, turned = self._parameter(bound.weight)
                weight_name = self.targets.get(id(weight))
                bias_name = self.targets.get(id(bound.bias))
                if (weight_name or bias_name) and not self._is_chosen(bound.input):
                    swapped = turned == bound.transposed  # y = x Wᵀ with W itself is the plain form
                    return self._record(func, rule, bound, weight_name, bias_name, swapped)
        used: list[str] = []
        new_args = self._replace(args, used)
        new_kwargs = {key: self._replace((value,), used)[0] for key, value in kwargs.items()} if kwargs else kwargs
        if not used:
            return func(*new_args, **new_kwargs)
        turns = _turns(func, args, kwargs)
        if turns is not None and self._is_chosen(args[0]):
            parameter, turned = self._parameter(args[0])
            result = func(*new_args, **new_kwargs)
            self._forms[id(result)] = (result, parameter, turned != turns)
            return result
        # A chosen parameter in a function without a rule. Autograd itself says whether it counts: detach(),
        # zeros_like() and the like give results that do not depend on it differentiably.
        probed = [name for name in used if name not in self.unruled]
        if probed:
            result = func(
                *self._replace(args, used, probe=True),
                **{key: self._replace((value,), used, probe=True)[0] for key, value in kwargs.items()},
            )
            if _requires_grad(result):
                for name in probed:
                    self.unruled[name] = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
            return result
        return func(*new_args, **new_kwargs)

    def _is_chosen(self, tensor) -> bool:
        return id(self._parameter(tensor)[0]) in self.targets

    def _parameter(self, tensor) -> tuple[Tensor, bool]:
        """The parameter behind a tensor, and whether the tensor is its transpose."""
        entry = self._forms.get(id(tensor))
        return (tensor, False) if entry is None else entry[1:]

    def _alias(self, parameter: Tensor) -> Tensor:
        if self.keep_graph:
            return parameter
        entry = self._aliases.get(id(parameter))
        if entry is None:
            entry = self._aliases[id(parameter)] = (parameter, parameter.detach())
        return entry[1]

    def _replace(self, values, used: list[str], probe: bool = False):
        """Detached aliases in place of parameters, one level into lists and tuples; notes the chosen ones in used."""
        changed = None
        for k, value in enumerate(values):
            new = value
            if isinstance(value, nn.Parameter):
                name = self.targets.get(id(value))
                if name is not None and not probe:
                    used.append(name)
                new = value.detach().requires_grad_() if probe and name is not None else self._alias(value)
            elif type(value) in (list, tuple) and any(isinstance(v, nn.Parameter) for v in value):
                new = type(value)(self._replace(value, used, probe))
            elif id(value) in self._forms:
                name = self.targets.get(id(self._forms[id(value)][1]))
                if name is not None and not probe:
                    used.append(name)
                new = value.detach().requires_grad_() if probe and name is not None else value
            if new is not value:
                changed = list(values) if changed is None else changed
                changed[k] = new
        return values if changed is None else changed

    def _record(self, func, rule, bound: rules.Bound, weight_name, bias_name, swapped: bool):
        weight = self._alias(bound.weight) if isinstance(bound.weight, nn.Parameter) else bound.weight
        bias = self._alias(bound.bias) if isinstance(bound.bias, nn.Parameter) else bound.bias
        output = _call(func, bound.input, weight, bias) if _requires_grad((bound.input, weight, bias)) else None
        if output is None:  # here the graph begins
            output = _call(func, bound.input, weight.detach().requires_grad_(), bias)
        # An in-place activation on a view rewrites the history of the view, but not that of its base.
        source = output if output._base is None else output._base
        if source.numel() != output.numel():
            source = output
        self.records.append(
            _Record(
                weight_name,
                bias_name,
                rule,
                bound.input if self.keep_graph else bound.input.detach(),
                bound.input._version,
                get_gradient_edge(source),
                output.shape,
                output.dtype,
                swapped,
            )
        )
        return output


def _call(func, input, weight, bias):
    return func(input, weight) if bias is None else func(input, weight, bias)


def _turns(func, args, kwargs) -> bool | None:
    """Whether func transposes the matrix args[0]; None if its result is no plain form of it."""
    if func in _CASTS:
        return False
    if func in _TRANSPOSES or (
        func in _SWAPS and not kwargs and len(args) == 3 and {d % 2 for d in args[1:]} == {0, 1}
    ):
        return args[0].ndim == 2 or None
    return None


def _requires_grad(value) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(_requires_grad(v) for v in value)


def capture(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    objective: Callable[[object], Tensor],
    candidates: dict[str, nn.Module],
    *,
    pick: str | None = None,
    include_bias: bool = False,
    create_graph: bool = False,
) -> list[Use]:
    """Run ``model(*args, **kwargs)`` and return every use of the candidates' weights, in order of execution.

    ``objective`` maps the model's output to the per-sample losses [B]. ``pick`` keeps only the first or last weight
    executed. Raises CaptureError where the result could be wrong: samples that mix, a layer that never ran, an input
    overwritten after use; UnsupportedLayerError for a use without a rule.
    """
    _refuse_mixing(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    targets, owners = {}, {}
    for layer, module in candidates.items():
        parameters = [module.weight, module.bias if include_bias else None]
        for parameter in parameters:
            if parameter is not None:
                targets[id(parameter)] = names[id(parameter)]
                owners.setdefault(names[id(parameter)], layer)

    mode = _Capture(targets, create_graph)
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_restored_buffers(model))
        stack.enter_context(_autocast_uncached())
        args = tuple(_as_constant(a) for a in args)
        kwargs = {key: _as_constant(value) for key, value in kwargs.items()}
        with mode:
            losses = objective(model(*args, **kwargs))
        batch = losses.shape[0]
        records = _select(mode.records, pick)
        _verify(mode, records, owners, pick, batch)
        if not records:
            return []
        deltas = torch.autograd.grad(
            losses.sum(), [record.edge for record in records], allow_unused=True, create_graph=create_graph
        )
    uses = []
    for record, delta in zip(records, deltas, strict=True):
        # A layer's output that the loss does not depend on has delta zero, as in torch.func.
        delta = record.input.new_zeros(record.shape, dtype=record.dtype) if delta is None else delta
        # Under autocast the layer saw its input in the type of its output.
        uses.append(
            Use(
                record.weight,
                record.bias,
                record.rule,
                record.input.to(record.dtype),
                delta.reshape(record.shape),
                record.swapped,
            )
        )
    return uses


def _select(records: list[_Record], pick: str | None) -> list[_Record]:
    if pick is None or not records:
        return records
    order = list(dict.fromkeys(record.weight for record in records if record.weight is not None))
    name = order[0] if pick == "first" else order[-1]
    return [record for record in records if record.weight == name]


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


def _refuse_mixing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise CaptureError(
                f"{name or 'the model'} ({type(module).__name__}) normalises with the statistics of the batch, so that "
                "the samples mix and per-sample gradients do not exist; call model.eval(), or use GroupNorm"
            )


def _as_constant(value):
    """An input that needs no gradient and may be used in a graph."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.is_inference() else value.detach() if value.requires_grad else value


@contextlib.contextmanager
def _restored_buffers(model: nn.Module):
    """Buffers that a forward in training mode updates (power iterations, running statistics) are put back."""
    kept = []
    for module in model.modules():
        if module.training:
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
