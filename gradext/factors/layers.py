"""All parameters by name: their factors, with what sums over all of them, and their gradients."""

from __future__ import annotations

import functools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops, ranges
from ..backends import reference
from ..errors import UnsupportedLayerError, listed
from . import numerics
from .convolutions import ConvFactors
from .numerics import total
from .products import GradFactors, Gradient
from .written import WrittenFactors

# Gradients of at most this many numbers a sample are concatenated for their norms: one pass instead of many calls.
SMALL = 1 << 14


@dataclass
class Coverage:
    """What a result holds and what not.

    rules: by parameter, how its gradient was found (``"linear"``, ``"embedding"``, ``"general"``, ``"backward a
    sample"``, ``"unused"`` where the losses do not depend on it: its gradient is zero). left_out: by parameter, why it
    is not there.
    """

    rules: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for what, found in (("covered", self.rules), ("left out", self.left_out)):
            reasons: dict[str, list[str]] = {}
            for name, reason in found.items():
                reasons.setdefault(reason, []).append(name)
            for reason, names in reasons.items():
                lines.append(f"{what} ({reason}): {listed(names)}")
        return "\n".join(lines) or "no parameters"


class LayerFactors(dict[str, GradFactors]):
    """The factors of several parameters by name: a dict of `GradFactors`, with methods that sum over all of them.

    coverage tells, where the factors come from a model, by which rule each was found and what was left out.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 6))
    >>> factors = gradext.batch_layer_factors(model, torch.rand(5, 6))
    >>> sorted(factors), factors.norm().shape, factors.gram().shape
    (['0.bias', '0.weight', '2.bias', '2.weight'], torch.Size([5]), torch.Size([5, 5]))
    >>> factors.clipped_sum(max_norm=1.0)["2.weight"].shape
    torch.Size([6, 3])
    """

    def __init__(self, *factors: Any, coverage: Coverage | None = None, **named: GradFactors) -> None:
        super().__init__(*factors, **named)
        self.coverage = coverage or Coverage()

    def __getitem__(self, name: str) -> GradFactors:
        if name not in self:
            raise KeyError(f"no factors of a parameter {name!r}; there are: {', '.join(self)}")
        return super().__getitem__(name)

    def __repr__(self) -> str:
        return _listed(self, ((name, repr(factors)) for name, factors in self.items()))

    @property
    def nbytes(self) -> int:
        """The memory that the factors take."""
        return sum(factors.nbytes for factors in self.values())

    def _map(self, function: Callable[[GradFactors], GradFactors]) -> LayerFactors:
        found = ((name, function(factors)) for name, factors in self.items())
        return LayerFactors(found, coverage=self.coverage)

    @staticmethod
    def of(found: Mapping[str, Gradient], coverage: Coverage | None = None) -> LayerFactors:
        """Gradients of several parameters, in factored form or not, by name."""
        for name, gradient in found.items():
            if isinstance(gradient, Tensor) and gradient.is_complex():
                raise UnsupportedLayerError(
                    f"{name}: expected a real parameter, as factors hold real numbers, but it is {gradient.dtype}; "
                    "leave it out with exclude=, or take the gradients themselves (batch_layer_grads, watch.grads)"
                )
        factors = {name: GradFactors.of(g) if isinstance(g, Tensor) else g.compact() for name, g in found.items()}
        # A view keeps its base alive, which would count as shared memory.
        for name, f in factors.items():
            if any(t._base is not None for t in f._tensors()):
                factors[name] = f._map(lambda t: t if t.requires_grad else t.detach())
        return LayerFactors(factors, coverage=coverage)

    def kept_apart(self) -> LayerFactors:
        """The same in memory that nothing else holds: what it shares with others, who may overwrite it, is copied."""
        tensors = {id(t): t for factors in self.values() for t in factors._tensors()}
        shared = held_elsewhere(tensors.values())
        copies = {i: t.clone() for i, t in tensors.items() if shared(t)}
        return self._map(lambda factors: factors._map(lambda t: copies.get(id(t), t))) if copies else self

    def samples(self, index: Any) -> LayerFactors:
        """The factors of some samples in all layers: an integer (kept as a batch of one), a slice, a mask or a list."""
        return self._map(lambda factors: factors[index])

    def to(self, *args: Any, **kwargs: Any) -> LayerFactors:
        """As `GradFactors.to`, for every layer."""
        return self._map(lambda factors: factors.to(*args, **kwargs))

    def detach(self) -> LayerFactors:
        return self._map(GradFactors.detach)

    @staticmethod
    def cat(parts: Sequence[LayerFactors]) -> LayerFactors:
        """One batch from several of the same layers; its coverage is the first one's."""
        if not parts:
            raise ValueError("parts: expected at least one LayerFactors, but got an empty sequence")
        for part in parts:
            if set(part) != set(parts[0]):
                raise ValueError(f"parts: expected the layers {sorted(parts[0])} in all, but got {sorted(part)}")
        found = ((name, GradFactors.cat([part[name] for part in parts])) for name in parts[0])
        return LayerFactors(found, coverage=parts[0].coverage)

    def materialize(self, *, dtype: torch.dtype | None = None) -> LayerGrads:
        """The gradients of every layer, {name: [B, *shape]}."""
        found = ((name, factors.materialize(dtype=dtype)) for name, factors in self.items())
        return LayerGrads(found, coverage=self.coverage)

    # --- norms -------------------------------------------------------------------------------------------------------

    def sq_norm(self) -> Tensor:
        """``Σ_layers ‖G_layer[b]‖²`` -> [B]."""
        layers = self._side_by_side()
        return _squares(layers) if _are_eager(layers) else _summed([factors.sq_norm() for factors in layers])

    def norm(self) -> Tensor:
        """The Euclidean norm of all chosen layers' gradients together, ``(Σ_layers ‖G_layer[b]‖²)^½`` -> [B]."""
        layers = self._side_by_side()
        if len(layers) == 1:
            return layers[0].norm()
        if _are_eager(layers):
            return numerics.root(_squares(layers), lambda rows: self.samples(rows)._scaled_norm())
        return self._scaled_norm()

    def _side_by_side(self) -> list[GradFactors]:
        """The layers' factors, those of small written gradients together: equivalent for sums over all numbers."""
        if not self:
            raise ValueError("expected the factors of at least one layer, but there are none")
        small = self._small()
        found = [factors for name, factors in self.items() if name not in small]
        return [*found, _joined(small.values())] if small else found

    def _small(self) -> dict[str, WrittenFactors]:
        """The layers of small written gradients, of the type and device of the first of them."""
        small: dict[str, WrittenFactors] = {}
        kind = None
        for name, factors in self.items():
            if type(factors) is WrittenFactors and factors.gradients.numel() <= SMALL * len(factors):
                kind = kind or (factors.dtype, factors.device)
                if (factors.dtype, factors.device) == kind:
                    small[name] = factors
        return small

    def _scaled_norm(self) -> Tensor:
        layers = self._side_by_side()
        by = _largest(layers)
        squares = _summed([factors._scaled(by)._squares() for factors in layers])
        return ranges.times_two_to(by, numerics.safe_sqrt(squares))

    # --- inner products ----------------------------------------------------------------------------------------------

    def dot(self, reference: Mapping[str, Tensor]) -> Tensor:
        """``Σ_layers ⟨G_layer[b], reference[layer]⟩`` -> [B]; ``reference`` has a tensor like every layer's parameter.

        With K references, [K, *shape] for every layer -> [B, K].
        """
        self._are_banks(reference)
        return total(factors.dot(reference[name]) for name, factors in self.items())

    def cosine(self, reference: Mapping[str, Tensor]) -> Tensor:
        """The cosine between all layers' gradients together and the reference -> [B]; with K references -> [B, K].

        0 where one of them is zero, and right however small or large they are.
        """
        length = numerics.lengths([reference[name] for name in self if name in reference], self._are_banks(reference))
        if numerics.is_eager(length) and _are_eager(self.values()):
            norm = self.norm()
            if not ranges.may_look(norm) or numerics.in_middle_of_range(norm, length):
                return numerics.cosine(self.dot(reference), norm, length)
        by = _largest(list(self.values()))
        scaled = self._map(lambda factors: factors._scaled(by))
        return numerics.cosine(scaled.dot(reference), scaled.norm(), length)

    def _are_banks(self, reference: Mapping[str, Tensor]) -> bool:
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
        small, others = self._small(), other._small()
        both = [name for name in small if name in others and small[name].weight_shape == others[name].weight_shape]
        parts = [factors.gram(other[name]) for name, factors in self.items() if name not in both]
        if both:
            joined = _joined(small[name] for name in both)
            parts.append(joined.gram(joined if other is self else _joined(others[name] for name in both)))
        return total(parts)

    # --- projections -------------------------------------------------------------------------------------------------

    def sketch(self, dim: int, seed: int = 0) -> Tensor:
        """`GradFactors.sketch` of all layers' gradients together, every layer by hashes of its own -> [B, dim]."""
        # By name: layers are in the order of execution, which data may decide.
        return total(self[name].sketch(dim, seed + 1_000_003 * k) for k, name in enumerate(sorted(self)))

    def project(self, rank: int | Mapping[str, tuple[Tensor, Tensor]], *, seed: int = 0) -> Tensor:
        """Two-sided projections of every layer's gradients, side by side in the order of names -> [B, K].

        With a rank, each layer's r · s numbers are those of `GradFactors.project` by random matrices of its own: they
        depend on the layer's name and sizes and on ``seed`` alone, are made one layer at a time and not kept, and are
        the same ones on every device and for every choice of layers. r = min(rank, O) and s = min(rank, I): K is at
        most rank² a matrix and rank a vector. Inner products of projections have the mean of those of the gradients and
        a variance of at most ``Σ_layers (2/r + 2/s + 4/rs)‖G_layer‖²‖H_layer‖²``: their error relative to ``‖G‖‖H‖`` is
        at most 0.52, 0.25 and 0.18 in standard deviation for ranks 16, 64 and 128, less by the root of the number of
        layers where these have equal shares, and none where the ranks are full.

        With matrices instead, {name: (left [O, R], right [I, S])}, theirs. Raises ValueError for other names.

        >>> import torch, gradext
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 6))
        >>> factors = gradext.batch_layer_factors(model, torch.rand(5, 6))
        >>> factors.project(2).shape[0], torch.allclose(factors.project(6) @ factors.project(6).T, factors.gram())
        (5, True)
        """
        if isinstance(rank, Mapping):
            if set(rank) != set(self):
                raise ValueError(f"matrices: expected the layers {sorted(self)}, but got {sorted(rank)}")
            found = [self[name].project(*rank[name]) for name in sorted(self)]
        else:
            found = [self[name].project(rank, seed=seed + (zlib.crc32(name.encode()) << 31)) for name in sorted(self)]
        return torch.cat([projected.flatten(1) for projected in found], dim=1)

    # --- over the batch ----------------------------------------------------------------------------------------------

    def sum(self, weights: Tensor | None = None) -> LayerGrads:
        """``Σ_b w_b G_layer[b]`` by layer; those of small parameters may be views of one tensor."""
        small = self._small()
        sums = {name: factors.sum(weights) for name, factors in self.items() if name not in small or len(small) == 1}
        if len(small) > 1:
            sizes = [math.prod(factors.weight_shape) for factors in small.values()]
            parts = zip(small.items(), _joined(small.values()).sum(weights).split(sizes), strict=True)
            sums |= {name: part.reshape(factors.weight_shape) for (name, factors), part in parts}
        return LayerGrads(((name, sums[name]) for name in self), coverage=self.coverage)

    def mean(self) -> LayerGrads:
        """``(1/B) Σ_b G_layer[b]`` by layer. Raises ValueError for an empty batch."""
        return LayerGrads(((name, factors.mean()) for name, factors in self.items()), coverage=self.coverage)

    def clipped_sum(self, max_norm: float) -> LayerGrads:
        """``Σ_b min(1, max_norm / ‖G[b]‖) G_layer[b]`` by layer, the norms being those of all layers together."""
        return self.sum(numerics.clipping(self.norm(), max_norm))


