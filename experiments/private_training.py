"""Differentially private training in one pass: clipped sums of per-sample gradients without the gradients.

    python -m experiments.private_training

Trains a small network on scikit-learn's digits by DP-SGD (Abadi et al., "Deep learning with differential privacy", CCS
2016): every sample's gradient over all parameters is clipped to a norm, the clipped ones are added, and noise to the
sum. The factors give the norms and the sum; no tensor [B, O, I] exists. Accounting for the privacy that was spent is
a matter of its own (Opacus has accountants).
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import gradext


def private_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    target: Tensor,
    *,
    max_norm: float,
    noise_multiplier: float,
    generator: torch.Generator | None = None,
) -> None:
    """One optimizer step with ``(Σ_b min(1, max_norm / ‖g_b‖) g_b + max_norm · noise_multiplier · N(0, 1)) / B``."""
    factors = gradext.batch_layer_factors(model, x, loss="cross_entropy", target=target)
    parameters = dict(model.named_parameters())
    for name, total in factors.clipped_sum(max_norm).items():
        noise = torch.randn(total.shape, dtype=total.dtype, device=total.device, generator=generator)
        parameters[name].grad = (total + max_norm * noise_multiplier * noise) / len(x)
    optimizer.step()
    optimizer.zero_grad()


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
                private_step(model, optimizer, x[rows], y[rows], max_norm=1.0, noise_multiplier=noise_multiplier)
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        print(f"noise multiplier {noise_multiplier}: test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
