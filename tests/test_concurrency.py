"""Threads, processes, nested calls, exceptions, interrupts: the model, torch's state and later calls are untouched."""

from __future__ import annotations

import ast
import collections
import contextlib
import linecache
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

import gradext
from gradext import borrowing, capture
from gradext.errors import UnsupportedLayerError

B = 3


def squared(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="none").flatten(1).sum(1)


class Normalised(nn.Module):
    """With buffers that a forward in training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
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


def chain(middle: nn.Module, end: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), middle, nn.Linear(5, 6), *([] if end is None else [end]))


# What makes a model, and the options of a call: every route through capture, with frozen weights and without.
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "closed form": (lambda: chain(nn.ReLU(), nn.Sigmoid()), {}),
    "read": (lambda: chain(nn.Hardswish()), {"loss": squared}),
    "frozen": (lambda: chain(nn.Hardswish()).requires_grad_(False), {}),
    "last of frozen": (lambda: chain(nn.CELU()).requires_grad_(False), {"layers": "last"}),
    "buffers": (lambda: Normalised().train(), {"layers": "second"}),
    "own rule": (lambda: nn.Sequential(nn.Linear(6, 6), Scale(6), nn.Linear(6, 6)), {"layers": "all"}),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), {"layers": "all"}),
    "sums": (lambda: chain(nn.Tanh()).requires_grad_(False), {"check": "sum"}),
    "fallback": (lambda: chain(nn.PReLU()), {"layers": "all", "fallback": "loop"}),
}


def build(name: str) -> tuple[nn.Module, Tensor, dict]:
    torch.manual_seed(0)
    make, options = PROBLEMS[name]
    return make(), torch.rand(B, 4, 6) if name == "attention" else torch.rand(B, 6), {"loss": "mse", **options}


def state_of(model: nn.Module) -> dict:
    """All that a call could leave behind, in the model, in torch and in gradext."""
    found: dict = {
        "grad": torch.is_grad_enabled(),
        "modes": torch._C._len_torch_function_stack(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast depth": autocast_depth(),
        "torch functions": str(torch._C._get_torch_function_state()),
        "rows": capture._SHARED_ROWS.get(),
        "loans": len(borrowing._loans),
        "lock": borrowing._lock.locked(),
        "exchange": borrowing.exchange.thread,
    }
    for name, module in model.named_modules():
        found[name, "training"] = module.training
        found[name, "attributes"] = set(module.__dict__)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found[name, hooks] = len(getattr(module, hooks))
    for name, p in model.named_parameters():
        found[name] = (p.requires_grad, p.is_leaf, p.data_ptr(), p.detach().flatten().tolist(), p.grad is None)
    for name, buffer in model.named_buffers():
        found[name] = (buffer.requires_grad, buffer.data_ptr(), buffer.flatten().tolist())
    return found


def autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def grads_of(model: nn.Module, x: Tensor, options: dict) -> dict[str, Tensor]:
    return gradext.batch_layer_grads(model, x, **options)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


# --- threads ---------------------------------------------------------------------------------------------------------


def in_threads(*functions: Callable[[], None]) -> None:
    problems: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if problems:
        raise problems[0]


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "several models"])
def test_stress(shared):
    """Threads on every kind of model at once, and all on the same ones: right results, and nothing is left behind."""
    built = {name: build(name) for name in PROBLEMS}
    expected = {name: grads_of(*problem) for name, problem in built.items()}
    before = {name: state_of(model) for name, (model, _, _) in built.items()}
    models = [built if shared else {name: build(name) for name in PROBLEMS} for _ in range(4)]
    switch = sys.getswitchinterval()

    def work(k: int) -> None:
        draw, own = random.Random(k), models[k]
        for _ in range(30):
            name = draw.choice(list(PROBLEMS))
            model, x, options = own[name]
            if name == "buffers" and shared:  # the power iteration of another thread moves the weight meanwhile
                grads_of(model, x, options)
            else:
                assert_same(grads_of(model, x, options), expected[name])

    sys.setswitchinterval(1e-5)
    try:
        in_threads(*(lambda k=k: work(k) for k in range(4)))
    finally:
        sys.setswitchinterval(switch)
    for name, (model, _, _) in built.items():
        assert state_of(model) == before[name], name


class Hidden(torch.autograd.Function):
    """Multiplies by a weight where gradext cannot see it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, delta):
        x, weight = ctx.saved_tensors
        return delta @ weight.mT, x.mT @ delta


