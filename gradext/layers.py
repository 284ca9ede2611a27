"""What gradext knows of each layer type: which calls use its parameters, and how a call becomes per-sample gradients.

A rule answers two questions. `bind`: given a torch function and its arguments, which are the input and the parameters?
`gradient`: given the layer's input and the loss's gradient with respect to the layer's output, what is the gradient of
every sample for one of the parameters? It is a `GradFactors` where that is the cheaper form, else a tensor
[B, *parameter.shape]. Choosing layers by name is here too. Nothing here knows about hooks, autograd or kernels.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .errors import UnsupportedLayerError
from .factors import ConvFactors, EmbeddingFactors, GradFactors, Windows


class Call(NamedTuple):
    """A call of a function with parameters, as its rule reads it."""

    input: Tensor
    parameters: dict[str, Tensor]  # by role, the rule's own name of an argument
    run: Callable[..., Tensor]  # the same call with other tensors in the parameters' place: run(**parameters)
    rows: int  # leading dimensions of input and output that hold the samples and their positions
    gradient: Callable[[str, Tensor, Tensor], GradFactors | Tensor]  # (role, input, delta), both rows first


class LinearRule:
    """``y = x Wᵀ + b`` with W [O, I], x [..., I], y [..., O], by `F.linear` or as a matrix product."""

    module_types = (nn.Linear,)
    functions: tuple[Callable, ...] = (
        *(F.linear, torch.matmul, torch.mm, torch.addmm),
        *(Tensor.matmul, Tensor.mm, Tensor.addmm, Tensor.__matmul__, Tensor.__rmatmul__),
    )

    @staticmethod
    def bind(func, args, kwargs) -> Call | None:
        """Read the arguments of one of `functions`; None if they are in no form that the rule knows."""
        if func is F.linear:
            return LinearRule._linear(*args, **kwargs)
        if kwargs:
            return None
        if func in (torch.addmm, Tensor.addmm):
            if len(args) != 3:
                return None
            bias, input, weight = args
            if weight.ndim != 2 or bias.shape != weight.shape[1:]:
                return None
            return LinearRule._product(input, weight, bias, lambda weight, bias: func(bias, input, weight))
        if len(args) != 2:
            return None
        input, weight = args[::-1] if func is Tensor.__rmatmul__ else args
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        return LinearRule._product(input, weight, None, lambda weight: torch.matmul(input, weight))

    @staticmethod
    def _linear(input, weight, bias=None) -> Call | None:
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):  # a bias may be broadcast
            return None
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        gradient = LinearRule.gradient
        return Call(input, parameters, lambda **given: F.linear(input, **given), input.ndim - 1, gradient)

    @staticmethod
    def _product(input, weight, bias, run) -> Call:
        def gradient(role, input, delta):
            found = LinearRule.gradient(role, input, delta)
            return found.transposed() if isinstance(found, GradFactors) else found

        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return Call(input, parameters, run, input.ndim - 1, gradient)

    @staticmethod
    def gradient(role: str, input: Tensor, delta: Tensor) -> GradFactors | Tensor:
        """x [B, ..., I], δ [B, ..., O]: Σ over the inner dimensions of δ xᵀ, and of δ for the bias."""
        if role == "bias":
            return _sum_to(delta, (delta.shape[-1],))
        input = input if input.dtype is delta.dtype else input.to(delta.dtype)
        return GradFactors(_positions(input), _positions(delta))


class ConvRule:
    """Convolutions: the weight's gradient is Σ_t δ_t u_tᵀ over the output positions t, u_t the input's window there.

    The transposed ones exchange the roles: Σ_t x_t v_tᵀ over the input's positions, v_t the window of δ.
    """

    module_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    _plain = (F.conv1d, F.conv2d, F.conv3d)
    _transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    functions = (*_plain, *_transposed)

    @staticmethod
    def bind(func, args, kwargs) -> Call | None:
        transposed = func in ConvRule._transposed
        read = ConvRule._transposed_arguments if transposed else ConvRule._arguments
        input, parameters, stride, padding, dilation, groups, others = read(*args, **kwargs)
        weight = parameters["weight"]
        dimensions = weight.ndim - 2
        if input.ndim != dimensions + 2:  # one image without a batch dimension
            return None
        kernel = tuple(weight.shape[2:])
        stride, dilation = per_dimension(stride, dimensions), per_dimension(dilation, dimensions)
        if padding == "same":
            extra = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = tuple((n // 2, n - n // 2) for n in extra)
        else:
            pads = tuple((n, n) for n in per_dimension(0 if padding == "valid" else padding, dimensions))
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, **others}
        gradient = ConvRule.gradient(weight.shape, stride, pads, dilation, groups, transposed)
        return Call(input, parameters, lambda **given: func(input, **given, **options), 1, gradient)

    @staticmethod
    def gradient(
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        pads: tuple[tuple[int, int], ...],  # zeros before and after, by dimension
        dilation: tuple[int, ...],
        groups: int,
        transposed: bool,
    ) -> Callable[[str, Tensor, Tensor], GradFactors | Tensor]:
        """``(role, x [B, C, ...], δ [B, O, ...])`` -> the gradient, for a weight of ``shape``."""
        windows = Windows(tuple(shape[2:]), stride, dilation, pads)

        def gradient(role, input, delta):
            if role == "bias":
                return delta.flatten(2).sum(2)
            image, plain = (delta, input.to(delta.dtype)) if transposed else (input, delta)
            return ConvFactors(image.to(delta.dtype), plain, windows, groups, tuple(shape))

        return gradient

    @staticmethod
    def _arguments(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return input, parameters, stride, padding, dilation, groups, {}

    @staticmethod
    def _transposed_arguments(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return input, parameters, stride, padding, dilation, groups, {"output_padding": output_padding}


class EmbeddingRule:
    """``y = W[index]`` with W [V, D], index [...], y [..., D]: δ goes to the rows that were looked up."""

    module_types = (nn.Embedding,)
    functions = (F.embedding,)

    @staticmethod
    def bind(func, args, kwargs) -> Call | None:
        return EmbeddingRule._bind(*args, **kwargs)

    @staticmethod
    def _bind(
        input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
    ) -> Call | None:
        # The one rescales the weight itself, the other the gradient by what is in the whole batch.
        if max_norm is not None or scale_grad_by_freq:
            return None
        rows = weight.shape[0]
        padding = None if padding_idx is None else padding_idx % rows

        def gradient(role, index, delta):
            delta = delta if padding is None else delta * (index != padding).unsqueeze(-1)
            B, T = index.shape[0], math.prod(index.shape[1:])  # -1 says nothing of an empty batch
            return EmbeddingFactors(index.reshape(B, T).long(), delta.reshape(B, T, delta.shape[-1]), rows)

        def run(weight):
            return F.embedding(input, weight, padding_idx)

        return Call(input, {"weight": weight}, run, input.ndim, gradient)


class NormRule:
    """Normalisations with affine parameters, ``y = x̂ ⊙ w + b``: Σ over a sample's positions of δ ⊙ x̂, and of δ."""

    module_types = (
        *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    )
    functions = (F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm)

    @staticmethod
    def bind(func, args, kwargs) -> Call | None:
        return getattr(NormRule, func.__name__)(*args, **kwargs)

    @staticmethod
    def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Call:
        rows = input.ndim - len(normalized_shape)
        return NormRule._call(F.layer_norm, input, weight, bias, rows, normalized_shape=normalized_shape, eps=eps)

    @staticmethod
    def rms_norm(input, normalized_shape, weight=None, eps=None) -> Call:
        rows = input.ndim - len(normalized_shape)
        return NormRule._call(F.rms_norm, input, weight, None, rows, normalized_shape=normalized_shape, eps=eps)

    @staticmethod
    def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5) -> Call:
        return NormRule._call(F.group_norm, input, weight, bias, 1, num_groups=num_groups, eps=eps)

    @staticmethod
    def batch_norm(
        input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ) -> Call | None:
        # In training mode samples mix, which capture refuses.
        options = {"running_mean": running_mean, "running_var": running_var, "eps": eps}
        return None if training else NormRule._call(F.batch_norm, input, weight, bias, 1, **options)

    @staticmethod
    def instance_norm(
        input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
    ) -> Call:
        options = {"running_mean": running_mean, "running_var": running_var, "use_input_stats": use_input_stats}
        # Statistics of the input are the sample's own; the running ones are only updated then, by the layer's own call.
        statistics = {"use_input_stats": True} if use_input_stats else options
        call = NormRule._call(F.instance_norm, input, weight, bias, 1, **statistics, eps=eps)
        options |= {"momentum": momentum, "eps": eps}
        return call._replace(run=lambda **given: F.instance_norm(input, **options, **given))

    @staticmethod
    def _call(func, input, weight, bias, rows, **options) -> Call:
        parameters = {role: p for role, p in (("weight", weight), ("bias", bias)) if p is not None}
        shapes = {role: tuple(p.shape) for role, p in parameters.items()}
        by_channel = "normalized_shape" not in options

        def gradient(role, input, delta):
            if role == "weight":
                delta = delta * func(input, **options).to(delta.dtype)
            # Channels lie behind the samples, normalised dimensions at the end.
            return delta.flatten(2).sum(2) if by_channel and delta.ndim > 2 else _sum_to(delta, shapes[role])

        return Call(input, parameters, lambda **given: func(input, **given, **options), rows, gradient)


