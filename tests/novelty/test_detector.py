"""`NoveltyDetector` with other tools: scikit-learn's checks, data frames, arrays of all kinds, models of the user."""

import copy
import pickle
import warnings

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from gradext.novelty import VAE, NoveltyDetector
from gradext.novelty.detector import CLASSIFIER_SCORES
from gradext.novelty.scores import SCORES

FAST = {"hidden_dim": 32, "latent_dim": 4, "epochs": 60, "batch_size": 32, "learning_rate": 3e-3, "random_state": 0}


@pytest.fixture(scope="module")
def detector(digits):
    return NoveltyDetector(**FAST).fit(digits[0][:140])


# --- scikit-learn ----------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("score", ["gradient_norm", pytest.param("gradient_classifier", marks=pytest.mark.slow)])
def test_scikit_learns_own_checks_pass(score):
    detector = NoveltyDetector(score, hidden_dim=8, latent_dim=2, epochs=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(detector, on_fail=None, on_skip=None)
    assert len(results) > 30
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed


def test_in_a_pipeline(digits):
    pipeline = make_pipeline(MinMaxScaler(clip=True), NoveltyDetector(**FAST)).fit(digits[0][:140] * 7 - 3)
    scores = pipeline.score_samples(np.concatenate([digits[0][140:], digits[1][:100]]) * 7 - 3)
    assert roc_auc_score(np.arange(len(scores)) < len(digits[0]) - 140, scores) > 0.9


def test_grid_search_over_scores(digits):
    X = np.concatenate([digits[0], digits[1][:100]])
    y = np.where(np.arange(len(X)) < len(digits[0]), 1, -1)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order], y[order]

    def auroc(estimator, X, y):
        return roc_auc_score(y, estimator.score_samples(X))

    search = GridSearchCV(
        NoveltyDetector(**{**FAST, "epochs": 3}),
        {"novelty_score": ["gradient_norm", "latent_loss"]},
        scoring=auroc,
        cv=2,
    ).fit(X, y)
    assert set(search.cv_results_["param_novelty_score"]) == {"gradient_norm", "latent_loss"}
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_clone_leaves_the_fitted_state_and_copies_the_model():
    model = ConvAutoencoder()
    detector = NoveltyDetector(model=model, input_shape=(1, 8, 8))
    copied = clone(detector)
    assert copied.model is not model
    assert copied.get_params()["input_shape"] == (1, 8, 8)
    assert not hasattr(copied, "model_")


@pytest.mark.medium
@pytest.mark.parametrize("score", [*SCORES, *CLASSIFIER_SCORES])
def test_fitted_detectors_go_through_pickle_and_joblib(score, digits, tmp_path):
    detector = NoveltyDetector(score, **{**FAST, "epochs": 2}).fit(digits[0])
    expected = detector.score_samples(digits[1][:20])
    joblib.dump(detector, tmp_path / "detector.joblib")
    for same in (
        pickle.loads(pickle.dumps(detector)),
        joblib.load(tmp_path / "detector.joblib"),
        copy.deepcopy(detector),
    ):
        np.testing.assert_array_equal(same.score_samples(digits[1][:20]), expected)


def test_the_docstring_names_every_score_and_every_attribute(digits):
    text = NoveltyDetector.__doc__
    for score in (*SCORES, *CLASSIFIER_SCORES):
        assert f'``"{score}"``' in text
    pandas = pytest.importorskip("pandas")
    fitted = NoveltyDetector(**{**FAST, "epochs": 1}).fit(pandas.DataFrame(digits[0]).rename(columns=str))
    learned = {name for name in vars(fitted) if name.endswith("_")}
    attributes = text.partition("Attributes:")[2]
    named = {name for line in attributes.splitlines() for name in line.partition(":")[0].strip().split(", ")}
    assert learned <= named


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:X has feature names")
def test_arrays_frames_and_maps_score_alike(detector, digits, tmp_path):
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    X = digits[1][:7]
    expected = detector.score_samples(X)
    read_only = X.copy()
    read_only.flags.writeable = False
    np.save(tmp_path / "x.npy", X)
    forms = {
        "fortran": np.asfortranarray(X),
        "float64": X.astype(np.float64),
        "read-only": read_only,
        "memory map": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "pandas": pandas.DataFrame(X),
        "polars": polars.DataFrame(X),
        "list": X.tolist(),
        "tensor": torch.from_numpy(X.copy()),
        "tensor with gradient": torch.from_numpy(X.copy()).requires_grad_(),
        "images": X.reshape(7, 1, 8, 8),
    }
    for name, form in forms.items():
        np.testing.assert_allclose(detector.score_samples(form), expected, rtol=1e-12, err_msg=name)


def test_frames_names_are_kept_and_checked(digits):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(digits[0], columns=[f"pixel {k}" for k in range(64)])
    detector = NoveltyDetector(**{**FAST, "epochs": 2}).fit(frame)
    assert detector.feature_names_in_[3] == "pixel 3"
    detector.score_samples(frame[:2])
    with pytest.raises(ValueError, match="feature names"):
        detector.score_samples(frame[frame.columns[::-1]])


