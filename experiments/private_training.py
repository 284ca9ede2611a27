"""Differentially private training in one pass: clipped sums of per-sample gradients without the gradients.

    python -m experiments.private_training

DP-SGD (Abadi et al., "Deep learning with differential privacy", CCS 2016): every sample's gradient over all parameters
is clipped to a norm, the clipped ones are added, and noise to the sum. The factors give the norms and the sum; no
tensor [B, O, I] exists. Any model, loop and loss: with the same generator the step is Opacus', noise included, and a
GPT-2 needs no change for it (its tied head counts once, its position table is nobody's batch). Trains a small network
on scikit-learn's digits. Accounting for the privacy that was spent is a matter of its own (Opacus has accountants).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import gradext


def private_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[], Tensor],
    *,
    max_norm: float,
    noise_multiplier: float,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One optimizer step with ``(Σ_b min(1, max_norm / ‖g_b‖) g_b + max_norm · noise_multiplier · N(0, 1)) / size``.

    losses() runs the model and gives each sample's own loss [B], which is returned. batch_size: the expected one if
    batches are drawn by chance (Poisson sampling); by default B.
    """
    with gradext.watch(model) as watch:
        found = losses()
    total = watch.factors(found).clipped_sum(max_norm)
    for name, parameter in watch.parameters.items():
        noise = torch.normal(0.0, max_norm * noise_multiplier, parameter.shape, device=parameter.device,
                             dtype=parameter.dtype, generator=generator)  # fmt: skip
        parameter.grad = (total[name] + noise) / (batch_size or len(found))
    optimizer.step()
    optimizer.zero_grad()
    return found.detach()


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = train_test_split(torch.tensor(images / 16).float(), torch.tensor(labels), test_size=0.3, random_state=0)
    x, x_test, y, y_test = data
    for noise_multiplier in 0.0, 0.5, 1.0, 2.0:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
        for _ in range(20):
            for rows in torch.randperm(len(x)).split(128):
                private_step(
                    model,
                    optimizer,
                    lambda rows=rows, model=model: F.cross_entropy(model(x[rows]), y[rows], reduction="none"),
                    max_norm=1.0,
                    noise_multiplier=noise_multiplier,
                )
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        print(f"noise multiplier {noise_multiplier}: test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
