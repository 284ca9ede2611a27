"""The operators: torch.library schemas, argument checks, fake kernels, autograd formulas, choice of backend.

Every operator takes ``delta [B, (T,) O]`` and ``activation [B, (T,) I]``, which stand for the per-sample gradients
``G[b] = Σ_t delta[b, t] activation[b, t]ᵀ`` of shape [B, O, I]. They trace under ``torch.compile(fullgraph=True)``, and
their autograd formulas are themselves made of differentiable operators, so that they can be differentiated again.
Nothing here knows about modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends.reference import accumulation_type, widen

# The operators that users call; the checks are used by other files of the package.
__all__ = [
    "DTYPES",
    "dot",
    "gram",
    "linear",
    "outer",
    "outer_group",
    "project",
    "quadratic",
    "sq_norm",
    "sq_norm_group",
    "square_sum",
    "weighted_sum",
]

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_library = torch.library.Library("gradext", "DEF")
_kernels: dict[tuple[str, str], Callable] = {}  # (operator, overload) -> what the dispatcher calls in the end


def without_autocast(device_type: str, function: Callable[..., Any], *arguments: object) -> Any:
    """``function(*arguments)`` with autocast disabled, so that operators return the types that they declare."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return function(*arguments)
    with torch.autocast(device_type, enabled=False):
        return function(*arguments)


def _call(operator: str, overload: str, *tensors: Tensor, **options):
    """``torch.ops.gradext.<operator>.<overload>``; bypasses the dispatcher if that has nothing to do.

    The dispatcher takes 10 to 30 µs to call a Python kernel, several times as long as the smallest kernels.
    """
    if _is_plain((*tensors, options["out"]) if "out" in options else tensors):
        return _kernels[operator, overload](*tensors, **options)
    if "out" in options and not torch.compiler.is_compiling() and options["out"].is_neg():
        raise ValueError("out: expected memory for the result itself, but it is a lazy negative (see Tensor.is_neg)")
    _refuse_inference_tensors(tensors)
    return getattr(getattr(torch.ops.gradext, operator), overload)(*tensors, **options)


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the call may bypass the dispatcher: no gradient, mode, tracer, transform or tensor subclass is involved.

    Nor a lazy negative (the imaginary part of a conjugate), which the dispatcher materialises.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
    if watched:
        return False
    differentiable = torch.is_grad_enabled()
    return all(type(t) in _PLAIN_TYPES and not (differentiable and t.requires_grad) and not t.is_neg() for t in tensors)


