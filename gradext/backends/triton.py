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
    if torch.version.hip is not None:
        return "this torch is built for AMD's ROCm, which is not supported: the kernels are tried on NVIDIA GPUs alone"
    if not torch.cuda.is_available():
        return "torch sees no GPU; TRITON_INTERPRET=1, set before triton is imported, runs the kernels on CPU tensors"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the kernels need a GPU of compute capability 8.0 or newer, but this one has {major}.{minor}"
    return None


def _launch(kernel, programs: int, arguments: tuple, *, on: Tensor, warps: int, stages: int, **constants) -> None:
    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(on):
        kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _positions(*tensors: Tensor) -> list[Tensor]:
    """[B, T, features], with T = 1 made explicit."""
    return [x.unsqueeze(1) if x.ndim == 2 else x for x in tensors]


def _precision(dtype: torch.dtype) -> str:
    """TF32 only where torch's own matrix products would use it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # The newer flag follows the older one, which must not be read once the newer one was set.
    asked = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if asked else "ieee"


def _on_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16) or _precision(dtype) == "tf32"


@functools.cache
def _triton_multiplies_fp64() -> bool:
    """From 3.5 on; what 3.4, which goes with torch 2.8, does not multiply is left to plain torch."""
    version = importlib.import_module("triton").__version__
    return tuple(int(part) for part in version.split(".")[:2]) >= (3, 5)


def _multiplies(dtype: torch.dtype) -> bool:
    return dtype != torch.float64 or _triton_multiplies_fp64()


# --- outer products --------------------------------------------------------------------------------------------------


def outer(
    delta: Tensor,
    activation: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``out[b] = Σ_t delta[b, t] activation[b, t]ᵀ`` -> [B, O, I]; the conversion to out's type is fused.

    Many positions in fp32 or fp64 without a conversion are `torch.bmm`, which Triton's product at best matches there.
    """
    if out is None:
        out = delta.new_empty(delta.shape[0], delta.shape[-1], activation.shape[-1], dtype=dtype)
    outer_group([(delta, activation, out)])
    return out


