"""Train on the samples that matter: importance sampling by gradient norms from the factors.

    python -m experiments.importance_sampling

At each step a pool of candidates is drawn, the gradient norm of each comes from the factors at the cost of a forward
and a partial backward, and a small batch is drawn in proportion, weighted so that the expected gradient is unchanged
(Katharopoulos and Fleuret, "Not all samples are created equal", ICML 2018). Prints how much smaller the variance of
the gradient is than that of uniform batches of the same size, and how both train on scikit-learn's digits.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradext


def draw(model: nn.Module, x: Tensor, target: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows of the pool drawn in proportion to their gradient norms, and the weights that make up for it -> [size] each.

    ``Σ_k w_k g_{row k}`` has the mean over the pool as its expectation.
    """
    norms = gradext.batch_layer_factors(model, x, loss="cross_entropy", target=target).norm()
    p = norms / norms.sum()
    rows = torch.multinomial(p, size, replacement=True)
    return rows, 1 / (len(x) * size * p[rows])


def variance(model: nn.Module, x: Tensor, target: Tensor, size: int, uniform: bool, repeats: int = 50) -> float:
    """The mean squared distance of the estimate from the mean gradient over the pool."""
    factors = gradext.batch_layer_factors(model, x, loss="cross_entropy", target=target)
    mean, total = factors.mean(), 0.0
    for _ in range(repeats):
        if uniform:
            rows, weights = torch.randint(len(x), (size,)), torch.full((size,), 1 / size)
        else:
            rows, weights = draw(model, x, target, size)
        for name, f in factors.items():
            total += (f[rows].sum(weights) - mean[name]).square().sum().item()
    return total / repeats


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(labels)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = rows[:1300], rows[1300:]
    for uniform in True, False:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(601):
            pool = train[torch.randint(len(train), (256,))]
            if step in (100, 300, 600):
                ratio = variance(model, x[pool], y[pool], 16, False) / variance(model, x[pool], y[pool], 16, True)
                accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
                kind = "uniform   " if uniform else "importance"
                print(f"{kind} step {step}: test accuracy {accuracy:.3f}, variance by norms / uniform {ratio:.2f}")
            if uniform:
                chosen, weights = torch.randint(len(pool), (16,)), torch.full((16,), 1 / 16)
            else:
                chosen, weights = draw(model, x[pool], y[pool], 16)
            losses = nn.functional.cross_entropy(model(x[pool[chosen]]), y[pool[chosen]], reduction="none")
            optimizer.zero_grad()
            (weights * losses).sum().backward()
            optimizer.step()


if __name__ == "__main__":
    main()
