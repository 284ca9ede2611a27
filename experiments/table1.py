"""Novel class detection (the paper's Table 1): AUROC for each class as the inlier class, by score.

    python -m experiments.table1 --dataset mnist --data-dir DIR [--folds 0 1 2 3 4] [--seeds 0] [--jobs 2] [--quick]

One VAE a class, fold and seed; the protocol is `gradext.datasets.one_class_split`'s. What the paper leaves open is an
option; the defaults are:

--noise-std 0.1, not clipped    clipped noise raises the background only, which no real novelty does
--channels 16, --latent-dim 20    a small convolutional VAE (`gradext.novelty.ConvVAE`), as the authors' other code has
    them; --channels 0 is a multilayer perceptron of --hidden-dim, with which VAEs were introduced on MNIST
--layer first    as the paper says of novel classes; combinations of layers use both
--epochs 60, perceptrons of MNIST and Fashion-MNIST 100    for that long the validation loss, which chooses, falls
the classifier's features    whitened, magnitude and direction apart (`gradext.novelty.features`): experiments.ablations
combined scores    of the --layer, the first layer of the encoder and the decoder's other end

--members N adds up the scores of N models (a deep ensemble), each standardised on the held-out inliers;
--gradcon W trains with GradCon's penalty; --direction L gives gradients' directions the length L in the classifier.
Within a run nothing is chosen by test outliers; which scores stand there was, in part, by earlier runs that saw some.
Results: ``<out>/table1-<dataset>[-mlp].jsonl``, one line a class, the table ``.md`` and ``.png`` of all folds and
seeds that the file has. CIFAR-10 keeps its original test part, so that its folds differ in the validation part only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from gradext import datasets
from gradext.novelty import GradientAlignment
from gradext.novelty.demo import TITLES, ClassResult, evaluate_class, markdown_table
from gradext.novelty.detector import CLASSIFIER_SCORES
from gradext.novelty.plots import GREY, INK, INLIER, OUTLIER, STYLE
from gradext.novelty.scores import SCORES

from . import runs

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

CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
    ),
    "cifar-10": ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip
BEYOND = ("members", "gradcon", "direction")
CHOICES = ("hidden_dim", "latent_dim", "noise_std", "noise_clip", "layer")
SERIES = (
    ("gradient_classifier", OUTLIER, "s"),
    ("whitened_delta_norm", INLIER, "o"),
    ("combined_evidence", "#cc79a7", "D"),
    ("reconstruction_error", GREY, "x"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", choices=sorted(PAPER))
    parser.add_argument("--folds", type=int, nargs="+", metavar="F", help="default: all five; CIFAR-10 and --quick: 0")
    parser.add_argument("--classes", type=int, nargs="+", default=range(10), metavar="C", help="default: all ten")
    parser.add_argument("--members", type=int, default=1, metavar="N", help="models whose scores are added up")
    parser.add_argument("--gradcon", type=float, metavar="W", help="weight of a GradientAlignment in training, nats")
    parser.add_argument("--direction", type=float, metavar="L", help="length of a gradient's direction (30)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of the VAE")
    parser.add_argument("--channels", type=int, default=16, metavar="N", help="of the ConvVAE; 0: a perceptron")
    parser.add_argument("--hidden-dim", type=int, default=400, metavar="N", help="of the perceptron")
    parser.add_argument("--latent-dim", type=int, default=20, metavar="N", help="of the VAE")
    parser.add_argument("--layer", default="first", choices=("first", "last"), help="of the decoder")
    parser.add_argument("--noise-std", type=float, default=0.1, metavar="S", help="of the classifiers' outliers")
    parser.add_argument("--noise-clip", action="store_true", help="clip them to [0, 1]")
    options = parser.parse_args(arguments)
    folds, epochs = options.folds, options.epochs
    if folds is None:
        folds = [0] if options.quick or options.dataset == "cifar-10" else range(datasets.FOLDS)
    if epochs is None:
        epochs = 5 if options.quick else runs.EPOCHS if options.channels or options.dataset == "cifar-10" else 100
    if options.members < 1:
        parser.error(f"--members: expected 1 or more, but got {options.members}")
    beyond = {"members": options.members} if options.members > 1 else {}
    beyond |= {key: value for key in ("gradcon", "direction") if (value := getattr(options, key)) is not None}
    choices = {name: getattr(options, name) for name in ("dataset", *CHOICES)} | {"epochs": epochs} | beyond
    choices |= {"channels": options.channels} if options.channels else {}
    tasks = [
        {"fold": fold, "seed": seed, "inlier": inlier, **choices}
        for fold in folds
        for seed in options.seeds
        for inlier in options.classes
    ]
    kind = [] if options.channels else ["mlp"]
    name = "-".join(["table1", options.dataset, *kind, *(f"{k}-{v:g}" for k, v in beyond.items())])
    name += "-quick" if options.quick else ""
    work = functools.partial(evaluate, data_dir=options.data_dir)
    log = options.out / f"{name}.jsonl"
    runs.run(log, tasks, work, jobs=options.jobs, description=options.dataset)
    rows = whole_runs(runs.read(log), choices, options.classes)
    draw(rows).savefig(options.out / f"{name}.png")
    text = render(rows, f"{name}.png")
    (options.out / f"{name}.md").write_text(text)
    print(text)


def whole_runs(rows: Sequence[dict], choices: dict, classes: Sequence[int]) -> list[dict]:
    """Of ``classes``, the rows with these ``choices`` in every fold and seed that has all of them, in order."""
    found = {(row["fold"], row["seed"], row["inlier"]): row for row in rows if choices.items() <= row.items()}
    repeats = sorted({(fold, seed) for fold, seed, _ in found})
    whole = [repeat for repeat in repeats if all((*repeat, c) in found for c in classes)]
    return [found[(*repeat, c)] for repeat in whole for c in classes]


def evaluate(task: dict, data_dir: str | None) -> dict:
    image_set, members = load(task["dataset"], data_dir), task.get("members", 1)
    options = {key: value for key, value in task.items() if key not in ("dataset", "inlier", *BEYOND)}
    options |= {"direction_length": task["direction"]} if "direction" in task else {}
    options["layer"] = (options["layer"], "encoder.0", "last" if options["layer"] == "first" else "first")
    results = [
        evaluate_class(
            image_set,
            task["inlier"],
            **options,
            model_seed=members * task["seed"] + k,
            penalty=GradientAlignment(task["gradcon"]) if "gradcon" in task else None,
            progress=False,
        )
        for k in range(members)
    ]
    scores = results[0].scores if members == 1 else add_up(results)
    return {
        "best_epoch": [result.history.best_epoch for result in results],
        "auroc": {name: round(float(roc_auc_score(results[0].outlier, score)), 5) for name, score in scores.items()},
    }


def add_up(results: Sequence[ClassResult]) -> dict[str, np.ndarray]:
    """``Σ_k (s_k - m_k) / d_k`` over models k, with the mean and standard deviation of the held-out inliers' scores."""
    total = {}
    for name in results[0].scores:
        held_out = [result.held_out[name] for result in results]
        total[name] = sum(
            (result.scores[name] - inside.mean()) / max(inside.std(), np.finfo(float).tiny)
            for result, inside in zip(results, held_out, strict=True)
        )
    return total


