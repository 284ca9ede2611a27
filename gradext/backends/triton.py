"""The operators as Triton kernels: shapes, strides and the choice of kernel here, the kernels in `gradext.kernels`.

For CUDA tensors, and under ``TRITON_INTERPRET=1`` (set before triton is imported) for CPU tensors too. Triton is first
imported when a backend is chosen, so that gradext does not need it.
"""

from __future__ import annotations

import functools
import importlib
import os

import torch
from torch import Tensor

from . import reference as plain
from .reference import accumulation_type


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_types() -> tuple[str, ...]:
    return ("cuda", "cpu") if interpreting() else ("cuda",)


@functools.cache
def available() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU; TRITON_INTERPRET=1, set before triton is imported, runs the kernels on CPU tensors"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the kernels need a GPU of compute capability 8.0 or newer, but this one has {major}.{minor}"
    return None


def _launch(kernel, programs: int, arguments: tuple, warps: int, stages: int, **constants) -> None:
    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _positions(delta: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, O] and [B, T, I], with T = 1 made explicit."""
    return (delta.unsqueeze(1), activation.unsqueeze(1)) if delta.ndim == 2 else (delta, activation)


def _precision(dtype: torch.dtype) -> str:
    """TF32 only where torch's own matrix products would use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _on_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16) or _precision(dtype) == "tf32"


# --- outer products --------------------------------------------------------------------------------------------------


