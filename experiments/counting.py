"""What a tiny GPT-2 learns in seconds: rows of numbers that count up from anywhere, and among them rows of noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

LENGTH, VOCABULARY = 12, 50


def rows(count: int, noisy: int = 8) -> Tensor:
    """[count, LENGTH] of numbers; every ``noisy``-th row is noise."""
    ids = torch.arange(LENGTH) + torch.randint(VOCABULARY - LENGTH, (count, 1))
    ids[::noisy] = torch.randint(VOCABULARY, (len(ids[::noisy]), LENGTH))
    return ids


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    size = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**size, **drop, bos_token_id=0, eos_token_id=0))


def losses(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The mean cross entropy of each row's next numbers -> [B]."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