load = functools.lru_cache(maxsize=1)(datasets.load)


def values_of(rows: Sequence[dict], name: str) -> np.ndarray:
    """AUROC of a score, [repeats, classes]: a repeat is a fold with a seed."""
    found = {(row["fold"], row["seed"], row["inlier"]): row["auroc"][name] for row in rows}
    repeats, classes = _repeats(rows), sorted({row["inlier"] for row in rows})
    return np.array([[found[(*repeat, c)] for c in classes] for repeat in repeats])


def _repeats(rows: Sequence[dict]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["fold"], row["seed"]) for row in rows))


def draw(rows: Sequence[dict]) -> Figure:
    """The gradient's scores by class beside the paper's gradient row and the reconstruction error; means over runs."""
    classes, dataset = sorted({row["inlier"] for row in rows}), rows[0]["dataset"]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=150, facecolor="white", layout="constrained")
        ax = figure.subplots()
        places = np.arange(len(classes) + 1)  # the average last
        series = [entry for entry in SERIES if runs.has_score(rows, entry[0])]
        for k, (name, colour, marker) in enumerate(series):
            values = values_of(rows, name).mean(0)
            beside = places + 0.13 * (k - (len(series) - 1) / 2)  # equal values would hide each other
            ax.plot(beside, [*values, values.mean()], marker, color=colour, label=name.replace("_", " "), markersize=7)
        paper = np.array(PAPER[dataset]["gradient_classifier"])[classes]
        ax.hlines(
            [*paper, paper.mean()], places - 0.3, places + 0.3, color=INK, linewidth=2, label="the paper's gradient"
        )
        ax.axvline(len(classes) - 0.5, color=GREY, linewidth=0.8)
        ax.axhline(0.5, color=INK, linewidth=0.8, linestyle=":", label="chance")
        ax.set_xticks(places, [*(CLASS_NAMES[dataset][c] for c in classes), "average"])
        ax.set(xlabel="normal class", ylabel="AUROC", ylim=(0, 1.02), title=f"{TITLES[dataset]}, {_kind(rows[0])}")
        ax.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=len(series) + 2, columnspacing=1.4, fontsize=8.5)
    return figure


