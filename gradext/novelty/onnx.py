"""A fitted detector's scoring function as an ONNX graph (`pip install onnx`), gradient scores included.

If a model is a chain of linear layers and activations, the gradient of its reconstruction error with respect to a layer
has a closed form: at a sigmoid under binary cross entropy it begins as ``p - x``, and every layer carries it back by
one product. This is a plain graph, in which every score, label-free or a classifier, is computed from the factors.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from .._version import __version__
from ..factors import GradFactors, LayerFactors, numerics
from .classifier import GradientFeatures
from .detector import DTYPES, FittedScore, NoveltyDetector
from .models import RotationNet, latent_loss, rotation_loss, turns_made
from .representations import RECONSTRUCTION_LOSSES, Characterization, characterize
from .scaling import MARGIN, SOFT, VECTORS
from .writing import atomic_write

# act'(z) for y = act(z): (layer, z, y) -> derivative. ONNX has no operators for torch's own.
DERIVATIVES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.ReLU: lambda m, z, y: (y > 0).to(y.dtype),
    nn.LeakyReLU: lambda m, z, y: m.negative_slope + (1 - m.negative_slope) * (z > 0).to(z.dtype),
    nn.ELU: lambda m, z, y: torch.where(z > 0, torch.ones_like(z), y + m.alpha),
    nn.Sigmoid: lambda m, z, y: y * (1 - y),
    nn.Tanh: lambda m, z, y: 1 - y.square(),
    nn.SiLU: lambda m, z, y: torch.sigmoid(z) + y * (1 - torch.sigmoid(z)),
    nn.GELU: lambda m, z, y: (1 + torch.erf(z / math.sqrt(2))) / 2 + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi),
    nn.Softplus: lambda m, z, y: torch.sigmoid(m.beta * z),
}
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
UNCHANGED = (nn.Identity, nn.Dropout)  # in evaluation mode
RESHAPES = (nn.Flatten, nn.Unflatten)
PROBES = 16  # random samples for which the graph has to give the detector's scores
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}  # of them, relative to the largest score


class ScoringGraph(nn.Module):
    """X [N, D] -> novelty [N] of a fitted `NoveltyDetector`, in operators that ONNX has.

    The model must be an `nn.Sequential`, or a module that calls its parts ``encoder`` and ``decoder``, or ``encoder``,
    ``mu`` (beside it ``logvar``) and ``decoder`` one after the other, as `VAE` does; each consists of linear
    layers on [N, features], convolutions of images (chosen layers are linear ones: of a `ConvVAE` the first), the
    activations of `DERIVATIVES`, Flatten, Unflatten, Identity and Dropout; or a `RotationNet`. Under the binary cross
    entropy it ends in a sigmoid. ``dtype``: of `DTYPES`; None: `default_dtype`.

    onnxruntime computes ELU, GELU, Softplus and convolutions in fp32 only. Inputs outside of [0, 1] that saturate that
    sigmoid completely may get other scores. Raises NotFittedError; ValueError for other models, with the reason, and if
    random samples get other scores than the detector's.
    """

    shift: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    floor: Tensor
    span: Tensor
    width: Tensor

    def __init__(self, detector: NoveltyDetector, dtype: str | None = None) -> None:
        super().__init__()
        check_is_fitted(detector)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, but got {dtype!r}")
        fitted = next(detector.model_.parameters()).dtype
        self.dtype = DTYPES[dtype or default_dtype(detector)]
        self.loss = detector.loss_
        self.turns = copy.deepcopy(detector.model_) if isinstance(detector.model_, RotationNet) else None
        layers, self.mu, logvar = ([], 0, None) if self.turns is not None else _chain(detector.model_)
        if self.loss == "bce" and type(layers[-1]) is not nn.Sigmoid:
            raise ValueError(f"model: expected a Sigmoid at its end for loss='bce' in ONNX, but got {layers[-1]}")
        self.places = _places(detector, layers) if layers else {}
        self.layers, self.logvar = nn.ModuleList(copy.deepcopy(layers)), copy.deepcopy(logvar)
        scaling = detector.scaling_
        if detector.channels_last_:
            raise ValueError("X: expected channels first, for ONNX, but they are last; fit on [N, C, H, W]")
        for name in VECTORS:
            self.register_buffer(name, torch.from_numpy(getattr(scaling, name)))
        self.register_buffer("width", torch.from_numpy(scaling.width))
        self.bent, self.ceiling = scaling.bent, detector.ceiling_
        self.to("cpu", self.dtype).eval().requires_grad_(False)
        # Shapes of one sample before and after each layer, as numbers: a shape that ONNX traces holds for one N only.
        values = list(itertools.accumulate(
            self.layers, lambda h, layer: layer(h), initial=torch.zeros(1, *detector.input_shape_, dtype=self.dtype)
        ))  # fmt: skip
        self.shapes = [value.shape[1:] for value in values]
        self.score = _score_in(detector, self.dtype)
        self._check(detector, fitted)

    def forward(self, X: Tensor) -> Tensor:
        x = (X - self.shift) / self.scale
        if self.bent:
            x = torch.where(x.abs() > SOFT, torch.sign(x) * (SOFT + torch.log(1 + (x.abs() - SOFT).clamp_min(0))), x)
        x = (x - self.floor) / self.span
        novelty = self._novelty(self._of_chain(x) if self.turns is None else _of_turns(self.turns, x))
        if self.ceiling is None:
            return novelty
        beyond = torch.maximum(X - self.high, self.low - X) / self.width - MARGIN
        excess = beyond.max(1).values.clamp_min(0)
        highest, median = self.ceiling
        unit = max(highest - median, abs(highest), float(np.finfo(np.float32).tiny))
        return torch.where(excess > 0, torch.maximum(novelty, highest + unit * torch.log(1 + excess)), novelty)

    def _of_chain(self, x: Tensor) -> Characterization:
        values = [x.reshape(-1, *self.shapes[0])]
        for layer, shape in zip(self.layers, self.shapes[1:], strict=True):
            values.append(values[-1].reshape(-1, *shape) if type(layer) in RESHAPES else layer(values[-1]))
        output, target = values[-1], x.reshape(-1, *self.shapes[-1])
        latent = x[:, :0]
        if self.logvar is not None:
            latent = latent_loss(values[self.mu + 1], self.logvar(values[self.mu]))
        # Under the binary cross entropy, the gradient before the last layer, the sigmoid.
        of_sigmoid = self.loss == "bce"
        delta = output - target if of_sigmoid else 2 * (output - target)
        factors, first = {}, min(self.places)
        for k in range(len(self.layers) - 1 - of_sigmoid, first - 1, -1):
            if k in self.places:
                factors[k] = _PlainFactors(values[k], delta)
            if k > first:
                delta = self._backward(k, values[k], values[k + 1], delta)
        gradients = LayerFactors((name, factors[k]) for k, name in self.places.items())
        pixels = RECONSTRUCTION_LOSSES[self.loss](output, target).flatten(1)
        return Characterization(pixels, latent, gradients)

    def _backward(self, k: int, z: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        """∂L/∂z from ``delta`` = ∂L/∂y, y = layer(z)."""
        layer = self.layers[k]
        if type(layer) is nn.Linear:
            return delta @ layer.weight
        if type(layer) in CONVOLUTIONS:
            return _through_convolution(layer, delta.reshape(-1, *self.shapes[k + 1]), self.shapes[k])
        if type(layer) in RESHAPES:
            return delta.reshape(-1, *self.shapes[k])
        return delta if type(layer) in UNCHANGED else delta * DERIVATIVES[type(layer)](layer, z, y)

    def _novelty(self, sample: Characterization) -> Tensor:
        if self.score.features is None or self.score.classifier is None:
            return self.score.differentiable(sample)
        made = self.score.features
        if made.representation != "gradient":
            return self.score.classifier(made(sample))
        features = GradientFeatures.of(_plain(made.whitened(sample.gradient)), made.mean, made.std)
        return self.score.classifier(replace(features, direction=_plain(features.direction)))

    @torch.no_grad()
    def _check(self, detector: NoveltyDetector, fitted: torch.dtype) -> None:
        """Run a module's forward: there is no other way to know what it does."""
        uniform = np.random.default_rng(0).random((PROBES, detector.n_features_in_))
        scaling = detector.scaling_
        X = scaling.low + scaling.width * (1.4 * uniform - 0.2)
        X[0, 0] = scaling.high[0] + 9 * scaling.width[0]
        with warnings.catch_warnings():
            # Warnings about samples unlike those of training, or about columns without names.
            warnings.simplefilter("ignore", UserWarning)
            expected = -torch.from_numpy(detector.score_samples(X))
        found = self(torch.from_numpy(X).to(self.dtype)).double()
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not error <= max(TOLERANCES[self.dtype], TOLERANCES[fitted]):
            raise ValueError(
                f"model: expected a forward that calls its parts one after the other, for ONNX, but {PROBES} random "
                f"samples get scores that differ from the detector's by {error:.2g} of the largest"
            )


