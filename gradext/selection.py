"""Which parameters are meant by ``layers=`` and ``exclude=``, by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .errors import CaptureError, UnsupportedLayerError

LayerChoice = None | str | type | nn.Module | Tensor | Callable[[str, Tensor], bool] | Iterable[Any]


@dataclass(frozen=True, eq=False)
class Selection:
    """The parameters of a model that were chosen, and of the others why not."""

    chosen: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter]
    left_out: dict[str, str]  # name -> reason


# The last choices of each model by ``(layers, exclude)``: finding names takes longer than a small model's forward.
_selected = WeakIdKeyDictionary()


def select(model: nn.Module, layers: LayerChoice = None, exclude: LayerChoice = None) -> Selection:
    """Resolve ``layers=`` and ``exclude=``.

    Raises ValueError for names that the model does not have (all of them at once), UnsupportedLayerError for chosen
    parameters without a gradient.
    """
    contents = _contents(model)
    former, selections = _selected.get(model, (None, {}))
    if former != contents:
        _selected[model] = contents, (selections := {})
    key = _named(layers), _named(exclude)
    if None in key:
        return _select(model, layers, exclude)
    if key not in selections:
        selections[key] = _select(model, layers, exclude)
    return selections[key]


def _named(choice: LayerChoice) -> tuple[str | None, ...] | None:
    """A choice by names alone, as something to look up; None of any other."""
    names = tuple(choice) if isinstance(choice, (list, tuple)) else (choice,)
    return names if all(name is None or type(name) is str for name in names) else None


def _contents(model: nn.Module) -> list[object]:
    """A key that changes if the model's modules or parameters change, or become frozen."""
    contents: list[object] = []
    seen: set[int] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        contents.append(id(module))
        for name, parameter in module._parameters.items():
            contents += (name, id(parameter), parameter is not None and parameter.requires_grad)
        contents += module._modules.keys()
        stack += module._modules.values()
    return contents


def _select(model: nn.Module, layers: LayerChoice, exclude: LayerChoice) -> Selection:
    named = dict(model.named_parameters())
    if not named:
        raise CaptureError(f"model: expected a module with parameters, but {type(model).__name__} has none")
    left_out = {name: reason for name, p in named.items() if (reason := _without_gradient(p))}
    able = named.keys() - left_out.keys()
    trainable = {name for name in able if named[name].requires_grad}
    wanted = (trainable or able) if layers is None else _matching(model, named, layers, "layers")
    if layers is not None and wanted and not wanted & able:
        refused = "; ".join(f"{name} is {reason}" for name, reason in left_out.items() if name in wanted)
        raise UnsupportedLayerError(f"layers: expected parameters that have a gradient, but {refused}")
    unwanted = set() if exclude is None else _matching(model, named, exclude, "exclude")
    chosen = {name: p for name, p in named.items() if name in (wanted & able) - unwanted}
    if not chosen:
        reasons = f"; all are {', '.join(sorted(set(left_out.values())))}" if not able else ""
        raise ValueError(
            f"layers: expected at least one parameter, but layers={_shown(layers)} and exclude={_shown(exclude)} leave "
            f"none{reasons}"
        )
    for name in able - chosen.keys():
        left_out[name] = "excluded" if name in unwanted else "frozen" if layers is None else "not in layers="
    if sharded := [name for name, p in chosen.items() if hasattr(p, "_local_tensor")]:
        raise UnsupportedLayerError(
            f"{', '.join(sharded)}: expected whole parameters, but these are sharded (DTensor, FSDP2): their gradients "
            "are exchanged between processes; gather them (full_tensor, FSDP.summon_full_params), or use DDP"
        )
    if inference := [name for name, p in chosen.items() if p.is_inference()]:
        raise RuntimeError(
            f"{', '.join(inference)}: expected parameters that autograd can use, but they were made under "
            "torch.inference_mode(); make the model outside of it, or replace them by their .clone()"
        )
    left_out = {name: left_out[name] for name in named if name in left_out}
    return Selection(chosen, {name: p for name, p in named.items() if name not in chosen}, left_out)