def render(rows: Sequence[dict], picture: str) -> str:
    """The table: means over folds and seeds; the spread is the standard deviation of a run's average over classes."""
    dataset, repeats = rows[0]["dataset"], _repeats(rows)
    classes = sorted({row["inlier"] for row in rows})
    head = ["AUROC", *(CLASS_NAMES[dataset][c] for c in classes), "average", "spread", "variance over classes"]
    lines = []
    for name in (name for name in (*CLASSIFIER_SCORES, *SCORES) if runs.has_score(rows, name)):
        values = values_of(rows, name)
        spread = f"{values.mean(1).std(ddof=1):.3f}" if len(repeats) > 1 else "one run"
        lines.append([name.replace("_", " "), *_cells(values.mean(0)), spread, f"{values.mean(0).var():.3f}"])
        if name in PAPER[dataset]:
            paper = np.array(PAPER[dataset][name])[classes]
            lines.append(
                [f"*{cell}*" if cell else "" for cell in ("the paper's", *_cells(paper), "", f"{paper.var():.3f}")]
            )
    return (
        f"# Novel class detection: {TITLES[dataset]}\n\n![AUROC by class]({picture})\n\n"
        "Classifiers are trained against noise-distorted inliers, as in the paper; all other scores are label-free. "
        f"{_model(rows[0])}Means over {len(repeats)} run(s), (fold, seed) = {', '.join(map(str, repeats))}.\n\n"
        f"{markdown_table(head, lines)}\n\n{runs.origin(rows)}\n"
    )


def _kind(row: dict) -> str:
    """The title of a picture says what was run."""
    said = "convolutional VAE" if "channels" in row else "multilayer perceptron"
    said += f", {row['members']} models" if "members" in row else ""
    said += f", GradCon's penalty {row['gradcon']:g}" if "gradcon" in row else ""
    return said + (f", directions of length {row['direction']:g}" if "direction" in row else "")


def _model(row: dict) -> str:
    """The VAE, and what was done that the paper did not do."""
    said = f"The VAE is a multilayer perceptron, {row['hidden_dim']} hidden units. "
    if "channels" in row:
        said = f"The VAE is convolutional, of {row['channels']} and {2 * row['channels']} channels (`ConvVAE`). "
    if "members" in row:
        said += f"Every score is the sum of that of {row['members']} models with other seeds, standardised. "
    if "gradcon" in row:
        said += f"Trained with GradCon's penalty (`GradientAlignment`) of weight {row['gradcon']:g}. "
    if "direction" in row:
        said += f"Gradients' directions have length {row['direction']:g} for the classifier, in place of 30. "
    return said


def _cells(values: np.ndarray) -> list[str]:
    return [*(f"{value:.3f}" for value in values), f"{values.mean():.3f}"]


if __name__ == "__main__":
    main()