class LayerGrads(dict[str, Tensor]):
    """Gradients by parameter name, ``{name: [B, *shape]}`` or sums of them, with the coverage of `LayerFactors`.

    >>> import torch
    >>> LayerGrads({"0.weight": torch.ones(5, 3, 6)})
    LayerGrads(
      0.weight: [5, 3, 6], torch.float32, cpu
    )
    """

    def __init__(self, *grads: Any, coverage: Coverage | None = None, **named: Tensor) -> None:
        super().__init__(*grads, **named)
        self.coverage = coverage or Coverage()

    def __repr__(self) -> str:
        each = ((name, f"{list(g.shape)}, {g.dtype}, {g.device}") for name, g in self.items())
        return _listed(self, each)

    @staticmethod
    def of(
        found: Mapping[str, Gradient],
        parameters: Mapping[str, Tensor],
        coverage: Coverage | None = None,
        *,
        out: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> LayerGrads:
        """The gradients themselves, of the parameters' types or ``dtype``, in ``out`` where it has tensors for them."""
        out = _checked_out(out, found, parameters, dtype)
        kinds = {name: None if name in out else dtype or parameters[name].dtype for name in found}
        products = {
            name: ops.Product(gradient.delta, gradient.activation, out.get(name), kinds[name])
            for name, gradient in found.items()
            if type(gradient) is GradFactors and gradient.weight_shape is None
        }
        grads = dict(zip(products, ops.outer_group(list(products.values()), backend=backend), strict=True))
        # A bias's gradient is a delta, which autograd may have given others too: each result has memory of its own.
        taken = {memory(t) for f in found.values() if isinstance(f, GradFactors) for t in f._tensors()}
        for name, gradient in found.items():
            if name in grads:
                continue
            if isinstance(gradient, GradFactors):
                grads[name] = gradient.materialize(out=out.get(name), dtype=kinds[name], backend=backend)
            elif name in out:
                grads[name] = out[name].copy_(gradient)
            else:
                gradient = gradient.to(kinds[name])
                if memory(gradient) in taken or 0 in gradient.stride():
                    gradient = gradient.clone(memory_format=torch.contiguous_format)
                taken.add(memory(gradient))
                grads[name] = gradient
        return LayerGrads({name: grads[name] for name in found}, coverage=coverage)


def _checked_out(
    out: Mapping[str, Tensor] | None,
    found: Mapping[str, Gradient],
    parameters: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    if out is None:
        return {}
    if not isinstance(out, Mapping):
        raise TypeError(f"out: expected a mapping from names to tensors, but got {type(out).__name__}")
    if set(out) != set(found):
        raise ValueError(f"out: expected one tensor for each of {sorted(found)}, but got {sorted(out)}")
    for name, tensor in out.items():
        shape = (found[name].shape[0], *parameters[name].shape)
        ops.check_out(tensor, shape, found[name].device, f"out[{name!r}]")
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"out[{name!r}]: expected type {dtype} (the dtype argument), but got {tensor.dtype}")
    inputs = [[g] if isinstance(g, Tensor) else g._tensors() for g in found.values()]
    ops.check_apart(out.values(), [tensor for tensors in inputs for tensor in tensors])
    return dict(out)


def memory(tensor: Tensor) -> int:
    """The address of the tensor's storage, by which it is found out who shares it."""
    return tensor.untyped_storage().data_ptr()


def held_elsewhere(known: Iterable[Tensor]) -> Callable[[Tensor], bool]:
    """Tells of a tensor whether others than these hold its memory too."""
    holders = Counter(map(memory, {id(t): t for t in known}.values()))

    def shared(tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) > holders[memory(tensor)] + 1

    return shared


def _listed(layers: LayerFactors | LayerGrads, described: Iterable[tuple[str, str]]) -> str:
    """One line a parameter, and what was left out."""
    lines = [f"  {name}: {text}" for name, text in described]
    lines += [f"  left out: {name}: {reason}" for name, reason in layers.coverage.left_out.items()]
    return "\n".join([f"{type(layers).__name__}(", *lines, ")"]) if lines else f"{type(layers).__name__}()"


def _joined(parts: Iterable[WrittenFactors]) -> WrittenFactors:
    """The written gradients of several layers as those of one vector."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else WrittenFactors(torch.cat([part._flat() for part in parts], dim=1))


def _are_eager(layers: Iterable[GradFactors]) -> bool:
    return numerics.is_eager(*(tensor for factors in layers for tensor in factors._tensors()))


def _squares(layers: list[GradFactors]) -> Tensor:
    """The squared norms [B] of all layers' gradients together, of eager factors: in few calls for all of them."""
    squares = []
    # On the CPU rows take less time than calls of the operators: looked at together.
    products = [f for f in layers if type(f) is GradFactors and f.delta.ndim == 2 and ranges.may_look(f.delta)]
    if products and len({factors.dtype for factors in layers}) == 1:
        written = [factors for factors in layers if type(factors) is WrittenFactors]
        rows = [f.delta for f in products] + [f._flat() for f in written] + [f.activation for f in products]
        norms = torch.stack([reference.unchecked_row_norms(row) for row in numerics.widen(*rows)])
        least = ranges.least_power(max(row.shape[1] for row in rows), norms.dtype) ** 0.5
        if ranges.outside(norms.flatten(), least) is None:
            norms, activations = norms[: -len(products)], norms[-len(products) :]
            norms[: len(products)].mul_(activations)
            squares.append(norms.square_().sum(0))
            taken = {id(factors) for factors in (*products, *written)}
            layers = [factors for factors in layers if id(factors) not in taken]
    layers = list(_unfolded(layers))
    products = [factors for factors in layers if type(factors) is GradFactors]
    if len(products) > 1:
        squares.append(ops.sq_norm_group([(f.delta, f.activation) for f in products]).sum(0))
        layers = [factors for factors in layers if type(factors) is not GradFactors]
    return _summed([*squares, *(factors._squares() for factors in layers)])


def _unfolded(layers: Iterable[GradFactors]) -> Iterator[GradFactors]:
    """On a GPU convolutions as products, as far as their unfolded images make one block: all in one launch."""
    room = reference.DEVICE_BLOCK_ELEMENTS
    for factors in layers:
        if type(factors) is ConvFactors and not ranges.may_look(factors.plain):
            size = len(factors) * factors.positions * factors.shape[2]
            if size <= room:
                room, factors = room - size, factors._unfolded_factors()
        yield factors


def _summed(squares: list[Tensor]) -> Tensor:
    return squares[0] if len(squares) == 1 else torch.stack(_of_one_type(squares)).sum(0)


def _of_one_type(tensors: list[Tensor]) -> list[Tensor]:
    kind = functools.reduce(torch.promote_types, {t.dtype for t in tensors})
    return [t if t.dtype == kind else t.to(kind) for t in tensors]


def _largest(layers: list[GradFactors]) -> Tensor:
    return functools.reduce(torch.maximum, (factors._exponents() for factors in layers))
