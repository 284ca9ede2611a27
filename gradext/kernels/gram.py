"""Inner products between the per-sample gradients of two batches, without forming a gradient. No atomics."""

import triton
import triton.language as tl

from .tiles import row_products, zeros_like_sum

# (BLOCK_ROWS, BLOCK_K), warps, stages by bytes per element. A tile has BLOCK_ROWS positions of either batch, of one
# sample or of several. First for rows that 16 elements do not divide, whose loads need an address for each element;
# then for those that 16 divides; then, of those, for samples of one position that fill the GPU with LARGE such tiles.
TILES = {
    2: (((64, 16), 4, 2), ((64, 32), 4, 3), ((128, 64), 8, 3)),
    4: (((64, 32), 8, 2), ((64, 16), 4, 3), ((128, 32), 8, 3)),
}
LARGE = 128


@triton.jit
def gram(
    delta_ptr, activation_ptr, other_delta_ptr, other_activation_ptr, out_ptr, B, C, T, S, O, I,
    stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai,
    stride_other_db, stride_other_dt, stride_other_do, stride_other_ab, stride_other_at, stride_other_ai,
    SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b, c] = Σ_ts (δ_bt · δ'_cs)(a_bt · a'_cs), a tile [BLOCK_B, BLOCK_C] per program.

    delta [B, T, O], activation [B, T, I], the others [C, S, O] and [C, S, I], out [B, C] contiguous. BT·CS·(O + I)
    multiply-adds, half of it where SYMMETRIC says that both batches are the same: tiles c < b are mirrored. The
    products of all positions live in registers as [BLOCK_B · BLOCK_T, BLOCK_C · BLOCK_S], where BLOCK_T is T rounded
    up to a power of 2, or a part of T. I/O: read the factors, from the L2 again for each tile; write B·C.
    Grid: tiles of B · tiles of C.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile_b = tl.program_id(0) // tiles_c
    tile_c = tl.program_id(0) % tiles_c
    if SYMMETRIC & (tile_c < tile_b):
        return

    row = tl.arange(0, BLOCK_B * BLOCK_T)
    column = tl.arange(0, BLOCK_C * BLOCK_S)
    row_b = tile_b * BLOCK_B + row // BLOCK_T
    column_c = tile_c * BLOCK_C + column // BLOCK_S
    rows = row_b.to(tl.int64)
    columns = column_c.to(tl.int64)

    total = zeros_like_sum(delta_ptr, BLOCK_B, BLOCK_C)
    for first_t in range(0, T, BLOCK_T):
        t = first_t + row % BLOCK_T
        row_exists = (row_b < B) & (t < T)
        deltas = delta_ptr + rows * stride_db + t.to(tl.int64) * stride_dt
        activations = activation_ptr + rows * stride_ab + t.to(tl.int64) * stride_at
        for first_s in range(0, S, BLOCK_S):
            s = first_s + column % BLOCK_S
            column_exists = (column_c < C) & (s < S)
            other_deltas = other_delta_ptr + columns * stride_other_db + s.to(tl.int64) * stride_other_dt
            other_activations = other_activation_ptr + columns * stride_other_ab + s.to(tl.int64) * stride_other_at
            products = row_products(
                deltas, row_exists, stride_do, other_deltas, column_exists, stride_other_do, O,
                PRECISION, BLOCK_B * BLOCK_T, BLOCK_C * BLOCK_S, BLOCK_K,
            )  # fmt: skip
            products *= row_products(
                activations, row_exists, stride_ai, other_activations, column_exists, stride_other_ai, I,
                PRECISION, BLOCK_B * BLOCK_T, BLOCK_C * BLOCK_S, BLOCK_K,
            )  # fmt: skip
            sums = tl.sum(tl.reshape(products, (BLOCK_B * BLOCK_T, BLOCK_C, BLOCK_S)), axis=2)
            total += tl.sum(tl.reshape(sums, (BLOCK_B, BLOCK_T, BLOCK_C)), axis=1)

    b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (b < B)[:, None] & (c < C)[None, :]
    tl.store(out_ptr + b.to(tl.int64)[:, None] * C + c[None, :], total, mask=mask)
    if SYMMETRIC & (tile_b < tile_c):
        tl.store(out_ptr + b[:, None] + c.to(tl.int64)[None, :] * C, total, mask=mask)
