"""The rotation network: trained, scored by the gradients of its own losses, saved, explained."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from gradext.cli import main
from gradext.novelty import NoveltyDetector, RotationNet, characterize, load, save
from gradext.novelty.explain import heat, layer_shares, residual

pytestmark = [pytest.mark.medium, pytest.mark.filterwarnings("ignore::gradext.novelty.DetectorWarning")]


def upright(rng, n, turn=0):
    """Colour images [n, 3, 16, 16]: light above, dark below, a bar at the left; turned by quarter turns."""
    y, x = np.mgrid[:16, :16]
    shade = 200 - 9 * y + 40 * (x < rng.integers(2, 6, (n, 1, 1)))
    images = shade[:, None] * np.array([1.0, 0.8, 0.6])[:, None, None] + rng.normal(0, 12, (n, 3, 16, 16))
    return np.rot90(np.clip(images, 0, 255).astype(np.uint8), turn, (2, 3)).copy()


@pytest.fixture(scope="module")
def detector():
    X = upright(np.random.default_rng(0), 200)
    return NoveltyDetector(model="rotation", epochs=6, random_state=0).fit(X)


def test_the_gradient_is_that_of_the_summed_turns_losses():
    torch.manual_seed(0)
    model, x = RotationNet((3, 8, 8), channels=4).double().eval(), torch.rand(5, 3, 8, 8, dtype=torch.float64)
    seen = characterize(model, x, layer="head", loss="rotation")
    assert seen.reconstruction.shape == (5, 8)
    for k in range(5):
        losses = [
            torch.nn.functional.cross_entropy(
                model.head(model.body(4 * (torch.rot90(face, turn, (2, 3)) - 0.5))), torch.tensor([turn])
            )
            for face in (x[k : k + 1], x[k : k + 1].flip(3))
            for turn in range(4)
        ]
        torch.testing.assert_close(seen.reconstruction[k], torch.stack(losses).detach())
        (expected,) = torch.autograd.grad(sum(losses), model.head.weight)
        torch.testing.assert_close(seen.gradient[k : k + 1].materialize()[0], expected)


def test_what_is_turned_otherwise_is_novel(detector):
    rng = np.random.default_rng(1)
    T = np.concatenate([upright(rng, 60), upright(rng, 60, turn=1)])
    y = np.repeat([0, 1], 60)
    assert detector.loss_ == "rotation"
    assert detector.layers_ == ["head.weight"]
    assert roc_auc_score(y, -detector.score_samples(T)) > 0.9
    scores = detector.score_samples(T)
    np.testing.assert_allclose(detector.score_samples(T[:7]), scores[:7], rtol=1e-4)


@pytest.mark.parametrize("score", ["reconstruction_error", "gradient_norm", "kronecker_fisher"])
def test_every_gradient_score_applies(score):
    X = upright(np.random.default_rng(0), 80)
    options = {"model": "rotation", "epochs": 2, "random_state": 0}
    assert np.isfinite(NoveltyDetector(score, **options).fit(X).score_samples(X)).all()


def test_it_is_saved_and_explained(detector, tmp_path):
    X = upright(np.random.default_rng(2), 5)
    save(detector, tmp_path / "m")
    again = load(tmp_path / "m")
    np.testing.assert_array_equal(again.score_samples(X), detector.score_samples(X))
    assert again.get_params()["model"] == "rotation"
    assert heat(detector, X).shape == (5, 16, 16)
    assert np.isfinite(heat(detector, X)).all()
    np.testing.assert_allclose(layer_shares(detector, X)["head.weight"], 1)
    with pytest.raises(ValueError, match="a RotationNet reconstructs nothing"):
        residual(detector, X)


def test_on_the_command_line(tmp_path, capsys):
    np.save(tmp_path / "x.npy", upright(np.random.default_rng(0), 80))
    model, data = str(tmp_path / "m"), str(tmp_path / "x.npy")
    assert main(["fit", data, "--model", "rotation", "--epochs", "2", "--out", model, "--quiet"]) == 0
    assert "of a RotationNet fit on 80 samples of shape 3x16x16" in capsys.readouterr().out
    assert main(["score", model, data, "--out", str(tmp_path / "s.csv")]) == 0
    assert main(["report", model, data, "--out", str(tmp_path / "r.html")]) == 0


def test_what_has_no_quarter_turns_is_refused():
    for X, message in (
        (np.random.default_rng(0).random((40, 9)), "'rotation' is of images"),
        (np.random.default_rng(0).random((40, 8, 12)), "H = W, a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            NoveltyDetector(model="rotation", epochs=1).fit(X)


def photographs(rng, n, slope):
    """Colour images [n, 3, 16, 16] that no few directions explain: noise, lighter above by ``slope`` a row."""
    shade = 128 + slope * (7.5 - np.arange(16))[:, None] + rng.normal(0, 40, (n, 3, 16, 16))
    return np.clip(shade, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "X"),
    [
        ("rotation", photographs(np.random.default_rng(0), 200, 9)),
        ("autoencoder", photographs(np.random.default_rng(0), 200, 0)),  # whose turn nobody can tell
        ("autoencoder", upright(np.random.default_rng(0), 200)),  # which an autoencoder explains
        ("autoencoder", photographs(np.random.default_rng(0), 60, 9)),  # too few
        ("autoencoder", photographs(np.random.default_rng(0), 200, 9)[..., :12]),  # no square
        ("autoencoder", photographs(np.random.default_rng(0), 200, 9).reshape(200, -1)),  # rows of a table
    ],
    ids=["upright", "alike turned", "explained", "few", "no square", "flat"],
)
def test_the_model_is_chosen_by_the_normal_images(kind, X, tmp_path):
    detector = NoveltyDetector(random_state=0).fit(X)
    assert detector.kind_ == kind
    assert detector.score_.name == {"rotation": "gradient_mahalanobis", "autoencoder": "local_gradient"}[kind]
    np.testing.assert_array_equal(NoveltyDetector(random_state=0).fit(X).score_samples(X), detector.score_samples(X))
    save(detector, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.get_params()["model"] == "auto"
    np.testing.assert_array_equal(again.score_samples(X), detector.score_samples(X))


@pytest.mark.parametrize(
    "given", [{"novelty_score": "gradient_norm"}, {"latent_dim": 4}, {"epochs": 2}, {"layer": "last"}]
)
def test_what_is_asked_of_an_autoencoder_makes_one(given):
    X = photographs(np.random.default_rng(0), 120, 9)
    assert NoveltyDetector(random_state=0, **given).fit(X).kind_ == "autoencoder"


def test_its_p_values_are_valid():
    X, T = (photographs(np.random.default_rng(k), n, 9) for k, n in ((0, 400), (1, 800)))
    p = NoveltyDetector(random_state=0, calibration_fraction=0.4).fit(X).p_values(T)
    for t in (0.05, 0.1, 0.3):
        assert (p <= t).mean() <= t + 3 * np.sqrt(t * (1 - t) * (1 / 800 + 1 / 160))


def test_the_map_shows_a_defect_of_a_texture():
    rng = np.random.default_rng(0)

    def textures(count: int) -> np.ndarray:
        y, x = np.mgrid[:32, :32]
        waves = [60 * np.sin(x / 2 + rng.uniform(0, 6)) * np.cos(y / 3) for _ in range(count)]
        return np.clip(120 + np.stack(waves) + rng.normal(0, 8, (count, 32, 32)), 0, 255).astype(np.uint8)

    detector = NoveltyDetector(model="rotation", epochs=6, random_state=0).fit(textures(200))
    X, defect = textures(30), np.zeros((30, 32, 32), dtype=bool)
    for k in range(30):
        y, x = rng.integers(2, 24, 2)
        defect[k, y : y + 6, x : x + 6] = True
    X[defect] = 250
    maps = heat(detector, X)
    assert np.mean([roc_auc_score(defect[k].ravel(), maps[k].ravel()) for k in range(30)]) > 0.95
