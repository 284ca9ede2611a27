"""The outer product of CPU tensors, by the compiled kernel, or by torch for results with non-contiguous rows."""

import sys

import torch
from torch import Tensor

from .. import native
from . import reference

_C = native.C

# New results of at least this many bytes lie in the workspace. Below, the allocator of torch reuses memory too, and
# wrapping a buffer costs 3 µs.
_WORKSPACE_FROM = 1 << 20

# The numbers of csrc/dtype.h's DType.
CODE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def available() -> str | None:
    """None if the compiled kernel can be used, else the reason why not."""
    return native.reason


def outer(
    delta: Tensor,
    activation: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Per-sample outer products, summed over T: ``out[b, o, i] = Σ_t delta[b, t, o] · activation[b, t, i]``.

    Args:
        delta: ``[B, O]`` or ``[B, T, O]``, any strides.
        activation: ``[B, I]`` or ``[B, T, I]``, with as many dimensions as ``delta``.
        out: ``[B, O, I]``, any strides, written and returned. Without it a result of 1 MiB or more lies in gradext's
            workspace; its memory returns there when the tensor is freed.
        dtype: of a result without ``out``; the inputs' promoted type by default.

    Sums are in fp32, or fp64 for fp64 results, and rounded once. Other types are converted first: B·T·(O + I)
    elements, where the result has B·O·I.

    Cost: writes B·O·I elements, with streaming stores if they exceed the cache, and reads the inputs once.

    Raises:
        MemoryError: the result could not be allocated.
    """
    if out is not None:
        dtype = out.dtype
    elif dtype is None:
        dtype = delta.dtype if delta.dtype is activation.dtype else torch.promote_types(delta.dtype, activation.dtype)

    compute = torch.float64 if dtype is torch.float64 else torch.float32
    if delta.dtype is not compute:
        delta = delta.to(compute)
    if activation.dtype is not compute:
        activation = activation.to(compute)

    if out is None:
        out = empty(delta.shape[0], delta.shape[-1], activation.shape[-1], dtype)
    if out.stride(2) != 1 and out.shape[2] > 1:
        return reference.outer(delta, activation, out)
    _C.outer_cpu(outer_fields(delta, activation, out), torch.get_num_threads())
    return out


def empty(B: int, O: int, I: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised result; of 1 MiB or more in the workspace, where its memory returns when the tensor is freed."""
    nbytes = B * O * I * dtype.itemsize
    if nbytes < _WORKSPACE_FROM or _C is None:
        return torch.empty(B, O, I, dtype=dtype)
    buffer = _C.HostBuffer(min(nbytes, sys.maxsize))  # a size beyond size_t raises MemoryError too
    return torch.frombuffer(buffer, dtype=dtype).view(B, O, I)


def outer_fields(delta: Tensor, activation: Tensor, out: Tensor) -> tuple[int, ...]:
    """One problem as the compiled functions take it: addresses, sizes, strides and types."""
    addresses = delta.data_ptr(), activation.data_ptr(), out.data_ptr()
    return *addresses, *sizes(delta, activation), *out.stride()[:2], CODE[delta.dtype], CODE[out.dtype]


def sizes(delta: Tensor, activation: Tensor) -> tuple[int, ...]:
    """B, T, O, I, and the strides of both factors, with T = 1 made explicit."""
    if delta.dim() == 2:
        (B, O), (_, I) = delta.shape, activation.shape
        (delta_b, delta_o), (activation_b, activation_i) = delta.stride(), activation.stride()
        return B, 1, O, I, delta_b, 0, delta_o, activation_b, 0, activation_i
    return *delta.shape, activation.shape[2], *delta.stride(), *activation.stride()