def _positions(x: Tensor) -> Tensor:
    """[B, ..., I] -> [B, (T,) I]."""
    return x if x.ndim == 2 else x.flatten(1, -2)


def _sum_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B, ..., *shape] -> [B, *shape], summed over what lies between."""
    inner = x.ndim - len(shape) - 1
    return x if inner == 0 else x.flatten(1, inner).sum(1)


def per_dimension(value, dimensions: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dimensions if len(value) == 1 else value


RULES = (LinearRule, ConvRule, EmbeddingRule, NormRule)
FUNCTIONS = {func: rule for rule in RULES for func in rule.functions}
# Its own projections run through F.linear inside a function that capture looks into.
COMPOSED_TYPES = (nn.MultiheadAttention,)

# --- layers of the user's own ----------------------------------------------------------------------------------------

LayerGradients = Callable[[nn.Module, Tensor, Tensor], "dict[str, GradFactors | Tensor]"]
_registered: dict[type[nn.Module], LayerGradients] = {}


def register_layer(*types: type[nn.Module]) -> Callable[[LayerGradients], LayerGradients]:
    """Teach gradext a layer type of your own: decorates ``(layer, input, delta) -> {parameter name: gradient}``.

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
    >>> model = torch.nn.Sequential(Scale(6), torch.nn.Linear(6, 6))
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


