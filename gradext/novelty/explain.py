"""Why a sample is novel: where, which features, which layers, and the training samples with the nearest gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from ..layer_grads import batch_layer_factors
from .detector import NoveltyDetector, Rows
from .representations import ERRORS, Characterization, factors_of, in_order, layer_names, parts_of
from .scaling import is_image

ROWS_AT_A_TIME = 256


def layer_shares(detector: NoveltyDetector, X: Rows) -> dict[str, np.ndarray]:
    """Each decoder weight's share of the squared gradient norm, ``‖G_l‖² / Σ_k ‖G_k‖²``: name -> [N].

    If all gradients are zero, so are the shares.
    """
    samples = _samples(detector, X)
    names = detector.layers_
    if detector.loss_ != "rotation":
        names = layer_names(detector.model_, samples[:1], None, detector.loss_)
    parts: list[dict[str, Tensor]] = []
    for batch in samples.split(ROWS_AT_A_TIME):
        factors = factors_of(detector.model_, batch, detector.loss_, names)
        parts.append({name: f.sq_norm().detach() for name, f in factors.items()})
    squares = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    total = functools.reduce(torch.add, squares.values())
    return {n: torch.where(total > 0, s / total, torch.zeros_like(s)).cpu().numpy() for n, s in squares.items()}


def residual(detector: NoveltyDetector, X: Rows) -> np.ndarray:
    """Input minus reconstruction, [N, *input_shape], in units of the scale: pixels in [0, 1], or standard deviations.

    It shows where a picture is novel, or which feature of a row. `saliency`, the derivative of the score, is large
    wherever the score reacts, and shows that less well.
    """
    return _residual_of(detector, _samples(detector, X))


def _residual_of(detector: NoveltyDetector, samples: Tensor) -> np.ndarray:
    _needs_reconstruction(detector)
    parts = []
    for batch in samples.split(ROWS_AT_A_TIME):
        with torch.no_grad():
            reconstruction, _ = parts_of(detector.model_(batch))
        parts.append((batch - reconstruction.reshape(batch.shape)).cpu().double())
    span = detector._arranged(torch.from_numpy(detector.scaling_.span)[None])
    return (torch.cat(parts) * span).numpy()


def expected(detector: NoveltyDetector, X: Rows) -> np.ndarray:
    """The reconstructions in the units of ``X`` itself, [N, D]: what the model expects for these samples."""
    return _expected_of(detector, _samples(detector, X))


def _needs_reconstruction(detector: NoveltyDetector) -> None:
    if detector.loss_ == "rotation":
        raise ValueError("model: a RotationNet reconstructs nothing, so that there is no residual")


def _expected_of(detector: NoveltyDetector, samples: Tensor) -> np.ndarray:
    _needs_reconstruction(detector)
    parts = []
    for batch in samples.split(ROWS_AT_A_TIME):
        with torch.no_grad():
            reconstruction = parts_of(detector.model_(batch))[0].reshape(batch.shape).cpu().double()
        if detector.channels_last_:
            reconstruction = reconstruction.permute(0, 2, 3, 1)
        parts.append(reconstruction.flatten(1))
    return detector.scaling_.inverse(torch.cat(parts).numpy())


def heat(detector: NoveltyDetector, X: Rows) -> np.ndarray:
    """Maps [N, H, W] of images: the largest absolute value of the `residual` over the channels.

    A `RotationNet` has no reconstruction: there it is how far the first two convolutions' outputs are from what they
    were in training, ``mean_c (h_c - m_c)² / v_c`` with the running statistics m, v of their batch normalisations,
    smoothed. It shows colours and edges that are new, less so parts of other objects.
    """
    if not is_image(detector.input_shape_):
        raise ValueError(f"X: expected images, but samples have the shape {list(detector.input_shape_)}")
    if detector.loss_ == "rotation":
        deviation = np.concatenate(
            [_deviation(detector.model_, b) for b in _samples(detector, X).split(ROWS_AT_A_TIME)]
        )
        smooth = max(detector.input_shape_[-2:]) / 20
        return gaussian_filter(deviation, (0, smooth, smooth))
    sizes = np.abs(residual(detector, X))
    return sizes if sizes.ndim == 3 else sizes.max(1)


def _deviation(model: Any, batch: Tensor) -> np.ndarray:
    """Of the first two convolutions' outputs from training's, in squared standard deviations -> [B, H, W]."""
    found: list[Tensor] = []

    def keep(norm: Any, inputs: tuple[Tensor]) -> None:
        mean, variance = (t[:, None, None] for t in (norm.running_mean, norm.running_var + norm.eps))
        upright = inputs[0].unflatten(0, (len(batch), -1))[:, 0]
        found.append(((upright - mean).square() / variance).mean(1, keepdim=True))

    norms = [module for module in model.body.modules() if isinstance(module, nn.BatchNorm2d)][:2]
    hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
    try:
        with torch.no_grad():
            model.features(batch, mirrored=False)
    finally:
        for hook in hooks:
            hook.remove()
    H = model.sample_shape[1]
    both = [F.interpolate(x, size=(H, H), mode="bilinear").squeeze(1) for x in found]
    return torch.stack(both).mean(0).cpu().double().numpy()


class Reason(NamedTuple):
    """A feature with an unexpected value; share: its part of the squared residual of the sample."""

    feature: str
    value: float
    expected: float
    share: float


def reasons(detector: NoveltyDetector, X: Rows, *, k: int = 3) -> list[list[Reason]]:
    """Of each sample the ``k`` features with the largest residual, the largest first."""
    X = detector._validated(X)
    samples = _samples_of(detector, X)
    squares = np.square(_residual_of(detector, samples).reshape(len(X), -1))
    if detector.channels_last_:
        C, H, W = detector.input_shape_
        squares = squares.reshape(-1, C, H, W).transpose(0, 2, 3, 1).reshape(len(X), -1)
    shares = squares / np.maximum(squares.sum(1, keepdims=True), np.finfo(np.float64).tiny)
    wanted, names = _expected_of(detector, samples), getattr(detector, "feature_names_in_", None)
    best = np.argsort(-shares, axis=1, kind="stable")[:, :k]
    return [
        [
            Reason(
                f"feature {j}" if names is None else str(names[j]), float(X[i, j]), float(wanted[i, j]),
                float(shares[i, j]),
            )
            for j in row
        ]
        for i, row in enumerate(best.tolist())
    ]  # fmt: skip


def saliency(detector: NoveltyDetector, X: Rows) -> np.ndarray:
    """``∂ novelty / ∂ u`` of each sample -> [N, *input_shape].

    u, as input and as target, is in the units of the scale: pixels in [0, 1], or a table's standard deviations.
    """
    batches = _samples(detector, X).split(ROWS_AT_A_TIME)
    found = torch.cat([_saliency(detector, batch).cpu() for batch in batches])
    span = detector._arranged(torch.from_numpy(detector.scaling_.span)[None])
    return (found / span).numpy()


def _saliency(detector: NoveltyDetector, batch: Tensor) -> Tensor:
    shifted = _Shifted(detector.model_, batch).eval()

    def error(output: Tensor, target: Tensor) -> Tensor:
        return ERRORS[detector.loss_](output, target + shifted.shift).flatten(1)

    layers = [f"model.{name}" for name in detector.layers_]
    factors = batch_layer_factors(
        shifted, batch, loss=lambda output, target: error(parts_of(output)[0], target).sum(1), layers=layers,
        create_graph=True,
    )  # fmt: skip
    reconstruction, latent = parts_of(shifted(batch))
    sample = Characterization(error(reconstruction, batch), latent, in_order(factors, layers))
    (gradient,) = torch.autograd.grad(detector.score_.differentiable(sample).sum(), shifted.shift)
    return gradient


def nearest_training(
    detector: NoveltyDetector, X: Rows, X_training: Rows, *, k: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``X_training`` whose gradients have the largest cosine, and the cosines: two arrays [N, k].

    ``cos(G_i, G_j)`` of the detector's layers, from the factored Gram matrix: no gradient is written.
    """
    samples, training = _samples(detector, X), _samples(detector, X_training)
    if not 1 <= k <= len(training):
        raise ValueError(f"k: expected 1 to {len(training)}, the number of training samples, but got {k!r}")
    of_samples = factors_of(detector.model_, samples, detector.loss_, detector.layers_)
    cosines = []
    for batch in training.split(ROWS_AT_A_TIME):
        factors = factors_of(detector.model_, batch, detector.loss_, detector.layers_)
        gram = sum(of_samples[name].gram(factors[name]) for name in factors)
        norms = torch.outer(of_samples.norm(), factors.norm())
        cosines.append((gram / norms.clamp_min(torch.finfo(norms.dtype).tiny)).detach())
    best = torch.cat(cosines, dim=1).topk(k, dim=1)
    return best.indices.cpu().numpy(), best.values.cpu().numpy()


class _Shifted(nn.Module):
    """``model(x + shift)``: shift is differentiated, because gradext treats inputs as constants."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model, self.shift = model, nn.Parameter(torch.zeros_like(x))

    def forward(self, x: Tensor) -> Any:
        return self.model(x + self.shift)


def _samples(detector: NoveltyDetector, X: Rows) -> Tensor:
    return _samples_of(detector, detector._validated(X))


def _samples_of(detector: NoveltyDetector, X: np.ndarray) -> Tensor:
    like = next(detector.model_.parameters())
    return detector._as_samples(X, like.dtype).to(like.device)
