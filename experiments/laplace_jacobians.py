"""Jacobians of a network's outputs with respect to its parameters, for Laplace approximations: exact, differentiable.

    python -m experiments.laplace_jacobians

`jacobians` stands alone. `GradextGGN` and `GradextEF` are backends of laplace-torch (Daxberger et al., "Laplace redux",
NeurIPS 2021), given as ``Laplace(model, "classification", backend=GradextGGN)``. They take one backward an output.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from laplace import Laplace
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradext


def jacobians(model: nn.Module, x: Any, *, outputs: Tensor | None = None, create_graph: bool = False):
    """∂ f[b, c] / ∂ θ, the parameters that require grad flattened in the model's order -> [B, C, P], f [B, C].

    outputs [B, S]: which of the C outputs of each sample, the Jacobians being [B, S, P]. With ``create_graph`` both can
    be differentiated with respect to parameters and inputs.
    """
    with gradext.watch(model, create_graph=create_graph) as watch:
        f = model(x)
    wanted = f if outputs is None else f.gather(1, outputs)
    found = [watch.grads(column) for column in wanted.unbind(1)]
    rows = [torch.cat([grads[name].flatten(1) for name in watch.parameters], dim=1) for grads in found]
    return torch.stack(rows, dim=1), f if create_graph else f.detach()


class _Jacobians:
    """What `laplace.curvature.CurvatureInterface` asks a backend for."""

    def jacobians(self, x, enable_backprop: bool = False):
        return self._chosen(jacobians(self.model, x, create_graph=enable_backprop))

    def selected_output_jacobians(self, x, outputs: Tensor, enable_backprop: bool = False):
        outputs = outputs.view(len(outputs), -1).long()
        return jacobians(self.model, x, outputs=outputs, create_graph=enable_backprop)

    def gradients(self, x, y: Tensor):
        losses = torch.func.vmap(lambda f, y: self.lossfunc(f[None], y[None]))
        with gradext.watch(self.model) as watch:
            found = losses(self.model(x), y)
        grads = watch.grads(found)
        rows = torch.cat([grads[name].flatten(1) for name in watch.parameters], dim=1)
        return self._chosen((rows, found.detach().sum()))

    def _chosen(self, found):
        if self.subnetwork_indices is None:
            return found
        return found[0][..., self.subnetwork_indices], found[1]


class GradextGGN(_Jacobians, CurvlinopsGGN):
    """The generalised Gauss-Newton matrix."""


class GradextEF(_Jacobians, CurvlinopsEF):
    """The empirical Fisher matrix."""


def main() -> None:
    from benchmarks import measure

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)
    layers = (nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 64), nn.Tanh(), nn.Linear(64, 10))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x[:1200]), y[:1200])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    backends = {"laplace-torch": CurvlinopsGGN, "gradext": GradextGGN}
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:300], y[:300]), 100)
    for name, backend in backends.items():
        approximation = Laplace(copy.deepcopy(model), "classification", "all", "diag", backend=backend)
        approximation.fit(data)
        approximation.optimize_prior_precision()
        nll = -approximation(x[1200:1300], link_approx="probit").gather(1, y[1200:1300, None]).log().mean()
        print(f"{name}: negative log likelihood {nll:.4f} of the test images")
    calls = {name: lambda b=b: b(model, "classification").jacobians(x[:100]) for name, b in backends.items()}
    ms = {name: row["best"] for name, row in measure.in_turns(calls, 6).items()}
    print("Jacobians of 100 images: " + ", ".join(f"{name} {t:.0f} ms" for name, t in ms.items()))


if __name__ == "__main__":
    main()
