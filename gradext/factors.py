"""The factored algebra: per-sample gradients as ``Σ_t delta_t activation_tᵀ``, used without being written.

`GradFactors` holds the factors of one weight, `LayerFactors` those of several by name. B samples, T positions (a
sequence, or several uses of the weight), O output and I input features; ``G[b]`` is the gradient [O, I] of sample b.
Costs are counted in multiply-adds. Nothing here knows about modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .backends.reference import BLOCK_ELEMENTS, accumulation_type, widen


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
    """

    activation: Tensor
    delta: Tensor

    def __post_init__(self) -> None:
        ops.check_factors(self.delta, self.activation)
        if self.delta.ndim == 3 and self.delta.shape[1] == 1:  # one position has the cheaper forms
            object.__setattr__(self, "delta", self.delta.squeeze(1))
            object.__setattr__(self, "activation", self.activation.squeeze(1))

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

    def __len__(self) -> int:
        return self.delta.shape[0]

    def __repr__(self) -> str:
        B, O, I = self.shape
        return f"GradFactors(B={B}, O={O}, I={I}, T={self.positions}, dtype={self.dtype}, device={self.device})"

    def __getitem__(self, index) -> GradFactors:
        """The factors of some samples: an integer (kept as a batch of one), a slice, a mask or a list of indices."""
        if isinstance(index, int):
            index = [index]
        return GradFactors(self.activation[index], self.delta[index])

    def to(self, *args, **kwargs) -> GradFactors:
        """As `Tensor.to`, for both factors."""
        return GradFactors(self.activation.to(*args, **kwargs), self.delta.to(*args, **kwargs))

    def detach(self) -> GradFactors:
        return GradFactors(self.activation.detach(), self.delta.detach())

    @staticmethod
    def cat(parts: Sequence[GradFactors]) -> GradFactors:
        """One batch from several of the same layer; where T differs, zero positions fill up, which add nothing."""
        if not parts:
            raise ValueError("parts: expected at least one GradFactors, but got an empty sequence")
        T = max(part.positions for part in parts)
        padded = [part._padded(T) for part in parts] if T > 1 else [(p.activation, p.delta) for p in parts]
        return GradFactors(torch.cat([a for a, _ in padded]), torch.cat([d for _, d in padded]))

    def _padded(self, T: int) -> tuple[Tensor, Tensor]:
        activation, delta = self._explicit()
        fill = T - activation.shape[1]
        return (
            torch.nn.functional.pad(activation, (0, 0, 0, fill)),
            torch.nn.functional.pad(delta, (0, 0, 0, fill)),
        )

    def _explicit(self) -> tuple[Tensor, Tensor]:
        """[B, T, I] and [B, T, O], T = 1 included."""
        if self.delta.ndim == 3:
            return self.activation, self.delta
        return self.activation.unsqueeze(1), self.delta.unsqueeze(1)

    def _blocks(self) -> Iterable[Tensor]:
        """The gradients [b, O, I] in blocks of samples of a few MB, for what has no cheaper form."""
        step = self._block_size()
        for b in range(0, len(self), step):
            yield self[b : b + step].materialize(dtype=accumulation_type(self.dtype))

    def _block_size(self) -> int:
        return max(1, BLOCK_ELEMENTS // max(1, self.shape[1] * self.shape[2]))

    # --- the gradients themselves ------------------------------------------------------------------------------------

    def materialize(
        self, *, out: Tensor | None = None, dtype: torch.dtype | None = None, backend: str | None = None
    ) -> Tensor:
        """``G[b] = Σ_t δ_bt a_btᵀ`` -> [B, O, I]; BTOI operations, writes BOI numbers, into ``out`` if given."""
        return ops.outer(self.delta, self.activation, out=out, dtype=dtype, backend=backend)

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
            return torch.linalg.vector_norm(delta, p, dim=1) * torch.linalg.vector_norm(activation, p, dim=1)
        if p == 2:
            return _safe_sqrt(self.sq_norm())
        return self._over_blocks(lambda gradient: torch.linalg.vector_norm(gradient.flatten(1), p, dim=1))

    def _over_blocks(self, function) -> Tensor:
        results = [function(block) for block in self._blocks()]
        return torch.cat(results) if results else self.delta.new_zeros(0, dtype=accumulation_type(self.dtype))

    # --- inner products ----------------------------------------------------------------------------------------------

    def dot(self, reference: Tensor) -> Tensor:
        """``⟨G[b], R⟩`` with a reference gradient R [O, I] -> [B]; BTOI operations, intermediate BT·min(O, I)."""
        return ops.dot(self.delta, self.activation, reference)

    def cosine(self, reference: Tensor, eps: float = 1e-12) -> Tensor:
        """``⟨G[b], R⟩ / (‖G[b]‖‖R‖)`` -> [B] in [-1, 1]; 0 where the product of norms is below ``eps``."""
        return _cosine(self.dot(reference), self.norm(), [reference], eps)

    def gram(self, other: GradFactors | None = None) -> Tensor:
        """``K[b, c] = ⟨G[b], G'[c]⟩ = Σ_ts (δ_bt·δ'_cs)(a_bt·a'_cs)`` -> [B, C]; ``other`` defaults to self.

        T = 1: BC(O + I). T > 1: BCTS(O + I), or through n blocks of gradients BCOI + (BT + nCS)OI, the lesser.
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

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """H functionals of each gradient, ``y[b, h] = ⟨G[b], weight[h]⟩ + bias[h]``, weight [H, O, I] -> [B, H].

        A classifier's first layer on the flattened gradient, `F.linear(G.flatten(1), weight.flatten(1), bias)`, at
        BHOI operations for T = 1 (the longer of O and I contracted first) without the gradients.
        """
        value = ops.linear(self.delta, self.activation, weight)
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
        every cut into batches gives the same projection, and none is stored; BT(O + I + dim log dim) operations.
        Source: Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps", KDD 2013.
        """
        # Pairs of entries that share no row and no column collide with probability 1/dim, and add 2/dim, and
        # crosswise too with probability at most 2/dim², and add 4/dim²; those in one row or one column add 2/dim each.
        if dim < 1:
            raise ValueError(f"dim: expected a positive integer, but got {dim!r}")
        activation, delta = widen(*self._explicit())
        if len(self) == 0 or self.positions == 0:  # which torch.fft refuses
            return delta.new_zeros(len(self), dim)
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
        return delta.flatten(0, 1).mT @ activation.flatten(0, 1)

    def mean(self) -> Tensor:
        """``(1/B) Σ_b G[b]`` -> [O, I]. Raises ValueError for an empty batch."""
        self._refuse_empty("mean")
        return self.sum() / len(self)

    def diag_fisher(self) -> Tensor:
        """The diagonal of the empirical Fisher matrix, ``(1/B) Σ_b G[b]²`` elementwise -> [O, I].

        T = 1: ``(δ²)ᵀ(a²) / B``, BOI operations. T > 1: through blocks of gradients, BTOI.
        """
        self._refuse_empty("diag_fisher")
        if self.delta.ndim == 2:
            delta, activation = widen(self.delta, self.activation)
            return delta.square().mT @ activation.square() / len(self)
        return sum(block.square().sum(0) for block in self._blocks()) / len(self)

    def _refuse_empty(self, method: str) -> None:
        if len(self) == 0:
            raise ValueError(f"{method}: expected at least one sample, but the batch is empty")

    # --- quadratic forms ---------------------------------------------------------------------------------------------

    def quadratic(self, diag: Tensor) -> Tensor:
        """``Σ_oi diag_oi G[b]_oi²`` with diag [O, I] -> [B], such as the score ``diag = 1 / (F + ridge)``.

        T = 1: ``(δ²)ᵀ diag (a²)``, BOI operations. T > 1: through blocks of gradients, BTOI.
        """
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


class LayerFactors(dict):
    """The factors of several layers by name: a dict of `GradFactors`, with what sums over all of them."""

    def __getitem__(self, name: str) -> GradFactors:
        if name not in self:
            raise KeyError(f"no factors of a layer {name!r}; there are: {', '.join(self)}")
        return super().__getitem__(name)

    def sq_norm(self) -> Tensor:
        """``Σ_layers ‖G_layer[b]‖²`` -> [B]."""
        return sum(factors.sq_norm() for factors in self.values())

    def norm(self) -> Tensor:
        """The Euclidean norm of all chosen layers' gradients together, ``(Σ_layers ‖G_layer[b]‖²)^½`` -> [B]."""
        norms = [factors.norm() for factors in self.values()]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def dot(self, reference: dict[str, Tensor]) -> Tensor:
        """``Σ_layers ⟨G_layer[b], reference[layer]⟩`` -> [B]; ``reference`` has an [O, I] tensor for every layer."""
        if set(reference) != set(self):
            raise ValueError(f"reference: expected the layers {sorted(self)}, but got {sorted(reference)}")
        return sum(factors.dot(reference[name]) for name, factors in self.items())

    def cosine(self, reference: dict[str, Tensor], eps: float = 1e-12) -> Tensor:
        """The cosine between all layers' gradients together and the reference -> [B]."""
        return _cosine(self.dot(reference), self.norm(), list(reference.values()), eps)

    def gram(self, other: LayerFactors | None = None) -> Tensor:
        """``Σ_layers K_layer`` -> [B, C]."""
        other = self if other is None else other
        if set(other) != set(self):
            raise ValueError(f"other: expected the layers {sorted(self)}, but got {sorted(other)}")
        return sum(factors.gram(other[name]) for name, factors in self.items())


def _cosine(dot: Tensor, norm: Tensor, references: list[Tensor], eps: float) -> Tensor:
    norms = [torch.linalg.vector_norm(reference.to(norm.dtype)) for reference in references]
    scale = norm * torch.linalg.vector_norm(torch.stack(norms))
    value = (dot / scale.clamp_min(eps)).clamp(-1, 1)
    return torch.where(scale < eps, torch.zeros_like(value), value)


def _safe_sqrt(square: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero, not infinite, as for `torch.linalg.vector_norm`."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), square)


def _count_sketch(x: Tensor, dim: int, seed: int, stream: int) -> Tensor:
    """Σ over the last dimension into ``dim`` buckets with random signs, both by hashing the index."""
    index = torch.arange(x.shape[-1], device=x.device, dtype=torch.int64)
    wrapped = (2 * seed + stream + 2**63) % 2**64 - 2**63  # any integer, to a signed 64-bit one
    hashed = _mix(index + _mix(torch.tensor(wrapped, device=x.device, dtype=torch.int64)))
    sign = ((hashed >> 32) & 1).to(x.dtype) * 2 - 1
    bucket = (hashed & 0x7FFFFFFF) % dim
    return x.new_zeros(*x.shape[:-1], dim).index_add(-1, bucket, x * sign)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on wrapping 64-bit integers (Steele et al., OOPSLA 2014)."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
