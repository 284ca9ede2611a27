"""Deltas in closed form where the model is a plain chain of layers: no graph and no autograd.

An `nn.Sequential` of linear layers, convolutions, activations and reshapes is run layer by layer, and the gradient of
the loss is carried back by the derivative of each, down to the earliest chosen layer: at a sigmoid under binary cross
entropy it begins as ``p - t``, so that the last layer needs no backward at all. Every layer here treats the samples of
its batch one by one. Anything else (a hook, a type derived from these, an instance's own forward) is for `capture`,
which is also the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Chosen, ConvRule, LinearRule
from .losses import closed_form_beginning
from .uses import Form, Use, names_of, select

_aten = torch.ops.aten


class _Step(NamedTuple):
    # The layer is Any: what it has depends on its type, by which the step was found.
    forward: Callable[[Any, Tensor], Tensor | None]  # (layer, x) -> y; None for what it does not take
    backward: Callable[[Any, Tensor, Tensor, Tensor], Tensor]  # (layer, x, y, ∂L/∂y) -> ∂L/∂x


def _conv(layer: Any, x: Tensor) -> Tensor | None:
    plain = x.ndim == layer.weight.ndim and layer.padding_mode == "zeros" and type(layer.padding) is tuple
    return layer._conv_forward(x, layer.weight, layer.bias) if plain else None


def _conv_backward(layer: Any, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    rest = (layer.stride, layer.padding, layer.dilation, False, [0] * len(layer.stride), layer.groups)
    return _aten.convolution_backward(delta, x, layer.weight, None, *rest, (True, False, False))[0]


def _reshape(layer: Any, x: Tensor) -> Tensor | None:
    y = layer.forward(x)
    return y if y.shape[0] == x.shape[0] else None


_CONV = _Step(_conv, _conv_backward)
_RESHAPE = _Step(_reshape, lambda m, x, y, d: d.reshape(x.shape))
_NOTHING = _Step(lambda m, x: x, lambda m, x, y, d: d)
_STEPS: dict[type[nn.Module], _Step] = {
    # One dimension is that of the samples (behind a Flatten from 0 on), which the layer mixes.
    nn.Linear: _Step(
        lambda m, x: F.linear(x, m.weight, m.bias) if x.ndim > 1 else None, lambda m, x, y, d: d @ m.weight
    ),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), _RESHAPE),
    nn.Identity: _NOTHING,
    nn.Dropout: _Step(lambda m, x: None if m.training else x, lambda m, x, y, d: d),
    nn.ReLU: _Step(lambda m, x: torch.relu(x), lambda m, x, y, d: _aten.threshold_backward(d, y, 0)),
    nn.Sigmoid: _Step(lambda m, x: torch.sigmoid(x), lambda m, x, y, d: _aten.sigmoid_backward(d, y)),
    nn.Tanh: _Step(lambda m, x: torch.tanh(x), lambda m, x, y, d: _aten.tanh_backward(d, y)),
    nn.SiLU: _Step(lambda m, x: F.silu(x), lambda m, x, y, d: _aten.silu_backward(d, x)),
    nn.GELU: _Step(
        lambda m, x: F.gelu(x, approximate=m.approximate),
        lambda m, x, y, d: _aten.gelu_backward(d, x, approximate=m.approximate),
    ),
    nn.LeakyReLU: _Step(
        lambda m, x: F.leaky_relu(x, m.negative_slope),
        lambda m, x, y, d: _aten.leaky_relu_backward(d, x, m.negative_slope, False),
    ),
    nn.ELU: _Step(lambda m, x: F.elu(x, m.alpha), lambda m, x, y, d: _aten.elu_backward(d, m.alpha, 1, 1, False, x)),
    nn.Softplus: _Step(
        lambda m, x: F.softplus(x, m.beta, m.threshold),
        lambda m, x, y, d: _aten.softplus_backward(d, x, m.beta, m.threshold),
    ),
}
# What an instance may have in place of its class's forward, or of parameters, which then can be a view of others.
_INSTANCES_OWN = {"forward", "weight", "bias"}
_KEEPING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)  # the values, dropout in eval mode
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def uses(
    model: nn.Module, x: Tensor, loss: str, target: Tensor, forms: Mapping[int, Form], chosen: Chosen
) -> list[Use] | None:
    """The uses of the parameters in ``forms``, by id, with their deltas, in order of execution; None: not in this form.

    Arguments otherwise as those of `gradext.batch_layer_grads`; raises as the losses do.
    """
    chain = _chain(model)
    if chain is None or x.layout is not torch.strided or x.is_nested or x.ndim < 2 or not len(x):
        return None
    if loss == "auto" and _ends_behind_a_sigmoid(chain):
        return None
    with torch.no_grad():
        values = [x]
        for layer in chain:
            y = _STEPS[type(layer)].forward(layer, values[-1])
            if y is None:
                return None
            values.append(y)
        beginning = closed_form_beginning(loss, values[-1], target, type(chain[-1]) is nn.Sigmoid)
        if beginning is None:
            return None
        records = [
            _Record(own, k) for k, layer in enumerate(chain) if type(layer) in _LAYERS and (own := _own(layer, forms))
        ]
        if len({name for record in records for name in names_of(record)}) < len(forms):
            return None
        places = {record.place: record.forms for record in select(records, chosen.pick, chosen.owners)}
        delta, first = beginning.gradient, min(places)
        result = []
        for k in range(len(chain) - 1 - beginning.before_sigmoid, first - 1, -1):
            layer = chain[k]
            if k in places:
                result.append(Use(places[k], _gradient(layer), values[k], delta))
            if k > first:
                delta = _STEPS[type(layer)].backward(layer, values[k], values[k + 1], delta)
    return result[::-1]


class _Record(NamedTuple):
    forms: dict[str, Form]
    place: int


def _ends_behind_a_sigmoid(chain: list[nn.Module]) -> bool:
    """Whether only layers that leave its values as they are follow a sigmoid: the loss "auto" looks through them."""
    last = next((k for k in reversed(range(len(chain))) if type(chain[k]) not in _KEEPING), 0)
    return type(chain[last]) is nn.Sigmoid and last < len(chain) - 1


def _chain(model: nn.Module) -> list[nn.Module] | None:
    """The layers of a Sequential, nested ones too, if each is of a known type and as torch made it."""
    if nn.modules.module._has_any_global_hook():
        return None
    chain: list[nn.Module] = []
    stack = [model]
    while stack:
        module = stack.pop()
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl is not None
            or not module.__dict__.keys().isdisjoint(_INSTANCES_OWN)
            or module._buffers  # a weight made one
        ):
            return None
        if type(module) is nn.Sequential:
            stack += reversed(module._modules.values())
        elif type(module) in _STEPS:
            chain.append(module)
        else:
            return None
    return chain or None


def _own(layer: nn.Module, forms: Mapping[int, Form]) -> dict[str, Form]:
    return {role: forms[id(p)] for role, p in layer._parameters.items() if id(p) in forms}


def _gradient(layer: Any):
    if type(layer) is nn.Linear:
        return LinearRule.gradient
    pads = tuple((n, n) for n in layer.padding)
    return ConvRule.gradient(layer.weight.shape, layer.stride, pads, layer.dilation, layer.groups, False)
