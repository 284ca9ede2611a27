"""The CUDA backend without a GPU: its kernels compiled as plain C++ and run on the CPU, block by block.

`cuda_emulator` stands for the CUDA runtime. What it cannot show is the hardware's own: speed, memory ordering, and the
last bits of exp, erf and tanh.
"""

import itertools
import mmap
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from gradext import GradFactors, LayerFactors, backends, ranges
from gradext.backends import cpu, cuda
from gradext.backends.reference import accumulation_type
from gradext.factors import ConvFactors, Windows

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SANITIZERS = os.environ.get("GRADEXT_TEST_SANITIZERS")  # set by test_sanitizers for a process of its own

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
PAIRS = [(F32, F32), (F32, F16), (F32, BF16), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32), (F64, F64)]
TYPES = (F32, F64, F16, BF16)
CANARY = 7.0

if not CSRC.is_dir():
    pytest.skip("no sources beside the tests", allow_module_level=True)


def factors(B, T, O, I, dtype=F32, seed=0):
    """[B, T, O] and [B, T, I], or without T where it is None."""
    generator = torch.Generator().manual_seed(seed)
    leading = (B,) if T is None else (B, T)
    return [torch.randn(*leading, n, generator=generator, dtype=F64).to(dtype) for n in (O, I)]


def guarded(B, O, I, dtype, gap_o=0, gap_b=0, offset=0):
    """An output with gaps between rows and samples, and the memory around it full of canaries."""
    out_o, out_b = I + gap_o, O * (I + gap_o) + gap_b
    memory = torch.full((offset + B * out_b + 64,), CANARY, dtype=dtype)
    return memory, memory.as_strided((B, O, I), (out_b, out_o, 1), offset)


def assert_nothing_else_written(memory, out):
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    assert (memory[outside] == CANARY).all()


def assert_outer(out, delta, activation):
    """One rounding of each product for T = 1; else at most twice torch's error and one rounding of the result."""
    d, a = (x.unsqueeze(1) if x.ndim == 2 else x for x in (delta, activation))
    wide = accumulation_type(delta.dtype)
    if d.shape[1] == 1:
        expected = (d.to(wide).mT * a.to(wide)).to(out.dtype)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        return
    exact = d.double().mT @ a.double()
    if exact.numel() == 0:
        return
    by_torch = (d.to(wide).mT @ a.to(wide)).to(out.dtype)
    terms = (d.double().abs().mT @ a.double().abs()).max()
    allowed = 2 * (by_torch.double() - exact).abs().max()
    allowed += torch.finfo(out.dtype).eps * exact.abs().max() + 2 * torch.finfo(wide).eps * terms
    assert (out.double() - exact).abs().max() <= allowed


# --- the outer product -----------------------------------------------------------------------------------------------

SHAPES = [
    *((1, 1, 1), (3, 5, 7), (2, 3, 2), (1, 66, 130), (2, 1, 33), (2, 33, 1), (3, 7, 16), (2, 40, 20), (1, 3, 1100)),
    *((0, 3, 4), (2, 0, 4), (2, 4, 0), (70, 2, 3)),
]
LAYOUTS = [(0, 0, 0), (0, 0, 3), (0, 5, 1), (3, 2, 1)]  # gaps between rows and samples, offset to the boundary


