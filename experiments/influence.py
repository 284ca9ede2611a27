"""Which training samples are wrong? Influence by inner products of gradients, from the factors.

    python -m experiments.influence

Trains on scikit-learn's digits with a tenth of the labels exchanged, then ranks the training samples by what each does
to the loss on clean validation samples, ``⟨g_train, F⁻¹ mean g_validation⟩`` with the Kronecker-factored Fisher matrix
F (Koh and Liang, "Understanding black-box predictions via influence functions", ICML 2017), and names the training
samples nearest to a test sample by the Gram matrix.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import gradext


def influence(
    model: nn.Module, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], damping: float = 0.1
) -> Tensor:
    """``⟨g_i, F⁻¹ mean_j g'_j⟩`` over all weights for every training sample i -> [N]; negative ones do harm."""
    factors, reference = _factors(model, *train), _factors(model, *validation).mean()
    inverses = gradext.GradStatistics(kron_fisher=True).partial_fit(factors).kron_inverses(damping)
    for name, (A_inv, D_inv) in inverses.items():
        reference[name] = (D_inv @ reference[name].double() @ A_inv).to(reference[name].dtype)
    return factors.dot(reference)


def nearest(model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], k: int) -> Tensor:
    """The k training samples of largest cosine between gradients, for every test sample -> [M, k]."""
    of_train, of_test = _factors(model, *train), _factors(model, *test)
    cosines = of_test.gram(of_train) / (of_test.norm()[:, None] * of_train.norm())
    return cosines.topk(k, dim=1).indices


def _factors(model: nn.Module, x: Tensor, target: Tensor) -> gradext.LayerFactors:
    return gradext.batch_layer_factors(model, x, loss="cross_entropy", target=target, layers="*.weight")


def losses(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), target, reduction="none")


def mislabelled() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """A model trained on 1,000 digits with a tenth of the labels exchanged, these, the other digits, and which."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, clean = torch.tensor(images / 16).float(), torch.tensor(labels)
    rows = torch.randperm(len(x))
    train, others = rows[:1000], rows[1000:]
    wrong = torch.rand(len(train)) < 0.1
    given = torch.where(wrong, (clean[train] + torch.randint(1, 10, (len(train),))) % 10, clean[train])
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        losses(model, x[train], given).mean().backward()
        optimizer.step()
    return model, (x[train], given), (x[others], clean[others]), wrong


def main() -> None:
    model, (x, given), (others, clean), wrong = mislabelled()
    validation, test = (others[:300], clean[:300]), (others[300:], clean[300:])
    scores = influence(model, (x, given), validation)
    print(f"{wrong.sum()} of {len(x)} labels are exchanged; AUROC of finding them")
    print(f"  by influence      {roc_auc_score(wrong, -scores):.3f}")
    print(f"  by the loss alone {roc_auc_score(wrong, losses(model, x, given).detach()):.3f}")
    found = nearest(model, (x, given), test, 5)
    same = (torch.where(wrong, -1, given)[found] == test[1][:, None]).float().mean()
    print(f"of the 5 nearest training gradients of a test sample, {same:.1%} are of its class, rightly labelled")


if __name__ == "__main__":
    main()
