"""Offsets beyond 2^31 elements, by strides over untouched memory, and the peak memory of the routes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gradext import ops

pytestmark = pytest.mark.medium

FAR = (1 << 31) + 64  # elements; 4 bytes each are mapped and a few pages used


@pytest.fixture(scope="module")
def memory():
    try:
        return torch.empty(FAR + (1 << 16))
    except RuntimeError as error:
        pytest.skip(f"8 GiB of address space cannot be had: {error}")


def far(memory: torch.Tensor, start: int, *shape: int) -> torch.Tensor:
    """Two samples, 2^31 elements apart."""
    strides = [1]
    for n in reversed(shape[2:]):
        strides.insert(0, strides[0] * n)
    return memory.as_strided(shape, (FAR, *strides), start)


@pytest.mark.parametrize("T", [None, 3])
def test_offsets_beyond_32_bits(memory, backend, T):
    middle = () if T is None else (T,)
    delta, activation, out = far(memory, 0, 2, *middle, 5), far(memory, 100, 2, *middle, 40), far(memory, 400, 2, 5, 40)
    near = [torch.randn(2, *middle, n) for n in (5, 40)]
    delta.copy_(near[0])
    activation.copy_(near[1])
    reference, weight = torch.randn(5, 40), torch.randn(3, 5, 40)
    for name, extra in (
        ("outer", ()), ("sq_norm", ()), ("dot", (reference,)), ("linear", (weight,)), ("gram", "factors"),
    ):  # fmt: skip
        function = getattr(ops, name)
        expected = function(*near, *(near if extra == "factors" else extra), backend=backend)
        found = function(delta, activation, *((delta, activation) if extra == "factors" else extra), backend=backend)
        torch.testing.assert_close(found, expected)
    ops.outer(delta, activation, out=out, backend=backend)
    torch.testing.assert_close(out, ops.outer(*near, backend="reference"))


PEAK = """
import sys, torch, gradext
torch.set_num_threads(1)
B, T, O, I = 32, int(sys.argv[1]), 2048, 1024
size = B * O * I * 4
shape = (B,) if T == 1 else (B, T)
factors = gradext.GradFactors(torch.randn(*shape, I), torch.randn(*shape, O))
reference, weight = torch.randn(O, I), torch.randn(2, O, I)
small = gradext.GradFactors(torch.randn(*shape, 8), torch.randn(*shape, 8))
routes = {
    "norm": lambda f, R, W: f.norm(), "sq_norm": lambda f, R, W: f.sq_norm(), "dot": lambda f, R, W: f.dot(R),
    "cosine": lambda f, R, W: f.cosine(R), "gram": lambda f, R, W: f.gram(), "linear": lambda f, R, W: f.linear(W),
    "sum": lambda f, R, W: f.sum(), "mean": lambda f, R, W: f.mean(), "diag_fisher": lambda f, R, W: f.diag_fisher(),
}
def peak():  # not ru_maxrss, which a child inherits from the process that started it
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

for function in routes.values():
    function(small, reference[:8, :8], weight[:, :8, :8])
for name, function in routes.items():
    before = peak()
    function(factors, reference, weight)
    print(name, (peak() - before) / size)
before = peak()
factors.materialize()
print("materialize", (peak() - before) / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
@pytest.mark.parametrize("T", [1, 4])
def test_peak_memory_of_factored_routes(T):
    """A small part of what the gradients would take, which is what `materialize` shows that the measure sees."""
    environment = {**os.environ, "GRADEXT_WORKSPACE_MB": "0"}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(T)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr
    rows = dict(line.split() for line in run.stdout.splitlines())
    assert float(rows.pop("materialize")) > 0.5
    for name, share in rows.items():
        assert float(share) < 0.3, f"{name}: {share} of [B, O, I]"
