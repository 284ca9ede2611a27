"""The outer product on CUDA tensors by the compiled kernel."""

import torch
from torch import Tensor

from .. import native

_C = native.C
_CODE = (
    {} if _C is None else {torch.float32: _C.F32, torch.float64: _C.F64, torch.float16: _C.F16, torch.bfloat16: _C.BF16}
)

# What the kernels read, for each type that they write. Other inputs are converted before: they are small.
_READS = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float32, torch.float16),
    torch.bfloat16: (torch.float32, torch.bfloat16),
}


def available() -> str | None:
    """None where the compiled kernel can be used on this machine, else why not."""
    return native.reason if _C is None else _C.cuda_status()["reason"]


def outer(delta: Tensor, activation: Tensor, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Per-sample outer products, summed over T: ``out[b, o, i] = Σ_t delta[b, t, o] · activation[b, t, i]``.

    Args:
        delta: ``[B, O]`` or ``[B, T, O]``, any strides.
        activation: ``[B, I]`` or ``[B, T, I]``, with as many dimensions as ``delta``.
        out: ``[B, O, I]``, any strides, written and returned.
        dtype: of a result without ``out``; the inputs' promoted type by default.

    Sums are kept in fp32, or fp64 for fp64 results, and rounded once. Runs on the current stream of the
    tensors' device without synchronising, so that it can be captured into a CUDA graph.

    Cost: writes B·O·I elements by 16-byte streaming stores and reads the inputs; T > 1 adds the matrix
    product's arithmetic, on the CUDA cores.

    Raises:
        RuntimeError: the launch failed; the message holds sizes, device and what to do.
    """
    if out is not None:
        dtype = out.dtype
    elif dtype is None:
        dtype = delta.dtype if delta.dtype is activation.dtype else torch.promote_types(delta.dtype, activation.dtype)

    if delta.dtype is not activation.dtype or delta.dtype not in _READS.get(dtype, ()):
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        if dtype in _READS:
            delta, activation = delta.to(compute), activation.to(compute)
    if delta.dim() == 2:
        delta, activation = delta.unsqueeze(1), activation.unsqueeze(1)

    B, T, O = delta.shape
    I = activation.shape[2]
    if out is None:
        out = torch.empty(B, O, I, dtype=dtype, device=delta.device)
    out_b, out_o, out_i = out.stride()
    if dtype not in _READS or (out_i != 1 and I > 1):
        product = torch.mul if T == 1 else torch.bmm
        return out.copy_(product(delta.transpose(1, 2), activation))
    _C.outer_cuda(
        delta.data_ptr(),
        activation.data_ptr(),
        out.data_ptr(),
        B,
        T,
        O,
        I,
        *delta.stride(),
        *activation.stride(),
        out_b,
        out_o,
        _CODE[delta.dtype],
        _CODE[dtype],
        delta.device.index,
        torch.cuda.current_stream(delta.device).cuda_stream,
    )
    return out
