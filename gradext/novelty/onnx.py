"""A fitted detector's scoring function as an ONNX graph (`pip install onnx`), gradient scores included.

The gradient with respect to a layer of a plain decoder has a closed form: at the last layer's output it is ``p - x``
for the binary cross entropy, at the first's it is that carried back through one matrix and one activation.
"""

from __future__ import annotations

import copy
import io
import os
import warnings

import torch
from torch import Tensor, nn

from .detector import NoveltyDetector
from .models import VAE, latent_loss
from .representations import reconstruction_loss
from .writing import atomic_write

LAYERS = {"first": 0, "decoder.0": 0, "last": 2, "decoder.2": 2}
SCORES = ("gradient_norm", "delta_norm", "gradient_cosine", "reconstruction_error", "latent_loss")


class ScoringGraph(nn.Module):
    """X [N, D] -> novelty [N], of a `NoveltyDetector` on gradext's `VAE` with a label-free score: plain operators.

    Raises ValueError for other models, layers and scores.
    """

    def __init__(self, detector: NoveltyDetector) -> None:
        super().__init__()
        if type(detector.model_) is not VAE:
            raise ValueError(f"model: expected gradext's VAE, but got {type(detector.model_).__name__}")
        for name, value, allowed in (
            ("novelty_score", detector.novelty_score, SCORES),
            ("layer", detector.layer, tuple(LAYERS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)} for ONNX, but got {value!r}")
        self.model = copy.deepcopy(detector.model_)
        self.score, self.place = detector.novelty_score, LAYERS[detector.layer]
        dtype, device = next(self.model.parameters()).dtype, next(self.model.parameters()).device
        for name, array in (("shift", detector.shift_), ("scale", detector.scale_)):
            self.register_buffer(name, torch.from_numpy(array).to(device, dtype))
        if self.score == "gradient_cosine":
            self.register_buffer("mean_gradient", detector.score_.tensors()["mean_gradient"])

    def forward(self, X: Tensor) -> Tensor:
        x = (X - self.shift) / self.scale
        first, _, last, _ = self.model.decoder
        hidden = self.model.encoder(x)
        z, logvar = self.model.mu(hidden), self.model.logvar(hidden)
        if self.score == "latent_loss":
            return latent_loss(z, logvar).sum(1)
        before = first(z)
        inner = torch.relu(before)
        p = torch.sigmoid(last(inner))
        if self.score == "reconstruction_error":
            return reconstruction_loss(p, x).sum(1)
        activation, delta = inner, p - x
        if self.place == 0:
            activation, delta = z, (delta @ last.weight) * (before > 0).to(delta.dtype)
        length = delta.square().sum(1).sqrt()
        if self.score == "delta_norm":
            return length
        norm = length * activation.square().sum(1).sqrt()
        if self.score == "gradient_norm":
            return norm
        dot = ((delta @ self.mean_gradient) * activation).sum(1)
        scale = norm * self.mean_gradient.square().sum().sqrt()
        return 1 - dot / scale.clamp_min(1e-12)


def export_onnx(detector: NoveltyDetector, path: str | os.PathLike) -> None:
    """Write the scoring function: input ``X`` [N, D] of the detector's ``dtype``, output ``novelty`` [N]."""
    graph = ScoringGraph(detector).cpu().eval()
    example = torch.rand(2, detector.n_features_in_, dtype=next(detector.model_.parameters()).dtype)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter needs onnxscript
        torch.onnx.export(
            graph, (example,), content, input_names=["X"], output_names=["novelty"],
            dynamic_axes={"X": {0: "N"}, "novelty": {0: "N"}}, opset_version=17, dynamo=False,
        )  # fmt: skip
    with atomic_write(path) as file:
        file.write(content.getvalue())
