"""Oracles and fixtures that all tests use: per-sample gradients by a loop and by `vmap(grad)`."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from gradext.backends import BACKENDS

LONGER = ("medium", "slow", "peers", "zoo")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if not any(item.get_closest_marker(name) for name in LONGER):
            item.add_marker("quick")


if importlib.util.find_spec("hypothesis"):  # which the tests of the GPU do without
    from hypothesis import HealthCheck, settings

    # For the tests that set none of their own: the same examples in every run, or, by --hypothesis-profile, new ones.
    _COMMON = {
        "deadline": None,
        "suppress_health_check": [
            HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much,
        ],
    }  # fmt: skip
    settings.register_profile("quick", max_examples=25, derandomize=True, database=None, **_COMMON)
    settings.register_profile("few", max_examples=4, derandomize=True, database=None, **_COMMON)
    settings.register_profile("thorough", max_examples=300, print_blob=True, **_COMMON)
    settings.load_profile("quick")


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


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's zeros [N, 64] in [0, 1], as normal samples, and all its other digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.data / 16).astype("float32")
    x.flags.writeable = False  # it is everybody's
    return x[bunch.target == 0], x[bunch.target != 0]


@pytest.fixture(scope="session")
def pytorch_ood():
    """`pytorch_ood.detector`, theirs."""
    declare_torchvision_operators()
    pytest.importorskip("pytorch_ood")
    import pytorch_ood.detector

    return pytorch_ood.detector


def declare_torchvision_operators() -> None:
    """Let torchvision, which pytorch-ood imports, be imported where its compiled operators do not load.

    The wheels of the package index are built for CUDA, and beside a torch without CUDA their import ends with "operator
    torchvision::nms does not exist" (pytorch/vision#9085). It asks for the names of two operators of box detection that
    neither pytorch-ood's detectors nor anything here calls; with these declared, all that runs is theirs.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns while the mode is on."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture
def largest_result():
    """The mode itself, to be entered where it is needed."""
    return LargestResult
