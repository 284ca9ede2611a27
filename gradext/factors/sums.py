"""One weight used in several ways: sums of factors of different kinds, and the joining of uses and of batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..backends.reference import accumulation_type
from .convolutions import ConvFactors
from .embeddings import EmbeddingFactors
from .numerics import row_norms, total, widen
from .products import GradFactors, add_matrices, times
from .written import WrittenFactors


class SumFactors(GradFactors):
    """The sum of several gradients of each sample for one weight, in factors of different kinds.

    Example: for a tied embedding ``parts`` are those of the look-up, `EmbeddingFactors`, and of the head, a product. No
    one-hot vectors are formed. Linear functions of the gradients are sums over the parts; norms and Gram matrices use
    those of the parts and their inner products; everything else, and these where it is less work, is computed from
    blocks of gradients. Made by `GradFactors.add`.

    A squared norm from the parts is ``Σ ‖part‖² + 2 Σ ⟨part, part'⟩``. If parts nearly cancel, it has fewer correct
    digits than the norm of the written gradient; negative values from rounding become zero.

    >>> import torch
    >>> look_up = EmbeddingFactors(torch.tensor([[0, 2], [3, 3]]), torch.rand(2, 2, 5), rows=4)
    >>> tied = GradFactors.add([look_up, GradFactors(activation=torch.rand(2, 5), delta=torch.rand(2, 4))])
    >>> [type(part).__name__ for part in tied.parts], tied.norm().shape, tied.materialize().shape
    (['EmbeddingFactors', 'GradFactors'], torch.Size([2]), torch.Size([2, 4, 5]))
    """

    parts: tuple[GradFactors, ...]
    weight_shape: tuple[int, ...] | None

    def __init__(self, parts: Sequence[GradFactors]) -> None:
        parts = tuple(parts)
        _check_alike(parts, same_batch=True)
        if len({part.shape[1:] for part in parts}) > 1 or len({_kind(part) for part in parts}) < len(parts):
            raise ValueError(
                "parts: expected one of each kind, of the same [O, I]; use GradFactors.add, which joins them"
            )
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "weight_shape", parts[0].weight_shape)

    @property
    def shape(self) -> torch.Size:
        return self.parts[0].shape

    @property
    def activation(self) -> Tensor:
        """The parts' by position, for which an embedding's unit vectors are formed."""
        return torch.cat([part._explicit()[0] for part in self.parts], dim=1)

    @property
    def delta(self) -> Tensor:
        """The parts' by position, for which an embedding's unit vectors are formed."""
        return torch.cat([part._explicit()[1] for part in self.parts], dim=1)

    @property
    def positions(self) -> int:
        return sum(part.positions for part in self.parts)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def __len__(self) -> int:
        return len(self.parts[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' + '.join(map(repr, self.parts))})"

    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part._tensors())

    def _each(self, function: Callable[[GradFactors], GradFactors]) -> GradFactors:
        return add([function(part) for part in self.parts])

    def _map(self, function: Callable[[Tensor], Tensor]) -> SumFactors:
        return SumFactors([part._map(function) for part in self.parts])

    def to(self, *args: Any, **kwargs: Any) -> SumFactors:
        return SumFactors([part.to(*args, **kwargs) for part in self.parts])

    def reshaped(self, weight_shape: Sequence[int]) -> GradFactors:
        return self._each(lambda part: part.reshaped(weight_shape))

    def transposed(self, dim0: int = 0, dim1: int = 1) -> GradFactors:
        return self._each(lambda part: part.transposed(dim0, dim1))

    def placed(self, start: int, size: int, dim: int = 0) -> GradFactors:
        return self._each(lambda part: part.placed(start, size, dim))

    def regrouped(self, batch: int) -> GradFactors:
        return self._each(lambda part: part.regrouped(batch))

    # --- the gradients themselves ------------------------------------------------------------------------------------

    def materialize(
        self, *, out: Tensor | None = None, dtype: torch.dtype | None = None, backend: str | None = None
    ) -> Tensor:
        """``G[b]``, the sum of the parts' -> [B, *weight_shape]; into ``out`` in place, if given."""
        first, *others = self._in_order()
        if out is None:
            dtype = dtype or self.dtype
            gradients = first.materialize(dtype=accumulation_type(dtype), backend=backend)
            return _plus(gradients, others).to(dtype)
        shape = self._form if tuple(out.shape[1:]) == self._form else self.shape[1:]
        ops.check_out(out, (len(self), *shape), self.device)
        if out.dtype == accumulation_type(out.dtype) and out.is_contiguous():
            return _plus(first.materialize(out=out, backend=backend), others)
        for b in range(0, len(self), self._block_size()):
            block = out[b : b + self._block_size()]
            block.copy_(self[b : b + len(block)].materialize(dtype=accumulation_type(out.dtype)).reshape(block.shape))
        return out

    def _in_order(self) -> list[GradFactors]:
        """The parts, those that are scattered behind the one that is written."""
        return sorted(self.parts, key=lambda part: isinstance(part, EmbeddingFactors))

    def _add_to(self, gradients: Tensor) -> Tensor:
        return _plus(gradients, self.parts)

    def _sum(self, weights: Tensor | None) -> Tensor:
        first, *others = self._in_order()
        result = first._sum(weights)
        for part in others:
            if isinstance(part, EmbeddingFactors):
                part._add_sum(weights, result.view(part.shape[1:]))
            else:
                result = result + part._sum(weights)
        return result

    # --- norms and inner products ------------------------------------------------------------------------------------

    def _squares(self) -> Tensor:
        from .inner import squares

        return squares(self)

    def _pairs(self) -> Iterable[tuple[GradFactors, GradFactors]]:
        return ((x, y) for i, x in enumerate(self.parts) for y in self.parts[i + 1 :])

    def _norm(self, p: float) -> Tensor:
        return self._root() if p == 2 else self._over_blocks(lambda gradient: row_norms(gradient.flatten(1), p))

    def _exponents(self) -> Tensor:
        return functools.reduce(torch.maximum, (part._exponents() for part in self.parts))

    def _scaled(self, by: Tensor) -> SumFactors:
        return SumFactors([part._scaled(by) for part in self.parts])

    def dot(self, reference: Tensor) -> Tensor:
        """``⟨G[b], R⟩`` -> [B], or [B, K] of K references: the sum of the parts'."""
        return total(part.dot(reference) for part in self.parts)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``⟨G[b], weight[h]⟩ + bias[h]`` -> [B, H]: the sum of the parts', or through blocks of gradients."""
        from .inner import all_pairs

        value = all_pairs(self, GradFactors.of(self._matrices(weight, "weight", leading=1)))
        return value if bias is None else value + bias

    # --- projections, statistics and quadratic forms -----------------------------------------------------------------

    def _project_randomly(self, rank: int, seed: int) -> Tensor:
        return total(part._project_randomly(rank, seed) for part in self.parts)

    def _project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        return total(part._project(left, right) for part in self.parts)

    def sketch(self, dim: int, seed: int = 0) -> Tensor:
        """`GradFactors.sketch`, which is linear: the sum of the parts'."""
        return total(part.sketch(dim, seed) for part in self.parts)

    def _sum_of_squares(self) -> Tensor:
        return functools.reduce(torch.Tensor.add_, (block.square().sum(0) for block in self._blocks()))

    def _quadratic(self, diag: Tensor) -> Tensor:
        return self._over_blocks(lambda gradient: (gradient.square() * diag.to(gradient.dtype)).sum((1, 2)))

    def _kron_sums(self) -> tuple[Tensor, Tensor]:
        pairs = [part._kron_sums() for part in self.parts]
        A, D = (functools.reduce(add_matrices, matrices) for matrices in zip(*pairs, strict=True))
        return A, D

    def _quadratic_kron(self, A_inv: Tensor, D_inv: Tensor) -> Tensor:
        from .inner import per_sample

        def crossed(x: GradFactors, y: GradFactors) -> Tensor:
            x, y = (y, x) if isinstance(x, EmbeddingFactors) else (x, y)
            activation, delta = widen(*x._explicit())  # of symmetric D⁻¹ and A⁻¹
            return per_sample(GradFactors(times(activation, A_inv), times(delta, D_inv)), y)

        own = total(part._quadratic_kron(A_inv, D_inv) for part in self.parts)
        return own + 2 * total(crossed(x, y) for x, y in self._pairs())


