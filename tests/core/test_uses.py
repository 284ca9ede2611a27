"""Uses of parameters that once gave a wrong number, against each sample alone or ∂ losses[b] by autograd."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradext

from .common import B, Product, own_gradients

pytestmark = pytest.mark.usefixtures("double_precision")


def assert_right(found, expected):
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_an_input_given_by_name_and_overwritten_afterwards_is_refused():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3).double(), torch.rand(B, 5).double()
    with gradext.watch(model) as watch:
        inner = x * 2
        losses = F.linear(input=inner, weight=model.weight, bias=model.bias).square().sum(1)
        inner.zero_()
    with pytest.raises(gradext.CaptureError, match=r"weight.*modified in place"):
        watch.grads(losses)


def test_two_losses_of_a_registered_layer_are_two():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(5).double())

        def forward(self, x):
            return x * self.scale

    @gradext.register_layer(Scale)
    def gradients(layer, input, delta):
        return {"scale": input * delta}

    torch.manual_seed(0)
    model, x = nn.Sequential(Scale(), nn.Tanh()), torch.rand(B, 5).double()
    with gradext.watch(model) as watch:
        output = model(x)
        several = [(output * k).square().sum(1) for k in range(1, 9)]
    output = model(x)
    for k, losses in enumerate(several, 1):
        assert_right(watch.grads(losses), own_gradients(model, (output * k).square().sum(1)))


def test_ragged_rows_need_not_lie_in_the_first_dimension():
    torch.manual_seed(0)
    owners = torch.tensor([0, 1, 1, 2, 3, 3, 3])
    model = nn.Module()
    model.weight = nn.Parameter(torch.rand(3, 1).double())
    x = torch.rand(3, len(owners)).double()

    def losses_of(x):
        rows = (x * model.weight).tanh().sum(0)
        return rows.new_zeros(B).index_add(0, owners, rows)

    with gradext.watch(model, segments=owners) as watch:
        losses = losses_of(x)
    assert_right(watch.grads(losses), own_gradients(model, losses_of(x)))


@pytest.mark.filterwarnings("ignore:.*one backward a sample:UserWarning")
@pytest.mark.parametrize("options", [{}, {"train": True}, {"create_graph": True}], ids=str)
def test_a_use_that_is_seen_and_one_that_is_not_are_counted_once_each(options):
    torch.manual_seed(0)
    model, x = nn.Linear(5, 5).double(), torch.rand(B, 5).double()

    def losses_of(x):
        return Product.apply(model(x).tanh(), model.weight).square().sum(1)

    with gradext.watch(model, **options) as watch:
        losses = losses_of(x)
    found, expected = watch.grads(losses), own_gradients(model, losses_of(x))
    assert_right({name: value.detach() for name, value in found.items()}, expected)
    if options.get("create_graph"):
        plain = torch.autograd.grad(losses_of(x).sum(), model.weight, create_graph=True)[0]
        second = [torch.autograd.grad(g.square().sum(), model.weight)[0] for g in (plain, found["weight"].sum(0))]
        torch.testing.assert_close(second[1], second[0])


@pytest.mark.parametrize("training", [True, False])
def test_what_a_model_makes_of_its_weights_without_a_graph_is_constant(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 6)).double()
    x = torch.rand(B, 6).double()
    model.train(training)
    with gradext.watch(model, fallback="error") as watch:
        losses = model(x).square().sum(1)
    assert_right(watch.grads(losses), _again(model, x, losses))


def _again(model, x, losses):
    """By the power iteration's vectors as the watched run has left them."""
    model.eval()
    again = model(x).square().sum(1)
    torch.testing.assert_close(again, losses)
    return own_gradients(model, again)


def test_samples_run_one_by_one_with_a_dimension_of_one():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5).double(), torch.rand(B, 1, 6).double()
    with gradext.watch(model) as watch:
        losses = torch.stack([model(sample) for sample in x]).square().flatten(1).sum(1)
    expected = own_gradients(model, model(x).square().flatten(1).sum(1))
    assert_right(watch.grads(losses), expected)


def test_what_is_made_of_weights_that_were_not_chosen_goes_on_training_them():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), nn.Linear(5, 5)), torch.rand(B, 5)
    with nn.utils.parametrize.cached():
        gradext.batch_layer_grads(model, x, loss="mse", layers="1")
        model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("error")
