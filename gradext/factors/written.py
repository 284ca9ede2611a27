"""Gradients that are there already, with the methods of factors: biases, normalisations, parameters of other shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .. import ops, ranges
from ..backends.reference import _product, accumulation_type
from . import numerics
from .numerics import row_norms, widen
from .products import GradFactors, flat_form, times
from .projections import sketch_written


class WrittenFactors(GradFactors):
    """Gradients [B, *shape] as they are, for which every method costs a pass over them.

    As a matrix [O, I] the parameter is seen with its dimensions behind the first taken together; a vector is [O, 1].

    >>> import torch
    >>> factors = GradFactors.of(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    >>> factors.norm(), factors.clipped_sum(max_norm=1.0)
    (tensor([5., 2.]), tensor([0.6000, 1.8000]))
    """

    gradients: Tensor
    weight_shape: tuple[int, ...]

    def __init__(self, gradients: Tensor) -> None:
        if gradients.ndim == 0 or gradients.dtype not in ops.DTYPES:
            raise ValueError(
                f"gradients: expected floating-point numbers [B, *shape], but got {gradients.dtype} of shape "
                f"{list(gradients.shape)}"
            )
        object.__setattr__(self, "gradients", gradients)
        object.__setattr__(self, "weight_shape", tuple(gradients.shape[1:]))

    @property
    def delta(self) -> Tensor:
        """The gradients of a vector [B, O], of a matrix its columns [B, I, O]."""
        return self._flat() if self.shape[2] == 1 else self._as_columns().mT

    @property
    def activation(self) -> Tensor:
        """What `delta` goes with: ones [B, 1], for columns the unit vectors [B, I, I]."""
        B, _, I = self.shape
        if I == 1:
            return self.gradients.new_ones(B, 1)
        return torch.eye(I, dtype=self.dtype, device=self.device).expand(B, I, I)

    def _flat(self) -> Tensor:
        return self.gradients.reshape(len(self), math.prod(self.weight_shape))

    def _as_columns(self) -> Tensor:
        """[B, O, I]."""
        return self.gradients.reshape(self.shape)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *flat_form(self.weight_shape)))

    @property
    def positions(self) -> int:
        return self.shape[2]

    @property
    def device(self) -> torch.device:
        return self.gradients.device

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype

    def __repr__(self) -> str:
        shape = list(self.weight_shape)
        return f"{type(self).__name__}(B={len(self)}, shape={shape}, dtype={self.dtype}, device={self.device})"

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.gradients,)

    def _map(self, function: Callable[[Tensor], Tensor]) -> WrittenFactors:
        return WrittenFactors(function(self.gradients))

    def _with_form(self, weight_shape: tuple[int, ...] | None) -> WrittenFactors:
        return WrittenFactors(self.gradients.reshape(len(self), *(weight_shape or self.shape[1:])))

    def reshaped(self, weight_shape: Sequence[int]) -> WrittenFactors:
        self._check_weight_shape(weight_shape)
        return WrittenFactors(self.gradients.reshape(len(self), *weight_shape))

    def transposed(self, dim0: int = 0, dim1: int = 1) -> GradFactors:
        if len(self.weight_shape) < 2:
            return self
        dims = (d % len(self.weight_shape) + 1 for d in (dim0, dim1))
        return WrittenFactors(self.gradients.transpose(*dims))

    def placed(self, start: int, size: int, dim: int = 0) -> GradFactors:
        dim = dim % len(self.weight_shape)
        used = self.weight_shape[dim]
        if start < 0 or start + used > size:
            raise ValueError(f"start, size: expected {used} rows to fit, but got start={start}, size={size}")
        shape = list(self.gradients.shape)
        shape[dim + 1] = size
        placed = self.gradients.new_zeros(shape)
        placed.narrow(dim + 1, start, used).copy_(self.gradients)
        return WrittenFactors(placed)

    def _written(self, change: Callable[[Tensor], Tensor] = lambda gradients: gradients) -> WrittenFactors:
        return WrittenFactors(change(self.gradients))

    def regrouped(self, batch: int) -> GradFactors:
        each = len(self) // batch if batch else 1
        return WrittenFactors(self.gradients.reshape(batch, each, *self.weight_shape).sum(1))

    def _blocks(self) -> Iterable[Tensor]:
        for block in self._as_columns().split(self._block_size()) if len(self) else ():
            yield block.to(accumulation_type(self.dtype))

    def materialize(
        self, *, out: Tensor | None = None, dtype: torch.dtype | None = None, backend: str | None = None
    ) -> Tensor:
        """A copy of the gradients [B, *shape], or ``out`` with them."""
        if out is None:
            return self.gradients.to(dtype or self.dtype, copy=True)
        shape = tuple(self.gradients.shape) if tuple(out.shape[1:]) == self.weight_shape else tuple(self.shape)
        ops.check_out(out, shape, self.device)
        return out.copy_(self.gradients.reshape(shape))

    def _add_to(self, gradients: Tensor) -> Tensor:
        return gradients.add_(self._as_columns())

    def _squares(self) -> Tensor:
        return numerics.row_sq_norms(self._flat())

    def _norm(self, p: float) -> Tensor:
        return row_norms(self._flat(), p)

    def sq_norm(self) -> Tensor:
        """``‖G[b]‖²`` -> [B]."""
        return self._squares()

    def _exponents(self) -> Tensor:
        return ranges.exponents(self._flat())

    def _scaled(self, by: Tensor) -> GradFactors:
        return WrittenFactors(ranges.times_two_to(-by, *widen(self.gradients)))

    def dot(self, reference: Tensor) -> Tensor:
        """``⟨G[b], R⟩`` -> [B], or [B, K] of K references."""
        if self._is_bank(reference):
            return self.linear(reference)
        return self._products(self._matrices(reference, "reference").reshape(1, -1)).squeeze(1)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``⟨G[b], weight[h]⟩ + bias[h]`` with weight [H, *shape] -> [B, H]."""
        value = self._products(self._matrices(weight, "weight", leading=1).flatten(1))
        return value if bias is None else value + bias

    def _products(self, rows: Tensor) -> Tensor:
        """Rows [H, N] -> [B, H]."""
        flat, rows = widen(self._flat(), rows)
        return _product(flat, rows.to(flat.dtype).mT)

    def _project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        (found,) = widen(self._as_columns())
        found = found if left is None else left.to(found.dtype).mT @ found
        found = found if right is None else found @ right.to(found.dtype)
        return found.clone() if left is right is None else found

    def _sketch(self, dim: int, seed: int) -> Tensor:
        (flat,) = widen(self._flat())
        return sketch_written(flat, flat_form(self.weight_shape), dim, seed)

    def sketch(self, dim: int, seed: int = 0) -> Tensor:
        if dim < 1:
            raise ValueError(f"dim: expected a positive integer, but got {dim!r}")
        return self._sketch(dim, seed)

    def _sum(self, weights: Tensor | None) -> Tensor:
        (flat,) = widen(self._flat())
        total = flat.sum(0) if weights is None else _product(weights.to(flat.dtype)[None], flat).squeeze(0)
        return total.reshape(self.weight_shape)

    def _sum_of_squares(self) -> Tensor:
        blocks = list(self._blocks())
        total = blocks[0].square().sum(0)
        for block in blocks[1:]:
            total += block.square().sum(0)
        return total

    def _kron_sums(self) -> tuple[Tensor, Tensor]:
        """Of a matrix's columns, with unit vectors for activations."""
        unit = torch.eye(self.shape[2], dtype=accumulation_type(self.dtype), device=self.device)
        return unit * len(self), ops.weighted_sum(self.delta, self.delta)

    def _quadratic(self, diag: Tensor) -> Tensor:
        return self._over_blocks(lambda gradient: (gradient.square() * diag.to(gradient.dtype)).sum((1, 2)))

    def _quadratic_kron(self, A_inv: Tensor, D_inv: Tensor) -> Tensor:
        (matrices,) = widen(self._as_columns())
        left = times(matrices.mT, D_inv).mT  # D⁻¹ G, of a symmetric D⁻¹
        return (left * times(matrices, A_inv)).sum((1, 2))