def add(parts: Sequence[GradFactors]) -> GradFactors:
    """`GradFactors.add`."""
    parts = [piece for part in parts for piece in (part.parts if isinstance(part, SumFactors) else (part,))]
    _check_alike(parts, same_batch=True)
    if len(parts) == 1:
        return parts[0]
    kind = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    parts = [_unfolded(part if part.dtype == kind else part.to(kind)) for part in parts]
    if any(isinstance(part, WrittenFactors) for part in parts) or len({part.shape[1:] for part in parts}) > 1:
        # What takes BOI numbers already takes the others in: every method is cheaper then, and nothing cancels unseen.
        return _written_sum(parts)
    groups: dict[tuple, list[GradFactors]] = {}
    for part in parts:
        groups.setdefault(_kind(part), []).append(part)
    joined = [_stacked(group) for group in groups.values()]
    return joined[0] if len(joined) == 1 else SumFactors(joined)


def cat(parts: Sequence[GradFactors]) -> GradFactors:
    """`GradFactors.cat`."""
    _check_alike(parts, same_batch=False)
    if len(parts) == 1:
        return parts[0]
    convolutions = [part for part in parts if isinstance(part, ConvFactors)]
    if len(convolutions) == len(parts):
        first = convolutions[0]
        if all(part._geometry() == first._geometry() for part in convolutions):
            tensors = zip(*(part._tensors() for part in convolutions), strict=True)
            return first._of(*map(torch.cat, tensors))
    pieces = [[_unfolded(p) for p in (part.parts if isinstance(part, SumFactors) else (part,))] for part in parts]
    if any(isinstance(piece, WrittenFactors) for part in pieces for piece in part):
        return WrittenFactors(torch.cat([part._written().gradients for part in parts]))
    kinds = {_kind(piece): piece for part in pieces for piece in part}
    joined = []
    for kind, example in kinds.items():
        own = [next((p for p in part if _kind(p) == kind), None) or _nothing_like(example, part[0]) for part in pieces]
        joined.append(_cat_positions(own))
    return joined[0] if len(joined) == 1 else SumFactors(joined)


