"""The operators in plain torch: readable, right on every device, and the oracle of the other backends.

Shapes: delta [B, (T,) O], activation [B, (T,) I]; ``G[b] = Σ_t delta[b, t] activation[b, t]ᵀ`` is the per-sample
gradient, [B, O, I]. Half-precision inputs are widened to fp32 first; they are small beside the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Intermediates are cut to blocks of about this many elements, which stay in a cache of a few MB.
BLOCK_ELEMENTS = 1 << 20


def available() -> str | None:
    return None


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(accumulation_type(t.dtype)) for t in tensors)


def outer(delta: Tensor, activation: Tensor, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``out[b] = Σ_t delta[b, t] activation[b, t]ᵀ`` -> [B, O, I]."""
    dtype = out.dtype if out is not None else dtype or delta.dtype
    delta, activation = widen(delta, activation)
    if delta.ndim == 2:
        delta, activation = delta.unsqueeze(-1), activation.unsqueeze(-2)
        if out is not None:
            return torch.mul(delta, activation, out=out)
        return (delta * activation).to(dtype)
    result = torch.bmm(delta.transpose(1, 2), activation)
    return result.to(dtype) if out is None else out.copy_(result)


def sq_norm(delta: Tensor, activation: Tensor) -> Tensor:
    """``‖G[b]‖² = Σ_ts (δ_t·δ_s)(a_t·a_s)`` -> [B].

    T = 1: ``‖δ‖²‖a‖²``, B(O + I) operations. T > 1: the T x T Gram matrices, BT²(O + I), or the gradients themselves,
    BTOI, whichever is fewer, in blocks of samples.
    """
    delta, activation = widen(delta, activation)
    if delta.ndim == 2:
        # One pass over each factor, where an inner product takes two and a temporary.
        norm = torch.linalg.vector_norm
        return (norm(delta, dim=1) * norm(activation, dim=1)).square()
    B, T, O = delta.shape
    I = activation.shape[2]
    by_gram = T * (O + I) <= O * I
    step = max(1, BLOCK_ELEMENTS // max(1, T * T if by_gram else O * I))
    result = delta.new_zeros(B)
    for b in range(0, B, step):
        d, a = delta[b : b + step], activation[b : b + step]
        if by_gram:
            product = torch.bmm(d, d.mT).mul_(torch.bmm(a, a.mT)).flatten(1).sum(1)
        else:
            gradient = torch.bmm(d.mT, a).flatten(1)
            product = torch.linalg.vecdot(gradient, gradient)
        # A sum of squares; rounding of the Gram form can fall below zero when the terms cancel.
        result[b : b + step] = product.clamp_min_(0)
    return result


def dot(delta: Tensor, activation: Tensor, reference: Tensor) -> Tensor:
    """``⟨G[b], reference⟩ = Σ_t δ_tᵀ R a_t`` with R [O, I] -> [B]; BTOI operations, intermediate BT·min(O, I)."""
    delta, activation, reference = widen(delta, activation, reference)
    rows_delta, rows_activation = delta.flatten(0, -2), activation.flatten(0, -2)
    if reference.shape[1] <= reference.shape[0]:
        value = torch.linalg.vecdot(rows_delta @ reference, rows_activation)
    else:
        value = torch.linalg.vecdot(rows_activation @ reference.mT, rows_delta)
    return value if delta.ndim == 2 else value.reshape(delta.shape[:2]).sum(1)


def linear(delta: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
    """``y[b, h] = ⟨G[b], weight[h]⟩`` with weight [H, O, I] -> [B, H].

    T = 1: the longer of O and I is contracted first by matrix products, BHOI operations; the intermediate BH·min(O, I)
    is cut into blocks of samples. T > 1: the same for every position, BTHOI, or through blocks of gradients,
    BOI(T + H), whichever is fewer.
    """
    delta, activation, weight = widen(delta, activation, weight)
    B, (H, O, I) = delta.shape[0], weight.shape
    if delta.ndim == 3:
        T = delta.shape[1]
        if T * H <= T + H:
            rows = linear(delta.flatten(0, 1), activation.flatten(0, 1), weight)
            return rows.reshape(B, T, H).sum(1)
        step, flat = max(1, BLOCK_ELEMENTS // max(1, O * I)), weight.reshape(H, O * I).mT
        blocks = [
            torch.bmm(delta[b : b + step].mT, activation[b : b + step]).flatten(1) @ flat for b in range(0, B, step)
        ]
        return torch.cat(blocks) if blocks else delta.new_zeros(B, H)
    step = max(1, BLOCK_ELEMENTS // max(1, H * min(O, I)))
    result = delta.new_empty(B, H)
    for b in range(0, B, step):
        d, a = delta[b : b + step], activation[b : b + step]
        if I <= O:
            result[b : b + step] = torch.linalg.vecdot(torch.matmul(d, weight), a).mT
        else:
            rows = (a @ weight.reshape(H * O, I).mT).unflatten(1, (H, O))
            result[b : b + step] = torch.linalg.vecdot(rows, d.unsqueeze(1))
    return result
