"""All of Table 1 in one: the mean AUROC over classes of every score and set, from what `experiments.table1` has run.

    python -m experiments.summary [--out DIR]

1. Every score, of the convolutional VAE and of the perceptron, beside the paper's; ± is the standard deviation over
   runs (folds and seeds) of the average over classes. Only runs of all ten classes count.
2. The classes in which scores of the convolutional VAE are below the paper's gradient row.
3. What went beyond (``--members``, ``--gradcon``): the same runs with it and without, mean over those that both have.

Reads ``<out>/table1-*.jsonl``, prints Markdown and writes it to ``<out>/summary.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradext.novelty.demo import TITLES, markdown_table

from . import runs
from .runs import has_score
from .table1 import CHOICES, CLASS_NAMES, PAPER, values_of, whole_runs

SETS = ("mnist", "fashion-mnist", "cifar-10")
LABELS = {
    "gradient_classifier": "gradient classifier",
    "latent_classifier": "latent classifier",
    "reconstruction_classifier": "reconstruction classifier",
    "gradient_norm": "*label-free:* gradient norm",
    "delta_norm": "delta norm",
    "whitened_delta_norm": "whitened delta norm",
    "kronecker_fisher": "Kronecker Fisher norm",
    "diagonal_fisher": "diagonal Fisher norm",
    "combined_whitened_norm": "delta norms of three layers, all but the last whitened",
    "combined_delta_norm": "delta norms of three layers",
    "log_norm_density": "log-norm density of three layers",
    "joint_density": "joint density of their log-norms and both losses",
    "combined_evidence": "combined evidence: the joint density and both losses",
    "gradient_cosine": "1 - cosine to the mean gradient",
    "reconstruction_error": "reconstruction error, summed",
    "latent_loss": "latent loss, summed",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=runs.RESULTS, metavar="DIR", help="default: experiments/results")
    options = parser.parse_args(arguments)
    text = summary(options.out)
    (options.out / "summary.md").write_text(text)
    print(text)


def summary(folder: Path) -> str:
    logs = {path.stem.removeprefix("table1-"): runs.read(path) for path in sorted(folder.glob("table1-*.jsonl"))}
    logs = {name: rows for name, rows in logs.items() if rows and not name.endswith("-quick")}
    for name, rows in logs.items():
        if len({tuple(row.get(choice) for choice in (*CHOICES, "epochs", "channels")) for row in rows}) > 1:
            raise ValueError(f"table1-{name}.jsonl: expected runs of the same options, but they differ; use --out")
    whole = {name: whole_runs(rows, {}, range(10)) for name, rows in logs.items()}
    parts = [f"# Table 1 in one\n\n{scores(whole)}", f"## Below the paper's gradient row\n\n{below(whole)}"]
    for name, rows in logs.items():
        base = next((s for s in sorted(logs, key=len, reverse=True) if name.startswith(f"{s}-")), None)
        if base is not None and not name.endswith("-mlp"):
            parts.append(f"## {TITLES[base]}: {name.removeprefix(f'{base}-')}\n\n{compared(logs[base], rows)}")
    return "\n\n".join(parts) + "\n"


def scores(logs: dict[str, list[dict]]) -> str:
    head, columns = [""], []
    for dataset in SETS:
        for title, name in ((TITLES[dataset], dataset), ("perceptron", f"{dataset}-mlp")):
            head.append(title)
            columns.append({score: _cell(logs.get(name, []), score) for score in LABELS})
        head.append("paper")
        paper = PAPER[dataset]
        columns.append({score: f"{np.mean(paper[score]):.3f}" if score in paper else "" for score in LABELS})
    return markdown_table(head, [[label, *(c[score] for c in columns)] for score, label in LABELS.items()])


def _cell(rows: list[dict], score: str) -> str:
    if not rows or not has_score(rows, score):
        return ""
    means = values_of(rows, score).mean(1)
    return f"{means.mean():.3f}" + (f" ± {means.std(ddof=1):.3f}" if len(means) > 1 else "")


def below(logs: dict[str, list[dict]]) -> str:
    """The classes whose mean over runs is below the paper's gradient classifier."""
    head = ["score", *(TITLES[dataset] for dataset in SETS)]
    lines = [[LABELS[score].removeprefix("*label-free:* ")] for score in LABELS]
    for dataset in SETS:
        paper = np.array(PAPER[dataset]["gradient_classifier"])
        for line, score in zip(lines, LABELS, strict=True):
            rows = logs.get(dataset, [])
            behind = np.flatnonzero(values_of(rows, score).mean(0) < paper) if rows else []
            line.append("" if not rows else ", ".join(CLASS_NAMES[dataset][c] for c in behind) or "none")
    return markdown_table(head, lines)


def compared(base: list[dict], other: list[dict]) -> str:
    """The mean of every score over the runs that both logs have."""
    keys = ("fold", "seed", "inlier")
    without = {tuple(row[key] for key in keys): row["auroc"] for row in base}
    pairs = [(without[key], row["auroc"]) for row in other if (key := tuple(row[k] for k in keys)) in without]
    names = [score for score in LABELS if all(score in auroc for pair in pairs for auroc in pair)]
    means = {score: np.mean([[auroc[score] for auroc in pair] for pair in pairs], axis=0) for score in names}
    lines = [[LABELS[score], *(f"{value:.3f}" for value in means[score])] for score in names]
    classes = ", ".join(map(str, sorted({row["inlier"] for row in other})))
    return f"Mean of {len(pairs)} runs, of the classes {classes}.\n\n{markdown_table(['', 'without', 'with'], lines)}"


if __name__ == "__main__":
    main()
