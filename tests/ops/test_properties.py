"""Properties of the operators, tested by hypothesis on every backend that works on the CPU.

Shapes have zeros, ones, primes and large aspect ratios; tensors are dense, permuted, sliced, expanded, misaligned or
lazily negated. ``pytest tests/ops/test_properties.py --hypothesis-profile=thorough`` tries many more. Triton's
interpreter takes a process of its own: ``TRITON_INTERPRET=1 pytest tests/ops/test_properties.py`` by hand.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gradext import ops
from gradext.backends import BACKENDS, cpu, reference, triton
from gradext.backends.reference import accumulation_type

pytestmark = pytest.mark.medium

INTERPRETED = triton.interpreting()
# The compiled kernel is chosen by the machine and the size: "streaming" and "baseline" make it stream past the cache
# at every size, and use no instruction that some machine lacks.
VARIANTS = {"cpu": {}, "cpu, streaming": {"stream_from": 0}, "cpu, baseline": {"stream_from": 0, "isa": "baseline"}}
BACKEND_NAMES = ["triton"] if INTERPRETED else [*VARIANTS, "reference", None]
# A program of the interpreter takes milliseconds, and it cuts what hardware rounds to bf16.
ELEMENTS = 1 << (10 if INTERPRETED else 17)  # of all gradients, all positions counted
JUDGED = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps  # fp64 sums, by longer ones
DTYPES = [torch.float32, *([torch.float64] if JUDGED else []), torch.float16]
DTYPES += [] if INTERPRETED else [torch.bfloat16]
SIZES = [2, 1, 3, 0, 4, 5, 7, 8, 13, 16, 17, 31, 32, 61, 64, 127, 128, 257, 1021, 4099, 65537]


@pytest.fixture(params=BACKEND_NAMES, ids=str)
def backend(request, monkeypatch):
    name = request.param
    if name is None:
        return None
    variant, name = name, name.partition(",")[0]
    reason = BACKENDS[name].available()
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    if VARIANTS.get(variant):
        kernel = functools.partial(cpu._C.outer_cpu, **VARIANTS[variant])
        monkeypatch.setattr(cpu, "_C", SimpleNamespace(outer_cpu=kernel, HostBuffer=cpu._C.HostBuffer))
    return name


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_in_its_interpreter():
    """Everything below, on few and small examples, in a process where kernels are interpreted."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=few", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# --- what is drawn ---------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    B: int
    T: int | None  # None: no such dimension
    O: int
    I: int

    @property
    def delta(self) -> tuple[int, ...]:
        return (self.B, self.O) if self.T is None else (self.B, self.T, self.O)

    @property
    def activation(self) -> tuple[int, ...]:
        return (*self.delta[:-1], self.I)


def size(draw, limit: int) -> int:
    return draw(st.sampled_from([n for n in SIZES if n <= max(1, limit)]))


@st.composite
def shapes(draw, positions: bool | None = None) -> Shape:
    """At most ELEMENTS products; any of the sizes may be the large one."""
    if positions is None:
        positions = draw(st.booleans())
    sizes, left = {}, ELEMENTS
    for name in draw(st.permutations("OIBT" if positions else "OIB")):
        sizes[name] = size(draw, left)
        left //= max(1, sizes[name])
    return Shape(sizes["B"], sizes.get("T"), sizes["O"], sizes["I"])


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return (values * (torch.rand(shape, generator=generator) > 0.1)).to(dtype)  # zeros among them


SEEDS = st.integers(0, 2**16)
SCALES = st.sampled_from([1.0, 1e-3, 8.0])
LAYOUTS = ("dense", "permuted", "sliced", "expanded", "misaligned", "negated")


def dense(draw, x: Tensor) -> Tensor:
    return x


def permuted(draw, x: Tensor) -> Tensor:
    order = draw(st.permutations(range(x.ndim)))
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])


def sliced(draw, x: Tensor) -> Tensor:
    """A part of a larger tensor, whose other elements are NaN."""
    steps = [draw(st.integers(1, 3)) for _ in x.shape]
    base = x.new_full([n * step + 1 for n, step in zip(x.shape, steps, strict=True)], math.nan)
    view = base[tuple(slice(1, n * step + 1, step) for n, step in zip(x.shape, steps, strict=True))]
    return view.copy_(x)


