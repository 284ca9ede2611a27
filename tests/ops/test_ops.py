"""The operators: right in every type and shape, differentiable twice, and correct under torch.library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradext import backends, ops
from gradext.backends import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# B, T (None: no such dimension), O, I: ones and zeros everywhere, O < I and O > I, few and many positions.
SHAPES = [
    *((4, None, 5, 3), (3, None, 2, 7), (1, None, 1, 1), (0, None, 3, 2), (2, None, 0, 3), (2, None, 3, 0)),
    *((3, 2, 5, 4), (2, 1, 3, 3), (2, 40, 3, 4), (2, 3, 30, 20), (0, 2, 3, 2), (2, 0, 3, 2), (2, 2, 0, 3)),
]


def factors(B, T, O, I, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    middle = () if T is None else (T,)
    return tuple(torch.randn(B, *middle, n, generator=generator, dtype=torch.float64).to(dtype) for n in (O, I))


def operand(*shape, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def explicit(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 2 else x


# The plain torch formulation of each operator, which writes the gradients.
def plain_outer(delta, activation):
    return torch.einsum("bto,bti->boi", explicit(delta), explicit(activation))


PLAIN = {
    "outer": plain_outer,
    "sq_norm": lambda d, a: plain_outer(d, a).square().sum((1, 2)),
    "dot": lambda d, a, R: (plain_outer(d, a) * R).sum((1, 2)),
    "linear": lambda d, a, W: torch.einsum("boi,hoi->bh", plain_outer(d, a), W),
    "gram": lambda d, a, od, oa: plain_outer(d, a).flatten(1) @ plain_outer(od, oa).flatten(1).mT,
}


def operands(name, T, O, I, dtype=torch.float64) -> tuple[Tensor, ...]:
    if name == "gram":  # with another batch and another number of positions
        return factors(3, None if T is None else T + 1, O, I, dtype, seed=5)
    return {"dot": (operand(O, I, dtype=dtype),), "linear": (operand(3, O, I, dtype=dtype),)}.get(name, ())


def schema_name(name, T) -> str:
    return "outer_sum" if name == "outer" and T is not None else name


@pytest.mark.parametrize("T", [33, 64, 150])
def test_norms_of_many_positions_by_both_gram_matrices(T, backend):
    delta, activation = factors(2, T, 200, 240)  # wide: the Gram matrices take fewer operations than the gradients
    expected = PLAIN["sq_norm"](delta, activation)
    torch.testing.assert_close(ops.sq_norm(delta, activation, backend=backend), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("features", [1000, 5000, 65537])
def test_norms_of_long_equal_rows_do_not_drift(features, backend):
    """Of equal squares, added up one after the other, each step rounds in the same direction."""
    delta, activation = torch.full((2, features), 0.786), torch.full((2, 3), 0.3)
    exact = PLAIN["sq_norm"](delta.double(), activation.double())
    found = ops.sq_norm(delta, activation, backend=backend)
    torch.testing.assert_close(found.double(), exact, rtol=64 * torch.finfo(torch.float32).eps, atol=0)


def test_gram_matrices_of_very_many_equal_positions_do_not_drift(backend):
    delta, activation = torch.full((2, 65537, 3), 0.786), torch.full((2, 65537, 4), 0.3)
    exact = PLAIN["gram"](delta.double(), activation.double(), delta.double(), activation.double())
    found = ops.gram(delta, activation, delta, activation, backend=backend)
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize(("O", "I"), [(65537, 1), (65537, 3), (3, 65537)])
@pytest.mark.parametrize("name", ["dot", "linear", "gram"])
def test_sums_over_very_many_features_do_not_drift(name, O, I, backend):
    generator = torch.Generator().manual_seed(0)
    delta, activation, weight = (torch.rand(*shape, generator=generator) for shape in ((3, O), (3, I), (2, O, I)))
    more = {"dot": (weight[0],), "linear": (weight,), "gram": (delta, activation)}[name]
    exact = PLAIN[name](delta.double(), activation.double(), *(t.double() for t in more))
    found = getattr(ops, name)(delta, activation, *more, backend=backend)
    torch.testing.assert_close(found.double(), exact, rtol=12 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_lazy_negatives_are_read_as_what_they_stand_for(name, backend):
    """The imaginary part of a conjugate is the negative of what lies in memory."""
    tensors = [*factors(4, None, 5, 3), *operands(name, None, 5, 3)]
    lazy = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in tensors]
    assert all(t.is_neg() for t in lazy)
    expected = PLAIN[name](*tensors)
    for k in range(len(tensors)):
        found = getattr(ops, name)(*tensors[:k], lazy[k], *tensors[k + 1 :], backend=backend)
        torch.testing.assert_close(found, expected)
    if name == "outer":
        for found in ops.outer_group([ops.Product(*lazy), ops.Product(*tensors)], backend=backend):
            torch.testing.assert_close(found, expected)
        out = torch.zeros(4, 5, 3, dtype=torch.complex128).conj().imag
        with pytest.raises(ValueError, match="out: expected memory for the result itself"):
            ops.outer(*tensors, out=out, backend=backend)


@pytest.mark.medium
def test_opcheck(backend):
    for T in None, 3:
        for name in PLAIN:
            operator = getattr(torch.ops.gradext, schema_name(name, T))
            inputs = tuple(t.requires_grad_() for t in (*factors(4, T, 5, 3), *operands(name, T, 5, 3)))
            # One form of each operator is traced too, which is slow.
            traced = ("test_aot_dispatch_dynamic",) if T or name == "outer" else ()
            always = ("test_schema", "test_faketensor", "test_autograd_registration")
            torch.library.opcheck(operator.default, inputs, {"backend": backend}, test_utils=(*always, *traced))
            inputs = (*factors(4, T, 5, 3, torch.bfloat16), *operands(name, T, 5, 3, torch.bfloat16))
            torch.library.opcheck(
                operator.default, inputs, {"backend": backend}, test_utils=("test_schema", "test_faketensor")
            )
        operator = getattr(torch.ops.gradext, schema_name("outer", T))
        delta, activation = factors(4, T, 5, 3)
        torch.library.opcheck(operator.out, (delta, activation), {"out": torch.empty(4, 5, 3), "backend": backend})
        torch.library.opcheck(
            operator.default, (delta, activation), {"dtype": torch.bfloat16, "backend": backend}, test_utils=always
        )


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (2, 40, 3, 4) and s != (2, 3, 30, 20)])
@pytest.mark.parametrize("name", PLAIN)
def test_first_and_second_derivatives(name, shape):
    inputs = [t.requires_grad_() for t in (*factors(*shape), *operands(name, *shape[1:]))]
    function = getattr(ops, name)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", PLAIN)
def test_derivatives_in_half_precision_accumulate_in_single(name):
    """1,000 equal terms: a half-precision sum of them would stall or overflow."""
    shape = (2, 1000, 2, 2)
    half = torch.float16
    narrow = [t.requires_grad_() for t in (*factors(*shape, dtype=half), *operands(name, *shape[1:], half))]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    found = torch.autograd.grad(getattr(ops, name)(*narrow).float().sum(), narrow)
    for gradient, exact in zip(found, torch.autograd.grad(PLAIN[name](*wide).sum(), wide), strict=True):
        assert gradient.dtype == torch.float16
        torch.testing.assert_close(gradient.double(), exact, rtol=4e-3, atol=4e-3 * exact.abs().amax().item())


@pytest.mark.parametrize("name", PLAIN)
def test_compiles_to_one_graph(name):
    for T in None, 3:
        inputs = [t.requires_grad_() for t in (*factors(4, T, 5, 3), *operands(name, T, 5, 3))]
        function = getattr(ops, name)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
        found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
        for gradient, expected in zip(found, torch.autograd.grad(function(*inputs).sum(), inputs), strict=True):
            torch.testing.assert_close(gradient, expected)


def test_compiled_outer_writes_into_out():
    delta, activation = factors(4, None, 5, 3)
    out = torch.empty(4, 5, 3, dtype=torch.float64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def write(delta, activation, out):
        ops.outer(delta * 2, activation, out=out)
        return out.sum()

    write(delta, activation, out)
    torch.testing.assert_close(out, 2 * plain_outer(delta, activation))


def test_operands_of_another_type_are_converted(backend):
    delta, activation = factors(4, None, 5, 3, dtype=torch.float32)
    for dtype in DTYPES:
        R, W = operand(5, 3, dtype=dtype), operand(2, 5, 3, dtype=dtype)
        expected = PLAIN["dot"](delta, activation, R.float())
        torch.testing.assert_close(ops.dot(delta, activation, R, backend=backend), expected)
        expected = PLAIN["linear"](delta, activation, W.float())
        torch.testing.assert_close(ops.linear(delta, activation, W, backend=backend), expected)


def test_what_does_not_fit_is_refused_with_names():
    delta, activation = factors(4, None, 5, 3)
    with pytest.raises(ValueError, match=r"delta, activation: expected shapes.*\[4, 5\] and \[3, 3\]"):
        ops.outer(delta, activation[:3])
    with pytest.raises(ValueError, match="delta, activation: expected shapes"):
        ops.sq_norm(delta.unsqueeze(1), activation)
    with pytest.raises(TypeError, match=r"one floating-point type for both.*float64 and torch.float32"):
        ops.outer(delta, activation.float())
    with pytest.raises(TypeError, match=r"torch.int64"):
        ops.sq_norm(delta.long(), activation.long())
    with pytest.raises(ValueError, match="one device for both, but got cpu and meta"):
        ops.outer(delta, activation.to("meta"))
    with pytest.raises(ValueError, match=r"reference: expected shape \[O, I\] with \[O, I\] = \[5, 3\].*\[3, 5\]"):
        ops.dot(delta, activation, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"weight: expected shape \[H, O, I\]"):
        ops.linear(delta, activation, torch.ones(5, 3))
    with pytest.raises(ValueError, match="device"):
        ops.dot(delta, activation, torch.ones(5, 3, device="meta"))
    with pytest.raises(TypeError, match="int64"):
        ops.dot(delta, activation, torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="dtype"):
        ops.outer(delta, activation, dtype=torch.int32)
    with pytest.raises(ValueError, match="delta: expected 2 dimensions"):
        torch.ops.gradext.outer(delta.unsqueeze(1), activation.unsqueeze(1))
    with pytest.raises(ValueError, match=r"out: expected shape \[4, 5, 3\]"):
        ops.outer(delta, activation, out=torch.empty(4, 3, 5))
    other = factors(3, None, 5, 3)
    with pytest.raises(ValueError, match=r"other_delta, other_activation: expected 2 dimensions.*\[O, I\] = \[5, 3\]"):
        ops.gram(delta, activation, *factors(3, None, 5, 4))
    with pytest.raises(ValueError, match="other_delta, other_activation: expected 2 dimensions"):
        ops.gram(delta, activation, *factors(3, 2, 5, 3))
    with pytest.raises(TypeError, match=r"other_delta: expected.*type torch.float64, but got torch.float32"):
        ops.gram(delta, activation, *(t.float() for t in other))
    with pytest.raises(ValueError, match="other_delta: expected the factors' device cpu, but got meta"):
        ops.gram(delta, activation, *(t.to("meta") for t in other))
    with pytest.raises(ValueError, match="expanded"):
        ops.outer(delta, activation, out=torch.empty(1, 5, 3).expand(4, 5, 3))


def test_direct_calls_equal_dispatched_ones_and_modes_see_them():
    """Plain tensors go past the dispatcher; a mode that looks on still sees every operator."""

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    delta, activation, reference = torch.randn(3, 4), torch.randn(3, 5), torch.randn(4, 5)
    calls = {
        "gradext.outer.default": lambda: ops.outer(delta, activation),
        "gradext.outer.out": lambda: ops.outer(delta, activation, out=torch.empty(3, 4, 5)),
        "gradext.outer_sum.default": lambda: ops.outer(delta[:, None], activation[:, None]),
        "gradext.sq_norm.default": lambda: ops.sq_norm(delta, activation),
        "gradext.dot.default": lambda: ops.dot(delta, activation, reference),
        "gradext.linear.default": lambda: ops.linear(delta, activation, reference[None]),
        "gradext.gram.default": lambda: ops.gram(delta, activation, delta[:2], activation[:2]),
    }
    for name, call in calls.items():
        direct = call()
        with Seen() as seen:
            dispatched = call()
        assert name in seen.names
        assert torch.equal(direct, dispatched)


# --- groups ----------------------------------------------------------------------------------------------------------


def products() -> list[ops.Product]:
    """Of several shapes, types and positions, with and without an out."""
    given = torch.empty(4, 3, 5, dtype=torch.float64).mT
    return [
        ops.Product(*factors(4, None, 5, 3)),
        ops.Product(*factors(4, None, 5, 3), out=given),
        ops.Product(*factors(2, 3, 7, 2), dtype=torch.float32),
        ops.Product(*factors(4, None, 2, 9, torch.bfloat16)),
        ops.Product(*factors(0, None, 2, 9)),
    ]


def test_a_group_equals_its_products(backend):
    found = ops.outer_group(products(), backend=backend)
    for result, (delta, activation, out, dtype) in zip(found, products(), strict=True):
        expected = ops.outer(delta, activation, dtype=dtype, backend=backend)
        assert torch.equal(result, expected)
        assert result.dtype == expected.dtype
        assert out is None or result.stride() == out.stride()
    assert ops.outer_group([]) == []


def test_a_group_is_one_call_of_a_backend_that_has_it(monkeypatch):
    calls = []

    def outer_group(problems):
        calls.append(len(problems))
        for delta, activation, out in problems:
            reference.outer(delta, activation, out)

    monkeypatch.setattr(reference, "outer_group", outer_group, raising=False)
    found = ops.outer_group(products(), backend="reference")
    assert calls == [len(products())]
    for result, product in zip(found, products(), strict=True):
        expected = plain_outer(product.delta, product.activation)
        torch.testing.assert_close(result, expected.to(result.dtype))
    wanted = [p._replace(delta=p.delta.requires_grad_()) for p in products() if p.out is None]
    assert all(result.requires_grad for result in ops.outer_group(wanted, backend="reference"))
    assert len(calls) == 1


# --- memory, inference mode, autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1 << 20, 1 << 24])  # 2^60 bytes; and more than 64 bits can count
def test_memory_that_runs_out_is_told(rows, backend):
    delta, activation = torch.ones(1, 1).expand(rows, 1 << 20), torch.ones(1, 1).expand(rows, 1 << 18)
    message = rf"\[{rows}, 1048576, 262144\] of torch.float32 take {rows >> 20} EiB; use batch_layer_factors"
    small = torch.ones(2, 3)
    for call in (
        lambda: ops.outer(delta, activation, backend=backend),
        lambda: ops.outer_group([ops.Product(small, small), ops.Product(delta, activation)], backend=backend),
    ):
        with pytest.raises((MemoryError, RuntimeError), match=message):
            call()
        assert torch.equal(ops.outer(small, small, backend=backend), torch.ones(2, 3, 3))
    assert ops.sq_norm(delta[:4], activation[:4], backend=backend).tolist() == [2.0**38] * 4


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_devices_own_error_keeps_its_class(kind, monkeypatch):
    """With the meta device in place of a GPU."""
    delta, activation = (t.to("meta") for t in factors(4, None, 512, 1024, torch.bfloat16))

    def empty(*size, **options):
        raise kind("CUDA error" if kind is RuntimeError else "CUDA out of memory. Tried to allocate 4.00 MiB")

    monkeypatch.setattr(torch, "empty", empty)
    out_of_memory = r"out of memory on meta: .*\[4, 512, 1024\] of torch.bfloat16 take 4 MiB; use batch_layer_factors"
    with pytest.raises(kind, match="^CUDA error$" if kind is RuntimeError else out_of_memory) as raised:
        ops.outer(delta, activation)
    assert type(raised.value) is kind


def test_inference_tensors_are_refused_where_a_gradient_is_wanted():
    with torch.inference_mode():
        made = factors(4, None, 5, 3)
    delta, activation = factors(4, None, 5, 3)
    delta.requires_grad_()
    assert torch.equal(ops.outer(*made), ops.outer(delta, activation))
    for call in (
        lambda a: ops.outer(delta, a),
        lambda a: ops.sq_norm(delta, a),
        lambda a: ops.gram(delta, a, delta, a),
    ):
        with pytest.raises(RuntimeError, match=r"made under torch.inference_mode\(\).*pass its .clone\(\)"):
            call(made[1])
        assert call(made[1].clone()).requires_grad
    with torch.inference_mode():
        assert not ops.outer(delta, made[1]).requires_grad


@pytest.mark.parametrize("T", [None, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_autocast_changes_nothing(name, T, backend):
    inputs = (*factors(4, T, 50, 30, torch.float32), *operands(name, T, 50, 30, torch.float32))
    expected = getattr(ops, name)(*inputs, backend=backend)
    half = torch.empty(4, 50, 30, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = getattr(ops, name)(*inputs, backend=backend)
        differentiable = getattr(ops, name)(inputs[0].clone().requires_grad_(), *inputs[1:], backend=backend)
        if name == "outer":
            pair = [ops.Product(*inputs), ops.Product(*inputs, out=half)]
            grouped, converted = ops.outer_group(pair, backend=backend)
            assert torch.equal(grouped, expected)
            assert torch.equal(converted, expected.bfloat16())
    assert torch.equal(found, expected)
    torch.testing.assert_close(differentiable, expected, rtol=1e-5, atol=1e-5 * expected.abs().amax().item())


# --- the table -------------------------------------------------------------------------------------------------------


class Works:
    """A backend in name only."""

    def __init__(self, working=True):
        self.available = lambda: None if working else "not here"


@pytest.fixture
def table(monkeypatch):
    """The name of the backend chosen for a call, with all of them working, or all but some."""

    def chosen(operator, device, T, dtype=torch.float32, result=None, by_columns=False, missing=(), size=(4, 30, 20)):
        modules = {name: Works(name not in missing) for name in backends.BACKENDS}
        modules["triton"]._on_tensor_cores = backends.triton._on_tensor_cores
        monkeypatch.setattr(backends, "BACKENDS", modules)
        monkeypatch.setattr(backends, "reference", modules["reference"])
        monkeypatch.setattr(backends, "_working", {})
        delta, _ = factors(size[0], T, *size[1:], dtype)
        out = torch.empty(size, dtype=result or dtype)
        call = backends.Call(delta, (out.mT.contiguous().mT if by_columns else out) if operator == "outer" else None)
        module = backends.choose(operator, None, device, call)
        monkeypatch.undo()
        return next(name for name, value in modules.items() if value is module)

    return chosen


def test_table_on_cuda(table):
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for T in None, 1, 8:
        for dtype in DTYPES:
            assert table("outer", "cuda", T, dtype) == "cuda"
        assert table("outer", "cuda", T, missing=["cuda"]) == "triton"
        assert table("outer", "cuda", T, missing=["cuda", "triton"]) == "reference"
        assert table("outer", "cuda", T, by_columns=True) == "triton"
    for dtype in single, double:
        assert table("outer", "cuda", 9, dtype) == "reference"
        assert table("outer", "cuda", 9, dtype, result=half) == "triton"
        assert table("outer", "cuda", 9, dtype, result=half, missing=["triton"]) == "reference"
        for operator in "dot", "linear", "gram":
            assert table(operator, "cuda", 3, dtype) == "reference"
        for T in None, 3:
            assert table("sq_norm", "cuda", T, dtype) == "cuda"
    assert table("outer", "cuda", 9, half) == "triton"
    assert table("sq_norm", "cuda", None, half) == "cuda"
    assert table("sq_norm", "cuda", 3, half) == "cuda"
    assert table("sq_norm", "cuda", 3, half, missing=["triton"]) == "cuda"
    for operator in "dot", "linear", "gram":
        assert table(operator, "cuda", None, half) == "triton"
        assert table(operator, "cuda", None, half, missing=["triton"]) == "reference"


def test_table_follows_the_tf32_flag(table):
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        found = [table("sq_norm", "cuda", 3), table("dot", "cuda", None), table("dot", "cuda", None, torch.float64)]
    finally:
        matmul.allow_tf32 = before
    assert found == ["triton", "triton", "reference"]


def test_table_on_other_devices(table):
    for T in None, 1, 11:
        assert table("outer", "cpu", T) == "cpu"
        assert table("outer", "cpu", T, missing=["cpu"]) == "reference"
    assert table("outer", "cpu", 12) == "reference"
    assert table("outer", "cpu", None, by_columns=True) == "reference"
    for operator in "sq_norm", "dot", "linear", "gram":
        assert table(operator, "cpu", None) == "reference"
    assert table("outer", "mps", None) == "reference"


def test_table_ends_every_choice_it_begins():
    for operator in PLAIN:
        for device in "cuda", "cpu":
            rows = [row for row in backends.TABLE if operator in row.operators and row.device == device]
            assert all(row.when != "else" for row in rows[:-1])
            assert not rows or rows[-1].when == "else"
            assert all(row.backends[-1] == "reference" and set(row.backends) <= set(backends.BACKENDS) for row in rows)


# --- norms of several layers -----------------------------------------------------------------------------------------


@pytest.mark.medium
def test_norms_of_several_layers(backend):
    layers = [factors(4, T, 5 + k, 3, seed=k) for k, T in enumerate((None, 3, 40))]
    found = ops.sq_norm_group(layers, backend=backend)
    assert found.shape == (3, 4)
    for row, layer in zip(found, layers, strict=True):
        torch.testing.assert_close(row, ops.sq_norm(*layer, backend=backend))
    mixed = [layers[0], [x.bfloat16() for x in layers[1]]]
    assert ops.sq_norm_group(mixed, backend=backend).dtype == torch.float64
    assert ops.sq_norm_group(layers[:1], backend=backend).shape == (1, 4)
    leaves = [[x.clone().requires_grad_() for x in layer] for layer in layers]
    assert torch.autograd.gradcheck(
        lambda *x: ops.sq_norm_group([x[:2], x[2:4], x[4:]], backend=backend), [x for layer in leaves for x in layer]
    )


def test_a_group_of_norms_is_one_call_of_a_backend_that_has_it(monkeypatch):
    calls = []

    def sq_norm_group(layers):
        calls.append(len(layers))
        return torch.stack([reference.sq_norm(*layer) for layer in layers])

    monkeypatch.setattr(reference, "sq_norm_group", sq_norm_group, raising=False)
    layers = [factors(4, T, 5, 3) for T in (None, 3, 40)]
    layers.append([x.float() for x in layers[0]])
    found = ops.sq_norm_group(layers, backend="reference")
    assert sorted(calls) == [1, 3]
    assert found.dtype == torch.float64
    for row, (delta, activation) in zip(found, layers, strict=True):
        torch.testing.assert_close(row, reference.sq_norm(delta, activation).double())


def test_norms_of_wrong_layers():
    one, other = factors(4, None, 5, 3), factors(3, None, 5, 3)
    with pytest.raises(ValueError, match="expected at least one pair"):
        ops.sq_norm_group([])
    with pytest.raises(ValueError, match=r"the same number of samples in all, but got \[3, 4\]"):
        ops.sq_norm_group([one, other])
    with pytest.raises(ValueError, match="all on one device, but got cpu, meta"):
        ops.sq_norm_group([one, [x.to("meta") for x in one]])
    with pytest.raises(TypeError, match="one floating-point type"):
        ops.sq_norm_group([one, (one[0], one[1].float())])


# --- sums over the batch and projections -----------------------------------------------------------------------------


@pytest.mark.parametrize("T", [None, 3])
def test_weighted_sums_and_projections_are_differentiable_and_compile(T):
    delta, activation = factors(3, T, 4, 5)
    inputs = [t.requires_grad_() for t in (delta, activation, torch.rand(3).double(), operand(4, 2), operand(5, 3))]

    def function(delta, activation, weights, left, right):
        return ops.weighted_sum(delta, activation, weights), ops.project(delta, activation, left, right)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    plain = [t.detach() for t in inputs]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*plain), function(*plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_wrong_weighted_sums_and_projections():
    delta, activation = factors(3, None, 4, 5)
    with pytest.raises(ValueError, match=r"weights: expected shape \(3,\), but got \(4,\)"):
        ops.weighted_sum(delta, activation, torch.rand(4))
    with pytest.raises(ValueError, match=r"left: expected shape \[4, any\], but got \[5, 2\]"):
        ops.project(delta, activation, operand(5, 2), operand(5, 2))
    with pytest.raises(ValueError, match=r"right: expected shape \[5, any\]"):
        ops.project(delta, activation, operand(4, 2), operand(4, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "O", "I"), SHAPES)
def test_sums_of_squares_and_quadratic_forms(B, T, O, I, dtype, monkeypatch):
    delta, activation = factors(B, T, O, I, dtype)
    diag = operand(O, I, dtype=dtype).abs()
    squares = plain_outer(delta.double(), activation.double()).square()
    wide = reference.accumulation_type(dtype)
    for elements in (reference.BLOCK_ELEMENTS, 1):  # in one block, and sample by sample
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", elements)
        for found, expected in (
            (ops.square_sum(delta, activation), squares.sum(0)),
            (ops.quadratic(delta, activation, diag), (squares * diag.double()).sum((1, 2))),
        ):
            assert found.dtype == wide
            torch.testing.assert_close(found, expected.to(wide), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [None, 3])
def test_sums_of_squares_and_quadratic_forms_are_differentiable(T):
    inputs = [t.requires_grad_() for t in (*factors(3, T, 4, 5), operand(4, 5))]
    assert torch.autograd.gradcheck(lambda d, a, diag: (ops.square_sum(d, a), ops.quadratic(d, a, diag)), inputs)
    with pytest.raises(ValueError, match=r"diag: expected shape \[O, I\] with \[O, I\] = \[4, 5\]"):
        ops.quadratic(*inputs[:2], inputs[2].mT)
