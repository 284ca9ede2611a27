"""Raw data: spikes, sentinels, heavy tails, images of every type and arrangement."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from gradext.novelty import ConvVAE, NoveltyDetector
from gradext.novelty.scaling import SOFT, fit_scaling
from gradext.novelty.scores import SCORES

pytestmark = [pytest.mark.medium, pytest.mark.filterwarnings("ignore::gradext.novelty.DetectorWarning")]
SHORT = {"hidden_dim": 32, "latent_dim": 4, "epochs": 20, "random_state": 0}


def shifted(rng, N=400, D=5, by=4.0):
    """Normal training samples, as many for testing, and novel ones beside them."""
    X, T, O = (rng.normal(0, 1, (n, D)) for n in (N, N // 2, N // 2))
    return X, np.r_[T, O + by], np.r_[np.zeros(N // 2), np.ones(N // 2)]


# --- tables ----------------------------------------------------------------------------------------------------------


def spiked(X, rng):
    X[0] = 1e4


def with_sentinels(X, rng):
    X[rng.random(len(X)) < 0.06, 2] = -9999


def heavy_tailed(X, rng):
    X[:, 1] = np.exp(3 * X[:, 1])


def constant(X, rng):
    X[:, 3] = 1e6


@pytest.mark.parametrize("spoil", [spiked, with_sentinels, heavy_tailed, constant])
def test_what_spoils_a_column_leaves_the_others_their_room(spoil):
    rng = np.random.default_rng(0)
    X, T, y = shifted(rng)
    clean = roc_auc_score(y, -NoveltyDetector(random_state=0).fit(X).score_samples(T))
    spoil(X, rng)
    if spoil in (heavy_tailed, constant):
        spoil(T, rng)
    found = roc_auc_score(y, -NoveltyDetector(random_state=0).fit(X).score_samples(T))
    assert clean > 0.97
    assert found > clean - 0.03


def test_columns_of_any_unit_count_alike():
    rng = np.random.default_rng(1)
    X, T, _ = shifted(rng)
    units = np.array([1e-8, 1e-3, 1.0, 1e5, 1e9])
    plain, other = (
        NoveltyDetector(random_state=0).fit(A).score_samples(B) for A, B in ((X, T), (X * units, T * units))
    )
    np.testing.assert_allclose(other, plain, rtol=1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("model", ["autoencoder", "vae"])
@pytest.mark.parametrize("value", [-9999, 1e6, 1e300])
def test_a_feature_that_saturates_the_model_is_not_normal(score, model, value):
    """Its gradient may be exactly zero: the most normal of all, if nothing else were asked."""
    if model == "autoencoder" and ("latent" in score or score in ("joint_density", "combined_evidence")):
        model = "auto"
    rng = np.random.default_rng(0)
    X = rng.normal(0, 1, (200, 6)) * 10 + 50
    detector = NoveltyDetector(score, model=model, **SHORT).fit(X)
    for feature in range(6):
        T = X[:50].copy()
        T[0, feature] = value
        novelty = -detector.score_samples(T)
        assert novelty[0] > novelty[1:].max(), (feature, novelty[0], novelty[1:].max())
        assert detector.p_values(T)[0] < 0.2


def test_a_saturated_model_of_ones_own_is_not_believed():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4), torch.nn.Sigmoid())
    X = np.random.default_rng(0).random((200, 4))
    detector = NoveltyDetector("gradient_norm", model=model, layer="first", scaling="none", epochs=20, random_state=0)
    detector.fit(X)
    T = np.r_[X[:20], -1e4 * np.ones((1, 4)), 1e4 * np.ones((1, 4))]
    novelty = -detector.score_samples(T)
    assert novelty[-2:].min() > novelty[:-2].max()


def test_scaling_is_its_formula():
    rng = np.random.default_rng(0)
    X = np.c_[
        rng.normal(5, 2, 1000), np.where(rng.random(1000) < 0.1, -9999, rng.normal(0, 1, 1000)), np.full(1000, 7.0)
    ]
    scaling = fit_scaling(X, [np.arange(1000)], (3,), "auto", centred=True)
    assert scaling.shift[0] == pytest.approx(5, abs=0.2)
    assert scaling.scale[0] == pytest.approx(2, abs=0.2)
    assert 0.5 < scaling.scale[1] < 3
    assert (scaling.shift[2], scaling.scale[2]) == (7, 7)
    u = (X - scaling.shift) / scaling.scale
    expected = np.where(np.abs(u) <= SOFT, u, np.sign(u) * (SOFT + np.log1p(np.abs(u) - SOFT)))
    np.testing.assert_allclose(scaling(X), expected, rtol=1e-12)
    np.testing.assert_allclose(scaling.inverse(scaling(X)), X, rtol=1e-9)
    unit = fit_scaling(X, [np.arange(1000)], (3,), "auto", centred=False)
    assert (unit(X).min(0)[:2], unit(X).max(0)[:2]) == (pytest.approx([0, 0]), pytest.approx([1, 1]))
    np.testing.assert_allclose(unit.inverse(unit(X)), X, rtol=1e-9)
    assert scaling.excess(X).max() == 0
    assert scaling.excess(X[:1] + np.array([[1e4, 0, 0]]))[0] > 100


def test_quantiles_of_a_sample_are_taken_over_all_blocks(monkeypatch):
    monkeypatch.setattr("gradext.novelty.scaling.SAMPLED", 3000)
    X = np.sort(np.random.default_rng(0).normal(0, 1, (9000, 2)), axis=0)
    scaling = fit_scaling(X, np.array_split(np.arange(9000), 13), (2,), "auto", centred=True)
    np.testing.assert_allclose(scaling.scale, X.std(0), rtol=0.1)
    np.testing.assert_allclose(scaling.shift, 0, atol=0.1)


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels():
    """Grey images in bytes [N, 16, 16], a bright square on a dark ground."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 40, (150, 16, 16))
    for image, (y, x) in zip(images, rng.integers(2, 6, (150, 2)), strict=True):
        image[y : y + 8, x : x + 8] += 200
    return images.astype(np.uint8)


