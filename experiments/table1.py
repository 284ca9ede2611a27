"""Novel class detection (the paper's Table 1): AUROC for each class as the inlier class, by score.

    python -m experiments.table1 --dataset mnist --data-dir DIR [--folds 0 1 2 3 4] [--seeds 0] [--out DIR]

One VAE a class, fold and seed; the protocol is `gradext.datasets.one_class_split`'s. Every finished class is one line
of ``<out>/table1-<dataset>.jsonl``, so that an interrupted run goes on where it stopped; the table is rendered to
``<out>/table1-<dataset>.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import gradext
from gradext import datasets
from gradext.novelty.demo import evaluate_class, markdown_table
from gradext.novelty.detector import CLASSIFIER_SCORES
from gradext.novelty.scores import SCORES

PAPER = {
    "mnist": {
        "reconstruction_classifier": (0.043, 0.916, 0.293, 0.132, 0.103, 0.158, 0.101, 0.115, 0.291, 0.147),
        "latent_classifier": (0.956, 0.510, 0.687, 0.740, 0.852, 0.526, 0.675, 0.942, 0.348, 0.948),
        "gradient_classifier": (0.985, 0.994, 0.941, 0.928, 0.953, 0.926, 0.980, 0.960, 0.894, 0.968),
    },
    "fashion-mnist": {
        "reconstruction_classifier": (0.778, 0.952, 0.831, 0.799, 0.801, 0.787, 0.748, 0.939, 0.610, 0.932),
        "latent_classifier": (0.733, 0.642, 0.525, 0.877, 0.715, 0.831, 0.585, 0.961, 0.702, 0.835),
        "gradient_classifier": (0.913, 0.958, 0.883, 0.922, 0.907, 0.924, 0.798, 0.974, 0.925, 0.975),
    },
    "cifar-10": {
        "reconstruction_classifier": (0.600, 0.485, 0.539, 0.496, 0.532, 0.444, 0.601, 0.545, 0.634, 0.541),
        "latent_classifier": (0.683, 0.382, 0.560, 0.458, 0.649, 0.486, 0.724, 0.465, 0.662, 0.550),
        "gradient_classifier": (0.658, 0.543, 0.632, 0.461, 0.725, 0.493, 0.699, 0.490, 0.641, 0.477),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", choices=sorted(PAPER))
    parser.add_argument("--data-dir", metavar="DIR", help="default: the environment variable GRADEXT_DATA")
    parser.add_argument("--folds", type=int, nargs="+", default=[0], metavar="F")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), metavar="DIR")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / f"table1-{options.dataset}.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    finished = {(row["inlier"], row["fold"], row["seed"], row["epochs"]) for row in done}
    image_set = datasets.load(options.dataset, options.data_dir)
    for fold in options.folds:
        for seed in options.seeds:
            for inlier in range(10):
                if (inlier, fold, seed, options.epochs) in finished:
                    continue
                result = evaluate_class(image_set, inlier, fold=fold, seed=seed, epochs=options.epochs)
                row = {
                    "inlier": inlier,
                    "fold": fold,
                    "seed": seed,
                    "epochs": options.epochs,
                    "best_epoch": result.history.best_epoch,
                    "auroc": {name: round(value, 5) for name, value in result.auroc().items()},
                    **provenance(),
                }
                done.append(row)
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{options.dataset} fold {fold} seed {seed} class {inlier}: {row['auroc']}", flush=True)
    text = render(options.dataset, [row for row in done if row["epochs"] == options.epochs])
    (options.out / f"table1-{options.dataset}.md").write_text(text)
    print("\n" + text)


def render(dataset: str, rows: list[dict]) -> str:
    """The table: mean AUROC over folds and seeds by class, their average, and the paper's rows where it has them."""
    head = ["AUROC", *map(str, range(10)), "average"]
    lines = []
    for name in (*SCORES, *CLASSIFIER_SCORES):
        values = [np.mean([row["auroc"][name] for row in rows if row["inlier"] == c]) for c in range(10)]
        lines.append([name.replace("_", " "), *(f"{v:.3f}" for v in values), f"{np.mean(values):.3f}"])
        if name in PAPER[dataset]:
            paper = PAPER[dataset][name]
            lines.append(["*the paper's*", *(f"*{v:.3f}*" for v in paper), f"*{np.mean(paper):.3f}*"])
    runs = sorted({(row["fold"], row["seed"]) for row in rows})
    facts = sorted({(row["commit"], row["versions"], row["machine"]) for row in rows})
    notes = [
        f"`{rows[-1]['command']}`; mean over {len(runs)} run(s), (fold, seed) = {', '.join(map(str, runs))}.",
        *(f"Commit {commit}; {versions}; {machine}." for commit, versions, machine in facts),
    ]
    return f"# Novel class detection: {dataset}\n\n{markdown_table(head, lines)}\n\n" + "\n".join(notes) + "\n"


def provenance() -> dict[str, str]:
    """Command, commit, versions and machine of a result."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    arguments = [a for k, a in enumerate(sys.argv[1:], 1) if "--data-dir" not in (a, sys.argv[k - 1])]
    return {
        "command": " ".join(["python -m experiments.table1", *arguments]),
        "commit": git.stdout.strip() or "unknown",
        "versions": f"gradext {gradext.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


if __name__ == "__main__":
    main()