def _without_gradient(parameter: Tensor) -> str | None:
    """Why a parameter has no gradient, or None."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise CaptureError(
            "model: expected initialised parameters, but a lazy module has not run yet; call the model once, under "
            "torch.no_grad(), before asking for gradients"
        )
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"of type {parameter.dtype}, which has no gradient"
    for kind in (type(getattr(parameter, "data", parameter)), *(() if parameter.requires_grad else (type(parameter),))):
        if hasattr(kind, "__tensor_flatten__") and kind.__name__ != "DTensor":
            return f"quantised or wrapped ({kind.__name__})"
    return None


def _shown(choice: object) -> str:
    text = repr(choice)
    return text if len(text) < 80 else text[:77] + "..."


def _matching(model: nn.Module, named: Mapping[str, Tensor], choice: Any, argument: str) -> set[str]:
    """The names of the parameters that ``choice`` means; raises for all that mean none."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in named.items()}  # a tied parameter goes by its first name
    modules = dict(model.named_modules(remove_duplicate=False))
    found: set[str] = set()
    unknown: list[str] = []
    several = isinstance(choice, Iterable) and not isinstance(choice, (str, type, Tensor, nn.Module))
    for item in choice if several else [choice]:
        names, problem = _names(item, everything, modules, argument)
        found |= {first[id(everything[name])] for name in names}
        if not names and item != "trainable":
            unknown.append(problem)
    if unknown:
        raise ValueError(f"{argument}: " + "; ".join(unknown))
    return found


def _names(
    item: Any, everything: Mapping[str, Tensor], modules: Mapping[str, nn.Module], argument: str
) -> tuple[list[str], str]:
    """The names in ``everything`` that one item means, and what to say where it means none."""

    def of(parameters: Iterable[Tensor]) -> list[str]:
        own = set(map(id, parameters))
        return [name for name, p in everything.items() if id(p) in own]

    if isinstance(item, Tensor):
        return of([item]), f"the tensor of shape {tuple(item.shape)} is not a parameter of the model"
    if isinstance(item, nn.Module):
        problem = f"the module {type(item).__name__} is not part of the model, or has no parameters"
        return of(item.parameters()), problem
    if isinstance(item, type) and issubclass(item, nn.Module):
        inside = (p for m in modules.values() if isinstance(m, item) for p in m.parameters())
        return of(inside), f"the model has no {item.__name__} with parameters"
    if isinstance(item, str):
        names = _spelt(item, everything, modules)
        return names, "" if names else _nearest(item, everything, modules)
    if callable(item) and not isinstance(item, type):
        matched = [name for name, p in everything.items() if item(name, p)]
        return matched, f"the predicate {getattr(item, '__name__', item)!r} matches no parameter"
    raise TypeError(
        f"{argument}: expected parameter or module names, patterns, modules, parameters, module types, 'trainable' or "
        f"a predicate (name, parameter), but got {item.__name__ if isinstance(item, type) else type(item).__name__}"
    )


def _spelt(item: str, everything: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> list[str]:
    """The parameters that a name of one or of a module, or a pattern means."""
    if item == "trainable":
        return [name for name, p in everything.items() if p.requires_grad]
    if item in everything:
        return [item]
    prefixes = [item] if item in modules else [m for m in modules if m and fnmatch.fnmatchcase(m, item)]
    inside = tuple(f"{module}." if module else "" for module in prefixes)
    return [name for name in everything if name.startswith(inside) or fnmatch.fnmatchcase(name, item)]


def _nearest(item: str, everything: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> str:
    """Why a name means no parameter, and which the user may have meant."""
    if item in modules:
        return f"the module {item!r} ({type(modules[item]).__name__}) has no parameters"
    names = [*everything, *filter(None, modules)]
    near = difflib.get_close_matches(item, names, n=3, cutoff=0.4)
    inside = [name for name in names if item and f".{item}." in f"{name}."]
    near = list(dict.fromkeys(near + inside[: 3 - len(near)])) or names[:4]
    pattern = f"; a pattern such as '*.{item}' means all of that name" if inside else ""
    return f"the model has no parameter, module or match of {item!r}; nearest names: {', '.join(near)}{pattern}"
