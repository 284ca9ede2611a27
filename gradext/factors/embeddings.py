"""Factors of embeddings: the gradient of each position with the index of the row that was looked up, never one-hot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, ranges
from ..backends.reference import accumulation_type
from . import numerics
from .numerics import row_norms, widen
from .products import GradFactors, flat_form, regroup, times
from .projections import hashes, signs


class EmbeddingFactors(GradFactors):
    """The factors of an embedding's weight [V, D]: the gradient of each position goes to the row looked up there.

    ``G[b] = Σ_t e(index_bt) δ_btᵀ`` with index [B, T], delta_rows [B, T, D] and e(v) the unit vector [V], which is
    formed by no method, only where ``delta`` itself is asked for. ``rows`` is V. With ``by_columns`` the parameter is
    the transposed one [D, V], of which columns were looked up.
    """

    index: Tensor
    delta_rows: Tensor
    rows: int
    by_columns: bool
    weight_shape: tuple[int, ...] | None

    def __init__(
        self,
        index: Tensor,
        delta_rows: Tensor,
        rows: int,
        weight_shape: tuple[int, ...] | None = None,
        by_columns: bool = False,
    ) -> None:
        if index.ndim != 2 or delta_rows.ndim != 3 or delta_rows.shape[:2] != index.shape:
            raise ValueError(
                f"index, delta_rows: expected shapes [B, T] and [B, T, D], but got {list(index.shape)} and "
                f"{list(delta_rows.shape)}"
            )
        for name, value in (
            *(("index", index.long()), ("delta_rows", delta_rows), ("rows", rows)),
            *(("weight_shape", weight_shape), ("by_columns", by_columns)),
        ):
            object.__setattr__(self, name, value)
        if weight_shape is not None:
            self._check_weight_shape(weight_shape)

    @property
    def delta(self) -> Tensor:
        """The unit vectors, [B, T, V]; with ``by_columns`` the rows."""
        return self.delta_rows if self.by_columns else self._unit_vectors()

    @property
    def activation(self) -> Tensor:
        """The gradients of the positions, [B, T, D]; with ``by_columns`` the unit vectors."""
        return self._unit_vectors() if self.by_columns else self.delta_rows

    def _unit_vectors(self) -> Tensor:
        return F.one_hot(self.index, self.rows).to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        sizes = self.rows, self.delta_rows.shape[2]
        return torch.Size((len(self), *(sizes[::-1] if self.by_columns else sizes)))

    @property
    def positions(self) -> int:
        return self.index.shape[1]

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def dtype(self) -> torch.dtype:
        return self.delta_rows.dtype

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.index, self.delta_rows

    def _map(self, function: Callable[[Tensor], Tensor]) -> EmbeddingFactors:
        return self._of(function(self.index), function(self.delta_rows))

    def _of(self, index: Tensor, delta_rows: Tensor) -> EmbeddingFactors:
        return EmbeddingFactors(index, delta_rows, self.rows, self.weight_shape, self.by_columns)

    def to(self, *args: Any, **kwargs: Any) -> EmbeddingFactors:
        rows = self.delta_rows.to(*args, **kwargs)  # a change of type is meant for the values alone: it rounds an index
        return self._of(self.index.to(rows.device), rows)

    def _with_form(self, weight_shape: tuple[int, ...] | None) -> EmbeddingFactors:
        return EmbeddingFactors(self.index, self.delta_rows, self.rows, weight_shape, self.by_columns)

    def _exchanged(self) -> EmbeddingFactors:
        return EmbeddingFactors(self.index, self.delta_rows, self.rows, None, not self.by_columns)

    def _padded_rows(self, before: int, after: int, shape: tuple[int, ...]) -> GradFactors:
        if self.by_columns:
            padded = EmbeddingFactors(self.index, F.pad(self.delta_rows, (before, after)), self.rows, None, True)
        else:
            padded = EmbeddingFactors(self.index + before, self.delta_rows, before + self.rows + after)
        return padded.reshaped(shape)

    def _padded_columns(self, before: int, after: int, shape: tuple[int, ...]) -> GradFactors:
        _, O, I = self.shape
        return self._exchanged()._padded_rows(before, after, (before + I + after, O))._exchanged().reshaped(shape)

    def regrouped(self, batch: int) -> EmbeddingFactors:
        return self._map(lambda x: regroup(x, batch))

    def _combined(self) -> tuple[Tensor, Tensor]:
        """The rows that are not zero, each once and padded by zero ones: index [B, T] and values [B, T, D]."""
        (rows,) = widen(self.delta_rows)
        if self.positions < 2:
            return self.index, rows
        index, order = self.index.sort(dim=1)
        changes = F.pad(index[:, 1:] != index[:, :-1], (1, 0)).cumsum(1)  # the how-many-eth row of its sample
        rows = rows.gather(1, order.unsqueeze(2).expand_as(rows))
        values = torch.zeros_like(rows).scatter_add(1, changes.unsqueeze(2).expand_as(rows), rows)
        return torch.zeros_like(index).scatter(1, changes, index), values

    def _by_rows(self, matrices: Tensor) -> Tensor:
        """[..., O, I] as [..., V, D], or back."""
        return matrices.mT if self.by_columns else matrices

    # --- the gradients themselves ------------------------------------------------------------------------------------

    def materialize(
        self, *, out: Tensor | None = None, dtype: torch.dtype | None = None, backend: str | None = None
    ) -> Tensor:
        """``G[b, v] = Σ_{t: index_bt = v} δ_bt`` -> [B, V, D]; BTD operations, writes BVD numbers."""
        if out is None:
            zeros = self.delta_rows.new_zeros(self.shape, dtype=dtype or self.dtype)
            return self._like_weight(self._scatter(zeros))
        matrices = self._as_matrices(out)
        if matrices is None:
            return out.copy_(self.materialize(dtype=out.dtype))
        ops.check_out(matrices, tuple(self.shape), self.device)
        self._scatter(matrices.zero_())
        return out

    def _scatter(self, gradients: Tensor) -> Tensor:
        """Adds the gradients to [B, O, I] in place, each row summed before."""
        index, values = self._combined()
        self._by_rows(gradients).scatter_add_(1, index.unsqueeze(2).expand_as(values), values.to(gradients.dtype))
        return gradients

    def _add_to(self, gradients: Tensor) -> Tensor:
        return self._scatter(gradients)

    def _sum(self, weights: Tensor | None) -> Tensor:
        return self._like_weight(self._add_sum(weights, self._zeros()))

    def _zeros(self) -> Tensor:
        return torch.zeros(self.shape[1:], dtype=accumulation_type(self.dtype), device=self.device)

    def _add_sum(self, weights: Tensor | None, total: Tensor) -> Tensor:
        """Adds ``Σ_b w_b G[b]`` to [O, I] in place; BTD operations."""
        (rows,) = widen(self.delta_rows)
        rows = rows if weights is None else rows * weights.to(rows.dtype)[:, None, None]
        self._by_rows(total).index_add_(0, self.index.flatten(), rows.flatten(0, 1))
        return total

    # --- norms and inner products ------------------------------------------------------------------------------------

    def _squares(self) -> Tensor:
        return numerics.row_sq_norms(self._combined()[1].flatten(1))

    def sq_norm(self) -> Tensor:
        """``‖G[b]‖²`` -> [B]; BTD operations and a sort of each sample's T indices."""
        return self._squares()

    def _norm(self, p: float) -> Tensor:
        return row_norms(self._combined()[1].flatten(1), p)

    def _exponents(self) -> Tensor:
        return ranges.exponents(self.delta_rows.flatten(1))

    def _scaled(self, by: Tensor) -> EmbeddingFactors:
        return self._of(self.index, ranges.times_two_to(-by, *widen(self.delta_rows)))

    def dot(self, reference: Tensor) -> Tensor:
        """``Σ_t R[index_bt] · δ_bt`` with R [V, D] -> [B], or [K, V, D] -> [B, K]; BTD operations each."""
        if self._is_bank(reference):
            return self.linear(reference)
        return self._dot(self._matrices(reference, "reference"))

    def _dot(self, matrix: Tensor) -> Tensor:
        (rows,) = widen(self.delta_rows)
        return (F.embedding(self.index, self._by_rows(matrix)).to(rows.dtype) * rows).sum((1, 2))

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``Σ_t weight[h, index_bt] · δ_bt`` with weight [H, V, D] -> [B, H]; BHTD operations.

        Or through blocks of gradients, BTD + BHVD, where many functionals make that the lesser.
        """
        from .inner import all_pairs

        value = all_pairs(self, GradFactors.of(self._matrices(weight, "weight", leading=1)))
        return value if bias is None else value + bias

    def _linear(self, weight: Tensor) -> Tensor:
        values = [self._dot(functional) for functional in weight]
        return torch.stack(values, dim=1) if values else self._zeros_of(len(self), 0)

    def _zeros_of(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=accumulation_type(self.dtype), device=self.device)

    # --- projections -------------------------------------------------------------------------------------------------

    def _project_randomly(self, rank: int, seed: int) -> Tensor:
        if rank < 1:
            raise ValueError(f"rank: expected a positive integer, but got {rank!r}")
        if tuple(self.shape[1:]) != flat_form(self._form) or rank >= self.rows:
            return super()._project_randomly(rank, seed)
        # Of the side that is looked up, the rows in question alone.
        wide = self.delta_rows.shape[2]
        of_index, of_rows = (1, 0) if self.by_columns else (0, 1)
        looked_up = signs(self.index, self.dtype, rank, seed, of_index)
        columns = torch.arange(wide, device=self.device)
        other = None if rank >= wide else signs(columns, self.dtype, rank, seed, of_rows)
        return self._projected(looked_up, other).mul_(self._scale_of_signs(rank))

    def _project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        looked_up, other = (right, left) if self.by_columns else (left, right)
        if looked_up is not None:
            return self._projected(F.embedding(self.index, looked_up), other)
        (rows,) = widen(self.delta_rows)
        rows = rows if other is None else rows @ other.to(rows.dtype)
        return EmbeddingFactors(self.index, rows, self.rows, None, self.by_columns).materialize()

    def _projected(self, looked_up: Tensor, other: Tensor | None) -> Tensor:
        """With the rows [B, T, R] that were looked up in the one matrix."""
        (rows,) = widen(self.delta_rows)
        rows = rows if other is None else rows @ other.to(rows.dtype)
        return self._by_rows(ops.outer(looked_up.to(rows.dtype), rows))

    def _sketch(self, dim: int, seed: int) -> Tensor:
        """Each position's row into buckets shifted by its index's own; BTD operations."""
        (rows,) = widen(self.delta_rows)
        of_index, of_rows = (1, 0) if self.by_columns else (0, 1)
        bucket, sign = hashes(self.index, rows.dtype, dim, seed, of_index)
        columns, column_sign = hashes(torch.arange(rows.shape[2], device=rows.device), rows.dtype, dim, seed, of_rows)
        buckets = (bucket.unsqueeze(2) + columns) % dim
        values = rows * sign.unsqueeze(2) * column_sign
        return self._zeros_of(len(self), dim).scatter_add(1, buckets.flatten(1), values.flatten(1))

    # --- over the batch, and quadratic forms -------------------------------------------------------------------------

    def _sum_of_squares(self) -> Tensor:
        index, values = self._combined()
        total = self._zeros()
        self._by_rows(total).index_add_(0, index.flatten(), values.square().flatten(0, 1))
        return total

    def _kron_sums(self) -> tuple[Tensor, Tensor]:
        """The unit vectors' is the diagonal of how often each row was looked up."""
        counts, index = self._zeros_of(self.rows), self.index.flatten()
        counts.index_add_(0, index, counts.new_ones(len(index)))
        of_rows = ops.weighted_sum(self.delta_rows, self.delta_rows)
        return (counts, of_rows) if self.by_columns else (of_rows, counts)

    def _quadratic(self, diag: Tensor) -> Tensor:
        index, values = self._combined()
        return (F.embedding(index, self._by_rows(diag)).to(values.dtype) * values.square()).sum((1, 2))

    def _quadratic_kron(self, A_inv: Tensor, D_inv: Tensor) -> Tensor:
        of_rows, of_index = (D_inv, A_inv) if self.by_columns else (A_inv, D_inv)
        index, values = self._combined()
        products = times(values, of_rows)
        if of_index.ndim == 1:
            return ((products * values).sum(2) * of_index.to(values.dtype)[index]).sum(1)
        between = of_index[index.unsqueeze(2), index.unsqueeze(1)].to(values.dtype)  # [B, T, T]
        return (products @ values.mT * between).sum((1, 2))
