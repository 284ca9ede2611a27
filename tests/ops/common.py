"""What the operators' tests share: drawn factors, and outputs with guards around them."""

from __future__ import annotations

import torch

CANARY = 7.0


def factors(B, T, O, I, dtype=torch.float32, seed=0, device="cpu"):
    """delta [B, T, O] and activation [B, T, I], without T where it is None; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    leading = (B,) if T is None else (B, T)
    return [torch.randn(*leading, n, generator=generator, dtype=torch.float64).to(device, dtype) for n in (O, I)]


def guarded(B, O, I, dtype, gap_o=0, gap_b=0, offset=0):
    """An output with gaps between rows and samples, and the memory around it full of canaries."""
    out_o, out_b = I + gap_o, O * (I + gap_o) + gap_b
    memory = torch.full((offset + B * out_b + 64,), CANARY, dtype=dtype)
    return memory, memory.as_strided((B, O, I), (out_b, out_o, 1), offset)


def assert_nothing_else_written(memory, out):
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    assert (memory[outside] == CANARY).all()
