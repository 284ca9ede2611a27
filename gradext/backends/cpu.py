"""The outer product on CPU tensors, by the compiled kernel where it is the fastest and by torch elsewhere."""

import torch
from torch import Tensor

from .. import native

_C = native.C

# From this many bytes on, a result of its own lies in the workspace: below, torch's allocator reuses memory
# as well, and wrapping a buffer costs 3 us.
_WORKSPACE_FROM = 1 << 20

# From about this T on the sum is bound by arithmetic, and torch's matrix product blocks it better (measured:
# the two meet between T = 8 and T = 20, by size and threads).
_BMM_FROM = 12

_CODE = (
    {} if _C is None else {torch.float32: _C.F32, torch.float64: _C.F64, torch.float16: _C.F16, torch.bfloat16: _C.BF16}
)


def available() -> str | None:
    """None where the compiled kernel can be used, else why not."""
    return native.reason


def outer(delta: Tensor, activation: Tensor, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Per-sample outer products, summed over T: ``out[b, o, i] = Σ_t delta[b, t, o] · activation[b, t, i]``.

    Args:
        delta: ``[B, O]`` or ``[B, T, O]``, any strides.
        activation: ``[B, I]`` or ``[B, T, I]``, with as many dimensions as ``delta``.
        out: ``[B, O, I]``, any strides, written and returned. Without it the result lies in reused memory of
            gradext's own from 1 MiB on, which returns to the pool with the tensor.
        dtype: of a result without ``out``; the inputs' promoted type by default.

    Sums are kept in fp32, or fp64 for fp64 results, and rounded once. Types the kernel does not take are
    converted before, which costs B·T·(O + I) elements where the result has B·O·I.

    Cost: writes B·O·I elements, past the cache where they would not fit into it, and reads the inputs once.

    Raises:
        MemoryError: the result could not be allocated.
    """
    if out is not None:
        dtype = out.dtype
    elif dtype is None:
        dtype = delta.dtype if delta.dtype is activation.dtype else torch.promote_types(delta.dtype, activation.dtype)

    compute = torch.float64 if dtype is torch.float64 else torch.float32
    if dtype in _CODE:
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
        out = _empty(B, O, I, dtype)
    out_b, out_o, out_i = out.stride()
    if dtype not in _CODE or T >= _BMM_FROM or (out_i != 1 and I > 1):
        return _by_torch(delta, activation, out)
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


def _empty(B: int, O: int, I: int, dtype: torch.dtype) -> Tensor:
    nbytes = B * O * I * dtype.itemsize
    if nbytes < _WORKSPACE_FROM or _C is None:
        return torch.empty(B, O, I, dtype=dtype)
    return torch.frombuffer(_C.HostBuffer(nbytes), dtype=dtype).view(B, O, I)


def _by_torch(delta: Tensor, activation: Tensor, out: Tensor) -> Tensor:
    if delta.dim() == 2:
        delta, activation = delta.unsqueeze(1), activation.unsqueeze(1)
    if delta.dtype is not activation.dtype:
        common = torch.promote_types(delta.dtype, activation.dtype)
        delta, activation = delta.to(common), activation.to(common)
    if delta.shape[1] == 1:
        return torch.mul(delta.transpose(1, 2), activation, out=out)
    if out.dtype is delta.dtype:
        return torch.bmm(delta.transpose(1, 2), activation, out=out)
    # A whole product of another type would need twice the memory: sample by sample it stays in the cache.
    for b in range(out.shape[0]):
        out[b].copy_(delta[b].T @ activation[b])
    return out