def outer(delta: Tensor, activation: Tensor, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``out[b] = Σ_t delta[b, t] activation[b, t]ᵀ`` -> [B, O, I]; the conversion is fused, no other copy is made.

    Many positions in fp32 and fp64 are left to `torch.bmm`: without tensor cores a Triton product at best matches it.
    """
    from ..kernels import outer as kernels

    d, a = _positions(delta, activation)
    (B, T, O), I = d.shape, a.shape[2]
    if out is None:
        out = delta.new_empty(B, O, I, dtype=dtype)
    if out.numel() == 0:
        return out
    if T > kernels.ONE_BY_ONE and out.dtype == delta.dtype and delta.element_size() > 2:
        return torch.bmm(d.mT, a, out=out)
    result = out
    if out.stride(1) < out.stride(2):  # stored by columns: the transposed gradient is the one stored by rows
        d, a, out, O, I = a, d, out.mT, I, O

    if T > kernels.ONE_BY_ONE:
        (block_o, block_i, block_t), warps, stages = kernels.DOT_TILES[delta.element_size()]
        _launch(
            kernels.outer_dot,
            B * _cdiv(O, block_o) * _cdiv(I, block_i),
            (d, a, out, T, O, I, *d.stride(), *a.stride(), *out.stride()),
            warps,
            stages,
            PRECISION=_precision(delta.dtype),
            BLOCK_T=block_t,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
        )
        return result

    block_o, block_i = min(kernels.TILE_O, max(8, _power_of_2(O))), kernels.TILE_I[out.element_size()]
    tiles = _cdiv(O, block_o) * _cdiv(I, block_i)
    if _prefers_flat(out, tiles * block_o * block_i):
        block = kernels.FLAT[out.element_size()] // (1 if T == 1 else 2)
        _launch(
            kernels.outer_flat,
            _cdiv(out.numel(), block),
            (d, a, out, T, out.numel(), O, I, (1 << 31) // O + 1, (1 << 31) // I + 1, *d.stride(), *a.stride()),
            kernels.WARPS,
            1,
            VECTOR=16 // out.element_size(),
            BLOCK=block,
        )
    else:
        _launch(
            kernels.outer_tiles,
            B * tiles,
            (d, a, out, T, O, I, *d.stride(), *a.stride(), *out.stride()),
            kernels.WARPS,
            1,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
        )
    return result


def _prefers_flat(out: Tensor, tiled: int) -> bool:
    """Whether `outer_flat` can write ``out`` and is the faster: tiles would store no 16 bytes, or mostly their edges.

    16 elements is what Triton needs to know a row to be divided by, before it stores 16 bytes at once.
    """
    from ..kernels import outer as kernels

    _, O, I = out.shape
    block = kernels.FLAT[out.element_size()]
    possible = (
        out.is_contiguous()
        and I * out.element_size() >= 16
        and I * (I + block) < 1 << 31
        and O * (O + block // I + 2) < 1 << 31
    )
    return possible and (I % 16 != 0 or tiled > 2 * O * I)


# --- norms -----------------------------------------------------------------------------------------------------------


def sq_norm(delta: Tensor, activation: Tensor) -> Tensor:
    """``‖G[b]‖² = Σ_ts (δ_t·δ_s)(a_t·a_s)`` -> [B].

    T = 1: one pass. T > 1: through tiles of the two Gram matrices or tiles of G, whichever needs fewer multiply-adds
    in whole tiles; neither is written.
    """
    from ..kernels import sq_norm as kernels

    result_type = accumulation_type(delta.dtype)
    B, O, I = delta.shape[0], delta.shape[-1], activation.shape[-1]
    if delta.ndim == 2 or delta.shape[1] == 1:
        d, a = delta.reshape(B, O), activation.reshape(B, I)
        norms = delta.new_empty(B, dtype=result_type)
        rows, columns = kernels.SHORT_ROWS if max(O, I) <= kernels.SHORT else kernels.LONG_ROWS
        if B > 0:
            _launch(
                kernels.sq_norm_rows,
                _cdiv(B, rows),
                (d, a, norms, B, O, I, *d.stride(), *a.stride()),
                kernels.WARPS,
                3,
                ROWS=rows,
                COLUMNS=columns,
            )
        return norms

    T, size = delta.shape[1], delta.element_size()
    table = kernels.GRAM_TILES[size]
    (block_t, block_k), *gram_options = next((entry for entry in table if entry[0][0] >= T), table[-1])
    (block_o, block_i, step_t), *gradient_options = kernels.GRADIENT_TILES[size]
    gram_tiles = _cdiv(T, block_t)
    gradient_tiles = _cdiv(O, block_o) * _cdiv(I, block_i)
    gram_cost = gram_tiles * (gram_tiles + 1) // 2 * block_t**2 * (O + I)
    gradient_cost = gradient_tiles * block_o * block_i * _cdiv(T, step_t) * step_t
    if gram_cost <= gradient_cost:
        kernel, tiles, options = kernels.sq_norm_gram, gram_tiles, gram_options
        blocks = {"BLOCK_T": block_t, "BLOCK_K": block_k}
    else:
        kernel, tiles, options = kernels.sq_norm_gradient, gradient_tiles, gradient_options
        blocks = {"BLOCK_T": step_t, "BLOCK_O": block_o, "BLOCK_I": block_i}
    shares = delta.new_empty(B, tiles, dtype=result_type)
    if B * tiles > 0:
        _launch(
            kernel,
            B * tiles,
            (delta, activation, shares, T, O, I, *delta.stride(), *activation.stride()),
            *options,
            PRECISION=_precision(delta.dtype),
            **blocks,
        )
    # A sum of squares; rounding of the Gram form can fall below zero when the terms cancel.
    return shares.sum(1).clamp_min_(0)


# --- functionals -----------------------------------------------------------------------------------------------------


def dot(delta: Tensor, activation: Tensor, reference: Tensor) -> Tensor:
    """``⟨G[b], R⟩ = Σ_t δ_tᵀ R a_t`` with R [O, I] -> [B].

    On tensor cores the product with R takes less time than writing its result [B, T, min(O, I)] and reading it back
    (O = I = 400 in bf16 on an H100: 0.8 ps of arithmetic and 1.2 ps of traffic per element), so it is fused. In full
    fp32 and fp64 it is bound by arithmetic, which the library's product does best: plain product and `vecdot`.
    """
    if not _on_tensor_cores(_operand_type(delta, reference)):
        return plain.dot(delta, activation, reference)
    return _bilinear(delta, activation, reference.unsqueeze(0)).squeeze(1)


def linear(delta: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
    """``y[b, h] = ⟨G[b], weight[h]⟩`` with weight [H, O, I] -> [B, H].

    BTHOI multiply-adds, fused: the intermediate [B, T, H, min(O, I)] would be the largest tensor by far. Where T and H
    are both large, blocks of gradients need fewer, BOI(T + H), as two plain products.
    """
    T, H = 1 if delta.ndim == 2 else delta.shape[1], weight.shape[0]
    if T * H > T + H:
        return plain.linear(delta, activation, weight)
    return _bilinear(delta, activation, weight)


def _operand_type(delta: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which `bilinear` multiplies: a shared half-precision type as it is, else that of the result."""
    return delta.dtype if weight.dtype == delta.dtype else accumulation_type(delta.dtype)


def _bilinear(delta: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
    """``Σ_t δ_tᵀ weight[h] a_t`` -> [B, H], the longer of O and I contracted by matrix products."""
    from ..kernels import bilinear as kernels

    longer, shorter = _positions(delta, activation)
    if longer.shape[2] < shorter.shape[2]:
        longer, shorter, weight = shorter, longer, weight.mT
    (B, T, K), (H, _, N) = longer.shape, weight.shape
    operand_type = _operand_type(delta, weight)
    (block_r, block_c, block_k), warps, stages = kernels.TILES[operand_type.itemsize]
    block_n = min(block_c, max(16, _power_of_2(N)))
    block_h = min(block_c // block_n, _power_of_2(H))
    tiles_n = _cdiv(N, block_n)
    shares = delta.new_empty(tiles_n, B, T, H, dtype=accumulation_type(delta.dtype))
    if shares.numel() > 0:
        _launch(
            kernels.bilinear,
            _cdiv(B * T, block_r) * _cdiv(H, block_h) * tiles_n,
            (longer, shorter, weight, shares, B * T, T, H, K, N, *longer.stride(), *shorter.stride(), *weight.stride()),
            warps,
            stages,
            PRECISION=_precision(operand_type),
            BLOCK_R=block_r,
            BLOCK_H=block_h,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return shares.sum((0, 2))
