"""Saving and loading a fitted `NoveltyDetector`: one safetensors file whose metadata are one JSON object.

Nothing in a file is executed. Everything is checked before use: lengths and offsets (by safetensors), a SHA-256 of
description and tensors, the type of every entry, the shape and type of every tensor against the described
architecture. The JSON object, format version 3:

    format, format_version, versions    what wrote the file
    parameters                          of the estimator, but for a ``model`` of one's own and ``random_state``
    architecture                        {"type": a name of `MODELS`, sizes}, or {"type": "own", "class": its name}
    n_features, feature_names, input_shape, channels_last, layers, loss, offset, target_fpr, ceiling, bent,
    warnings, image_format, history, profile
    sha256                              of all else

The tensors: ``model.*`` the state of the autoencoder, ``score.*`` that of the `FittedScore`, ``calibration`` [n], and
the vectors [D] of the `Scaling`, ``shift``, ``scale``, ``low``, ``high``, ``floor``, ``span``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from .._version import __version__
from ..sources import ImageFormat
from .calibration import Calibration
from .detector import DTYPES, MODELS, NoveltyDetector, working_device
from .fitted import CLASSIFIER_SCORES, fit_score
from .guards import Profile
from .representations import ERRORS, characterize, layer_names
from .scaling import VECTORS, Scaling
from .training import History
from .writing import atomic_write

FORMAT = "gradext.novelty"
FORMAT_VERSION = 3  # earlier ones were never released
NEIGHBOURS = ("neighbour_activation", "neighbour_delta", "neighbour_reach", "neighbour_density")
NOT_SAVED = ("random_state", "device")


class ModelFileError(ValueError):
    """A model file that is missing, damaged, of another format, or inconsistent."""


def save(detector: NoveltyDetector, path: str | os.PathLike) -> None:
    """Write a fitted detector to ``path``; an error leaves the old file unchanged.

    The architecture of a ``model`` of your own is code, which the file does not hold: pass one to `load`. Raises
    NotFittedError, ValueError for a ``layer`` that is neither a name, nor several, nor None, or for parameters set
    since that a fit would refuse, OSError if the file cannot be written.

    >>> import tempfile
    >>> X = np.random.default_rng(0).random((100, 16))
    >>> detector = NoveltyDetector(hidden_dim=16, latent_dim=2, epochs=2, random_state=0).fit(X)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(detector, f"{folder}/detector.gradext")
    ...     again = load(f"{folder}/detector.gradext")
    >>> bool((again.score_samples(X) == detector.score_samples(X)).all())
    True
    """
    check_is_fitted(detector)
    if not _is_named(detector.layer):
        raise ValueError(f"layer: expected a name, several or None, to be saved, but got {detector.layer!r}")
    model, score = detector.model_, detector.score_
    dtype = next(model.parameters()).dtype
    parameters = {name: value for name, value in detector.get_params(deep=False).items() if name not in NOT_SAVED}
    own = detector.kind_ == "own"
    if own:
        del parameters["model"]
    # As fitted: `set_params` may have changed parameters since.
    parameters |= {"novelty_score": score.name, "dtype": next(name for name in DTYPES if DTYPES[name] == dtype)}
    if parameters["input_shape"] is not None:
        parameters["input_shape"] = [int(size) for size in parameters["input_shape"]]
    # `save` raises what `load` would refuse.
    NoveltyDetector(**{**parameters, "model": detector.model})._check_parameters()
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"gradext": __version__}
        | {package: metadata.version(package) for package in ("torch", "numpy", "scikit-learn")},
        "parameters": {k: v.item() if isinstance(v, np.generic) else v for k, v in parameters.items()},
        "architecture": _architecture(model),
        "n_features": int(detector.n_features_in_),
        "feature_names": [str(name) for name in detector.feature_names_in_]
        if hasattr(detector, "feature_names_in_")
        else None,
        "input_shape": list(detector.input_shape_),
        "channels_last": detector.channels_last_,
        "layers": detector.layers_,
        "loss": detector.loss_,
        "offset": float(detector.offset_),
        "target_fpr": float(detector.fitted_fpr_),
        "ceiling": None if detector.ceiling_ is None else list(detector.ceiling_),
        "bent": detector.scaling_.bent,
        "warnings": detector.warnings_,
        "image_format": None if detector.image_format_ is None else asdict(detector.image_format_),
        "history": asdict(detector.history_) if detector.history_ else None,
        "profile": asdict(detector.profile_) if detector.profile_ else None,
    }
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"score.{name}": value for name, value in score.tensors().items()}
    tensors |= {
        "calibration": torch.from_numpy(detector.calibration_.scores),
        **{name: torch.from_numpy(getattr(detector.scaling_, name)) for name in VECTORS},
    }
    # Own storage for each: safetensors refuses tied weights.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    description["sha256"] = _digest(description, tensors)
    content = safetensors.torch.save(tensors, {FORMAT: json.dumps(description, allow_nan=False)})
    with atomic_write(path) as file:
        file.write(content)


def _architecture(model: nn.Module) -> dict:
    for name, kind in MODELS.items():
        if type(model) is kind:
            return {"type": name, **model.sizes}  # type: ignore[dict-item]
    return {"type": "own", "class": type(model).__qualname__}


def load(path: str | os.PathLike, *, model: nn.Module | None = None, device: str | None = None) -> NoveltyDetector:
    """The detector in a file that `save` wrote; its scores are the same, bit for bit on the same machine.

    ``model``: for a detector with a model of your own, one of the same architecture, with any weights; it is copied.
    Raises ModelFileError for a file that is missing, cut short, altered, or of another format, ValueError for a
    ``device`` that does not work here.
    """
    working_device(device)
    description, tensors = _read(Path(path))
    try:
        return _rebuild(description, tensors, model, device)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
        raise ModelFileError(f"{path}: not a detector as gradext saves it: {error}") from error


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    if not path.is_file():
        raise ModelFileError(f"{path}: expected a model file, as `gradext fit` writes it, but there is no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
            # Cloned into torch's own alignment, on which the last bits of matrix products depend.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cut short, damaged, or not a model file: {error}") from error
    if text is None:
        raise ModelFileError(f"{path}: a safetensors file, but not one that gradext wrote")
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: expected a JSON description, but {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ModelFileError(f"{path}: expected a description of the format {FORMAT!r}")
    version = description.get("format_version")
    if type(version) is not int or version < 1:
        raise ModelFileError(f"{path}: format_version: expected a positive integer, but got {version!r}")
    if version < FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: written in format {version} by an earlier gradext, and this one ({__version__}) reads format "
            f"{FORMAT_VERSION}; fit anew"
        )
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: written in format {version}, and this gradext ({__version__}) reads up to {FORMAT_VERSION}; "
            "upgrade gradext"
        )
    if description.get("sha256") != _digest(description, tensors):
        raise ModelFileError(f"{path}: its content does not match its SHA-256: damaged or altered")
    return description, tensors


def _digest(description: dict, tensors: dict[str, Tensor]) -> str:
    described = {key: value for key, value in description.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _rebuild(
    description: dict, tensors: dict[str, Tensor], model: nn.Module | None, device: str | None
) -> NoveltyDetector:
    parameters = _entry(description, "parameters", dict)
    known = set(NoveltyDetector().get_params()) - set(NOT_SAVED)
    if unknown := set(parameters) - known:
        raise ModelFileError(f"parameters: expected some of {sorted(known)}, but got {sorted(unknown)}")
    architecture = _entry(description, "architecture", dict)
    kind = _entry(architecture, "type", str)
    own = kind not in MODELS
    if own and model is None:
        raise ModelFileError(
            f"its model is of a class of your own, {architecture.get('class')!r}, which no file holds: pass "
            "load(..., model=) one of the same architecture"
        )
    if not own and model is not None:
        raise ModelFileError(f"its model is gradext's {MODELS[kind].__name__}: leave model= out")
    named = parameters.pop("model", "auto")
    if named not in ("auto", None if own else kind):
        raise ModelFileError(f"model: expected {kind!r} as in the architecture, or 'auto', but got {named!r}")
    detector = NoveltyDetector(**parameters, model=model if own else named, device=device)  # type: ignore[arg-type]
    detector._check_parameters()
    detector.kind_, detector.trial_ = kind, {}
    if not _is_named(detector.layer):
        raise ModelFileError(f"layer: expected a name, several or None, but got {detector.layer!r}")
    if isinstance(detector.layer, list):
        detector.layer = tuple(detector.layer)  # JSON has no tuples
    dtype = DTYPES[detector.dtype]

    D = _entry(description, "n_features", int)
    names = _entry(description, "feature_names", list, optional=True)
    if names is not None and (len(names) != D or not all(isinstance(name, str) for name in names)):
        raise ModelFileError(f"feature_names: expected {D} names, but got {names!r}")
    input_shape = _entry(description, "input_shape", list)
    if not all(type(size) is int and size > 0 for size in input_shape) or math.prod(input_shape) != D:
        raise ModelFileError(f"input_shape: expected positive sizes with the product {D}, but got {input_shape}")
    detector.n_features_in_ = D
    if names is not None:
        detector.feature_names_in_ = np.asarray(names, dtype=object)
    detector.input_shape_ = tuple(input_shape)
    detector.channels_last_ = _entry(description, "channels_last", bool)
    if detector.channels_last_ and len(input_shape) != 3:
        raise ModelFileError(f"channels_last: expected false for samples of shape {input_shape}, but got true")
    detector.loss_ = _entry(description, "loss", str)
    if detector.loss_ not in ERRORS or (detector.loss_ == "rotation") != (kind == "rotation"):
        raise ModelFileError(f"loss: expected one of {list(ERRORS)} that fits the model, but got {detector.loss_!r}")
    detector.offset_ = _entry(description, "offset", float)
    detector.fitted_fpr_ = _entry(description, "target_fpr", float)
    ceiling = _entry(description, "ceiling", list, optional=True)
    if ceiling is not None and not (
        len(ceiling) == 2 and all(type(value) is float and math.isfinite(value) for value in ceiling)
    ):
        raise ModelFileError(f"ceiling: expected two numbers, but got {ceiling!r}")
    detector.ceiling_ = None if ceiling is None else (ceiling[0], ceiling[1])
    image_format = _entry(description, "image_format", dict, optional=True)
    detector.image_format_ = None if image_format is None else ImageFormat(**image_format)
    history = _entry(description, "history", dict, optional=True)
    detector.history_ = None if history is None else _history(history)

    detector.warnings_ = _entry(description, "warnings", list)
    if not all(isinstance(text, str) for text in detector.warnings_):
        raise ModelFileError(f"warnings: expected texts, but got {detector.warnings_!r}")
    profile = _entry(description, "profile", dict, optional=True)
    detector.profile_ = None if profile is None else _profile(profile)

    given = dict(tensors)
    detector.scaling_ = Scaling(_entry(description, "bent", bool), *(_vector(given, name, D) for name in VECTORS))
    for name in ("scale", "span"):
        if not (getattr(detector.scaling_, name) > 0).all():
            raise ModelFileError(f"{name}: expected positive values")
    detector.calibration_ = Calibration(_vector(given, "calibration"))
    state = {name.removeprefix("model."): given.pop(name) for name in tensors if name.startswith("model.")}
    if model is not None:
        detector.model_ = copy.deepcopy(model).to(dtype)
    else:
        sizes = _sizes(architecture, kind)
        with torch.device("meta"):  # sizes that no tensor has are found before memory is allocated
            made = MODELS[kind](**sizes).to(dtype)
        if made.input_dim != D:
            raise ModelFileError(f"input_dim: expected {D} as n_features, but got {made.input_dim}")
        detector.model_ = made
    _check_tensors(state, detector.model_.state_dict(), "model")
    detector.model_.load_state_dict(state, assign=not own)
    detector.model_.to(working_device(device)).eval()

    # The names, shapes and types that the score must have for this model, from two samples of zeros.
    zeros = torch.zeros(2, *detector.input_shape_, dtype=dtype, device="cpu")
    layers = _entry(description, "layers", list)
    if not _is_named(layers):
        raise ModelFileError(f"layers: expected names, but got {layers!r}")
    detector.layers_ = layer_names(detector.model_, zeros[:1], layers, detector.loss_)
    seen = characterize(detector.model_, zeros, layer=detector.layers_, loss=detector.loss_)
    options = {"epochs": 1} if detector.novelty_score in CLASSIFIER_SCORES else {}
    template = fit_score(detector.novelty_score, seen, seen, **options)
    learned = {name.removeprefix("score."): given.pop(name) for name in tensors if name.startswith("score.")}
    expected = template.tensors()
    if "delta_basis" in expected and {"delta_basis", "delta_gains"} <= set(learned):  # as many directions as were found
        basis, gains = learned["delta_basis"], learned["delta_gains"]
        K = basis.shape[1] if basis.ndim == 2 else 0
        if not 1 <= K <= len(expected["delta_basis"]) or not bool((gains > 0).all()):
            raise ModelFileError(f"score.delta_basis: expected 1 to {len(expected['delta_basis'])} directions, got {K}")
        expected |= {"delta_basis": expected["delta_basis"].new_zeros(len(expected["delta_basis"]), K)}
        expected |= {"delta_gains": expected["delta_gains"].new_ones(K + 1)}
    if "neighbour_delta" in expected:  # as many as there were
        found = {len(learned[name]) for name in NEIGHBOURS if name in learned and learned[name].ndim}
        for name in NEIGHBOURS:
            expected[name] = expected[name].new_zeros(max(found, default=0), *expected[name].shape[1:])
    _check_tensors(learned, expected, "score")
    if given:
        raise ModelFileError(f"tensors: unknown names {sorted(given)}")
    detector.fitted_parameters_ = detector.get_params(deep=False)
    detector.score_ = template.with_tensors({k: learned[k].to(like.device) for k, like in template.tensors().items()})
    return detector


def _sizes(architecture: dict, kind: str) -> dict[str, Any]:
    """The sizes of one of gradext's models, as in its ``sizes``."""
    sizes = {name: value for name, value in architecture.items() if name != "type"}
    for name, value in sizes.items():
        numbers = value if isinstance(value, list) and value else [value]
        if not all(type(number) is int and number > 0 for number in numbers):
            raise ModelFileError(f"{name}: expected positive integers, but got {value!r}")
    return sizes


