"""Jacobian descent from the factors: the Gramian that TorchJD's engine gives, and the step, from one partial backward.

    python -m experiments.gramian

TorchJD (Quinton and Rey, "Jacobian descent for multi-objective optimization", 2024) weighs the samples of a batch, or
the tasks of each sample, by the Gramian of their gradients. Its engine writes each layer's Jacobian, and a backward
with the weights follows; the factors give both without either. Modules that are used again, tied parameters, parameters
used without their module and batch norm in eval mode are right, and no hooks stay on the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradext


def columns_of(watch: gradext.watch, losses: Tensor) -> list[gradext.LayerFactors]:
    """The factors of each column of the losses, [B] or [B, K]."""
    return [watch.factors(column) for column in losses.view(len(losses), -1).unbind(1)]


def gramian(columns: Sequence[gradext.LayerFactors]) -> Tensor:
    """``J Jᵀ`` of all losses, those of a sample together -> [BK, BK]."""
    K = len(columns)
    blocks = {(k, j): columns[k].gram(columns[j]) for k in range(K) for j in range(k, K)}
    rows = [[blocks[k, j] if k <= j else blocks[j, k].mT for j in range(K)] for k in range(K)]
    return torch.stack([torch.stack(row, dim=2) for row in rows], dim=1).flatten(2).flatten(0, 1)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, losses: Callable, weighting: Callable) -> Tensor:
    """One step along ``Jᵀ weighting(J Jᵀ)``; returns ``losses()``, [B] or [B, K].

    ``weighting`` is any of TorchJD's that take a Gramian.
    """
    with gradext.watch(model) as watch:
        found = losses()
    columns = columns_of(watch, found)
    weights = weighting(gramian(columns)).view(len(found), -1).unbind(1)
    sums = [factors.sum(w) for factors, w in zip(columns, weights, strict=True)]
    for name, parameter in watch.parameters.items():
        parameter.grad = torch.stack([part[name] for part in sums]).sum(0) if len(sums) > 1 else sums[0][name]
    optimizer.step()
    optimizer.zero_grad()
    return found.detach()


def main() -> None:
    from torchjd.aggregation import MeanWeighting
    from torchjd.autogram import Engine

    from benchmarks import measure

    def relu(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), nn.Flatten(), layers[-1])

    torch.manual_seed(0)
    y = torch.randint(10, (64,))
    cases = {
        "perceptron": (relu(nn.Linear(784, 512), nn.Linear(512, 512), nn.Linear(512, 10)), torch.randn(64, 784)),
        "convolutions": (
            relu(nn.Conv2d(1, 16, 3, 2), nn.Conv2d(16, 32, 3, 2), nn.Linear(1152, 10)),
            torch.randn(64, 1, 28, 28),
        ),
    }
    weighting = MeanWeighting()  # the cheapest, so that the Gramian's time is seen
    for name, (model, x) in cases.items():
        other = copy.deepcopy(model)
        engine, optimizers = Engine(other, batch_dim=0), [torch.optim.SGD(m.parameters(), 0.1) for m in (model, other)]

        def ours(model=model, x=x, optimizer=optimizers[0]) -> None:
            descend(model, optimizer, lambda: F.cross_entropy(model(x), y, reduction="none"), weighting)

        def theirs(model=other, x=x, optimizer=optimizers[1], engine=engine) -> None:
            losses = F.cross_entropy(model(x), y, reduction="none")
            losses.backward(weighting(engine.compute_gramian(losses)))
            optimizer.step()
            optimizer.zero_grad()

        ms = {way: row["best"] for way, row in measure.in_turns({"TorchJD": theirs, "gradext": ours}, 6).items()}
        print(f"{name}, 64 samples, a step: " + ", ".join(f"{way} {t:.1f} ms" for way, t in ms.items()))


if __name__ == "__main__":
    main()
