"""Shared by the kernels: masked loads of a tile with 64-bit offsets, and sums of products in a wide type."""

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """x in the accumulation type: fp64 for fp64, else fp32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def load_tile(pointer, rows, row_count, row_stride, columns, column_count, column_stride):
    """pointer[rows, columns] -> [len(rows), len(columns)], zero outside [row_count, column_count]."""
    # An index times a stride can exceed 2³¹ although neither does.
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
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Σ_t δ_t[o] a_t[i]ᵀ of one sample -> [BLOCK_O, BLOCK_I], by matrix products over BLOCK_T positions."""
    gradient = zeros_like_sum(delta_ptr, BLOCK_O, BLOCK_I)
    deltas_ptr = delta_ptr + o.to(tl.int64)[:, None] * stride_do
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        offsets = t.to(tl.int64)[None, :]
        mask = (o < O)[:, None] & (t < T)[None, :]
        deltas = tl.load(deltas_ptr + offsets * stride_dt, mask=mask, other=0.0)
        activations = load_tile(activation_ptr, t, T, stride_at, i, I, stride_ai)
        gradient = tl.dot(deltas, activations, gradient, input_precision=PRECISION, out_dtype=gradient.dtype)
    return gradient


@triton.jit
def row_products(
    left_ptr, left_exists, left_stride, right_ptr, right_exists, right_stride, K,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x_r · y_c of the rows that begin at left_ptr [ROWS] and right_ptr [COLUMNS] -> [ROWS, COLUMNS]."""
    products = zeros_like_sum(left_ptr, ROWS, COLUMNS)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        offsets = k.to(tl.int64)[None, :]
        exists = (k < K)[None, :]
        left = tl.load(left_ptr[:, None] + offsets * left_stride, mask=left_exists[:, None] & exists, other=0.0)
        right = tl.load(right_ptr[:, None] + offsets * right_stride, mask=right_exists[:, None] & exists, other=0.0)
        products = tl.dot(left, tl.trans(right), products, input_precision=PRECISION, out_dtype=products.dtype)
    return products
