"""A detector that is useless raises a warning with the evidence; a good one raises none."""

import warnings

import numpy as np
import pytest
from torch import nn

from gradext.novelty import DetectorWarning, NoveltyDetector, load, save

FAST = {"hidden_dim": 64, "latent_dim": 8, "epochs": 400, "batch_size": 32, "learning_rate": 3e-3, "random_state": 0}


@pytest.fixture(scope="module")
def detector(digits):
    return NoveltyDetector(**FAST).fit(digits[0])


@pytest.fixture(scope="module")
def colours():
    """Reddish images and a detector of them."""
    rng = np.random.default_rng(0)
    X = np.clip(rng.random((200, 3, 8, 8)) * 0.3 + np.array([0.6, 0.3, 0.05])[:, None, None], 0, 1)
    return X, NoveltyDetector(**{**FAST, "epochs": 20}).fit(X[:150])


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def test_nothing_is_said_where_all_is_well(digits, colours):
    detector = silent(lambda: NoveltyDetector(**FAST).fit(digits[0]))
    silent(lambda: detector.score_samples(digits[0]))
    silent(lambda: detector.score_samples(digits[1]))
    silent(lambda: detector.score_samples(digits[1][:1]))
    X, of_colours = colours
    silent(lambda: of_colours.score_samples(X[150:]))


def test_novelties_in_the_training_data_are_shown(digits):
    X = np.concatenate([digits[0], np.random.default_rng(0).random((3, 64)).astype(np.float32)])
    with pytest.warns(
        DetectorWarning, match=r"novelties in the training data: \d of \d+ samples .* rows \[1(78|79|80)"
    ):
        NoveltyDetector(random_state=0).fit(X)
    silent(lambda: NoveltyDetector(contamination=0.02, random_state=0).fit(X))


class Dead(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
        nn.init.constant_(self.decoder[0].bias, -100.0)

    def forward(self, x):
        return self.decoder(x)


def test_dead_gradients_are_told(digits):
    with pytest.warns(DetectorWarning, match=r"dead gradients: that of the layer .* is exactly zero for \d+ of"):
        NoveltyDetector(model=Dead(), epochs=0, random_state=0).fit(digits[0])


def test_a_collapsed_posterior_is_told(digits):
    noise = np.random.default_rng(0).random((300, 64))
    with pytest.warns(DetectorWarning, match="collapsed posterior: the 8 latent dimensions carry .* nats together"):
        NoveltyDetector(model="vae", **{**FAST, "epochs": 30}).fit(noise)


def test_constant_data_and_features_are_told():
    X = np.random.default_rng(0).normal(size=(200, 6)) * 40
    X[:, [2, 4]] = 7
    with pytest.warns(DetectorWarning, match=r"constant features: 2 of 6 are the same .* first \[2, 4\]"):
        NoveltyDetector(**{**FAST, "epochs": 2}).fit(X)
    with pytest.warns(DetectorWarning, match="constant data"):
        NoveltyDetector(**{**FAST, "epochs": 2}).fit(np.full((200, 6), 3.0))


def test_another_scale_is_told(digits, detector):
    with pytest.warns(DetectorWarning, match=r"outside the training range: scaled values span \[0, 255\].* 20 of 20"):
        detector.score_samples(digits[0][:20] * 255)
    with pytest.warns(DetectorWarning, match=r"inputs of a smaller scale: scaled values span \[0, 0.00392\]"):
        detector.score_samples(digits[0][:20] / 255)


def test_another_order_of_channels_is_told(colours):
    X, detector = colours
    with pytest.warns(DetectorWarning, match=r"channels in another order: their means are \(0.20, 0.45, 0.75\)"):
        detector.score_samples(X[150:, ::-1])


def test_saved_detectors_warn_too(colours, tmp_path):
    X, detector = colours
    save(detector, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.profile_ == detector.profile_
    with pytest.warns(DetectorWarning, match="channels in another order"):
        again.score_samples(X[150:, ::-1])


def test_warnings_change_no_score(digits, detector):
    X = digits[0][:5] * 255
    with pytest.warns(DetectorWarning):
        scores = detector.score_samples(X)
    assert np.isfinite(scores).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(detector.score_samples(X), scores)


def test_parameters_changed_since_the_fit_are_told(digits, tmp_path):
    X = digits[1][:5]
    detector = NoveltyDetector("gradient_norm", hidden_dim=16, epochs=2, random_state=0).fit(digits[0])
    expected = silent(lambda: detector.set_params(verbose=True, target_fpr=0.3, epochs=2).score_samples(X))
    detector.set_params(novelty_score="delta_norm", contamination=0.1)
    told = "contamination=None is now 0.1, novelty_score='gradient_norm' is now 'delta_norm'; .* call fit again"
    with pytest.warns(DetectorWarning, match=told):
        np.testing.assert_array_equal(detector.score_samples(X), expected)
    detector.set_params(novelty_score="gradient_norm", contamination=None)
    save(detector, tmp_path / "model")
    silent(lambda: load(tmp_path / "model").score_samples(X))
    with pytest.warns(DetectorWarning, match=r"changed parameters: layer='auto' is now 'last'"):
        load(tmp_path / "model").set_params(layer="last").score_samples(X)
    own = NoveltyDetector(model=detector.model_, epochs=1, random_state=0).fit(digits[0])
    silent(lambda: own.score_samples(X))
