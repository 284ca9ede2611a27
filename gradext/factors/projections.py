"""Random projections from a seed by integer arithmetic: the same on every device, and none of them is stored."""

from __future__ import annotations

import torch
from torch import Tensor


def count_sketch(x: Tensor, dim: int, seed: int, stream: int) -> Tensor:
    """Σ over the last dimension into ``dim`` buckets with random signs, both by hashing the index."""
    bucket, sign = hashes(torch.arange(x.shape[-1], device=x.device), x.dtype, dim, seed, stream)
    return x.new_zeros(*x.shape[:-1], dim).index_add(-1, bucket, x * sign)


def sketch_written(gradients: Tensor, shape: tuple[int, int], dim: int, seed: int) -> Tensor:
    """Of gradients [B, O·I] of a matrix of ``shape`` what the count sketches of their factors give -> [B, dim]."""
    (rows, row_sign), (columns, column_sign) = (
        hashes(torch.arange(size, device=gradients.device), gradients.dtype, dim, seed, stream)
        for stream, size in enumerate(shape)
    )
    bucket, sign = (rows[:, None] + columns).flatten() % dim, (row_sign[:, None] * column_sign).flatten()
    return gradients.new_zeros(len(gradients), dim).index_add(1, bucket, gradients * sign)


def hashes(index: Tensor, dtype: torch.dtype, dim: int, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """The bucket and the sign of each index."""
    hashed = _mix(index + _key(seed, stream, index.device))
    return (hashed & 0x7FFFFFFF) % dim, ((hashed >> 32) & 1).to(dtype) * 2 - 1


def signs(index: Tensor, dtype: torch.dtype, rank: int, seed: int, stream: int) -> Tensor:
    """Rows of a matrix of random signs, those of the indices [...] -> [..., rank]: exact in every type."""
    key = _key(seed, stream, index.device)
    words = torch.arange(-(-rank // 64), device=index.device)  # one number gives up to 64 signs
    hashed = _mix(_mix(index + key).unsqueeze(-1) + words)
    bits = (hashed.unsqueeze(-1) >> torch.arange(min(rank, 64), device=index.device)) & 1
    return bits.flatten(-2)[..., :rank].to(dtype) * 2 - 1


def _key(seed: int, stream: int, device: torch.device) -> Tensor:
    wrapped = (2 * seed + stream + 2**63) % 2**64 - 2**63  # any integer, to a signed 64-bit one
    return _mix(torch.full((), wrapped, device=device, dtype=torch.int64))  # filled there: a copy would be waited for


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on wrapping 64-bit integers (Steele et al., OOPSLA 2014)."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
