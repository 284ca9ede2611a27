"""`register_layer`: faster rules that users write for their types of layers. A call of such a layer is one entry.

Every layer is covered without it. This file does not know how entries are made, nor to which sample a row belongs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CaptureError
from .factors import GradFactors, Gradient
from .mode import WatchMode
from .rules import Call, Entry, tensors_of

LayerGradients = Callable[[nn.Module, Tensor, Tensor], dict[str, Gradient]]
_registered: dict[type[nn.Module], LayerGradients] = {}


def register_layer(*types: type[nn.Module]) -> Callable[[LayerGradients], LayerGradients]:
    """Give a layer type of your own a faster rule: decorates ``(layer, input, delta) -> {parameter name: gradient}``.

    Every layer is covered without it, by the general rule; a rule of your own may use what only you know of it.
    ``input`` [B, ...] is the layer's first argument, ``delta`` [B, ...] the gradient of Σ_b loss_b with respect to its
    output (one tensor). The gradient of each parameter, by its name in the layer, is a tensor [B, *parameter.shape] or
    a `GradFactors`. The rule holds for the types themselves, not for those derived from them, and stands for all that
    happens inside such a layer. Raises TypeError for what is no module type.

    >>> import torch, gradext
    >>> class Scale(torch.nn.Module):
    ...     def __init__(self, features):
    ...         super().__init__()
    ...         self.scale = torch.nn.Parameter(torch.ones(features))
    ...     def forward(self, x):
    ...         return x * self.scale
    >>> @gradext.register_layer(Scale)
    ... def scale_gradients(layer, input, delta):
    ...     return {"scale": input * delta}
    >>> model = torch.nn.Sequential(Scale(6), torch.nn.Linear(6, 6, bias=False))
    >>> {name: tuple(g.shape) for name, g in gradext.batch_layer_grads(model, torch.rand(5, 6)).items()}
    {'0.scale': (5, 6), '1.weight': (5, 6, 6)}
    """
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"register_layer: expected types derived from torch.nn.Module, but got {kind!r}")

    def register(gradients: LayerGradients) -> LayerGradients:
        _registered.update(dict.fromkeys(types, gradients))
        return gradients

    return register


@contextlib.contextmanager
def whole_layers(mode: WatchMode) -> Iterator[None]:
    """Record each call of a layer with a registered rule as one entry."""
    former: list[tuple[nn.Module, Callable | None]] = []
    try:
        for name, module in _modules(mode.model):
            own = {role: p for role, p in module.named_parameters() if any(p is q for q in mode.chosen.values())}
            if own:
                former.append((module, module.__dict__.get("forward")))
                module.forward = _as_whole(mode, name, module, own)
        yield
    finally:
        for module, forward in former:
            del module.forward
            if forward is not None:
                module.forward = forward


def _as_whole(mode: WatchMode, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> Callable:
    """A forward that is one function of its arguments and of the parameters ``own`` {name in the module: parameter}."""
    forward, thread = module.forward, threading.get_ident()

    def run(given: dict[str, Tensor], args: tuple, kwargs: dict):
        parameters, versions = _exchange(module, given), [(t, t._version) for t in tensors_of([args, kwargs])]
        mode.opaque = True
        try:
            output = forward(*args, **kwargs)
        finally:
            mode.opaque = False
            _exchange(module, parameters)
        if any(t._version != version for t, version in versions):
            raise CaptureError(
                f"{', '.join(f'{name}.{role}' for role in own)}: the layer modifies its input in place, so that "
                "its rule cannot be applied; make that operation out of place"
            )
        return output

    @functools.wraps(forward)
    def whole(*args, **kwargs):
        if mode.opaque or threading.get_ident() != thread or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return mode.__torch_function__(run, (), (own, args, kwargs))

    run.rule = functools.partial(_call, name, module)  # type: ignore[attr-defined]
    return whole


def _exchange(module: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """Replace parameters, given by their names in the module, by tensors; return the former ones."""
    former = {}
    for role, tensor in tensors.items():
        owner, _, name = role.rpartition(".")
        parameters = module.get_submodule(owner)._parameters
        former[role] = parameters[name]
        parameters[name] = tensor
    return former


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the outermost modules with a registered rule."""
    inside: set[int] = set()
    found = []
    for name, module in model.named_modules() if _registered else ():
        if type(module) in _registered and id(module) not in inside:
            inside.update(map(id, module.modules()))
            found.append((name, module))
    return found


def _call(
    name: str, module: nn.Module, entry: Entry, given: dict[str, Tensor], args: tuple, kwargs: dict
) -> Call | None:
    """``given``: {name in the module: the tensor that stands for that parameter}."""
    arguments = tensors_of(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    own = {id(t) for t in given.values()}
    if not entry.edges or any(id(t) in own for t in arguments):  # depends on weights alone, or takes them as arguments
        return None
    rule, input = _registered[type(module)], arguments[0]
    if len(entry.outputs) != 1:
        raise CaptureError(
            f"layer {name!r} ({type(module).__name__}): expected one tensor that depends on its parameters, as the "
            f"layer has a rule of its own, but it returned {len(entry.outputs)}"
        )
    last: list[Any] = [None, None]  # the last delta, and the rule's gradients of all parameters for it

    def gradient(role: str, input: Tensor, delta: Tensor) -> Gradient:
        if last[0] is not delta:
            last[:] = delta, rule(module, input, delta)
        gradients = last[1]
        result = gradients.get(role) if isinstance(gradients, dict) else None
        shape, came = (delta.shape[0], *given[role].shape), None
        if isinstance(result, GradFactors):
            came = (len(result), *(result.weight_shape or result.shape[1:]))
        elif isinstance(result, Tensor):
            came = tuple(result.shape)
        if came != shape or result is None:
            raise ValueError(
                f"layer {name!r}: expected the rule registered for {type(module).__name__} to give the gradient of "
                f"{role!r} as a tensor or GradFactors of shape {shape}, but got {came or type(gradients).__name__}"
            )
        return result

    return Call("registered", input, given, 1, gradient, positions=False)