def _refuse_inference_tensors(tensors: tuple[Tensor, ...]) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if any(t.requires_grad for t in tensors) and any(t.is_inference() for t in tensors):
        raise RuntimeError(
            "expected tensors that autograd can save, since a gradient is wanted, but got one made under "
            "torch.inference_mode(); make it outside of inference mode, or pass its .clone()"
        )


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

    ``out`` may share no memory with an input, since it is written while they are read.

    Raises ValueError or TypeError for shapes, types and devices that do not fit, BackendError for a backend that does
    not work here; torch.OutOfMemoryError, MemoryError or torch's own RuntimeError, with the requested size, if memory
    runs out.
    """
    name = "outer" if delta.ndim == 2 else "outer_sum"
    if out is None:
        return _call(name, "default", delta, activation, dtype=dtype, backend=backend)
    _call(name, "out", delta, activation, out=out, backend=backend)
    return out


class Product(NamedTuple):
    """The arguments of one `outer` in a group."""

    delta: Tensor
    activation: Tensor
    out: Tensor | None = None
    dtype: torch.dtype | None = None


def outer_group(products: Sequence[Product], *, backend: str | None = None) -> list[Tensor]:
    """`outer` of every product, in as few launches as the backend can: many layers of a small batch are one launch.

    Raises as `outer`.
    """
    tensors = [t for p in products for t in (p.delta, p.activation, p.out) if t is not None]
    if len(products) < 2 or not _is_plain(tensors):
        return [outer(p.delta, p.activation, out=p.out, dtype=p.dtype, backend=backend) for p in products]
    return _outer_group(products, backend)


def sq_norm(delta: Tensor, activation: Tensor, *, backend: str | None = None) -> Tensor:
    """Squared Frobenius norm of every per-sample gradient, ``Σ_ts (δ_t·δ_s)(a_t·a_s)`` -> [B], never forming one."""
    return _call("sq_norm", "default", delta, activation, backend=backend)


def sq_norm_group(layers: Sequence[tuple[Tensor, Tensor]], *, backend: str | None = None) -> Tensor:
    """`sq_norm` of several layers, each (delta, activation), of one batch -> [L, B], in the widest of their types.

    On a GPU this takes one launch for all layers of a type, and one that adds up. If a gradient is required, each layer
    is computed alone. Raises as `sq_norm`, and ValueError for no layer or for layers of different B.
    """
    if not layers:
        raise ValueError("layers: expected at least one pair of factors, but got none")
    sizes = {delta.shape[0] for delta, _ in layers}
    if len(sizes) > 1:
        raise ValueError(f"layers: expected the same number of samples in all, but got {sorted(sizes)}")
    if len(layers) > 1 and _is_plain([factor for layer in layers for factor in layer]):
        return _sq_norm_group(layers, backend)
    norms = [sq_norm(*layer, backend=backend) for layer in layers]
    return norms[0].unsqueeze(0) if len(norms) == 1 else _stacked(norms)


def _stacked(rows: list[Tensor]) -> Tensor:
    wide = functools.reduce(torch.promote_types, (row.dtype for row in rows))
    return torch.stack([row.to(wide) for row in rows])


def dot(delta: Tensor, activation: Tensor, reference: Tensor, *, backend: str | None = None) -> Tensor:
    """Inner product of every per-sample gradient with ``reference [O, I]``, ``Σ_t δ_tᵀ R a_t`` -> [B]."""
    return _call("dot", "default", delta, activation, reference, backend=backend)


def linear(delta: Tensor, activation: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """H linear functionals ``weight [H, O, I]`` of every per-sample gradient, ``⟨G[b], weight[h]⟩`` -> [B, H]."""
    return _call("linear", "default", delta, activation, weight, backend=backend)


def weighted_sum(
    delta: Tensor, activation: Tensor, weights: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``Σ_b w_b G[b]``, weights [B] or None for ones -> [O, I], in the accumulation type; BTOI operations.

    One matrix product over all positions of all samples. On a GPU half-precision factors are multiplied without a
    conversion and summed in fp32; the weight of a sample is applied while its delta is loaded. Differentiable in all
    tensors.
    """
    check_factors(delta, activation)
    if weights is not None and tuple(weights.shape) != (delta.shape[0],):
        raise ValueError(f"weights: expected shape ({delta.shape[0]},), but got {tuple(weights.shape)}")
    return _composed("weighted_sum", backend, delta, activation, weights)


def project(delta: Tensor, activation: Tensor, left: Tensor, right: Tensor, *, backend: str | None = None) -> Tensor:
    """``leftᵀ G[b] right = Σ_t (leftᵀ δ_t)(rightᵀ a_t)ᵀ``, left [O, P], right [I, Q] -> [B, P, Q].

    In the accumulation type; BT(OP + IQ + PQ) operations; no gradient is formed. On a GPU half-precision factors are
    read once, and the projected factors are not written. Differentiable in all tensors.
    """
    check_factors(delta, activation)
    for name, matrix, size in (("left", left, delta.shape[-1]), ("right", right, activation.shape[-1])):
        if matrix.ndim != 2 or matrix.shape[0] != size:
            raise ValueError(f"{name}: expected shape [{size}, any], but got {list(matrix.shape)}")
    return _composed("project", backend, delta, activation, left.to(delta.dtype), right.to(delta.dtype))


def square_sum(delta: Tensor, activation: Tensor, *, backend: str | None = None) -> Tensor:
    """``Σ_b G[b]²`` elementwise -> [O, I]: B times the diagonal of the empirical Fisher matrix. Differentiable.

    T = 1: BOI operations; T > 1: BTOI, through blocks of gradients of a size that suits the device.
    """
    check_factors(delta, activation)
    return _composed("square_sum", backend, delta, activation)


def quadratic(delta: Tensor, activation: Tensor, diag: Tensor, *, backend: str | None = None) -> Tensor:
    """``Σ_oi diag_oi G[b]_oi²`` with diag [O, I] -> [B], at the cost of `square_sum`. Differentiable."""
    check_factors(delta, activation)
    _check_operand("diag", diag, "[O, I]", (delta.shape[-1], activation.shape[-1]), delta)
    return _composed("quadratic", backend, delta, activation, diag)


def _composed(name: str, backend: str | None, *tensors: Tensor | None) -> Tensor:
    """The backend's function if the call may bypass the dispatcher, else the differentiable one of `reference`."""
    delta = tensors[0]
    assert delta is not None
    if not _is_plain([t for t in tensors if t is not None]):
        return without_autocast(delta.device.type, getattr(backends.reference, name), *_wide(tensors))
    function = backends.implementation(name, backend, backends.Call(delta))
    return without_autocast(delta.device.type, function, *tensors)


