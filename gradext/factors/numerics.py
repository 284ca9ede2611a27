"""Shared by several kinds of factors: norms of rows and of sums of squares, cosines, clipping, blocks.

A norm is right if it is in the range of its type; if squares are not, the numbers are scaled by powers of two. For
eager tensors on the CPU the results decide whether that is needed. Deciding would wait for a GPU: there rows are summed
in fp64, and products of several positions are not scaled, so that their squares must be in range. If autograd or a
transform records, everything is scaled, so that no value decides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .. import ops, ranges
from ..backends import reference
from ..backends.reference import accumulation_type, widen

__all__ = ["clipping", "cosine", "is_eager", "root", "row_norms", "row_sq_norms", "total", "widen"]


def is_eager(*tensors: Tensor) -> bool:
    """Whether neither autograd nor a tracer records operations on the tensors."""
    return ops._is_plain(tensors)


def row_norms(x: Tensor, p: float = 2) -> Tensor:
    """``‖x[b]‖_p`` of x [B, n] -> [B]."""
    eager = is_eager(x)
    if p == 2 and eager and not ranges.may_look(x) and x.dtype != torch.float64 and x.device.type != "mps":
        wide = torch.float64  # which that device lacks
        return torch.linalg.vector_norm(x, p, dim=1, dtype=wide).to(accumulation_type(x.dtype))
    (x,) = widen(x)
    if p in (1, float("inf")) or not x.shape[1] or (eager and ranges.may_look(x)):
        return reference.row_norms(x, p)
    return reference.scaled_row_norms(x, p)


def row_sq_norms(x: Tensor) -> Tensor:
    """``‖x[b]‖²`` of x [B, n] -> [B], with derivatives of any order at zero."""
    if is_eager(x):
        return row_norms(x).square()
    (x,) = widen(x)
    by = ranges.exponents(x)
    return ranges.times_two_to(by, ranges.times_two_to(by, ranges.times_two_to(-by, x).square().sum(1)))


def root(squares: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """The roots of squared norms [B] of eager factors; ``again(rows)`` gives those that the squares cannot."""
    norms = squares.sqrt()
    if ranges.may_look(squares):
        rows = ranges.outside(squares, ranges.least_power(1, squares.dtype))
        if rows is not None:
            norms[rows] = again(rows)
    return norms


def safe_sqrt(square: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero, not infinite, as for `torch.linalg.vector_norm`."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), square)


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    return functools.reduce(torch.add, parts)


def clipping(norm: Tensor, max_norm: float) -> Tensor:
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive number, but got {max_norm!r}")
    return (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)


def cosine(dot: Tensor, norm: Tensor, length: Tensor) -> Tensor:
    """``dot / (norm · length)`` in [-1, 1], 0 where one of the norms is: dot and length [K] or neither of them."""
    if length.ndim:
        norm = norm.unsqueeze(1)
    zero = (norm == 0) | (length == 0)
    value = dot / torch.where(norm == 0, 1, norm) / torch.where(length == 0, 1, length)
    return torch.where(zero, torch.zeros_like(value), value.clamp(-1, 1))


def lengths(references: Sequence[Tensor], bank: bool) -> Tensor:
    """The norm of one reference gradient -> [], or with ``bank`` of K of them -> [K], in several tensors each."""
    rows = (r if bank else r.unsqueeze(0) for r in references)
    norms = [row_norms(r.reshape(r.shape[0], math.prod(r.shape[1:]))) for r in rows]
    norm = norms[0] if len(norms) == 1 else row_norms(torch.stack(norms, dim=1))
    return norm if bank else norm.squeeze(0)


def in_middle_of_range(*norms: Tensor) -> bool:
    """Whether products of such norms and what they are summed from stay in range, as almost always."""
    info = torch.finfo(norms[0].dtype)
    low, high = info.tiny**0.6, info.max**0.6
    return all(n.numel() == 0 or (float(n.min()) >= low and float(n.max()) <= high) for n in norms)


def largest(x: Tensor) -> float:
    """The largest absolute value in it. Waits for it."""
    if not x.numel():
        return 0.0
    low, high = x.aminmax()
    return max(-float(low), float(high))
