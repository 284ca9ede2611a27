"""The Triton operators against fp64 references, on the GPU where there is one, else under Triton's interpreter.

`test_triton.py` runs this file in a process of its own, since whether kernels are interpreted is fixed when triton is
imported. By hand: ``TRITON_INTERPRET=1 pytest tests/triton_operators.py``.
"""

import pytest
import torch

pytest.importorskip("triton")
from gradext import ops
from gradext.backends import reference, triton

if triton.available() is not None:
    pytest.skip(triton.available(), allow_module_level=True)
INTERPRETED = triton.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (B, T or None, O, I): ones, odd sizes, tiles with edges, sizes that 16 divides; T below, at and beyond a tile.
SHAPES = [
    (1, None, 1, 1), (3, None, 5, 7), (2, None, 33, 129), (2, None, 40, 272), (7, None, 10, 16), (2, 1, 6, 35),
    (3, 2, 17, 9), (2, 5, 34, 48), (2, 33, 20, 35), (2, 70, 20, 18), (1, 16, 1, 3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _bf16_products(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bf16 matrices; widen them, which loses nothing."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


def factors(B, T, O, I, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    leading = (B,) if T is None else (B, T)
    sizes = ((*leading, O), (*leading, I), (O, I), (3, O, I))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for size in sizes]


def check(operator, *operands, **options):
    """The error is at most twice that of plain torch in the same type, plus roundings of the largest sum of terms."""
    value = getattr(ops, operator)(*operands, backend="triton", **options)
    plain = getattr(reference, operator)
    exact = plain(*(x.double() for x in operands))
    expected = plain(*operands, **options)
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    if value.numel() == 0:
        return
    assert torch.isfinite(value).all()
    terms = plain(*(x.double().abs() for x in operands))
    precision = torch.finfo(reference.accumulation_type(operands[0].dtype)).eps
    allowed = 2 * (expected.double() - exact).abs().max() + 4 * precision * terms.max()
    if INTERPRETED and value.dtype == torch.bfloat16:  # the interpreter cuts what hardware rounds
        allowed = allowed + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    error = (value.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators(shape, dtype):
    delta, activation, gradient, weight = factors(*shape, dtype)
    check("outer", delta, activation)
    check("sq_norm", delta, activation)
    check("dot", delta, activation, gradient)
    check("linear", delta, activation, weight)


def test_norm_by_gradient_tiles():
    """Many positions of few features go through tiles of G."""
    delta, activation, *_ = factors(2, 260, 10, 12)
    check("sq_norm", delta, activation)


@pytest.mark.parametrize("shape", [(0, None, 3, 4), (2, None, 0, 4), (2, None, 4, 0), (2, 0, 3, 4), (0, 20, 3, 4)])
def test_empty(shape):
    """Sums of nothing are 0."""
    delta, activation, gradient, weight = factors(*shape, torch.bfloat16)
    B, O, I = shape[0], *shape[2:]
    for value, size in (
        (ops.outer(delta, activation, backend="triton"), (B, O, I)),
        (ops.sq_norm(delta, activation, backend="triton"), (B,)),
        (ops.dot(delta, activation, gradient, backend="triton"), (B,)),
        (ops.linear(delta, activation, weight, backend="triton"), (B, 3)),
        (ops.linear(delta, activation, weight[:0], backend="triton"), (B, 0)),
    ):
        assert value.shape == size
        assert (value == 0).all()


@pytest.mark.parametrize("T", [None, 3, 20])
def test_strided_inputs(T):
    """Sliced, transposed and expanded inputs (a stride of 0) are read in place."""
    _, _, gradient, weight = factors(4, T, 9, 21)
    leading = (4,) if T is None else (4, T)
    delta = factors(4, T, 20, 1)[0][..., 1:-1:2]
    activation = torch.randn(21, *leading).movedim(0, -1).to(DEVICE)
    for d, a in ((delta, activation), (delta[:1].expand(*leading, 9), activation), (delta, activation[:1].expand(
        *leading, 21))):  # fmt: skip
        check("outer", d, a)
        check("sq_norm", d, a)
        check("dot", d, a, gradient.mT.contiguous().mT)
        check("linear", d, a, weight[:, :1].expand(3, 9, 21))


@pytest.mark.parametrize("T", [None, 12])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_conversion_is_fused(T, dtype):
    for source in (torch.float32, torch.bfloat16, torch.float64):
        if INTERPRETED and {source, dtype} == {torch.bfloat16, torch.float64}:
            continue  # the interpreter copies bits from one to the other
        delta, activation, *_ = factors(2, T, 5, 19, source)
        check("outer", delta, activation, dtype=dtype)


@pytest.mark.parametrize("T", [None, 2, 12])
def test_out(T):
    """Any strides, any alignment, and nothing outside is touched."""
    delta, activation, *_ = factors(2, T, 6, 20)
    expected = reference.outer(delta, activation)
    outs = {
        "inner block": lambda base: base.view(4, 10, 25)[1:3, 2:8, 3:23],
        "by columns": lambda base: base[:240].view(2, 20, 6).mT,
        "unaligned": lambda base: base[1:241].view(2, 6, 20),
    }
    for name, view in outs.items():
        base = torch.full((1000,), 7.0, device=DEVICE)
        out = view(base)
        assert ops.outer(delta, activation, out=out, backend="triton") is out
        torch.testing.assert_close(out, expected, msg=lambda text, name=name: f"{name}: {text}")
        assert (base == 7.0).sum() == 1000 - 240, name


def test_offsets_beyond_32_bits():
    """index · stride passes 2³¹ where neither does. The memory between is never touched."""
    stride = (1 << 30) + 8
    memory = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE)
    delta, activation = memory.as_strided((3, 4), (stride, 1)), memory[8:].as_strided((3, 4), (stride, 1))
    delta.copy_(torch.arange(12).view(3, 4))
    activation.copy_(torch.arange(12).view(3, 4) - 3)
    check("outer", delta, activation)
    check("sq_norm", delta, activation)
    check("linear", delta, activation, torch.ones(2, 4, 4, dtype=torch.float16, device=DEVICE))
    out = memory.as_strided((3, 2, 2), (stride, 2, 1))
    ops.outer(delta[:, :2].clone(), activation[:, :2].clone(), out=out, backend="triton")
    assert out[2, 1, 1] == 9 * 6


def test_mixed_types():
    """A half-precision factor meets an fp32 weight in fp32."""
    delta, activation, *_ = factors(3, None, 6, 20, torch.bfloat16)
    *_, gradient, weight = factors(3, None, 6, 20)
    check("dot", delta, activation, gradient)
    check("linear", delta, activation, weight)


@pytest.mark.skipif(INTERPRETED, reason="one program takes 2 ms under the interpreter")
def test_many_samples():
    """More samples than the second and third axes of a grid could count."""
    for O, I in ((1, 3), (2, 1), (8, 128)):
        delta, activation, _, weight = factors(70_001, None, O, I)
        check("outer", delta, activation)
        check("sq_norm", delta, activation)
        check("linear", delta, activation, weight)