def _wide(tensors: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """In the accumulation type: a product of another type than its operands has no derivative."""
    return (None if t is None else t.to(accumulation_type(t.dtype)) for t in tensors)


def gram(
    delta: Tensor,
    activation: Tensor,
    other_delta: Tensor,
    other_activation: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Inner products of two batches' gradients, ``K[b, c] = Σ_ts (δ_bt·δ'_cs)(a_bt·a'_cs)`` -> [B, C].

    other_delta [C, (S,) O] and other_activation [C, (S,) I] have as many dimensions as the factors, and their type and
    device. Neither batch of gradients is formed as a whole; for the cost see `GradFactors.gram`.
    """
    return _call("gram", "default", delta, activation, other_delta, other_activation, backend=backend)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_factors(delta: Tensor, activation: Tensor) -> None:
    shape, other, dtype = delta.shape, activation.shape, delta.dtype
    # Everything that can be wrong, cheapest check first; which one failed is found below.
    if (
        len(shape) == len(other)
        and (len(shape) == 2 or (len(shape) == 3 and shape[1] == other[1]))
        and shape[0] == other[0]
        and dtype is activation.dtype
        and dtype in DTYPES
        and delta.device == activation.device
        and delta.layout is activation.layout is torch.strided
    ):
        return
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
    raise ValueError(
        f"delta, activation: expected dense tensors (torch.strided), but got {delta.layout} and {activation.layout}; "
        "convert them with .to_dense()"
    )


def _check_other(delta: Tensor, activation: Tensor, other_delta: Tensor, other_activation: Tensor) -> None:
    check_factors(other_delta, other_activation)
    expected = _gradient_shape(delta, activation)[1:]
    if other_delta.ndim != delta.ndim or _gradient_shape(other_delta, other_activation)[1:] != expected:
        raise ValueError(
            f"other_delta, other_activation: expected {delta.ndim} dimensions, the last of sizes "
            f"[O, I] = {list(expected)}, but got shapes {list(other_delta.shape)} and {list(other_activation.shape)}"
        )
    if other_delta.dtype != delta.dtype:
        raise TypeError(f"other_delta: expected the factors' type {delta.dtype}, but got {other_delta.dtype}")
    if other_delta.device != delta.device:
        raise ValueError(f"other_delta: expected the factors' device {delta.device}, but got {other_delta.device}")


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
    if (
        out.shape == shape
        and out.dtype in DTYPES
        and out.device == device
        and not out.requires_grad
        and out.is_contiguous()
    ):
        return
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, but got {list(out.shape)}")
    if out.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a floating-point type, but got {out.dtype}")
    if out.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, but got one on {out.device}")
    if out.requires_grad:
        raise ValueError(f"{name}: expected a tensor that does not require grad; pass {name}.detach()")
    if out.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor (torch.strided), but got {out.layout}")
    span = 0  # of the dimensions with smaller strides; one that steps within it may meet the same element again
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)) if out.numel() else ():
        if size > 1 and stride <= span:
            raise ValueError(
                f"{name}: expected memory of its own for every element, but it is an expanded or overlapping view, of "
                f"strides {list(out.stride())}"
            )
        span += stride * (size - 1)


def check_apart(outs: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
    """Raise if results share memory with each other or with an input."""
    outs, inputs = list(outs), list(inputs)
    if len(outs) == 1:  # the usual case, in less time than sorting takes
        begin, end = _span(outs[0])
        if all(first >= end or last <= begin for first, last in map(_span, inputs)):
            return
    spans = sorted(
        (*_span(t), k, written, t)
        for k, (written, t) in enumerate([*((True, t) for t in outs), *((False, t) for t in inputs)])
    )
    open_spans: list[tuple] = []
    for span in spans:
        begin, end, _, written, tensor = span
        open_spans = [other for other in open_spans if other[1] > begin]
        for *_, other_written, other in open_spans:
            if (written or other_written) and _share_memory(tensor, other):
                raise ValueError(
                    "out: expected memory of its own, but it shares some with an input or with another result; pass "
                    "an out of its own, or the input's .clone()"
                )
        if end > begin:
            open_spans.append(span)


def _span(t: Tensor) -> tuple[int, int]:
    """The address of its first byte and of the byte after its last; the same address twice if it is empty."""
    begin = t.data_ptr()
    if t.is_contiguous():
        return begin, begin + t.nbytes
    if t.numel() == 0:
        return begin, begin
    return begin, begin + (
        1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    ) * t.itemsize


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """For two tensors whose spans overlap: interleaved slices of one buffer may share no element."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    try:
        # Its stubs know only the limits -1 and 0, its documentation any.
        return np.shares_memory(np.asarray(_Extent(one)), np.asarray(_Extent(other)), max_work=1 << 16)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Extent:
    """A tensor's memory as NumPy sees it. Only addresses are used, so it may be a GPU's."""

    def __init__(self, t: Tensor) -> None:
        self.__array_interface__ = {
            "data": (t.data_ptr(), True),
            "shape": tuple(t.shape),
            "strides": tuple(stride * t.itemsize for stride in t.stride()),
            "typestr": f"|V{t.itemsize}",
            "version": 3,
        }


def _gradient_shape(delta: Tensor, activation: Tensor) -> tuple[int, int, int]:
    return delta.shape[0], delta.shape[-1], activation.shape[-1]


# --- kernels ---------------------------------------------------------------------------------------------------------


def _new_result(delta: Tensor, activation: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        dtype = delta.dtype
    elif dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {DTYPES}, but got {dtype}")
    B, O, I = _gradient_shape(delta, activation)
    try:
        if delta.device.type == "cpu":
            return backends.cpu.empty(B, O, I, dtype)
        return torch.empty(B, O, I, dtype=dtype, device=delta.device)
    except (MemoryError, RuntimeError) as error:
        asked = B * O * I * dtype.itemsize
        if not _is_out_of_memory(error):
            raise
        raise type(error)(
            f"out of memory on {delta.device}: the per-sample gradients [B, O, I] = [{B}, {O}, {I}] of {dtype} take "
            f"{_readable(asked)}; use batch_layer_factors, which gives norms, inner products and the like without "
            f"them, or smaller batches ({error})"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU's allocator raises a bare RuntimeError, and so does a size beyond 64 bits."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "calculation overflowed" in str(error)


def _readable(nbytes: int) -> str:
    size, units = float(nbytes), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"


def _outer_kernels(name: str, ndim: int):
    def check(delta, activation):
        check_factors(delta, activation)
        if len(delta.shape) != ndim:
            raise ValueError(f"delta: expected {ndim} dimensions, but got shape {list(delta.shape)}")

    def write(delta, activation, out, backend):
        device = delta.device.type
        module = backends.choose("outer", backend, device, backends.Call(delta, out))
        return without_autocast(device, module.outer, delta, activation, out)

    def functional(delta, activation, *, dtype=None, backend=None):
        check(delta, activation)
        return write(delta, activation, _new_result(delta, activation, dtype), backend)

    def into_out(delta, activation, *, out, backend=None):
        check(delta, activation)
        check_out(out, _gradient_shape(delta, activation), delta.device)
        check_apart((out,), (delta, activation))
        write(delta, activation, out, backend)

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


def _outer_group(products: Sequence[Product], backend: str | None) -> list[Tensor]:
    results: list[Tensor] = []
    groups: dict[ModuleType, list[tuple]] = {}
    if any(p.out is not None for p in products):
        inputs = (t for p in products for t in (p.delta, p.activation))
        check_apart([p.out for p in products if p.out is not None], inputs)
    for delta, activation, out, dtype in products:
        check_factors(delta, activation)
        if out is None:
            out = _new_result(delta, activation, dtype)
        else:
            check_out(out, _gradient_shape(delta, activation), delta.device)
        results.append(out)
        module = backends.choose("outer", backend, delta.device.type, backends.Call(delta, out))
        groups.setdefault(module, []).append((delta, activation, out))
    for module, problems in groups.items():
        device = problems[0][0].device.type
        if hasattr(module, "outer_group"):
            without_autocast(device, module.outer_group, problems)
        else:
            for delta, activation, out in problems:
                without_autocast(device, module.outer, delta, activation, out)
    return results


def _sq_norm_group(layers: Sequence[tuple[Tensor, Tensor]], backend: str | None) -> Tensor:
    groups: dict[tuple[ModuleType, torch.dtype, torch.device], list[int]] = {}
    chosen: dict[tuple, tuple] = {}
    for place, (delta, activation) in enumerate(layers):
        check_factors(delta, activation)
        kind = delta.ndim, delta.dtype, delta.device  # all that the table asks of a layer
        if kind not in chosen:
            module = backends.choose("sq_norm", backend, delta.device.type, backends.Call(delta))
            chosen[kind] = module, delta.dtype, delta.device
        groups.setdefault(chosen[kind], []).append(place)
    if len({device for _, _, device in groups}) > 1:
        raise ValueError(
            "layers: expected all on one device, but got " + ", ".join(sorted({str(d) for *_, d in groups}))
        )
    rows: dict[int, Tensor] = {}
    for (module, _, device), places in groups.items():
        own = [layers[place] for place in places]
        if hasattr(module, "sq_norm_group"):
            found = without_autocast(device.type, module.sq_norm_group, own)
            if len(groups) == 1:
                return found
        else:
            function = getattr(module, "sq_norm", None) or backends.reference.sq_norm
            found = [without_autocast(device.type, function, *layer) for layer in own]
        rows |= zip(places, found, strict=True)
    return _stacked([rows[place] for place in range(len(layers))])


def _contraction_kernel(name: str, operand: str, shape: str, result_shape):
    def check(delta, activation, operands):
        check_factors(delta, activation)
        for tensor in operands:
            _check_operand(operand, tensor, shape, (delta.shape[-1], activation.shape[-1]), delta)

    def kernel(delta, activation, *operands, backend=None):
        check(delta, activation, operands)
        # Backends get operands of the factors' type, or of the wider one that they accumulate in.
        wide = accumulation_type(delta.dtype)
        wider = [t if t.dtype in (delta.dtype, wide) else t.to(wide) for t in operands]
        function = backends.implementation(name, backend, backends.Call(delta))
        return without_autocast(delta.device.type, function, delta, activation, *wider)

    def fake(delta, activation, *operands, backend=None):
        check(delta, activation, operands)
        return delta.new_empty(result_shape(delta, *operands), dtype=accumulation_type(delta.dtype))

    extra = f", Tensor {operand}" if operand else ""
    _define(name, f"Tensor delta, Tensor activation{extra}", kernel, fake)


def _gram_kernel():
    def check(*factors):
        check_factors(*factors[:2])
        _check_other(*factors)

    def kernel(*factors, backend=None):
        check(*factors)
        function = backends.implementation("gram", backend, backends.Call(factors[0]))
        return without_autocast(factors[0].device.type, function, *factors)

    def fake(delta, activation, other_delta, other_activation, *, backend=None):
        check(delta, activation, other_delta, other_activation)
        return delta.new_empty(delta.shape[0], other_delta.shape[0], dtype=accumulation_type(delta.dtype))

    _define("gram", "Tensor delta, Tensor activation, Tensor other_delta, Tensor other_activation", kernel, fake)


def _define(name: str, tensors: str, kernel: Callable, fake: Callable) -> None:
    _library.define(f"{name}({tensors}, *, str? backend=None) -> Tensor")
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


def _gram_backward(ctx, grad):
    """K̄ [B, C]: δ̄_bt = Σ_cs K̄_bc (a_bt·a'_cs) δ'_cs, ā_bt = Σ_cs K̄_bc (δ_bt·δ'_cs) a'_cs, the others' by exchange.

    The intermediates are of size BT·CS, as in the formula itself.
    """
    d, a, other_d, other_a = (t.unsqueeze(1) if t.ndim == 2 else t for t in widen(*ctx.saved_tensors))
    (B, T), (C, S) = d.shape[:2], other_d.shape[:2]
    d, a, other_d, other_a = (t.flatten(0, 1) for t in (d, a, other_d, other_a))

    def weighted(product: Tensor) -> Tensor:  # [BT, CS]
        return (product.reshape(B, T, C, S) * grad[:, None, :, None]).reshape(B * T, C * S)

    needed = ctx.needs_input_grad
    grad_d, grad_a, grad_other_d, grad_other_a = None, None, None, None
    if needed[0] or needed[2]:
        by_a = weighted(a @ other_a.mT)
        grad_d, grad_other_d = by_a @ other_d if needed[0] else None, by_a.mT @ d if needed[2] else None
    if needed[1] or needed[3]:
        by_d = weighted(d @ other_d.mT)
        grad_a, grad_other_a = by_d @ other_a if needed[1] else None, by_d.mT @ a if needed[3] else None
    return _as_saved(ctx, grad_d, grad_a, grad_other_d, grad_other_a)


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
_contraction_kernel("sq_norm", "", "", lambda delta: (delta.shape[0],))
_contraction_kernel("dot", "reference", "[O, I]", lambda delta, reference: (delta.shape[0],))
_contraction_kernel("linear", "weight", "[H, O, I]", lambda delta, weight: (delta.shape[0], weight.shape[0]))
_gram_kernel()
for _name, _backward in (
    ("sq_norm", _sq_norm_backward),
    ("dot", _dot_backward),
    ("linear", _linear_backward),
    ("gram", _gram_backward),
):
    torch.library.register_autograd(f"gradext::{_name}", _backward, setup_context=_save_factors, lib=_library)
