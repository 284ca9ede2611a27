"""The Triton operators against fp64 references, on the GPU where there is one, else under Triton's interpreter.

`test_triton.py` runs this file in a process of its own, since whether kernels are interpreted is fixed when triton is
imported. By hand: ``TRITON_INTERPRET=1 pytest tests/ops/triton_operators.py``.
"""

import pytest
import torch

pytest.importorskip("triton")
from gradext import GradFactors, LayerFactors, backends, ops, ranges
from gradext.backends import reference, triton

if triton.available() is not None:
    pytest.skip(triton.available(), allow_module_level=True)
INTERPRETED = triton.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (B, T or None, O, I): ones, odd sizes, tiles with edges, sizes that 16 divides; T below, at and beyond a tile.
SHAPES = [
    (1, None, 1, 1), (3, None, 5, 7), (2, None, 33, 129), (2, None, 33, 256), (7, None, 10, 16), (2, 1, 6, 35),
    (3, 2, 17, 9), (2, 5, 32, 144), (2, 33, 20, 35), (2, 70, 20, 18), (1, 16, 1, 3),
]  # fmt: skip


def factors(B, T, O, I, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    leading = (B,) if T is None else (B, T)
    sizes = ((*leading, O), (*leading, I), (O, I), (3, O, I))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for size in sizes]


def check(operator, *operands, **options):
    value = getattr(ops, operator)(*operands, backend="triton", **options)
    plain = getattr(reference, operator)
    exact, terms = plain(*(x.double() for x in operands)), plain(*(x.double().abs() for x in operands))
    compare(value, plain(*operands, **options), exact, terms, reference.accumulation_type(operands[0].dtype))


def compare(value, expected, exact, terms, accumulation_type, precision=None):
    """The error is at most twice that of plain torch in the same type, plus roundings of the largest sum of terms."""
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    if value.numel() == 0:
        return
    assert torch.isfinite(value).all()
    precision = precision or torch.finfo(accumulation_type).eps
    allowed = 2 * (expected.double() - exact).abs().max() + 4 * precision * terms.max()
    if INTERPRETED and value.dtype == torch.bfloat16:  # the interpreter cuts what hardware rounds
        allowed = allowed + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    error = (value.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def test_fp64_without_matrix_products(monkeypatch):
    """Triton 3.4 multiplies no fp64 matrices: plain torch does."""
    monkeypatch.setattr(triton, "_triton_multiplies_fp64", lambda: False)
    launched = record_launches(monkeypatch)
    for T in (None, 3, 20):
        delta, activation, _, weight = factors(3, T, 5, 7, torch.float64)
        check("outer", delta, activation, dtype=torch.float16)
        check("sq_norm", delta, activation)
        check("linear", delta, activation, weight)
    assert set(launched) == {"outer_flat", "sq_norm_rows"}


def test_mixed_types():
    """A half-precision factor meets an fp32 weight in fp32."""
    delta, activation, *_ = factors(3, None, 6, 20, torch.bfloat16)
    *_, gradient, weight = factors(3, None, 6, 20)
    check("dot", delta, activation, gradient)
    check("linear", delta, activation, weight)


def record_launches(monkeypatch) -> list[str]:
    """The names of the kernels launched from now on."""
    launched, launch = [], triton._launch

    def record(kernel, *arguments, **options):
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton, "_launch", record)
    return launched


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_short_rows(dtype):
    """Rows of fewer than 16 bytes, more samples than programs; and rows longer than 2¹⁵."""
    for B, O, I in ((300, 5, 3), (41, 1, 1), (50, 40, 2), (2, 1, 50_001)):
        check("outer", *factors(B, None, O, I, dtype)[:2])
    check("outer", *factors(30, 3, 7, 3, dtype)[:2])


# --- sums over the batch and projections -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 40, 130, 140), (0, 3, 4, 5), (3, 0, 4, 5), (2, 3, 4, 0)], ids=str)
def test_sums_and_projections(shape, dtype, tf32, monkeypatch):
    """In splits of the positions and without, of rounded weights at most: against fp64 and plain torch."""
    B, _, O, I = shape
    delta, activation, *_ = factors(*shape, dtype)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(B, generator=generator).to(DEVICE)
    left, right = (torch.randn(n, k, generator=generator).to(DEVICE, dtype) for n, k in ((O, 5), (I, 17)))
    for multiprocessors in (1, 132):
        monkeypatch.setattr(triton, "_multiprocessors", lambda device, count=multiprocessors: count)
        check_wide("weighted_sum", delta, activation, None)
        check_wide("weighted_sum", delta, activation, weights)
        check_wide("project", delta, activation, left, right)


