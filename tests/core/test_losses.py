"""Named losses: values, the choice that "auto" makes, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradext
from gradext.losses import LOSSES, checked, in_full_precision


def per_sample_loss(name, output, target):
    loss, target = checked(name, output, target)
    return in_full_precision(LOSSES[loss], output, target)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3), (5, 2, 3, 4), (0, 3), (5, 0)])
@pytest.mark.parametrize("name", ["bce", "bce_logits", "mse"])
def test_sums_over_everything_but_the_batch(name, shape):
    torch.manual_seed(0)
    output, target = torch.rand(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    p = output.sigmoid() if name == "bce_logits" else output
    terms = (p - target).square() if name == "mse" else -(target * p.log() + (1 - target) * (1 - p).log())
    torch.testing.assert_close(
        per_sample_loss(name, output, target), terms.flatten(1).sum(1) if len(shape) > 1 else terms
    )


def test_cross_entropy_of_classes_and_of_positions():
    torch.manual_seed(0)
    for shape in (5, 4), (5, 4, 3), (5, 4, 2, 3):
        output, target = torch.randn(shape), torch.randint(4, (5, *shape[2:]))
        expected = [F.cross_entropy(o[None], t[None], reduction="sum") for o, t in zip(output, target, strict=True)]
        torch.testing.assert_close(per_sample_loss("cross_entropy", output, target), torch.stack(expected))
        soft = torch.softmax(torch.randn(shape), 1)
        expected = [F.cross_entropy(o[None], t[None], reduction="sum") for o, t in zip(output, soft, strict=True)]
        torch.testing.assert_close(per_sample_loss("cross_entropy", output, soft), torch.stack(expected))


ENDINGS = {
    "sigmoid": (torch.sigmoid, "bce"),
    "sigmoid in place": (lambda y: y.clone().sigmoid_(), "bce"),
    "sigmoid, then moved": (lambda y: y.sigmoid().view(5, 2, 3).permute(0, 2, 1).flatten(1).unsqueeze(1), "bce"),
    "sigmoid, then cast": (lambda y: y.sigmoid().double(), "bce"),
    "a hooked module": (lambda y: hooked()(y), "bce"),
    "tanh": (torch.tanh, "mse"),
    "scaled sigmoid": (lambda y: 2 * y.sigmoid(), "mse"),
    "nothing": (lambda y: y, "mse"),
}


def hooked() -> nn.Module:
    module = nn.Sigmoid()
    module.register_full_backward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("ending", ENDINGS)
def test_auto_knows_a_sigmoid(ending):
    torch.manual_seed(0)
    function, expected = ENDINGS[ending]
    output = function(torch.randn(5, 6, requires_grad=True) * 1)
    target = torch.rand(output.shape)
    value = per_sample_loss("auto", output, target)
    torch.testing.assert_close(value, LOSSES[expected](output, target.to(output.dtype)))
    target[3] = 1.5  # the loss is the model's, not the values'
    if expected == "bce":
        with pytest.raises(
            ValueError, match=r"values in \[0, 1\] for loss='auto' \(the model ends in a sigmoid\).*les 3"
        ):
            per_sample_loss("auto", output, target)
    else:
        value = per_sample_loss("auto", output, target)
        torch.testing.assert_close(value, LOSSES["mse"](output, target.to(output.dtype)))


def test_half_precision_outputs_are_summed_in_single():
    output, target = torch.full((2, 5000), 0.1, dtype=torch.bfloat16), torch.zeros(2, 5000)
    with torch.autocast("cpu", torch.bfloat16):
        for name in "mse", "bce", "bce_logits":
            value = per_sample_loss(name, output, target)
            assert value.dtype == torch.float32
            torch.testing.assert_close(
                value.double(), LOSSES[name](output.double(), target.double()), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("name", ["bce", "bce_logits"])
@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), float("inf")])
def test_targets_outside_the_unit_interval_are_refused(name, wrong):
    target = torch.rand(2, 3)
    target[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"target: expected values in \[0, 1\] for loss='{name}'"):
        per_sample_loss(name, torch.rand(2, 3), target)


def test_wrong_types_and_shapes_are_refused():
    output = torch.rand(2, 3)
    with pytest.raises(TypeError, match=r"target: expected a floating-point tensor.*uint8.*255"):
        per_sample_loss("mse", output, torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="target: expected a tensor for loss='auto', but got list"):
        per_sample_loss("auto", output, [1, 2])
    with pytest.raises(TypeError, match="output: expected a floating-point tensor"):
        per_sample_loss("mse", torch.zeros(2, 3, dtype=torch.int64), output)
    for shape in (3, 2), (2, 4), (6,):
        with pytest.raises(ValueError, match=r"target: expected the model output's shape \(2, 3\)"):
            per_sample_loss("mse", output, torch.rand(shape))
    with pytest.raises(
        ValueError, match=r"loss: expected 'auto', one of \['bce', 'bce_logits', 'cross_entropy', 'mse'\]"
    ):
        per_sample_loss("MSE", output, output)


@pytest.mark.parametrize(("name", "tail"), [("bce", True), ("auto", True), ("bce_logits", False), ("mse", False)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_closed_form_deltas_equal_the_general_route(name, tail, create_graph):
    """A named loss begins at its closed form, the same loss as a callable at its value."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5), *([nn.Sigmoid()] if tail else [])).double()
    x = torch.rand(6, 5, dtype=torch.float64)
    # The oracle of a binary cross entropy is the one of logits: torch's own loses digits in its second derivative.
    found = gradext.batch_layer_grads(model, x, loss=name, create_graph=create_graph)
    oracle, general = (model[:-1], LOSSES["bce_logits"]) if tail else (model, LOSSES[name])
    expected = gradext.batch_layer_grads(oracle, x, loss=general, create_graph=create_graph)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-14)
    if create_graph:
        penalties = [sum(value.square().sum() for value in grads.values()) for grads in (found, expected)]
        for a, b in zip(*(torch.autograd.grad(p, list(model.parameters())) for p in penalties), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_closed_form_stays_exact_where_the_sigmoid_saturates():
    """fp32 sigmoids are exactly 1 from 17 on, where torch's own gradient of the loss vanishes: p - t does not."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Sigmoid())
    nn.init.constant_(model[0].weight, 40.0)
    x = torch.tensor([[1.0], [0.5]])
    grads = gradext.batch_layer_grads(model, x, target=torch.tensor([[0.0], [0.25]]), loss="bce")["0.weight"]
    torch.testing.assert_close(grads.flatten(), torch.tensor([1.0, 0.375]))


def test_hooks_on_the_output_are_not_skipped():
    """A hook that changes the gradient at the sigmoid's output counts, as it does for torch."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            output = torch.sigmoid(self.linear(x))
            if output.requires_grad:
                output.register_hook(lambda gradient: 3 * gradient)
            return output

    torch.manual_seed(0)
    model, x = Scaled().double(), torch.rand(4, 3, dtype=torch.float64)
    found = gradext.batch_layer_grads(model, x, loss="bce")["linear.weight"]
    expected = gradext.batch_layer_grads(model, x, loss=LOSSES["bce"])["linear.weight"]
    torch.testing.assert_close(found, expected)


def test_a_classifier_without_target_is_told_what_to_pass():
    model, x = nn.Linear(6, 3), torch.rand(4, 6)
    advice = r"target: expected class indices of shape \(4,\) .* got torch.float32 of .*; pass target=labels"
    for labels in ({}, {"target": x}):
        with pytest.raises(ValueError, match=advice):
            gradext.batch_layer_grads(model, x, loss="cross_entropy", **labels)
    with pytest.raises(ValueError, match=r"got torch\.int64 of shape"):
        gradext.batch_layer_grads(model, x, loss="cross_entropy", target=torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected the model output's shape .* pass target="):
        gradext.batch_layer_grads(model, x)