@pytest.mark.parametrize("out_dtype", [F32, F64, BF16], ids=str)
def test_outer_stores_16_bytes_wherever_it_can(out_dtype, emulator):
    size = out_dtype.itemsize
    for B, T, O, I in ((3, None, 21, 19), (2, None, 64, 48), (5, None, 9, 1), (2, 3, 70, 64)):
        emulator.configure()
        delta, activation = factors(B, T, O, I, torch.promote_types(out_dtype, F32))
        cuda.outer(delta, activation, dtype=out_dtype)
        joined = B * O * I * size
        if T is None:  # all but the ends of each run, here a sample
            assert emulator.stores(16) >= B * (O * I * size // 16 - 1)
            assert 16 * emulator.stores(16) + size * emulator.stores(size) == joined
        else:  # patches of 4 numbers
            assert emulator.stores(min(16, 4 * size)) == joined // min(16, 4 * size)
            assert emulator.stores(size) == 0


# --- several problems in a launch ------------------------------------------------------------------------------------


def problem(B, T, O, I, dtype=F32, out_dtype=None, seed=0):
    delta, activation = factors(B, T, O, I, dtype, seed)
    return delta, activation, torch.full((B, O, I), float("nan"), dtype=out_dtype or dtype)


def assert_as_alone(problems):
    for delta, activation, out in problems:
        alone = cuda.outer(delta, activation, dtype=out.dtype)
        assert torch.equal(out, alone)


@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS, ids=str)
def test_group_of_mixed_shapes_is_one_launch(dtype, out_dtype, emulator):
    shapes = [(3, 5, 7), (2, 33, 129), (1, 1, 1), (3, 64, 48), (2, 40, 3), (0, 3, 4), (2, 9, 1), (2, 1, 9), (70, 2, 3)]
    problems = [problem(B, None, O, I, dtype, out_dtype, seed) for seed, (B, O, I) in enumerate(shapes)]
    memory, padded = guarded(3, 5, 7, out_dtype, gap_o=3, gap_b=2, offset=1)
    problems.append((*problems[0][:2], padded))
    cuda.outer_group(problems)
    assert emulator.launches == 1
    assert_as_alone(problems)
    assert_nothing_else_written(memory, padded)


@pytest.mark.parametrize(("count", "launches"), [(0, 0), (1, 1), (2, 1), (16, 1), (17, 2), (33, 3)])
def test_groups_of_16(count, launches, emulator):
    problems = [problem(2, None, 3 + k, 5 + k, seed=k) for k in range(count)]
    cuda.outer_group(problems)
    assert emulator.launches == launches
    assert_as_alone(problems)


def test_group_of_several_types_and_positions(emulator):
    problems = [
        problem(2, None, 5, 7),
        problem(2, None, 5, 7, F32, BF16),
        problem(2, 4, 5, 7),
        problem(2, None, 6, 7, F32, BF16),
        problem(2, None, 6, 9),
        problem(2, 4, 5, 7, BF16),
        problem(2, 0, 5, 7),
        problem(2, 1, 5, 9),
        problem(2, None, 5, 7, F16, BF16),  # read as fp32
    ]
    delta, activation, *_ = problems[0]
    problems.append((delta, activation, torch.empty(2, 7, 5).mT))  # by torch
    cuda.outer_group(problems)
    # fp32: one of T = 1 and two of others; fp32 -> bf16; bf16 of T > 1
    assert emulator.launches == 3 + 1 + 1
    assert_as_alone(problems)


def test_problems_of_different_types_are_refused(emulator):
    fields = [cpu.outer_fields(*problem(2, None, 3, 4, dtype)) for dtype in (F32, F64)]
    with pytest.raises(ValueError, match="expected one pair of types"):
        emulator.C.outer_cuda(fields, -1, 0)
    with pytest.raises(ValueError, match="expected a tuple of 17 integers, but got 3"):
        emulator.C.outer_cuda([(1, 2, 3)], -1, 0)
    with pytest.raises(ValueError, match="no kernel for this pair"):
        emulator.C.outer_cuda([cpu.outer_fields(*problem(2, None, 3, 4, F64, F32))], -1, 0)


# --- squared norms ---------------------------------------------------------------------------------------------------


def assert_norms(found, delta, activation):
    d, a = (x.unsqueeze(1) if x.ndim == 2 else x for x in (delta, activation))
    exact = (d.double().mT @ a.double()).square().sum((1, 2))
    wide = accumulation_type(delta.dtype)
    assert found.dtype is wide
    assert found.shape == exact.shape
    if exact.numel() == 0:
        return
    terms = (d.double().abs().mT @ a.double().abs()).square().sum((1, 2))
    assert ((found.double() - exact).abs() <= 4 * torch.finfo(wide).eps * terms).all()
    assert (found >= 0).all()


def routes(dtype) -> list[str]:
    """Of T > 1."""
    cores = ["gradient_64", "gram_16", "gram_32", *(["gram_64"] if dtype is not F64 else [])]
    return [*cores, *(["mma_gradient_128", "mma_gradient_64", "mma_gram_64"] if dtype.itemsize == 2 else [])]


