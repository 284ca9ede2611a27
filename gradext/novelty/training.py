"""Training of the models: summed BCE + KL, Adam, the best validation epoch kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class History:
    """Mean loss a sample by epoch, nats; ``best_epoch`` (from 0) is the one whose weights were kept."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = -1


def auto_epochs(samples: int, batch_size: int) -> int:
    """50 epochs, or on small sets as many as make 2,000 steps."""
    return max(50, math.ceil(2000 / math.ceil(samples / batch_size)))


def train(
    model: nn.Module,
    x: Tensor,
    x_validation: Tensor,
    *,
    epochs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    loss: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
    description: str = "training",
) -> History:
    """Train ``model`` in place on ``x`` [N, ...] in [0, 1] and load the weights of the best validation epoch.

    Adam on the mean over the batch of ``loss`` (x [B, ...] -> [B]; default ``model.loss``); ``epochs`` None:
    `auto_epochs`. The same seed, data, machine and thread count give the same weights; the global random state is left
    as it was. The progress bar is shown on terminals only. Raises ValueError for empty data, RuntimeError if the loss
    becomes NaN.
    """
    for name, data in (("x", x), ("x_validation", x_validation)):
        if len(data) == 0:
            raise ValueError(f"{name}: expected at least one sample, but got none")
    device = next(model.parameters()).device
    x, x_validation = x.to(device), x_validation.to(device)
    epochs = auto_epochs(len(x), batch_size) if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs: expected a positive integer, but got {epochs!r}")
    objective = model.loss if loss is None else loss
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    order = torch.Generator().manual_seed(seed)
    history, best = History(), None
    was_training = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        bar = tqdm(range(epochs), desc=description, unit="epoch", leave=False, disable=None if progress else True)
        for epoch in bar:
            model.train()
            total = torch.zeros((), device=device)
            for index in torch.randperm(len(x), generator=order).split(batch_size):
                value = objective(x[index.to(device)]).mean()
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                total += value.detach() * len(index)
            model.eval()
            with torch.no_grad():
                validation = sum(objective(b).sum().item() for b in x_validation.split(4096)) / len(x_validation)
            history.train.append(total.item() / len(x))
            history.validation.append(validation)
            if not math.isfinite(validation):
                raise RuntimeError(f"the validation loss became {validation} in epoch {epoch}; lower learning_rate")
            if best is None or validation < history.validation[history.best_epoch]:
                history.best_epoch, best = epoch, {key: value.clone() for key, value in model.state_dict().items()}
            bar.set_postfix(train=f"{history.train[-1]:.1f}", validation=f"{validation:.1f}")
    optimizer.zero_grad(set_to_none=True)
    model.load_state_dict(best)
    model.train(was_training)
    return history
