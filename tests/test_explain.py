"""Explanations are what they say, held against autograd, finite differences and written-out gradients."""

import numpy as np
import pytest
import torch

from gradext import batch_layer_grads
from gradext.novelty import NoveltyDetector, characterize
from gradext.novelty.detector import CLASSIFIER_SCORES
from gradext.novelty.explain import layer_shares, nearest_training, saliency
from gradext.novelty.scores import SCORES

FAST = {"hidden_dim": 16, "latent_dim": 4, "epochs": 20, "batch_size": 32, "learning_rate": 3e-3, "random_state": 0}


@pytest.fixture(scope="module")
def detector(digits):
    return NoveltyDetector(**FAST).fit(digits[0])


def test_layer_shares_are_those_of_the_squared_norms(detector, digits):
    X = digits[1][:9]
    shares = layer_shares(detector, X)
    assert list(shares) == ["decoder.0.weight", "decoder.2.weight"]
    grads = batch_layer_grads(detector.model_, torch.from_numpy(X).double(), layers=list(shares))
    squares = {name: g.square().sum((1, 2)) for name, g in grads.items()}
    total = sum(squares.values())
    for name, share in shares.items():
        np.testing.assert_allclose(share, (squares[name] / total).detach(), rtol=1e-9)


@pytest.mark.parametrize(
    ("score", "layer"),
    [*((score, "first") for score in (*SCORES, *CLASSIFIER_SCORES)), ("combined_whitened_norm", ("last", "first"))],
)
def test_saliency_is_the_scores_derivative(score, layer, digits):
    detector = NoveltyDetector(score, layer=layer, **FAST).fit(digits[0])
    X = 0.1 + 0.8 * digits[1][:3].astype(np.float64)
    found = saliency(detector, X)
    assert found.shape == (3, 64)
    step = 1e-6
    for pixel in (5, 20, 34, 59):
        up, down = X.copy(), X.copy()
        up[:, pixel] += step
        down[:, pixel] -= step
        difference = (detector.score_samples(down) - detector.score_samples(up)) / (2 * step)
        np.testing.assert_allclose(found[:, pixel], difference, rtol=1e-4, atol=1e-6 * np.abs(found).max())


class Attentive(torch.nn.Module):
    """Its decoder's first layer has several weights, one of them in a module of its own."""

    def __init__(self):
        super().__init__()
        attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.decoder = torch.nn.ModuleDict({"attention": attention, "last": torch.nn.Linear(8, 8)})

    def forward(self, x):
        return torch.sigmoid(self.decoder["last"](self.decoder["attention"](x, x, x)[0]))


@pytest.mark.parametrize("score", ["gradient_norm", "combined_whitened_norm"])
def test_a_layer_of_several_weights(score, digits):
    torch.manual_seed(0)
    X = digits[0].reshape(-1, 8, 8)
    detector = NoveltyDetector(score, model=Attentive(), layer=("last", "first"), epochs=3, random_state=0).fit(X)
    assert detector.layers_ == ["decoder.last.weight", "decoder.attention.in_proj_weight"]
    assert np.isfinite(detector.score_samples(X[:5])).all()
    assert saliency(detector, X[:5]).shape == (5, 8, 8)
    weights = ["decoder.attention.in_proj_weight", "decoder.attention.out_proj.weight"]
    seen = characterize(detector.model_, torch.from_numpy(X[:5]).double(), layer="decoder.attention")
    assert list(seen.gradients) == weights
    both = NoveltyDetector(score, model=Attentive(), layer="decoder.attention", epochs=3, random_state=0).fit(X)
    assert both.layers_ == weights
    assert np.isfinite(both.score_samples(X[:5])).all()


def test_shares_are_of_the_gradients_that_are_scored(digits):
    """Where the last sigmoid has saturated too, through which nothing would pass."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 9), torch.nn.Tanh(), torch.nn.Linear(9, 64), torch.nn.Sigmoid())
    with torch.no_grad():
        model[2].bias.fill_(800.0)
    X = digits[0][:100]
    detector = NoveltyDetector(model=model, epochs=0, random_state=0).fit(X)
    grads = batch_layer_grads(detector.model_, torch.from_numpy(X).double(), layers="*.weight")
    squares = {name: g.square().sum((1, 2)) for name, g in grads.items()}
    total = sum(squares.values())
    assert (total > 0).all()
    shares = layer_shares(detector, X)
    assert shares.keys() == squares.keys()
    for name, share in shares.items():
        np.testing.assert_allclose(share, squares[name] / total, rtol=1e-9)


def test_saliency_leaves_the_model_as_it_was(detector, digits):
    saliency(detector, digits[1][:2])
    assert all(p.grad is None for p in detector.model_.parameters())


def test_nearest_training_gradients_are_those_of_the_written_out_ones(detector, digits):
    index, cosine = nearest_training(detector, digits[1][:7], digits[0], k=3)
    name = "decoder.0.weight"
    G, H = (
        batch_layer_grads(detector.model_, torch.from_numpy(x).double(), layers=name)[name].flatten(1)
        for x in (digits[1][:7], digits[0])
    )

    expected = torch.nn.functional.cosine_similarity(G[:, None], H[None], dim=2).topk(3, dim=1)
    np.testing.assert_array_equal(index, expected.indices)
    np.testing.assert_allclose(cosine, expected.values.detach(), rtol=1e-9)
    itself, one = nearest_training(detector, digits[0][4:6], digits[0], k=1)
    assert itself.ravel().tolist() == [4, 5]
    np.testing.assert_allclose(one, 1, rtol=1e-9)
    both = NoveltyDetector("combined_delta_norm", layer=("last", "first"), **FAST).fit(digits[0])
    assert nearest_training(both, digits[0][4:6], digits[0], k=1)[0].ravel().tolist() == [4, 5]
    with pytest.raises(ValueError, match="k: expected 1 to 178"):
        nearest_training(detector, digits[1][:7], digits[0], k=0)
