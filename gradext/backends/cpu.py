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

_CODE = (
    {} if _C is None else {torch.float32: _C.F32, torch.float64: _C.F64, torch.float16: _C.F16, torch.bfloat16: _C.BF16}
)


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

    if delta.dim() == 2:
        B, O = delta.shape
        I = activation.shape[1]
        T = 1
        delta_b, delta_o = delta.stride()
        activation_b, activation_i = activation.stride()
        delta_t = activation_t = 0
    else:
        B, T, O = delta.shape
        I = activation.shape[2]
        delta_b, delta_t, delta_o = delta.stride()
        activation_b, activation_t, activation_i = activation.stride()

    if out is None:
        out = empty(B, O, I, dtype)
    out_b, out_o, out_i = out.stride()
    if out_i != 1 and I > 1:
        return reference.outer(delta, activation, out)
    _C.outer_cpu(
        delta.data_ptr(),
        activation.data_ptr(),
        out.data_ptr(),
        B,
        T,
        O,
        I,
        delta_b,
        delta_t,
        delta_o,
        activation_b,
        activation_t,
        activation_i,
        out_b,
        out_o,
        _CODE[compute],
        _CODE[dtype],
        torch.get_num_threads(),
    )
    return out


def empty(B: int, O: int, I: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised result; of 1 MiB or more in the workspace, where its memory returns when the tensor is freed."""
    nbytes = B * O * I * dtype.itemsize
    if nbytes < _WORKSPACE_FROM or _C is None:
        return torch.empty(B, O, I, dtype=dtype)
    buffer = _C.HostBuffer(min(nbytes, sys.maxsize))  # a size beyond size_t raises MemoryError too
    return torch.frombuffer(buffer, dtype=dtype).view(B, O, I)
