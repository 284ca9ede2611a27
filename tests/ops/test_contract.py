"""What every backend promises of every operator that it has: numbers, types, strides, outs, empty and far tensors.

Runs on plain torch, the CPU kernel, the CUDA kernels in an emulator, and on a GPU where there is one; under
TRITON_INTERPRET=1 on Triton's kernels alone (`test_triton.py` starts that process).
"""

import itertools

import pytest
import torch

from gradext.backends import triton
from gradext.backends.reference import accumulation_type

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CANARY = 7.0
# (B, T or None, O, I): ones, odd sizes, rows shorter than 16 bytes, whole and cut vectors, tiles with edges, T below,
# at and beyond a tile, by either route of the norms, and nothing.
SHAPES = [
    *((1, None, 1, 1), (3, None, 5, 7), (2, None, 33, 129), (2, None, 33, 256), (7, None, 10, 16), (2, None, 33, 1)),
    *((8, None, 20, 300), (2, None, 3, 1100), (2, None, 1030, 1), (70, None, 2, 3), (2, 1, 6, 35), (3, 2, 17, 9)),
    *((2, 5, 34, 48), (1, 16, 1, 3), (2, 33, 70, 65), (2, 70, 20, 18), (2, 260, 10, 12), (1, 64, 100, 120)),
    *([] if triton.interpreting() else [(4, None, 784, 400)]),
    *((0, None, 3, 2), (2, None, 0, 4), (2, None, 4, 0), (0, 20, 3, 4), (2, 0, 3, 4), (2, 2, 0, 3)),
]


def written(delta, activation):
    """The per-sample gradients themselves."""
    delta, activation = (x.unsqueeze(1) if x.ndim == 2 else x for x in (delta, activation))
    return torch.einsum("bto,bti->boi", delta, activation)


# Each operator by its definition, from the written gradients and its other operands.
DEFINITIONS = {
    "outer": lambda G: G,
    "sq_norm": lambda G: G.square().sum((1, 2)),
    "dot": lambda G, R: (G * R).sum((1, 2)),
    "linear": lambda G, W: torch.einsum("boi,hoi->bh", G, W),
    "gram": lambda G, d, a: G.flatten(1) @ written(d, a).flatten(1).mT,
    "weighted_sum": lambda G, w: G.sum(0) if w is None else torch.tensordot(w, G, dims=1),
    "project": lambda G, left, right: left.mT @ G @ right,
    "square_sum": lambda G: G.square().sum(0),
    "quadratic": lambda G, diag: (G.square() * diag).sum((1, 2)),
}