def _of_turns(model: RotationNet, x: Tensor) -> Characterization:
    """The gradient of the views' summed cross entropy at the last layer: softmax minus the turn that was made."""
    features = model.features(x)
    logits = model.head(features)
    gradient = _PlainFactors(features, logits.softmax(2) - turns_made(logits))
    return Characterization(rotation_loss(logits), x[:, :0], LayerFactors({"head.weight": gradient}))


def _through_convolution(layer: Any, delta: Tensor, shape: torch.Size) -> Tensor:
    """∂L/∂z [N, *shape] of a convolution or a transposed one: each is the other's transpose."""
    options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    if type(layer) is nn.ConvTranspose2d:
        return F.conv2d(delta, layer.weight, **options)
    steps = zip(shape[1:], delta.shape[2:], layer.stride, layer.padding, layer.kernel_size, layer.dilation, strict=True)
    # The rest that the windows leave at the end, which the transpose does not cover.
    rest = tuple(size - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for size, n, s, p, k, d in steps)
    return F.conv_transpose2d(delta, layer.weight, output_padding=rest, **options)


class _PlainFactors(GradFactors):
    """Gradients, of one position or a few, with what scores ask of them in torch's own operators."""

    in_torchs_operators = True

    def materialize(self) -> Tensor:  # type: ignore[override]
        if self.delta.ndim == 2:
            return self.delta[:, :, None] * self.activation[:, None]
        return self.delta.transpose(1, 2) @ self.activation

    def sq_norm(self) -> Tensor:
        if self.delta.ndim == 2:
            return self.delta.square().sum(1) * self.activation.square().sum(1)
        return self.materialize().square().flatten(1).sum(1)

    def norm(self, p: float = 2) -> Tensor:
        return self.sq_norm().sqrt()

    def dot(self, reference: Tensor) -> Tensor:
        return ((self.delta @ reference) * self.activation).flatten(1).sum(1)

    def gram(self, other: GradFactors | None = None) -> Tensor:
        other = self if other is None else other
        if self.delta.ndim == 2:
            return (self.delta @ other.delta.transpose(0, 1)) * (self.activation @ other.activation.transpose(0, 1))
        return self.materialize().flatten(1) @ other.materialize().flatten(1).transpose(0, 1)

    def cosine(self, reference: Tensor) -> Tensor:
        return numerics.cosine(self.dot(reference), self.norm(), reference.norm())

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.delta.ndim == 2:
            value = ((self.delta @ weight) * self.activation).sum(2).t()  # [H, N, I] -> [N, H]
        else:
            value = self.materialize().flatten(1) @ weight.flatten(1).transpose(0, 1)
        return value if bias is None else value + bias

    def quadratic(self, diag: Tensor) -> Tensor:
        if self.delta.ndim == 2:
            return ((self.delta.square() @ diag) * self.activation.square()).sum(1)
        return (self.materialize().square() * diag).flatten(1).sum(1)

    def quadratic_kron(self, A_inv: Tensor, D_inv: Tensor) -> Tensor:
        if self.delta.ndim == 2:
            of_delta, of_activation = (((v @ M) * v).sum(1) for v, M in ((self.delta, D_inv), (self.activation, A_inv)))
            return of_delta * of_activation
        gradient = self.materialize()
        return ((D_inv @ gradient @ A_inv) * gradient).flatten(1).sum(1)