def outer_group(problems: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """`outer` of each (delta, activation, out), written into its out.

    The problems that go by tiles (few positions, and rows of out that 16 elements divide) share launches, up to GROUP
    each, whatever their sizes and types. Every other problem has its own.
    """
    from ..kernels import outer as kernels

    tiled: dict[torch.device, list[tuple]] = {}
    for delta, activation, out in problems:
        if out.numel() == 0:
            continue
        d, a = _positions(delta, activation)
        by_columns = out.stride(1) < out.stride(2)
        many = d.shape[1] > kernels.ONE_BY_ONE
        by_library = many and out.dtype == d.dtype and d.element_size() > 2
        if many and not by_library and not _multiplies(d.dtype):
            plain.outer(delta, activation, out)
            continue
        if by_columns:  # the transposed gradient is the one stored by rows
            d, a, out = a, d, out.mT
        if by_library:
            torch.bmm(d.mT, a, out=out)
        elif many:
            _outer_dot(d, a, out)
        elif _prefers_flat(out):
            _outer_flat(d, a, out)
        else:
            tiled.setdefault(out.device, []).append((d, a, out))
    for group in tiled.values():
        for first in range(0, len(group), kernels.GROUP):
            _outer_tiles(group[first : first + kernels.GROUP])


def _outer_tiles(group: list[tuple]) -> None:
    from ..kernels import outer as kernels

    problems, programs, constants = [], [], []
    for d, a, out in group:
        (B, O, I), T = out.shape, d.shape[1]
        block_o, block_i = _outer_blocks(out)
        problems.append((d, a, out, T, O, I, *d.stride(), *a.stride(), *out.stride()))
        programs.append(B * _cdiv(O, block_o) * _cdiv(I, block_i))
        constants.append((block_o, block_i))
    options = {"on": group[0][0], "warps": kernels.WARPS, "stages": 1}
    if len(group) == 1:
        [problem], [constant] = problems, constants
        options |= zip(("BLOCK_O", "BLOCK_I"), constant, strict=True)
        _launch(kernels.outer_tiles, programs[0], problem, **options)
    else:
        options |= zip(("BLOCKS_O", "BLOCKS_I"), zip(*constants, strict=True), strict=True)
        _launch(kernels.outer_group, sum(programs), (tuple(problems), tuple(programs)), **options)


def _outer_flat(d: Tensor, a: Tensor, out: Tensor) -> None:
    from ..kernels import outer as kernels

    (_, O, I), T, size = out.shape, d.shape[1], out.element_size()
    short = I * size < 16
    block = kernels.FLAT[size] // (1 if T == 1 and not short else 2)
    magic_o, magic_i = (1 << 50) // O + 1, (1 << 50) // I + 1
    _launch(
        kernels.outer_flat,
        _cdiv(out.numel(), block),
        (d, a, out, T, out.numel(), O, I, magic_o, magic_i, *d.stride(), *a.stride()),
        on=d,
        warps=kernels.WARPS,
        stages=1,
        VECTOR=1 if short else 16 // size,
        BLOCK=block,
    )


def _outer_dot(d: Tensor, a: Tensor, out: Tensor) -> None:
    from ..kernels import outer as kernels

    (B, O, I), T = out.shape, d.shape[1]
    (block_o, block_i, block_t), warps, stages = kernels.DOT_TILES[d.element_size()]
    _launch(
        kernels.outer_dot,
        B * _cdiv(O, block_o) * _cdiv(I, block_i),
        (d, a, out, T, O, I, *d.stride(), *a.stride(), *out.stride()),
        on=d,
        warps=warps,
        stages=stages,
        PRECISION=_precision(d.dtype),
        BLOCK_T=block_t,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
    )


def _outer_blocks(out: Tensor) -> tuple[int, int]:
    """(BLOCK_O, BLOCK_I) of `outer_tiles`."""
    from ..kernels import outer as kernels

    return min(kernels.TILE_O, max(8, _power_of_2(out.shape[1]))), kernels.TILE_I[out.element_size()]


def _prefers_flat(out: Tensor) -> bool:
    """Whether `outer_flat` can write ``out`` and is the faster: tiles would store no 16 bytes, or mostly their edges.

    16 elements is what Triton needs to know a row to be divided by, before it stores 16 bytes at once.
    """
    from ..kernels import outer as kernels

    _, O, I = out.shape
    block_o, block_i = _outer_blocks(out)
    tiled = _cdiv(O, block_o) * block_o * _cdiv(I, block_i) * block_i
    return out.is_contiguous() and max(O, I) <= kernels.FLAT_LIMIT and (I % 16 != 0 or tiled > 2 * O * I)


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
                on=d,
                warps=kernels.WARPS,
                stages=3,
                ROWS=rows,
                COLUMNS=columns,
            )
        return norms

    if not _multiplies(delta.dtype):
        return plain.sq_norm(delta, activation)
    T, size = delta.shape[1], delta.element_size()
    table = kernels.GRAM_TILES[size]
    (block_t, block_k), *gram_launch = next((entry for entry in table if entry[0][0] >= T), table[-1])
    (block_o, block_i, step_t), *gradient_launch = kernels.GRADIENT_TILES[size]
    gram_tiles = _cdiv(T, block_t)
    gradient_tiles = _cdiv(O, block_o) * _cdiv(I, block_i)
    gram_cost = gram_tiles * (gram_tiles + 1) // 2 * block_t**2 * (O + I)
    gradient_cost = gradient_tiles * block_o * block_i * _cdiv(T, step_t) * step_t
    if gram_cost <= gradient_cost:
        kernel, tiles, (warps, stages) = kernels.sq_norm_gram, gram_tiles, gram_launch
        blocks = {"BLOCK_T": block_t, "BLOCK_K": block_k}
    else:
        kernel, tiles, (warps, stages) = kernels.sq_norm_gradient, gradient_tiles, gradient_launch
        blocks = {"BLOCK_T": step_t, "BLOCK_O": block_o, "BLOCK_I": block_i}
    shares = delta.new_empty(B, tiles, dtype=result_type)
    if B * tiles > 0:
        _launch(
            kernel,
            B * tiles,
            (delta, activation, shares, T, O, I, *delta.stride(), *activation.stride()),
            on=delta,
            warps=warps,
            stages=stages,
            PRECISION=_precision(delta.dtype),
            **blocks,
        )
    # A sum of squares; rounding of the Gram form can fall below zero when the terms cancel.
    return shares.sum(1).clamp_min_(0)


