"""The examples of use in other projects: each against what it claims to compute, written out."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(name: str):
    # By path: the tests run on the installed package, without the source folder on sys.path.
    spec = importlib.util.spec_from_file_location(f"gradext_experiments_{name}", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))


def gradients(model, x, y):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    return vmap(grad(loss), (None, 0, 0))(parameters, x, y)


@pytest.mark.parametrize("max_norm", [0.1, 1.0])
def test_private_step_is_that_of_clipped_gradients(problem, max_norm):
    model, x, y = problem
    found = gradients(model, x, y)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = load("private_training").private_step
    step(model, torch.optim.SGD(model.parameters(), lr=1.0), x, y, max_norm=max_norm, noise_multiplier=0.0)
    for name, p in model.named_parameters():
        mean = torch.einsum("b,b...->...", (max_norm / norms).clamp(max=1), found[name]) / len(x)
        torch.testing.assert_close(p.detach(), before[name] - mean)
        assert p.grad is None


def test_private_noise_has_the_scale_it_should(problem):
    model, x, y = problem
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    steps = []
    for seed in range(300):
        torch.nn.utils.vector_to_parameters(before.clone(), model.parameters())
        load("private_training").private_step(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            x,
            y,
            max_norm=0.5,
            noise_multiplier=2.0,
            generator=torch.Generator().manual_seed(seed),
        )
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    deviation = torch.stack(steps).std(0).mean().item()
    assert deviation == pytest.approx(0.5 * 2.0 / len(x), rel=0.03)


def test_private_step_equals_opacus(problem):
    opacus = pytest.importorskip("opacus", reason="opacus is not installed (pip install '.[peers]')")
    model, x, y = problem
    other = opacus.GradSampleModule(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    other._module.load_state_dict(model.state_dict())
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(other.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=len(x)
    )
    nn.functional.cross_entropy(other(x), y).backward()
    optimizer.step()
    step = load("private_training").private_step
    step(model, torch.optim.SGD(model.parameters(), lr=1.0), x, y, max_norm=0.3, noise_multiplier=0.0)
    for mine, theirs in zip(model.parameters(), other._module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)  # theirs divides by the norm plus 1e-6


def test_influence_is_the_inner_product_with_the_preconditioned_gradient(problem):
    model, x, y = problem
    influence = load("influence").influence(model, (x[:8], y[:8]), (x[8:], y[8:]), damping=1e14)
    # Damping that outweighs the Fisher matrix leaves the plain inner product, layer by layer up to its scale.
    found = gradients(model, x, y)
    dots = 0
    with torch.no_grad():
        inputs = {"0.weight": x[:8], "2.weight": model[:2](x[:8])}
    for name, a in inputs.items():
        delta = found[name.replace("weight", "bias")][:8]
        scale = 1e14 * a.square().mean() * delta.square().mean()
        dots += (found[name][:8].flatten(1) @ found[name][8:].mean(0).flatten()) / scale
    torch.testing.assert_close(influence, dots, rtol=1e-5, atol=0)


def test_nearest_gradients(problem):
    model, x, y = problem
    nearest = load("influence").nearest(model, (x, y), (x[:5], y[:5]), 2)
    assert nearest[:, 0].tolist() == list(range(5))


def test_importance_weights_leave_the_mean_gradient_unchanged(problem):
    model, x, y = problem
    torch.manual_seed(0)
    module = load("importance_sampling")
    rows, weights = module.draw(model, x, y, 200_000)
    found = gradients(model, x, y)
    for name in "0.weight", "2.weight":
        mean = found[name].mean(0)
        drawn = torch.zeros(len(x), dtype=torch.float64).index_add(0, rows, weights)
        estimate = torch.einsum("b,b...->...", drawn, found[name])
        assert (estimate - mean).norm() < 0.02 * found[name].flatten(1).norm(dim=1).mean()
    assert module.variance(model, x, y, 4, uniform=False, repeats=400) < module.variance(
        model, x, y, 4, uniform=True, repeats=400
    )
