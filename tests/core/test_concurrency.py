"""Threads, processes and nested calls: calls on one model take turns and restore its state and torch's.

What exceptions leave behind is tested in `core/test_watch.py`. An interrupt in the middle of a call's own bookkeeping
is not guarded against.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradext

from .common import Product, in_threads

B = 3


def squared(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="none").flatten(1).sum(1)


class Normalised(nn.Module):
    """With buffers that a forward in training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x).unflatten(1, (2, 3))).flatten(1))


class Scale(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


gradext.register_layer(Scale)(lambda layer, input, delta: {"scale": input * delta})


class Unseen(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight.mT) + self.bias


def chain(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), middle, nn.Linear(5, 6))


# What makes a model, and the options of a call: every way of the capture, with frozen weights and without.
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "plain": (lambda: chain(nn.ReLU()), {}),
    "frozen": (lambda: chain(nn.Hardswish()).requires_grad_(False), {}),
    "one layer of frozen ones": (lambda: chain(nn.CELU()).requires_grad_(False), {"layers": "2"}),
    "buffers": (lambda: Normalised().train(), {"layers": "second"}),
    "own rule": (lambda: nn.Sequential(nn.Linear(6, 6), Scale(6), nn.Linear(6, 6)), {}),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), {}),
    "general rule": (lambda: chain(nn.PReLU()), {}),
    "backwards": (lambda: chain(Unseen(5, 5)), {}),
    "frozen, backwards": (lambda: chain(Unseen(5, 5)).requires_grad_(False), {}),
    "mixing": (lambda: chain(nn.BatchNorm1d(5)).train(), {"mixing": "allow"}),
}


def build(name: str) -> tuple[nn.Module, Tensor, dict]:
    torch.manual_seed(0)
    make, options = PROBLEMS[name]
    return make(), torch.rand(B, 4, 6) if name == "attention" else torch.rand(B, 6), {"loss": "mse", **options}


def state_of(model: nn.Module) -> dict:
    """All that a call could leave behind, in the model and in torch."""
    found: dict = {
        "grad": torch.is_grad_enabled(),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
    }
    for name, module in model.named_modules():
        found[name, "training"] = module.training
        found[name, "attributes"] = set(module.__dict__)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found[name, hooks] = len(getattr(module, hooks))
    for name, p in model.named_parameters():
        found[name] = (id(p), p.requires_grad, p.is_leaf, p.data_ptr(), p.detach().flatten().tolist(), p.grad is None)
    for name, buffer in model.named_buffers():
        found[name] = (buffer.requires_grad, buffer.data_ptr(), buffer.flatten().tolist())
    return found


def grads_of(model: nn.Module, x: Tensor, options: dict) -> dict[str, Tensor]:
    return gradext.batch_layer_grads(model, x, **options)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "several models"])
@pytest.mark.filterwarnings("ignore:.*used where gradext cannot see it:UserWarning")
def test_stress(shared):
    """Threads on every kind of model at once, and all on the same ones: right results, and nothing is left behind."""
    built = {name: build(name) for name in PROBLEMS}
    expected = {name: grads_of(*problem) for name, problem in built.items()}
    before = {name: state_of(model) for name, (model, _, _) in built.items()}
    models = [built if shared else {name: build(name) for name in PROBLEMS} for _ in range(4)]
    switch = sys.getswitchinterval()

    def work(k: int) -> None:
        draw, own = random.Random(k), models[k]
        for _ in range(20):
            name = draw.choice(list(PROBLEMS))
            assert_same(grads_of(*own[name]), expected[name])

    sys.setswitchinterval(1e-5)
    try:
        in_threads(*(lambda k=k: work(k) for k in range(4)))
    finally:
        sys.setswitchinterval(switch)
    for name, (model, _, _) in built.items():
        assert state_of(model) == before[name], name


