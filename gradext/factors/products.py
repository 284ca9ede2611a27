"""Factors of one weight: per-sample gradients as sums of outer products, and the methods of every kind of factors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, ranges
from ..backends.reference import accumulation_type, samples_a_block, scaled_factors
from . import numerics
from .numerics import row_norms, safe_sqrt, widen
from .projections import count_sketch, signs

if TYPE_CHECKING:
    from .written import WrittenFactors


@dataclass(frozen=True, eq=False)
class GradFactors:
    """Per-sample gradients of one weight in factored form, exact for every T.

    activation: [B, I] or [B, T, I], the layer's inputs; delta: [B, O] or [B, T, O], the gradient of each sample's loss
    with respect to the layer's outputs; weight_shape: the parameter's shape if it is not [O, I] but has the same
    numbers in the same order. Every method is differentiable in the factors and in its tensor arguments. Arguments and
    results of the size of the parameter have its shape; arguments may also have the shape [O, I].

    Other kinds of factors (of gradients stored as tensors, `of`; of convolutions and embeddings; of a weight used in
    several ways) have the same methods.

    >>> import torch
    >>> factors = GradFactors(activation=torch.tensor([[1.0, 2.0]]), delta=torch.tensor([[3.0]]))
    >>> factors.materialize()
    tensor([[[3., 6.]]])
    >>> factors.norm()
    tensor([6.7082])
    >>> batch = GradFactors(activation=torch.rand(8, 5), delta=torch.rand(8, 3))
    >>> batch, batch[:2].shape
    (GradFactors(B=8, O=3, I=5, T=1, dtype=torch.float32, device=cpu), torch.Size([2, 3, 5]))
    """

    activation: Tensor
    delta: Tensor
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        ops.check_factors(self.delta, self.activation)
        if self.weight_shape is not None:
            self._check_weight_shape(self.weight_shape)
        if self.delta.ndim == 3 and self.delta.shape[1] == 1:  # one position has the cheaper forms
            object.__setattr__(self, "delta", self.delta.squeeze(1))
            object.__setattr__(self, "activation", self.activation.squeeze(1))

    def _check_weight_shape(self, shape: Sequence[int]) -> None:
        if math.prod(shape) != math.prod(self.shape[1:]):
            raise ValueError(
                f"weight_shape: expected as many elements as [O, I] = {list(self.shape[1:])}, but got {list(shape)}"
            )

    @staticmethod
    def of(gradients: Tensor) -> WrittenFactors:
        """The factors of gradients [B, *shape] stored as tensors: small ones, of biases and the like."""
        from .written import WrittenFactors

        return WrittenFactors(gradients)

    # --- what they are -----------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """[B, O, I], the shape of the gradients that the factors stand for."""
        return torch.Size((self.delta.shape[0], self.delta.shape[-1], self.activation.shape[-1]))

    @property
    def positions(self) -> int:
        """T, the number of outer products in each gradient."""
        return 1 if self.delta.ndim == 2 else self.delta.shape[1]

    @property
    def device(self) -> torch.device:
        return self.delta.device

    @property
    def dtype(self) -> torch.dtype:
        return self.delta.dtype

    @property
    def nbytes(self) -> int:
        """The memory that the factors take."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def __len__(self) -> int:
        return self._tensors()[0].shape[0]

    def __repr__(self) -> str:
        B, O, I = self.shape
        shape = "" if self.weight_shape is None else f"weight_shape={list(self.weight_shape)}, "
        sizes = f"B={B}, O={O}, I={I}, T={self.positions}"
        return f"{type(self).__name__}({sizes}, {shape}dtype={self.dtype}, device={self.device})"

    def __getitem__(self, index: Any) -> GradFactors:
        """The factors of some samples: an integer (kept as a batch of one), a slice, a mask or a list of indices."""
        if isinstance(index, (int, np.integer)) or (isinstance(index, Tensor) and index.ndim == 0):
            index = [operator.index(index)]

        def rows(factor: Tensor) -> Tensor:
            found = None if isinstance(index, tuple) else factor[index]
            if found is None or found.ndim != factor.ndim:  # positions would pass for samples, or some be left out
                raise IndexError(
                    f"index: expected an integer, a slice, a mask or a list of indices, of samples, but got {index!r}"
                )
            return found

        return self._map(rows)

    def to(self, *args: Any, **kwargs: Any) -> GradFactors:
        """As `Tensor.to`, for the tensors in them; a type is meant for their values, not for indices."""
        return self._map(lambda factor: factor.to(*args, **kwargs))

    def detach(self) -> GradFactors:
        return self._map(Tensor.detach)

    def _tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are held, samples in the first dimension."""
        return self.activation, self.delta

    def _map(self, function: Callable[[Tensor], Tensor]) -> GradFactors:
        """The same after ``function`` of each tensor, which keeps all dimensions but the first."""
        return GradFactors(function(self.activation), function(self.delta), self.weight_shape)

    def _is_eager(self) -> bool:
        return numerics.is_eager(*self._tensors())

    # --- other forms of the same numbers -----------------------------------------------------------------------------

    @property
    def _form(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.shape[1:]) if self.weight_shape is None else self.weight_shape

    def compact(self) -> GradFactors:
        """The form that needs least memory and work: the gradients themselves where the factors are larger."""
        return self

    def reshaped(self, weight_shape: Sequence[int]) -> GradFactors:
        """The factors of ``G[b].reshape(weight_shape)``, of a parameter that was used in another shape."""
        self._check_weight_shape(weight_shape)
        shape = tuple(weight_shape)
        return self._with_form(None if shape == tuple(self.shape[1:]) else shape)

    def _with_form(self, weight_shape: tuple[int, ...] | None) -> GradFactors:
        return GradFactors(self.activation, self.delta, weight_shape)

    def transposed(self, dim0: int = 0, dim1: int = 1) -> GradFactors:
        """The factors of every ``G[b].transpose(dim0, dim1)``, dimensions being the parameter's.

        Those of matrices are exchanged; gradients of other shapes are written.
        """
        form = self._form
        dims = {dim0 % max(1, len(form)), dim1 % max(1, len(form))}
        if len(dims) == 1:
            return self
        if form == tuple(self.shape[1:]):
            return self._exchanged()
        return self._written(lambda gradients: gradients.transpose(*(d + 1 for d in dims)))

    def _exchanged(self) -> GradFactors:
        """The factors of every transposed matrix [I, O]."""
        return GradFactors(self.delta, self.activation)

    def placed(self, start: int, size: int, dim: int = 0) -> GradFactors:
        """The factors of gradients that hold ``G[b]`` from ``start`` on in a dimension of ``size``, zeros beside it.

        Of a parameter of which ``narrow(dim, start, ...)`` was used. The first factor's or the last one's numbers are
        padded; where the dimension is neither, the gradients are written.
        """
        form = self._form
        dim = dim % len(form)
        after = size - start - form[dim]
        if start < 0 or after < 0:
            raise ValueError(f"start, size: expected {form[dim]} rows to fit, but got start={start}, size={size}")
        shape = (*form[:dim], size, *form[dim + 1 :])
        _, O, I = self.shape
        before, inner = math.prod(form[:dim]), math.prod(form[dim + 1 :])
        if before == 1 and form[dim] and O % form[dim] == 0:  # the first dimension of O
            step = O // form[dim]
            return self._padded_rows(start * step, after * step, shape)
        if before == O and form[dim] * inner == I:  # the first dimension of I
            return self._padded_columns(start * inner, after * inner, shape)
        pads = [0, 0] * (len(form) - 1 - dim) + [start, after]
        return self._written(lambda gradients: F.pad(gradients, pads))

    def _padded_rows(self, before: int, after: int, shape: tuple[int, ...]) -> GradFactors:
        return GradFactors(self.activation, F.pad(self.delta, (before, after))).reshaped(shape)

    def _padded_columns(self, before: int, after: int, shape: tuple[int, ...]) -> GradFactors:
        return GradFactors(F.pad(self.activation, (before, after)), self.delta).reshaped(shape)

    def _written(self, change: Callable[[Tensor], Tensor] = lambda gradients: gradients) -> WrittenFactors:
        return GradFactors.of(change(self.materialize().reshape(len(self), *self._form)))

    def _written_wide(self) -> WrittenFactors:
        """The gradients written in the type that sums are kept in."""
        gradients = self.materialize(dtype=accumulation_type(self.dtype))
        return GradFactors.of(gradients.reshape(len(self), *self._form))

    def regrouped(self, batch: int) -> GradFactors:
        """Each sample's gradient summed over the consecutive ones that belong to it: B·n of them become B."""
        activation, delta = (regroup(factor, batch) for factor in self._explicit())
        return GradFactors(activation, delta, self.weight_shape)

    @staticmethod
    def cat(parts: Sequence[GradFactors]) -> GradFactors:
        """One batch from several of the same weight; where T differs, zero positions fill up, which add nothing."""
        from .sums import cat

        return cat(parts)

    @staticmethod
    def add(parts: Sequence[GradFactors]) -> GradFactors:
        """The sum of several gradients of each sample, those of the uses of one weight, in the cheapest form.

        Of one kind, the uses become further positions T; gradients that are there already take the others in. An
        embedding's and a product's stay what they are, in `SumFactors`. Raises ValueError for other numbers of samples
        or parameter's shapes.
        """
        from .sums import add

        return add(parts)

    def _explicit(self) -> tuple[Tensor, Tensor]:
        """[B, T, I] and [B, T, O], T = 1 included."""
        activation, delta = self.activation, self.delta
        return (activation, delta) if delta.ndim == 3 else (activation.unsqueeze(1), delta.unsqueeze(1))

    def _matrix(self, operand: Tensor, leading: int = 0) -> Tensor:
        """An operand in the parameter's shape, [..., *weight_shape], as [..., O, I]."""
        if self.weight_shape is None or tuple(operand.shape[leading:]) != self.weight_shape:
            return operand  # which is checked where it is used
        return operand.reshape(*operand.shape[:leading], *self.shape[1:])

    def _matrices(self, operand: Tensor, name: str, leading: int = 0) -> Tensor:
        """`_matrix`, checked."""
        matrix = self._matrix(operand, leading)
        if matrix.ndim != leading + 2 or tuple(matrix.shape[leading:]) != tuple(self.shape[1:]):
            count = ["", "H, "][leading]
            raise ValueError(
                f"{name}: expected shape [{count}{', '.join(map(str, self._form))}], but got {list(operand.shape)}"
            )
        return matrix

    def _like_weight(self, matrices: Tensor) -> Tensor:
        """[..., O, I] in the parameter's shape."""
        if self.weight_shape is None:
            return matrices
        return matrices.reshape((*matrices.shape[:-2], *self.weight_shape))  # which may be ()

    def _blocks(self) -> Iterable[Tensor]:
        """The gradients [b, O, I] in blocks of samples of a few MB, for what has no cheaper form."""
        step = self._block_size()
        for b in range(0, len(self), step):
            gradients = self[b : b + step].materialize(dtype=accumulation_type(self.dtype))
            yield gradients.reshape(gradients.shape[0], *self.shape[1:])

    def _block_size(self) -> int:
        return samples_a_block(self.shape[1] * self.shape[2], self.device)

    def _over_blocks(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        results = [function(block) for block in self._blocks()]
        if results:
            return torch.cat(results)
        return torch.zeros(0, dtype=accumulation_type(self.dtype), device=self.device)

    # --- the gradients themselves ------------------------------------------------------------------------------------

    def materialize(
        self, *, out: Tensor | None = None, dtype: torch.dtype | None = None, backend: str | None = None
    ) -> Tensor:
        """``G[b] = Σ_t δ_bt a_btᵀ`` -> [B, O, I], or [B, *weight_shape]; BTOI operations, writes BOI numbers.

        Into ``out`` if given. Raises ValueError or TypeError where it does not fit, BackendError for a backend that
        does not work here.
        """
        if out is None:
            return self._like_weight(ops.outer(self.delta, self.activation, dtype=dtype, backend=backend))
        matrices = self._as_matrices(out)
        if matrices is None:
            return out.copy_(self.materialize(dtype=out.dtype, backend=backend))
        ops.outer(self.delta, self.activation, out=matrices, backend=backend)
        return out

    def _as_matrices(self, out: Tensor) -> Tensor | None:
        """A tensor [B, *weight_shape] seen as [B, O, I], to write into; None where its strides do not allow that."""
        if self.weight_shape is None or tuple(out.shape[1:]) != self.weight_shape:
            return out
        try:
            return out.view(out.shape[0], *self.shape[1:])
        except RuntimeError:
            return None

    def _add_to(self, gradients: Tensor) -> Tensor:
        """Adds them to a tensor [B, O, I] in place, of the type that sums are kept in."""
        activation, delta = widen(*self._explicit())
        return gradients.baddbmm_(delta.mT, activation)

    # --- norms -------------------------------------------------------------------------------------------------------

    def sq_norm(self) -> Tensor:
        """``‖G[b]‖²`` (Frobenius) -> [B].

        T = 1: ``‖δ‖²‖a‖²``, B(O + I). T > 1: BT²(O + I) or BTOI, the lesser; rounding is relative to
        ``(Σ_t ‖δ_t‖‖a_t‖)²``, so that a sum that nearly cancels keeps fewer digits. Right wherever it is in the range
        of its type, which it leaves long before `norm` does.
        """
        if self._is_eager():
            return self._squares()
        by = self._exponents()
        return ranges.times_two_to(by, ranges.times_two_to(by, self._scaled(by)._squares()))

    def norm(self, p: float = 2) -> Tensor:
        """The p-norm of each gradient's entries, ``(Σ_oi |G_oi|^p)^(1/p)`` -> [B]; p >= 1 or infinity.

        T = 1: ``‖δ‖_p ‖a‖_p``, B(O + I). T > 1: p = 2 as `sq_norm`, else through blocks of gradients, BTOI. The
        factors and the squares of the gradients may leave the range of the type where the norm itself does not.
        """
        if not p >= 1:
            raise ValueError(f"p: expected a number of at least 1, or infinity, but got {p!r}")
        return self._norm(p)

    def _norm(self, p: float) -> Tensor:
        if self.delta.ndim == 2:
            return row_norms(self.delta, p) * row_norms(self.activation, p)
        if p == 2:
            return self._root()
        return self._over_blocks(lambda gradient: row_norms(gradient.flatten(1), p))

    def _root(self) -> Tensor:
        """The norms from the squared ones."""
        if self._is_eager():
            return numerics.root(self._squares(), lambda rows: self[rows]._scaled_root())
        return self._scaled_root()

    def _scaled_root(self) -> Tensor:
        by = self._exponents()
        return ranges.times_two_to(by, safe_sqrt(self._scaled(by)._squares()))

    def _squares(self) -> Tensor:
        """`sq_norm` of factors of numbers whose products are in range."""
        return ops.sq_norm(self.delta, self.activation)

    def _exponents(self) -> Tensor:
        """Integers n [B] such that ``2^-n G[b]`` has terms of about one; `NOTHING` for zeros."""
        activation, delta = self._explicit()
        if self.positions == 0:
            return torch.full((len(self),), ranges.NOTHING, dtype=torch.int32, device=self.device)
        return (ranges.exponents(delta) + ranges.exponents(activation)).amax(1).clamp_min(ranges.NOTHING)

    def _wide(self) -> GradFactors:
        """The same in the type that sums are kept in."""
        kind = accumulation_type(self.dtype)
        return self if kind == self.dtype else self.to(kind)

    def _scaled(self, by: Tensor) -> GradFactors:
        """The factors of ``2^-n G[b]``, of the type that sums are kept in and of numbers at most about one."""
        activation, delta = widen(*self._explicit())
        delta, activation = scaled_factors(delta, activation, by)
        return GradFactors(activation, delta, self.weight_shape)

    # --- inner products ----------------------------------------------------------------------------------------------

    def dot(self, reference: Tensor) -> Tensor:
        """``⟨G[b], R⟩`` with a reference gradient R [O, I] -> [B]; BTOI operations, intermediate BT·min(O, I).

        With K references [K, O, I] -> [B, K], as `linear`.

        >>> factors = GradFactors(activation=torch.tensor([[1.0, 2.0]]), delta=torch.tensor([[3.0]]))
        >>> factors.dot(torch.tensor([[1.0, 1.0]]))
        tensor([9.])
        """
        if self._is_bank(reference):
            return self.linear(reference)
        return ops.dot(self.delta, self.activation, self._matrix(reference))

    def cosine(self, reference: Tensor) -> Tensor:
        """``⟨G[b], R⟩ / (‖G[b]‖‖R‖)`` -> [B] in [-1, 1], or [B, K] of K references; 0 where one of them is zero.

        No size is too small or too large for it, so that nothing but a zero gradient has the cosine 0 without being
        orthogonal.

        >>> factors = GradFactors(activation=torch.eye(2), delta=torch.ones(2, 1))
        >>> factors.cosine(torch.tensor([[3.0, 4.0]]))
        tensor([0.6000, 0.8000])
        """
        length = numerics.lengths([reference], self._is_bank(reference))
        if self._is_eager() and numerics.is_eager(length):
            norm = self.norm()
            if not ranges.may_look(norm) or numerics.in_middle_of_range(norm, length):
                return numerics.cosine(self.dot(reference), norm, length)
        factors = self._scaled(self._exponents())
        return numerics.cosine(factors.dot(reference), factors.norm(), length)

    def _is_bank(self, reference: Tensor) -> bool:
        """Whether there are K references, in the parameter's shape or as matrices, not one."""
        shape, single = tuple(reference.shape), (self._form, tuple(self.shape[1:]))
        if shape[1:] == self.weight_shape and shape:  # [1, 1] of a bias of one number: one such bias
            return True
        return shape not in single and shape[1:] in single

    def gram(self, other: GradFactors | None = None) -> Tensor:
        """``K[b, c] = ⟨G[b], G'[c]⟩ = Σ_ts (δ_bt·δ'_cs)(a_bt·a'_cs)`` -> [B, C]; ``other`` defaults to self.

        T = 1: BC(O + I). T > 1: BCTS(O + I), or through n blocks of gradients BCOI + (BT + nCS)OI, the lesser. The
        factors may be of different kinds; embeddings and sums choose likewise.

        >>> GradFactors(activation=torch.eye(2), delta=torch.tensor([[2.0], [3.0]])).gram()
        tensor([[4., 0.],
                [0., 9.]])
        """
        from .inner import all_pairs

        other = self if other is None else other
        if other._form != self._form and other.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"other: expected factors of [O, I] = {list(self.shape[1:])}, but got {list(other.shape[1:])}"
            )
        if other.device != self.device:
            raise ValueError(f"other: expected factors on {self.device}, but got them on {other.device}; use .to()")
        if self.dtype != other.dtype:
            dtype = accumulation_type(torch.promote_types(self.dtype, other.dtype))
            return all_pairs(self.to(dtype), other.to(dtype))
        return all_pairs(self, other)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """[B·T, I] and [B·T, O], in the type that sums are taken in."""
        activation, delta = widen(*(factor.flatten(0, 1) for factor in self._explicit()))
        return activation, delta

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """H functionals of each gradient, ``y[b, h] = ⟨G[b], weight[h]⟩ + bias[h]``, weight [H, O, I] -> [B, H].

        A classifier's first layer on the flattened gradient, `F.linear(G.flatten(1), weight.flatten(1), bias)`, at
        BHOI operations for T = 1 (the longer of O and I contracted first) without the gradients.

        >>> factors, layer = GradFactors(torch.rand(8, 5), torch.rand(8, 3)), torch.nn.Linear(15, 4)
        >>> hidden = factors.linear(layer.weight.reshape(4, 3, 5), layer.bias)
        >>> torch.allclose(hidden, layer(factors.materialize().flatten(1)), atol=1e-5)
        True
        """
        value = self._linear(self._matrix(weight, leading=1))
        return value if bias is None else value + bias

    def _linear(self, weight: Tensor) -> Tensor:
        """``⟨G[b], weight[h]⟩`` -> [B, H] of weight [H, O, I]."""
        return ops.linear(self.delta, self.activation, weight)

    # --- projections -------------------------------------------------------------------------------------------------

    def project(self, left: Tensor | int, right: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """``leftᵀ G[b] right`` with left [O, R], right [I, S] -> [B, R, S]; BT(OR + IS + RS) operations.

        In the type that sums are kept in, fp32 for half precision.

        With a rank instead, both are random signs by ``seed``, [O, r] of ±1/√r and [I, s] of ±1/√s, r = min(rank, O)
        and s = min(rank, I), or the identity where the rank is full. They are made here, by integer arithmetic, the
        same ones on every device and in every batch, and not kept.
        ``⟨project(G), project(H)⟩`` has mean ``⟨G, H⟩`` over seeds and a variance of at most
        ``(2/r + 2/s + 4/rs)‖G‖²‖H‖²``, the terms of a full rank being 0: so a standard deviation of 0.52, 0.25 and 0.18
        of ‖G‖‖H‖ at most for ranks 16, 64 and 128, and none for full ones.
        Here [O, I] stands for the parameter's shape, its dimensions behind the first taken together.
        """
        if not isinstance(left, Tensor):
            if right is not None:
                raise TypeError(f"left: expected a tensor beside right, but got {left!r}")
            return self._project_randomly(left, seed)
        _, O, I = self.shape
        for name, matrix, size in (("left", left, O), ("right", right, I)):
            if matrix is None or matrix.ndim != 2 or matrix.shape[0] != size:
                found = None if matrix is None else list(matrix.shape)
                raise ValueError(f"{name}: expected shape [{size}, any], but got {found}")
        return self._project(left, right)

    def _project_randomly(self, rank: int, seed: int) -> Tensor:
        if rank < 1:
            raise ValueError(f"rank: expected a positive integer, but got {rank!r}")
        if tuple(self.shape[1:]) != flat_form(self._form):
            return self._by_blocks(lambda written: written._project_randomly(rank, seed))
        left, right = (
            None if rank >= n else signs(torch.arange(n, device=self.device), self.dtype, rank, seed, stream)
            for stream, n in enumerate(self.shape[1:])
        )
        return self._project(left, right).mul_(self._scale_of_signs(rank))

    def _scale_of_signs(self, rank: int) -> float:
        """What makes random signs keep inner products: 1/√rank for each side that is not the identity."""
        return math.prod(rank**-0.5 for n in self.shape[1:] if rank < n)

    def _project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """``leftᵀ G[b] right`` where None is the identity."""
        if left is not None and right is not None:
            return ops.project(self.delta, self.activation, left, right)
        delta, activation = widen(self.delta, self.activation)
        delta = delta if left is None else delta @ left.to(delta.dtype)
        activation = activation if right is None else activation @ right.to(activation.dtype)
        return ops.outer(delta, activation)

    def _by_blocks(self, function: Callable[[WrittenFactors], Tensor]) -> Tensor:
        """``function`` of the gradients written, by blocks of samples."""
        step = self._block_size()
        return torch.cat([function(self[b : b + step]._written_wide()) for b in range(0, max(1, len(self)), step)])

    def sketch(self, dim: int, seed: int = 0) -> Tensor:
        """A random projection of each flattened gradient to ``dim`` numbers that keeps inner products -> [B, dim].

        TensorSketch: ``⟨sketch(G), sketch(H)⟩`` has mean ``⟨G, H⟩`` over seeds and a variance of at most
        ``(6 / dim + 4 / dim²)‖G‖²‖H‖²``. Hashes come from ``seed`` by integer arithmetic, so that every device and
        every cut into batches gives the same projection, and none is stored; BT(O + I + dim log dim) operations, or BOI
        where the gradients themselves are held (`of`), for which it is the same one.
        Source: Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps", KDD 2013.

        >>> factors = GradFactors(torch.rand(8, 50), torch.rand(8, 30))
        >>> sketches = factors.sketch(256, seed=1)
        >>> sketches.shape, torch.allclose(sketches[:3], factors[:3].sketch(256, seed=1), atol=1e-4)
        (torch.Size([8, 256]), True)
        """
        # Pairs of entries that share no row and no column collide with probability 1/dim, and add 2/dim, and
        # crosswise too with probability at most 2/dim², and add 4/dim²; those in one row or one column add 2/dim each.
        if dim < 1:
            raise ValueError(f"dim: expected a positive integer, but got {dim!r}")
        if len(self) == 0 or self.positions == 0:  # which torch.fft refuses
            return torch.zeros(len(self), dim, dtype=accumulation_type(self.dtype), device=self.device)
        if tuple(self.shape[1:]) != flat_form(self._form):
            return self._by_blocks(lambda written: written._sketch(dim, seed))
        return self._sketch(dim, seed)

    def _sketch(self, dim: int, seed: int) -> Tensor:
        activation, delta = widen(*self._explicit())
        sketches = (count_sketch(x, dim, seed, stream) for stream, x in enumerate((delta, activation)))
        left, right = (torch.fft.rfft(sketched, dim=-1) for sketched in sketches)
        return torch.fft.irfft((left * right).sum(1), n=dim, dim=-1)

    # --- over the batch ----------------------------------------------------------------------------------------------

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """``Σ_b w_b G[b]`` -> [O, I], one matrix product: BTOI operations; ``weights`` [B] default to one."""
        if weights is not None and weights.shape != (len(self),):
            raise ValueError(f"weights: expected shape ({len(self)},), but got {tuple(weights.shape)}")
        return self._sum(weights)

    def _sum(self, weights: Tensor | None) -> Tensor:
        return self._like_weight(ops.weighted_sum(self.delta, self.activation, weights))

    def mean(self) -> Tensor:
        """``(1/B) Σ_b G[b]`` -> [O, I]. Raises ValueError for an empty batch."""
        self._refuse_empty("mean")
        return self.sum() / len(self)

    def clipped_sum(self, max_norm: float) -> Tensor:
        """``Σ_b min(1, max_norm / ‖G[b]‖) G[b]`` -> [O, I], each gradient clipped to a norm, as private training needs.

        The norms and one matrix product more. Raises ValueError for a ``max_norm`` that is not positive.

        >>> GradFactors(activation=torch.tensor([[1.0], [10.0]]), delta=torch.ones(2, 1)).clipped_sum(max_norm=2.0)
        tensor([[3.]])
        """
        return self.sum(numerics.clipping(self.norm(), max_norm))

    def diag_fisher(self) -> Tensor:
        """The diagonal of the empirical Fisher matrix, ``(1/B) Σ_b G[b]²`` elementwise -> [O, I].

        T = 1: ``(δ²)ᵀ(a²) / B``, BOI operations. T > 1: through blocks of gradients, BTOI.
        """
        self._refuse_empty("diag_fisher")
        return self._like_weight(self._sum_of_squares() / len(self))

    def _sum_of_squares(self) -> Tensor:
        factors = self._balanced() if self.positions == 1 else self
        return ops.square_sum(factors.delta, factors.activation)

    def kron_fisher(self) -> tuple[Tensor, Tensor]:
        """The Kronecker factors ``A = Σ_bt a aᵀ / (B T)`` [I, I] and ``D = Σ_bt δ δᵀ / B`` [O, O] of the Fisher matrix.

        The matrix of the flattened gradients is about ``D ⊗ A``, exactly so where inputs and deltas are independent
        and T = 1; for many positions this is the "expand" form, in which the zero positions that `cat` fills up with
        count too (`GradStatistics` takes batches of different T). BT(O² + I²) operations. An embedding's D is diagonal
        and comes as its diagonal [O].
        Sources: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML
        2015; Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network architectures",
        NeurIPS 2023.
        """
        self._refuse_empty("kron_fisher")
        A, D = self._kron_sums()
        return A / (len(self) * max(1, self.positions)), D / len(self)

    def _kron_sums(self) -> tuple[Tensor, Tensor]:
        """``Σ_bt a aᵀ`` and ``Σ_bt δ δᵀ``."""
        return ops.weighted_sum(self.activation, self.activation), ops.weighted_sum(self.delta, self.delta)

    def _refuse_empty(self, method: str) -> None:
        if len(self) == 0:
            raise ValueError(f"{method}: expected at least one sample, but the batch is empty")

    # --- quadratic forms ---------------------------------------------------------------------------------------------

    def quadratic(self, diag: Tensor) -> Tensor:
        """``Σ_oi diag_oi G[b]_oi²`` with diag [O, I] -> [B], such as the score ``diag = 1 / (F + ridge)``.

        T = 1: ``(δ²)ᵀ diag (a²)``, BOI operations. T > 1: through blocks of gradients, BTOI.
        """
        return self._quadratic(self._matrices(diag, "diag"))

    def _quadratic(self, diag: Tensor) -> Tensor:
        factors = self._balanced() if self.positions == 1 else self
        return ops.quadratic(factors.delta, factors.activation, diag)

    def quadratic_kron(self, A_inv: Tensor, D_inv: Tensor) -> Tensor:
        """``tr(G[b]ᵀ D⁻¹ G[b] A⁻¹) = Σ_ts (δ_tᵀ D⁻¹ δ_s)(a_sᵀ A⁻¹ a_t)`` -> [B], A_inv [I, I], D_inv [O, O].

        The Kronecker-factored Fisher norm, where D⁻¹ and A⁻¹ are symmetric and positive; BT(O² + I²) + BT²(O + I).
        A diagonal matrix may be given as its diagonal, [I] or [O].
        """
        _, O, I = self.shape
        for name, matrix, size in (("A_inv", A_inv, I), ("D_inv", D_inv, O)):
            if tuple(matrix.shape) not in ((size, size), (size,)):
                raise ValueError(f"{name}: expected shape [{size}, {size}], but got {list(matrix.shape)}")
        return self._quadratic_kron(A_inv, D_inv)

    def _quadratic_kron(self, A_inv: Tensor, D_inv: Tensor) -> Tensor:
        activation, delta = widen(*self._balanced()._explicit())
        left, right = times(delta, D_inv) @ delta.mT, times(activation, A_inv) @ activation.mT
        return (left * right.mT).sum((1, 2))

    def _balanced(self) -> GradFactors:
        """The same where squares of the factors are in range, else factors of equal size at each position.

        On the CPU, where it costs a look at them.
        """
        tensors = self._tensors()
        if not self._is_eager() or not ranges.may_look(self.delta):
            return self
        limit = torch.finfo(accumulation_type(self.dtype)).max ** 0.15
        if all(numerics.largest(tensor) <= limit for tensor in tensors):
            return self
        activation, delta = widen(*self._explicit())
        by = (ranges.exponents(delta) - ranges.exponents(activation)) // 2
        balanced = ranges.times_two_to(by, activation), ranges.times_two_to(-by, delta)
        return GradFactors(*balanced, self.weight_shape)


def flat_form(shape: Sequence[int]) -> tuple[int, int]:
    """A parameter's shape with its dimensions behind the first taken together, as [O, I]."""
    return (shape[0], math.prod(shape[1:])) if len(shape) else (1, 1)


def regroup(x: Tensor, batch: int) -> Tensor:
    """[B·n, T, ...] -> [B, n·T, ...]."""
    each = x.shape[0] // batch if batch else 1
    return x.reshape(batch, each * x.shape[1], *x.shape[2:])


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix``, or its diagonal's."""
    matrix = matrix.to(x.dtype)
    return x * matrix if matrix.ndim == 1 else x @ matrix


def add_matrices(x: Tensor, y: Tensor) -> Tensor:
    """The sum of two tensors of one shape, or of two square matrices of which one is given as its diagonal."""
    if x.ndim == y.ndim:
        return x + y
    return x + y.diag_embed() if x.ndim > y.ndim else x.diag_embed() + y


# A parameter's gradients, in factored form or written.
Gradient = GradFactors | Tensor
