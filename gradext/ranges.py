"""Numbers whose squares leave the range of their type, and exact powers of two that bring them back into it.

A gradient of size 1 may have factors of 1e20 and 1e-20, whose squares are inf and 0 in fp32. Factors are scaled only
where that is needed: results are checked, and those out of range are computed again, for their samples alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = -(1 << 14)  # the exponent of a row of zeros: below every other, and twice of it too


def exponents(x: Tensor) -> Tensor:
    """The least n with ``|x| < 2^n`` over the last dimension, `NOTHING` for zeros: [..., N] -> [...] of integers."""
    if x.shape[-1] == 0:
        return torch.full(x.shape[:-1], NOTHING, dtype=torch.int32, device=x.device)
    largest = x.detach().abs().amax(-1)
    return torch.where(largest > 0, torch.frexp(largest).exponent, NOTHING)


def times_two_to(n: Tensor, x: Tensor) -> Tensor:
    """``x · 2^n`` with integers n that go with the first dimensions of x; exact but for what leaves the range."""
    limit = 252 if x.dtype == torch.float32 else 2044  # twice the largest power of two that both signs have
    n = n.clamp(-limit, limit).reshape(*n.shape, *[1] * (x.ndim - n.ndim))
    half = n // 2  # one power alone may be out of range where the result is not
    return x * torch.exp2(half.to(x.dtype)) * torch.exp2((n - half).to(x.dtype))


def may_look(x: Tensor) -> bool:
    """Whether the tensor's values may decide what is computed: reading those of a GPU would wait for it."""
    return x.device.type == "cpu"


def outside(values: Tensor, least: float) -> Tensor | None:
    """The indices of the values [B] that are not finite or below ``least``, None if there are none. Waits for them."""
    if not values.numel():
        return None
    low, high = torch.aminmax(values)
    if float(low) >= least and float(high) < float("inf"):
        return None
    return (~((values >= least) & (values < float("inf")))).nonzero().squeeze(1)


def least_power(count: int, dtype: torch.dtype) -> float:
    """The least sum of ``count`` numbers that keeps its digits when those below the type's normal ones are lost."""
    info = torch.finfo(dtype)
    return count * info.tiny / info.eps
