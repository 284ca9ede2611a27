"""Inner products between the gradients of factors of any two kinds, without forming large gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..backends.reference import _row_dots, gradient_elements, samples_a_block
from .convolutions import ConvFactors
from .embeddings import EmbeddingFactors
from .numerics import row_sq_norms, total, widen
from .products import GradFactors
from .sums import SumFactors
from .written import WrittenFactors

# The time of a number that is moved, in multiply-adds: one of many in a row, and one that an index picks out.
MOVED, PICKED = 8, 64


def all_pairs(x: GradFactors, y: GradFactors) -> Tensor:
    """``⟨X[b], Y[c]⟩`` -> [B, C], of factors of one type and device.

    Embeddings and sums are written where that is less work and a gradient is no larger than a block of them.
    """
    chosen = any(isinstance(each, (EmbeddingFactors, SumFactors)) for each in (x, y))  # others choose by themselves
    if chosen and _may_write(x) and _by_gradients_work(x, y) < _pairs_work(x, y):
        return _by_gradients(x, y)
    if isinstance(x, SumFactors):
        if x is y:
            return total(_of_sum(x))
        return total(all_pairs(part, y) for part in x.parts)
    if isinstance(y, SumFactors):
        return total(all_pairs(x, part) for part in y.parts)
    x, y = _plain(x), _plain(y) if x is not y else x
    if isinstance(x, WrittenFactors):
        if isinstance(y, WrittenFactors):
            return x._products(y._flat())
        return y._linear(x.gradients.reshape(len(x), *y.shape[1:])).mT
    if isinstance(y, WrittenFactors):
        return x._linear(y.gradients.reshape(len(y), *x.shape[1:]))
    if x.shape[1:] == y.shape[1:]:
        if isinstance(x, EmbeddingFactors):
            if not isinstance(y, EmbeddingFactors):
                return _embedding_product(x, y)
            if x.by_columns == y.by_columns:
                return _embeddings(x, y)
        else:
            return _embedding_product(y, x).mT if isinstance(y, EmbeddingFactors) else _products(x, y)
    step = y._block_size()
    blocks = (y[c : c + step]._written_wide() for c in range(0, max(1, len(y)), step))
    return torch.cat([all_pairs(x, block) for block in blocks], dim=1)


def per_sample(x: GradFactors, y: GradFactors) -> Tensor:
    """``⟨X[b], Y[b]⟩`` -> [B], of factors of one type and device."""
    x, y = _plain(x), _plain(y)
    if not _may_write(x) or _pair_work(x, y) <= _writing_work(x) + _writing_work(y):
        for one, other in (x, y), (y, x):
            if isinstance(one, EmbeddingFactors) and type(other) is GradFactors:
                return _embedding_product_per_sample(one, other)
    step = min(x._block_size(), y._block_size())
    results = []
    for b in range(0, max(1, len(x)), step):
        results.append(_row_dots(*(each[b : b + step]._written_wide()._flat() for each in (x, y))))
    return torch.cat(results)


def squares(x: SumFactors) -> Tensor:
    """``‖X[b]‖²`` -> [B]: of the gradients written, or ``Σ ‖part‖² + 2 Σ ⟨part, part'⟩``, whichever is less work."""
    pairs = list(x._pairs())
    work = sum(min(_pair_work(part, part), _writing_work(part)) for part in x.parts)
    if _may_write(x) and _writing_work(x) < work + sum(_pair_work(*pair) for pair in pairs):
        return x._over_blocks(lambda gradients: row_sq_norms(gradients.flatten(1)))
    own = total(part._squares() for part in x.parts)
    return (own + 2 * total(per_sample(*pair) for pair in pairs)).clamp_min(0)


# --- which form is less work -----------------------------------------------------------------------------------------


def _may_write(x: GradFactors) -> bool:
    return math.prod(x.shape[1:]) <= gradient_elements(x.device)


def _writing_work(x: GradFactors) -> int:
    """Of writing one sample's gradient."""
    if isinstance(x, SumFactors):
        return sum(map(_writing_work, x.parts))
    if isinstance(x, WrittenFactors):
        return 0
    T, (O, I) = x.positions, x.shape[1:]
    # An embedding's rows are ordered, those of one index summed, and added to the gradient.
    summed = 3 * PICKED * T * x.delta_rows.shape[2] if isinstance(x, EmbeddingFactors) else T * O * I
    return summed + MOVED * O * I


def _by_gradients_work(x: GradFactors, y: GradFactors) -> int:
    """Of `_by_gradients`."""
    B, C, step = len(x), len(y), _at_once(x)
    n = 1 if step >= C else math.ceil(B / step)
    written = n * B * _writing_work(x) if x is y else B * _writing_work(x) + n * C * _writing_work(y)
    return written + B * C * math.prod(x.shape[1:])


def _pairs_work(x: GradFactors, y: GradFactors) -> float:
    """Of `all_pairs` from what the factors hold."""
    if isinstance(x, SumFactors):
        pairs = [(part, other) for i, part in enumerate(x.parts) for other in (x.parts[i:] if x is y else (y,))]
    elif isinstance(y, SumFactors):
        pairs = [(x, part) for part in y.parts]
    else:
        return len(x) * len(y) * _pair_work(x, y)
    return sum(min(_pairs_work(*pair), _by_gradients_work(*pair)) for pair in pairs)