@pytest.mark.parametrize("features", [1, 2, 3, 1000])
def test_any_number_of_features_and_one_sample(features):
    X = np.random.default_rng(0).normal(size=(80, features)) * 100
    detector = NoveltyDetector(**{**FAST, "epochs": 3}).fit(X)
    assert detector.score_samples(X[:1]).shape == (1,)
    assert np.isfinite(detector.score_samples(X)).all()


@pytest.mark.medium
@pytest.mark.parametrize("score", [*SCORES, *CLASSIFIER_SCORES])
def test_scores_do_not_depend_on_order_or_batching(score, digits):
    detector = NoveltyDetector(score, **{**FAST, "epochs": 3}).fit(digits[0])
    X = np.tile(digits[1][:300], (5, 1))  # more than one batch of scoring
    whole = detector.score_samples(X)
    np.testing.assert_allclose(whole[:300], whole[-300:], rtol=1e-9)
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_allclose(detector.score_samples(X[order]), whole[order], rtol=1e-9)
    alone = np.concatenate([detector.score_samples(X[k : k + 1]) for k in range(20)])
    np.testing.assert_allclose(alone, whole[:20], rtol=1e-9)


def test_scaling_follows_the_data(digits):
    options = {**FAST, "epochs": 2}
    bytes_ = (digits[0] * 255).astype(np.uint8)
    as_bytes, as_floats = (NoveltyDetector(**options).fit(X) for X in (bytes_, bytes_ / 255))
    assert (as_bytes.scale_ == 255).all()
    assert (as_floats.scale_ == 1).all()
    np.testing.assert_allclose(as_bytes.score_samples(bytes_[:9]), as_floats.score_samples(bytes_[:9] / 255), rtol=1e-9)
    shifted = NoveltyDetector(model="vae", **options).fit(digits[0] * 50 - 7)
    training = shifted.scaling_(digits[0] * 50 - 7)
    assert -0.5 <= training.min() <= training.max() <= 1.5, "the held-out part may leave [0, 1], not by much"
    with pytest.raises(ValueError, match=r"scaling: expected values in \[0, 1\]"):
        NoveltyDetector(scaling="none", model="vae", **options).fit(digits[0] * 50)


@pytest.mark.parametrize("model", ["autoencoder", "vae"])
@pytest.mark.parametrize("score", ["auto", *SCORES, *CLASSIFIER_SCORES])
def test_what_saturates_the_model_is_never_the_most_normal(score, model):
    """A feature of -9999 or 1e6, alone or in all columns: more novel than all normal samples, in any scaling."""
    rng = np.random.default_rng(0)
    W, small = rng.normal(size=(3, 6)), {"hidden_dim": 16, "latent_dim": 3, "random_state": 0}
    X, T = (rng.normal(size=(n, 3)) @ W + 0.2 * rng.normal(size=(n, 6)) for n in (300, 100))
    for scaling in ("auto", "minmax"):
        try:
            detector = NoveltyDetector(score, model=model, scaling=scaling, epochs=5, **small).fit(X)
        except ValueError as error:
            assert "needs a model that returns" in str(error)  # noqa: PT017
            return
        normal = -detector.score_samples(T)
        for value in (-9999.0, 1e6, X.max() + 4 * np.ptp(X)):
            for columns in ([2], slice(None)):
                far = T[:20].copy()
                far[:, columns] = value
                assert -detector.score_samples(far).max() >= normal.max() * (1 - 1e-9)
                assert (detector.predict(far) == -1).all()


def test_an_image_of_another_arrangement_is_refused():
    X = np.random.default_rng(0).random((40, 3, 8, 8))
    detector = NoveltyDetector(**{**FAST, "epochs": 1}).fit(X)
    with pytest.raises(ValueError, match=r"expected samples of shape \[3, 8, 8\], but got \[8, 8, 3\]"):
        detector.score_samples(X.transpose(0, 2, 3, 1))


# --- models of one's own ---------------------------------------------------------------------------------------------


class ConvAutoencoder(nn.Module):
    """No VAE, no ``loss``, no ``decoder`` by that name, no sigmoid."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6))
        self.up = nn.Sequential(
            nn.Linear(6, 128), nn.ReLU(), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1)
        )

    def forward(self, x):
        return self.up(self.down(x))


class ConvVAE(nn.Module):
    """A VAE with an image-shaped output that ends in a sigmoid."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.mu, self.logvar = nn.Linear(32, 4), nn.Linear(32, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())

    def forward(self, x):
        hidden = self.encoder(x)
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp() if self.training else mu
        return self.decoder(z).reshape(-1, 1, 8, 8), mu, logvar


@pytest.mark.medium
@pytest.mark.parametrize(("make", "loss"), [(ConvAutoencoder, "mse"), (ConvVAE, "bce")])
@pytest.mark.parametrize("score", ["gradient_norm", "delta_norm", "gradient_cosine", "reconstruction_error"])
def test_own_models_are_trained_and_scored(make, loss, score, digits):
    torch.manual_seed(0)
    model = make()
    before = copy.deepcopy(model.state_dict())
    options = {**FAST, "epochs": 150}
    layer = "up.0" if make is ConvAutoencoder else "first"
    detector = NoveltyDetector(score, model=model, input_shape=(1, 8, 8), layer=layer, **options).fit(digits[0][:140])
    assert detector.loss_ == loss
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is copied"
    scores = detector.score_samples(np.concatenate([digits[0][140:], digits[1][:100]]))
    if score != "gradient_cosine":
        assert roc_auc_score(np.arange(len(scores)) < len(digits[0]) - 140, scores) > 0.85