def default_dtype(detector: NoveltyDetector) -> str:
    """The detector's own; for models with convolutions ``"float32"``, the only one for which onnxruntime has them."""
    if any(isinstance(module, CONVOLUTIONS) for module in detector.model_.modules()):
        return "float32"
    fitted = next(detector.model_.parameters()).dtype
    return next(name for name in DTYPES if DTYPES[name] == fitted)


def _plain(gradient: GradFactors) -> _PlainFactors:
    return _PlainFactors(gradient.activation, gradient.delta)


def export_onnx(detector: NoveltyDetector, path: str | os.PathLike, *, dtype: str | None = None) -> None:
    """Write `ScoringGraph`: input ``X`` [N, D] of its ``dtype``, any N, output ``novelty`` [N], higher is more novel.

    Scores of an fp64 detector come out to 1e-9 of the largest in fp64, and to 1e-5 in fp32, whose rounding by 6e-8
    adds up over the inputs.

    Its metadata hold ``threshold`` (novel above), ``novelty_score``, ``target_fpr``, ``input_shape`` and
    ``gradext_version``. The file is whole or not written at all. Raises as `ScoringGraph` does, ImportError without the
    package onnx, OSError where the file cannot be written.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("ONNX graphs need the package onnx: pip install onnx")
    graph = ScoringGraph(detector, dtype)
    example = torch.rand(3, detector.n_features_in_, dtype=graph.dtype)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter needs onnxscript
        # Warnings of checks that the shapes have passed.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        torch.onnx.export(
            graph, (example,), content,  # type: ignore[arg-type]  # the older exporter takes files too
            input_names=["X"], output_names=["novelty"],
            dynamic_axes={"X": {0: "N"}, "novelty": {0: "N"}}, opset_version=17, dynamo=False,
        )  # fmt: skip
    import onnx

    written = onnx.load_model_from_string(content.getvalue())
    told = {
        "gradext_version": __version__,
        "novelty_score": detector.score_.name,
        "threshold": repr(-detector.offset_),  # novel above
        "target_fpr": repr(detector.fitted_fpr_),
        "input_shape": "x".join(map(str, detector.input_shape_)),
    }
    onnx.helper.set_model_props(written, told)
    with atomic_write(path) as file:
        file.write(written.SerializeToString())


# --- the chain -------------------------------------------------------------------------------------------------------


def _chain(model: nn.Module) -> tuple[list[nn.Module], int, nn.Module | None]:
    """The layers from input to reconstruction, the place of ``mu`` among them (0: there is none), and ``logvar``."""
    if type(model) is nn.Sequential:
        return list(_flat(model)), 0, None
    parts = {name: part for name, part in model.named_children() if name in ("encoder", "mu", "logvar", "decoder")}
    if set(parts) not in ({"encoder", "decoder"}, {"encoder", "mu", "logvar", "decoder"}):
        raise ValueError(
            "model: expected an nn.Sequential, or a module with the parts encoder and decoder, or encoder, mu, logvar "
            f"and decoder, for ONNX, but got {type(model).__name__} with {', '.join(parts) or 'none of them'}"
        )
    shape = getattr(model, "sample_shape", ())
    shaped = [nn.Unflatten(1, shape)] if len(shape) > 1 else []
    before, after = [nn.Flatten(), *shaped, *_flat(parts["encoder"])], list(_flat(parts["decoder"]))
    if "mu" not in parts:
        return before + after, 0, None
    for name in ("mu", "logvar"):
        if type(parts[name]) is not nn.Linear:
            raise ValueError(f"model: expected a linear layer {name}, for ONNX, but got {parts[name]}")
    return [*before, parts["mu"], *after], len(before), parts["logvar"]


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    known: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *DERIVATIVES, *RESHAPES, *UNCHANGED)
    if type(module) is nn.Sequential:
        for part in module:
            yield from _flat(part)
    elif type(module) in known and getattr(module, "approximate", "none") == "none" and _is_zero_padded(module):
        yield module
    else:
        names = ", ".join(kind.__name__ for kind in known)
        raise ValueError(f"model: expected layers of the kinds {names}, for ONNX, but got {module}")


def _is_zero_padded(module: nn.Module) -> bool:
    plain = getattr(module, "padding_mode", "zeros") == "zeros"
    return plain and not isinstance(getattr(module, "padding", 0), str)


def _places(detector: NoveltyDetector, layers: list[nn.Module]) -> dict[int, str]:
    """Where the chosen layers stand, place -> name, in the order of the choice."""
    parameter = next(detector.model_.parameters())
    sample = parameter.new_zeros(1, *detector.input_shape_)
    chosen = characterize(detector.model_, sample, layer=detector.layers_, loss=detector.loss_).gradients
    places = {}
    for name, factors in chosen.items():
        module = detector.model_.get_submodule(name.rpartition(".")[0])
        found = [k for k, layer in enumerate(layers) if layer is module]
        if len(found) != 1 or type(module) is not nn.Linear or factors.positions != 1:
            raise ValueError(
                f"layer: expected linear layers that run once, on [N, features], for ONNX, but {name!r} is not one"
            )
        places[found[0]] = name
    return places


def _score_in(detector: NoveltyDetector, dtype: torch.dtype) -> FittedScore:
    """The detector's score on the CPU, in another type: constants of the graph."""
    learned = {name: tensor.detach().cpu() for name, tensor in detector.score_.tensors().items()}
    # The scale of a classifier's features are numbers of Python's.
    score = detector.score_.with_tensors({k: t if k == "features" else t.to(dtype) for k, t in learned.items()})
    if score.classifier is not None:
        score.classifier.to("cpu", dtype).requires_grad_(False)
    return score