class Paused(nn.Module):
    """Stops in the middle of its forward, in a thread that asks for it."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))
        self.hidden, self.local = hidden, threading.local()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x).tanh()
        getattr(self.local, "pause", lambda: None)()
        return Hidden.apply(x, self.second.weight) + self.second(x) if self.hidden else self.second(x)


def overlapping(model: Paused, x: Tensor) -> list:
    """Two calls of which the first ends in the middle of the second; what they returned or raised."""
    first_inside, second_inside, first_over = threading.Event(), threading.Event(), threading.Event()
    found: list = [None, None]

    def call(k: int, pause: Callable[[], object]) -> None:
        model.local.pause = pause
        try:
            found[k] = gradext.batch_layer_grads(model, x, loss="mse")
        except Exception as error:
            found[k] = error

    def first() -> None:
        call(0, lambda: (first_inside.set(), second_inside.wait(20)))
        first_over.set()

    def second() -> None:
        first_inside.wait(20)
        call(1, lambda: (second_inside.set(), first_over.wait(20)))

    in_threads(first, second)
    return found


def test_a_call_that_ends_does_not_freeze_the_weights_of_another():
    """A use of a frozen weight that gradext cannot see left no trace then, and half of the gradient passed for all."""
    x = torch.rand(B, 6)
    for found in overlapping(Paused(hidden=True).requires_grad_(False), x):
        assert isinstance(found, UnsupportedLayerError)
    model = Paused().requires_grad_(False).eval()
    expected = gradext.batch_layer_grads(model, x, loss="mse")
    for found in overlapping(model, x):
        assert_same(found, expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_overlapping_calls_leave_buffers_as_they_were_before_the_first():
    model = Paused().train()
    overlapping(model, torch.rand(B, 6))
    assert model.calls == 0
    assert not borrowing._loans


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fallback", ["loop", "vmap"])
def test_a_call_with_a_fallback_does_not_disturb_one_without(fallback, frozen):
    """It exchanges the model's parameters for others, which another thread's forward could meet."""

    class Twice(Paused):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    torch.manual_seed(0)
    model, x = Twice().requires_grad_(not frozen).eval(), torch.rand(B, 6)
    hidden = nn.Sequential(model, chain(nn.PReLU())[1])  # its last layer has no rule
    expected = gradext.batch_layer_grads(model, x, loss="mse")
    begun, inside, over = threading.Event(), threading.Event(), threading.Event()
    found: list = []
    weight = model.first._parameters["weight"]

    def pause_of_the_exchanged() -> None:
        if model.first._parameters["weight"] is not weight and not inside.is_set():
            inside.set()
            over.wait(20)

    def pause() -> None:
        if begun.is_set():
            over.set()
        else:
            begun.set()
            inside.wait(20)

    def with_fallback() -> None:
        assert begun.wait(20)
        model.local.pause = pause_of_the_exchanged
        gradext.batch_layer_grads(hidden, x, loss="mse", layers="all", fallback=fallback)

    def without() -> None:
        model.local.pause = pause
        found.append(gradext.batch_layer_grads(model, x, loss="mse"))

    in_threads(with_fallback, without)
    assert_same(found[0], expected)


# --- processes -------------------------------------------------------------------------------------------------------

WORKERS = """
import multiprocessing, sys, threading
import torch, gradext

torch.set_num_threads(1)
torch.manual_seed(0)
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
    frozen = not any(p.requires_grad for p in model.parameters())
    grads = gradext.batch_layer_grads(model, x, loss="mse")
    queue.put((frozen, {name: g.tolist() for name, g in grads.items()}))

