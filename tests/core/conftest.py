"""The judge of the core's tests: per-sample gradients against plain autograd in fp64, and an unchanged model.

A case is a function without arguments that makes everything anew (a model may keep state) and returns a dict:

    model, x     the model and its input: a tensor, a tuple (positional) or a dict (keywords)
    loss         (output, target) -> losses [B]; default: a weighted square of the output
    target       what the loss is given
    oracle       "alone" (default): each sample by itself; "batch": ∂ losses[b] of the batch as it stands
    part         (tree, b) -> sample b of the inputs and of the target; default: row b of every tensor
    outcome      "right" (default); "refused": a gradext error; "right or refused": not a wrong number, no other error
    change       called with the case after a first call; it may change the model or the entries of the case
    options      of the call: layers=, segments= and so on
    names        of the parameters in the result; default: those that require grad, or all where none does
    frozen       False: do not try the model with frozen parameters too
    trains       False: do not compare a training step after the calls with Σ_b of the gradients
    seed         set before every forward
    tolerance    of the largest error of a parameter's gradients, relative to the largest gradient; default: 1e-9
    settles      True: the model's first forward changes it (lazy layers)
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import gradext

from .common import assert_right, largest_of


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def squared(output, target) -> Tensor:
    """Every element of the output has a gradient of its own, whatever the structure of the output."""
    total = 0
    for value in (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)):
        weights = torch.linspace(0.5, 1.5, math.prod(value.shape[1:]), dtype=value.dtype)
        total = total + (weights * (value.flatten(1) + 0.1) ** 2).sum(1)
    return total


def rows(tree, b: int):
    return pytree.tree_map(lambda value: value[b : b + 1] if isinstance(value, Tensor) and value.ndim else value, tree)


def call(model, x):
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


@contextlib.contextmanager
def fresh(make_case: Callable[[], dict]):
    """The case, made anew; what its ``change`` enters into ``case["stack"]`` is left at the end."""
    torch.manual_seed(0)
    case = {"loss": squared, "target": None, "oracle": "alone", "part": rows, "outcome": "right", "options": {}}
    case |= {"change": None, "names": None, "frozen": True, "trains": True, "seed": None, "settles": False}
    case |= {"tolerance": 1e-9} | make_case()
    if case["target"] is None:
        case["target"] = next(leaf for leaf in pytree.tree_leaves(case["x"]) if isinstance(leaf, Tensor))
    with contextlib.ExitStack() as stack:
        yield case | {"stack": stack}


def losses_of(case: dict, x=None, target=None) -> Tensor:
    if case["seed"] is not None:
        torch.manual_seed(case["seed"])
    x, target = (case["x"], case["target"]) if x is None else (x, target)
    return case["loss"](call(case["model"], x), target)


def gradients(model) -> dict[str, Tensor]:
    """What the parameters have in .grad, which is cleared."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = (
            torch.zeros_like(parameter) if grad is None else grad.to_dense() if grad.is_sparse else grad.clone()
        )
        parameter.grad = None
    return found


def backward_by_backward(case: dict) -> dict[str, Tensor]:
    """The oracle of the case: {name: [B, *shape]} by one .backward() a sample."""
    model, found = case["model"], []
    floating = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    flags = [p.requires_grad for p in floating]
    if not any(flags):
        model.requires_grad_()
    losses = losses_of(case)
    assert losses.ndim == 1
    for b in range(len(losses)):
        if case["oracle"] == "alone":
            (loss,) = losses_of(case, case["part"](case["x"], b), case["part"](case["target"], b))
            loss.backward()
        else:
            losses[b].backward(retain_graph=True)
        found.append(gradients(model))
    for parameter, flag in zip(floating, flags, strict=True):
        parameter.requires_grad_(flag)
    return {name: torch.stack([sample[name] for sample in found]) for name in found[0]}


def by_grads(case: dict) -> Mapping[str, Tensor]:
    keys = {"loss": case["loss"], "target": case["target"], **case["options"]}
    return gradext.batch_layer_grads(case["model"], case["x"], **keys)


def by_factors(case: dict) -> Mapping[str, Tensor]:
    keys = {"loss": case["loss"], "target": case["target"], **case["options"]}
    factors = gradext.batch_layer_factors(case["model"], case["x"], **keys)
    found = {name: f.materialize() for name, f in factors.items()}
    norms = sum(value.reshape(len(value), -1).abs().square().sum(1) for value in found.values())
    torch.testing.assert_close(factors.norm().square(), norms, rtol=1e-9, atol=1e-12)
    return found


def by_watch(case: dict) -> Mapping[str, Tensor]:
    with gradext.watch(case["model"], **case["options"]) as watch:
        losses = losses_of(case)
    return watch.grads(losses)


def state(model) -> dict:
    """What a call could leave behind in a model."""
    found = {n: (p.requires_grad, p.grad is None, p.data_ptr(), p.is_leaf, id(p)) for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        found[f"{name} (module)"] = (module.training, hooks)
    return found


@pytest.fixture
def judge():
    return _judge


def _judge(make_case: Callable[[], dict]) -> None:
    with fresh(make_case) as case:
        if case["change"]:
            losses_of(case)
            case["change"](case)
        expected = backward_by_backward(case)
        required = [name for name, p in case["model"].named_parameters() if p.requires_grad]
        names = set(case["names"] or required or expected)
        frozen = case["frozen"] and len(required) == len(expected)
    refused = []
    for way, freeze in ((by_grads, False), (by_watch, False), *([(by_factors, True)] if frozen else [])):
        with fresh(make_case) as case, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, seed = case["model"].requires_grad_(not freeze) if freeze else case["model"], case["seed"]
            if case["change"]:
                with contextlib.suppress(gradext.CaptureError):
                    way(case)
                case["change"](case)
            before = None if case["settles"] else state(model)
            for _ in range(2 if way is by_grads else 1):
                torch.manual_seed(seed or 0)
                try:
                    found = way(case)
                except gradext.CaptureError as error:
                    if case["outcome"] == "right":
                        raise
                    refused.append(str(error))
                else:
                    assert set(found) == names
                    if case["outcome"] == "refused":
                        pytest.fail(f"not refused, {_agreement(found, expected)}")
                    assert_right(found, expected, case["tolerance"])
                    assert not any(value.requires_grad for value in found.values())
                now = state(model)
                assert before in (None, now), "the model is not as it was"
                before = now
            if freeze:
                assert not any(p.requires_grad for p in model.parameters())
            elif case["trains"]:
                losses_of(case).sum().backward()
                total = {name: value.sum(0) for name, value in expected.items()}
                assert_right(gradients(model), total, case["tolerance"], largest_of(expected))
    assert all(refused) if refused else case["outcome"] != "refused"


def _agreement(found, expected) -> str:
    try:
        assert_right(found, expected)
    except AssertionError as error:
        return f"and wrong: {error}"
    return "though right"


@pytest.fixture
def right():
    """`assert_right`: no parameter's largest error is above 1e-9 of its largest gradient."""
    return assert_right


@pytest.fixture
def model_state():
    return state
