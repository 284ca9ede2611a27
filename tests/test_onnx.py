"""Exported scoring functions give the detector's scores in onnxruntime."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from torch import nn

from gradext.novelty import NoveltyDetector
from gradext.novelty.onnx import SCORES, ScoringGraph, export_onnx

FAST = {"hidden_dim": 16, "latent_dim": 4, "epochs": 20, "random_state": 0}


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    return bunch.data[bunch.target == 0], bunch.data[bunch.target != 0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layer", ["first", "last"])
@pytest.mark.parametrize("score", SCORES)
def test_onnxruntime_gives_the_detectors_scores(score, layer, dtype, digits, tmp_path):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    detector = NoveltyDetector(score, layer=layer, dtype=dtype, **FAST).fit(digits[0])
    export_onnx(detector, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for X in (digits[1][:50], digits[1][:1]):
        (novelty,) = session.run(["novelty"], {"X": X.astype(dtype)})
        tolerance = 1e-9 if dtype == "float64" else 1e-4
        np.testing.assert_allclose(novelty, -detector.score_samples(X), rtol=tolerance, atol=tolerance)


def test_what_has_no_such_graph_is_refused(digits):
    detector = NoveltyDetector("gradient_classifier", **{**FAST, "epochs": 1}).fit(digits[0])
    with pytest.raises(ValueError, match=r"novelty_score: expected one of .* for ONNX, but got 'gradient_classifier'"):
        ScoringGraph(detector)
    own = NoveltyDetector(model=nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64)), epochs=0).fit(digits[0])
    with pytest.raises(ValueError, match="model: expected gradext's VAE, but got Sequential"):
        ScoringGraph(own)
