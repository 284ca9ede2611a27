"""What libraries for per-sample gradients do in ordinary and unusual situations: right, wrong, left out or refused.

    python -m benchmarks.conformance [--library NAME ...] [--only WORD ...] [--out FILE]

NAME is one of the libraries below, or ``module:function`` for one of your own: an adapter ``(model, call, loss) ->
{name: [B, *shape]}``, where ``loss(call(model))`` gives the losses [B] (`benchmarks.situations`). Prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import measure
from .situations import SITUATIONS, Call, Loss, Situation, expected, zoo

Grads = Mapping[str, Tensor]

# --- the libraries ----------------------------------------------------------------------------------------------------


def with_gradext(model: nn.Module, call: Call, loss: Loss) -> Grads:
    import gradext

    with gradext.watch(model) as watch:
        losses = loss(call(model))
    return watch.grads(losses)


def with_a_loop(model: nn.Module, call: Call, loss: Loss) -> Grads:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    samples = []
    for b in range(len(loss)):
        model.zero_grad()
        loss[b](call[b](model)).sum().backward()
        samples.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained.values()])
    return {name: torch.stack(grads) for name, *grads in zip(trained, *samples, strict=True)}


def with_vmap(model: nn.Module, call: Call, loss: Loss) -> Grads:
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def value(parameters, x, target):
        x, target = pytree.tree_map(lambda t: t.unsqueeze(0), (x, target))
        output = torch.func.functional_call(model, parameters, *Call(x).arguments)
        return Loss(loss.function, target)(output).sum()

    return torch.func.vmap(torch.func.grad(value), (None, 0, 0), randomness="different")(trained, call.x, loss.target)


def with_opacus(model: nn.Module, call: Call, loss: Loss) -> Grads:
    from opacus import GradSampleModule

    for module in model.modules():  # its hooks watch layers in training mode alone
        if module._parameters and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
    wrapped = GradSampleModule(model, loss_reduction="sum")
    loss(call(wrapped)).sum().backward()
    found = {name: p.grad_sample for name, p in model.named_parameters() if p.requires_grad}
    wrapped.to_standard_module()
    return found


def with_backpack(model: nn.Module, call: Call, loss: Loss) -> Grads:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(model)
    with backpack(BatchGrad()):
        loss(call(model)).sum().backward()
    return {name: getattr(p, "grad_batch", None) for name, p in model.named_parameters() if p.requires_grad}


def with_asdl(model: nn.Module, call: Call, loss: Loss) -> Grads:
    from asdl.gradient import save_batch_gradient

    save_batch_gradient(model, lambda: loss(call(model)).sum().backward())
    return {name: getattr(p, "batch_grad", None) for name, p in model.named_parameters() if p.requires_grad}


def with_nngeometry(model: nn.Module, call: Call, loss: Loss) -> Grads:
    from nngeometry import Jacobian
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object.vector import PVector

    layers, x = LayerCollection.from_model(model), call.x if isinstance(call.x, Tensor) else next(iter(call.x))
    jacobian = Jacobian(model, (x, x), lambda x, _: loss(Call(x)(model)).unsqueeze(1), layer_collection=layers)
    samples, found = [PVector(layers, vector_repr=row).to_dict() for row in jacobian.to_torch()[0]], {}
    for layer in layers.layers:
        for k, name in enumerate(["weight", "bias"][: len(samples[0][layer])]):
            found[f"{layer}.{name}" if layer else name] = torch.stack([sample[layer][k] for sample in samples])
    return found


LIBRARIES = {  # name -> (its distribution, the adapter)
    "gradext": ("gradext", with_gradext),
    "vmap(grad)": ("torch", with_vmap),
    "loop": ("torch", with_a_loop),
    "Opacus": ("opacus", with_opacus),
    "BackPACK": ("backpack-for-pytorch", with_backpack),
    "ASDL": ("asdfghjkl", with_asdl),
    "nngeometry": ("nngeometry", with_nngeometry),
}

# --- the verdict ------------------------------------------------------------------------------------------------------

RIGHT, WRONG, LEFT_OUT, REFUSED = "right", "wrong", "left out", "refused"


def outcome(adapter: Callable, situation: Situation) -> tuple[str, str]:
    """One of the four words, and why.

    right: every parameter that requires grad, with the gradient of every sample. left out: some are missing without an
    error, the others are right. wrong: some number, or some shape, is another one, without an error. refused: an error.
    """
    with _in(situation.dtype):
        want = expected(situation)
        model, pairs = situation.make()
        try:
            for call, loss in pairs:
                found = dict(adapter(model, call, loss))
                model.zero_grad()
            if situation.again:
                adapter(model, Call(pytree.tree_map(lambda t: 2 * t + 1, call.x), call.part), loss)
        except Exception as error:  # whatever a library raises
            return REFUSED, f"{type(error).__name__}: {' '.join(str(error).split())}"
        return compare(found, want, situation.tolerance)


def compare(found: Mapping[str, Tensor | None], want: Grads, tolerance: float) -> tuple[str, str]:
    whole = torch.stack([w.flatten(1).norm(dim=1) for w in want.values()]).norm(dim=0)  # of each sample
    there = {name: w for name, w in want.items() if found.get(name) is not None}
    for name, w in there.items():
        shape = list(getattr(found[name], "shape", ()))  # Opacus gives lists where it lost count
        if shape != list(w.shape):
            return WRONG, f"{name}: shape {shape} in place of {list(w.shape)}"
        size = w.flatten(1).norm(dim=1).maximum(1e-6 * whole).clamp_min(1e-300)
        errors = (found[name] - w).flatten(1).norm(dim=1) / size
        if not (errors <= tolerance).all():
            return WRONG, f"{name}: off by {errors.max():.1e}"
    missing = [name for name in want if name not in there]
    return (LEFT_OUT, ", ".join(missing)) if missing else (RIGHT, "")


@contextlib.contextmanager
def _in(dtype: torch.dtype):
    """With this default type, and no word of the libraries."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(default)
        logging.disable(logging.NOTSET)


