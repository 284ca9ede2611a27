"""Histograms of inliers and outliers (the paper's Fig. 2): digit 5 of MNIST against the other digits.

    python -m experiments.fig2 --data-dir DIR [--inlier 5] [--folds 0 1 2 3 4] [--jobs 2] [--quick]

A VAE is trained on the inlier digit; reconstruction error, latent loss and the norm of the first decoder layer's
gradient are drawn for test inliers and as many outliers, with the percentage of samples in the histograms' overlap. Of
the paper's own percentages its text holds none. Results: ``<out>/fig2.jsonl``, ``.md`` and ``.png`` (the first fold).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from gradext import datasets
from gradext.novelty.demo import evaluate_class, markdown_table
from gradext.novelty.plots import STYLE, draw_histogram, overlap

from . import runs

PANELS = {
    "reconstruction_error": ("Reconstruction error", "summed binary cross entropy, nats"),
    "latent_loss": ("Latent loss", "summed KL divergence, nats"),
    "gradient_norm": ("Gradient", "norm of the first decoder layer's gradient"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__.splitlines()[0])
    parser.add_argument("--inlier", type=int, default=5, metavar="DIGIT")
    parser.add_argument("--channels", type=int, default=16, metavar="N", help="of the ConvVAE; 0: a perceptron")
    parser.add_argument("--folds", type=int, nargs="+", metavar="F", help="default: all five; --quick: 0")
    options = parser.parse_args(arguments)
    folds = options.folds or ([0] if options.quick else range(datasets.FOLDS))
    epochs = 5 if options.quick else runs.EPOCHS
    tasks = [
        {"inlier": options.inlier, "fold": fold, "seed": seed, "epochs": epochs, "channels": options.channels or None}
        for fold in folds
        for seed in options.seeds
    ]
    name = f"fig2{'-quick' if options.quick else ''}"
    work = functools.partial(evaluate, data_dir=options.data_dir)
    rows = runs.run(options.out / f"{name}.jsonl", tasks, work, jobs=options.jobs, description="fig2")
    draw(rows[0]).savefig(options.out / f"{name}.png")
    text = render(rows, f"{name}.png")
    (options.out / f"{name}.md").write_text(text)
    print(text)


def evaluate(task: dict, data_dir: str | None) -> dict:
    result = evaluate_class(datasets.load("mnist", data_dir), **task, progress=False)
    scores = {name: [float(f"{value:.5g}") for value in result.scores[name]] for name in PANELS}
    return {"inliers": int((~result.outlier).sum()), "scores": scores}


def parts(row: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the test inliers and of the outliers."""
    return tuple(np.split(np.array(row["scores"][name]), [row["inliers"]]))


def draw(row: dict) -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=(13.33, 3.6), dpi=150, facecolor="white", layout="constrained")
        figure.suptitle(f"Digit {row['inlier']} of MNIST against all others", fontsize=14, fontweight="bold")
        for ax, (name, (title, unit)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            draw_histogram(ax, *parts(row, name), title, unit)
    return figure


def render(rows: Sequence[dict], picture: str) -> str:
    head = ["overlap of inliers and outliers", *(f"fold {row['fold']}, seed {row['seed']}" for row in rows), "mean"]
    lines = []
    for name, (title, _) in PANELS.items():
        shares = [overlap(*parts(row, name))[0] for row in rows]
        lines.append([title, *(f"{share:.1%}" for share in (*shares, np.mean(shares)))])
    return (
        f"# Histograms: digit {rows[0]['inlier']} of MNIST\n\n![Histograms]({picture})\n\n"
        f"{markdown_table(head, lines)}\n\n"
        f"40 shared bins; the paper's percentages stand in its figure only.\n\n{runs.origin(rows)}\n"
    )


if __name__ == "__main__":
    main()
