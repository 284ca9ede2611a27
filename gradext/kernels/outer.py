"""Per-sample outer products written at the speed of memory: four kernels for one formula.

`outer_tiles` for rows that a 16-byte store divides, `outer_group` for several such problems at once, `outer_flat` for
rows that it does not divide, `outer_dot` for many positions. All stores are streaming (".cs"): nothing reads the result
again before it has left the cache.

Elements are still stored one by one where rows that 16 bytes do not divide are not those of one contiguous ``out``
that begins at a multiple of 16 bytes, and by `outer_dot` for rows that 16 elements do not divide.
"""

import triton
import triton.language as tl

from .tiles import accumulate_gradient, widen, zeros_like_sum

WARPS = 4  # of `outer_tiles` and `outer_flat`
# A tile is 16 KB, by bytes per element of out: a warp writes 512 bytes of one row at once.
TILE_O = 32
TILE_I = {2: 256, 4: 128, 8: 64}
# Problems in a launch of `outer_group`, which holds a copy of the code for each.
GROUP = 8
# Elements of out in a program of `outer_flat`, which keeps a pointer for each; half as many for several positions.
FLAT = {2: 4096, 4: 2048, 8: 1024}
FLAT_LIMIT = 1 << 24  # of O and of I, for `divide`
# Up to this many positions are added one by one, which costs less than the writing (by its peaks, an H200 does 24
# multiply-adds while it writes one fp32 element); beyond, matrix products take over.
ONE_BY_ONE = 8
# (BLOCK_O, BLOCK_I, BLOCK_T), warps, stages of `outer_dot` by bytes per element of the factors.
DOT_TILES = {2: ((128, 128, 32), 8, 3), 4: ((64, 64, 16), 8, 2), 8: ((32, 32, 16), 4, 3)}