# --- the command ------------------------------------------------------------------------------------------------------


def adapter_of(name: str) -> tuple[str, Callable]:
    """The heading of a library's column, and its adapter."""
    if ":" in name:
        module, _, function = name.partition(":")
        return name, getattr(importlib.import_module(module), function)
    distribution, adapter = LIBRARIES[name]
    version = measure.version(distribution) or (
        importlib.import_module(name).__version__ if name == "gradext" else None
    )
    if version is None:
        raise ModuleNotFoundError(f"{name}: {distribution} is not installed (pip install '.[peers]')")
    return f"{name} {version}" if distribution != "torch" else name, adapter


HEAD = """\
# What libraries do, situation by situation

Each library's per-sample gradients of all parameters against one backward a sample of the same run, 4 samples, in fp64
unless it says otherwise. **right**: every parameter that requires grad, for every sample. **wrong**: other numbers, or
another shape, without an error. **left out**: parameters are missing without an error, the others are right.
**refused**: an error. A loop and `vmap(grad)` run each sample alone, which is another function where a loss or a layer
uses the other samples. Opacus has its layers in training mode, which it asks for. The adapters are about ten lines each
([conformance.py](../benchmarks/conformance.py)); hold a library of your own to the same by
`python -m benchmarks.conformance --library module:function`.
"""


def render(found: dict[str, dict[str, str]], situations: dict[str, Situation]) -> str:
    lines = [
        *HEAD.splitlines(),
        "",
        f"Made by `python -m benchmarks.conformance --out docs/conformance.md`, torch {torch.__version__}, on the CPU.",
        "",
        "| | " + " | ".join(found) + " |",
        "| --- |" + " --- |" * len(found),
    ]  # fmt: skip
    counts = {library: Counter(words.values()) for library, words in found.items()}
    for word in RIGHT, WRONG, LEFT_OUT, REFUSED:
        lines.append(f"| **{word}** | " + " | ".join(str(counts[library][word]) for library in found) + " |")
    kind = None
    for name, situation in situations.items():
        if situation.kind != kind:
            kind = situation.kind
            lines.append(f"| *{kind}* |" + " |" * len(found))
        words = [f"**{w}**" if w == WRONG else w for w in (words.get(name, "") for words in found.values())]
        lines.append(f"| {name} | " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--library", nargs="+", metavar="NAME", help="default: all that are installed")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="situations whose name has one of these"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, in Markdown")
    options = parser.parse_args(arguments)
    installed = [
        name for name, (distribution, _) in LIBRARIES.items() if name == "gradext" or measure.version(distribution)
    ]
    unknown = [name for name in options.library or () if ":" not in name and name not in LIBRARIES]
    if unknown:
        parser.error(
            f"--library: expected module:function or one of {', '.join(LIBRARIES)}, but got {', '.join(unknown)}"
        )
    every = {**SITUATIONS, **zoo()}
    situations = {
        name: s for name, s in every.items() if any(word in name for word in options.only) and not s.unavailable
    }
    torch.set_num_threads(1)  # the models are tiny
    found: dict[str, dict[str, str]] = {}
    for library in options.library or installed:
        heading, adapter = adapter_of(library)
        found[heading] = {}
        for name, situation in situations.items():
            word, why = outcome(adapter, situation)
            found[heading][name] = word
            if word != RIGHT:
                print(f"{library}, {name}: {word}: {why[:200]}", flush=True)
    table = render(found, situations)
    print(table)
    left_out = {name: s.unavailable for name, s in every.items() if s.unavailable}
    if left_out:
        print("not run: " + "; ".join(f"{name} ({reason})" for name, reason in left_out.items()))
    if options.out:
        options.out.write_text(table)


if __name__ == "__main__":
    main()
