"""What the classifiers trained against noise learn, and what features cost: ablations around the paper's Table 1.

    python -m experiments.ablations --data-dir DIR [--dataset mnist] [--classes 0 5 8] [--channels 0] [--quick]

1. The classifiers by the noise of their training outliers, clipped to [0, 1] or not, and by how gradients are scaled,
   with the AUROC on held-out noise beside that on real outliers: what they were trained for, and what they are for.
2. Why the reconstruction row is low: the mean error on the pixels that are blank in most training inliers (background)
   and on the others, of test inliers, of their noisy copies, and of real outliers (CIFAR-10 has no such pixels).
3. The time for the features of an image: all of a batch, and one image at a time, as in the authors' public code.

Results: ``<out>/ablations-<dataset>[-conv].jsonl`` and ``.md``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from gradext import GradFactors, datasets
from gradext.losses import bce
from gradext.novelty import (
    VAE,
    Characterization,
    ConvVAE,
    GradientFeatures,
    characterize,
    distort,
    features,
    train,
    train_classifier,
)
from gradext.novelty.demo import TITLES, markdown_table
from gradext.oracles import loop_layer_grads

from . import runs

NOISES = ((0.1, False), (0.1, True), (0.4, False), (0.4, True))
GROUPS = ("inliers", "inliers with noise", "inliers with clipped noise", "outliers")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "fashion-mnist", "cifar-10"))
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 5, 8], metavar="C")
    parser.add_argument("--channels", type=int, default=0, metavar="N", help="of the ConvVAE; 0: a perceptron")
    options = parser.parse_args(arguments)
    tasks = [
        {"dataset": options.dataset, "inlier": inlier, "seed": seed, "epochs": 5 if options.quick else runs.EPOCHS}
        | ({"channels": options.channels} if options.channels else {})
        for seed in options.seeds
        for inlier in options.classes
    ]
    # A log each: the task of a perceptron, which names no channels, would find the rows of the others.
    name = f"ablations-{options.dataset}{'-conv' if options.channels else ''}{'-quick' if options.quick else ''}"
    work = functools.partial(evaluate, data_dir=options.data_dir)
    rows = runs.run(options.out / f"{name}.jsonl", tasks, work, jobs=options.jobs, description=name)
    text = render(rows)
    (options.out / f"{name}.md").write_text(text)
    print(text)


def evaluate(task: dict, data_dir: str | None) -> dict:
    seed, image_set = task["seed"], datasets.load(task["dataset"], data_dir)
    split = datasets.one_class_split(image_set, task["inlier"], seed=seed)
    x, validation, test, outliers = (
        torch.from_numpy(image_set.pixels(index)).flatten(1)
        for index in (split.train, split.validation, split.test, split.outliers)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "channels" in task:
            model: VAE = ConvVAE((1, *image_set.shape)[-3:], task["channels"])
        else:
            model = VAE(x.shape[1])
        model.eval()
    train(model, x, validation, epochs=task["epochs"], seed=seed, progress=False)
    seen = functools.partial(characterize, model)
    inside, inside_test, outside_test = seen(x), seen(test), seen(outliers)
    auroc = {}
    for std, clip in NOISES:
        noisy = seen(distort(x, std=std, clip=clip, seed=seed))
        noisy_test = seen(distort(test, std=std, clip=clip, seed=seed + 1))
        for name, featurize in scalings(inside).items():
            if name.startswith("gradient, ") and (std, clip) != NOISES[0]:
                continue
            classifier = train_classifier(featurize(inside), featurize(noisy), seed=seed)
            score = torch.no_grad()(lambda part, c=classifier, f=featurize: c(f(part)).numpy())
            of_test = score(inside_test)
            auroc[f"{name}, noise {std:g}{' clipped' if clip else ''}"] = [
                _auroc(of_test, score(part)) for part in (noisy_test, outside_test)
            ]
    copies = (seen(distort(test, clip=clip, seed=seed + 1)) for clip in (False, True))
    background = x.median(0).values == 0
    return {
        "auroc": auroc,
        "error": errors(background, inside_test, *copies, outside_test) if background.any() else None,
        "microseconds": timing(model, test[:256]),
    }


def scalings(inside: Characterization) -> dict[str, Callable]:
    """The classifiers' features by name."""

    def raw(sample: Characterization) -> GradientFeatures:
        return GradientFeatures(sample.gradient, torch.zeros(len(sample)))

    whitened = features("gradient", inside)

    def weighed(direction: float, magnitude: float) -> Callable[[Characterization], GradientFeatures]:
        def scaled(sample: Characterization) -> GradientFeatures:
            found = whitened(sample)
            factors = GradFactors(found.direction.activation, direction * found.direction.delta)
            return GradientFeatures(factors, magnitude * found.magnitude)

        return scaled

    return {
        "reconstruction": features("reconstruction", inside),
        "gradient": whitened,
        "gradient, not whitened": features("gradient", inside, whiten=False),
        "gradient, raw": raw,
        "gradient, direction alone": weighed(1, 0),
        "gradient, direction weighed by a third": weighed(1 / 3, 1),
        "gradient, direction weighed by a tenth": weighed(0.1, 1),
        "gradient, magnitude alone": weighed(0, 1),
    }