def test_a_trained_model_is_taken_as_it_is(digits):
    torch.manual_seed(0)
    model = ConvAutoencoder().train()
    detector = NoveltyDetector(model=model, input_shape=(1, 8, 8), epochs=0, random_state=0).fit(digits[0])
    assert detector.history_ is None
    for name, value in detector.model_.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].double())
    assert model.training


def test_a_models_own_loss_is_what_is_trained(digits):
    class Own(ConvVAE):
        calls = 0

        def loss(self, x):
            Own.calls += 1
            return (self(x)[0] - x).square().flatten(1).sum(1)

    NoveltyDetector(model=Own(), input_shape=(1, 8, 8), **{**FAST, "epochs": 1}).fit(digits[0])
    assert Own.calls > 0


def test_own_models_are_refused_with_a_reason(digits):
    with pytest.raises(ValueError, match=r"needs a model that returns \(reconstruction, mu, logvar\)"):
        NoveltyDetector("latent_loss", model=ConvAutoencoder(), input_shape=(1, 8, 8), epochs=1).fit(digits[0])
    with pytest.raises(ValueError, match="model: expected a reconstruction of"):
        NoveltyDetector(model=nn.Linear(64, 3), epochs=1).fit(digits[0])
    with pytest.raises(ValueError, match="input_shape: expected 64 values"):
        NoveltyDetector(model=ConvAutoencoder(), input_shape=(1, 9, 8), epochs=1).fit(digits[0])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        NoveltyDetector(model=VAE).fit(digits[0])
    with pytest.raises(ValueError, match="for a trained model="):
        NoveltyDetector(epochs=0).fit(digits[0])


# --- surroundings and failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode, digits):
    short = {**FAST, "epochs": 2}
    expected = NoveltyDetector(**short).fit(digits[0]).score_samples(digits[1][:20])
    with mode():
        detector = NoveltyDetector(**short).fit(digits[0])
        np.testing.assert_array_equal(detector.score_samples(digits[1][:20]), expected)
    np.testing.assert_array_equal(detector.score_samples(digits[1][:20]), expected)


def test_another_default_type_is_no_obstacle(digits):
    former = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        detector = NoveltyDetector(**{**FAST, "epochs": 2}).fit(digits[0])
    finally:
        torch.set_default_dtype(former)
    assert np.isfinite(detector.score_samples(digits[1][:20])).all()


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 8), nn.Sequential(nn.Linear(8, 64), nn.Sigmoid())

    def forward(self, x):
        return self.decoder(self.encoder(x).tanh())


@pytest.mark.parametrize("score", ["gradient_norm", "combined_whitened_norm"])
def test_another_default_device_changes_nothing(score, digits):
    detector = NoveltyDetector(score, model=Autoencoder(), epochs=2, random_state=0)
    expected = clone(detector).fit(digits[0]).score_samples(digits[1][:20])
    with torch.device("meta"):
        np.testing.assert_array_equal(detector.fit(digits[0]).score_samples(digits[1][:20]), expected)


@pytest.mark.parametrize("failure", ["wrong data", "interrupt", "parameter"])
def test_a_fit_that_fails_keeps_what_was_fitted(failure, digits, monkeypatch):
    detector = NoveltyDetector(**{**FAST, "epochs": 2}).fit(digits[0])
    expected = detector.score_samples(digits[1][:20])
    if failure == "wrong data":
        with pytest.raises(ValueError, match="hold NaN"):
            detector.fit(np.full((10, 3), np.nan))
    elif failure == "parameter":
        with pytest.raises(ValueError, match="target_fpr"):
            detector.set_params(target_fpr=2.0).fit(digits[0])
        assert detector.target_fpr == 2.0
    else:

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(NoveltyDetector, "_fit_score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            detector.fit(digits[0] * 3 - 1)
    np.testing.assert_array_equal(detector.score_samples(digits[1][:20]), expected)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:overflow encountered in divide")
@pytest.mark.filterwarnings("ignore::gradext.novelty.DetectorWarning")
@pytest.mark.parametrize(
    ("score", "loss"), [("gradient_norm", "mse"), ("combined_evidence", "bce"), ("gradient_classifier", "mse")]
)
def test_what_overflows_is_novel(score, loss, digits):
    detector = NoveltyDetector(score, loss=loss, **{**FAST, "epochs": 2}).fit(digits[0])
    X = digits[0][:2].astype(np.float64)
    X[1] = 1e308
    scores = detector.score_samples(X)
    assert np.isfinite(scores[0])
    assert scores[1] < detector.score_samples(digits[1].astype(np.float64)).min()
    assert detector.predict(X)[1] == -1
    assert detector.p_values(X)[1] == detector.p_values(X).min()
