"""Saved detectors: the same bits after loading, no code is executed, damaged files raise clear errors."""

import copy
import errno
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from gradext.novelty import ModelFileError, NoveltyDetector, load, persistence, save
from gradext.novelty.detector import CLASSIFIER_SCORES
from gradext.novelty.scores import SCORES
from gradext.sources import ImageFormat

FAST = {"hidden_dim": 16, "latent_dim": 3, "epochs": 2, "random_state": 0}


@pytest.fixture(scope="module")
def detector(digits):
    return NoveltyDetector(**FAST).fit(digits[0])


@pytest.fixture
def file(detector, tmp_path):
    save(detector, tmp_path / "model.gradext")
    return tmp_path / "model.gradext"


@pytest.mark.medium
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("score", [*SCORES, *CLASSIFIER_SCORES])
def test_the_same_bits_come_back(score, dtype, digits, tmp_path):
    detector = NoveltyDetector(score, dtype=dtype, **FAST).fit(digits[0])
    detector.image_format_ = ImageFormat(8, 8, "L", resize=True)
    save(detector, tmp_path / "model")
    again = load(tmp_path / "model")
    X = digits[1][:50]
    np.testing.assert_array_equal(again.score_samples(X), detector.score_samples(X))
    np.testing.assert_array_equal(again.predict(X), detector.predict(X))
    np.testing.assert_array_equal(again.p_values(X), detector.p_values(X))
    assert again.history_ == detector.history_
    assert again.image_format_ == detector.image_format_
    assert again.get_params() == detector.get_params() | {"random_state": None}


def test_frames_names_and_scaling_come_back(digits, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(digits[0] * 9 - 4, columns=[f"pixel {k}" for k in range(64)])
    detector = NoveltyDetector(**FAST).fit(frame)
    save(detector, tmp_path / "model")
    again = load(tmp_path / "model")
    np.testing.assert_array_equal(again.score_samples(frame), detector.score_samples(frame))
    with pytest.raises(ValueError, match="feature names"):
        again.score_samples(frame[frame.columns[::-1]])


class Autoencoder(nn.Module):
    def __init__(self, hidden=5):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 64))

    def forward(self, x):
        return self.body(x)


def test_models_of_ones_own_are_handed_to_load(digits, tmp_path):
    torch.manual_seed(0)
    detector = NoveltyDetector(model=Autoencoder(), layer="last", **FAST).fit(digits[0])
    save(detector, tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"'Autoencoder', which no file holds: pass load\(..., model=\)"):
        load(tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"model.body.0.bias: expected torch.float64 \[6\], but got .* \[5\]"):
        load(tmp_path / "model", model=Autoencoder(6))
    given = Autoencoder()
    again = load(tmp_path / "model", model=given)
    assert next(given.parameters()).dtype == torch.float32, "it is copied"
    np.testing.assert_array_equal(again.score_samples(digits[1][:9]), detector.score_samples(digits[1][:9]))


def test_a_file_is_safetensors_and_json_and_no_pickle(file):
    tensors = safetensors.torch.load_file(file)
    assert {"calibration", "shift", "scale", "model.encoder.2.weight"} <= set(tensors)
    with safetensors.safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()["gradext.novelty"])
    assert description["format_version"] == 3
    assert set(description["versions"]) == {"gradext", "torch", "numpy", "scikit-learn"}
    assert "pickle" not in Path(persistence.__file__).read_text().split('"""', 2)[2]


def test_loading_unpickles_nothing(file, monkeypatch):
    import pickle

    for module in (pickle, sys.modules["_pickle"]):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("unpickled"))
    load(file)


# --- what is wrong with a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 4, 9, 100, 0.3, 0.9, 0.999])
def test_files_cut_short_are_refused(file, part):
    content = file.read_bytes()
    file.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
    with pytest.raises(ModelFileError, match="cut short, damaged, or not a model file"):
        load(file)


def test_every_flipped_byte_is_found(file):
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(0, 64), *rng.integers(64, len(content), 150).tolist(), len(content) - 1]
    for place in places:
        altered = bytearray(content)
        altered[place] ^= 0x10
        file.write_bytes(altered)
        with pytest.raises(ModelFileError, match=str(file)):
            load(file)


