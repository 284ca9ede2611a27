"""The demo: one class of a data set as inliers, trained, scored, tabled, timed and drawn in under a minute.

It runs on one thread: the models are small, and on a machine with other work several threads wait for each other.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from .. import datasets
from ..layer_grads import batch_layer_factors, batch_layer_grads
from ..losses import bce
from ..oracles import loop_layer_grads, vmap_layer_grads
from .classifier import DIRECTION_LENGTH
from .detector import CLASSIFIER_SCORES, fit_score
from .models import VAE, ConvVAE
from .plots import novelty_figure
from .representations import LayerChoices, characterize, distort
from .scores import NEEDS, SCORES, Statistics
from .training import History, train

# The curves of the picture: more could not be distinguished.
ROC = ("gradient_norm", "combined_whitened_norm", "reconstruction_error", "latent_loss", *CLASSIFIER_SCORES)
TITLES = {"digits": "digits", "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar-10": "CIFAR-10"}


@dataclass(frozen=True, eq=False)
class ClassResult:
    """One class as inliers: the trained model, all scores of the test images (inliers first), and which are outliers.

    held_out: all scores of the validation inliers.
    """

    model: VAE
    history: History
    split: datasets.OneClassSplit
    images: np.ndarray
    scores: dict[str, np.ndarray]
    outlier: np.ndarray
    held_out: dict[str, np.ndarray]

    def auroc(self) -> dict[str, float]:
        """Area under the ROC curve of each score."""
        return {name: float(roc_auc_score(self.outlier, score)) for name, score in self.scores.items()}


def evaluate_class(
    image_set: datasets.ImageSet,
    inlier: int,
    *,
    fold: int = 0,
    seed: int = 0,
    model_seed: int | None = None,
    epochs: int | None = None,
    hidden_dim: int = 400,
    latent_dim: int = 20,
    channels: int | None = None,
    layer: LayerChoices = ("first", "encoder.0", "last"),
    noise_std: float = 0.1,
    noise_clip: bool = False,
    direction_length: float = DIRECTION_LENGTH,
    penalty: Callable[[nn.Module, Tensor], Tensor] | None = None,
    progress: bool = True,
) -> ClassResult:
    """The paper's protocol for one inlier class: train on its training part, score its test part and its outliers.

    ``channels``: of a `ConvVAE`; None: a `VAE` with ``hidden_dim``. ``seed`` is for the split, ``model_seed`` (default:
    the same) for everything else; ``penalty`` as for `train`, ``direction_length`` as for `features`.
    """
    split = datasets.one_class_split(image_set, inlier, fold=fold, seed=seed)
    seed = seed if model_seed is None else model_seed
    part = lambda index: torch.from_numpy(image_set.pixels(index)).flatten(1)  # noqa: E731
    x, validation, test = part(split.train), part(split.validation), np.concatenate([split.test, split.outliers])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if channels is None:
            model = VAE(x.shape[1], hidden_dim, latent_dim).eval()
        else:
            model = ConvVAE((1, *image_set.shape)[-3:], channels, latent_dim).eval()
    history = train(
        model, x, validation, epochs=epochs, seed=seed, penalty=penalty, progress=progress,
        description=f"class {inlier}",
    )  # fmt: skip
    score = fit_all_scores(
        model, x, validation, layer=layer, noise_std=noise_std, noise_clip=noise_clip, seed=seed,
        direction_length=direction_length,
    )  # fmt: skip
    outlier = np.arange(len(test)) >= len(split.test)
    return ClassResult(model, history, split, image_set.pixels(test), score(part(test)), outlier, score(validation))


def fit_all_scores(
    model: nn.Module,
    x: Tensor,
    validation: Tensor,
    *,
    layer: LayerChoices = ("first", "encoder.0", "last"),
    noise_std: float = 0.1,
    noise_clip: bool = False,
    seed: int = 0,
    **classifier,
) -> Callable[[Tensor], dict[str, np.ndarray]]:
    """A function from samples [N, D] to every score by name: the label-free ones and the paper's three classifiers.

    Label-free scores compare with the ``validation`` inliers, classifiers are trained on ``x`` and its distorted copy,
    with any further arguments of `fit_score`.
    """
    inliers, held_out = (characterize(model, part, layer=layer) for part in (x, validation))
    distorted = characterize(model, distort(x, std=noise_std, clip=noise_clip, seed=seed), layer=layer)
    statistics = Statistics.of(held_out)
    label_free = {
        name: score
        for name, score in SCORES.items()
        if all(getattr(statistics, field) is not None for field in NEEDS[name])
    }
    classifiers = {name: fit_score(name, inliers, distorted, seed=seed, **classifier) for name in CLASSIFIER_SCORES}

    def score(samples: Tensor) -> dict[str, np.ndarray]:
        seen = characterize(model, samples, layer=layer)
        values = {name: function(seen, statistics) for name, function in label_free.items()}
        values |= {name: classifier(seen) for name, classifier in classifiers.items()}
        return {name: value.double().numpy() for name, value in values.items()}

    return score


def run(
    dataset: str = "digits",
    *,
    data_dir: str | Path | None = None,
    inliers: Sequence[int] | None = (5,),
    out: str | Path = "gradext-demo",
    fold: int = 0,
    seed: int = 0,
    epochs: int | None = None,
    echo: Callable[[str], None] = print,
) -> dict[int, dict[str, float]]:
    """Run the demo for each class of ``inliers`` (None: all), print its tables, write its pictures into ``out``.

    Returns the AUROC of every score by class. Raises DatasetError for missing or damaged data, OSError for an ``out``
    that cannot be written to, both before anything is trained.
    """
    folder = _writable_folder(Path(out))
    image_set = datasets.load(dataset, data_dir)
    classes = sorted(set(image_set.labels.tolist())) if inliers is None else list(inliers)
    for inlier in classes:
        datasets.one_class_split(image_set, inlier, fold=fold, seed=seed)  # a wrong class raises before the training
    results = {}
    for k, inlier in enumerate(classes):
        start = time.perf_counter()
        with _one_thread():
            result = evaluate_class(image_set, inlier, fold=fold, seed=seed, epochs=epochs)
        seconds = time.perf_counter() - start
        results[inlier] = result.auroc()
        split = result.split
        echo(
            f"{dataset}, inlier class {inlier}: {len(split.train)} training, {len(split.validation)} validation, "
            f"{len(split.test)} test images, {len(split.outliers)} test outliers; {seconds:.1f} s"
        )
        picture = folder / f"{dataset}-{inlier}.png"
        _draw(
            result, f"Novelty detection on {TITLES[dataset]}: class {inlier} is normal, all others are novel"
        ).savefig(picture)
        if k == len(classes) - 1:
            echo("\n" + auroc_table(results) + "\n")
            with _one_thread():
                echo(speed_table(result.model, torch.from_numpy(result.images).flatten(1)) + "\n")
        echo(f"picture: {picture}")
    return results


def auroc_table(results: dict[int, dict[str, float]]) -> str:
    """AUROC by score (rows) and inlier class (columns), their mean last; Markdown."""
    classes = list(results)
    head = ["AUROC", *(f"class {c}" for c in classes), *(["mean"] if len(classes) > 1 else [])]
    groups = (("label-free scores", tuple(SCORES)), ("classifiers trained against noise", tuple(CLASSIFIER_SCORES)))
    rows = []
    for title, names in groups:
        rows.append([f"*{title}*", *[""] * (len(head) - 1)])
        for name in names:
            if not all(name in results[c] for c in classes):  # of a layer that is too large for it
                continue
            values = [results[c][name] for c in classes]
            values += [float(np.mean(values))] if len(classes) > 1 else []
            rows.append([name.replace("_", " "), *(f"{value:.3f}" for value in values)])
    return markdown_table(head, rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in (head, *rows)
    ]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(lines)


# --- speed -----------------------------------------------------------------------------------------------------------


def speed_table(model: VAE, x: Tensor, batch: int = 256, repeats: int = 5) -> str:
    """The last decoder layer's gradients by four routes, each checked against the loop, then timed in turn.

    Times are the best of ``repeats`` rounds, in each of which every route runs once: other work on the machine only
    makes a call slower.
    """
    x = x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch]
    weight: Any = model.decoder[-2].weight
    name = next(n for n, p in model.named_parameters() if p is weight)
    out = {name: torch.empty(batch, *weight.shape)}
    routes: dict[str, Callable[[], Tensor]] = {
        "single-sample loop": lambda: loop_layer_grads(model, x, bce, [name])[name],
        "torch.func vmap(grad)": lambda: vmap_layer_grads(model, x, bce, [name])[name],
        "gradext.batch_layer_grads": lambda: batch_layer_grads(model, x, layers=name)[name],
        "gradext.batch_layer_grads(out=)": lambda: batch_layer_grads(model, x, layers=name, out=out)[name],
        "gradext factors, norms only": lambda: batch_layer_factors(model, x, layers=name).norm(),
    }
    expected = routes["single-sample loop"]()
    for route, call in routes.items():
        value = call()
        wanted = expected if value.ndim == 3 else torch.linalg.vector_norm(expected.flatten(1), dim=1)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5, msg=f"{route}: {{}}".format)
    del expected, value, wanted
    times: dict[str, list[float]] = {route: [] for route in routes}
    for _ in range(repeats):
        for route, call in routes.items():
            call()  # warm up: the cache and the allocator are as after a call of the same route
            start = time.perf_counter()
            call()
            times[route].append(time.perf_counter() - start)
    best = {route: min(values) for route, values in times.items()}
    loop = best["single-sample loop"]
    head = [f"layer {weight.shape[0]}x{weight.shape[1]}, B = {batch}, one thread", "ms", "speed-up"]
    return markdown_table(head, [[route, f"{1e3 * t:.2f}", f"{loop / t:.1f}x"] for route, t in best.items()])


# --- output ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _writable_folder(folder: Path) -> Path:
    """Make the folder and try a file in it, so that a bad path raises before the training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out {folder}: expected a folder that can be written to, but {error.strerror}") from error
    return folder


def _draw(result: ClassResult, title: str):
    histograms = {
        "Reconstruction error": (result.scores["reconstruction_error"], "summed binary cross entropy, nats"),
        "Latent loss": (result.scores["latent_loss"], "summed KL divergence, nats"),
        "Gradient": (result.scores["gradient_norm"], "norm of the first decoder layer's gradient"),
    }
    roc = {name.replace("_", " "): result.scores[name] for name in ROC}
    return novelty_figure(title, histograms, roc, result.outlier, result.images, "gradient norm")