def norms_by(emulator, delta, activation, route, splits):
    """The kernel for T > 1 of a plan of our own choice."""
    C, B = emulator.C, delta.shape[0]
    wide = accumulation_type(delta.dtype)
    memory = torch.full((B + 2,), CANARY, dtype=wide)
    shares = torch.full((B * splits + 2,), CANARY, dtype=wide)
    fields = (delta.data_ptr(), activation.data_ptr(), *cpu.sizes(delta, activation))
    code, out = cpu.CODE[delta.dtype], memory[1:].data_ptr()
    C.sq_norm_cuda([fields], [(C.SQ_NORM_ROUTES.index(route), splits)], code, out, shares[1:].data_ptr(), -1, 0)
    for buffer in (memory, shares):
        assert buffer[0] == CANARY
        assert buffer[-1] == CANARY
    return memory[1:-1]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norms_of_one_position(dtype, emulator):
    for B, O, I in ((1, 1, 1), (9, 5, 7), (3, 300, 20), (2, 3000, 700), (0, 3, 4), (2, 0, 4), (2, 4, 0)):
        delta, activation = factors(B, None, O, I, dtype)
        assert_norms(cuda.sq_norm(delta, activation), delta, activation)
        assert_norms(cuda.sq_norm(delta[:, None], activation[:, None]), delta, activation)
    delta, activation = factors(20, None, 1, 33, dtype)
    for d, a in ((delta.expand(20, 9), activation[::2, 1::3].repeat(2, 1)), (delta, activation.T.contiguous().T)):
        assert_norms(cuda.sq_norm(d, a), d, a)


@pytest.mark.parametrize(("dtype", "route"), [(kind, route) for kind in TYPES for route in routes(kind)], ids=str)
def test_norms_of_many_positions(dtype, route, emulator):
    shapes = [(2, 5, 3, 7), (3, 70, 20, 33), (1, 33, 66, 1), (2, 16, 1, 70), (2, 0, 3, 4), (2, 5, 0, 4), (0, 5, 3, 4)]
    cases = list(itertools.product(shapes, (1, 3)))
    if route.startswith("mma"):  # several tiles, of whole vectors and not: seconds each in the emulator
        cases += [((2, 40, 136, 264), 1), ((1, 72, 72, 80), 3), ((1, 130, 24, 40), 3)]
    for (B, T, O, I), splits in cases:
        delta, activation = factors(B, T, O, I, dtype)
        norms = norms_by(emulator, delta, activation, route, splits)
        assert_norms(norms, delta, activation)
    for d, a in (
        (delta.mT.contiguous().mT, activation.mT.contiguous().mT),
        (factors(2, 20, 9, 4, dtype)[0][:, ::2, 1::3], factors(2, 10, 1, 1, dtype)[1].expand(2, 10, 70)),
        (factors(2, 24, 48, 4, dtype)[0][..., 8:40], factors(2, 48, 1, 72, dtype)[1][:, ::2]),
        (factors(2, 24, 33, 4, dtype)[0][..., 1:], factors(1, 24, 1, 16, dtype)[1].expand(2, 24, 16)),
    ):
        assert_norms(norms_by(emulator, d, a, route, 2), d, a)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norms_of_all_layers_are_one_launch(dtype, emulator):
    """And one that adds up: layers of one position and of many, of any sizes and strides, each as alone."""
    emulator.configure(multiprocessors=20)
    sizes = [(None, 5, 7), (70, 20, 33), (None, 300, 700), (1, 9, 3), (5, 3, 7), (0, 4, 4), (24, 72, 80), (None, 0, 3)]
    layers = [factors(3, T, O, I, dtype, seed) for seed, (T, O, I) in enumerate(sizes)]
    layers.append([x.mT.contiguous().mT for x in layers[1]])
    norms = cuda.sq_norm_group(layers)
    assert emulator.launches == 2
    assert norms.shape == (len(layers), 3)
    for row, layer in zip(norms, layers, strict=True):
        assert_norms(row, *layer)
    assert torch.equal(norms, cuda.sq_norm_group(layers))
    assert cuda.sq_norm_group([(d[:0], a[:0]) for d, a in layers]).shape == (len(layers), 0)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norms_of_a_models_factors_are_one_launch(dtype, emulator, monkeypatch):
    """As on a GPU, where no value may decide: all products in one launch and one that adds up."""
    layers = LayerFactors()
    for name, T, O, I in (("0", None, 5, 7), ("1", 70, 20, 33), ("2", None, 300, 700), ("3", 5, 3, 7)):
        delta, activation = factors(3, T, O, I, dtype, int(name))
        layers[f"{name}.weight"] = GradFactors(activation, delta)
        layers[f"{name}.bias"] = GradFactors.of(delta if T is None else delta.sum(1))
    image, plain = (torch.randn(size, dtype=F64).to(dtype) for size in ((3, 2, 7, 7), (3, 4, 3, 3)))
    windows = Windows((3, 3), (2, 2), (1, 1), ((0, 0), (0, 0)))
    layers["convolution"] = ConvFactors(image, plain, windows, 1, (4, 2, 3, 3))
    gradients = [each.materialize().flatten(1) for each in layers.to(F64).values()]
    monkeypatch.setattr(backends, "DEFAULT", "cuda")
    monkeypatch.setattr(cuda, "available", lambda: None)
    monkeypatch.setattr(cuda, "device_types", lambda: ("cpu",), raising=False)
    monkeypatch.setattr(ranges, "may_look", lambda x: False)
    found = layers.norm()
    assert emulator.launches == 2
    assert found.dtype is accumulation_type(dtype)
    expected = torch.cat(gradients, dim=1).square().sum(1).sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=8 * torch.finfo(found.dtype).eps, atol=0)


