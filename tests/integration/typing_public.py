"""The public interface as a user's type checker sees it; checked by `mypy --strict`, never run."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import gradext
from gradext.novelty import VAE, Calibration, NoveltyDetector, benjamini_hochberg, characterize, load, save


def gradients(model: nn.Module, x: Tensor) -> None:
    grads = gradext.batch_layer_grads(model, x, loss="mse", layers=["0", model, nn.Linear], exclude="*.bias")
    assert_type(grads, gradext.LayerGrads)
    assert_type(grads["0.weight"], Tensor)
    assert_type(gradext.batch_layer_grads(model, {"x": x}, dtype=torch.float16, out=None), gradext.LayerGrads)
    gradext.batch_layer_grads(model, [x, {"mask": x}], layers=lambda name, p: p.ndim > 1, mixing="allow", segments=x)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().flatten(1).sum(1)

    factors = gradext.batch_layer_factors(model, (x, x), loss=loss, layers="trainable", target=x)
    assert_type(factors, gradext.LayerFactors)
    assert_type(factors["0.weight"], gradext.GradFactors)
    assert_type(factors["0.weight"].norm(), Tensor)
    assert_type(factors["0.weight"][:4].to(torch.float64).materialize(), Tensor)
    assert_type(factors["0.weight"].kron_fisher(), tuple[Tensor, Tensor])
    assert_type(factors.clipped_sum(max_norm=1.0), gradext.LayerGrads)
    assert_type(gradext.LayerFactors.cat([factors, factors]).gram(), Tensor)


def watched(model: nn.Module, x: Tensor) -> None:
    with gradext.watch(model, layers=model, train=True) as watch:
        losses = model(x).square().sum(1)
    losses.mean().backward()
    assert_type(watch.factors(), gradext.LayerFactors)
    assert_type(watch.grads(losses), gradext.LayerGrads)
    assert_type(watch.coverage.left_out, dict[str, str])


def data_sets(model: nn.Module, x: Tensor, batches: list[Tensor]) -> None:
    assert_type(gradext.iter_layer_grads(model, batches, memory_budget=1 << 28), Iterator[gradext.LayerGrads])
    norms = gradext.iter_layer_grads(model, batches, reduce=lambda factors: factors.norm())
    assert_type(norms, Iterator[Tensor])
    statistics = gradext.GradStatistics(kron_fisher=True).partial_fit(gradext.batch_layer_factors(model, x))
    assert_type(statistics.mean, dict[str, Tensor])
    assert_type(statistics.kron_inverses(), dict[str, tuple[Tensor, Tensor]])


@gradext.register_layer(nn.Bilinear)
def own_rule(layer: nn.Module, input: Tensor, delta: Tensor) -> dict[str, gradext.GradFactors | Tensor]:
    return {"bias": delta}


def novelty(X: np.ndarray, x: Tensor) -> None:
    detector = NoveltyDetector("delta_norm", model=VAE(), epochs=0, random_state=0).fit(X, X_calibration=x)
    assert_type(detector, NoveltyDetector)
    assert_type(detector.score_samples(x), np.ndarray)
    assert_type(detector.predict([[0.0, 1.0]]), np.ndarray)
    assert_type(benjamini_hochberg(detector.p_values(X), 0.1), np.ndarray)
    save(detector, "model.gradext")
    assert_type(load("model.gradext", device="cpu"), NoveltyDetector)
    assert_type(characterize(VAE(), x, layer=("first", "last")).gradient, gradext.GradFactors)
    assert_type(Calibration(X).threshold(0.05), float)


def refused(model: nn.Module, x: Tensor) -> None:
    gradext.batch_layer_grads(model, x, layer="first")  # type: ignore[call-arg]
    gradext.batch_layer_factors(model, x).norm("2")  # type: ignore[call-arg]
    NoveltyDetector(novelty_score=3)  # type: ignore[arg-type]