def test_a_constant_that_samples_are_written_into_by_a_view_is_a_sample():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 6).double(), torch.rand(B, 6).double()

    def losses_of(x):
        rows = torch.zeros(B, 6, dtype=x.dtype)
        rows[:, :3].add_(model(x).tanh()[:, :3])
        return model(rows).square().sum(1)

    with gradext.watch(model) as watch:
        losses = losses_of(x)
    assert_right(watch.grads(losses), own_gradients(model, losses_of(x)))


class Patches(nn.Module):
    """A class token before patches, and a table of positions added to both: one delta is a part of another's memory."""

    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 6, 2, stride=2), nn.Parameter(torch.randn(1, 1, 6))
        self.positions, self.head = nn.Parameter(torch.randn(1, 5, 6)), nn.Linear(6, 3)

    def forward(self, x):
        h = self.patches(x).flatten(2).mT
        return self.head((torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.positions).tanh())


def test_deltas_that_are_parts_of_one_another_are_undone_once():
    torch.manual_seed(0)
    model, x = Patches().double(), torch.randn(4, 3, 4, 4).double()
    expected = gradext.batch_layer_grads(model, x, loss=lambda output, _: output.square().sum((1, 2)))
    with gradext.watch(model, train=True) as watch:
        losses = model(x).square().sum((1, 2))
    (losses * torch.tensor([1.0, 2.0, 0.5, 3.0])).mean().backward()
    for name, value in watch.grads().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("form", [lambda w: w, torch.exp])
def test_a_hook_on_a_parameter_is_applied_once(form, unseen):
    torch.manual_seed(0)
    linear = nn.Linear(4, 4, bias=False).double()

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            weight = form(self.linear.weight)
            return Product.apply(x, weight) if unseen else x @ weight

    linear.weight.register_hook(lambda g: 2 * g.clamp(-0.5, 0.5))
    model, x = Uses(), torch.rand(3, 4).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradext.batch_layer_grads(model, x, loss=lambda output, _: output.square().sum(1))["linear.weight"]
    for b in range(3):
        linear.weight.grad = None
        model(x[b : b + 1]).square().sum().backward()
        torch.testing.assert_close(found[b], linear.weight.grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: 1 + w,
        lambda w: w + 1,
        lambda w: w.double().float().add(torch.arange(4.0)),
        lambda w: w + w,
        lambda w: torch.add(w, torch.ones(4), alpha=2),
        lambda w: torch.add(torch.ones(4), w, alpha=2),
        lambda w: w.view(2, 2).reshape(4) + 1,
        lambda w: w + torch.ones(3, 4),
        lambda w: 1 - w,
    ],
    ids=["1 + w", "w + 1", "casts", "w + w", "alpha", "alpha of w", "views", "broadcast", "1 - w"],
)
def test_values_that_differ_from_a_parameter_by_a_constant(change):
    """As the norms of Gemma have it."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(4))

        def forward(self, x):
            return (x.unsqueeze(1) * change(self.w)).tanh()

    torch.manual_seed(0)
    model, x = Scaled(), torch.rand(3, 4)
    expected = torch.stack([torch.autograd.grad(model(x[b : b + 1]).square().sum(), model.w)[0] for b in range(3)])
    found = gradext.batch_layer_grads(model, x, loss=lambda output, target: output.square().flatten(1).sum(1))
    torch.testing.assert_close(found["w"], expected)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5).double())

    def forward(self, *tensors, x=None, shift=None):
        x = tensors[0] if tensors else x
        return self.scale * 2 if x is None else x * self.scale if shift is None else x * self.scale + shift


class Named(Weighted):
    def forward(self, x, shift):
        return x * self.scale + shift


@pytest.mark.parametrize(
    "use",
    [
        lambda layer, named, x: x * layer(),
        lambda layer, named, x: x * layer(torch.arange(5.0).double()),
        lambda layer, named, x: named(shift=torch.ones(5), x=x),
        lambda layer, named, x: layer(x, shift=layer.scale),
        lambda layer, named, x: named(layer(layer(x).tanh()), layer.scale),
    ],
    ids=["without arguments", "of a constant", "by keywords", "given its own parameter", "of several kinds"],
)
@pytest.mark.parametrize("train", [False, True])
def test_calls_of_registered_layers(use, train):
    gradext.register_layer(Weighted, Named)(lambda layer, input, delta: {"scale": input * delta})
    torch.manual_seed(0)
    model, x = nn.ModuleList([Weighted(), Named()]), torch.rand(B, 5).double()
    with gradext.watch(model, train=train) as watch:
        losses = use(*model, x).square().sum(1)
    expected = own_gradients(model, use(*model, x).square().sum(1))
    if train:
        losses.mean().backward()
    assert_right(watch.factors(losses).materialize(), expected)