def draw(device, dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def factors(module, B, T, O, I, dtype=torch.float32, seed=0):
    leading = (B,) if T is None else (B, T)
    return [draw(module.DEVICE, dtype, *leading, n, seed=seed + k) for k, n in enumerate((O, I))]


def others(module, T, O, I, dtype):
    """(operator, its operands beside the factors) of all that the module has."""
    one = module.DEVICE, dtype
    weights = draw(module.DEVICE, torch.float32, 100).abs()
    for name, operands in (
        *(("outer", ()), ("sq_norm", ()), ("square_sum", ()), ("weighted_sum", (None,)), ("weighted_sum", (weights,))),
        *(("dot", (draw(*one, O, I),)), ("quadratic", (draw(*one, O, I),)), ("linear", (draw(*one, 3, O, I),))),
        ("gram", factors(module, 3, None if T is None else T + 1, O, I, dtype, seed=5)),
        ("project", (draw(*one, O, 5), draw(*one, I, 17))),
    ):
        if hasattr(module, name):
            yield name, operands


def check(module, name, delta, activation, *operands, **options):
    """Within eight roundings of the sum of the terms' sizes, and one of the result."""
    if name == "weighted_sum" and operands[0] is not None:
        operands = (operands[0][: len(delta)],)
    value = getattr(module, name)(delta, activation, *operands, **options)
    judge(module, value, name, delta, activation, *operands, **options)


def judge(module, value, name, delta, activation, *operands, dtype=None):
    exact, terms = (
        DEFINITIONS[name](written(turn(delta), turn(activation)), *(x if x is None else turn(x) for x in operands))
        for turn in (torch.Tensor.double, lambda x: x.double().abs())
    )
    assert value.shape == exact.shape
    assert value.dtype == (dtype or (delta.dtype if name == "outer" else accumulation_type(delta.dtype)))
    # Sums are in fp64 for fp64 results of fp64 factors.
    summed = max(torch.finfo(accumulation_type(x.dtype)).eps for x in (delta, value))
    rounding = torch.finfo(value.dtype).eps * exact.abs()
    if module is triton and name == "weighted_sum" and operands[0] is not None:  # whose weighted deltas are rounded
        rounding = torch.finfo(delta.dtype).eps * terms
    allowed = rounding + 8 * summed * terms + torch.finfo(value.dtype).smallest_normal
    assert ((value.double() - exact).abs() <= allowed).all()  # NaN fails too


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators(shape, dtype, module):
    delta, activation = factors(module, *shape, dtype)
    for name, operands in others(module, *shape[1:], dtype):
        check(module, name, delta, activation, *operands)


@pytest.mark.parametrize("T", [None, 3, 20])
def test_strided_inputs(T, module):
    """Sliced, transposed and expanded inputs (a stride of 0), and some off a 16-byte boundary, are read in place."""
    leading = (4,) if T is None else (4, T)
    delta = factors(module, 4, T, 20, 1)[0][..., 1:-1:2]
    activation = factors(module, 4, T, 1, 21)[1].mT.contiguous().mT
    shifted = torch.cat([activation.new_zeros(1), activation.flatten()])[1:].view(activation.shape)
    for d, a in (
        (delta, activation),
        (delta[:1].expand(*leading, 9), shifted),
        (delta[..., :1].expand(*leading, 9), activation[:1].expand(*leading, 21)),
    ):
        for name, operands in others(module, T, 9, 21, torch.float32):
            turned = (x if x is None or x.ndim < 2 else x.mT.contiguous().mT for x in operands)
            check(module, name, d, a, *turned)


@pytest.mark.parametrize("T", [None, 3, 20])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_outer_converts(dtype, T, module):
    """From every type into every other, rounded once: exact where one product of half precision is."""
    delta, activation = factors(module, 3, T, 35, 50, dtype)
    for result in TYPES:
        if triton.interpreting() and {dtype, result} == {torch.bfloat16, torch.float64}:
            continue  # the interpreter copies bits from one to the other
        check(module, "outer", delta, activation, dtype=result)
        if T is None and dtype.itemsize == 2 and not triton.interpreting():  # which cuts what hardware rounds
            exact = (delta.double()[:, :, None] * activation.double()[:, None]).to(result)
            assert torch.equal(module.outer(delta, activation, dtype=result), exact)


@pytest.mark.parametrize("T", [None, 2, 20])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_outer_writes_into_out_and_nothing_beside_it(dtype, T, module):
    sizes = [1, 7, 40, 300] if not triton.interpreting() else [7, 40]
    for I, (gap_o, gap_b, offset) in itertools.product(sizes, [(0, 0, 0), (0, 5, 1), (3, 2, 3)]):
        O, row = 6, I + gap_o
        delta, activation = factors(module, 3, T, O, I, dtype)
        memory = torch.full((offset + 3 * (O * row + gap_b) + 64,), CANARY, dtype=dtype, device=module.DEVICE)
        out = memory.as_strided((3, O, I), (O * row + gap_b, row, 1), offset)
        assert module.outer(delta, activation, out) is out
        judge(module, out, "outer", delta, activation)
        out.fill_(CANARY)
        assert (memory == CANARY).all()
    for out in (
        torch.empty(3, I, O, dtype=dtype, device=module.DEVICE).mT,
        torch.empty(6, 2 * O, 2 * I, dtype=dtype, device=module.DEVICE)[::2, ::2, ::2],
    ):
        assert module.outer(delta, activation, out) is out
        judge(module, out, "outer", delta, activation)


@pytest.mark.parametrize(("O", "I"), [(1, 9), (3, 27), (27, 2)])  # a depthwise convolution's, a first layer's
def test_sums_over_very_many_positions_do_not_drift(O, I, module, request):
    """Of numbers of one sign, added up one after the other, each step rounds in the same direction."""
    if module is triton or "emulator" in request.node.name:
        pytest.skip("Triton's kernels keep one running sum; test_cuda.py has the emulator's case, which takes seconds")
    delta, activation = (torch.rand(3, 65_537, n, device=module.DEVICE) for n in (O, I))
    exact = written(delta.double(), activation.double())
    for name, roundings in ("outer", 12), ("sq_norm", 24):
        if hasattr(module, name):
            found = getattr(module, name)(delta, activation)
            rtol = roundings * torch.finfo(torch.float32).eps
            torch.testing.assert_close(found.double(), DEFINITIONS[name](exact), rtol=rtol, atol=0)


def test_offsets_beyond_32_bits(module):
    """index · stride passes 2³¹ where neither does. The memory between is never touched."""
    stride = (1 << 30) + 8
    memory = torch.empty(2 * stride + 16, dtype=torch.float16, device=module.DEVICE)
    delta, activation = memory.as_strided((3, 4), (stride, 1)), memory[8:].as_strided((3, 4), (stride, 1))
    delta.copy_(torch.arange(12).view(3, 4))
    activation.copy_(torch.arange(12).view(3, 4) - 3)
    for name, operands in others(module, None, 4, 4, torch.float16):
        check(module, name, delta, activation, *operands)
    out = memory.as_strided((3, 2, 2), (stride, 2, 1))
    module.outer(delta[:, :2].clone(), activation[:, :2].clone(), out)
    assert out[2, 1, 1] == 9 * 6
