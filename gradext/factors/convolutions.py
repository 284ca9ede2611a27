"""Factors of convolutions: the image is unfolded only while they are used, for a block of samples at a time."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, ranges
from ..backends.reference import accumulation_type, samples_a_block
from .numerics import widen
from .products import GradFactors

_convolution_backward = torch.ops.aten.convolution_backward


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

    weight_shape is the parameter's, conv_shape that of the convolution's weight where it was used in another one.
    """

    image: Tensor
    plain: Tensor
    windows: Windows
    groups: int
    weight_shape: tuple[int, ...]
    conv_shape: tuple[int, ...]

    def __init__(
        self,
        image: Tensor,
        plain: Tensor,
        windows: Windows,
        groups: int,
        weight_shape: tuple[int, ...],
        conv_shape: tuple[int, ...] | None = None,
    ) -> None:
        for name, value in (
            *(("image", image), ("plain", plain), ("windows", windows), ("groups", groups)),
            *(("weight_shape", tuple(weight_shape)), ("conv_shape", tuple(conv_shape or weight_shape))),
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
        return torch.Size((len(self), self.conv_shape[0], math.prod(self.conv_shape[1:])))

    @property
    def positions(self) -> int:
        return math.prod(self.plain.shape[2:])

    @property
    def device(self) -> torch.device:
        return self.plain.device

    @property
    def dtype(self) -> torch.dtype:
        return self.plain.dtype

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.image, self.plain

    def _map(self, function: Callable[[Tensor], Tensor]) -> ConvFactors:
        return self._of(function(self.image), function(self.plain))

    def _of(self, image: Tensor, plain: Tensor) -> ConvFactors:
        return ConvFactors(image, plain, self.windows, self.groups, self.weight_shape, self.conv_shape)

    def _with_form(self, weight_shape: tuple[int, ...] | None) -> ConvFactors:
        shape = tuple(self.shape[1:]) if weight_shape is None else weight_shape
        return ConvFactors(self.image, self.plain, self.windows, self.groups, shape, self.conv_shape)

    def _exchanged(self) -> GradFactors:
        return GradFactors(self.delta, self.activation) if self.groups == 1 else self._written(lambda g: g.mT)

    def _padded_rows(self, before: int, after: int, shape: tuple[int, ...]) -> GradFactors:
        if self.groups != 1:
            return self._padded_written(before, after, 0, shape)
        plain = _padded_channels(self.plain, before, after)
        conv_shape = (self.conv_shape[0] + before + after, *self.conv_shape[1:])
        return ConvFactors(self.image, plain, self.windows, self.groups, shape, conv_shape)

    def _padded_columns(self, before: int, after: int, shape: tuple[int, ...]) -> GradFactors:
        size = math.prod(self.windows.kernel)
        if self.groups != 1 or before % size or after % size:
            return self._padded_written(before, after, 1, shape)
        before, after = before // size, after // size
        image = _padded_channels(self.image, before, after)
        conv_shape = (self.conv_shape[0], self.conv_shape[1] + before + after, *self.conv_shape[2:])
        return ConvFactors(image, self.plain, self.windows, self.groups, shape, conv_shape)

    def _padded_written(self, before: int, after: int, dim: int, shape: tuple[int, ...]) -> GradFactors:
        pads = (0, 0, before, after) if dim == 0 else (before, after)
        return GradFactors.of(F.pad(self.materialize().reshape(self.shape), pads).reshape(len(self), *shape))

    def _refuse_groups(self) -> None:
        if self.groups != 1:
            raise ValueError(
                "a convolution with groups has one pair of factors for each of them; use compact(), which gives the "
                "factors of its gradients, at most as large"
            )

    def _unfolded(self) -> Tensor:
        return self.windows.of(self.image, self.plain.shape[2:], self.groups)

    def _samples(self) -> Iterable[ConvFactors]:
        """Blocks of samples whose unfolded image is of a size to work in."""
        step = samples_a_block(self.positions * self.shape[2] * self.groups, self.device)
        for b in range(0, max(1, len(self)), step):
            yield self._map(operator.itemgetter(slice(b, b + step)))

    def _geometry(self) -> tuple:
        """What has to agree for batches to be joined as they are."""
        sizes = self.image.shape[1:], self.plain.shape[1:]
        return self.windows, self.groups, self.weight_shape, self.conv_shape, sizes

    def _unfolded_factors(self) -> GradFactors:
        return GradFactors(self.activation, self.delta, self.weight_shape)

    def compact(self) -> GradFactors:
        return self if self._is_smaller() else GradFactors.of(self.materialize())

    def _is_smaller(self) -> bool:
        """Whether the factors, unfolded, take less than the gradients."""
        _, O, I = self.shape
        return self.groups == 1 and self.positions * (O + I) < O * I

    def regrouped(self, batch: int) -> GradFactors:
        return super().regrouped(batch) if self.groups == 1 else GradFactors.of(self.materialize()).regrouped(batch)

    def materialize(
        self, *, out: Tensor | None = None, dtype: torch.dtype | None = None, backend: str | None = None
    ) -> Tensor:
        """``G[b] = Σ_t p_bt u_btᵀ`` -> [B, *weight_shape], by blocks of samples; BTOI operations."""
        if out is not None:
            shape = self.weight_shape if tuple(out.shape[1:]) == self.weight_shape else self.shape[1:]
            ops.check_out(out, (len(self), *shape), self.device)
        if len(self) == 1 and self.windows.fit(self.image, self.plain):
            gradient = self._of_one()
            return gradient.unsqueeze(0).to(dtype or self.dtype) if out is None else _copied(gradient, out)
        results = []
        for b, part in _with_start(self._samples()):
            unfolded, plain = part._unfolded().flatten(0, 1), part.plain.flatten(2).unflatten(1, (self.groups, -1))
            block = None if out is None else out[b : b + len(part)]
            matrices = None
            if block is not None and block.is_contiguous():
                matrices = block.view(unfolded.shape[0], self.shape[1] // self.groups, self.shape[2])
            found = ops.outer(plain.flatten(0, 1).mT, unfolded.mT, out=matrices, dtype=dtype, backend=backend)
            if block is None:
                results.append(found.reshape(len(part), *self.weight_shape))
            elif matrices is None:
                _copied(found, block)
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
        weight = image.new_empty(self.conv_shape)
        rest = (windows.stride, pads, windows.dilation, False, [0] * len(pads), self.groups)
        gradient = _convolution_backward(self.plain, image, weight, None, *rest, (False, True, False))[1]
        return gradient.reshape(self.weight_shape)

    def _add_to(self, gradients: Tensor) -> Tensor:
        if self.groups != 1:
            return gradients.add_(self.materialize().reshape(self.shape))
        for b, part in _with_start(self._samples()):
            part._unfolded_factors()._add_to(gradients[b : b + len(part)])
        return gradients

    def _squares(self) -> Tensor:
        """By blocks of samples, unfolded one after the other."""
        squares = [ops.sq_norm(part.delta, part.activation) for part in self._samples()]
        return squares[0] if len(squares) == 1 else torch.cat(squares)

    def _norm(self, p: float) -> Tensor:
        return self._root() if p == 2 else super()._norm(p)

    def _exponents(self) -> Tensor:
        n = ranges.exponents(self.image.flatten(1)) + ranges.exponents(self.plain.flatten(1))
        return n.clamp_min(ranges.NOTHING)

    def _scaled(self, by: Tensor) -> ConvFactors:
        image, plain = widen(self.image, self.plain)
        of_plain = ranges.exponents(plain.flatten(1))
        by = torch.where(by > ranges.NOTHING, by, 0)
        return self._of(ranges.times_two_to(of_plain - by, image), ranges.times_two_to(-of_plain, plain))

    def dot(self, reference: Tensor) -> Tensor:
        """``⟨G[b], R⟩ = Σ_t p_bt · (image * R)_bt`` -> [B], R in the weight's shape or [O, I]; BTOI operations."""
        if self._is_bank(reference):
            return self.linear(reference)
        return self.linear(self._matrices(reference, "reference").unsqueeze(0)).squeeze(1)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``⟨G[b], weight[h]⟩ + bias[h]`` with weight [H, *weight_shape] -> [B, H]: the image convolved by each."""
        weight = self._matrices(weight, "weight", leading=1)
        self._refuse_groups()
        if not len(weight):  # which convolutions refuse
            return self.plain.new_zeros(len(self), 0, dtype=accumulation_type(self.dtype))
        image, plain = widen(self.image, self.plain)
        kernels = weight.reshape(-1, *self.conv_shape[1:]).to(image.dtype)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[plain.ndim - 3]
        pads = [n for pair in reversed(self.windows.padding) for n in pair]
        step = samples_a_block(self.positions * kernels.shape[0], self.device)
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


def _copied(gradients: Tensor, out: Tensor) -> Tensor:
    return out.copy_(gradients.reshape(out.shape))


def _padded_channels(x: Tensor, before: int, after: int) -> Tensor:
    """[B, C, *size] with further channels of zeros."""
    return F.pad(x.flatten(2), (0, 0, before, after)).unflatten(2, x.shape[2:])


def _with_start(parts: Iterable[ConvFactors]) -> Iterable[tuple[int, ConvFactors]]:
    start = 0
    for part in parts:
        yield start, part
        start += len(part)
