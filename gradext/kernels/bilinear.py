"""Bilinear functionals of the factors, ``δᵀ W[h] a``: a matrix product whose result is contracted in registers."""

import triton
import triton.language as tl

from .tiles import zeros_like_sum

# (BLOCK_R, BLOCK_C, BLOCK_K), warps, stages by bytes per element of the matrix product's operands. The BLOCK_C =
# BLOCK_H · BLOCK_N columns hold several functionals where the shorter factor is short.
TILES = {2: ((128, 128, 32), 8, 3), 4: ((64, 64, 16), 4, 3), 8: ((64, 32, 16), 4, 3)}


@triton.jit
def bilinear(
    long_ptr, short_ptr, weight_ptr, out_ptr, R, T, H, K, N,
    stride_lb, stride_lt, stride_lk, stride_sb, stride_st, stride_sn, stride_wh, stride_wk, stride_wn,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, r, h] = Σ_{n in tile m} short[b, t, n] Σ_k long[b, t, k] weight[h, k, n], with r = b·T + t.

    long [B, T, K] and short [B, T, N] are delta and activation, the longer first; weight [H, K, N]; out
    [tiles of N, R = B·T, H], to be summed over tiles and positions. The inner sum is a matrix product on tensor cores
    (with wide or equal types), rounded nowhere; the intermediate [R, H, N] stays in registers. R·H·K·N multiply-adds.
    I/O: read the factors and weight, from the L2 again for each tile; write R · H · N / BLOCK_N.
    Grid: tiles of R · tiles of H · tiles of N.
    """
    # Rows vary fastest, so that programs that run together share a part of the weight.
    tiles_r = tl.cdiv(R, BLOCK_R)
    tiles_h = tl.cdiv(H, BLOCK_H)
    tile = tl.program_id(0) // tiles_r
    r = tl.program_id(0) % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    tile_n = tile // tiles_h
    h = tile % tiles_h * BLOCK_H + tl.arange(0, BLOCK_H)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    column = tl.arange(0, BLOCK_H * BLOCK_N)  # h and n together
    column_h = tile % tiles_h * BLOCK_H + column // BLOCK_N
    column_n = tile_n * BLOCK_N + column % BLOCK_N
    weights = weight_ptr + column_h.to(tl.int64) * stride_wh + column_n.to(tl.int64) * stride_wn  # [BLOCK_H · BLOCK_N]
    column_exists = (column_h < H) & (column_n < N)
    row_b = (r // T).to(tl.int64)
    row_t = (r % T).to(tl.int64)
    longs = long_ptr + row_b * stride_lb + row_t * stride_lt  # [BLOCK_R]
    shorts = short_ptr + row_b * stride_sb + row_t * stride_st

    product = zeros_like_sum(long_ptr, BLOCK_R, BLOCK_H * BLOCK_N)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        offsets = k.to(tl.int64)
        left = tl.load(
            longs[:, None] + offsets[None, :] * stride_lk, mask=(r < R)[:, None] & (k < K)[None, :], other=0.0
        )
        right = tl.load(
            weights[None, :] + offsets[:, None] * stride_wk, mask=(k < K)[:, None] & column_exists[None, :], other=0.0
        )
        # A half-precision factor meets a half-precision weight of its own type as it is, any other one in fp32.
        if left.dtype != right.dtype:
            left, right = left.to(product.dtype), right.to(product.dtype)
        product = tl.dot(left, right, product, input_precision=PRECISION, out_dtype=product.dtype)

    short = tl.load(
        shorts[:, None] + n.to(tl.int64)[None, :] * stride_sn, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0
    ).to(product.dtype)
    value = tl.sum(tl.reshape(product, (BLOCK_R, BLOCK_H, BLOCK_N)) * short[:, None, :], axis=2)  # [BLOCK_R, BLOCK_H]
    out = out_ptr + (tile_n.to(tl.int64) * R + r)[:, None] * H + h[None, :]
    tl.store(out, value, mask=(r < R)[:, None] & (h < H)[None, :])
