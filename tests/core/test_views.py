"""Calls whose result is a view in another order, or is changed in place afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradext
from gradext import CaptureError

CALLS = {
    "a view in another order": lambda x, W: torch.einsum("bi,bj,ij->bj", x, x, W),
    "a square one": lambda x, W: torch.einsum("bi,ij->jb", x, W).T,
    "rows behind": lambda x, W: torch.einsum("bi,bj,ij->jb", x, x, W).T,
    "a product": lambda x, W: x @ W,
    "one dimension less": lambda x, W: F.conv1d(x.view(-1, 3, 2).mT, W[:3, :4].reshape(3, 2, 2)).flatten(1),
    "elementwise": lambda x, W: torch.maximum(x, W[0]),
}
AFTERWARDS = {
    "nothing": lambda y: y,
    "an activation": lambda y: y.sigmoid_(),
    "a factor": lambda y: y.mul_(3),
    "several": lambda y: y.mul_(3).add_(1).tanh_(),
    "a part": lambda y: y[:, 1:].mul_(2) is None or y,
}


class Calls(nn.Module):
    def __init__(self, call, afterwards) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 6, dtype=torch.float64) + 0.2)
        self.call, self.afterwards = call, afterwards

    def forward(self, x: Tensor) -> Tensor:
        return self.afterwards(self.call(x, self.weight))


def squared(output: Tensor, target: Tensor | None) -> Tensor:
    return (output - 0.3).square().flatten(1).sum(1)


@pytest.mark.parametrize("afterwards", AFTERWARDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("B", [1, 4, 6])  # 6: as many as there are features
def test_the_gradients_are_those_of_each_sample_alone(call, afterwards, B):
    torch.manual_seed(0)
    model, x = Calls(CALLS[call], AFTERWARDS[afterwards]), torch.rand(B, 6, dtype=torch.float64)
    found = gradext.batch_layer_grads(model, x, loss=squared)["weight"]
    for b in range(B):
        (expected,) = torch.autograd.grad(squared(model(x[b : b + 1]), None).sum(), model.weight)
        torch.testing.assert_close(found[b], expected, rtol=1e-10, atol=1e-12)


def test_an_operand_that_is_overwritten_later_is_refused():
    """As by autograd itself, which saves it."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, x):
            h = x * 1
            y = h * self.scale
            h += 1
            return y + h

    model, x = Late(), torch.rand(4, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared(model(x), None).sum().backward()
    with pytest.raises(CaptureError, match="scale: the input of mul was modified in place"):
        gradext.batch_layer_grads(model, x, loss=squared)
