"""Squared norms of per-sample gradients, which are not written. Deterministic: sums in a fixed order, no atomics."""

import triton
import triton.language as tl

from .tiles import accumulate_gradient, load_tile, row_products, zeros_like_sum

# (ROWS, COLUMNS) of `sq_norm_rows` for features up to and beyond SHORT.
WARPS = 4
SHORT = 512
SHORT_ROWS = (4, 512)
LONG_ROWS = (1, 2048)
# (BLOCK_T, BLOCK_K), warps, stages of `sq_norm_gram` by bytes per element, the first whose BLOCK_T holds T or else the
# last. Each stage keeps addresses for its loads, and those of unaligned rows are one per element: more stages spill.
GRAM_TILES = {
    2: (((16, 32), 4, 1), ((32, 32), 2, 2), ((64, 32), 8, 2)),
    4: (((16, 16), 4, 1), ((32, 16), 4, 2), ((64, 16), 8, 2)),
    8: (((16, 16), 4, 1), ((32, 32), 8, 1)),
}
# (BLOCK_O, BLOCK_I, BLOCK_T), warps, stages of `sq_norm_gradient`.
GRADIENT_TILES = {2: ((128, 128, 32), 8, 3), 4: ((128, 64, 16), 4, 3), 8: ((32, 32, 16), 4, 3)}


@triton.jit
def sum_of_squares(pointer, rows, row_count, row_stride, K, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ_k pointer[rows, k]² -> [ROWS]."""
    squares = zeros_like_sum(pointer, ROWS, COLUMNS)
    for first in range(0, K, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        x = load_tile(pointer, rows, row_count, row_stride, k, K, stride).to(squares.dtype)
        squares += x * x
    return tl.sum(squares, axis=1)


@triton.jit
def sq_norm_rows(
    delta_ptr, activation_ptr, out_ptr, B, O, I, stride_db, stride_do, stride_ab, stride_ai,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[b] = ‖δ_b‖² ‖a_b‖², the squared norm of δ_b a_bᵀ, for one position.

    delta [B, O], activation [B, I], out [B]. I/O: read B·(O + I), write B. Grid: B / ROWS.
    """
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    delta = sum_of_squares(delta_ptr, b, B, stride_db, O, stride_do, ROWS, COLUMNS)
    activation = sum_of_squares(activation_ptr, b, B, stride_ab, I, stride_ai, ROWS, COLUMNS)
    tl.store(out_ptr + b, delta * activation, mask=b < B)


@triton.jit
def sq_norm_gram(
    delta_ptr, activation_ptr, out_ptr, T, O, I,
    stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b, n] = Σ_{s in tile n} Σ_t (δ_bs · δ_bt)(a_bs · a_bt), the share of one tile of positions in ‖G[b]‖².

    delta [B, T, O], activation [B, T, I], out [B, tiles]. Tiles of both T x T Gram matrices live in registers. They
    are symmetric: tiles t < s count twice and tiles t > s are left out, T²(O + I) / 2 multiply-adds. I/O: read
    B·T·(O + I), from the L2 again for each tile; write B · T / BLOCK_T. Grid: B · tiles.
    """
    tiles = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    # The last tile of positions has the most work. It comes first, so that the launch does not end with it.
    tile = tiles - 1 - tl.program_id(0) % tiles
    delta_ptr += b * stride_db
    activation_ptr += b * stride_ab
    s = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    deltas_s = delta_ptr + s.to(tl.int64) * stride_dt
    activations_s = activation_ptr + s.to(tl.int64) * stride_at

    share = tl.sum(zeros_like_sum(delta_ptr, BLOCK_T, 1), axis=1)
    for other in range(0, tile + 1):
        t = other * BLOCK_T + tl.arange(0, BLOCK_T)
        deltas_t = delta_ptr + t.to(tl.int64) * stride_dt
        activations_t = activation_ptr + t.to(tl.int64) * stride_at
        deltas = row_products(
            deltas_s, s < T, stride_do, deltas_t, t < T, stride_do, O, PRECISION, BLOCK_T, BLOCK_T, BLOCK_K
        )
        activations = row_products(
            activations_s, s < T, stride_ai, activations_t, t < T, stride_ai, I, PRECISION, BLOCK_T, BLOCK_T, BLOCK_K
        )
        share += tl.where(other == tile, 1.0, 2.0).to(share.dtype) * tl.sum(deltas * activations, axis=1)
    tl.store(out_ptr + b * tiles + tile, tl.sum(share))


@triton.jit
def sq_norm_gradient(
    delta_ptr, activation_ptr, out_ptr, T, O, I,
    stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out[b, n] = Σ_{o, i in tile n} G[b, o, i]², the share of one tile of the gradient in ‖G[b]‖².

    delta [B, T, O], activation [B, T, I], out [B, tiles]. For many positions: a tile of G is summed over t in
    registers, squared and reduced there, T·O·I multiply-adds. I/O: read B·T·(O + I), from the L2 again for each tile;
    write B · tiles. Grid: B · tiles.
    """
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles = tl.cdiv(O, BLOCK_O) * tiles_i
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o = tile // tiles_i * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    gradient = accumulate_gradient(
        delta_ptr + b * stride_db, activation_ptr + b * stride_ab, T, o, O, i, I,
        stride_dt, stride_do, stride_at, stride_ai, PRECISION, BLOCK_T, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    tl.store(out_ptr + b * tiles + tile, tl.sum(gradient * gradient))