def forge(file, tensors=None, **entries):
    """The file with other entries or tensors and a right SHA-256: what someone would do on purpose."""
    with safetensors.safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()["gradext.novelty"])
        held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    description |= entries
    held |= tensors or {}
    held = {name: value for name, value in held.items() if value is not None}
    description["sha256"] = persistence._digest(description, held)
    file.write_bytes(safetensors.torch.save(held, {"gradext.novelty": json.dumps(description)}))


@pytest.mark.parametrize(
    ("entries", "tensors", "message"),
    [
        ({"format_version": 4}, {}, "reads up to 3; upgrade gradext"),
        ({"format_version": 2}, {}, "written in format 2 by an earlier gradext, .* fit anew"),
        ({"format_version": "1"}, {}, "format_version: expected a positive integer"),
        ({"format": "other"}, {}, "expected a description of the format"),
        ({"parameters": {"shell": "rm"}}, {}, r"but got \['shell'\]"),
        ({"parameters": {"novelty_score": "norm"}}, {}, "novelty_score: expected one of"),
        ({"parameters": {"novelty_score": ["gradient_norm"]}}, {}, "novelty_score: expected one of"),
        ({"layers": None}, {}, "layers: expected list"),
        ({"layers": ["encoder.99"]}, {}, "encoder.99"),
        ({"layers": "first"}, {}, "layers: expected list"),
        ({"layers": ["first", 3]}, {}, "layers: expected names"),
        ({"parameters": {"layer": []}}, {}, "layer: expected a name"),
        ({"parameters": {"layer": ["first", 3]}}, {}, "layer: expected a name"),
        ({"parameters": {"target_fpr": "x"}}, {}, "not a detector"),
        ({"parameters": 3}, {}, "parameters: expected dict"),
        (
            {"architecture": {"type": "autoencoder", "input_dim": 64, "hidden_dim": 10**9, "latent_dim": 10**9}},
            {},
            "expected",
        ),
        (
            {"architecture": {"type": "autoencoder", "input_dim": 64, "hidden_dim": -1, "latent_dim": 3}},
            {},
            "hidden_dim",
        ),
        (
            {"architecture": {"type": "autoencoder", "input_dim": 63, "hidden_dim": 16, "latent_dim": 3}},
            {},
            "input_dim",
        ),
        ({"n_features": 63}, {}, "input_shape"),
        ({"n_features": True}, {}, "n_features: expected int"),
        ({"input_shape": [64, -1]}, {}, "input_shape"),
        ({"feature_names": ["a"]}, {}, "feature_names: expected 64 names"),
        ({"loss": "eval"}, {}, "loss: expected one of"),
        ({"offset": "0"}, {}, "offset: expected float"),
        ({"image_format": {"height": -1, "width": 2, "mode": "L"}}, {}, "image height"),
        ({"image_format": {"code": "x"}}, {}, "not a detector"),
        ({"history": {"train": [None], "validation": [], "best_epoch": 0}}, {}, "history"),
        ({}, {"shift": torch.zeros(63, dtype=torch.float64)}, r"shift: expected torch.float64 \[64\]"),
        ({}, {"scale": torch.zeros(64, dtype=torch.float64)}, "scale: expected positive"),
        ({}, {"calibration": torch.zeros(0, dtype=torch.float64)}, "scores: expected finite values"),
        ({}, {"calibration": torch.full((3,), float("nan"), dtype=torch.float64)}, "calibration: expected finite"),
        ({}, {"calibration": None}, "calibration: expected torch.float64"),
        ({}, {"model.encoder.2.weight": torch.zeros(3, 17, dtype=torch.float64)}, "model.encoder.2.weight: expected"),
        ({}, {"model.encoder.2.weight": torch.zeros(3, 16)}, "model.encoder.2.weight: expected torch.float64"),
        ({}, {"model.encoder.2.weight": torch.full((3, 16), float("inf"), dtype=torch.float64)}, "finite"),
        ({}, {"model.encoder.2.weight": None}, "missing: .'encoder.2.weight'"),
        ({}, {"model.more": torch.zeros(1)}, "unknown: .'more'"),
        ({}, {"score.mean_gradient": torch.zeros(2, 2, dtype=torch.float64)}, r"unknown: .'mean_gradient'"),
        ({"parameters": {"novelty_score": "gradient_cosine"}}, {}, r"missing: .'mean_gradient'"),
        (
            {"parameters": {"novelty_score": "gradient_cosine"}},
            {"score.activation_whitener": None, "score.delta_basis": None, "score.delta_gains": None}
            | {"score.mean_gradient": torch.zeros(2, 2, dtype=torch.float64)},
            "score.mean_gradient: expected",
        ),
        ({"parameters": {"model": "vae"}}, {}, "model: expected 'autoencoder' as in the architecture"),
        ({"ceiling": [1.0]}, {}, "ceiling: expected two numbers"),
        ({"channels_last": True}, {}, "channels_last: expected false"),
        ({}, {"score.delta_gains": torch.zeros(65, dtype=torch.float64)}, "score.delta_basis: expected 1 to 64"),
        ({}, {"span": torch.zeros(64, dtype=torch.float64)}, "span: expected positive"),
        ({}, {"more": torch.zeros(1)}, "unknown names"),
    ],
)
def test_forged_files_are_refused_with_the_reason(file, entries, tensors, message):
    forge(file, tensors, **entries)
    with pytest.raises(ModelFileError, match=message):
        load(file)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="there is no such file"):
        load(tmp_path / "none")
    with pytest.raises(ModelFileError, match="there is no such file"):
        load(tmp_path)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(ModelFileError, match="not one that gradext wrote"):
        load(other)
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickled.pt")
    with pytest.raises(ModelFileError, match="not a model file"):
        load(tmp_path / "pickled.pt")
    (tmp_path / "huge").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ModelFileError, match="not a model file"):
        load(tmp_path / "huge")