def _is_named(layer: object) -> bool:
    if isinstance(layer, (list, tuple)):
        return len(layer) > 0 and all(isinstance(name, str) for name in layer)
    return layer is None or isinstance(layer, str)


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    if set(tensors) != set(expected):
        missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ModelFileError(f"{what}: tensors missing: {missing}, unknown: {unknown}")
    for name, tensor in tensors.items():
        like = expected[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ModelFileError(
                f"{what}.{name}: expected {like.dtype} {list(like.shape)}, but got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelFileError(f"{what}.{name}: expected finite values")


def _history(entries: dict) -> History:
    history = History(**entries)
    if type(history.best_epoch) is not int or not all(
        isinstance(losses, list) and all(type(loss) is float for loss in losses)
        for losses in (history.train, history.validation)
    ):
        raise ModelFileError("history: expected two lists of losses and an epoch")
    return history


def _profile(entries: dict) -> Profile:
    known = {name: _entry(entries, name, float) for name in ("low", "high")}
    for name in ("channel_mean", "channel_std"):
        values = _entry(entries, name, list)
        if len(values) not in (0, 3) or not all(type(value) is float and math.isfinite(value) for value in values):
            raise ModelFileError(f"profile: {name}: expected none or three numbers, but got {values!r}")
        known[name] = tuple(values)
    return Profile(**known)


def _entry(description: dict, key: str, kind: type, *, optional: bool = False) -> Any:
    value = description.get(key)
    if value is None and optional:
        return None
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ModelFileError(f"{key}: expected {kind.__name__}, but got {value!r}")
    return value


def _vector(tensors: dict[str, Tensor], name: str, size: int | None = None) -> np.ndarray:
    value = tensors.pop(name, None)
    if value is None or value.dtype != torch.float64 or value.ndim != 1 or size not in (None, len(value)):
        came = "none" if value is None else f"{value.dtype} {list(value.shape)}"
        raise ModelFileError(f"{name}: expected torch.float64 [{'n' if size is None else size}], but got {came}")
    if not value.isfinite().all():
        raise ModelFileError(f"{name}: expected finite values")
    return value.numpy()