def expanded(draw, x: Tensor) -> Tensor:
    """Its first row, or column, for all of them; a scalar for all, perhaps."""
    for dim in draw(st.sets(st.sampled_from(range(x.ndim)), min_size=1)):
        if x.shape[dim] > 0:
            x = x.narrow(dim, 0, 1).expand_as(x)
    return x


def misaligned(draw, x: Tensor) -> Tensor:
    offset = draw(st.integers(1, 7))
    return x.new_full((offset + x.numel(),), math.nan)[offset:].view(x.shape).copy_(x)


def negated(draw, x: Tensor) -> Tensor:
    """The imaginary part of a conjugate, which torch keeps as the negative of what lies in memory."""
    if x.element_size() == 2:
        return x
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


@st.composite
def laid_out(draw, x: Tensor) -> Tensor:
    """``x``, but for what an expanded layout repeats."""
    layout = draw(st.sampled_from([dense, permuted, sliced, expanded, misaligned, negated]))
    return layout(draw, x)


@st.composite
def operands(draw, name: str, shape: Shape, dtype: torch.dtype, layout: Callable = laid_out) -> list[Tensor]:
    """delta, activation, and what else the operator ``name`` takes."""
    others: list[tuple[int, ...]] = []
    if name == "dot":
        others = [(shape.O, shape.I)]
    elif name == "linear":
        others = [(size(draw, min(64, ELEMENTS // max(1, shape.O * shape.I))), shape.O, shape.I)]
    elif name == "gram":
        # Few enough products for the fp64 reference, which writes the gradients.
        C = size(draw, min(32, ELEMENTS // max(1, shape.O * shape.I)))
        other = Shape(C, shape.T and size(draw, min(9, ELEMENTS // max(1, C * shape.O * shape.I))), shape.O, shape.I)
        others = [other.delta, other.activation]
    sizes = [shape.delta, shape.activation, *others]
    seed, scale = draw(SEEDS), draw(SCALES)
    return [draw(layout(numbers(size, dtype, seed + k, scale))) for k, size in enumerate(sizes)]


def as_they_are(x: Tensor):
    return st.just(x)


def exactly(x: Tensor) -> Tensor:
    return x.resolve_neg().double().contiguous()


# --- what should come out --------------------------------------------------------------------------------------------


def plain_outer(delta, activation):
    if delta.ndim == 2:
        delta, activation = delta[:, None], activation[:, None]
    return delta.swapaxes(1, 2) @ activation


def flat(gradients):
    return gradients.reshape(gradients.shape[0], math.prod(gradients.shape[1:]))


# The definition of each operator, which writes the gradients; of tensors, and of numpy's arrays.
PLAIN = {
    "outer": plain_outer,
    "sq_norm": lambda d, a: (plain_outer(d, a) ** 2).sum((1, 2)),
    "dot": lambda d, a, R: (plain_outer(d, a) * R).sum((1, 2)),
    "linear": lambda d, a, W: flat(plain_outer(d, a)) @ flat(W).T,
    "gram": lambda d, a, od, oa: flat(plain_outer(d, a)) @ flat(plain_outer(od, oa)).T,
}
LINEAR = [name for name in PLAIN if name != "sq_norm"]  # in every one of their operands


class Expected(NamedTuple):
    exact: np.ndarray
    terms: np.ndarray  # the sum of the magnitudes of the terms
    error: float  # the largest of plain torch in the type that sums are taken in
    roundings: float

    def allowed(self, dtype: torch.dtype, accumulates: torch.dtype) -> np.ndarray:
        """DESIGN's bound, twice plain torch's error, and the few roundings that a sum cannot do without.

        Both ways to a norm have the same magnitudes of terms, ``Σ_ts |δ_t|·|δ_s| |a_t|·|a_s| = ‖ Σ_t |δ_t||a_t|ᵀ ‖²``.
        """
        info = torch.finfo(dtype)
        return (
            2 * self.error
            + self.roundings * torch.finfo(accumulates).eps * self.terms
            + info.eps * np.abs(self.exact)
            + info.smallest_normal
        )


def repeats(tensors: list[Tensor]) -> bool:
    """Whether one number stands for many."""
    return any(0 in t.stride() for t in tensors)


def expected(name: str, tensors: list[Tensor], repeated: bool | None = None) -> Expected:
    wide, accumulates = [exactly(t) for t in tensors], accumulation_type(tensors[0].dtype)
    plain = PLAIN[name](*(t.to(accumulates) for t in tensors)).double().numpy()  # layouts decide how torch adds up
    arrays = [t.numpy().astype(np.longdouble if accumulates == torch.float64 else np.float64) for t in wide]
    exact, terms = PLAIN[name](*arrays), PLAIN[name](*map(np.abs, arrays))
    error = float(np.abs(plain - exact).max(initial=0))
    # torch.linalg.vector_norm adds up the squares of a piece of a row one after the other, in 16 lanes or more.
    longest = min(max(tensors[0].shape[-1], tensors[1].shape[-1]), 2 * reference.PIECE)
    # Equal numbers, one after the other, round to the same side every time: n of them by up to n/4 of the sum's.
    repeated = repeats(tensors) if repeated is None else repeated
    sums = min(math.prod(tensors[0].shape[1:-1]) * (tensors[0].shape[-1] + tensors[1].shape[-1]), 2 * reference.PIECE)
    return Expected(exact, terms, error, 8 + (sums / 4 if repeated else longest / 16 if name == "sq_norm" else 0))


def check(found: Tensor, name: str, tensors: list[Tensor], dtype: torch.dtype | None = None) -> None:
    wanted = expected(name, tensors)
    accumulates = accumulation_type(tensors[0].dtype)
    assert found.dtype == (dtype or (tensors[0].dtype if name == "outer" else accumulates))
    assert found.shape == wanted.exact.shape
    inside = np.abs(wanted.exact) < torch.finfo(found.dtype).max / 2  # fp16 ends at 65504
    # fp64 factors of a narrower result may be narrowed before.
    accumulates = accumulates if found.dtype == torch.float64 else torch.float32
    values = found.double().numpy()
    excess = np.abs(values - wanted.exact) - wanted.allowed(found.dtype, accumulates)
    assert not (excess[inside] > 0).any(), f"{excess[inside].max():.3g} more than allowed"
    assert not np.isnan(values[inside]).any()


def call(name: str, tensors: list[Tensor], backend: str | None, **options) -> Tensor:
    return getattr(ops, name)(*tensors, backend=backend, **options)


# --- every operator is right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data(), shape=shapes(), dtype=st.sampled_from(DTYPES))
def test_error_is_within_the_bound(name, backend, data, shape, dtype):
    tensors = data.draw(operands(name, shape, dtype))
    kept = [t.clone() for t in tensors]
    check(call(name, tensors, backend), name, tensors)
    for tensor, copy in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, copy)


@given(data=st.data(), shape=shapes(), dtype=st.sampled_from(DTYPES), result=st.sampled_from(DTYPES))
def test_outer_into_out(backend, data, shape, dtype, result):
    """Of any type and strides, and nothing around it is written."""
    tensors = data.draw(operands("outer", shape, dtype))
    assume(not (INTERPRETED and {dtype, result} == {torch.float16, torch.float64}))
    out = torch.full((shape.B, shape.O, shape.I), 7.0, dtype=result)
    layout = data.draw(st.sampled_from([dense, permuted, sliced, misaligned]))
    out = layout(data.draw, out)
    around = out._base if out._base is not None else out
    written = torch.zeros_like(around, dtype=torch.bool)
    written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    before = around.clone()
    assert call("outer", tensors, backend, out=out) is out
    check(out, "outer", tensors, result)
    assert torch.equal(around[~written].nan_to_num(), before[~written].nan_to_num())


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data(), shape=shapes())
def test_inputs_may_be_the_same_memory(name, backend, data, shape):
    """Both factors, or all of them, are one tensor or views of one."""
    n = max(shape.O, shape.I)
    whole = numbers((*shape.delta[:-1], n), torch.float32, data.draw(SEEDS))
    delta, activation = whole[..., : shape.O], whole[..., n - shape.I :]
    tensors = [delta, activation]
    if name == "gram":
        assume(shape.B <= 64)
        tensors += tensors
    elif name == "dot":
        tensors.append(torch.randn(2).as_strided((shape.O, shape.I), (0, 0), data.draw(st.integers(0, 1))))
    elif name == "linear":
        tensors.append(torch.randn(2).as_strided((2, shape.O, shape.I), (1, 0, 0)))
    check(call(name, tensors, backend), name, tensors)


@given(data=st.data(), number=st.integers(1, 5))
def test_a_group_is_its_products(backend, data, number):
    products = []
    for _ in range(number):
        shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
        delta, activation = data.draw(operands("outer", shape, dtype))
        out = torch.empty(shape.B, shape.O, shape.I, dtype=dtype) if data.draw(st.booleans()) else None
        products.append(ops.Product(delta, activation, out))
    for found, product in zip(ops.outer_group(products, backend=backend), products, strict=True):
        assert product.out is None or found is product.out
        assert torch.equal(found, ops.outer(product.delta, product.activation, backend=backend))


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data(), shape=shapes())
def test_derivatives_equal_those_of_the_definition(name, backend, data, shape):
    assume(shape.B * (shape.T or 1) <= 512)
    tensors = data.draw(operands(name, shape, torch.float64))
    leaves = [t.resolve_neg().clone().requires_grad_() for t in tensors]
    plain = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    result = PLAIN[name](*plain)
    upstream = numbers(tuple(result.shape), torch.float64, data.draw(SEEDS))
    found = torch.autograd.grad(call(name, leaves, backend), leaves, upstream)
    for gradient, wanted in zip(found, torch.autograd.grad(result, plain, upstream), strict=True):
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10 * scale + 1e-20)


# --- out and the inputs in one memory --------------------------------------------------------------------------------


@st.composite
def windows(draw, memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view of ``memory`` with any strides, overlapping itself or not."""
    strides, left = [], memory.numel() - 1
    for n in shape:
        strides.append(draw(st.integers(0, left // max(1, n - 1))))
        left -= strides[-1] * max(0, n - 1)
    return memory.as_strided(shape, strides, draw(st.integers(0, left)))


def elements(x: Tensor) -> list[int]:
    """Where its elements lie in memory, in elements."""
    places = torch.arange(x.untyped_storage().nbytes() // x.element_size())
    return places.as_strided(x.shape, x.stride(), x.storage_offset()).flatten().tolist()


@given(
    data=st.data(),
    B=st.integers(0, 3),
    T=st.sampled_from([None, 1, 2, 20]),
    O=st.integers(0, 3),
    I=st.integers(0, 3),
)
def test_overlapping_memory_is_refused_or_right(backend, data, B, T, O, I):
    shape = Shape(B, T, O, I)
    memory = numbers((data.draw(st.sampled_from([40, 400])),), torch.float32, data.draw(SEEDS))
    assume(memory.numel() > max(math.prod(shape.activation), math.prod(shape.delta)) or (T or 0) < 20)
    inputs = [data.draw(windows(memory, size)) for size in (shape.delta, shape.activation)]
    out = data.draw(windows(memory, (B, O, I)))
    wanted = ops.outer(*(t.clone() for t in inputs))
    before = memory.clone()
    own = elements(out)
    shared = set(own) & {place for t in inputs for place in elements(t)}
    try:
        ops.outer(*inputs, out=out, backend=backend)
    except (ValueError, RuntimeError):
        assert torch.equal(memory, before)
        assert len(set(own)) < len(own) or shared or _interleaves(out), "refused though nothing is shared"
        return
    assert len(set(own)) == len(own)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    outside = torch.ones(memory.numel(), dtype=torch.bool)
    outside[own] = False
    assert torch.equal(memory[outside], before[outside])


def _interleaves(out: Tensor) -> bool:
    """Whether some dimension steps within what the dimensions of smaller strides span."""
    span = 0
    for stride, n in sorted(zip(out.stride(), out.shape, strict=True)):
        if n > 1 and stride <= span:
            return True
        span += stride * (n - 1)
    return False


def test_outs_of_a_group_may_not_share_memory():
    delta, activation = torch.ones(2, 3), torch.ones(2, 4)
    memory = torch.zeros(100)
    first, second = memory[:24].view(2, 3, 4), memory[23:47].view(2, 3, 4)
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        ops.outer_group([ops.Product(delta, activation, first), ops.Product(delta, activation, second)])
    read = memory[20:26].view(2, 3)
    with pytest.raises(ValueError, match="out: expected memory of its own"):  # what a later product reads
        ops.outer_group([ops.Product(delta, activation, first), ops.Product(read, activation)])
    assert not memory.any()
    second = memory[24:48].view(2, 3, 4)
    ops.outer_group([ops.Product(delta, activation, first), ops.Product(delta, activation, second)])
    assert memory.sum() == 48
    flat = torch.zeros(2, 24)  # the gradients of two layers as one vector for each sample
    first, second = flat[:, :12].view(2, 3, 4), flat[:, 12:].view(2, 3, 4)
    ops.outer_group([ops.Product(delta, activation, first), ops.Product(2 * delta, activation, second)])
    assert flat.tolist() == [[1.0] * 12 + [2.0] * 12] * 2


def test_torch_has_no_negative_strides():
    """So no such view can reach an operator: NumPy's are refused, and a flip is a copy."""
    backwards = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1]
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(backwards)
    with pytest.raises(RuntimeError, match="Negative strides"):
        torch.zeros(6).as_strided((2, 3), (3, -1), 2)
    with pytest.raises(ValueError, match="step must be greater than zero"):
        torch.zeros(6)[::-1]
    flipped = torch.from_numpy(np.ascontiguousarray(backwards))
    assert torch.equal(ops.outer(flipped, flipped), flipped[:, :, None] * flipped[:, None])


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn])
def test_other_memory_layouts_are_refused(make):
    delta, activation = torch.ones(2, 3), torch.ones(2, 4)
    for name, others in ("outer", ()), ("sq_norm", ()), ("dot", (torch.ones(3, 4),)):
        with pytest.raises(ValueError, match=r"expected dense tensors \(torch.strided\), but got"):
            getattr(ops, name)(make(delta), activation, *others)


# --- how results for different inputs hang together ------------------------------------------------------------------


def agree(
    one: Tensor, other: Tensor, name: str, tensors: list[Tensor], times: float = 2, repeated: bool | None = None
) -> None:
    """Two ways to the same numbers, each with an error of its own."""
    allowed = times * expected(name, tensors, repeated).allowed(one.dtype, accumulation_type(one.dtype))
    assert ((one - other).abs().double().numpy() <= allowed).all()


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data(), shape=shapes(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_linear_in_each_operand(name, backend, data, shape, dtype):
    tensors = data.draw(operands(name, shape, dtype))
    k = data.draw(st.integers(0, len(tensors) - 1))
    other = (
        numbers(tuple(tensors[k].shape), dtype, data.draw(SEEDS)) * tensors[k].abs().amax()
        if tensors[k].numel()
        else tensors[k]
    )
    factor = data.draw(st.sampled_from([1.0, -1.0, 0.0, 3.0, 0.3]))

    def at(value: Tensor) -> list[Tensor]:
        return [*tensors[:k], value, *tensors[k + 1 :]]

    mixed = factor * tensors[k] + other
    found = call(name, at(mixed), backend)
    parts = factor * call(name, at(tensors[k]), backend) + call(name, at(other), backend)
    larger = [t.abs() for t in at(abs(factor) * tensors[k].abs() + other.abs())]
    agree(found, parts, name, larger, times=4, repeated=repeats(tensors))


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data(), shape=shapes(), power=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_is_exact(name, backend, data, shape, power):
    tensors = data.draw(operands(name, shape, torch.float32, as_they_are))
    k = data.draw(st.integers(0, len(tensors) - 1))
    scaled = [t * 2.0**power if j == k else t for j, t in enumerate(tensors)]
    times = 2.0 ** (2 * power if name == "sq_norm" else power)
    assert torch.equal(call(name, scaled, backend), call(name, tensors, backend) * times)


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data(), shape=shapes(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_permuting_and_splitting_the_samples(name, backend, data, shape, dtype):
    assume(shape.B <= 64)
    tensors = data.draw(operands(name, shape, dtype))
    whole = call(name, tensors, backend)
    order = torch.tensor(data.draw(st.permutations(range(shape.B))), dtype=torch.long)
    turned = call(name, [tensors[0][order], tensors[1][order], *tensors[2:]], backend)
    cut = data.draw(st.integers(0, shape.B))
    parts = [
        call(name, [*(t[part] for t in tensors[:2]), *tensors[2:]], backend) for part in (slice(cut), slice(cut, None))
    ]
    if name == "outer" and shape.T is None:
        assert torch.equal(turned, whole[order])
        assert torch.equal(torch.cat(parts), whole)
    agree(turned, whole[order], name, [tensors[0][order], tensors[1][order], *tensors[2:]], repeated=repeats(tensors))
    agree(torch.cat(parts), whole, name, tensors)


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data(), shape=shapes(positions=True))
def test_permuting_and_splitting_the_positions(name, backend, data, shape):
    assume(0 < shape.T <= 64)
    tensors = data.draw(operands(name, shape, torch.float32))
    whole = call(name, tensors, backend)
    order = torch.tensor(data.draw(st.permutations(range(shape.T))))
    agree(call(name, [tensors[0][:, order], tensors[1][:, order], *tensors[2:]], backend), whole, name, tensors)
    if name != "sq_norm":
        cut = data.draw(st.integers(0, shape.T))
        parts = [
            call(name, [t[:, part] for t in tensors[:2]] + tensors[2:], backend)
            for part in (slice(cut), slice(cut, None))
        ]
        agree(parts[0] + parts[1], whole, name, tensors, times=4)


@given(data=st.data(), shape=shapes(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_operators_agree_with_each_other(backend, data, shape, dtype):
    """Exchanged factors transpose a gradient, a norm is on a Gram matrix's diagonal, a dot is one functional."""
    assume(shape.B <= 32)
    delta, activation, direction = data.draw(operands("dot", shape, dtype))
    factors = [delta, activation]
    outer, sq_norm = call("outer", factors, backend), call("sq_norm", factors, backend)
    agree(call("outer", factors[::-1], backend).mT, outer, "outer", factors)
    agree(call("sq_norm", factors[::-1], backend), sq_norm, "sq_norm", factors)
    gram = call("gram", factors * 2, backend)
    agree(gram, gram.mT, "gram", factors * 2)
    agree(gram.diagonal(), sq_norm, "sq_norm", factors)
    dot = call("dot", [*factors, direction], backend)
    agree(dot, (outer * direction).sum((1, 2)), "dot", [*factors, direction], times=4 + shape.O * shape.I)
    agree(dot, call("dot", [activation, delta, direction.mT], backend), "dot", [*factors, direction])
    agree(dot, call("linear", [*factors, direction[None]], backend)[:, 0], "dot", [*factors, direction])


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data(), shape=shapes(), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_stays_with_its_sample(name, backend, data, shape, bad):
    assume(shape.B > 1 and 0 not in (shape.T, shape.O, shape.I))
    tensors = data.draw(operands(name, shape, torch.float32, as_they_are))
    sample, k = data.draw(st.integers(0, shape.B - 1)), data.draw(st.integers(0, 1))
    spoiled = [t.clone() for t in tensors]
    spoiled[k][sample].view(-1)[data.draw(st.integers(0, spoiled[k][sample].numel() - 1))] = bad
    spoiled[1 - k][sample] = 1.0  # infinity times zero is not finite either
    clean = [t.clone() for t in spoiled]
    clean[k][sample] = 0.0
    found, others = call(name, spoiled, backend), torch.arange(shape.B) != sample
    assert found[sample].numel() == 0 or name in ("dot", "linear", "gram") or not found[sample].isfinite().all()
    assert torch.equal(found[others], call(name, clean, backend)[others])
