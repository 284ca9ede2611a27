"""Shared oracles: what a per-sample gradient is, written the two slow ways that nobody doubts."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gradext.backends import BACKENDS


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The tensors here are small: sharing one between threads only makes the tests wait for each other."""
    torch.set_num_threads(1)


def _call(x) -> tuple[tuple, dict]:
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, tuple) else ((x,), {})


def _first(output) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _map(function, x):
    if isinstance(x, Mapping):
        return {key: function(value) for key, value in x.items()}
    return tuple(map(function, x)) if isinstance(x, tuple) else function(x)


def loop_grads(model: nn.Module, x, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """One backward pass for each sample alone; ``loss(output [1, ...], target [1, ...]) -> [1]``."""
    model = copy.deepcopy(model).requires_grad_()
    parameters = dict(model.named_parameters())
    found = {name: [] for name in parameters}
    with torch.inference_mode(False), torch.enable_grad():
        for b in range(len(target)):
            args, kwargs = _call(_map(lambda v, b=b: v[b : b + 1].detach().clone(), x))
            value = loss(_first(model(*args, **kwargs)), target[b : b + 1].detach().clone())
            grads = torch.autograd.grad(value.sum(), list(parameters.values()), materialize_grads=True)
            for name, gradient in zip(parameters, grads, strict=True):
                found[name].append(gradient)
    return {name: torch.stack(grads) for name, grads in found.items()}


def vmap_grads(model: nn.Module, x, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """``torch.func.vmap(torch.func.grad(...))`` over the model's parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def value(parameters, x, target):
        args, kwargs = _call(_map(lambda v: v.unsqueeze(0), x))
        return loss(_first(functional_call(model, parameters, args, kwargs)), target.unsqueeze(0)).sum()

    return vmap(grad(value), (None, 0, 0))(parameters, x, target)


@pytest.fixture(params=[loop_grads, vmap_grads], ids=["loop", "vmap"])
def oracle(request):
    return request.param


@pytest.fixture
def loop():
    return loop_grads


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The CUDA compiler, as setup.py finds it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")
    if not found:
        pytest.skip("nvcc is neither in CUDA_HOME nor on PATH")
    return found


@pytest.fixture(scope="session")
def cuda_includes(nvcc) -> list[str]:
    """The folders of the CUDA toolkit's headers."""
    plan = subprocess.run([nvcc, "-dryrun", "-o", "a.out", "a.o"], capture_output=True, text=True, check=True).stderr
    words = " ".join(line for line in plan.splitlines() if "INCLUDES=" in line).replace('"', " ").split()
    return [word.removeprefix("-I") for word in words if os.path.isdir(word.removeprefix("-I"))]


@pytest.fixture(params=[name for name, module in BACKENDS.items() if name in ("cpu", "reference")])
def backend(request):
    """Every backend that works on the CPU, by name."""
    reason = BACKENDS[request.param].available()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param
