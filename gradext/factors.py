"""The factored algebra: per-sample gradients as ``Σ_t delta_t activation_tᵀ``, used without being written.

`GradFactors` holds the factors of one weight, `LayerFactors` those of several by name. B samples, T positions (a
sequence, or several uses of the weight), O output and I input features; ``G[b]`` is the gradient [O, I] of sample b.
Costs are counted in multiply-adds. Nothing here knows about modules.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .backends.reference import BLOCK_ELEMENTS, accumulation_type, row_norms, widen

_convolution_backward = torch.ops.aten.convolution_backward
# Convolutions unfold about as many elements at a time: what stays in a CPU's cache, and what keeps a GPU busy.
UNFOLDED_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass(frozen=True, eq=False)
class GradFactors:
    """Per-sample gradients of one weight in factored form, exact for every T.

    activation: [B, I] or [B, T, I], the layer's inputs; delta: [B, O] or [B, T, O], the gradient of each sample's loss
    with respect to the layer's outputs. Every method is differentiable in both, and in its tensor arguments.

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
    weight_shape: tuple[int, ...] | None = None  # of the parameter, where it is not [O, I] but the same numbers

    def __post_init__(self) -> None:
        ops.check_factors(self.delta, self.activation)
        if self.weight_shape is not None and math.prod(self.weight_shape) != math.prod(self.shape[1:]):
            raise ValueError(
                f"weight_shape: expected as many elements as [O, I] = {list(self.shape[1:])}, but got "
                f"{list(self.weight_shape)}"
            )
        if self.delta.ndim == 3 and self.delta.shape[1] == 1:  # one position has the cheaper forms
            object.__setattr__(self, "delta", self.delta.squeeze(1))
            object.__setattr__(self, "activation", self.activation.squeeze(1))

    @staticmethod
    def of(gradients: Tensor) -> GradFactors:
        """The factors of gradients [B, *shape] that are there already, small ones: of biases and the like."""
        flat = gradients.reshape(gradients.shape[0], math.prod(gradients.shape[1:]))
        return GradFactors(flat.new_ones(flat.shape[0], 1), flat, tuple(gradients.shape[1:]))

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
        return self.activation.nbytes + self.delta.nbytes

    def __len__(self) -> int:
        return self.delta.shape[0]

    def __repr__(self) -> str:
        B, O, I = self.shape
        return (
            f"{type(self).__name__}(B={B}, O={O}, I={I}, T={self.positions}, dtype={self.dtype}, device={self.device})"
        )

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
        """As `Tensor.to`, for both factors."""
        return self._map(lambda factor: factor.to(*args, **kwargs))

    def detach(self) -> GradFactors:
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> GradFactors:
        """The same after ``function`` of each tensor, which keeps all dimensions but the first."""
        return GradFactors(function(self.activation), function(self.delta), self.weight_shape)

    def scaled(self, weights: Tensor) -> GradFactors:
        """The factors of ``weights[b] G[b]``, weights [B]."""
        weights = weights.to(self.dtype)
        if self.activation.shape[-1] < self.delta.shape[-1]:
            activation = self.activation * weights.reshape(-1, *[1] * (self.activation.ndim - 1))
            return GradFactors(activation, self.delta, self.weight_shape)
        delta = self.delta * weights.reshape(-1, *[1] * (self.delta.ndim - 1))
        return GradFactors(self.activation, delta, self.weight_shape)

    def compact(self) -> GradFactors:
        """The form that needs least memory and work: the gradients themselves where the factors are larger."""
        return self

    def transposed(self) -> GradFactors:
        """The factors of every ``G[b]ᵀ``."""
        return GradFactors(self.delta, self.activation)

    def in_rows(self, start: int, rows: int) -> GradFactors:
        """The factors of gradients [rows, I] that hold ``G[b]`` from row ``start`` on, and zeros elsewhere."""
        delta = F.pad(self.delta, (start, rows - start - self.shape[1]))
        return GradFactors(self.activation, delta)

    def regrouped(self, batch: int) -> GradFactors:
        """Each sample's gradient summed over the consecutive ones that belong to it: B·n of them become B."""
        activation, delta = (factor.unflatten(0, (batch, -1)).flatten(1, 2) for factor in self._explicit())
        return GradFactors(activation, delta, self.weight_shape)

    @staticmethod
    def cat(parts: Sequence[GradFactors]) -> GradFactors:
        """One batch from several of the same layer; where T differs, zero positions fill up, which add nothing."""
        if not parts:
            raise ValueError("parts: expected at least one GradFactors, but got an empty sequence")
        T = max(part.positions for part in parts)
        padded = [part._padded(T) for part in parts] if T > 1 else [(p.activation, p.delta) for p in parts]
        activations, deltas = zip(*padded, strict=True)
        return GradFactors(torch.cat(activations), torch.cat(deltas), parts[0].weight_shape)

    @staticmethod
    def add(parts):
        kinds = {type(p) for p in parts}
        if kinds == {GradFactors} and all(p.weight_shape is None for p in parts):
            return GradFactors.stack_positions(parts)
        return GradFactors.of(functools.reduce(torch.add, [p.materialize() for p in parts]))

    @staticmethod
    def stack_positions(parts: Sequence[GradFactors]) -> GradFactors:
        """The sum of several gradients of each sample: the uses of one weight, every use a further position."""
        if len(parts) == 1:
            return parts[0]
        explicit = [part._explicit() for part in parts]
        kind = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        return GradFactors(
            torch.cat([activation.to(kind) for activation, _ in explicit], dim=1),
            torch.cat([delta.to(kind) for _, delta in explicit], dim=1),
            parts[0].weight_shape,
        )

    def _padded(self, T: int) -> tuple[Tensor, Tensor]:
        activation, delta = self._explicit()
        fill = T - activation.shape[1]
        return F.pad(activation, (0, 0, 0, fill)), F.pad(delta, (0, 0, 0, fill))

    def _explicit(self) -> tuple[Tensor, Tensor]:
        """[B, T, I] and [B, T, O], T = 1 included."""
        activation, delta = self.activation, self.delta
        return (activation, delta) if delta.ndim == 3 else (activation.unsqueeze(1), delta.unsqueeze(1))

    def _matrix(self, operand: Tensor, leading: int = 0) -> Tensor:
        """An operand in the parameter's shape, [..., *weight_shape], as [..., O, I]."""
        if self.weight_shape is None or tuple(operand.shape[leading:]) != self.weight_shape:
            return operand  # which is checked where it is used
        return operand.reshape(*operand.shape[:leading], *self.shape[1:])

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
        return max(1, BLOCK_ELEMENTS // max(1, self.shape[1] * self.shape[2]))

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

    # --- norms -------------------------------------------------------------------------------------------------------

    def sq_norm(self) -> Tensor:
        """``‖G[b]‖²`` (Frobenius) -> [B].

        T = 1: ``‖δ‖²‖a‖²``, B(O + I). T > 1: BT²(O + I) or BTOI, the lesser; rounding is relative to
        ``(Σ_t ‖δ_t‖‖a_t‖)²``, so that a sum that nearly cancels keeps fewer digits.
        """
        return ops.sq_norm(self.delta, self.activation)

    def norm(self, p: float = 2) -> Tensor:
        """The p-norm of each gradient's entries, ``(Σ_oi |G_oi|^p)^(1/p)`` -> [B]; p >= 1 or infinity.

        T = 1: ``‖δ‖_p ‖a‖_p``, B(O + I). T > 1: p = 2 as `sq_norm`, else through blocks of gradients, BTOI.
        """
        if not p >= 1:
            raise ValueError(f"p: expected a number of at least 1, or infinity, but got {p!r}")
        if self.positions == 1 and self.delta.ndim == 2:
            delta, activation = widen(self.delta, self.activation)
            return row_norms(delta, p) * row_norms(activation, p)
        if p == 2:
            return _safe_sqrt(self.sq_norm())
        return self._over_blocks(lambda gradient: row_norms(gradient.flatten(1), p))

    def _over_blocks(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        results = [function(block) for block in self._blocks()]
        return torch.cat(results) if results else self.delta.new_zeros(0, dtype=accumulation_type(self.dtype))

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

    def cosine(self, reference: Tensor, eps: float = 1e-12) -> Tensor:
        """``⟨G[b], R⟩ / (‖G[b]‖‖R‖)`` -> [B] in [-1, 1], or [B, K]; 0 where the product of norms is below ``eps``.

        >>> factors = GradFactors(activation=torch.eye(2), delta=torch.ones(2, 1))
        >>> factors.cosine(torch.tensor([[3.0, 4.0]]))
        tensor([0.6000, 0.8000])
        """
        return _cosine(self.dot(reference), self.norm(), [reference], self._is_bank(reference), eps)

    def _is_bank(self, reference: Tensor) -> bool:
        """Whether there are K references, in the parameter's shape or as matrices, not one."""
        single = {tuple(self.shape[1:]), self.weight_shape}
        if tuple(reference.shape[1:]) == self.weight_shape:  # [1, 1] of a bias of one number: one such bias
            return True
        return tuple(reference.shape) not in single and tuple(reference.shape[1:]) in single

    def gram(self, other: GradFactors | None = None) -> Tensor:
        """``K[b, c] = ⟨G[b], G'[c]⟩ = Σ_ts (δ_bt·δ'_cs)(a_bt·a'_cs)`` -> [B, C]; ``other`` defaults to self.

        T = 1: BC(O + I). T > 1: BCTS(O + I), or through n blocks of gradients BCOI + (BT + nCS)OI, the lesser.

        >>> GradFactors(activation=torch.eye(2), delta=torch.tensor([[2.0], [3.0]])).gram()
        tensor([[4., 0.],
                [0., 9.]])
        """
        other = self if other is None else other
        if other.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"other: expected factors of [O, I] = {list(self.shape[1:])}, but got {list(other.shape[1:])}"
            )
        if other.device != self.device:
            raise ValueError(f"other: expected factors on {self.device}, but got them on {other.device}; use .to()")
        first, second = self, other
        if self.dtype != other.dtype:
            dtype = accumulation_type(torch.promote_types(self.dtype, other.dtype))
            first, second = self.to(dtype), other.to(dtype)
        if first.delta.ndim == second.delta.ndim:
            return ops.gram(first.delta, first.activation, second.delta, second.activation)
        (activation, delta), (other_activation, other_delta) = first._explicit(), second._explicit()
        return ops.gram(delta, activation, other_delta, other_activation)

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
        value = ops.linear(self.delta, self.activation, self._matrix(weight, leading=1))
        return value if bias is None else value + bias

    # --- projections -------------------------------------------------------------------------------------------------

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        """``leftᵀ G[b] right`` with left [O, R], right [I, S] -> [B, R, S]; BT(OR + IS + RS) operations."""
        _, O, I = self.shape
        for name, matrix, size in (("left", left, O), ("right", right, I)):
            if matrix.ndim != 2 or matrix.shape[0] != size:
                raise ValueError(f"{name}: expected shape [{size}, any], but got {list(matrix.shape)}")
        return ops.outer(self.delta @ left.to(self.dtype), self.activation @ right.to(self.dtype))

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
        activation, delta = widen(*self._explicit())
        if len(self) == 0 or self.positions == 0:  # which torch.fft refuses
            return delta.new_zeros(len(self), dim)
        if self.shape[2] == 1 and self.weight_shape is not None and len(self.weight_shape) > 1:
            return _sketch_written((delta * activation).sum(1), self.weight_shape, dim, seed)
        sketches = (_count_sketch(x, dim, seed, stream) for stream, x in enumerate((delta, activation)))
        left, right = (torch.fft.rfft(sketched, dim=-1) for sketched in sketches)
        return torch.fft.irfft((left * right).sum(1), n=dim, dim=-1)

    # --- over the batch ----------------------------------------------------------------------------------------------

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """``Σ_b w_b G[b]`` -> [O, I], one matrix product: BTOI operations; ``weights`` [B] default to one."""
        activation, delta = widen(*self._explicit())
        if weights is not None:
            if weights.shape != (len(self),):
                raise ValueError(f"weights: expected shape ({len(self)},), but got {tuple(weights.shape)}")
            delta = delta * weights.to(delta.dtype)[:, None, None]
        return self._like_weight(delta.flatten(0, 1).mT @ activation.flatten(0, 1))

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
        return self.sum(_clipping(self.norm(), max_norm))

    def diag_fisher(self) -> Tensor:
        """The diagonal of the empirical Fisher matrix, ``(1/B) Σ_b G[b]²`` elementwise -> [O, I].

        T = 1: ``(δ²)ᵀ(a²) / B``, BOI operations. T > 1: through blocks of gradients, BTOI.
        """
        self._refuse_empty("diag_fisher")
        if self.delta.ndim == 2:
            delta, activation = widen(self.delta, self.activation)
            total = delta.square().mT @ activation.square()
        else:
            # In place: new totals, block after block, leave holes that the allocator keeps.
            parts = (block.square().sum(0) for block in self._blocks())
            total = functools.reduce(torch.Tensor.add_, parts)
        return self._like_weight(total / len(self))

    def kron_fisher(self) -> tuple[Tensor, Tensor]:
        """The Kronecker factors ``A = Σ_bt a aᵀ / (B T)`` [I, I] and ``D = Σ_bt δ δᵀ / B`` [O, O] of the Fisher matrix.

        The matrix of the flattened gradients is about ``D ⊗ A``, exactly so where inputs and deltas are independent
        and T = 1; for many positions this is the "expand" form, in which the zero positions that `cat` fills up with
        count too (`GradStatistics` takes batches of different T). BT(O² + I²) operations.
        Sources: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML
        2015; Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network architectures",
        NeurIPS 2023.
        """
        self._refuse_empty("kron_fisher")
        activation, delta = self._rows()
        B, T = len(self), max(1, self.positions)
        return activation.mT @ activation / (B * T), delta.mT @ delta / B

    def _refuse_empty(self, method: str) -> None:
        if len(self) == 0:
            raise ValueError(f"{method}: expected at least one sample, but the batch is empty")

    # --- quadratic forms ---------------------------------------------------------------------------------------------

    def quadratic(self, diag: Tensor) -> Tensor:
        """``Σ_oi diag_oi G[b]_oi²`` with diag [O, I] -> [B], such as the score ``diag = 1 / (F + ridge)``.

        T = 1: ``(δ²)ᵀ diag (a²)``, BOI operations. T > 1: through blocks of gradients, BTOI.
        """
        diag = self._matrix(diag)
        if self.delta.ndim == 2:
            delta, activation = widen(self.delta, self.activation)
            return ops.dot(delta.square(), activation.square(), diag)
        if tuple(diag.shape) != tuple(self.shape[1:]):
            raise ValueError(f"diag: expected shape {list(self.shape[1:])}, but got {list(diag.shape)}")
        return self._over_blocks(lambda gradient: (gradient.square() * diag.to(gradient.dtype)).sum((1, 2)))

    def quadratic_kron(self, A_inv: Tensor, D_inv: Tensor) -> Tensor:
        """``tr(G[b]ᵀ D⁻¹ G[b] A⁻¹) = Σ_ts (δ_tᵀ D⁻¹ δ_s)(a_sᵀ A⁻¹ a_t)`` -> [B], A_inv [I, I], D_inv [O, O].

        The Kronecker-factored Fisher norm, where D⁻¹ and A⁻¹ are symmetric and positive; BT(O² + I²) + BT²(O + I).
        """
        _, O, I = self.shape
        for name, matrix, size in (("A_inv", A_inv, I), ("D_inv", D_inv, O)):
            if tuple(matrix.shape) != (size, size):
                raise ValueError(f"{name}: expected shape [{size}, {size}], but got {list(matrix.shape)}")
        activation, delta = widen(*self._explicit())
        left = (delta @ D_inv.to(delta.dtype)) @ delta.mT
        right = (activation @ A_inv.to(activation.dtype)) @ activation.mT
        return (left * right.mT).sum((1, 2))


class Windows(NamedTuple):
    """The geometry of a convolution: which input elements each output position sees, by dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and behind

    def of(self, image: Tensor, positions: Sequence[int], groups: int) -> Tensor:
        """image [B, C, *size] -> [B, groups, C/groups · K, T], the window at each of the first ``positions``.

        Positions lie side by side in memory, as in the image: so the copy is two to ten times as fast as by windows.
        """
        pads = [n for pair in reversed(self.padding) for n in pair]
        image = (F.pad(image, pads) if any(pads) else image).unflatten(1, (groups, -1))
        B, _, C = image.shape[:3]
        (batch, group, channel), steps = image.stride()[:3], image.stride()[3:]
        seen = image.as_strided(
            (B, groups, C, *self.kernel, *positions),
            (
                *(batch, group, channel, *(step * by for step, by in zip(steps, self.dilation, strict=True))),
                *(step * by for step, by in zip(steps, self.stride, strict=True)),
            ),
        )
        return seen.reshape(B, groups, C * math.prod(self.kernel), math.prod(positions))

    def fit(self, image: Tensor, positions: Tensor) -> bool:
        """Whether the windows of the image [B, C, *size] are as many as the positions [B, P, *size], and no more."""
        each = zip(
            image.shape[2:], self.kernel, self.stride, self.dilation, self.padding, positions.shape[2:], strict=True
        )
        return all((n + sum(pad) - d * (k - 1) - 1) // s + 1 == seen for n, k, s, d, pad, seen in each)


class ConvFactors(GradFactors):
    """The factors of a convolution's weight, unfolded only while they are used.

    ``G[b] = Σ_t p_bt u_btᵀ`` over T positions, p_t [P] the values of ``plain`` [B, P, *size] at t, and u_t [C · K] the
    window of ``image`` [B, C, *size] that t sees. For a convolution ``plain`` is the gradient of its output and
    ``image`` its input; for a transposed one it is the other way round. With groups, P and C fall into as many parts.
    Not unfolded, the factors take B(CS + PT) numbers, S the size of the image; unfolding takes BTCK for the samples at
    hand. Inner products with a reference are convolutions of the image by it, without unfolding.
    """

    image: Tensor
    plain: Tensor
    windows: Windows
    groups: int
    weight_shape: tuple[int, ...]

    def __init__(
        self, image: Tensor, plain: Tensor, windows: Windows, groups: int, weight_shape: tuple[int, ...]
    ) -> None:
        for name, value in (
            *(("image", image), ("plain", plain), ("windows", windows)),
            *(("groups", groups), ("weight_shape", weight_shape)),
        ):
            object.__setattr__(self, name, value)

    @property
    def activation(self) -> Tensor:
        """The unfolded image, [B, (T,) I]."""
        self._refuse_groups()
        unfolded = self._unfolded()[:, 0]
        return unfolded.squeeze(2) if self.positions == 1 else unfolded.mT

    @property
    def delta(self) -> Tensor:
        """``plain`` by position, [B, (T,) P]."""
        self._refuse_groups()
        plain = self.plain.flatten(2)
        return plain.squeeze(2) if self.positions == 1 else plain.mT

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.weight_shape[0], math.prod(self.weight_shape[1:])))

    @property
    def positions(self) -> int:
        return math.prod(self.plain.shape[2:])

    @property
    def device(self) -> torch.device:
        return self.plain.device

    @property
    def dtype(self) -> torch.dtype:
        return self.plain.dtype

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.plain.nbytes

    def __len__(self) -> int:
        return self.plain.shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> ConvFactors:
        return ConvFactors(function(self.image), function(self.plain), self.windows, self.groups, self.weight_shape)

    def scaled(self, weights: Tensor) -> ConvFactors:
        plain = self.plain * weights.to(self.dtype).reshape(-1, *[1] * (self.plain.ndim - 1))
        return ConvFactors(self.image, plain, self.windows, self.groups, self.weight_shape)

    def _refuse_groups(self) -> None:
        if self.groups != 1:
            raise ValueError(
                "a convolution with groups has one pair of factors for each of them; use compact(), which gives the "
                "factors of its gradients, at most as large"
            )

    def _unfolded(self) -> Tensor:
        return self.windows.of(self.image, self.plain.shape[2:], self.groups)

    def _samples_a_block(self, elements: int) -> int:
        return max(1, UNFOLDED_ELEMENTS.get(self.device.type, 1 << 20) // max(1, elements))

    def _samples(self) -> Iterable[ConvFactors]:
        """Blocks of samples whose unfolded image is of a size to work in."""
        step = self._samples_a_block(self.positions * self.shape[2] * self.groups)
        for b in range(0, max(1, len(self)), step):
            yield self._map(operator.itemgetter(slice(b, b + step)))

    def compact(self) -> GradFactors:
        _, O, I = self.shape
        if self.groups == 1 and self.positions * (O + I) < O * I:
            return self
        return GradFactors.of(self.materialize())

    def regrouped(self, batch: int) -> GradFactors:
        if self.groups == 1:
            return super().regrouped(batch)
        return GradFactors.of(self.materialize().unflatten(0, (batch, -1)).sum(1))

    def materialize(
        self, *, out: Tensor | None = None, dtype: torch.dtype | None = None, backend: str | None = None
    ) -> Tensor:
        """``G[b] = Σ_t p_bt u_btᵀ`` -> [B, *weight_shape], by blocks of samples; BTOI operations."""
        if len(self) == 1 and self.windows.fit(self.image, self.plain):
            gradient = self._of_one().unsqueeze(0)
            return gradient.to(dtype or self.dtype) if out is None else out.copy_(gradient)
        results = []
        for b, part in _with_start(self._samples()):
            unfolded, plain = part._unfolded().flatten(0, 1), part.plain.flatten(2).unflatten(1, (self.groups, -1))
            block = None if out is None else out[b : b + len(part)]
            matrices = None
            if block is not None and block.is_contiguous():
                matrices = block.view(unfolded.shape[0], self.shape[1] // self.groups, self.shape[2])
            found = ops.outer(plain.flatten(0, 1).mT, unfolded.mT, out=matrices, dtype=dtype, backend=backend)
            if matrices is None:
                found = found.reshape(len(part), *self.weight_shape)
                results.append(found if block is None else block.copy_(found))
        if out is not None:
            return out
        return results[0] if len(results) == 1 else torch.cat(results)

    def _of_one(self) -> Tensor:
        """Of a single sample: torch's own gradient of a batch's weight, which does not unfold."""
        windows, image = self.windows, self.image
        pads = [before for before, _ in windows.padding]
        if any(before != behind for before, behind in windows.padding):
            image = F.pad(image, [n for pair in reversed(windows.padding) for n in pair])
            pads = [0] * len(pads)
        weight = image.new_empty(self.weight_shape)
        rest = (windows.stride, pads, windows.dilation, False, [0] * len(pads), self.groups)
        return _convolution_backward(self.plain, image, weight, None, *rest, (False, True, False))[1]

    def sq_norm(self) -> Tensor:
        """``‖G[b]‖²`` -> [B]; by blocks of samples, unfolded one after the other."""
        return torch.cat([ops.sq_norm(part.delta, part.activation) for part in self._samples()])

    def dot(self, reference: Tensor) -> Tensor:
        """``⟨G[b], R⟩ = Σ_t p_bt · (image * R)_bt`` -> [B], R in the weight's shape or [O, I]; BTOI operations."""
        if self._is_bank(reference):
            return self.linear(reference)
        if tuple(reference.shape) not in (self.weight_shape, tuple(self.shape[1:])):
            raise ValueError(f"reference: expected shape {list(self.weight_shape)}, but got {list(reference.shape)}")
        return self.linear(reference.unsqueeze(0)).squeeze(1)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``⟨G[b], weight[h]⟩ + bias[h]`` with weight [H, *weight_shape] -> [B, H]: the image convolved by each."""
        if tuple(weight.shape[1:]) not in (self.weight_shape, tuple(self.shape[1:])):
            raise ValueError(f"weight: expected shape [H, {list(self.weight_shape)}], but got {list(weight.shape)}")
        self._refuse_groups()
        image, plain = widen(self.image, self.plain)
        kernels = weight.reshape(-1, *self.weight_shape[1:]).to(image.dtype)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[plain.ndim - 3]
        pads = [n for pair in reversed(self.windows.padding) for n in pair]
        step = self._samples_a_block(self.positions * kernels.shape[0])
        found = []
        for b in range(0, max(1, len(self)), step):
            maps = convolve(
                F.pad(image[b : b + step], pads), kernels, stride=self.windows.stride, dilation=self.windows.dilation
            )
            for dimension, size in enumerate(plain.shape[2:], 2):  # a stride may leave room for more
                maps = maps.narrow(dimension, 0, size)
            maps = maps.flatten(2).unflatten(1, (weight.shape[0], -1))
            found.append((maps * plain[b : b + step].flatten(2).unsqueeze(1)).sum((2, 3)))
        value = torch.cat(found)
        return value if bias is None else value + bias


class EmbeddingFactors(GradFactors):
    """The factors of an embedding's weight [V, D]: the gradient of each position goes to the row looked up there.

    ``G[b] = Σ_t e(index_bt) δ_btᵀ`` with index [B, T], delta_rows [B, T, D] and e(v) the unit vector [V], which is only
    formed by methods that have no cheaper form (project, sketch, quadratic_kron).
    """

    index: Tensor
    delta_rows: Tensor
    rows: int

    def __init__(self, index: Tensor, delta_rows: Tensor, rows: int) -> None:
        for name, value in (("index", index), ("delta_rows", delta_rows), ("rows", rows), ("weight_shape", None)):
            object.__setattr__(self, name, value)

    @property
    def activation(self) -> Tensor:
        return self.delta_rows

    @property
    def delta(self) -> Tensor:
        """The unit vectors, [B, T, V]."""
        return F.one_hot(self.index, self.rows).to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.rows, self.delta_rows.shape[2]))

    @property
    def positions(self) -> int:
        return self.index.shape[1]

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def dtype(self) -> torch.dtype:
        return self.delta_rows.dtype

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.delta_rows.nbytes

    def __len__(self) -> int:
        return self.index.shape[0]

    @staticmethod
    def cat(parts: Sequence[GradFactors]) -> GradFactors:
        own = [part for part in parts if isinstance(part, EmbeddingFactors)]
        if not own or len(own) < len(parts):
            return GradFactors.cat(parts)
        T = max(part.positions for part in own)
        index = torch.cat([F.pad(part.index, (0, T - part.positions)) for part in own])
        rows = torch.cat([F.pad(part.delta_rows, (0, 0, 0, T - part.positions)) for part in own])
        return EmbeddingFactors(index, rows, own[0].rows)

    def gram(self, other: GradFactors | None = None) -> Tensor:
        """``K[b, c] = Σ_{t,s: index_bt = index'_cs} δ_bt · δ'_cs`` -> [B, C]; BCTSD operations, no unit vectors."""
        other = self if other is None else other
        if not isinstance(other, EmbeddingFactors):
            return super().gram(other)
        if other.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"other: expected factors of [V, D] = {list(self.shape[1:])}, but got {list(other.shape[1:])}"
            )
        (T, S), C = (self.positions, other.positions), len(other)
        step = max(1, BLOCK_ELEMENTS // max(1, T * S * C))
        columns, column_index = widen(other.delta_rows)[0].flatten(0, 1), other.index.flatten()
        blocks = []
        for b in range(0, max(1, len(self)), step):
            rows, index = widen(self.delta_rows[b : b + step])[0].flatten(0, 1), self.index[b : b + step].flatten()
            products = (rows @ columns.mT) * (index[:, None] == column_index)
            blocks.append(products.reshape(-1 if T * C * S else 0, T, C, S).sum((1, 3)))
        return torch.cat(blocks) if T * C * S else columns.new_zeros(len(self), C)

    def _map(self, function: Callable[[Tensor], Tensor]) -> GradFactors:
        return EmbeddingFactors(function(self.index), function(self.delta_rows), self.rows)

    def to(self, *args: Any, **kwargs: Any) -> GradFactors:
        rows = self.delta_rows.to(*args, **kwargs)  # a change of type is meant for the values alone: it rounds an index
        return EmbeddingFactors(self.index.to(rows.device), rows, self.rows)

    def scaled(self, weights: Tensor) -> EmbeddingFactors:
        return EmbeddingFactors(self.index, self.delta_rows * weights.to(self.dtype)[:, None, None], self.rows)

    def in_rows(self, start: int, rows: int) -> GradFactors:
        return EmbeddingFactors(self.index + start, self.delta_rows, rows)

    def regrouped(self, batch: int) -> GradFactors:
        index, rows = (x.unflatten(0, (batch, -1)).flatten(1, 2) for x in (self.index, self.delta_rows))
        return EmbeddingFactors(index, rows, self.rows)

    def _combined(self) -> tuple[Tensor, Tensor]:
        """The rows that are not zero, each once and padded by zero ones: index [B, T] and values [B, T, D]."""
        index, order = self.index.sort(dim=1)
        changes = F.pad(index[:, 1:] != index[:, :-1], (1, 0)).cumsum(1)  # the how-many-eth row of its sample
        (rows,) = widen(self.delta_rows)
        rows = rows.gather(1, order.unsqueeze(2).expand_as(rows))
        values = torch.zeros_like(rows).scatter_add(1, changes.unsqueeze(2).expand_as(rows), rows)
        return torch.zeros_like(index).scatter(1, changes, index), values

    def materialize(
        self, *, out: Tensor | None = None, dtype: torch.dtype | None = None, backend: str | None = None
    ) -> Tensor:
        """``G[b, v] = Σ_{t: index_bt = v} δ_bt`` -> [B, V, D]; BTD operations, writes BVD numbers."""
        index, values = self._combined()
        B, V, D = self.shape
        if out is None:
            kind = dtype or self.dtype
            return values.new_zeros(B, V, D, dtype=kind).scatter_add(
                1, index.unsqueeze(2).expand_as(values), values.to(kind)
            )
        ops.check_out(out, (B, V, D), self.device)
        return out.zero_().scatter_add_(1, index.unsqueeze(2).expand_as(values), values.to(out.dtype))

    def sq_norm(self) -> Tensor:
        """``‖G[b]‖²`` -> [B]; BTD operations and a sort of each sample's T indices."""
        return self._combined()[1].square().sum((1, 2))

    def norm(self, p: float = 2) -> Tensor:
        if not p >= 1:
            raise ValueError(f"p: expected a number of at least 1, or infinity, but got {p!r}")
        values = self._combined()[1].flatten(1)
        return torch.linalg.vector_norm(values, p, dim=1) if values.shape[1] else values.new_zeros(len(self))

    def dot(self, reference: Tensor) -> Tensor:
        """``Σ_t R[index_bt] · δ_bt`` with R [V, D] -> [B], or [K, V, D] -> [B, K]; BTD operations each."""
        if self._is_bank(reference):
            return self.linear(reference)
        if tuple(reference.shape) != tuple(self.shape[1:]):
            raise ValueError(f"reference: expected shape {list(self.shape[1:])}, but got {list(reference.shape)}")
        (rows,) = widen(self.delta_rows)
        return (F.embedding(self.index, reference.to(rows.dtype)) * rows).sum((1, 2))

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``Σ_t weight[h, index_bt] · δ_bt`` with weight [H, V, D] -> [B, H]; BHTD operations."""
        if weight.ndim != 3 or tuple(weight.shape[1:]) != tuple(self.shape[1:]):
            raise ValueError(f"weight: expected shape [H, {list(self.shape[1:])}], but got {list(weight.shape)}")
        value = torch.stack([self.dot(functional) for functional in weight], dim=1)
        return value if bias is None else value + bias

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """``Σ_b w_b G[b]`` -> [V, D]; BTD operations."""
        (rows,) = widen(self.delta_rows)
        if weights is not None:
            if weights.shape != (len(self),):
                raise ValueError(f"weights: expected shape ({len(self)},), but got {tuple(weights.shape)}")
            rows = rows * weights.to(rows.dtype)[:, None, None]
        return rows.new_zeros(self.shape[1:]).index_add(0, self.index.flatten(), rows.flatten(0, 1))

    def diag_fisher(self) -> Tensor:
        """``(1/B) Σ_b G[b]²`` elementwise -> [V, D]; BTD operations."""
        self._refuse_empty("diag_fisher")
        index, values = self._combined()
        total = values.new_zeros(self.shape[1:]).index_add(0, index.flatten(), values.square().flatten(0, 1))
        return total / len(self)

    def quadratic(self, diag: Tensor) -> Tensor:
        """``Σ_vd diag_vd G[b]_vd²`` with diag [V, D] -> [B]; BTD operations."""
        if tuple(diag.shape) != tuple(self.shape[1:]):
            raise ValueError(f"diag: expected shape {list(self.shape[1:])}, but got {list(diag.shape)}")
        index, values = self._combined()
        return (F.embedding(index, diag.to(values.dtype)) * values.square()).sum((1, 2))


_Part = TypeVar("_Part", bound=GradFactors)


def _with_start(parts: Iterable[_Part]) -> Iterable[tuple[int, _Part]]:
    start = 0
    for part in parts:
        yield start, part
        start += len(part)


class LayerFactors(dict[str, GradFactors]):
    """The factors of several layers by name: a dict of `GradFactors`, with what sums over all of them.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 6))
    >>> factors = gradext.batch_layer_factors(model, torch.rand(5, 6))
    >>> list(factors), factors.norm().shape, factors.gram().shape
    (['0', '2'], torch.Size([5]), torch.Size([5, 5]))
    >>> {name: tuple(total.shape) for name, total in factors.clipped_sum(max_norm=1.0).items()}
    {'0': (3, 6), '2': (6, 3)}
    """

    def __getitem__(self, name: str) -> GradFactors:
        if name not in self:
            raise KeyError(f"no factors of a layer {name!r}; there are: {', '.join(self)}")
        return super().__getitem__(name)

    def sq_norm(self) -> Tensor:
        """``Σ_layers ‖G_layer[b]‖²`` -> [B]."""
        return _total(factors.sq_norm() for factors in self.values())

    def norm(self) -> Tensor:
        """The Euclidean norm of all chosen layers' gradients together, ``(Σ_layers ‖G_layer[b]‖²)^½`` -> [B]."""
        norms = [factors.norm() for factors in self.values()]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def dot(self, reference: dict[str, Tensor]) -> Tensor:
        """``Σ_layers ⟨G_layer[b], reference[layer]⟩`` -> [B]; ``reference`` has an [O, I] tensor for every layer.

        With K references, [K, O, I] for every layer -> [B, K].
        """
        self._are_banks(reference)
        return _total(factors.dot(reference[name]) for name, factors in self.items())

    def cosine(self, reference: dict[str, Tensor], eps: float = 1e-12) -> Tensor:
        """The cosine between all layers' gradients together and the reference -> [B]; with K references -> [B, K]."""
        bank = self._are_banks(reference)
        return _cosine(self.dot(reference), self.norm(), list(reference.values()), bank, eps)

    def _are_banks(self, reference: dict[str, Tensor]) -> bool:
        """Whether there are K references for every layer, not one."""
        if set(reference) != set(self):
            raise ValueError(f"reference: expected the layers {sorted(self)}, but got {sorted(reference)}")
        counts = {len(reference[name]) if f._is_bank(reference[name]) else None for name, f in self.items()}
        if len(counts) > 1:
            raise ValueError(
                "reference: expected one reference for every layer, or K for every layer, but got "
                f"{' and '.join('one' if count is None else str(count) for count in counts)}"
            )
        return counts != {None}

    def gram(self, other: LayerFactors | None = None) -> Tensor:
        """``Σ_layers K_layer``, of all layers' gradients together -> [B, C]."""
        other = self if other is None else other
        if set(other) != set(self):
            raise ValueError(f"other: expected the layers {sorted(self)}, but got {sorted(other)}")
        return _total(factors.gram(other[name]) for name, factors in self.items())

    def sketch(self, dim: int, seed: int = 0) -> Tensor:
        """`GradFactors.sketch` of all layers' gradients together, every layer by hashes of its own -> [B, dim]."""
        # By name: layers are in the order of execution, which data may decide.
        return _total(self[name].sketch(dim, seed + 1_000_003 * k) for k, name in enumerate(sorted(self)))

    def sum(self, weights: Tensor | None = None) -> dict[str, Tensor]:
        """``Σ_b w_b G_layer[b]`` by layer."""
        return {name: factors.sum(weights) for name, factors in self.items()}

    def mean(self) -> dict[str, Tensor]:
        """``(1/B) Σ_b G_layer[b]`` by layer."""
        return {name: factors.mean() for name, factors in self.items()}

    def clipped_sum(self, max_norm: float) -> dict[str, Tensor]:
        """``Σ_b min(1, max_norm / ‖G[b]‖) G_layer[b]`` by layer, the norms being those of all layers together."""
        return self.sum(_clipping(self.norm(), max_norm))

    @staticmethod
    def cat(parts: Sequence[LayerFactors]) -> LayerFactors:
        """One batch from several of the same layers."""
        if not parts:
            raise ValueError("parts: expected at least one LayerFactors, but got an empty sequence")
        for part in parts:
            if set(part) != set(parts[0]):
                raise ValueError(f"parts: expected the layers {sorted(parts[0])} in all, but got {sorted(part)}")
        return LayerFactors((name, type(first).cat([part[name] for part in parts])) for name, first in parts[0].items())

    def to(self, *args: Any, **kwargs: Any) -> LayerFactors:
        """As `GradFactors.to`, for every layer."""
        return LayerFactors((name, factors.to(*args, **kwargs)) for name, factors in self.items())

    def detach(self) -> LayerFactors:
        return LayerFactors((name, factors.detach()) for name, factors in self.items())


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    return functools.reduce(torch.add, parts)