@pytest.mark.parametrize(
    "form",
    [
        lambda a: a.astype(float),
        lambda a: a.astype(np.int64),
        lambda a: a.reshape(len(a), -1).astype(np.int64),
        lambda a: a.reshape(len(a), -1).astype(np.float32),
        lambda a: a[:, None].astype(np.int16),
    ],
    ids=["float", "int64", "flat int64", "flat float32", "int16 [1, H, W]"],
)
def test_images_in_0_to_255_are_images_in_every_type(form, pixels):
    expected = NoveltyDetector(**SHORT).fit(pixels)
    found = NoveltyDetector(**SHORT).fit(form(pixels))
    assert (found.scale_ == 255).all()
    np.testing.assert_allclose(found.score_samples(form(pixels)), expected.score_samples(pixels), rtol=1e-9)


def test_images_of_16_bits_keep_their_levels(pixels):
    deep = pixels.astype(np.uint16) * 16 + np.random.default_rng(1).integers(0, 16, pixels.shape).astype(np.uint16)
    detector = NoveltyDetector(**SHORT).fit(deep)
    assert (detector.scale_ == 4095).all()
    assert len(np.unique(detector.scaling_.units(deep.reshape(150, -1)))) == len(np.unique(deep))


def test_tables_are_not_taken_for_images():
    rng = np.random.default_rng(0)
    for X in (rng.integers(0, 101, (200, 16)), rng.random((200, 8)) * 1e-3, rng.random((200, 6, 3)) * [1, 1e3, 1e6]):
        assert not (NoveltyDetector(**SHORT).fit(X).scale_ == 255).any()


@pytest.mark.parametrize("model", ["auto", "conv", ConvVAE((3, 8, 8)), "input_shape"], ids=str)
def test_channels_last_are_seen_as_channels_first(model):
    """Never scrambled: the same pixels, the same scores."""
    X = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8)).astype(np.uint8)
    last = np.ascontiguousarray(X.transpose(0, 2, 3, 1))
    options = {"epochs": 2, "random_state": 0, "model": model}
    if model == "input_shape":
        options |= {"model": "conv", "input_shape": (3, 8, 8)}
    first = NoveltyDetector(**options).fit(X)
    found = NoveltyDetector(**options).fit(last)
    assert found.input_shape_ == first.input_shape_ == (3, 8, 8)
    assert found.channels_last_
    np.testing.assert_allclose(found.score_samples(last), first.score_samples(X), rtol=1e-9)
    np.testing.assert_array_equal(found.score_samples(last.reshape(60, -1)), found.score_samples(last))
    with pytest.raises(ValueError, match=r"expected samples of shape \[8, 8, 3\], but got \[3, 8, 8\]"):
        found.score_samples(X)


def test_another_arrangement_than_the_models_is_refused():
    X = np.random.default_rng(0).random((40, 4, 16))
    with pytest.raises(ValueError, match=r"input_shape: expected the arrangement of X, \[4, 16\], but got \[8, 8\]"):
        NoveltyDetector(input_shape=(8, 8), epochs=1).fit(X)


def test_one_hot_pixel_leaves_the_image_its_range(pixels):
    images = pixels.astype(float) * 7.3 - 400
    spoiled = images.copy()
    spoiled[3, 0, 0] = 1e6
    scaling, other = (
        fit_scaling(a.reshape(150, -1), [np.arange(150)], (1, 16, 16), "auto", centred=True) for a in (images, spoiled)
    )
    np.testing.assert_allclose(other.scale, scaling.scale, rtol=1e-3)


# --- thresholds ------------------------------------------------------------------------------------------------------


def test_another_rate_of_false_alarms_needs_no_fit():
    rng = np.random.default_rng(0)
    X, T = rng.normal(size=(600, 4)), rng.normal(size=(2000, 4))
    detector = NoveltyDetector(**SHORT, target_fpr=0.05).fit(X)
    for rate in (0.02, 0.1, 0.3):
        expected = NoveltyDetector(**SHORT, target_fpr=rate).fit(X).predict(T)
        np.testing.assert_array_equal(detector.predict(T, target_fpr=rate), expected)
        np.testing.assert_array_equal(detector.decision_function(T, target_fpr=rate) < 0, expected == -1)
    before = detector.predict(T)
    detector.set_params(target_fpr=0.3)
    assert (detector.predict(T) == -1).mean() > (before == -1).mean(), "a changed parameter counts"
    with pytest.raises(ValueError, match="target_fpr: expected a number between 0 and 1"):
        detector.predict(T, target_fpr=0)


def test_the_fit_of_a_table_is_quick_and_stops_by_itself():
    import time

    rng = np.random.default_rng(0)
    X = rng.normal(size=(3000, 20)) @ rng.normal(size=(20, 20))
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector = NoveltyDetector(random_state=0).fit(X)
    assert time.process_time() - begun < 3, "1 s on an idle core"
    assert len(detector.history_.train) <= 40