def test_files_without_later_parameters_keep_loading(file, digits, detector):
    """A file of this format that an older gradext wrote, before some parameter was there."""
    with safetensors.safe_open(file, "pt") as opened:
        parameters = json.loads(opened.metadata()["gradext.novelty"])["parameters"]
    forge(file, parameters={k: v for k, v in parameters.items() if k not in ("contamination", "scaling")})
    np.testing.assert_array_equal(load(file).score_samples(digits[1][:5]), detector.score_samples(digits[1][:5]))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_litter(detector, file, monkeypatch):
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(detector, file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_an_interrupted_write_leaves_the_old_file(detector, file, monkeypatch):
    before = file.read_bytes()

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(detector, file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_bad_places_are_named(detector, tmp_path):
    with pytest.raises(OSError, match="No such file or directory"):
        save(detector, tmp_path / "none" / "model")
    with pytest.raises(OSError, match="Is a directory"):
        save(detector, tmp_path)
    other = NoveltyDetector(**FAST).fit(np.random.default_rng(0).random((100, 4)))
    other.layer = other.model_.decoder[0]
    with pytest.raises(ValueError, match="layer: expected a name"):
        save(other, tmp_path / "model")


@pytest.mark.parametrize("layer", [("first", "last"), ["decoder.2", "decoder.0.weight"], "all", None])
def test_several_layers_are_saved_in_their_order(layer, digits, tmp_path):
    detector = NoveltyDetector("combined_whitened_norm", layer=layer, **FAST).fit(digits[0])
    save(detector, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.layer == (tuple(layer) if isinstance(layer, list) else layer)
    np.testing.assert_array_equal(again.score_samples(digits[1][:5]), detector.score_samples(digits[1][:5]))


@pytest.mark.medium
@pytest.mark.parametrize("score", ["diagonal_fisher", "gradient_classifier"])
def test_parameters_set_after_a_fit_are_for_the_next(score, digits, tmp_path):
    X = digits[1][:5]
    detector = NoveltyDetector(score, layer=("last", "first"), **FAST).fit(digits[0])
    assert detector.layers_ == ["decoder.2.weight", "decoder.0.weight"]
    expected = detector.score_samples(X)
    detector.set_params(novelty_score="latent_loss", layer="first", dtype="float32", loss="mse", scaling="minmax")
    np.testing.assert_array_equal(detector.score_samples(X), expected)
    save(detector, tmp_path / "model")
    again = load(tmp_path / "model")
    np.testing.assert_array_equal(again.score_samples(X), expected)
    assert (again.layers_, again.layer, again.novelty_score) == (detector.layers_, "first", score)
    for wrong in ({"epochs": 0}, {"target_fpr": 5}):  # as `load` refuses them, the file would be lost
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            save(copy.deepcopy(detector).set_params(**wrong), tmp_path / "other")
        assert not (tmp_path / "other").exists()