def _clipping(norm: Tensor, max_norm: float) -> Tensor:
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive number, but got {max_norm!r}")
    return (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)


def _cosine(dot: Tensor, norm: Tensor, references: list[Tensor], bank: bool, eps: float) -> Tensor:
    rows = [r.to(norm.dtype).reshape(r.shape[0] if bank else 1, -1) for r in references]
    lengths = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(r, dim=1) for r in rows]), dim=0)
    scale = norm[:, None] * lengths if bank else norm * lengths
    value = (dot / scale.clamp_min(eps)).clamp(-1, 1)
    return torch.where(scale < eps, torch.zeros_like(value), value)


def _safe_sqrt(square: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero, not infinite, as for `torch.linalg.vector_norm`."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), square)


def _count_sketch(x: Tensor, dim: int, seed: int, stream: int) -> Tensor:
    """Σ over the last dimension into ``dim`` buckets with random signs, both by hashing the index."""
    bucket, sign = _hashes(x.shape[-1], x, dim, seed, stream)
    return x.new_zeros(*x.shape[:-1], dim).index_add(-1, bucket, x * sign)


def _sketch_written(gradients: Tensor, shape: tuple[int, ...], dim: int, seed: int) -> Tensor:
    """Of gradients [B, O·I] of a weight of ``shape`` what the count sketches of their factors give."""
    sizes = shape[0], math.prod(shape[1:])
    (rows, row_sign), (columns, column_sign) = (
        _hashes(size, gradients, dim, seed, stream) for stream, size in enumerate(sizes)
    )
    bucket, sign = (rows[:, None] + columns).flatten() % dim, (row_sign[:, None] * column_sign).flatten()
    return gradients.new_zeros(len(gradients), dim).index_add(1, bucket, gradients * sign)


def _hashes(count: int, like: Tensor, dim: int, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """The bucket and the sign of each of ``count`` indices."""
    index = torch.arange(count, device=like.device, dtype=torch.int64)
    wrapped = (2 * seed + stream + 2**63) % 2**64 - 2**63  # any integer, to a signed 64-bit one
    hashed = _mix(index + _mix(torch.tensor(wrapped, device=like.device, dtype=torch.int64)))
    return (hashed & 0x7FFFFFFF) % dim, ((hashed >> 32) & 1).to(like.dtype) * 2 - 1


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on wrapping 64-bit integers (Steele et al., OOPSLA 2014)."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


class LayerGrads(dict):
    coverage = None
