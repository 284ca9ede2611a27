"""Explanations against autograd, finite differences and written gradients."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from gradext import batch_layer_grads
from gradext.novelty import NoveltyDetector, characterize
from gradext.novelty.detector import CLASSIFIER_SCORES
from gradext.novelty.explain import expected, heat, layer_shares, nearest_training, reasons, residual, saliency
from gradext.novelty.scores import SCORES

pytestmark = pytest.mark.medium

FAST = {"hidden_dim": 16, "latent_dim": 4, "epochs": 20, "batch_size": 32, "learning_rate": 3e-3, "random_state": 0}


@pytest.fixture(scope="module")
def detector(digits):
    return NoveltyDetector(**FAST).fit(digits[0])


def test_layer_shares_are_those_of_the_squared_norms(detector, digits):
    X = digits[1][:9]
    shares = layer_shares(detector, X)
    assert list(shares) == ["decoder.0.weight", "decoder.2.weight"]
    samples = detector._as_samples(X, torch.float64)
    grads = batch_layer_grads(detector.model_, samples, loss="mse", layers=list(shares))
    squares = {name: g.square().sum((1, 2)) for name, g in grads.items()}
    total = sum(squares.values())
    for name, share in shares.items():
        np.testing.assert_allclose(share, (squares[name] / total).detach(), rtol=1e-9)


@pytest.mark.medium
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
    name = "decoder.2.weight"
    G, H = (
        batch_layer_grads(detector.model_, detector._as_samples(x, torch.float64), loss="mse", layers=name)[
            name
        ].flatten(1)
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


# --- where, and which feature ----------------------------------------------------------------------------------------


def test_a_residual_is_input_minus_reconstruction(detector, digits):
    X = digits[1][:5]
    with torch.no_grad():
        z = detector._as_samples(X, torch.float64)
        difference = (z - detector.model_(z)).numpy() * detector.scaling_.span
    np.testing.assert_allclose(residual(detector, X), difference, rtol=1e-12)
    np.testing.assert_allclose(X - expected(detector, X), difference, atol=1e-9)


def stripes(rng, colours=None):
    y, x = np.mgrid[:24, :24]
    image = 120 + 60 * np.sin(x / 2 + rng.uniform(0, 6)) * np.cos(y / 3) + rng.normal(0, 8, (24, 24))
    image = image if colours is None else image[..., None] * colours
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["grey", "colours", "channels last"])
@pytest.mark.parametrize("value", [250, 10])
def test_a_map_shows_the_defect(kind, value):
    rng = np.random.default_rng(0)
    colours = None if kind == "grey" else np.array([1.0, 0.8, 0.5])
    X, T = (np.stack([stripes(rng, colours) for _ in range(n)]) for n in (200, 20))
    masks = np.zeros((20, 24, 24), bool)
    for image, mask in zip(T, masks, strict=True):
        y, x = rng.integers(1, 18, 2)
        image[y : y + 5, x : x + 5] = value
        mask[y : y + 5, x : x + 5] = True
    if kind == "colours":
        X, T = X.transpose(0, 3, 1, 2), T.transpose(0, 3, 1, 2)
    maps = heat(NoveltyDetector(random_state=0, epochs=60).fit(X), T)
    assert maps.shape == (20, 24, 24)
    assert np.mean([roc_auc_score(m.ravel(), h.ravel()) for m, h in zip(masks, maps, strict=True)]) > 0.95


def test_reasons_name_the_feature_with_value_and_expected_value():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    W, units = rng.normal(size=(3, 10)), np.logspace(0, 3, 10)

    def rows(n):
        return (rng.normal(size=(n, 3)) @ W + 0.2 * rng.normal(size=(n, 10))) * units + 50

    X, T, j = rows(1500), rows(100), rng.integers(0, 10, 100)
    right = T[np.arange(100), j].copy()
    T[np.arange(100), j] = right + 6 * X.std(0)[j]
    names = [f"column {k}" for k in range(10)]
    detector = NoveltyDetector(random_state=0).fit(pandas.DataFrame(X, columns=names))
    found = reasons(detector, pandas.DataFrame(T, columns=names))
    first = [row[0] for row in found]
    assert np.mean([reason.feature == f"column {k}" for reason, k in zip(first, j, strict=True)]) >= 0.95
    for reason, k, row in zip(first, j, T, strict=True):
        if reason.feature == f"column {k}":
            assert reason.value == row[k]
    closer = [abs(r.expected - w) < abs(r.value - w) for r, w in zip(first, right, strict=True)]
    assert np.mean(closer) > 0.9
    assert all(1 >= row[0].share >= row[1].share >= row[2].share >= 0 for row in found)


def test_a_map_of_a_table_is_refused():
    detector = NoveltyDetector(**FAST).fit(np.random.default_rng(0).normal(size=(60, 5)))
    with pytest.raises(ValueError, match="X: expected images, but samples have the shape"):
        heat(detector, np.zeros((2, 5)))
