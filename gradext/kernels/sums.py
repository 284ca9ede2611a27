"""Sums of per-sample gradients over the batch, and their projections: matrix products that form no single gradient.

Both split the summed dimension among programs, whose partial sums are added up afterwards in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .tiles import load_tile, zeros_like_sum

# (BLOCK_O, BLOCK_I, BLOCK_R), warps, stages of `weighted_sum` by bytes per element.
SUM_TILES = {2: ((128, 128, 32), 8, 3), 4: ((64, 64, 16), 4, 3)}
# (BLOCK_T, BLOCK_K), warps, stages of `project` by bytes per element; the projections are the other sides of its tiles.
PROJECT_TILES = {2: ((64, 32), 8, 2), 4: ((32, 32), 8, 1)}
PROJECT_LIMIT = 64  # of the projections' sides: u, v and their product stay in registers
PROGRAMS = 2  # a multiprocessor, that the splits make


@triton.jit
def weighted_sum(
    delta_ptr, activation_ptr, weight_ptr, out_ptr, R, T, O, I, rows,
    stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai, stride_w,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[n, o, i] = Σ_r w[b] δ[b, t, o] a[b, t, i] of the r = b·T + t in [n · rows, (n + 1) · rows).

    delta [B, T, O], activation [B, T, I], weight [B] fp32, read where WEIGHTED; out [splits, O, I] fp32. A sample's
    weight is applied while its delta is loaded, and the product rounded once to the factors' type; sums in fp32.
    I/O: read the factors, from the L2 again for each tile; write splits · O · I. Grid: splits · tiles.
    """
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles = tl.cdiv(O, BLOCK_O) * tiles_i
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    o = tile // tiles_i * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    deltas_ptr = delta_ptr + o.to(tl.int64)[None, :] * stride_do
    activations_ptr = activation_ptr + i.to(tl.int64)[None, :] * stride_ai

    total = zeros_like_sum(delta_ptr, BLOCK_O, BLOCK_I)
    begin = split * rows
    end = tl.minimum(begin + rows, R)
    for first in range(begin, end, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        exists = r < end
        b = (r // T).to(tl.int64)
        t = (r % T).to(tl.int64)
        delta = tl.load(
            deltas_ptr + (b * stride_db + t * stride_dt)[:, None], mask=exists[:, None] & (o < O)[None, :], other=0.0
        )
        if WEIGHTED:
            weight = tl.load(weight_ptr + b * stride_w, mask=exists, other=0.0)
            delta = (delta.to(tl.float32) * weight[:, None]).to(delta.dtype)
        activation = tl.load(
            activations_ptr + (b * stride_ab + t * stride_at)[:, None],
            mask=exists[:, None] & (i < I)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(delta), activation, total, input_precision=PRECISION, out_dtype=total.dtype)
    out = out_ptr + (split.to(tl.int64) * O + o.to(tl.int64))[:, None] * I + i[None, :]
    tl.store(out, total, mask=(o < O)[:, None] & (i < I)[None, :])


@triton.jit
def project(
    delta_ptr, activation_ptr, left_ptr, right_ptr, out_ptr, B, T, O, I, P, Q, positions,
    stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai, stride_lo, stride_lp, stride_ri, stride_rq,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """out[n, b] = Σ_t (leftᵀ δ[b, t]) (rightᵀ a[b, t])ᵀ of the t in [n · positions, (n + 1) · positions).

    delta [B, T, O], activation [B, T, I], left [O, P], right [I, Q] of one type, out [splits, B, P, Q] fp32. Neither
    the projected factors nor a gradient is written. I/O: read the factors once, and left and right from the L2; write
    splits · B · P · Q. Grid: splits · B.
    """
    split = tl.program_id(0) // B
    b = (tl.program_id(0) % B).to(tl.int64)
    delta_ptr += b * stride_db
    activation_ptr += b * stride_ab
    p = tl.arange(0, BLOCK_P)
    q = tl.arange(0, BLOCK_Q)
    total = zeros_like_sum(delta_ptr, BLOCK_P, BLOCK_Q)
    begin = split * positions
    end = tl.minimum(begin + positions, T)
    for first in range(begin, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        u = zeros_like_sum(delta_ptr, BLOCK_T, BLOCK_P)
        for k0 in range(0, O, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = load_tile(delta_ptr, t, end, stride_dt, k, O, stride_do)
            y = load_tile(left_ptr, k, O, stride_lo, p, P, stride_lp)
            u = tl.dot(x, y, u, input_precision=PRECISION, out_dtype=u.dtype)
        v = zeros_like_sum(delta_ptr, BLOCK_T, BLOCK_Q)
        for k0 in range(0, I, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = load_tile(activation_ptr, t, end, stride_at, k, I, stride_ai)
            y = load_tile(right_ptr, k, I, stride_ri, q, Q, stride_rq)
            v = tl.dot(x, y, v, input_precision=PRECISION, out_dtype=v.dtype)
        # In three products of TF32, as exact as one of fp32.
        total = tl.dot(tl.trans(u), v, total, input_precision="tf32x3", out_dtype=total.dtype)
    out = out_ptr + ((split.to(tl.int64) * B + b) * P + p.to(tl.int64))[:, None] * Q + q[None, :]
    tl.store(out, total, mask=(p < P)[:, None] & (q < Q)[None, :])
