"""Whole calls on the MNIST VAE's last decoder layer (784x400), B = 256: every route is checked, timed, and compared.

``pytest benchmarks/`` prints a table for each group, and the ratios of interleaved runs that README quotes.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import gradext
from gradext import native
from gradext.losses import bce
from gradext.oracles import loop_layer_grads, vmap_layer_grads

NAME = "decoder.2.weight"


@pytest.fixture(scope="module")
def x(smoke):
    return torch.rand(8 if smoke else 256, 784, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def routes(mnist_vae, x):
    """Route name -> a call that returns the gradients [B, 784, 400], or their norms [B]."""
    B = len(x)
    out = {NAME: torch.empty(B, 784, 400)}

    def by_hand():
        """What one writes in torch for just this model: the closed-form delta of sigmoid + BCE, into a fresh tensor."""
        with torch.no_grad():
            hidden = mnist_vae.decoder[:-2](mnist_vae._encode(x)[0])
            delta = mnist_vae.decoder[-2:](hidden) - x
            return delta[:, :, None] * hidden[:, None, :]

    def vmap_norm():
        return torch.linalg.vector_norm(vmap_layer_grads(mnist_vae, x, bce, [NAME])[NAME].flatten(1), dim=1)

    return {
        "single-sample loop": lambda: loop_layer_grads(mnist_vae, x, bce, [NAME])[NAME],
        "vmap(grad)": lambda: vmap_layer_grads(mnist_vae, x, bce, [NAME])[NAME],
        "by hand, closed form": by_hand,
        "gradext": lambda: gradext.batch_layer_grads(mnist_vae, x, layers="last")[NAME],
        "gradext, out=": lambda: gradext.batch_layer_grads(mnist_vae, x, layers="last", out=out)[NAME],
        "vmap(grad), norms": vmap_norm,
        "gradext factors, norms": lambda: gradext.batch_layer_factors(mnist_vae, x, layers="last").norm(),
    }


@pytest.fixture(scope="module")
def expected(routes):
    return routes["single-sample loop"]()


def check(value: torch.Tensor, expected: torch.Tensor) -> None:
    wanted = expected if value.ndim == 3 else torch.linalg.vector_norm(expected.flatten(1), dim=1)
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


ROUTES = ("single-sample loop", "vmap(grad)", "by hand, closed form", "gradext", "gradext, out=")
NORMS = ("vmap(grad), norms", "gradext factors, norms")


@pytest.mark.parametrize("route", [*ROUTES, *NORMS])
def test_layer_grads(benchmark, routes, expected, route):
    benchmark.group = "norms" if route in NORMS else "gradients"
    check(routes[route](), expected)
    slow = "loop" in route or "vmap" in route
    benchmark.pedantic(routes[route], rounds=3 if slow else 20, warmup_rounds=1)


@pytest.mark.skipif(native.C is None, reason=f"compiled module missing: {native.reason}")
def test_ratios(mnist_vae, x, routes, expected, smoke, report, peak_bytes):
    """In one run, each route in turn: gradext against vmap(grad), and the memory of the factors."""
    for call in routes.values():
        check(call(), expected)
    calls = {**routes, "forward pass alone": torch.no_grad()(lambda: mnist_vae(x))}  # the floor of every route
    times: dict[str, list[float]] = {route: [] for route in calls}
    for _ in range(2 if smoke else 7):
        for route, call in calls.items():
            call()  # each route finds caches and allocator as its own last call left them
            round_end = time.perf_counter() + 0.15
            while not times[route] or time.perf_counter() < round_end:  # the quick ones are noisy: many calls a round
                start = time.perf_counter()
                call()
                times[route].append(time.perf_counter() - start)
    median = {route: statistics.median(values) for route, values in times.items()}
    fresh = median["vmap(grad)"] / median["gradext"]
    reused = median["vmap(grad)"] / median["gradext, out="]
    norms = median["vmap(grad), norms"] / median["gradext factors, norms"]
    loop = median["single-sample loop"] / median["gradext, out="]
    native.C.workspace_empty_cache()
    full = peak_bytes(routes["gradext"])
    native.C.workspace_empty_cache()
    factors = peak_bytes(routes["gradext factors, norms"])
    report(
        "",
        f"median ms: {', '.join(f'{route} {1e3 * t:.2f}' for route, t in median.items())}",
        f"gradients, against vmap(grad):       {fresh:6.1f}x   (aim 4x)",
        f"gradients into out=, against vmap:   {reused:6.1f}x   (aim 8x)",
        f"gradients into out=, against a loop: {loop:6.1f}x",
        f"norms by factors, against vmap:      {norms:6.1f}x   (aim 40x)",
        f"peak memory of the factor route:     {factors / full:6.1%}   of {full / 1e6:.0f} MB (aim below 5%)",
    )
    if not smoke:  # machines are noisy: a guard against losing it, not the aim
        assert fresh >= 0.7 * 4
        assert reused >= 0.7 * 8
        assert norms >= 0.7 * 40
        assert factors / full < 0.05