def registered(module: nn.Module) -> LayerGradients | None:
    return _registered.get(type(module))


# --- choosing layers -------------------------------------------------------------------------------------------------


def own_parameters(module: nn.Module, include_bias: bool) -> dict[str, nn.Parameter]:
    """A layer's parameters by their names in it: its weights, and with ``include_bias`` also those named bias."""
    found = module.named_parameters() if registered(module) else module._parameters.items()
    return {
        name: p
        for name, p in found
        if p is not None
        and (include_bias or "bias" not in name.rpartition(".")[2])
        and (p.is_floating_point() or p.is_complex())  # quantised weights have no gradient
    }


def walk(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """`nn.Module.named_modules` as a dict, in a quarter of the time: a call for a small model is mostly such walks."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    stack = [(prefix, model)]
    while stack:
        name, module = stack.pop()
        if module not in seen:
            seen.add(module)
            found[name] = module
            if module._modules:
                start = f"{name}." if name else ""
                children = [(start + key, child) for key, child in module._modules.items() if child is not None]
                stack += reversed(children)
    return found


@functools.cache
def _has_rule(kind: type[nn.Module]) -> bool:
    return issubclass(kind, (*COMPOSED_TYPES, *(t for rule in RULES for t in rule.module_types)))


def is_supported(module: nn.Module) -> bool:
    """Whether there is a rule for the module's type and it has a weight (and does not recompute it at each use)."""
    known = _has_rule(type(module))  # type: ignore[arg-type]  # mypy takes the class's __hash__ for its instances'
    return bool(registered(module) or (known and own_parameters(module, include_bias=False)))


def supported_layers(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The supported layers below ``model`` by name, in order of registration."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()  # parts of registered layers, which stand for all that is in them
    for name, module in walk(model, prefix).items():
        if id(module) in inside:
            continue
        if registered(module):
            inside.update(map(id, module.modules()))
        if is_supported(module):
            found[name] = module
    return found


LayerChoice = None | str | nn.Module | Iterable["str | nn.Module"]


@dataclass(frozen=True, eq=False)
class Chosen:
    """A model's modules and parameters by name, a shared one under its first name only, and which were chosen."""

    modules: dict[str, nn.Module]  # without the model itself
    parameters: dict[str, nn.Parameter]
    layers: dict[str, nn.Module]
    owners: dict[str, str]  # chosen parameter -> layer
    pick: str | None  # "first" or "last", where only that layer of them is meant, in order of execution

    def without(self, names: Collection[str]) -> Chosen:
        """The same without these parameters."""
        return replace(self, owners={name: layer for name, layer in self.owners.items() if name not in names})

    @functools.cached_property
    def ordinary(self) -> bool:
        """Whether no parameter is of a class of its own, which may do otherwise than a tensor, and no layer has a rule
        of its user's own, which stands for all that happens inside."""
        plain = all(type(parameter) is nn.Parameter for parameter in self.parameters.values())
        return plain and not any(map(registered, self.layers.values()))

    @functools.cached_property
    def others(self) -> list[nn.Parameter]:
        """The parameters that were not chosen."""
        return [parameter for name, parameter in self.parameters.items() if name not in self.owners]


# Of each model, by arguments, what it consisted of and what was chosen: that takes longer than a small layer's product.
# The model itself is not among what is kept, so that it can go.
_choices = WeakIdKeyDictionary()


def choose(model: nn.Module, layers: LayerChoice, include_bias: bool = False, any_type: bool = False) -> Chosen:
    """What `choose_layers` finds, with the parameters that are meant. Raises as that."""
    asked = tuple(layers) if type(layers) is list else layers
    named = all(type(item) is str for item in asked) if type(asked) is tuple else asked is None or type(asked) is str
    if not named or hasattr(type(model), "decoder"):  # a property may give another one each time
        return _chosen(model, layers, include_bias, any_type)
    present, key = _contents(model), (asked, include_bias, any_type)
    former, chosen = _choices.setdefault(model, {}).get(key, (None, None))
    if former != present:
        chosen = _chosen(model, layers, include_bias, any_type)
        if all(layer is not model for layer in chosen.layers.values()):
            _choices[model][key] = present, chosen
    return chosen


def _contents(model: nn.Module) -> list:
    """What tells whether a model still consists of the same modules and parameters by the same names."""
    contents: list[object] = [len(_registered)]
    seen: set[int] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        contents.append(id(module))
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if module._parameters:
            contents += module._parameters.keys()  # of scripted modules, these are no dicts
            contents += map(id, module._parameters.values())
        if module._modules:
            contents += module._modules.keys()
            stack += module._modules.values()
    return contents


def _chosen(model: nn.Module, layers: LayerChoice, include_bias: bool, any_type: bool) -> Chosen:
    candidates, pick = choose_layers(model, layers, any_type)
    modules = walk(model)
    names: dict[int, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    for prefix, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in names:
                names[id(parameter)] = f"{prefix}.{name}" if prefix else name
                parameters[names[id(parameter)]] = parameter
    owners: dict[str, str] = {}
    for layer, module in candidates.items():
        for parameter in own_parameters(module, include_bias).values():
            owners.setdefault(names[id(parameter)], layer)
    del modules[""]
    return Chosen(modules, parameters, candidates, owners, pick)


def choose_layers(
    model: nn.Module, layers: LayerChoice, any_type: bool = False
) -> tuple[dict[str, nn.Module], str | None]:
    """Resolve the ``layers`` argument of `gradext.batch_layer_grads`.

    Returns the candidate modules by name, and ``"first"`` or ``"last"`` where the order of execution decides. With
    ``any_type`` every module with parameters of its own is a candidate, supported or not. Raises ValueError for a name
    or module that the model does not have, UnsupportedLayerError for one without a rule.
    """
    find = _layers_of_any_type if any_type else supported_layers
    pick = layers if isinstance(layers, str) and layers in ("first", "last") else None
    if layers is None or pick:
        decoder = getattr(model, "decoder", None)
        if isinstance(decoder, nn.Module):
            chosen, where = find(decoder, "decoder"), "model.decoder"
        else:
            chosen, where = find(model), "the model"
    elif isinstance(layers, str) and layers == "all":
        chosen, where = find(model), "the model"
    else:
        items = [layers] if isinstance(layers, (str, nn.Module)) else list(layers)
        chosen, where = {}, f"layers={layers!r}"
        for item in items:
            chosen.update(_resolve(model, item, find))
    if not chosen:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise UnsupportedLayerError(
            f"layers: expected at least one supported layer in {where}, but found none "
            f"(the model consists of {', '.join(kinds) or 'no modules'}); supported types: {_supported_types()}"
        )
    return chosen, pick


def _layers_of_any_type(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    found = supported_layers(model, prefix)
    covered = {id(p) for layer in found.values() for p in own_parameters(layer, include_bias=True).values()}
    for name, module in walk(model, prefix).items():
        if any(p is not None and id(p) not in covered for p in module._parameters.values()):
            found.setdefault(name, module)
    return found


def _supported_types() -> str:
    types = [*(t for rule in RULES for t in rule.module_types), *COMPOSED_TYPES, *_registered]
    return ", ".join(t.__name__ for t in types)


def _resolve(model: nn.Module, item: str | nn.Module, find) -> dict[str, nn.Module]:
    """One item of a ``layers`` list: a layer, or a container that stands for the layers in it."""
    if isinstance(item, nn.Module):
        name, module = next((name for name, m in model.named_modules() if m is item), None), item
        if name is None:
            raise ValueError(f"layers: the module {type(item).__name__} is not part of the model; pass one of its own")
    elif isinstance(item, str):
        try:
            name, module = item, model.get_submodule(item)
        except AttributeError:
            modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
            near = difflib.get_close_matches(item, modules, n=3, cutoff=0.4) or list(supported_layers(model))[:8]
            raise ValueError(
                f"layers: the model has no module named {item!r}; nearest names: {', '.join(near)}"
            ) from None
    else:
        raise TypeError(f"layers: expected names or modules, but got {type(item).__name__}")
    found = find(module, name)
    if not found:
        raise UnsupportedLayerError(
            f"layers: {name or 'the model'} is a {type(module).__name__}, for which there is no rule, and holds no "
            f"layer that has one; supported types: {_supported_types()}; gradext.register_layer adds one, and "
            'fallback="vmap" does without'
        )
    return found