@pytest.mark.parametrize(("count", "launches"), [(1, 2), (40, 2), (41, 2), (320, 2), (321, 4)])
def test_norms_of_very_many_layers(count, launches, emulator):
    layers = [factors(2, (None, 3)[seed % 2], 3 + seed % 5, 4, seed=seed) for seed in range(count)]
    norms = cuda.sq_norm_group(layers)
    assert emulator.launches == launches
    for row, layer in zip(norms, layers, strict=True):
        assert_norms(row, *layer)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norms_by_the_plan(dtype, emulator):
    for B, T, O, I in ((1, 70, 9, 5), (1, 3, 200, 70), (40, 5, 17, 9), (2, 20, 70, 70), (1, 200, 3, 2)):
        delta, activation = factors(B, T, O, I, dtype)
        assert_norms(cuda.sq_norm(delta, activation), delta, activation)


def plans(emulator, dtype, *sizes):
    """(route, splits) of layers of sizes (B, T, O, I) on a GPU of 132 multiprocessors."""
    emulator.configure(multiprocessors=132)
    fields = [(0, 0, *size, *[0] * 6) for size in sizes]
    names = emulator.C.SQ_NORM_ROUTES
    return [(names[route], splits) for route, splits in emulator.C.sq_norm_plan(fields, cpu.CODE[dtype], -1)]


def test_plan_takes_the_cheaper_route(emulator):
    assert plans(emulator, F32, (4096, 4, 64, 64)) == [("gradient_64", 1)]  # one tile of 4 steps, not 128 of 16 x 16
    assert plans(emulator, F32, (4096, 16, 784, 400)) == [("gram_16", 1)]
    assert plans(emulator, F32, (4096, 30, 784, 400)) == [("gram_32", 1)]
    assert plans(emulator, F32, (256, 4096, 784, 400))[0][0] == "gradient_64"
    assert plans(emulator, F32, (1, 4096, 64, 64))[0][0] == "gram_64"
    assert plans(emulator, BF16, (512, 64, 768, 768)) == [("mma_gram_64", 1)]
    assert plans(emulator, BF16, (16, 4096, 1024, 1024))[0][0] == "mma_gradient_128"
    assert plans(emulator, F64, (1, 4096, 64, 64))[0][0] == "gram_32"
    assert plans(emulator, F32, (9, 1, 20, 30), (9, 1, 3000, 30)) == [("rows", 1), ("rows", 8)]
    assert plans(emulator, F32, (0, 4, 3, 3))[0][1] >= 1
    assert plans(emulator, F32) == []


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("I", [768, 3072])
def test_plan_fills_the_gpu_with_few_samples(I, dtype, emulator):
    """B = 4 and T = 512 make a block for each of 132 multiprocessors at least, alone or among others."""
    size = (4, 512, 768, I)
    [(_, splits)] = plans(emulator, dtype, size)
    assert 4 * splits >= 132
    blocks = sum(4 * splits for _, splits in plans(emulator, dtype, *[size] * 12))
    held = 132 * (1 if dtype is F64 else 2)  # at once; twice as many are made, and a part of a block a sample and layer
    assert 2 * held <= blocks <= 2 * held + 12 * 4
    [(route, splits)] = plans(emulator, dtype, (1, 4096, 64, 64))  # one tile of G
    assert route.startswith(("gram", "mma_gram"))
    assert splits >= 2 * held


