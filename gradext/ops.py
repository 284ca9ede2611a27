"""The operators: torch.library schemas, argument checks, fake kernels, autograd formulas, choice of backend.

Every operator takes ``delta [B, (T,) O]`` and ``activation [B, (T,) I]``, which stand for the per-sample gradients
``G[b] = Σ_t delta[b, t] activation[b, t]ᵀ`` of shape [B, O, I]. They trace under ``torch.compile(fullgraph=True)``, and
their autograd formulas are themselves made of differentiable operators, so that they can be differentiated again.
Nothing here knows about modules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends.reference import accumulation_type, widen

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_library = torch.library.Library("gradext", "DEF")
_kernels: dict[tuple[str, str], Callable] = {}  # (operator, overload) -> what the dispatcher calls in the end


def _call(operator: str, overload: str, *tensors: Tensor, **options):
    """``torch.ops.gradext.<operator>.<overload>``, past the dispatcher where that has nothing to do.

    Its way to a Python kernel takes 10 to 30 µs, several times the smallest kernels themselves.
    """
    if _is_plain((*tensors, options["out"]) if "out" in options else tensors):
        return _kernels[operator, overload](*tensors, **options)
    return getattr(getattr(torch.ops.gradext, operator), overload)(*tensors, **options)


def _is_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Whether no gradient is wanted and nobody looks on: no mode, tracer, transform, or tensor subclass."""
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
    if watched or not all(type(t) in _PLAIN_TYPES for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def outer(
    delta: Tensor,
    activation: Tensor,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Per-sample outer products ``out[b] = Σ_t delta[b, t] activation[b, t]ᵀ``.

    delta [B, (T,) O], activation [B, (T,) I] -> [B, O, I] of type ``dtype`` (default: of the inputs, or of ``out``).
    Writes B·O·I numbers, the floor of its cost; half precision accumulates in fp32. ``out`` may have any strides.
    Raises ValueError or TypeError for shapes, types and devices that do not fit, BackendError for a backend that does
    not work here.
    """
    name = "outer" if delta.ndim == 2 else "outer_sum"
    if out is None:
        return _call(name, "default", delta, activation, dtype=dtype, backend=backend)
    _call(name, "out", delta, activation, out=out, backend=backend)
    return out


def sq_norm(delta: Tensor, activation: Tensor, *, backend: str | None = None) -> Tensor:
    """Squared Frobenius norm of every per-sample gradient, ``Σ_ts (δ_t·δ_s)(a_t·a_s)`` -> [B], never forming one."""
    return _call("sq_norm", "default", delta, activation, backend=backend)


def dot(delta: Tensor, activation: Tensor, reference: Tensor, *, backend: str | None = None) -> Tensor:
    """Inner product of every per-sample gradient with ``reference [O, I]``, ``Σ_t δ_tᵀ R a_t`` -> [B]."""
    return _call("dot", "default", delta, activation, reference, backend=backend)


def linear(delta: Tensor, activation: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """H linear functionals ``weight [H, O, I]`` of every per-sample gradient, ``⟨G[b], weight[h]⟩`` -> [B, H]."""
    return _call("linear", "default", delta, activation, weight, backend=backend)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_factors(delta: Tensor, activation: Tensor) -> None:
    if delta.ndim not in (2, 3) or activation.ndim != delta.ndim or delta.shape[:-1] != activation.shape[:-1]:
        raise ValueError(
            "delta, activation: expected shapes [B, O] and [B, I], or [B, T, O] and [B, T, I], but got "
            f"{list(delta.shape)} and {list(activation.shape)}"
        )
    if delta.dtype not in DTYPES or activation.dtype != delta.dtype:
        raise TypeError(
            f"delta, activation: expected one floating-point type for both, but got {delta.dtype} and "
            f"{activation.dtype}; convert one with .to()"
        )
    if delta.device != activation.device:
        raise ValueError(
            f"delta, activation: expected one device for both, but got {delta.device} and {activation.device}"
        )


def _check_operand(name: str, operand: Tensor, shape: str, expected: tuple[int, ...], delta: Tensor) -> None:
    if tuple(operand.shape[-2:]) != expected or operand.ndim != shape.count(",") + 1:
        raise ValueError(
            f"{name}: expected shape {shape} with [O, I] = {list(expected)}, but got {list(operand.shape)}"
        )
    if operand.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a floating-point type, but got {operand.dtype}")
    if operand.device != delta.device:
        raise ValueError(f"{name}: expected the factors' device {delta.device}, but got {operand.device}")


def check_out(out: Tensor, shape: tuple[int, ...], device: torch.device, name: str = "out") -> None:
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, but got {list(out.shape)}")
    if out.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a floating-point type, but got {out.dtype}")
    if out.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, but got one on {out.device}")
    if out.requires_grad:
        raise ValueError(f"{name}: expected a tensor that does not require grad; pass {name}.detach()")
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"{name}: expected memory of its own for every element, but it is an expanded tensor")


def _gradient_shape(delta: Tensor, activation: Tensor) -> tuple[int, int, int]:
    return delta.shape[0], delta.shape[-1], activation.shape[-1]


# --- kernels ---------------------------------------------------------------------------------------------------------


def _check_ndim(delta: Tensor, ndim: int) -> None:
    if delta.ndim != ndim:
        raise ValueError(f"delta: expected {ndim} dimensions, but got shape {list(delta.shape)}")


def _outer_kernels(name: str, ndim: int):
    def check(delta, activation):
        check_factors(delta, activation)
        _check_ndim(delta, ndim)

    def functional(delta, activation, *, dtype=None, backend=None):
        check(delta, activation)
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {DTYPES}, but got {dtype}")
        return backends.implementation("outer", backend, delta.device.type)(delta, activation, dtype=dtype)

    def into_out(delta, activation, *, out, backend=None):
        check(delta, activation)
        check_out(out, _gradient_shape(delta, activation), delta.device)
        backends.implementation("outer", backend, delta.device.type)(delta, activation, out=out)

    def fake(delta, activation, *, dtype=None, backend=None):
        check(delta, activation)
        return delta.new_empty(_gradient_shape(delta, activation), dtype=dtype)

    def fake_out(delta, activation, *, out, backend=None):
        check(delta, activation)
        check_out(out, _gradient_shape(delta, activation), delta.device)

    arguments = "Tensor delta, Tensor activation, *"
    _library.define(f"{name}({arguments}, ScalarType? dtype=None, str? backend=None) -> Tensor")
    _library.define(f"{name}.out({arguments}, Tensor(a!) out, str? backend=None) -> ()")
    _kernels[name, "default"], _kernels[name, "out"] = functional, into_out
    _library.impl(name, functional, "CompositeExplicitAutograd")
    _library.impl(f"{name}.out", into_out, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradext::{name}", fake, lib=_library)
    torch.library.register_fake(f"gradext::{name}.out", fake_out, lib=_library)
    torch.library.register_autograd(f"gradext::{name}", _outer_backward, setup_context=_save_factors, lib=_library)


def _contraction_kernel(name: str, operand: str | None, shape: str, result_shape):
    def check(delta, activation, operands):
        check_factors(delta, activation)
        for tensor in operands:
            _check_operand(operand, tensor, shape, (delta.shape[-1], activation.shape[-1]), delta)

    def kernel(delta, activation, *operands, backend=None):
        check(delta, activation, operands)
        # Backends get operands of the factors' type, or of the wider one that they accumulate in.
        wide = accumulation_type(delta.dtype)
        operands = [t if t.dtype in (delta.dtype, wide) else t.to(wide) for t in operands]
        return backends.implementation(name, backend, delta.device.type)(delta, activation, *operands)

    def fake(delta, activation, *operands, backend=None):
        check(delta, activation, operands)
        return delta.new_empty(result_shape(delta, *operands), dtype=accumulation_type(delta.dtype))

    extra = f", Tensor {operand}" if operand else ""
    _library.define(f"{name}(Tensor delta, Tensor activation{extra}, *, str? backend=None) -> Tensor")
    _kernels[name, "default"] = kernel
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradext::{name}", fake, lib=_library)


# --- autograd formulas -----------------------------------------------------------------------------------------------


def _save_factors(ctx, inputs, output, keyword_only_inputs=None):
    ctx.save_for_backward(*inputs)


def _saved(ctx) -> tuple[Tensor, ...]:
    """Factors [B, T, O] and [B, T, I], with T = 1 made explicit, and operands, in the type that sums are taken in."""
    delta, activation, *operands = ctx.saved_tensors
    if delta.ndim == 2:
        delta, activation = delta.unsqueeze(1), activation.unsqueeze(1)
    delta, activation = widen(delta, activation)
    return delta, activation, *(operand.to(delta.dtype) for operand in operands)


def _as_saved(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(
        None if grad is None else grad.reshape(saved.shape).to(saved.dtype)
        for grad, saved in zip(grads, ctx.saved_tensors, strict=True)
    )


def _outer_backward(ctx, grad):
    """Ḡ [B, O, I]: δ̄_t = Ḡ a_t, ā_t = Ḡᵀ δ_t."""
    d, a = _saved(ctx)
    grad = grad.to(d.dtype)
    return _as_saved(ctx, a @ grad.mT, d @ grad)


def _sq_norm_backward(ctx, grad):
    """s̄ [B]: δ̄_t = 2 s̄ Σ_s (a_t·a_s) δ_s, ā_t = 2 s̄ Σ_s (δ_t·δ_s) a_s."""
    d, a = _saved(ctx)
    scale = 2 * grad[:, None, None]
    return _as_saved(ctx, scale * ((a @ a.mT) @ d), scale * ((d @ d.mT) @ a))


def _dot_backward(ctx, grad):
    """s̄ [B]: δ̄_t = s̄ R a_t, ā_t = s̄ Rᵀ δ_t, R̄ = Σ_bt s̄_b δ_bt a_btᵀ."""
    d, a, R = _saved(ctx)
    grad = grad[:, None, None]
    scaled = grad * d
    grad_reference = scaled.flatten(0, 1).mT @ a.flatten(0, 1) if ctx.needs_input_grad[2] else None
    return _as_saved(ctx, grad * (a @ R.mT), scaled @ R, grad_reference)


def _linear_backward(ctx, grad):
    """ȳ [B, H]: W̄[h] = Σ_bt ȳ_bh δ_bt a_btᵀ, δ̄_t = Σ_h ȳ_h W[h] a_t, ā_t = Σ_h ȳ_h W[h]ᵀ δ_t."""
    d, a, W = _saved(ctx)
    T = d.shape[1]
    d, a = d.flatten(0, 1), a.flatten(0, 1)
    g = grad.repeat_interleave(T, dim=0)  # [BT, H]
    if d.shape[1] >= a.shape[1]:
        grads = _contract_linear(g, d, a, W, ctx.needs_input_grad)
    else:  # the same with the roles of the factors exchanged
        needed = [ctx.needs_input_grad[k] for k in (1, 0, 2)]
        grad_a, grad_d, grad_W = _contract_linear(g, a, d, W.mT, needed)
        grads = grad_d, grad_a, None if grad_W is None else grad_W.mT
    return _as_saved(ctx, *grads)


def _contract_linear(g: Tensor, long: Tensor, short: Tensor, W: Tensor, needed) -> tuple[Tensor | None, ...]:
    """g [N, H], long [N, O], short [N, I], W [H, O, I]: gradients of both factors and of W by one product each.

    The intermediates are of the shorter factor's size, [N, H, I].
    """
    (N, H), O, I = g.shape, long.shape[1], short.shape[1]
    scaled = (g.unsqueeze(2) * short.unsqueeze(1)).reshape(N, H * I)
    by_long = W.transpose(0, 1).reshape(O, H * I)
    return (
        scaled @ by_long.mT if needed[0] else None,
        (g.unsqueeze(2) * (long @ by_long).reshape(N, H, I)).sum(1) if needed[1] else None,
        (long.mT @ scaled).reshape(O, H, I).transpose(0, 1) if needed[2] else None,
    )


_outer_kernels("outer", 2)
_outer_kernels("outer_sum", 3)
_contraction_kernel("sq_norm", None, "", lambda delta: (delta.shape[0],))
_contraction_kernel("dot", "reference", "[O, I]", lambda delta, reference: (delta.shape[0],))
_contraction_kernel("linear", "weight", "[H, O, I]", lambda delta, weight: (delta.shape[0], weight.shape[0]))
for _name, _backward in (
    ("sq_norm", _sq_norm_backward),
    ("dot", _dot_backward),
    ("linear", _linear_backward),
):
    torch.library.register_autograd(f"gradext::{_name}", _backward, setup_context=_save_factors, lib=_library)
