"""Where the graph says that samples lie; functions that mix or move them need a proof."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge

from gradext.rows import Rows, read_structure

pytestmark = pytest.mark.usefixtures("double_precision")

B = 4


def state_of(function, shape=(B, B, B)):
    """Of the input of ``function``, whose output holds the samples in its first dimension."""
    h = torch.randn(shape, requires_grad=True) * 1
    losses = function(h).flatten(1).sum(1)
    return read_structure(get_gradient_edge(losses), B, set()).of(get_gradient_edge(h))


APART = {
    "fft along features": lambda x: torch.fft.fft(x, dim=2).real,
    "padded features": lambda x: F.pad(x, (1, -1)),
    "rolled features": lambda x: x.roll(1, 2),
    "sum so far over features": lambda x: x.cumsum(1),
    "sorted features": lambda x: x.sort(2).values,
    "complex numbers": lambda x: torch.view_as_real(torch.complex(x, x)).sum(3),
    "a product": lambda x: x @ torch.randn(B, B),
}
MIXED = {
    "fft over the batch": lambda x: torch.fft.fft(x, dim=0).real,
    "padded batch": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "rolled": lambda x: x.roll(1),
    "rolled batch": lambda x: x.roll(1, 0),
    "softmax over the batch": lambda x: x.softmax(0),
    "sum so far over the batch": lambda x: x.cumsum(0),
    "renormalised along features": lambda x: x.renorm(2, 1, 1.0),
    "renormalised along the last": lambda x: x.renorm(2, 2, 1.0),
    "a product summed over the batch": lambda x: torch.addbmm(torch.zeros(B, B), x, x),
    "flipped batch": lambda x: x.flip(0),
    "sorted batch": lambda x: x.sort(0).values,
    "the batch times itself": lambda x: x.flatten(1) @ x.flatten(1).mT,
    "less its mean": lambda x: x - x.mean(0),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "attention over the batch": lambda x: F.scaled_dot_product_attention(*[x[None].transpose(1, 2)] * 3)[0].transpose(
        0, 1
    ),
}


@pytest.mark.parametrize("name", APART)
def test_samples_stay_apart(name):
    assert state_of(APART[name]) == Rows(0)


@pytest.mark.parametrize("name", MIXED)
def test_nothing_that_mixes_or_moves_samples_passes_unproved(name):
    assert not isinstance(state_of(MIXED[name]), Rows)


def test_samples_behind_other_dimensions():
    assert state_of(lambda x: x.transpose(0, 1)) == Rows(1)
    assert state_of(lambda x: x.unflatten(0, (2, B)).transpose(0, 1), (2 * B, 3)) == Rows(0, 2, 1)
    assert state_of(lambda x: x.unflatten(0, (B, 2)), (2 * B, 3)) == Rows(0, 1, 2)
    assert state_of(lambda x: torch.view_as_real(torch.complex(x, x)).sum(3).transpose(0, 1)) == Rows(1)
