"""What gradext knows of each layer type: which calls use its weight, and how a call becomes factors.

A rule answers two questions. `bind`: given a torch function and its arguments, which are the input, the weight and
the bias? `factors`: given the layer's input and the loss's gradient with respect to the layer's output, which
``activation [B, (T,) I]`` and ``delta [B, (T,) O]`` have ``Σ_t delta_t activation_tᵀ`` as the gradient of the weight?
Choosing layers by name is here too. Nothing here knows about hooks, autograd or kernels.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UnsupportedLayerError


class Bound(NamedTuple):
    """A call of a weight: ``output = input @ weight + bias``, with the weight [I, O] or, transposed, [O, I]."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    transposed: bool


class LinearRule:
    """``y = x Wᵀ + b`` with W [O, I], x [B, ..., I], y [B, ..., O], by `F.linear` or as a matrix product."""

    module_types = (nn.Linear,)
    functions = (F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)

    @staticmethod
    def bind(func, args, kwargs) -> Bound | None:
        """Read the arguments of one of `functions`; None if they are in no form that the rule knows."""
        if func is F.linear:
            return Bound(*_linear_arguments(*args, **kwargs), transposed=True)
        if kwargs or len(args) != 2:
            return None
        return Bound(args[0], args[1], None, transposed=False)

    @staticmethod
    def factors(input: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(x [B, ..., I], δ [B, ..., O]) -> (activation [B, (T,) I], delta [B, (T,) O])."""
        if input.ndim == 2:
            return input, delta
        return input.flatten(1, -2), delta.flatten(1, -2)


def _linear_arguments(input, weight, bias=None):
    return input, weight, bias


RULES = (LinearRule,)
FUNCTIONS = {func: rule for rule in RULES for func in rule.functions}


def is_supported(module: nn.Module) -> bool:
    """Whether the module is of a type with a rule and its weight is a parameter (not recomputed at each use)."""
    return any(isinstance(module, rule.module_types) for rule in RULES) and isinstance(
        module._parameters.get("weight"), nn.Parameter
    )


def supported_layers(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The supported layers below ``model`` by name, in order of registration."""
    return {name: module for name, module in model.named_modules(prefix=prefix) if is_supported(module)}


LayerChoice = None | str | nn.Module | Iterable["str | nn.Module"]


def choose_layers(model: nn.Module, layers: LayerChoice) -> tuple[dict[str, nn.Module], str | None]:
    """Resolve the ``layers`` argument of `gradext.batch_layer_grads`.

    Returns the candidate modules by name, and ``"first"`` or ``"last"`` where the order of execution decides.
    Raises ValueError for a name or module that the model does not have, UnsupportedLayerError for one without a rule.
    """
    pick = layers if isinstance(layers, str) and layers in ("first", "last") else None
    if layers is None or pick:
        decoder = getattr(model, "decoder", None)
        inside = isinstance(decoder, nn.Module)
        chosen = supported_layers(decoder, "decoder") if inside else supported_layers(model)
        where = "model.decoder" if inside else "the model"
    elif isinstance(layers, str) and layers == "all":
        chosen, where = supported_layers(model), "the model"
    else:
        items = [layers] if isinstance(layers, (str, nn.Module)) else list(layers)
        chosen, where = {}, f"layers={layers!r}"
        names = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
        for item in items:
            chosen.update(_resolve(model, item, names))
    if not chosen:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise UnsupportedLayerError(
            f"layers: expected at least one linear layer in {where}, but found none "
            f"(the model consists of {', '.join(kinds) or 'no modules'}); choose layers= among those of type nn.Linear"
        )
    return chosen, pick


def _resolve(model: nn.Module, item: str | nn.Module, names: dict[int, str]) -> dict[str, nn.Module]:
    """One item of a ``layers`` list: a layer, or a container that stands for the supported layers in it."""
    if isinstance(item, nn.Module):
        if id(item) not in names:
            raise ValueError(f"layers: the module {type(item).__name__} is not part of the model; pass one of its own")
        name, module = names[id(item)], item
    elif isinstance(item, str):
        modules = dict(model.named_modules(remove_duplicate=False))
        if item not in modules:
            near = difflib.get_close_matches(item, modules, n=3, cutoff=0.4) or list(supported_layers(model))[:8]
            raise ValueError(f"layers: the model has no module named {item!r}; nearest names: {', '.join(near)}")
        name, module = item, modules[item]
    else:
        raise TypeError(f"layers: expected names or modules, but got {type(item).__name__}")
    if is_supported(module):
        return {name: module}
    found = supported_layers(module, name) if list(module.children()) else {}
    if not found:
        raise UnsupportedLayerError(
            f"layers: {name or 'the model'} is a {type(module).__name__}, for which there is no rule, and holds no "
            f"linear layer; supported types: {', '.join(t.__name__ for rule in RULES for t in rule.module_types)}"
        )
    return found