class Paused(nn.Sequential):
    """Stops in the middle of its forward, in a thread that asks for it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.local = threading.local()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
            getattr(self.local, "pause", lambda: None)()
        return x


@pytest.mark.parametrize("other_model", [False, True])
def test_calls_on_one_model_take_turns(other_model):
    """The second begins when the first has ended; on another model it does not wait."""
    model, x = Paused(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)).requires_grad_(False), torch.rand(B, 6)
    other = chain(nn.Tanh()) if other_model else model
    expected = [gradext.batch_layer_grads(m, x, loss="mse") for m in (model, other)]
    inside, over, found, order = threading.Event(), threading.Event(), {}, []

    def first() -> None:
        def pause() -> None:
            inside.set()
            over.wait(20 if other_model else 0.5)  # the second call ends meanwhile if it need not wait
            order.append("first")

        model.local.pause = pause
        found[0] = gradext.batch_layer_grads(model, x, loss="mse")

    def second() -> None:
        assert inside.wait(20)
        model.local.pause = lambda: order.append("second")
        found[1] = gradext.batch_layer_grads(other, x, loss="mse")
        order.append("second")
        over.set()

    in_threads(first, second)
    assert order[0] == ("second" if other_model else "first")
    assert order.index("second") in (0, order.count("first")), "one call is over before the other begins"
    for k in range(2):
        assert_same(found[k], expected[k])
    assert not any(p.requires_grad for p in model.parameters())


# --- processes -------------------------------------------------------------------------------------------------------

WORKERS = """
import multiprocessing, sys, threading
import torch, gradext

torch.set_num_threads(1)
inside, leave = threading.Event(), threading.Event()

class Paused(torch.nn.Sequential):
    pause = False

    def forward(self, x):
        if self.pause:
            inside.set()
            leave.wait(30)
        return super().forward(x)

def make():
    torch.manual_seed(0)
    return Paused(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 6)).requires_grad_(False)

def work(model, x, queue):
    torch.set_num_threads(1)
    model.pause = False
    grads = gradext.batch_layer_grads(model, x, loss="mse")
    queue.put({name: g.tolist() for name, g in grads.items()})

if __name__ == "__main__":
    method, in_the_middle = sys.argv[1], sys.argv[2] == "True"
    model, x = make(), torch.rand(3, 6)
    expected = {name: g.tolist() for name, g in gradext.batch_layer_grads(model, x, loss="mse").items()}
    if in_the_middle:  # of a call of another thread, when the workers begin
        model.pause = True
        other = threading.Thread(target=gradext.batch_layer_grads, args=(model, x), kwargs={"loss": "mse"})
        other.start()
        assert inside.wait(30)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    given = model if method == "fork" else make()
    workers = [context.Process(target=work, args=(given, x, queue), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0, worker.exitcode
    if in_the_middle:
        leave.set()
        other.join()
    assert found == [expected] * 2
    assert not any(p.requires_grad for p in model.parameters())
    print("right")
"""


@pytest.mark.medium
@pytest.mark.parametrize("in_the_middle", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method, in_the_middle, tmp_path):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork")
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    command = [sys.executable, script, method, str(in_the_middle)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "right", run.stderr


# --- nested calls ----------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Its forward looks at the gradients of a part of itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = inner, nn.Linear(6, 6)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        grads = gradext.batch_layer_grads(self.inner, x.detach(), loss="mse")
        weight = sum(gradient.flatten(1).norm(dim=1) for gradient in grads.values())
        if self.fails:
            raise RuntimeError("from the forward")
        return self.outer(self.inner(x)) * weight.unsqueeze(1)


@pytest.mark.parametrize("frozen", [False, True])
def test_nested_calls(frozen, loop):
    torch.manual_seed(0)
    model, x = Nested(chain(nn.Tanh())).requires_grad_(not frozen), torch.rand(B, 6)
    before = state_of(model)
    expected = loop(model, x, x, squared)

    def nested(output: Tensor, target: Tensor) -> Tensor:
        return squared(output, target) + 0 * gradext.batch_layer_factors(model, x, loss="mse")["outer.weight"].norm()

    for loss in "mse", nested:
        gradients = gradext.batch_layer_grads(model, x, loss=loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    model.fails = True
    with pytest.raises(RuntimeError, match="from the forward"):
        gradext.batch_layer_grads(model, x, loss="mse")
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["frozen", "buffers", "own rule", "backwards"])
@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
@pytest.mark.filterwarnings("ignore:.*used where gradext cannot see it:UserWarning")
def test_an_exception_in_the_middle_leaves_no_trace(name, where):
    model, x, options = build(name)
    expected, before = grads_of(model, x, options), None

    def fail(*arguments):
        raise RuntimeError(f"from the {where}")

    def broken(output: Tensor, target: Tensor) -> Tensor:
        if where == "loss":
            fail()
        output.register_hook(fail)
        return squared(output, target)

    last = list(model.modules())[-1]
    handle = last.register_forward_hook(fail) if where == "forward" else None
    before = state_of(model)
    with pytest.raises(RuntimeError, match=f"from the {where}"):
        grads_of(model, x, options if where == "forward" else {**options, "loss": broken})
    assert state_of(model) == before
    if handle is not None:
        handle.remove()
    assert_same(grads_of(model, x, options), expected)