if __name__ == "__main__":
    model, x = make(), torch.rand(3, 6)
    expected = {name: g.tolist() for name, g in gradext.batch_layer_grads(model, x, loss="mse").items()}
    model.pause = True
    other = threading.Thread(target=gradext.batch_layer_grads, args=(model, x), kwargs={"loss": "mse"})
    other.start()  # in the middle of a forward, for which the weights require grad, when the workers begin
    assert inside.wait(30)
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    given = model if sys.argv[1] == "fork" else make()
    workers = [context.Process(target=work, args=(given, x, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0, worker.exitcode
    leave.set()
    other.join()
    assert found == [(True, expected)] * 2
    assert not any(p.requires_grad for p in model.parameters())
    print("right")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method, tmp_path):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork")
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    run = subprocess.run([sys.executable, script, method], capture_output=True, text=True, timeout=300)
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
        return squared(output, target) + 0 * gradext.batch_layer_factors(model, x, loss="mse")["outer"].norm()

    for loss in "mse", nested:
        gradients = gradext.batch_layer_grads(model, x, loss=loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    model.fails = True
    with pytest.raises(RuntimeError, match="from the forward"):
        gradext.batch_layer_grads(model, x, loss="mse")
    assert state_of(model) == before


# --- exceptions and interrupts ---------------------------------------------------------------------------------------


class Interrupter:
    """Raises KeyboardInterrupt the k-th time that a call comes to a line of Python, in gradext, torch or the model.

    Where a block ends that holds a lock a line seems to begin too, but Python looks for signals there only when the
    lock has been released.
    """

    def __init__(self) -> None:
        self.times: collections.Counter[tuple[str, int]] = collections.Counter()
        self.stop: tuple[tuple[str, int], int] | None = None

    def __call__(self, frame, event, argument):
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            self.times[line] += 1
            if (line, self.times[line]) == self.stop:
                raise KeyboardInterrupt
        return self

    def run(self, call: Callable[[], object], stop: tuple[tuple[str, int], int] | None = None) -> bool:
        """Whether the call was interrupted."""
        self.times.clear()
        self.stop = stop
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False


# What may be around a call. Torch's own way out of them is what an interrupt inside of a call can spoil.
AROUND: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "nothing": contextlib.nullcontext,
    "no grad": torch.no_grad,
    "a mode": BaseTorchFunctionMode,
    "autocast": lambda: torch.autocast("cpu"),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize(
    ("name", "around"),
    [
        *((name, "nothing") for name in PROBLEMS),
        *(("read", around) for around in AROUND if around != "nothing"),
        *(("fallback", around) for around in ("no grad", "a mode", "autocast")),
    ],
)
def test_an_interrupt_at_any_line_leaves_no_trace(name, around):
    """Every line that a call runs is interrupted once, at one of the times that it is run."""
    model, x, options = build(name)
    with AROUND[around]():
        for _ in range(2):  # the first call finds out by which route later ones may go
            expected = grads_of(model, x, options)
        before = state_of(model)
        interrupter, draw = Interrupter(), random.Random(0)
        assert not interrupter.run(lambda: grads_of(model, x, options))
        places = dict(interrupter.times)
        interrupted = 0
        for line, times in places.items():
            if "with _lock" in (code := linecache.getline(*line)) or "with exchange.lock" in code:
                continue
            interrupted += interrupter.run(lambda: grads_of(model, x, options), (line, draw.randint(1, times)))
            assert state_of(model) == before, line
        assert interrupted > len(places) / 2
        assert_same(grads_of(model, x, options), expected)


def test_no_comprehension_can_pass_the_end_of_a_block_by():
    """Python 3.12 and later run them in the block's own frame, and can skip the block's end when one is interrupted."""
    blocks = []
    for path in Path(gradext.__file__).parent.rglob("*.py"):
        for block in ast.walk(ast.parse(path.read_text())):
            if isinstance(block, ast.With):
                ends = [ast.unparse(item.context_expr) for item in block.items]
                if len(set(ends)) < len(ends) or any(end.endswith("lock") for end in ends):
                    blocks.append((path, block))
    assert len(blocks) > 10
    for path, block in blocks:
        stack: list[ast.AST] = list(block.body)
        while stack:
            node = stack.pop()
            place = f"{path}:{getattr(node, 'lineno', block.lineno)}"
            assert not isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp)), place
            if not isinstance(node, (ast.FunctionDef, ast.Lambda, ast.GeneratorExp)):
                stack += ast.iter_child_nodes(node)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", PROBLEMS)
def test_signals_at_any_moment_leave_no_trace(name, around):
    """Other moments in every run; ``pytest -s`` tells how many."""
    if (name, around) == ("fallback", "inference mode"):
        pytest.skip("autograd cannot differentiate there")
    model, x, options = build(name)
    armed, interrupted, seed = False, 0, random.SystemRandom().getrandbits(32)
    draw = random.Random(seed)

    def interrupt(number, frame):
        if armed:
            raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        with AROUND[around]():
            for _ in range(2):
                expected = grads_of(model, x, options)
            begin = time.perf_counter()
            grads_of(model, x, options)
            longest, before = 1.2 * (time.perf_counter() - begin), state_of(model)
            for _ in range(1000):
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, longest))
                try:
                    armed = True
                    grads_of(model, x, options)
                    armed = False
                except KeyboardInterrupt:
                    interrupted += 1
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert state_of(model) == before, seed
            assert_same(grads_of(model, x, options), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert interrupted
    print(f"{name}, {around}: {interrupted} interrupts")


@pytest.mark.parametrize("name", ["frozen", "buffers", "own rule"])
@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
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