def errors(background: Tensor, *parts: Characterization) -> list[list[float]]:
    """The mean error of a pixel, nats, [background, other] for each part."""
    means = [part.reconstruction.mean(0) for part in parts]
    return [[round(m[which].mean().item(), 5) for which in (background, ~background)] for m in means]


def timing(model: nn.Module, x: Tensor, alone: int = 32) -> dict[str, float]:
    """Microseconds an image for the first decoder layer's gradient: of a batch as factors, and one image at a time."""
    name = "decoder.0.weight"
    routes = {
        f"batch of {len(x)}": (len(x), lambda: characterize(model, x).gradient.materialize()),
        "one at a time": (alone, lambda: loop_layer_grads(model, x[:alone], bce, [name])[name]),
    }
    results = [call() for _, call in routes.values()]
    rounding = 1e-6 * results[1].abs().max().item()  # of a sum that cancels, against those that do not
    torch.testing.assert_close(results[0][:alone], results[1], rtol=1e-4, atol=rounding)
    times = {}
    for route, (count, call) in routes.items():
        rounds = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            rounds.append(1e6 * (time.perf_counter() - start) / count)
        times[route] = round(float(np.median(rounds)), 1)
    return times


def _auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    outlier = np.repeat([0, 1], [len(inside), len(outside)])
    return round(float(roc_auc_score(outlier, np.concatenate([inside, outside]))), 5)


def render(rows: Sequence[dict]) -> str:
    name, classes = TITLES[rows[0]["dataset"]], [row["inlier"] for row in rows]
    channels = rows[0].get("channels")
    model = f"The VAE is convolutional (`ConvVAE`), of {channels} and {2 * channels} channels. " if channels else ""
    head = ["classifier on, trained against", *(f"class {c}: noise, real" for c in classes), "mean: noise, real"]
    lines = []
    for key in rows[0]["auroc"]:
        values = np.array([row["auroc"][key] for row in rows])
        lines.append([key, *(f"{noise:.3f}, {real:.3f}" for noise, real in (*values, values.mean(0)))])
    of_pixels = ""
    if all(row["error"] for row in rows):
        error = np.mean([row["error"] for row in rows], axis=0)
        cells = [[group, *(f"{v:.4f}" for v in values)] for group, values in zip(GROUPS, error, strict=True)]
        table = markdown_table(["", "background (blank in half of the inliers or more)", "other pixels"], cells)
        of_pixels = f"Mean reconstruction error of a pixel, nats, over these classes:\n\n{table}\n\n"
    times = {route: np.mean([row["microseconds"][route] for row in rows]) for route in rows[0]["microseconds"]}
    return (
        f"# Ablations: {name}\n\n{model}"
        f"AUROC of test inliers against their noisy copies, and against real outliers:\n\n"
        f"{markdown_table(head, lines)}\n\n{of_pixels}"
        "Time for the first decoder layer's gradient of an image, written out, microseconds on one thread:\n\n"
        f"{markdown_table(['', 'µs'], [[route, f'{value:.0f}'] for route, value in times.items()])}\n\n"
        f"{runs.origin(rows)}\n"
    )


if __name__ == "__main__":
    main()