# --- sums over the batch and projections -----------------------------------------------------------------------------


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _split(programs: int, length: int, block: int, device: torch.device) -> tuple[int, int]:
    """(splits, length of each): so many of ``length`` that a few programs run on every multiprocessor, whole blocks."""
    from ..kernels import sums as kernels

    wanted = _cdiv(kernels.PROGRAMS * _multiprocessors(device), max(1, programs))
    part = block * max(1, _cdiv(length, block * max(1, wanted)))
    return max(1, _cdiv(length, part)), part


def weighted_sum(delta: Tensor, activation: Tensor, weights: Tensor | None) -> Tensor:
    """``Σ_b w_b Σ_t δ_bt a_btᵀ`` -> [O, I], fp32; one matrix product, of half-precision operands where they are such.

    In full fp32 and fp64 it is the library's.
    """
    from ..kernels import sums as kernels

    if not _on_tensor_cores(delta.dtype):
        return plain.weighted_sum(delta, activation, weights)
    d, a = _positions(delta, activation)
    (B, T, O), I = d.shape, a.shape[2]
    (block_o, block_i, block_r), warps, stages = kernels.SUM_TILES[d.element_size()]
    tiles = _cdiv(O, block_o) * _cdiv(I, block_i)
    splits, rows = _split(tiles, B * T, block_r, d.device)
    w = None if weights is None else weights.float()
    if 0 in (B, T, O, I):
        return d.new_zeros(O, I, dtype=accumulation_type(d.dtype))
    shares = d.new_empty(splits, O, I, dtype=accumulation_type(d.dtype))
    _launch(
        kernels.weighted_sum,
        splits * tiles,
        (
            d,
            a,
            shares if w is None else w,
            shares,
            B * T,
            T,
            O,
            I,
            rows,
            *d.stride(),
            *a.stride(),
            0 if w is None else w.stride(0),
        ),
        on=d,
        warps=warps,
        stages=stages,
        WEIGHTED=w is not None,
        PRECISION=_precision(d.dtype),
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        BLOCK_R=block_r,
    )
    return shares[0] if splits == 1 else shares.sum(0)


