"""What holds between calls: order, random numbers, the caller's tensors, models that change."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradext

from .common import D, linear, squared

pytestmark = pytest.mark.usefixtures("double_precision")

B = 5


class Chain(nn.Module):
    """Layers one after the other, and a change of what comes out."""

    def __init__(self, *layers, change=lambda h: h):
        super().__init__()
        self.layers, self.change = nn.ModuleList(layers), change

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.change(x)


@pytest.mark.parametrize("training", [False, True])
def test_every_call_and_way_gives_results_in_one_order(training):
    layers = [nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 2, 2), nn.Flatten(), linear(6, 3), nn.PReLU(3)]
    model, x = nn.Sequential(*layers).train(training), torch.rand(B, 1, D)
    keys = {"target": torch.rand(B, 3), "loss": "mse"}
    orders = [list(gradext.batch_layer_factors(model, x, **keys)) for _ in range(2)]
    orders += [list(gradext.batch_layer_grads(model, x, **keys))]
    for train in (False, True):
        with gradext.watch(model, train=train) as watch:
            losses = squared(model(x), x)
        if train:
            losses.sum().backward()
        orders += [list(watch.factors(losses))]
    assert orders == [orders[0]] * 5
    assert sorted(orders[0]) == sorted(name for name, _ in model.named_parameters())


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x):
        x = self.a(F.dropout(x, 0.3) + torch.randn_like(x))
        x = x.transpose(0, 1).flatten(0, 1).unflatten(0, (x.shape[1], -1)).transpose(0, 1)
        return self.b(F.dropout(x.tanh(), 0.5)) + self.b(x[torch.arange(len(x)).flip(0)]).flip(0)


@pytest.mark.parametrize("layers", [None, "a", "b.weight"])
def test_every_call_draws_the_random_numbers_of_one_forward(layers, right):
    model, x, found = Noisy(), torch.rand(B, 3, D), []
    torch.manual_seed(0)
    losses = squared(model(x), x)
    after = torch.rand(3)
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    expected = {name: torch.stack([row[k] for row in rows]) for k, (name, _) in enumerate(model.named_parameters())}
    for _ in range(3):
        torch.manual_seed(0)
        found = gradext.batch_layer_grads(model, x, loss=squared, layers=layers)
        assert torch.equal(torch.rand(3), after)
        right(found, expected)


@pytest.mark.parametrize("last", [nn.Identity(), nn.Dropout(), nn.Unflatten(1, (2, 3)), nn.Flatten()], ids=str)
def test_auto_looks_through_what_follows_a_sigmoid(last, right):
    torch.manual_seed(0)
    model = nn.Sequential(linear(), nn.ReLU(), linear(), nn.Sigmoid(), last).eval()
    x = torch.rand(B, D)
    expected = gradext.batch_layer_grads(model, x, loss=lambda output, _: gradext.losses.bce(output.flatten(1), x))
    right(gradext.batch_layer_grads(model, x), expected)
    right(gradext.batch_layer_grads(model, x, loss="bce"), expected)


@pytest.mark.parametrize("kind", ["a sigmoid that is not the end", "a function", "a half of the features"])
def test_auto_is_the_squared_error_of_what_does_not_end_in_a_sigmoid(kind, right):
    changes = {
        "a sigmoid that is not the end": lambda h: 2 * h.sigmoid(),
        "a function": torch.tanh,
        "a half of the features": lambda h: torch.cat([h[:, :3].sigmoid(), h[:, 3:]], 1),
    }
    model, x = Chain(linear(), change=changes[kind]), torch.rand(B, D)
    right(gradext.batch_layer_grads(model, x), gradext.batch_layer_grads(model, x, loss="mse"))


def test_a_parameter_s_view_in_place_of_another_parameter(judge):
    def made():
        model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(D, D, bias=False))
        del model[2].weight
        model[2].weight = model[0].weight.t()
        return {"model": model, "x": torch.randn(B, D), "outcome": "right or refused", "frozen": False}

    judge(made)


@pytest.mark.parametrize("layers", ["0", None])
def test_a_chain_that_mixes_samples_is_refused(layers):
    model = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0), nn.Linear(B, B))
    for loss in ("mse", lambda output, target: (output - target).square()):
        with pytest.raises(gradext.CaptureError, match="samples mix"):
            gradext.batch_layer_grads(model, torch.rand(B, 1), loss=loss, target=torch.rand(B), layers=layers)


def test_the_callers_input_is_left_alone():
    model, x = nn.Sequential(nn.ReLU(inplace=True), linear(), nn.ReLU(inplace=True), linear()), torch.randn(B, D)
    target, before = x.clone(), x.clone()
    plain = before.clone()
    model(plain)  # overwrites its input
    factors = gradext.batch_layer_factors(model, x, loss="mse", target=target)
    assert torch.equal(x, plain)
    assert torch.equal(target, before)
    expected = factors["1.weight"].materialize().clone()
    x.zero_()
    target.zero_()
    assert torch.equal(factors["1.weight"].materialize(), expected)


def test_inputs_that_require_grad_get_none():
    model, x = Chain(linear(), nn.Tanh(), linear()), torch.rand(B, D, requires_grad=True)
    grads = gradext.batch_layer_grads(model, (x,), loss=squared)
    assert x.grad is None
    assert not any(g.requires_grad for g in grads.values())


def test_sparse_inputs_of_a_layer_that_is_left_out(right):
    model, x = Chain(linear(), nn.ReLU(), linear()), torch.eye(B, D)
    expected = gradext.batch_layer_grads(model, x, loss="mse", layers="layers.2")
    right(gradext.batch_layer_grads(model, x.to_sparse(), target=x, loss="mse", layers="layers.2"), expected)


def test_batches_of_every_size_after_one_another(right):
    model, x = Chain(linear(D, 3), nn.Tanh(), linear(3, D)), torch.rand(B, D)
    whole = gradext.batch_layer_grads(model, x, loss=squared)
    for rows in (B, B, 0, 1, B, 2):
        found = gradext.batch_layer_grads(model, x[:rows], loss=squared)
        right(found, {name: g[:rows] for name, g in whole.items()})


CHANGES = {
    "swap of samples": (lambda h: h.flip(0), False),
    "normalisation over the batch": (lambda h: h - h.mean(0), True),
    "product of samples": (lambda h: h * h[:1], True),
    "transposition": (lambda h: (h @ h.T)[:, :1], True),
    "powers in front": (lambda h: h.abs().pow(torch.ones(B, 1, 1))[0], False),
    "powers that mix": (lambda h: h.abs().pow(torch.ones(B, 1, 1)), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_between_calls(change, right):
    """What was seen before holds for no other graph."""
    torch.manual_seed(0)
    model, x = Chain(nn.Linear(D, B)), torch.rand(B, D)
    for _ in range(2):
        gradext.batch_layer_grads(model, x, loss=squared)
    model.change, mixes = CHANGES[change]
    if mixes:
        for _ in range(2):
            with pytest.raises(gradext.CaptureError, match="samples mix"):
                gradext.batch_layer_grads(model, x, loss=squared)
        return
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(v, parameters, retain_graph=True) for v in squared(model(x), x)]
    expected = {name: torch.stack([row[k] for row in rows]) for k, (name, _) in enumerate(model.named_parameters())}
    for _ in range(2):
        right(gradext.batch_layer_grads(model, x, loss=squared), expected)


def with_hook(factor, h):
    if h.requires_grad:
        h.register_hook(lambda g: factor * g)
    return h


def test_hooks_on_outputs_that_change_between_calls(right):
    model, x = Chain(linear(), nn.Tanh(), linear()), torch.rand(B, D)
    plain = gradext.batch_layer_grads(model, x, loss=squared)
    for factor in (1.0, 3.0, 3.0, -1.0):
        model.change = functools.partial(with_hook, factor)
        right(gradext.batch_layer_grads(model, x, loss=squared), {name: factor * g for name, g in plain.items()})


def test_an_input_that_comes_to_be_overwritten():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.overwrite = linear(), False

        def forward(self, x):
            h = x + 0
            y = self.a(h)
            if self.overwrite:
                h.zero_()
            return y

    model, x = Overwriting(), torch.rand(B, D)
    gradext.batch_layer_grads(model, x, loss="mse")
    model.overwrite = True
    for _ in range(2):
        with pytest.raises(gradext.CaptureError, match=r"a\.weight.*in place"):
            gradext.batch_layer_grads(model, x, loss="mse")


def test_a_changed_model_is_chosen_from_anew():
    """What a model consists of is looked at in every call."""
    model, x = nn.Sequential(linear(), nn.ReLU(), linear()), torch.rand(B, D)

    def names():
        return sorted(gradext.batch_layer_grads(model, x, layers="*weight*"))

    assert names() == ["0.weight", "2.weight"]
    model[2] = nn.Tanh()
    assert names() == ["0.weight"]
    model.append(linear())
    assert names() == ["0.weight", "3.weight"]
    model[3].weight = model[0].weight
    assert names() == ["0.weight"]
    model[3].weight = nn.Parameter(torch.ones(D, D))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert names() == ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1", "3.weight"]
    model[3].weight.requires_grad_(False)
    assert "3.weight" not in gradext.batch_layer_grads(model, x)


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        ("mse", torch.rand(B, 5), "target"),
        ("bce_logits", torch.full((B, D), 2.0), r"values in \[0, 1\]"),
        ("cross_entropy", torch.full((B,), 6), "out of bounds"),
        ("mse", torch.zeros(B, D, dtype=torch.int64), "floating-point"),
    ],
)
def test_wrong_targets(loss, target, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        gradext.batch_layer_grads(nn.Sequential(linear()), torch.rand(B, D), loss=loss, target=target)