def check_wide(name, delta, activation, *others):
    """As exact as torch in the factors' own type, up to the rounding of a weighted delta to it."""
    value = getattr(ops, name)(delta, activation, *others, backend="triton")
    plain = getattr(reference, name)
    exact = plain(*(x if x is None else x.double() for x in (delta, activation, *others)))
    terms = plain(*(x if x is None else x.double().abs() for x in (delta, activation, *others)))
    assert value.dtype == reference.accumulation_type(delta.dtype)
    assert value.shape == exact.shape
    if value.numel() == 0:
        return
    rounding = torch.finfo(delta.dtype).eps if name == "weighted_sum" and others[0] is not None else 0
    rounding += 2**-10 if triton._precision(delta.dtype) == "tf32" and not INTERPRETED else 0
    allowed = (rounding + 8 * torch.finfo(torch.float32).eps) * terms.max()
    assert (value.double() - exact).abs().max() <= allowed


def test_sums_and_projections_of_any_strides(tf32):
    delta = factors(4, 6, 20, 1, torch.bfloat16)[0][:, ::2, 1:-1:2]
    activation = factors(4, 3, 1, 21, torch.bfloat16)[1].mT.contiguous().mT
    weights = torch.rand(8, device=DEVICE)[::2]
    left, right = factors(1, None, 1, 1, torch.bfloat16)[0].expand(9, 3), factors(3, None, 1, 21, torch.bfloat16)[1].mT
    for d, a in ((delta, activation), (delta, activation[:1].expand(4, 3, 21))):
        check_wide("weighted_sum", d, a, weights)
        check_wide("project", d, a, left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_of_several_layers(dtype, monkeypatch):
    """Norms, clipped sums and projections by the kernels, one each a layer, in fp32 from factors of half precision."""
    monkeypatch.setattr(backends, "DEFAULT", "triton")
    monkeypatch.setattr(ranges, "may_look", lambda x: False)
    layers = LayerFactors()
    for T, O, I in ((None, 33, 20), (20, 9, 40)):
        delta, activation, *_ = factors(5, T, O, I, dtype)
        layers[f"{O}.weight"] = GradFactors(activation, delta)
        layers[f"{O}.bias"] = GradFactors.of(delta if T is None else delta.sum(1))
    exact = layers.to(torch.float64)
    gradients = {name: each.materialize() for name, each in exact.items()}
    norms = sum(gradient.square().flatten(1).sum(1) for gradient in gradients.values()).sqrt()
    launched = record_launches(monkeypatch)
    torch.testing.assert_close(layers.norm().double(), norms, rtol=1e-6, atol=0)
    assert launched == ["sq_norm_rows", "sq_norm_gram"]
    launched.clear()
    clip = norms.median().item()
    sums = layers.clipped_sum(clip)
    assert launched == ["sq_norm_rows", "sq_norm_gram", "weighted_sum", "weighted_sum"]
    weights = (clip / norms).clamp_max(1)
    for name, gradient in gradients.items():
        assert sums[name].dtype == torch.float32
        expected, terms = (torch.tensordot(weights, g, dims=1) for g in (gradient, gradient.abs()))
        assert ((sums[name].double() - expected).abs() <= 2 * torch.finfo(dtype).eps * terms.max()).all(), name
    launched.clear()
    found = layers.project(4)
    assert launched == ["project", "project"]
    torch.testing.assert_close(found.double(), exact.project(4), rtol=1e-5, atol=1e-5 * float(norms.max()))


# --- several problems ------------------------------------------------------------------------------------------------


def test_group(monkeypatch):
    """Problems that go by tiles share a launch, whatever their types; the others run beside them."""
    launched = record_launches(monkeypatch)
    problems = []
    for B, T, O, I, dtype in (
        (2, None, 33, 256, torch.float32),
        (3, None, 12, 128, torch.float32),
        (2, None, 9, 21, torch.float32),  # odd
        (2, None, 32, 240, torch.bfloat16),
        (0, None, 32, 256, torch.float32),
        (2, 3, 32, 64, torch.float64),
        (2, 20, 32, 64, torch.float16),  # many positions
    ):
        delta, activation, *_ = factors(B, T, O, I, dtype)
        problems.append((delta, activation, delta.new_empty(B, O, I)))
    assert triton.outer_group(problems) is None
    assert sorted(launched) == ["outer_dot", "outer_flat", "outer_group"]
    for delta, activation, out in problems:
        expected = reference.outer(delta.double(), activation.double()).to(out.dtype)
        torch.testing.assert_close(out, expected)

    launched.clear()
    delta, activation, *_ = factors(1, None, 16, 128)
    outs = torch.empty(9, 1, 16, 128, device=DEVICE)
    triton.outer_group([(delta, n * activation, out) for n, out in enumerate(outs)])
    assert launched == ["outer_group", "outer_tiles"]  # 8 and 1
    torch.testing.assert_close(outs, torch.stack([n * reference.outer(delta, activation) for n in range(9)]))
    triton.outer_group([])


# --- Gram matrices ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32():
    """Lets fp32 run on tensor cores."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield
    matmul.allow_tf32 = before


def check_gram(delta, activation, other_delta, other_activation):
    def plain(d, a, other_d, other_a):
        return reference.outer(d, a).flatten(1) @ reference.outer(other_d, other_a).flatten(1).mT

    operands = (delta, activation, other_delta, other_activation)
    value = triton.gram(*operands)
    exact, terms = plain(*(x.double() for x in operands)), plain(*(x.double().abs() for x in operands))
    # Two products of two factors, each cut off to the 10 bits of TF32; torch may compute a small one in fp32.
    precision = 2**-10 if triton._precision(delta.dtype) == "tf32" and not INTERPRETED else None
    wide = reference.widen(*operands)
    compare(value, plain(*wide), exact, terms, wide[0].dtype, precision)


# (B, T, C, S, O, I): one position, a power of 2 of them, not one, more than a tile's rows; one side of one position.
GRAMS = [
    (1, None, 1, None, 1, 1), (5, None, 3, None, 33, 17), (70, None, 65, None, 16, 35), (3, 4, 2, 4, 20, 9),
    (9, 5, 14, 3, 12, 33), (2, 1, 3, 7, 40, 50), (2, 66, 1, 70, 170, 150), (30, 3, 1, 1, 5, 16),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", GRAMS, ids=str)
def test_gram(shape, dtype, tf32):
    B, T, C, S, O, I = shape
    check_gram(*factors(B, T, O, I, dtype)[:2], *factors(C, S, O, I, dtype, seed=1)[:2])


@pytest.mark.parametrize(("B", "T", "side"), [(150, None, 64), (20, 6, 8)])
def test_gram_of_itself(B, T, side):
    """The same tensors: tiles below the diagonal are mirrored, not computed."""
    delta, activation, *_ = factors(B, T, 20, 33, torch.float16)
    check_gram(delta, activation, delta, activation)
    value = triton.gram(delta, activation, delta, activation)
    other = triton.gram(delta, activation, delta.clone(), activation)
    tile = torch.arange(B, device=DEVICE) // side
    above = tile[:, None] < tile
    assert torch.equal(value[above], value.mT[above])
    assert torch.equal(value[above], other[above])


def test_gram_of_any_strides_and_of_nothing():
    delta, activation, *_ = factors(6, 3, 20, 21, torch.bfloat16)
    operands = delta[::2, :, 1::2], activation[:3].movedim(0, 2).contiguous().movedim(2, 0)
    others = delta[:1, :, ::2].expand(4, 3, 10), activation[:4].flip(2)
    check_gram(*operands, *others)
    assert triton.gram(*(x[:0] for x in operands), *others).shape == (0, 4)
    assert triton.gram(*operands, *(x[:0] for x in others)).shape == (3, 0)
    assert (triton.gram(*(x[:, :0] for x in operands), *others) == 0).all()
    assert (triton.gram(operands[0][..., :0], operands[1], others[0][..., :0], others[1]) == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="one program takes 2 ms under the interpreter")
def test_many_samples():
    """More samples than the second and third axes of a grid could count."""
    for O, I in ((1, 3), (2, 1), (8, 128)):
        delta, activation, _, weight = factors(70_001, None, O, I)
        check("outer", delta, activation)
        check("sq_norm", delta, activation)
        check("linear", delta, activation, weight)
