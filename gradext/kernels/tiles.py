"""What the kernels share: masked loads of a tile with 64-bit offsets, and the type that they accumulate in."""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, rows, row_count, row_stride, columns, column_count, column_stride):
    """pointer[rows, columns] -> [len(rows), len(columns)], zero outside [row_count, column_count]."""
    # An index times a stride can pass 2³¹ though neither does.
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + offsets, mask=(rows < row_count)[:, None] & (columns < column_count)[None, :], other=0.0)


@triton.jit
def zeros_like_sum(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """An accumulator for sums of products of what ``pointer`` points to: fp64 for fp64, else fp32."""
    if pointer.dtype.element_ty == tl.float64:
        return tl.zeros((ROWS, COLUMNS), tl.float64)
    else:
        return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def accumulate_gradient(
    delta_ptr, activation_ptr, T, o, O, i, I,
    stride_dt, stride_do, stride_at, stride_ai,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Σ_t δ_t[o] a_t[i]ᵀ of one sample -> [BLOCK_O, BLOCK_I], by matrix products over BLOCK_T positions."""
    gradient = zeros_like_sum(delta_ptr, BLOCK_O, BLOCK_I)
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        deltas = load_tile(delta_ptr, o, O, stride_do, t, T, stride_dt)
        activations = load_tile(activation_ptr, t, T, stride_at, i, I, stride_ai)
        gradient = tl.dot(deltas, activations, gradient, input_precision=PRECISION, out_dtype=gradient.dtype)
    return gradient
