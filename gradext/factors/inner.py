"""Inner products between the gradients of factors of any two kinds, without forming large gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..backends.reference import _row_dots, samples_a_block
from .convolutions import ConvFactors
from .embeddings import EmbeddingFactors
from .numerics import total, widen
from .products import GradFactors
from .sums import SumFactors
from .written import WrittenFactors


def all_pairs(x: GradFactors, y: GradFactors) -> Tensor:
    """``⟨X[b], Y[c]⟩`` -> [B, C], of factors of one type and device."""
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
        return y.linear(x.gradients.reshape(len(x), *y._form)).mT
    if isinstance(y, WrittenFactors):
        return x.linear(y.gradients.reshape(len(y), *x._form))
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
    for one, other in (x, y), (y, x):
        if isinstance(one, EmbeddingFactors) and type(other) is GradFactors:
            return _embedding_product_per_sample(one, other)
    step = min(x._block_size(), y._block_size())
    results = []
    for b in range(0, max(1, len(x)), step):
        results.append(_row_dots(*(each[b : b + step]._written_wide()._flat() for each in (x, y))))
    return torch.cat(results)


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