@triton.jit
def write_tile(
    program, delta_ptr, activation_ptr, out_ptr, T, O, I,
    stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai,
    stride_ob, stride_oo, stride_oi,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """What ``program`` of `outer_tiles` does."""
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles = tl.cdiv(O, BLOCK_O) * tiles_i
    b = (program // tiles).to(tl.int64)
    tile = program % tiles
    o = tile // tiles_i * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offsets_o = o.to(tl.int64)
    offsets_i = i.to(tl.int64)
    deltas_ptr = delta_ptr + b * stride_db + offsets_o * stride_do
    activations_ptr = activation_ptr + b * stride_ab + offsets_i * stride_ai

    gradient = zeros_like_sum(delta_ptr, BLOCK_O, BLOCK_I)
    for _ in range(T):
        delta = widen(tl.load(deltas_ptr, mask=o < O, other=0.0))
        activation = widen(tl.load(activations_ptr, mask=i < I, other=0.0))
        gradient += delta[:, None] * activation[None, :]
        deltas_ptr += stride_dt
        activations_ptr += stride_at

    out = out_ptr + b * stride_ob + offsets_o[:, None] * stride_oo + offsets_i[None, :] * stride_oi
    value = gradient.to(out_ptr.dtype.element_ty)
    tl.store(out, value, mask=(o < O)[:, None] & (i < I)[None, :], cache_modifier=".cs")


@triton.jit
def outer_tiles(
    delta_ptr, activation_ptr, out_ptr, T, O, I,
    stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai,
    stride_ob, stride_oo, stride_oi,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out[b, o, i] = Σ_t delta[b, t, o] activation[b, t, i], a tile [BLOCK_O, BLOCK_I] of one sample per program.

    delta [B, T, O], activation [B, T, I], out [B, O, I], any strides and types. Few positions: T
    multiply-adds per element, in fp32 (fp64 for fp64). I/O: write B·O·I; read B·T·O and B·T·I, again for each tile but
    from the L2. Grid: B · tiles.
    """
    # B may exceed 65535, so everything is on the first axis of the grid.
    write_tile(
        tl.program_id(0), delta_ptr, activation_ptr, out_ptr, T, O, I,
        stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai,
        stride_ob, stride_oo, stride_oi, BLOCK_O, BLOCK_I,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
def outer_group(
    problems, programs, BLOCKS_O: tl.constexpr, BLOCKS_I: tl.constexpr,
):  # fmt: skip
    """Several problems of `outer_tiles` in one launch. Grid: the sum of ``programs``, of which each problem has one.

    problems[n] holds the arguments of `outer_tiles`, and BLOCKS_O[n] and BLOCKS_I[n] its constants.
    """
    program = tl.program_id(0)
    for n in tl.static_range(len(problems)):
        if (program >= 0) & (program < programs[n]):
            write_tile(program, *problems[n], BLOCKS_O[n], BLOCKS_I[n])
        program -= programs[n]


@triton.jit
def divide(n, magic):
    """n // d for n < d + 2¹² and d <= 2²⁴, with magic = 2⁵⁰ // d + 1, without the some twenty instructions of `//`.

    magic · d exceeds 2⁵⁰ by at most d, so that n · magic / 2⁵⁰ exceeds n / d by at most n / 2⁵⁰ < 1 / d; and the
    product stays below 2⁶³.
    """
    return ((n.to(tl.int64) * magic) >> 50).to(tl.int32)


@triton.jit(do_not_specialize=["magic_O", "magic_I"])
def outer_flat(
    delta_ptr, activation_ptr, out_ptr, T, total, O, I, magic_O, magic_I,
    stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `outer_tiles` for a contiguous out [B, O, I] of ``total`` elements, taken as one flat range.

    Where I is odd, rows begin anywhere, and a tile of rows could only be stored element by element. A flat range of
    BLOCK elements begins at a multiple of 16 bytes, and is stored in vectors of 16 bytes. VECTOR elements lie in one
    row or, since VECTOR <= I, in two, and rows and columns cost one division for all of them: a whole vector of 16
    bytes, or 1 element where a row is shorter than that. O, I <= FLAT_LIMIT, for `divide`.
    I/O: as `outer_tiles`. Grid: total / BLOCK.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    start_row = start // I  # rows of all samples counted through
    start_b = start_row // O
    start_o = (start_row - start_b * O).to(tl.int32)
    start_i = (start - start_row * I).to(tl.int32)

    delta_ptr += start_b * stride_db
    activation_ptr += start_b * stride_ab

    # [BLOCK / VECTOR, 1]: where each vector begins, with b counted from start_b, and the row after that one.
    first = VECTOR * tl.arange(0, BLOCK // VECTOR)[:, None]
    position = start_i + first
    rows = divide(position, magic_I)
    i = position - rows * I
    o = start_o + rows
    b = divide(o, magic_O)
    o -= b * O
    last_row = o + 1 == O
    next_o = tl.where(last_row, 0, o + 1)
    next_b = tl.where(last_row, b + 1, b)
    exists = start + first < total
    next_exists = (i + VECTOR > I) & (start + first + (I - i) < total)

    # [BLOCK / VECTOR, VECTOR]: each element.
    lane = tl.arange(0, VECTOR)[None, :]
    column = i + lane
    wraps = (column >= I) & (VECTOR > 1)
    column = tl.where(wraps, column - I, column)
    loads = tl.where(wraps, next_exists, exists)

    deltas = b.to(tl.int64) * stride_db + o.to(tl.int64) * stride_do
    next_deltas = next_b.to(tl.int64) * stride_db + next_o.to(tl.int64) * stride_do
    columns = tl.where(wraps, next_b, b).to(tl.int64) * stride_ab + column.to(tl.int64) * stride_ai
    gradient = zeros_like_sum(delta_ptr, BLOCK // VECTOR, VECTOR)
    for _ in range(T):
        delta = tl.load(delta_ptr + deltas, mask=exists, other=0.0)
        if VECTOR > 1:
            next_delta = tl.load(delta_ptr + next_deltas, mask=next_exists, other=0.0)
            delta = tl.where(wraps, next_delta, delta)
        activation = tl.load(activation_ptr + columns, mask=loads, other=0.0)
        gradient += widen(delta) * widen(activation)
        delta_ptr += stride_dt
        activation_ptr += stride_at

    out = out_ptr + start + first + lane
    value = gradient.to(out_ptr.dtype.element_ty)
    # Only the last program has a mask: a bound that 16 bytes do not divide would split every store.
    if start + BLOCK <= total:
        tl.store(out, value, cache_modifier=".cs")
    else:
        tl.store(out, value, mask=start + first + lane < total, cache_modifier=".cs")


@triton.jit
def outer_dot(
    delta_ptr, activation_ptr, out_ptr, T, O, I,
    stride_db, stride_dt, stride_do, stride_ab, stride_at, stride_ai,
    stride_ob, stride_oo, stride_oi,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """As `outer_tiles` for many positions: matrix products over BLOCK_T positions at a time. Grid: B · tiles."""
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles = tl.cdiv(O, BLOCK_O) * tiles_i
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o = tile // tiles_i * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    gradient = accumulate_gradient(
        delta_ptr + b * stride_db, activation_ptr + b * stride_ab, T, o, O, i, I,
        stride_dt, stride_do, stride_at, stride_ai,
        PRECISION, BLOCK_T, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    offsets = o.to(tl.int64)[:, None] * stride_oo + i.to(tl.int64)[None, :] * stride_oi
    value = gradient.to(out_ptr.dtype.element_ty)
    mask = (o < O)[:, None] & (i < I)[None, :]
    tl.store(out_ptr + b * stride_ob + offsets, value, mask=mask, cache_modifier=".cs")
