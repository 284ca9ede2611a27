"""The operators alone: GB/s and GFLOP/s beside the ceilings of the machine, measured in the same run.

Outer product: the bytes counted are those of the output, B·O·I·size; the inputs are a thousandth of it. Its ceiling is
a fill of the same bytes: by streaming stores beyond the cache, by `Tensor.fill_` inside it. Contractions: the
operations and the bytes that are read are counted; their ceilings are a matrix product and a sum over the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gradext import GradFactors, backends, native, ops

from . import measure

OUTER = {  # name: (B, O, I, type)
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
SECONDS = {"smoke": 0.2, "default": 1.5, "full": 3.0}  # of measuring for a shape


@pytest.mark.skipif(native.C is None, reason=f"compiled module missing: {native.reason}")
@pytest.mark.parametrize("name", OUTER)
def test_outer(benchmark, name, smoke, grid, kept_rows, report):
    if kept_rows.has(kind="operator", operator="outer", name=name):
        pytest.skip("measured already")
    B, O, I, dtype = OUTER[name]
    B = min(B, 4) if smoke else B
    delta, activation = _factors(B, 1, O, I, dtype)
    out = torch.empty(B, O, I, dtype=dtype)
    size = out.numel() * out.element_size()
    d, a = delta[:, :, None], activation[:, None, :]
    routes = {
        "gradext": lambda: ops.outer(delta, activation, out=out),
        "its kernel": lambda: backends.cpu.outer(delta, activation, out),  # past the operator's checks
        "torch.mul(out=)": lambda: torch.mul(d, a, out=out),
        "streaming fill": lambda: native.C.nt_fill_cpu(out.data_ptr(), size, torch.get_num_threads()),
        "fill_": lambda: out.fill_(0.0),
    }
    routes["gradext"]()
    expected = (delta.double()[:, :, None] * activation.double()[:, None, :]).to(dtype)
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=0)
    del expected
    benchmark.group = "outer product"
    benchmark.pedantic(routes["gradext"], rounds=3 if smoke else 50, warmup_rounds=1)
    ms = _milliseconds(routes, grid)
    rates = {route: size / t / 1e6 for route, t in ms.items()}
    floor = min(ms["streaming fill"], ms["fill_"])
    kept_rows.append({
        "kind": "operator", "operator": "outer", "name": name, "B": B, "T": 1, "O": O, "I": I, "bytes": size,
        "operations": B * O * I, "ms": ms,
    })  # fmt: skip
    report(
        f"{name} [{B}, {O}, {I}] {str(dtype).removeprefix('torch.')}, {size / 1e6:.2f} MB; GB/s: "
        f"{', '.join(f'{route} {rate:.1f}' for route, rate in rates.items())}; "
        f"of the best fill {floor / ms['gradext']:.2f}, against torch.mul(out=) "
        f"{ms['torch.mul(out=)'] / ms['gradext']:.2f}x"
    )


class Contraction(NamedTuple):
    """An operator on factors, its operand's shape, the operations it needs at least, and its fp64 oracle.

    ``operations(B, T, O, I)`` counts multiplications and additions, of the cheapest way there is for the shape.
    """

    call: Callable[..., Tensor]
    operand: Callable[[int, int], tuple[int, ...]] | None
    operations: Callable[[int, int, int, int], int]
    oracle: Callable[..., Tensor]


H = 10  # functionals

CONTRACTIONS = {
    "sq_norm": Contraction(
        ops.sq_norm,
        None,
        lambda B, T, O, I: 2 * B * (O + I) if T == 1 else 2 * B * T * min(T * (O + I), O * I),
        lambda gradients: gradients.square().sum((1, 2)),
    ),
    "dot": Contraction(
        ops.dot,
        lambda O, I: (O, I),
        lambda B, T, O, I: 2 * B * T * O * I,
        lambda gradients, reference: (gradients * reference).sum((1, 2)),
    ),
    "linear": Contraction(
        ops.linear,
        lambda O, I: (H, O, I),
        lambda B, T, O, I: 2 * B * O * I * min(T * H, T + H),
        lambda gradients, weight: gradients.flatten(1) @ weight.flatten(1).mT,
    ),
    "gram": Contraction(
        lambda delta, activation: GradFactors(activation, delta).gram(),
        None,
        lambda B, T, O, I: 2 * B * min(B * T * T * (O + I), B * O * I + T * O * I),
        lambda gradients: gradients.flatten(1) @ gradients.flatten(1).mT,
    ),
}
SHAPES = {"MNIST VAE, last layer": (1024, 1, 784, 400), "wide": (256, 1, 3072, 1024), "sequence": (256, 16, 256, 128)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", CONTRACTIONS)
def test_contraction(benchmark, operator, shape, smoke, grid, kept_rows, report):
    if kept_rows.has(kind="operator", operator=operator, name=shape):
        pytest.skip("measured already")
    B, T, O, I = SHAPES[shape]
    B = min(B, 4) if smoke else B
    contraction = CONTRACTIONS[operator]
    delta, activation = _factors(B, T, O, I)
    operands = [torch.randn(contraction.operand(O, I))] if contraction.operand else []
    _check(contraction, delta, activation, operands)
    size = sum(t.nbytes for t in (delta, activation, *operands))
    operations = contraction.operations(B, T, O, I)
    numbers = torch.randn(max(1, size // 4))
    N = 64 if smoke else 1024
    matrix, product = torch.randn(N, N), torch.empty(N, N)
    routes = {
        "gradext": lambda: contraction.call(delta, activation, *operands),
        "matrix product": lambda: torch.mm(matrix, matrix, out=product),
        "sum of the same bytes": lambda: numbers.sum(),
    }
    benchmark.group = operator
    benchmark.pedantic(routes["gradext"], rounds=3 if smoke else 50, warmup_rounds=1)
    ms = _milliseconds(routes, grid)
    kept_rows.append({
        "kind": "operator", "operator": operator, "name": shape, "B": B, "T": T, "O": O, "I": I, "bytes": size,
        "operations": operations, "ms": ms, "ceiling_operations": 2 * N**3,
    })  # fmt: skip
    report(
        f"{operator} {shape}, B = {B}, T = {T}, O = {O}, I = {I}: {ms['gradext']:.3g} ms, "
        f"{operations / ms['gradext'] / 1e6:.1f} of {2 * N**3 / ms['matrix product'] / 1e6:.1f} GFLOP/s, "
        f"{size / ms['gradext'] / 1e6:.2f} of {size / ms['sum of the same bytes'] / 1e6:.2f} GB/s"
    )


GROWTH = {"B": 256, "O": 512, "I": 512}  # while one of them varies
SIZES = {"smoke": (4, 8), "default": (64, 512), "full": (64, 128, 256, 512, 1024, 2048)}


@pytest.mark.parametrize("axis", GROWTH)
def test_growth(axis, smoke, grid, kept_rows, report):
    """How the cost of every operator grows with B, O and I, one at a time."""
    for size in SIZES[grid]:
        if kept_rows.has(kind="growth", axis=axis, size=size):
            continue
        start = time.perf_counter()
        B, O, I = {**({"B": 4, "O": 8, "I": 8} if smoke else GROWTH), axis: size}.values()
        delta, activation = _factors(B, 1, O, I)
        out = torch.empty(B, O, I)
        calls = {"outer, out=": lambda d=delta, a=activation, out=out: ops.outer(d, a, out=out)}
        counted = {"outer, out=": B * O * I}
        calls["outer, out="]()
        expected = delta[:4, :, None] * activation[:4, None, :]
        torch.testing.assert_close(out[:4], expected, rtol=torch.finfo(out.dtype).eps, atol=0)
        for operator, contraction in CONTRACTIONS.items():
            operands = [torch.randn(contraction.operand(O, I))] if contraction.operand else []
            _check(contraction, delta[:4], activation[:4], operands)
            calls[operator] = lambda d=delta, a=activation, c=contraction, o=tuple(operands): c.call(d, a, *o)
            counted[operator] = contraction.operations(B, 1, O, I)
        ms = _milliseconds(calls, grid)
        kept_rows.append({
            "kind": "growth", "axis": axis, "size": size, "B": B, "O": O, "I": I, "ms": ms,
            "operations": counted,
        })  # fmt: skip
        times = ", ".join(f"{name} {t:.3g}" for name, t in ms.items())
        report(f"{axis} = {size} ({time.perf_counter() - start:.0f} s), ms: {times}")


def _factors(B: int, T: int, O: int, I: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    positions = () if T == 1 else (T,)
    return tuple(torch.randn(B, *positions, size, generator=generator).to(dtype) for size in (O, I))


def _check(contraction: Contraction, delta: Tensor, activation: Tensor, operands: list[Tensor]) -> None:
    """On a few samples, relative to the largest value: inner products can cancel."""
    delta, activation = delta[:4], activation[:4]
    gradients = ops.outer(delta.double(), activation.double(), backend="reference")
    expected = contraction.oracle(gradients, *(operand.double() for operand in operands))
    result = contraction.call(delta, activation, *operands).double()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def _milliseconds(calls: dict[str, Callable], grid: str) -> dict[str, float]:
    return {name: row["ms"] for name, row in measure.in_turns(calls, SECONDS[grid]).items()}
