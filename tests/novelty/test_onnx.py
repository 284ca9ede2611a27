"""Exported scoring functions give the detector's scores in onnxruntime.

fp64 graphs to 1e-9 of the largest score, fp32 ones to 1e-5 of what the fp64 detector says: fp32 rounds by 6e-8, sums of
some hundred terms and logarithms of probabilities near one multiply that. Relative to the largest, since a classifier's
logits and sums of standardised logarithms pass through zero.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

import gradext
from gradext.cli import main
from gradext.novelty import SCORES, VAE, NoveltyDetector, save
from gradext.novelty.detector import CLASSIFIER_SCORES
from gradext.novelty.onnx import ScoringGraph, default_dtype, export_onnx

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore::gradext.novelty.DetectorWarning"),
]  # of models that are hardly trained

FAST = {"hidden_dim": 16, "latent_dim": 4, "epochs": 20, "random_state": 0}
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
BATCHES = (50, 1, 7, 0)  # the graph is traced with another number
FP32_ALONE = (nn.ELU, nn.GELU, nn.Softplus)  # in onnxruntime


def check(detector, X, folder, dtypes=tuple(TOLERANCE)) -> None:
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    expected = -detector.score_samples(X)
    assert expected.std() > 0
    for dtype in dtypes:
        path = folder / f"{dtype}.onnx"
        export_onnx(detector, path, dtype=dtype)
        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for N in BATCHES:
            (novelty,) = session.run(["novelty"], {"X": X[:N].astype(dtype)})
            assert novelty.dtype == dtype
            np.testing.assert_allclose(novelty, expected[:N], rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("layer", ["first", "last", ("first", "last")], ids=str)
@pytest.mark.parametrize("score", [*SCORES, *CLASSIFIER_SCORES])
def test_onnxruntime_gives_the_detectors_scores(score, layer, digits, tmp_path):
    detector = NoveltyDetector(score, layer=layer, **FAST).fit(16 * digits[0])  # scaled by minmax
    check(detector, 16 * digits[1], tmp_path)


@pytest.mark.parametrize(
    "score",
    ["auto", "reconstruction_error", "gradient_norm", "gradient_cosine", "kronecker_fisher", "whitened_gradient",
     "local_gradient"],
)  # fmt: skip
def test_rotation_networks(score, tmp_path):
    onnx = pytest.importorskip("onnx")
    X = np.random.default_rng(0).random((60, 3, 8, 8))
    detector = NoveltyDetector(score, model="rotation", epochs=2, random_state=0).fit(X)
    assert default_dtype(detector) == "float32"
    check(detector, X.reshape(60, -1), tmp_path, ["float32"])
    told = {entry.key: entry.value for entry in onnx.load(tmp_path / "float32.onnx").metadata_props}
    assert float(told["threshold"]) == -detector.offset_
    assert told["gradext_version"] == gradext.__version__


def test_fp32_detectors_have_fp32_graphs(digits, tmp_path):
    detector = NoveltyDetector(dtype="float32", **FAST).fit(digits[0])
    check(detector, digits[1], tmp_path, ["float32"])
    assert ScoringGraph(detector).dtype is torch.float32


class Autoencoder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.decoder(self.encoder(x.flatten(1)))


class OwnVAE(Autoencoder):
    def forward(self, x):
        hidden = self.encoder(x.flatten(1))
        return self.decoder(self.mu(hidden)), self.mu(hidden), self.logvar(hidden)


def perceptron(*layers, end=nn.Sigmoid):
    return nn.Sequential(nn.Linear(64, 12), *layers, nn.Linear(12, 64), *([end()] if end else []))


torch.manual_seed(0)
ACTIVATIONS = [
    nn.ReLU(), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.Softplus(2.0)
]  # fmt: skip
MODELS = {
    **{str(activation): (perceptron(activation), {}) for activation in ACTIVATIONS},
    "reconstruction without bounds": (perceptron(nn.Tanh(), end=None), {}),
    "squared error of a sigmoid": (perceptron(nn.ReLU()), {"loss": "mse"}),
    "nested, with dropout": (nn.Sequential(perceptron(nn.Sequential(nn.ReLU(), nn.Dropout()), nn.Identity())), {}),
    "images": (
        nn.Sequential(nn.Flatten(), perceptron(nn.ReLU()), nn.Unflatten(1, (1, 8, 8)), nn.Sigmoid()),
        {"input_shape": (1, 8, 8)},
    ),
    "a VAE on images": (VAE(64, 16, 4), {"input_shape": (8, 8)}),
    "encoder and decoder": (
        Autoencoder(
            encoder=nn.Sequential(nn.Linear(64, 9), nn.Tanh()), decoder=nn.Sequential(nn.Linear(9, 64), nn.Sigmoid())
        ),
        {},
    ),
    "encoder, mu, logvar and decoder": (
        OwnVAE(
            encoder=nn.Sequential(nn.Linear(64, 9), nn.Tanh()), mu=nn.Linear(9, 3), logvar=nn.Linear(9, 3),
            decoder=nn.Sequential(nn.Linear(3, 9), nn.ELU(), nn.Linear(9, 64), nn.Sigmoid()),
        ),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_own_models(name, digits, tmp_path):
    model, options = MODELS[name]
    options = {"model": model, "layer": ("first", "last"), "epochs": 3, "random_state": 0, **options}
    detector = NoveltyDetector("combined_whitened_norm", **options)
    single = any(isinstance(layer, FP32_ALONE) for layer in model.modules())
    check(detector.fit(digits[0]), digits[1], tmp_path, ["float32"] if single else list(TOLERANCE))


class Twice(OwnVAE):
    """Its parts are called as the names do not tell."""

    def forward(self, x):
        _, mu, logvar = super().forward(x)
        return self.decoder(2 * mu), mu, logvar


class Unnamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = perceptron(nn.ReLU())

    def forward(self, x):
        return self.layers(x)


shared = nn.Linear(64, 64)
REFUSED = {
    "another module": (Unnamed(), {}, r"model: expected an nn.Sequential, or .* but got Unnamed with none of them"),
    "a chosen convolution": (
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid()),
        {"input_shape": (1, 8, 8)},
        r"layer: expected linear layers that run once, on \[N, features\]",
    ),
    "a convolution of padded copies": (
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), nn.Sigmoid()),
        {"input_shape": (1, 8, 8)},
        r"model: expected layers of the kinds Linear, .* but got Conv2d",
    ),
    "a latent layer of another kind": (
        OwnVAE(
            encoder=nn.Sequential(nn.Linear(64, 9)), mu=nn.Linear(9, 3), logvar=nn.Sequential(nn.Linear(9, 3)),
            decoder=nn.Sequential(nn.Linear(3, 64), nn.Sigmoid()),
        ),
        {},
        "model: expected a linear layer logvar, for ONNX, but got Sequential",
    ),
    "a derivative that is not there": (perceptron(nn.GELU("tanh")), {}, "but got GELU"),
    "a layer that runs twice": (nn.Sequential(shared, nn.ReLU(), shared, nn.Sigmoid()), {}, "layer: .* that run once"),
    "positions": (
        nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid()),
        {"input_shape": (8, 8)},
        r"layer: expected linear layers that run once, on \[N, features\]",
    ),
    "an end without a sigmoid": (
        nn.Sequential(perceptron(nn.ReLU()), nn.Identity()), {"loss": "bce"}, "model: expected a Sigmoid .* Identity"
    ),
    "another forward": (
        Twice(
            encoder=nn.Sequential(nn.Linear(64, 9), nn.Tanh()), mu=nn.Linear(9, 3), logvar=nn.Linear(9, 3),
            decoder=nn.Sequential(nn.Linear(3, 64), nn.Sigmoid()),
        ),
        {},
        "model: expected a forward that calls its parts one after the other, .* scores that differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_graph_is_refused(name, digits):
    model, options, message = REFUSED[name]
    detector = NoveltyDetector(model=model, epochs=1, random_state=0, **options).fit(digits[0])
    with pytest.raises(ValueError, match=message):
        ScoringGraph(detector)


def test_other_types_and_detectors_that_are_not_fitted_are_refused(digits):
    with pytest.raises(ValueError, match="not fitted"):
        ScoringGraph(NoveltyDetector())
    detector = NoveltyDetector(**{**FAST, "epochs": 1}).fit(digits[0])
    with pytest.raises(ValueError, match="dtype: expected one of float32, float64, but got 'float16'"):
        ScoringGraph(detector, "float16")


@pytest.mark.parametrize("score", ["whitened_gradient", "gradient_norm", "reconstruction_error", "latent_loss"])
def test_convolutional_models(score, digits, tmp_path):
    detector = NoveltyDetector(score, model="conv", input_shape=(1, 8, 8), epochs=2, random_state=0).fit(digits[0])
    assert default_dtype(detector) == "float32"
    check(detector, digits[1], tmp_path, ["float32"])


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_convolutions_of_any_stride(stride, size, digits, tmp_path):
    torch.manual_seed(0)
    X = digits[0].reshape(-1, 1, 8, 8)[:, :, :size, :size]
    n = (size + 2 - 2 * 2 - 1) // stride + 1
    model = nn.Sequential(
        nn.Unflatten(1, (1, size, size)), nn.Flatten(), nn.Linear(size * size, 4), nn.Tanh(), nn.Linear(4, size * size),
        nn.Unflatten(1, (1, size, size)), nn.Conv2d(1, 4, 3, stride, 1, dilation=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * n * n, size * size), nn.Sigmoid(),
    )  # fmt: skip
    detector = NoveltyDetector(model=model, input_shape=(size * size,), layer="first", epochs=2, random_state=0)
    detector.fit(X.reshape(len(X), -1))
    T = digits[1].reshape(-1, 1, 8, 8)[:, :, :size, :size]
    check(detector, T.reshape(len(T), -1), tmp_path, ["float32"])


def test_a_graph_tells_its_threshold_and_version(digits, tmp_path):
    onnx = pytest.importorskip("onnx")
    detector = NoveltyDetector(**FAST).fit(digits[0])
    export_onnx(detector, tmp_path / "m.onnx")
    told = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert float(told["threshold"]) == -detector.offset_
    assert told["novelty_score"] == "whitened_gradient"
    assert told["gradext_version"] == gradext.__version__


def test_on_the_command_line(digits, tmp_path, capsys, monkeypatch):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    model, out = str(tmp_path / "zeros.gradext"), str(tmp_path / "zeros.onnx")
    detector = NoveltyDetector(**FAST).fit(digits[0])
    save(detector, model)
    assert main(["export", model, "--out", out, "--dtype", "float32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["input"] == {"name": "X", "dtype": "float32", "shape": ["N", 64]}
    assert result["threshold"] == -detector.offset_
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (novelty,) = session.run(["novelty"], {"X": digits[1][:33]})
    np.testing.assert_allclose(novelty, -detector.score_samples(digits[1][:33]), rtol=1e-5)
    assert main(["export", model, "--out", str(tmp_path / "missing" / "zeros.onnx")]) == 1
    assert "expected a file in a folder that can be written to" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", model, "--out", str(tmp_path / "other.onnx")]) == 1
    assert "gradext export: ONNX graphs need the package onnx: pip install onnx" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zeros.gradext", "zeros.onnx"]


def test_the_detector_is_left_as_it_was(digits):
    detector = NoveltyDetector("gradient_classifier", **FAST).fit(digits[0])
    before = {name: tensor.clone() for name, tensor in detector.model_.state_dict().items()}
    ScoringGraph(detector, "float32")
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.model_.state_dict().items())
    assert {p.dtype for p in detector.score_.classifier.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in detector.model_.parameters())