def _check_alike(parts: Sequence[GradFactors], same_batch: bool) -> None:
    if not parts:
        raise ValueError("parts: expected at least one GradFactors, but got an empty sequence")
    for part in parts[1:]:
        if part._form != parts[0]._form:
            raise ValueError(
                f"parts: expected gradients of one parameter's shape, but got {list(parts[0]._form)} and "
                f"{list(part._form)}"
            )
        if same_batch and len(part) != len(parts[0]):
            raise ValueError(f"parts: expected the same samples in all, but got {len(parts[0])} and {len(part)}")


def _kind(part: GradFactors) -> tuple:
    """What has to agree for positions to be laid side by side."""
    return type(part), tuple(part.shape[1:]), getattr(part, "by_columns", None)


def _unfolded(part: GradFactors) -> GradFactors:
    """A convolution's factors as a product's, or written where that is smaller."""
    if not isinstance(part, ConvFactors):
        return part
    return part._unfolded_factors() if part._is_smaller() else part.compact()


def _written_sum(parts: Sequence[GradFactors]) -> WrittenFactors:
    first, *others = sorted(parts, key=lambda part: not isinstance(part, WrittenFactors))
    whole = first.materialize(dtype=accumulation_type(first.dtype)).contiguous()
    for part in others:
        part._add_to(whole.view(part.shape))
    return WrittenFactors(whole.reshape(len(first), *first._form).to(first.dtype))


def _stacked(parts: Sequence[GradFactors]) -> GradFactors:
    """The sum of gradients of one kind: their positions side by side."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, EmbeddingFactors):
        return first._of(*(torch.cat(tensors, dim=1) for tensors in zip(*(p._tensors() for p in parts), strict=True)))
    explicit = (part._explicit() for part in parts)
    activation, delta = (torch.cat(tensors, dim=1) for tensors in zip(*explicit, strict=True))
    return GradFactors(activation, delta, first.weight_shape)


def _cat_positions(parts: Sequence[GradFactors]) -> GradFactors:
    """One batch of gradients of one kind; where T differs, zero positions fill up."""
    first = parts[0]
    T = max(part.positions for part in parts)
    if isinstance(first, EmbeddingFactors):
        indices, rows = zip(*(part._tensors() for part in parts), strict=True)
        return first._of(
            torch.cat([F.pad(index, (0, T - index.shape[1])) for index in indices]),
            torch.cat([F.pad(row, (0, 0, 0, T - row.shape[1])) for row in rows]),
        )
    if all(part.delta.ndim == 2 for part in parts):
        return GradFactors(
            torch.cat([p.activation for p in parts]), torch.cat([p.delta for p in parts]), first.weight_shape
        )
    pairs = ((F.pad(factor, (0, 0, 0, T - factor.shape[1])) for factor in part._explicit()) for part in parts)
    activation, delta = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return GradFactors(activation, delta, first.weight_shape)


def _nothing_like(example: GradFactors, part: GradFactors) -> GradFactors:
    """Factors of a kind without a position, for the samples of a batch that has none of it."""
    B = len(part)
    if isinstance(example, EmbeddingFactors):
        return example._of(
            example.index.new_zeros(B, 0), example.delta_rows.new_zeros(B, 0, example.delta_rows.shape[2])
        )
    activation, delta = (factor.new_zeros(B, 0, factor.shape[2]) for factor in example._explicit())
    return GradFactors(activation, delta, example.weight_shape)


def _plus(gradients: Tensor, parts: Iterable[GradFactors]) -> Tensor:
    """Adds the parts to gradients of their shape in place."""
    for part in parts:
        part._add_to(gradients.view(part.shape))
    return gradients
