"""The operators: right in every type and shape, differentiable twice, and proper citizens of torch.library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradext import ops

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
}


def operands(name, O, I, dtype=torch.float64) -> tuple[Tensor, ...]:
    return {"dot": (operand(O, I, dtype=dtype),), "linear": (operand(3, O, I, dtype=dtype),)}.get(name, ())


def schema_name(name, T) -> str:
    return "outer_sum" if name == "outer" and T is not None else name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PLAIN)
def test_equals_the_written_gradients_in_double_precision(name, shape, backend):
    delta, activation = factors(*shape)
    extra = operands(name, *shape[2:])
    result = getattr(ops, name)(delta, activation, *extra, backend=backend)
    torch.testing.assert_close(result, PLAIN[name](delta, activation, *extra), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, None, 300, 200), (8, None, 20, 700), (4, 9, 60, 50), (3, 200, 40, 30)])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_torch(name, shape, dtype, backend):
    narrow = (*factors(*shape, dtype=dtype), *operands(name, *shape[2:], dtype=dtype))
    exact = PLAIN[name](*(t.double() for t in narrow))
    plain = PLAIN[name](*narrow)
    result = getattr(ops, name)(*narrow, backend=backend)
    assert result.dtype == (dtype if name == "outer" else torch.float32)
    rounding = exact.abs().amax() * torch.finfo(result.dtype).eps
    assert (result - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result_type", DTYPES)
@pytest.mark.parametrize("T", [None, 3])
def test_outer_converts_to_the_type_asked_for(dtype, result_type, T, backend):
    delta, activation = factors(3, T, 5, 4, dtype=dtype)
    expected = plain_outer(delta.double(), activation.double())
    out = torch.empty(2, 4, 5, 3, dtype=result_type)[1].permute(2, 1, 0)
    for result in (
        ops.outer(delta, activation, dtype=result_type, backend=backend),
        ops.outer(delta, activation, out=out, backend=backend),
    ):
        assert result.dtype == result_type
        coarse = max(torch.finfo(result_type).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
        torch.testing.assert_close(result.double(), expected, rtol=coarse, atol=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", PLAIN)
def test_sliced_and_transposed_inputs(name, backend):
    for T in None, 3:
        delta, activation = factors(4, T, 5, 6)
        extra = operands(name, 5, 6)
        strided = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (delta, activation, *extra)]
        turned = [t.mT.contiguous().mT for t in (delta, activation, *extra)]
        expected = getattr(ops, name)(delta, activation, *extra, backend=backend)
        for inputs in strided, turned:
            torch.testing.assert_close(getattr(ops, name)(*inputs, backend=backend), expected, rtol=1e-13, atol=1e-13)


def test_opcheck(backend):
    for T in None, 3:
        for name in PLAIN:
            operator = getattr(torch.ops.gradext, schema_name(name, T))
            inputs = tuple(t.requires_grad_() for t in (*factors(4, T, 5, 3), *operands(name, 5, 3)))
            # One form of each operator is traced too, which is slow.
            traced = ("test_aot_dispatch_dynamic",) if T or name == "outer" else ()
            always = ("test_schema", "test_faketensor", "test_autograd_registration")
            torch.library.opcheck(operator.default, inputs, {"backend": backend}, test_utils=(*always, *traced))
            inputs = (*factors(4, T, 5, 3, torch.bfloat16), *operands(name, 5, 3, torch.bfloat16))
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
    inputs = [t.requires_grad_() for t in (*factors(*shape), *operands(name, *shape[2:]))]
    function = getattr(ops, name)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", PLAIN)
def test_derivatives_in_half_precision_accumulate_in_single(name):
    """1,000 equal terms: a half-precision sum of them would stall or overflow."""
    shape = (2, 1000, 2, 2)
    narrow = [t.requires_grad_() for t in (*factors(*shape, dtype=torch.float16), *operands(name, 2, 2, torch.float16))]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    found = torch.autograd.grad(getattr(ops, name)(*narrow).float().sum(), narrow)
    for gradient, exact in zip(found, torch.autograd.grad(PLAIN[name](*wide).sum(), wide), strict=True):
        assert gradient.dtype == torch.float16
        torch.testing.assert_close(gradient.double(), exact, rtol=4e-3, atol=4e-3 * exact.abs().amax().item())


@pytest.mark.parametrize("name", PLAIN)
def test_compiles_to_one_graph(name):
    for T in None, 3:
        inputs = [t.requires_grad_() for t in (*factors(4, T, 5, 3), *operands(name, 5, 3))]
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
    with pytest.raises(ValueError, match="expanded"):
        ops.outer(delta, activation, out=torch.empty(1, 5, 3).expand(4, 5, 3))


def test_direct_calls_equal_dispatched_ones_and_hide_from_nobody():
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
    }
    for name, call in calls.items():
        direct = call()
        with Seen() as seen:
            dispatched = call()
        assert name in seen.names
        assert torch.equal(direct, dispatched)