def _pair_work(x: GradFactors, y: GradFactors) -> float:
    """Of the inner product of two samples' gradients, neither of them a sum, from what the factors hold."""
    T, S, (O, I) = x.positions, y.positions, x.shape[1:]
    embeddings = [each for each in (x, y) if isinstance(each, EmbeddingFactors)]
    D = embeddings[0].delta_rows.shape[2] if embeddings else 0
    for one, T_other, functionals in (x, S, len(x)), (y, T, len(y)):
        if isinstance(one, WrittenFactors):
            if embeddings:
                return T_other * D * (1 + 2 * MOVED)
            return O * I if type(x) is type(y) else O * I * min(T_other, 1 + T_other / max(1, functionals))
    if not embeddings:
        return T * S * (O + I + 3 * MOVED)
    if len(embeddings) == 1:
        return T * S * (D + PICKED + 2 * MOVED)
    return T * S * (D + 4 * MOVED) if embeddings[0].by_columns == embeddings[1].by_columns else math.inf


def _at_once(x: GradFactors) -> int:
    return max(1, gradient_elements(x.device) // max(1, math.prod(x.shape[1:])))


def _by_gradients(x: GradFactors, y: GradFactors) -> Tensor:
    """From blocks of the gradients written; n blocks of x, for each of which y's are written again if they are many."""

    def block(factors: GradFactors, start: int) -> WrittenFactors:
        part = factors[start : start + step]
        return part if isinstance(part, WrittenFactors) else part._written_wide()

    step, rows, kept = _at_once(x), [], None
    for b in range(0, max(1, len(x)), step):
        row, products = block(x, b), []
        for c in range(0, max(1, len(y)), step):
            if x is y and c == b:
                column = row
            elif kept is None or step < len(y):
                column = kept = block(y, c)
            else:
                column = kept
            products.append(row._products(column._flat()))
        rows.append(torch.cat(products, dim=1))
    return torch.cat(rows)


# --- between two kinds -----------------------------------------------------------------------------------------------


def _plain(x: GradFactors) -> GradFactors:
    """Convolutions as products of what is unfolded, or written."""
    if not isinstance(x, ConvFactors):
        return x
    return x._unfolded_factors() if x._is_smaller() else x._written_wide()


def _of_sum(x: SumFactors) -> Iterator[Tensor]:
    for i, part in enumerate(x.parts):
        yield all_pairs(part, part)
        for other in x.parts[i + 1 :]:
            products = all_pairs(part, other)
            yield products + products.mT


def _products(x: GradFactors, y: GradFactors) -> Tensor:
    same = x is y
    x = x._balanced()
    y = x if same else y._balanced()
    kind = torch.promote_types(x.dtype, y.dtype)  # the balanced ones may be wider
    x, y = (each if each.dtype == kind else each.to(kind) for each in (x, y))
    if x.delta.ndim == y.delta.ndim:
        return ops.gram(x.delta, x.activation, y.delta, y.activation)
    (activation, delta), (other_activation, other_delta) = x._explicit(), y._explicit()
    return ops.gram(delta, activation, other_delta, other_activation)


def _embeddings(x: EmbeddingFactors, y: EmbeddingFactors) -> Tensor:
    """``Σ_{t,s: index_bt = index'_cs} δ_bt · δ'_cs``; BCTSD operations."""
    (T, S), C = (x.positions, y.positions), len(y)
    if not T * C * S:
        return x._zeros_of(len(x), C)
    step = samples_a_block(T * S * C, x.device)
    columns, column_index = widen(y.delta_rows)[0].flatten(0, 1), y.index.flatten()
    blocks = []
    for b in range(0, max(1, len(x)), step):
        rows, index = widen(x.delta_rows[b : b + step])[0].flatten(0, 1), x.index[b : b + step].flatten()
        products = (rows @ columns.mT) * (index[:, None] == column_index)
        blocks.append(products.reshape(-1, T, C, S).sum((1, 3)))
    return torch.cat(blocks)


def _sides(embedding: EmbeddingFactors, product: GradFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, T, D] of the embedding; of the product the factors [C, S, D] that go with them, and [C, S, V]."""
    activation, delta = widen(*product._explicit())
    (rows,) = widen(embedding.delta_rows)
    return (rows, delta, activation) if embedding.by_columns else (rows, activation, delta)


def _embedding_product(embedding: EmbeddingFactors, product: GradFactors) -> Tensor:
    """``Σ_ts δ'_cs[index_bt] (r_bt · a'_cs)`` -> [B, C]; BCTSD operations."""
    rows, beside, looked_up = _sides(embedding, product)
    (B, T), (C, S) = embedding.index.shape, beside.shape[:2]
    if not T * C * S:
        return embedding._zeros_of(B, C)
    step = samples_a_block(T * S * C, rows.device)
    beside, looked_up = beside.flatten(0, 1), looked_up.flatten(0, 1)
    blocks = []
    for b in range(0, max(1, B), step):
        index = embedding.index[b : b + step].flatten()
        products = looked_up.index_select(1, index) * (beside @ rows[b : b + step].flatten(0, 1).mT)
        blocks.append(products.reshape(C, S, -1, T).sum((1, 3)).mT)
    return torch.cat(blocks)


def _embedding_product_per_sample(embedding: EmbeddingFactors, product: GradFactors) -> Tensor:
    """``Σ_ts δ'_bs[index_bt] (r_bt · a'_bs)`` -> [B]; BTSD operations."""
    rows, beside, looked_up = _sides(embedding, product)
    (B, T), S = embedding.index.shape, beside.shape[1]
    step = samples_a_block(T * S, rows.device)
    blocks = []
    for b in range(0, max(1, B), step):
        r, a, d, index = (x[b : b + step] for x in (rows, beside, looked_up, embedding.index))
        found = d.gather(2, index.unsqueeze(1).expand(-1, S, -1))  # [b, S, T]
        blocks.append((found * (a @ r.mT)).sum((1, 2)))
    return torch.cat(blocks)