def project(delta: Tensor, activation: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ G[b] right = Σ_t (leftᵀ δ_t)(rightᵀ a_t)ᵀ`` -> [B, P, Q], fp32, in one pass over the factors."""
    from ..kernels import sums as kernels

    P, Q = left.shape[1], right.shape[1]
    one_type = delta.dtype == left.dtype == right.dtype
    if not _on_tensor_cores(delta.dtype) or not one_type or max(P, Q) > kernels.PROJECT_LIMIT:
        return plain.project(delta, activation, left, right)
    d, a = _positions(delta, activation)
    (B, T, O), I = d.shape, a.shape[2]
    if 0 in (B, T, P, Q):
        return d.new_zeros(B, P, Q, dtype=accumulation_type(d.dtype))
    (block_t, block_k), warps, stages = kernels.PROJECT_TILES[d.element_size()]
    splits, positions = _split(B, T, block_t, d.device)
    shares = d.new_empty(splits, B, P, Q, dtype=accumulation_type(d.dtype))
    _launch(
        kernels.project,
        splits * B,
        (
            d,
            a,
            left,
            right,
            shares,
            B,
            T,
            O,
            I,
            P,
            Q,
            positions,
            *d.stride(),
            *a.stride(),
            *left.stride(),
            *right.stride(),
        ),
        on=d,
        warps=warps,
        stages=stages,
        PRECISION=_precision(d.dtype),
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_P=max(16, _power_of_2(P)),
        BLOCK_Q=max(16, _power_of_2(Q)),
    )
    return shares[0] if splits == 1 else shares.sum(0)


# --- functionals -----------------------------------------------------------------------------------------------------


def dot(delta: Tensor, activation: Tensor, reference: Tensor) -> Tensor:
    """``⟨G[b], R⟩ = Σ_t δ_tᵀ R a_t`` with R [O, I] -> [B].

    On tensor cores the product with R takes less time than writing its fp32 result [B, T, min(O, I)] and reading it
    back (O = I = 400 in bf16, by an H100's peaks: 0.8 ps of arithmetic and 2.4 ps of traffic per element), so it is
    fused. In full fp32 and fp64 arithmetic bounds it, which the library's product does best: that product and `vecdot`.
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
    if T * H > T + H or not _multiplies(_operand_type(delta, weight)):
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
            on=delta,
            warps=warps,
            stages=stages,
            PRECISION=_precision(operand_type),
            BLOCK_R=block_r,
            BLOCK_H=block_h,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return shares.sum((0, 2))


def gram(delta: Tensor, activation: Tensor, other_delta: Tensor, other_activation: Tensor) -> Tensor:
    """``K[b, c] = ⟨G[b], G'[c]⟩ = Σ_ts (δ_bt·δ'_cs)(a_bt·a'_cs)`` -> [B, C].

    On tensor cores fused: reading and writing two products [BT, CS] would take longer than the arithmetic, and far
    more memory. Half of it where both batches are the same. In full fp32 and fp64, and where the gradients themselves
    need fewer multiply-adds, plain products.
    """
    from ..kernels import gram as kernels

    if not _on_tensor_cores(delta.dtype):
        return plain.gram(delta, activation, other_delta, other_activation)
    d, a, other_d, other_a = _positions(delta, activation, other_delta, other_activation)
    (B, T, O), (C, S, I) = d.shape, other_a.shape
    unaligned, small, large = kernels.TILES[delta.element_size()]
    side = large[0][0]
    if O % 16 != 0 or I % 16 != 0:
        (block, block_k), warps, stages = unaligned
    elif T > 1 or S > 1 or _cdiv(B, side) * _cdiv(C, side) < kernels.LARGE:
        (block, block_k), warps, stages = small
    else:
        (block, block_k), warps, stages = large
    block_t, block_s = min(block, _power_of_2(T)), min(block, _power_of_2(S))
    products = B * _cdiv(T, block_t) * block_t * C * _cdiv(S, block_s) * block_s * (O + I)
    if products > (B * T + C * S + B * C) * O * I:
        return plain.gram(delta, activation, other_delta, other_activation)

    result = delta.new_empty(B, C, dtype=accumulation_type(delta.dtype))
    if result.numel() > 0:
        block_b, block_c = block // block_t, block // block_s
        strides = (stride for x in (d, a, other_d, other_a) for stride in x.stride())
        _launch(
            kernels.gram,
            _cdiv(B, block_b) * _cdiv(C, block_c),
            (d, a, other_d, other_a, result, B, C, T, S, O, I, *strides),
            on=delta,
            warps=warps,
            stages=stages,
            SYMMETRIC=_is_same(d, other_d) and _is_same(a, other_a),
            PRECISION=_precision(delta.dtype),
            BLOCK_B=block_b,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
            BLOCK_S=block_s,
            BLOCK_K=block_k,
        )
    return result


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Whether both tensors are the same elements in memory."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
