"""The operators in plain torch: readable, right on every device, and the oracle of the other backends.

Shapes: delta [B, (T,) O], activation [B, (T,) I]; ``G[b] = Σ_t delta[b, t] activation[b, t]ᵀ`` is the per-sample
gradient, [B, O, I]. Half-precision inputs are widened to fp32 first; they are small beside the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ranges

# Intermediates are computed in blocks of about this many elements: on a CPU so that a block fits a cache of a few MB,
# elsewhere 512 MB in fp32, so that a call takes few launches.
BLOCK_ELEMENTS = 1 << 20
DEVICE_BLOCK_ELEMENTS = 1 << 27
# Elements of a row, and positions, that are added up one after the other.
PIECE = 1 << 10
_HALF = (torch.bfloat16, torch.float16)
NARROW = 8  # rows or columns of a product up to which torch's is a running sum
# Of the gradients that a Gram matrix multiplies at once, 64 MB in fp32: fewer would leave the products small and slow.
GRADIENT_ELEMENTS = 1 << 24


def available() -> str | None:
    return None


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, else the type itself."""
    return torch.float32 if dtype in _HALF else dtype


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype in _HALF else t for t in tensors)


def outer(
    delta: Tensor,
    activation: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``out[b] = Σ_t delta[b, t] activation[b, t]ᵀ`` -> [B, O, I]; BTOI operations."""
    dtype = out.dtype if out is not None else dtype or delta.dtype
    if delta.ndim == 2:
        delta, activation = widen(delta, activation)
        delta, activation = delta.unsqueeze(-1), activation.unsqueeze(-2)
        if out is not None:
            return torch.mul(delta, activation, out=out)
        return (delta * activation).to(dtype)
    if out is None:
        return _gradients(delta, activation).to(dtype)
    if dtype == delta.dtype == accumulation_type(dtype) and not _drifts(delta.mT, activation):
        return torch.bmm(delta.mT, activation, out=out)
    # A whole product of another type would need twice the memory: in blocks it stays in the cache.
    step = samples_a_block(out.shape[1] * out.shape[2], out.device)
    for b in range(0, out.shape[0], step):
        out[b : b + step].copy_(_gradients(delta[b : b + step], activation[b : b + step]))
    return out


def _gradients(delta: Tensor, activation: Tensor) -> Tensor:
    """``Σ_t δ_t a_tᵀ`` of factors of one type -> [B, O, I], in the type that sums are kept in."""
    if _multiplies_halves(delta, activation):
        return torch.bmm(delta.mT, activation, out_dtype=torch.float32)
    delta, activation = widen(delta, activation)
    return _product(delta.mT, activation)


def _multiplies_halves(x: Tensor, y: Tensor) -> bool:
    """Whether torch multiplies half-precision tensors of this device into fp32, on tensor cores."""
    return x.device.type in ("cuda", "meta") and x.dtype == y.dtype and x.dtype.itemsize == 2


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x y`` of x [..., m, n] and y [..., n, k]; a long n goes in pieces where torch would keep a running sum."""
    if not _drifts(x, y):
        return torch.matmul(x, y)
    x, *more_x = x.split(PIECE, dim=-1)
    y, *more_y = y.split(PIECE, dim=-2)
    product = torch.matmul(x, y)
    for x, y in zip(more_x, more_y, strict=True):
        product += torch.matmul(x, y)  # addmm and its kin would go on with the one running sum
    return product


def _drifts(x: Tensor, y: Tensor) -> bool:
    """Whether torch would keep one running sum of very many products, as it does for narrow results."""
    return y.shape[-2] > PIECE and min(x.shape[-2], y.shape[-1]) <= NARROW


def block_elements(device: torch.device) -> int:
    """Elements of an intermediate on this device."""
    return BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS


def gradient_elements(device: torch.device) -> int:
    """Elements of the gradients that a Gram matrix multiplies at once on this device."""
    return GRADIENT_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS


def samples_a_block(elements: int, device: torch.device) -> int:
    """How many samples of so many elements make a block."""
    return max(1, block_elements(device) // max(1, elements))


def sq_norm(delta: Tensor, activation: Tensor) -> Tensor:
    """``‖G[b]‖² = Σ_ts (δ_t·δ_s)(a_t·a_s)`` -> [B].

    T = 1: ``‖δ‖²‖a‖²``, B(O + I) operations. T > 1: the T x T Gram matrices, BT²(O + I), or the gradients themselves,
    BTOI, whichever is fewer, in blocks of samples. On the CPU samples whose products leave the range of the type are
    computed again from factors scaled by powers of two, so that the result is right wherever it is in range itself.
    """
    delta, activation = widen(delta, activation)
    if delta.ndim == 2:
        # One pass over each factor, where an inner product takes two and a temporary.
        return (row_norms(delta) * row_norms(activation)).square()
    squares, least = _sq_norm_of_positions(delta, activation)
    if ranges.may_look(squares) and (rows := ranges.outside(squares, least)) is not None:
        delta, activation = delta[rows], activation[rows]
        by = (ranges.exponents(delta) + ranges.exponents(activation)).amax(1).clamp_min(ranges.NOTHING)
        again, _ = _sq_norm_of_positions(*scaled_factors(delta, activation, by))
        squares[rows] = ranges.times_two_to(by, ranges.times_two_to(by, again))
    return squares


def scaled_factors(delta: Tensor, activation: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [B, T, O] and [B, T, I] of ``2^-by[b] G[b]``, each delta of numbers of about one."""
    of_delta = ranges.exponents(delta)
    by = torch.where(by > ranges.NOTHING, by, 0)  # zeros
    return ranges.times_two_to(-of_delta, delta), ranges.times_two_to(of_delta - by[:, None], activation)


def _sq_norm_of_positions(delta: Tensor, activation: Tensor) -> tuple[Tensor, float]:
    """The squared norms of factors [B, T, O] and [B, T, I], and from which size on they have all of their digits."""
    delta, activation = _narrow_first(delta, activation)
    B, T, O = delta.shape
    I = activation.shape[2]
    pieces = max(1, min(4, T // 32)) if delta.device.type == "cpu" else 1
    work = T * (O + I) * (pieces + 1) / (2 * pieces)  # of the Gram matrices, half of which is enough
    by_gram = work < O * I  # not where both are nothing: a T x T matrix is not
    step = samples_a_block(T * T if by_gram else O * I, delta.device)
    squares, lost = [], 0.0
    for d, a in _by_blocks(delta, activation, step) if step < B else ((delta, activation),):
        if by_gram:
            found, largest = _sq_norm_by_gram(d, a, pieces)
            lost = max(lost, largest)
        else:
            found = _gradients(d, a).square_().sum((1, 2))
        squares.append(found)
    least = ranges.least_power(1, delta.dtype) * (T * T * lost if by_gram else O * I)
    return squares[0] if len(squares) == 1 else torch.cat(squares), least


def _narrow_first(delta: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """The factors, or those of the transposed gradients, whose products have long rows: up to four times as fast."""
    return (activation, delta) if delta.shape[-1] > activation.shape[-1] else (delta, activation)


def _sq_norm_by_gram(delta: Tensor, activation: Tensor, pieces: int) -> tuple[Tensor, float]:
    """``Σ_ts (δ_t·δ_s)(a_t·a_s)`` -> [B], pieces of t with the s up to them, those before them counted twice.

    And what counts that is lost below the type's range in one of the matrices: the size of the other.
    """
    T, (O, I) = delta.shape[1], (delta.shape[2], activation.shape[2])
    size, lost, squares = -(-T // pieces), 0.0, []
    for t in range(0, max(1, T), max(1, size)):
        until = min(t + size, T)
        of_delta, of_activation = (torch.bmm(x[:, t:until], x[:, :until].mT) for x in (delta, activation))
        if ranges.may_look(delta):
            lost = max(lost, O * _largest(of_activation) + I * _largest(of_delta))
        product = of_delta.mul_(of_activation)
        squares.append(product[:, :, t:].sum((1, 2)))
        if t > 0:
            squares[0].add_(squares.pop()).add_(product[:, :, :t].sum((1, 2)), alpha=2)
    # A sum of squares; rounding can fall below zero when the terms cancel.
    return squares[0].clamp_min_(0), lost


def _largest(gram: Tensor) -> float:
    """The largest number, those of the diagonal among them, than which none has a larger absolute value."""
    return float(gram.amax()) if gram.numel() else 0.0


def wide_product(x: Tensor, y: Tensor) -> Tensor:
    """``x y`` of half-precision matrices summed and returned in fp32, on a GPU without widening them first.

    Of other types it is `_product`, which does not drift.
    """
    if _multiplies_halves(x, y) and x.ndim == 2:
        return torch.mm(x, y, out_dtype=torch.float32)
    return _product(*widen(x, y))


def weighted_sum(delta: Tensor, activation: Tensor, weights: Tensor | None) -> Tensor:
    """``Σ_b w_b Σ_t δ_bt a_btᵀ`` -> [O, I], one matrix product over all positions of all samples; BTOI operations."""
    if weights is None:
        d, a = (x.reshape(-1, x.shape[-1]) if x.numel() else x.flatten(0, -2) for x in (delta, activation))
        return wide_product(d.mT, a)
    delta, activation = widen(delta, activation)
    weights = weights.to(delta.dtype).reshape(-1, *[1] * (delta.ndim - 1))
    if delta.shape[-1] > activation.shape[-1]:  # the smaller one, of which a copy takes less
        activation = activation * weights
    else:
        delta = delta * weights
    return _product(delta.flatten(0, -2).mT, activation.flatten(0, -2))


def project(delta: Tensor, activation: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ G[b] right = Σ_t (leftᵀ δ_t)(rightᵀ a_t)ᵀ`` -> [B, P, Q]; BT(OP + IQ + PQ) operations."""
    shape = delta.shape[:-1]
    u, v = (
        wide_product(x.flatten(0, -2), y if x.dtype == y.dtype else y.to(x.dtype)).unflatten(0, shape)
        for x, y in ((delta, left), (activation, right))
    )
    return u.unsqueeze(2) * v.unsqueeze(1) if u.ndim == 2 else _gradients(u, v)


def square_sum(delta: Tensor, activation: Tensor) -> Tensor:
    """``Σ_b G[b]²`` elementwise -> [O, I]; T = 1: ``(δ²)ᵀ(a²)``, BOI operations; T > 1: through blocks of gradients."""
    if delta.ndim == 2:
        delta, activation = widen(delta, activation)
        return _product(delta.square().mT, activation.square())
    squares = (gradients.square_().sum(0) for gradients in _gradient_blocks(delta, activation))
    nothing = delta.new_zeros(delta.shape[2], activation.shape[2], dtype=accumulation_type(delta.dtype))
    # In place: new totals, block after block, leave holes that the allocator keeps.
    return functools.reduce(torch.Tensor.add_, squares, nothing)


def quadratic(delta: Tensor, activation: Tensor, diag: Tensor) -> Tensor:
    """``Σ_oi diag_oi G[b]_oi²`` -> [B]; T = 1: ``(δ²)ᵀ diag (a²)``, BOI; T > 1: through blocks of gradients, BTOI."""
    diag = diag.to(accumulation_type(delta.dtype))
    if delta.ndim == 2:
        delta, activation = widen(delta, activation)
        return dot(delta.square(), activation.square(), diag)
    results = [(g.square_() * diag).sum((1, 2)) for g in _gradient_blocks(delta, activation)]
    if not results:
        return delta.new_zeros(0, dtype=diag.dtype)
    return results[0] if len(results) == 1 else torch.cat(results)


def _gradient_blocks(delta: Tensor, activation: Tensor) -> Iterator[Tensor]:
    step = samples_a_block(delta.shape[2] * activation.shape[2], delta.device)
    for b in range(0, delta.shape[0], step):
        yield _gradients(delta[b : b + step], activation[b : b + step])


def row_norms(x: Tensor, p: float = 2) -> Tensor:
    """``‖x[b]‖_p`` of x [B, n] -> [B], right on the CPU also where powers of the numbers leave the range of the type.

    Torch's norms add up one number after the other, and the error grows with the row: long rows go in pieces. Its sums
    do not, and for p = 1 are several times as fast.
    """
    if p == 1 or not x.shape[1]:
        return x.abs().sum(1)
    norms = unchecked_row_norms(x, p)
    if p == math.inf or not ranges.may_look(x):
        return norms
    rows = ranges.outside(norms, ranges.least_power(x.shape[1], x.dtype) ** (1 / p))
    if rows is not None:
        norms[rows] = scaled_row_norms(x[rows], p)
    return norms


def scaled_row_norms(x: Tensor, p: float = 2) -> Tensor:
    """`row_norms` of numbers of any size, differentiable and without waiting for one of them."""
    by = ranges.exponents(x)
    return ranges.times_two_to(by, unchecked_row_norms(ranges.times_two_to(-by, x), p))


def unchecked_row_norms(x: Tensor, p: float = 2) -> Tensor:
    """`row_norms` of numbers whose powers are in range."""
    norm, pieces = functools.partial(torch.linalg.vector_norm, ord=p), x.shape[1] // PIECE
    if pieces < 2:
        return norm(x, dim=1)
    norms = norm(x[:, : pieces * PIECE].unflatten(1, (pieces, PIECE)), dim=2)
    if x.shape[1] % PIECE:
        norms = torch.cat([norms, norm(x[:, pieces * PIECE :], dim=1, keepdim=True)], dim=1)
    return norm(norms, dim=1)


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    """``Σ_n x_n y_n`` of the last dimension, long ones in pieces on a CPU, whose sums run on."""
    if x.shape[-1] <= PIECE or x.device.type != "cpu":
        return torch.linalg.vecdot(x, y)
    pieces = zip(x.split(PIECE, dim=-1), y.split(PIECE, dim=-1), strict=True)
    return functools.reduce(torch.add, (torch.linalg.vecdot(*piece) for piece in pieces))


def dot(delta: Tensor, activation: Tensor, reference: Tensor) -> Tensor:
    """``⟨G[b], reference⟩ = Σ_t δ_tᵀ R a_t`` with R [O, I] -> [B]; BTOI operations, intermediate BT·min(O, I)."""
    delta, activation, reference = widen(delta, activation, reference)
    rows_delta, rows_activation = delta.flatten(0, -2), activation.flatten(0, -2)
    if reference.shape[1] <= reference.shape[0]:
        value = _row_dots(_product(rows_delta, reference), rows_activation)
    else:
        value = _row_dots(_product(rows_activation, reference.mT), rows_delta)
    return value if delta.ndim == 2 else value.reshape(delta.shape[:2]).sum(1)


def linear(delta: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
    """``y[b, h] = ⟨G[b], weight[h]⟩`` with weight [H, O, I] -> [B, H].

    T = 1: the longer of O and I is contracted first by matrix products, BHOI operations; the intermediate BH·min(O, I)
    is cut into blocks of samples. T > 1: the same for every position, BTHOI, or through blocks of gradients,
    BOI(T + H), whichever is fewer.
    """
    narrow = delta, activation
    delta, activation, weight = widen(delta, activation, weight)
    B, (H, O, I) = delta.shape[0], weight.shape
    if delta.ndim == 3:
        T = delta.shape[1]
        if T * H <= T + H:
            rows = linear(delta.flatten(0, 1), activation.flatten(0, 1), weight)
            return rows.reshape(B, T, H).sum(1)
        step, flat = samples_a_block(O * I, delta.device), weight.reshape(H, O * I).mT
        # Into one result: small ones between the blocks would keep the allocator from using their memory again.
        result = delta.new_empty(B, H)
        for b in range(0, B, step):
            result[b : b + step] = _gradients(*(factor[b : b + step] for factor in narrow)).flatten(1) @ flat
        return result
    if I == 1:  # gradients as they are: one product
        return _product(delta, weight.reshape(H, O).mT) * activation
    step = samples_a_block(H * min(O, I), delta.device)
    result = delta.new_empty(B, H)
    for b in range(0, B, step):
        d, a = delta[b : b + step], activation[b : b + step]
        if I <= O:
            result[b : b + step] = _row_dots(_product(d, weight), a).mT
        else:
            rows = _product(a, weight.reshape(H * O, I).mT).unflatten(1, (H, O))
            result[b : b + step] = _row_dots(rows, d.unsqueeze(1))
    return result


def gram(delta: Tensor, activation: Tensor, other_delta: Tensor, other_activation: Tensor) -> Tensor:
    """``K[b, c] = ⟨G[b], G'[c]⟩ = Σ_ts (δ_bt·δ'_cs)(a_bt·a'_cs)``, the others [C, (S,) O] and [C, (S,) I] -> [B, C].

    T = S = 1: BC(O + I) operations. Else BCTS(O + I), or through n blocks of gradients BCOI + (BT + nCS)OI, whichever
    is fewer, in blocks of samples; n = 1 where all the others make one, and where they are the samples themselves half
    of the products is enough.
    """
    d, a, other_d, other_a = widen(delta, activation, other_delta, other_activation)
    if d.ndim == 2:
        return _product(d, other_d.mT) * _product(a, other_a.mT)
    (d, a), (other_d, other_a) = _narrow_first(d, a), _narrow_first(other_d, other_a)
    (B, T, O), I, (C, S) = d.shape, a.shape[2], other_d.shape[:2]
    if 0 in (B, C, T, S, O, I):
        return d.new_zeros(B, C)
    step = max(1, gradient_elements(d.device) // max(1, O * I))
    n = 1 if step >= C else math.ceil(B / step)  # for each of which the others' gradients are formed again
    if (B * C + B * T + n * C * S) * O * I < B * C * T * S * (O + I):
        same = delta is other_delta and activation is other_activation
        return _gram_by_gradients(d, a, other_d, other_a, step, same)
    step = max(1, math.isqrt(block_elements(d.device) // max(1, T * S)))  # blocks of step · T by step · S numbers
    rows = _by_blocks(d, a, step)
    blocks = ([_gram_by_positions(*row, *other) for other in _by_blocks(other_d, other_a, step)] for row in rows)
    whole = [row[0] if len(row) == 1 else torch.cat(row, dim=1) for row in blocks]
    return whole[0] if len(whole) == 1 else torch.cat(whole)


def _gram_by_gradients(d: Tensor, a: Tensor, other_d: Tensor, other_a: Tensor, step: int, same: bool) -> Tensor:
    B, C = d.shape[0], other_d.shape[0]
    result, kept = d.new_empty(B, C), None
    for b in range(0, B, step):
        row = _gradients(d[b : b + step], a[b : b + step]).flatten(1)
        for c in range(b if same else 0, C, step):
            if same and c == b:
                column = row
            elif kept is None or step < C:
                column = kept = _gradients(other_d[c : c + step], other_a[c : c + step]).flatten(1)
            else:
                column = kept
            product = row @ column.mT
            result[b : b + step, c : c + step] = product
            if same and c > b:
                result[c : c + step, b : b + step] = product.mT
    return result


def _by_blocks(delta: Tensor, activation: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(delta.split(step), activation.split(step), strict=True)


def _gram_by_positions(d: Tensor, a: Tensor, other_d: Tensor, other_a: Tensor) -> Tensor:
    (B, T), (C, S) = d.shape[:2], other_d.shape[:2]
    product = (d.flatten(0, 1) @ other_d.flatten(0, 1).mT) * (a.flatten(0, 1) @ other_a.flatten(0, 1).mT)
    return product.view(B, T, C, S).sum((1, 3))
