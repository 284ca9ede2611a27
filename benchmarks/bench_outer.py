"""The outer product alone: GB/s of the output beside the machine's own ceiling, and `torch.mul(out=)`, in one run.

The bytes counted are those of the output, B·O·I·size; the inputs are a thousandth of it. The ceiling is a fill of the
same bytes: by streaming stores beyond the cache, by `Tensor.fill_` inside it.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from gradext import native, ops

SHAPES = {  # name: (B, O, I, type)
    "MNIST VAE, last layer": (256, 784, 400, torch.float32),
    "MNIST VAE, first layer": (1024, 400, 20, torch.float32),
    "odd": (256, 783, 399, torch.float32),
    "wide": (16, 3072, 1024, torch.float32),
    "bf16": (256, 784, 400, torch.bfloat16),
    "fp64": (128, 784, 400, torch.float64),
    "inside the cache": (16, 400, 100, torch.float32),
    "one sample": (1, 784, 400, torch.float32),
    "tiny": (1, 20, 10, torch.float32),
}


@pytest.mark.skipif(native.C is None, reason=f"compiled module missing: {native.reason}")
@pytest.mark.parametrize("name", SHAPES)
def test_outer(benchmark, name, smoke, report):
    B, O, I, dtype = SHAPES[name]
    B = min(B, 4) if smoke else B
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(B, O, generator=generator).to(dtype)
    activation = torch.randn(B, I, generator=generator).to(dtype)
    out = torch.empty(B, O, I, dtype=dtype)
    size = out.numel() * out.element_size()
    d, a = delta[:, :, None], activation[:, None, :]
    routes = {
        "gradext": lambda: ops.outer(delta, activation, out=out),
        "torch.mul(out=)": lambda: torch.mul(d, a, out=out),
        "streaming fill": lambda: native.C.nt_fill_cpu(out.data_ptr(), size, torch.get_num_threads()),
        "fill_": lambda: out.fill_(0.0),
    }
    routes["gradext"]()
    expected = (delta.double()[:, :, None] * activation.double()[:, None, :]).to(dtype)
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=0)
    del expected
    benchmark.group = "outer product"
    benchmark(routes["gradext"])
    repeats = max(1, int(2e-3 / (size / 2e10 + 5e-6)))
    times: dict[str, list[float]] = {route: [] for route in routes}
    for _ in range(2 if smoke else 15):
        for route, call in routes.items():
            call()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[route].append((time.perf_counter() - start) / repeats)
    median = {route: statistics.median(values) for route, values in times.items()}
    rates = ", ".join(f"{route} {size / t / 1e9:.1f}" for route, t in median.items())
    floor = min(median["streaming fill"], median["fill_"])
    report(
        f"{name} [{B}, {O}, {I}] {str(dtype).removeprefix('torch.')}, {size / 1e6:.2f} MB; GB/s: {rates}; "
        f"of the best fill {floor / median['gradext']:.2f}, against torch.mul(out=) "
        f"{median['torch.mul(out=)'] / median['gradext']:.2f}x"
    )
