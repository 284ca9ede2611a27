"""CIFAR-10 one class at a time by a network that tells turns (`gradext.novelty.RotationNet`): AUROC by score.

    python -m experiments.rotation --data-dir DIR --models DIR [--classes 1 3 ...] [--seeds 0] [--quick]

The inliers are the class's 5,000 training images, of which the detector holds 5% out to choose the epoch and 5% for its
threshold; the test part is the original one, 1,000 inliers and as many outliers (`gradext.datasets.one_class_split`).
No outlier is seen before the test. ``softmax`` is the score of the literature, the summed cross entropy of the views;
all others are of the gradient of the last layer.

Every trained detector is kept in --models as ``<class>-<seed>.gradext``; one that is there is not trained again, so
that scores can be added. Results: ``<out>/rotation-cifar-10.jsonl``, one line a class, and the table ``.md``; with
--epochs N ``rotation-cifar-10-N``.
"""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from gradext import datasets
from gradext.novelty import NoveltyDetector, fit_score, load, save

from . import runs
from .table1 import PAPER

SOFTMAX = "reconstruction_error"
SCORES = (
    SOFTMAX, "gradient_mahalanobis", "gradient_norm", "whitened_gradient", "kronecker_fisher", "gradient_cosine",
    "local_gradient",
)  # fmt: skip
NAMES = ("planes", "cars", "birds", "cats", "deer", "dogs", "frogs", "horses", "ships", "trucks")
ORDER = (1, 3, 0, 5, 2, 4, 7, 6, 8, 9)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="where trained detectors are kept")
    parser.add_argument("--classes", type=int, nargs="+", default=ORDER, metavar="C", help="default: all ten")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: the detector's own")
    options = parser.parse_args(arguments)
    epochs = 1 if options.quick else options.epochs
    tasks = [{"inlier": c, "seed": seed, "epochs": epochs} for seed in options.seeds for c in options.classes]
    length = "-quick" if options.quick else "" if epochs is None else f"-{epochs}"
    log = options.out / f"rotation-cifar-10{length}.jsonl"
    work = functools.partial(evaluate, data_dir=options.data_dir, models=options.models)
    runs.run(log, tasks, work, jobs=options.jobs, description="rotation")
    text = render([row for row in runs.read(log) if row["epochs"] == epochs])
    log.with_suffix(".md").write_text(text)
    print(text)


def evaluate(task: dict, data_dir: str | None, models: Path) -> dict:
    image_set = _cifar(data_dir)
    split = datasets.one_class_split(image_set, task["inlier"], seed=0)
    images = image_set.images.reshape(len(image_set.labels), -1)
    X = images[np.sort(np.concatenate([split.train, split.validation]))]
    T = images[np.concatenate([split.test, split.outliers])]
    outlier = np.repeat([0, 1], [len(split.test), len(split.outliers)])
    detector, seconds = fitted(task, X, models)
    inliers, test = (detector._characterize(detector._as_samples(part, torch.float32)) for part in (X, T))
    scores = {name: fit_score(name, inliers, None)(test).numpy() for name in SCORES}
    return {
        "auroc": {name: round(float(roc_auc_score(outlier, score)), 5) for name, score in scores.items()},
        "training_seconds": seconds,
        "best_epoch": detector.history_.best_epoch,
        "held_out_loss": detector.history_.validation[detector.history_.best_epoch],
        "trained_epochs": len(detector.history_.train),
    }


def fitted(task: dict, X: np.ndarray, models: Path) -> tuple[NoveltyDetector, float]:
    """The task's detector, of the file where it is there, and the seconds of CPU that its fit took."""
    length = "" if task["epochs"] is None else f"-{task['epochs']}"
    path = models / f"{task['inlier']}-{task['seed']}{length}.gradext"
    told = path.with_suffix(".json")
    if not told.exists():
        models.mkdir(parents=True, exist_ok=True)
        detector = NoveltyDetector(
            SOFTMAX, model="rotation", epochs=task["epochs"], random_state=task["seed"], validation_fraction=0.05,
            calibration_fraction=0.05, dtype="float32",
        )  # fmt: skip
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector.fit(X.reshape(-1, 3, 32, 32))
        save(detector, path)
        told.write_text(json.dumps(round(time.process_time() - start, 1)))
    return load(path), json.loads(told.read_text())


@functools.cache
def _cifar(data_dir: str | None) -> datasets.ImageSet:
    return datasets.load("cifar-10", data_dir)


def render(rows: Sequence[dict]) -> str:
    rows = sorted(rows, key=lambda row: (row["inlier"], row["seed"]))
    columns = list(rows[0]["auroc"])
    paper = PAPER["cifar-10"]["gradient_classifier"]
    lines = [
        "# CIFAR-10, one class, by a network that tells turns",
        "",
        f"AUROC; {len(rows)} of 10 classes." if len(rows) < 10 else "AUROC.",
        "",
        "| class | paper | " + " | ".join("softmax" if n == SOFTMAX else n for n in columns) + " | training, s |",
        "| --- |" + " --- |" * (len(columns) + 2),
    ]
    for row in rows:
        cells = [paper[row["inlier"]], *(row["auroc"][name] for name in columns)]
        best = max(cells)
        shown = " | ".join(f"**{cell:.3f}**" if cell == best else f"{cell:.3f}" for cell in cells)
        lines.append(f"| {NAMES[row['inlier']]} | {shown} | {row['training_seconds']:.0f} |")
    cells = [mean(paper[row["inlier"]] for row in rows), *(mean(row["auroc"][n] for row in rows) for n in columns)]
    lines += [
        f"| mean | {' | '.join(f'{cell:.3f}' for cell in cells)} | {mean(r['training_seconds'] for r in rows):.0f} |",
        "",
        "The paper's column is its gradient classifier on a VAE.",
        "",
        runs.origin(rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