def test_norms_of_many_samples_by_one_block(emulator):
    delta, activation = factors(5, None, 3000, 700)
    emulator.configure(max_blocks=1, backwards=True)
    assert_norms(cuda.sq_norm(delta, activation), delta, activation)


@pytest.mark.parametrize("route", routes(BF16))
def test_norms_of_more_blocks_than_tiles(route, emulator):
    """A block that adds up nothing in between two samples passes fewer barriers."""
    delta, activation = factors(3, 9, 5, 7, BF16)
    emulator.configure(max_blocks=1, backwards=True)
    assert_norms(norms_by(emulator, delta, activation, route, 5), delta, activation)


def test_sums_over_very_many_positions_do_not_drift(emulator):
    """Of equal products, added up one after the other, each step rounds in the same direction."""
    delta, activation = torch.full((1, 65_537, 2), 0.786), torch.full((1, 65_537, 3), 0.3)
    gradient = cuda.outer(delta, activation)
    exact = torch.full((1, 2, 3), 65_537 * delta[0, 0, 0].double() * activation[0, 0, 0].double(), dtype=F64)
    torch.testing.assert_close(gradient.double(), exact, rtol=2e-5, atol=0)
    norms = norms_by(emulator, delta, activation, "gradient_64", 1)
    torch.testing.assert_close(norms.double(), exact.square().sum((1, 2)), rtol=4e-5, atol=0)


@pytest.mark.parametrize(("route", "O", "I"), [("gram_16", 65_537, 3), ("gram_32", 3, 65_537), ("gram_64", 3, 65_537)])
def test_norms_of_very_many_features_do_not_drift(route, O, I, emulator):
    delta, activation = torch.full((1, 2, O), 0.786), torch.full((1, 2, I), 0.3)
    exact = (4 * O * delta[0, 0, 0].double() ** 2 * I * activation[0, 0, 0].double() ** 2).reshape(1)
    found = norms_by(emulator, delta, activation, route, 1)
    torch.testing.assert_close(found.double(), exact, rtol=4e-5, atol=0)


@pytest.mark.parametrize("route", routes(BF16))
def test_norms_of_nan_and_infinity(route, emulator):
    delta, activation = (x.abs() for x in factors(3, 20, 5, 9, BF16))
    delta[0, 3, 2] = float("nan")
    activation[1, 3, 2] = float("inf")
    found = norms_by(emulator, delta, activation, route, 1)
    assert found[0].isnan()
    assert found[1].isinf()
    assert_norms(found[2:], delta[2:], activation[2:])


# --- grids -----------------------------------------------------------------------------------------------------------


def everything():
    """A call of every kernel; the results must not depend on how blocks and threads take turns."""
    results = []
    for T in (None, 3, 20):
        delta, activation = factors(7, T, 70, 33)
        results.append(cuda.outer(delta, activation))
        results.append(cuda.outer(delta, factors(7, T, 70, 36)[1]))
        results.append(cuda.sq_norm(delta, activation))
        results.append(cuda.sq_norm(delta.bfloat16(), activation.bfloat16()))
    problems = [problem(5, None, 20 + k, 8 + k, seed=k) for k in range(5)]
    cuda.outer_group(problems)
    return results + [out for _, _, out in problems]


def test_order_of_threads_and_blocks_does_not_matter(emulator):
    """A barrier that is missing would show when threads run backwards."""
    expected = everything()
    emulator.configure(backwards=True)
    for found, wanted in zip(everything(), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("max_blocks", [1, 3])
def test_work_beyond_the_largest_grid(max_blocks, emulator):
    """A grid is at most 2³¹ - 1 blocks; each then takes more than one tile."""
    expected = everything()
    emulator.configure(max_blocks=max_blocks)
    for found, wanted in zip(everything(), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("I", [8, 11])
def test_threads_of_many_steps(I, emulator):
    """As few blocks as stay resident share a large result: three of them write what they should."""
    O = 1 << 23
    delta = (torch.arange(O) % 2039 + 1.0).to(F16)[None]
    activation = factors(1, None, 1, I, F16)[1].abs() + 0.5
    out = sparse(O * I, F16).view(1, O, I)
    emulator.configure(blocks=range(0, 1), multiprocessors=132)
    cuda.outer(delta, activation, out)
    blocks = emulator.last_grid
    assert 132 * 6 <= blocks <= 132 * 12
    for block in (blocks // 2, blocks - 1):
        emulator.configure(blocks=range(block, block + 1), multiprocessors=132)
        cuda.outer(delta, activation, out)
    expected, written = (delta.float().mT * activation.float()).to(F16), out[0] != 0
    assert written.sum() >= 2 * 250 * 8 * 4  # two whole blocks of 250 threads at least, 4 steps of 8 numbers
    assert torch.equal(out[0][written], expected[written])


@pytest.mark.parametrize(("B", "O", "I"), [(3, 70, 64), (40, 3, 8), (2, 1, 2048), (1, 700, 8), (5, 33, 1104)])
@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS, ids=str)
def test_whole_rows(dtype, out_dtype, B, O, I, emulator):
    """Rows of whole 16-byte chunks, with gaps and without, into the cache or past it, of one step a thread or many."""
    delta, activation = factors(B, None, O, I, dtype)
    chunk = 16 // out_dtype.itemsize
    for multiprocessors, l2, gap in ((1, 0, 0), (132, 1 << 20, 0), (1, 1 << 20, chunk)):
        emulator.configure(multiprocessors=multiprocessors, l2=l2)
        memory, out = guarded(B, O, I, out_dtype, gap_o=gap, gap_b=3 * gap)
        cuda.outer(delta, activation, out)
        assert emulator.stores(16) * chunk == B * O * I
        assert_outer(out, delta, activation)
        assert_nothing_else_written(memory, out)


@pytest.mark.parametrize("by", [1, 2, 3, 5, 7, 64, 1000, (1 << 20) - 1, (1 << 30) + 1, (1 << 31) - 1])
def test_division_by_multiplication(by, emulator):
    """What `Divisor` does, for the numbers at and beside its multiples."""
    found = emulator.divide(by)
    numbers = [n for k in (0, 1, 2, 3, ((1 << 31) - 1) // by) for n in (k * by - 1, k * by, k * by + 1)]
    for n in (n for n in numbers if 0 <= n < 1 << 31):
        assert found(n) == divmod(n, by)


def sparse(elements, dtype):
    """Zeroed memory whose pages exist once they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.parametrize("T", [None, 2])
def test_strides_beyond_32_bits(T, emulator):
    """index · stride passes 2³² elements, of inputs and outputs, where neither does."""
    far = (1 << 32) + 24
    memory, leading = sparse(2 * far + 64, BF16), (2,) if T is None else (2, T)
    strides = (far, 1) if T is None else (far, 8, 1)
    delta, activation = (memory.as_strided((*leading, 5), strides, offset) for offset in (0, 24))
    for tensor, values in zip((delta, activation), factors(2, T, 5, 5, BF16), strict=True):
        tensor.copy_(values)
    out = sparse(2 * far + 64, F32).as_strided((2, 5, 5), (far, 5, 1), 3)
    cuda.outer(delta, activation, out)
    assert_outer(out, delta.float(), activation.float())
    aligned = sparse(2 * far + 64, F32).as_strided((2, 5, 4), (far, 8, 1), 8)
    cuda.outer(delta, activation[..., :4], aligned)
    assert_outer(aligned, delta.float(), activation[..., :4].float())
    assert_norms(cuda.sq_norm(delta, activation), delta, activation)
    # Far from each other along the features too.
    strides = (0, far - 1) if T is None else (0, 8, far - 1)
    features = memory.as_strided((*leading, 2), strides, 3)
    features[:1].copy_(factors(1, T, 2, 2, BF16)[0])
    assert_norms(cuda.sq_norm(delta, features), delta, features)
    assert_outer(cuda.outer(features, delta, dtype=F32), features.float(), delta.float())
    assert_outer(cuda.outer(delta, features, dtype=F32), delta.float(), features.float())


@pytest.mark.parametrize(("T", "I"), [(None, 30001), (None, 30008), (3, 30001)])
def test_results_beyond_32_bit_indices(T, I, emulator):
    """The last blocks of a result of more than 2³² elements; the factors are small, their strides 0."""
    B, O = 5, 30011
    assert B * O * I > 1 << 32
    row = factors(1, T, 1, I, BF16)[1]
    delta = torch.full((1,) * row.ndim, 2.0, dtype=BF16).expand(B, *row.shape[1:-1], O)
    activation = row.expand(B, *row.shape[1:])
    out = sparse(B * O * I, BF16).view(B, O, I)
    emulator.configure(blocks=range(0, 1), multiprocessors=1 << 24)  # so many blocks that each is small
    cuda.outer(delta, activation, out)
    blocks = emulator.last_grid
    assert blocks > 300
    emulator.configure(blocks=range(blocks - 300, blocks), multiprocessors=1 << 24)  # more than lie side by side
    cuda.outer(delta, activation, out)
    for corner, part in ((0, slice(9, 40)), (-1, slice(-40, -9))):  # the first block of a sample writes its ends
        found = out[corner, corner, part][None, None]
        assert_outer(found, delta[:1, ..., :1], activation[:1, ..., part])


# --- errors, and GPUs without code -----------------------------------------------------------------------------------


def test_failed_calls_say_what_and_where(emulator):
    fields = cpu.outer_fields(*problem(2, None, 3, 4))
    with pytest.raises(
        RuntimeError, match=r"outer_cuda: cudaSetDevice failed: .*InvalidDevice, B=2, T=1, O=3, I=4, de.* 99"
    ):
        emulator.C.outer_cuda([fields], 99, 0)
    norm = (*fields[:2], *fields[3:13])
    with pytest.raises(
        RuntimeError, match=r"sq_norm_cuda: cudaSetDevice failed: .*B=2, T=1, O=3, I=4, device 99, sm_90"
    ):
        emulator.C.sq_norm_cuda([norm], [(1, 1)], cpu.CODE[F32], fields[2], fields[2], 99, 0)


@pytest.mark.parametrize(
    ("capability", "archs", "ptx", "runs"),
    [
        (90, ["80", "90"], None, True),
        (86, ["80", "90"], None, True),  # sm_80 code runs on 8.6
        (80, ["86"], None, False),  # but not the other way round
        (120, ["80", "90"], "90", True),  # by PTX
        (120, ["80", "90"], None, False),
        (75, ["80", "90"], "90", False),
        (100, ["90"], None, False),  # another major version
        (90, ["90a"], "90a", True),
        (100, ["90a"], "90a", False),  # bound to its own architecture
        (103, ["100f"], None, True),  # to its family
        (110, ["100f"], "100f", False),
        (103, ["100a"], None, False),
        (75, ["75"], "75", True),
        (110, ["75", "100"], "75", True),  # by the oldest PTX
    ],
)
def test_which_gpus_a_binary_has_code_for(capability, archs, ptx, runs):
    reason = cuda.lacking_code([capability], {"cuda_archs": archs, "cuda_ptx": ptx})
    assert (reason is None) == runs


def test_a_gpu_without_code_is_told_with_its_cure(monkeypatch):
    config = {"cuda_archs": ["80", "120"], "cuda_ptx": "120"}
    status = {"reason": None, "capabilities": [90 - 5, 75]}
    fake = types.SimpleNamespace(cuda_status=lambda: status, build_config=lambda: config)
    monkeypatch.setattr(cuda, "_C", fake)
    assert cuda.available() == (
        "gradext was built for sm_80, sm_120 and PTX of compute_120, but GPU 1 has compute capability 7.5: install it "
        "again with GRADEXT_CUDA_ARCHS=native on this machine, or hide that GPU by CUDA_VISIBLE_DEVICES"
    )
    status["capabilities"] = [86, 120, 121]
    assert cuda.available() is None
    status["reason"] = "no NVIDIA driver is installed"
    assert cuda.available() == "no NVIDIA driver is installed"


# --- sanitizers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(bool(SANITIZERS), reason="this is the process that it starts")
def test_sanitizers(nvcc):
    """All of the above once more, where no byte beyond a tensor, no overflow and no bad shift goes unseen."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_file() for path in libraries):
        pytest.skip("g++ has no sanitizers here")
    environment = {
        **os.environ,
        "GRADEXT_TEST_SANITIZERS": "address,undefined",
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    assert "passed" in result.stdout
