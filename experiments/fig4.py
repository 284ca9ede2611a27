"""Novel condition detection (the paper's Fig. 4): AUROC by challenge level, for five challenging conditions.

    python -m experiments.fig4 --data-dir DIR [--seeds 0 1] [--jobs 2] [--quick] [--stand-in]

A VAE is trained on challenge-free traffic signs, then the paper's three classifiers on reconstruction error, latent
loss and the gradients of the last decoder layer; test images without a challenge are inliers, those of one condition at
one level outliers, as many of either. CURE-TSR comes from ``DIR/CURE-TSR`` (`gradext.datasets.load_cure_tsr`), by
default at 28x28, as in its authors' code. The classifier sees every weight of the last layer: the narrow defaults
of the VAE and the classifier keep its own weights to 12 million, where 400 and 64 would need 79 million.

Beside them two-sided scores by spatial frequency (`fit_spectral`): blur makes gradients smaller at high frequencies.

Where it is not there, or with ``--stand-in``, the same runs on BelgiumTSC, the 14 sign types of CURE-TSR at 32x32, with
the five conditions simulated at five levels (`simulate`): a stand-in, and everything that is printed says so.
Results: ``<out>/fig4-<set>.jsonl``, ``.md`` and ``.png``, and for the stand-in a contact sheet of the conditions.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage
from sklearn.covariance import ShrunkCovariance
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from gradext import datasets
from gradext.novelty import VAE, characterize, distort, train, train_classifier
from gradext.novelty.demo import fit_all_scores, markdown_table
from gradext.novelty.detector import CLASSIFIER_SCORES
from gradext.novelty.plots import INK, STYLE
from gradext.novelty.scores import SCORES

from . import runs

CONDITIONS = ("lens blur", "dirty lens", "gaussian blur", "rain", "haze")
LEVELS = range(1, 6)
PAPER_AVERAGE = 0.746  # of the gradient classifier on CURE-TSR; the curves stand in the paper's figure only
STAND_IN = "STAND-IN: BelgiumTSC with simulated conditions, not CURE-TSR"
ARCHIVE = Path("belgiumtsc", "belgiumtsc-32.tar.gz")
LAYERS = ("last", "first", "encoder.0")
# The scores of `fit_spectral`, and what the table says of them.
SPECTRAL = {
    "two_sided_classifier": "two-sided classifier",
    "spectral_density": "spectral density of the gradient",
    "spectral_evidence": "the same and reconstruction error",
    "image_density": "spectral density of the image",
    "image_evidence": "the same and reconstruction error, no gradient",
}
CURVES = {
    "spectral_evidence": ("#000000", "-"),  # colours of Okabe and Ito, which the colour-blind tell apart
    "two_sided_classifier": ("#cc79a7", "-"),
    "gradient_classifier": ("#d55e00", "-"),
    "reconstruction_classifier": ("#0072b2", "-"),
    "latent_classifier": ("#009e73", "-"),
    "reconstruction_error": ("#0072b2", ":"),
    "gradient_norm": ("#d55e00", ":"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__.splitlines()[0], seeds=(0, 1))
    parser.add_argument(
        "--stand-in", action="store_true", help="the simulated conditions, even where CURE-TSR is there"
    )
    parser.add_argument("--size", type=int, default=28, metavar="N", help="CURE-TSR is resized to N x N (default: 28)")
    parser.add_argument("--hidden-dim", type=int, default=128, metavar="N", help="of the VAE")
    parser.add_argument("--classifier-dim", type=int, default=32, metavar="N", help="hidden units of the classifiers")
    options = parser.parse_args(arguments)
    data_dir = options.data_dir or os.environ.get("GRADEXT_DATA", "")
    has_cure_tsr = bool(data_dir) and Path(data_dir, "CURE-TSR").is_dir()
    kind = "cure-tsr" if has_cure_tsr and not options.stand_in else "stand-in"
    if kind == "stand-in":
        print(STAND_IN)
    epochs = 5 if options.quick else None
    sizes = {"hidden_dim": options.hidden_dim, "classifier_dim": options.classifier_dim}
    common = {"set": kind, "epochs": epochs} | sizes | ({"size": options.size} if kind == "cure-tsr" else {})
    tasks = [{**common, "seed": seed} for seed in options.seeds[: 1 if options.quick else None]]
    name = f"fig4-{kind}{'-quick' if options.quick else ''}"
    work = functools.partial(evaluate, data_dir=data_dir)
    rows = runs.run(options.out / f"{name}.jsonl", tasks, work, jobs=options.jobs, description=name)
    draw(rows).savefig(options.out / f"{name}.png")
    if kind == "stand-in" and data_dir:
        contact_sheet(read_belgiumtsc(data_dir)).savefig(options.out / f"{name}-conditions.png")
    text = render(rows, name)
    (options.out / f"{name}.md").write_text(text)
    print(text)


# --- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Signs:
    """Challenge-free images, float32 [N, 3, H, W] in [0, 1]; validation takes whole groups of training images."""

    train: np.ndarray
    groups: np.ndarray
    test: np.ndarray


def read_belgiumtsc(data_dir: str | Path) -> Signs:
    """The 14 sign types of CURE-TSR from BelgiumTSC's archive, original split; a group is a track of frames."""
    path = Path(data_dir, ARCHIVE)
    if not data_dir:
        raise datasets.DatasetError("traffic signs are read from local files: pass --data-dir DIR or set GRADEXT_DATA")
    if not path.is_file():
        raise datasets.DatasetError(
            f"BelgiumTSC: expected {path}, got nothing; or CURE-TSR in {Path(data_dir, 'CURE-TSR')}"
        )
    with tarfile.open(path) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}
    parts: dict[str, list] = {"train": [], "test": []}
    groups = []
    for row in csv.DictReader(io.StringIO(content["belgiumtsc/images.csv"].decode())):
        if not row["cure_tsr_type"]:
            continue
        with Image.open(io.BytesIO(content[f"belgiumtsc/{row['file']}"])) as picture:
            parts[row["split"]].append(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
        if row["split"] == "train":
            groups.append(f"{row['class_id']}/{Path(row['file']).name.split('_')[0]}")
    images = {part: np.divide(np.stack(pictures), 255, dtype=np.float32) for part, pictures in parts.items()}
    return Signs(images["train"], np.unique(groups, return_inverse=True)[1], images["test"])


def simulate(images: np.ndarray, condition: str, level: int, seed: int = 0) -> np.ndarray:
    """``images`` [N, 3, H, W] in [0, 1] under a condition at level 1 to 5; sizes are in pixels of a 32x32 image.

    gaussian blur: standard deviation 0.4, 0.7, 1, 1.4, 2. lens blur: a disc of radius 0.7, 1.1, 1.6, 2.2, 3.
    dirty lens: the same dirt on every image (it is the lens's), grey-brown blobs that hide up to 20, 35, 50, 65, 80 %
    of what is behind them. rain: 3, 6, 10, 15, 22 bright streaks, others for every image, and less contrast.
    haze: 12, 25, 40, 55, 70 % of the light is a bright grey, more of it at the top, where the scene is farther off.
    """
    if level not in LEVELS:
        raise ValueError(f"level: expected 1 to 5, but got {level!r}")
    k, size = level - 1, images.shape[-1]
    unit = size / 32
    rng = np.random.default_rng([seed, CONDITIONS.index(condition), level])
    if condition == "gaussian blur":
        sigma = (0.4, 0.7, 1.0, 1.4, 2.0)[k] * unit
        changed = ndimage.gaussian_filter(images, (0, 0, sigma, sigma), mode="nearest")
    elif condition == "lens blur":
        radius = (0.7, 1.1, 1.6, 2.2, 3.0)[k] * unit
        changed = ndimage.convolve(images, _disc(radius)[None, None], mode="nearest")
    elif condition == "dirty lens":
        dirt = np.random.default_rng([seed, CONDITIONS.index(condition)])  # more of the same dirt at every level
        blobs = ndimage.gaussian_filter(dirt.standard_normal((size, size)), 2.2 * unit, mode="wrap")
        cover = np.clip((blobs - np.quantile(blobs, 0.35)) / np.ptp(blobs) * 4, 0, 1) * (0.2, 0.35, 0.5, 0.65, 0.8)[k]
        colour = np.array([0.40, 0.36, 0.30])[:, None, None]
        changed = images * (1 - cover) + colour * cover
    elif condition == "rain":
        streaks = np.stack([_streaks(rng, size, (3, 6, 10, 15, 22)[k]) for _ in images])[:, None]
        contrast = 1 - 0.06 * level
        dim = images * contrast + 0.55 * (1 - contrast)
        changed = dim * (1 - streaks) + 0.9 * streaks
    elif condition == "haze":
        depth = np.linspace(1.15, 0.85, size)[:, None] * (0.12, 0.25, 0.40, 0.55, 0.70)[k]
        changed = images * (1 - depth) + 0.82 * depth
    return np.clip(changed, 0, 1).astype(np.float32)


def _disc(radius: float) -> np.ndarray:
    """A disc of uniform light, its edge smoothed over a pixel."""
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    weight = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    return weight / weight.sum()


def _streaks(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Slanted streaks of rain, opacity [size, size]."""
    opacity = np.zeros((size, size))
    for _ in range(count):
        x, y, length = rng.uniform(0, size), rng.uniform(-0.2 * size, size), rng.uniform(0.2, 0.45) * size
        along = np.arange(0, length, 0.5)
        rows, columns = (y + along).astype(int), (x - 0.25 * along).astype(int)
        seen = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
        opacity[rows[seen], columns[seen]] = rng.uniform(0.35, 0.7)
    return ndimage.gaussian_filter(opacity, (0.4, 0.25))


# --- the experiment --------------------------------------------------------------------------------------------------


def evaluate(task: dict, data_dir: str) -> dict:
    seed = task["seed"]
    if task["set"] == "stand-in":
        signs = read_belgiumtsc(data_dir)
        outliers = lambda condition, level: simulate(signs.test, condition, level, seed)  # noqa: E731
    else:
        signs, outliers = read_cure_tsr(data_dir, task["size"])
    rng = np.random.default_rng(seed)
    held_out = np.isin(signs.groups, rng.permutation(signs.groups.max() + 1)[: max(1, (signs.groups.max() + 1) // 10)])
    x, validation, test = (_flat(part) for part in (signs.train[~held_out], signs.train[held_out], signs.test))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VAE(x.shape[1], task["hidden_dim"]).eval()
    history = train(model, x, validation, epochs=task["epochs"], seed=seed, progress=False)
    options = {"seed": seed, "hidden_dim": task["classifier_dim"]}
    usual = fit_all_scores(model, x, validation, layer=LAYERS, **options)
    spectral, bands = fit_spectral(model, x, signs.train.shape[-1], **options)
    score = lambda samples: usual(samples) | spectral(samples)  # noqa: E731
    of_test, in_bands = score(test), {"none": bands(test)}
    auroc: dict[str, dict[str, list[float]]] = {name: {} for name in of_test}
    for condition in CONDITIONS:
        images = [_flat(outliers(condition, level)) for level in LEVELS]
        of_levels = [score(part) for part in images]
        in_bands[condition] = bands(images[len(LEVELS) // 2])
        for name, inside in of_test.items():
            auroc[name][condition] = [_auroc(inside, found[name], rng) for found in of_levels]
    return {"best_epoch": history.best_epoch, "auroc": auroc, "bands": in_bands}


def band_power(images: Tensor) -> Tensor:
    """Logarithm of the mean power at 0 to 1, 1 to 2, ... cycles an image, [N, 3, H, H] -> [N, K].

    Under a Hann window: the jump from one edge of a picture to the other has all frequencies.
    """
    size = images.shape[-1]
    window = torch.hann_window(size, periodic=False, dtype=torch.float64)
    images = images.double()
    waves = torch.fft.fft2((images - images.mean((2, 3), keepdim=True)) * window * window[:, None])
    power = waves.abs().square().mean(1).flatten(1)
    cycles = size * torch.fft.fftfreq(size, dtype=torch.float64)
    band = torch.hypot(cycles, cycles[:, None]).long().flatten()
    count = band.bincount()
    return (power.new_zeros(len(power), len(count)).index_add(1, band, power) / count).clamp_min(1e-12).log()


def fit_spectral(
    model: VAE, x: Tensor, size: int, *, seed: int, hidden_dim: int
) -> tuple[Callable[[Tensor], dict[str, np.ndarray]], Callable[[Tensor], list[float]]]:
    """Two functions of samples: the scores of `SPECTRAL`, and the mean z of three groups of bands, low to high.

    Of the encoder's first layer, whose gradient is ``g = δ xᵀ``, the logarithms of ``‖g F_k‖ = ‖δ‖ ‖F_k x‖`` with the
    frequencies F_k of `band_power`. Statistics are those of the training inliers ``x``.

    spectral_density: as the score `joint_density`, of these logarithms and those of the gradients' norms of `LAYERS`:
    two-sided. spectral_evidence: ``z(spectral density) + z(reconstruction error)``. two_sided_classifier: the paper's,
    trained against noise, on |z| of the bands. image_density and image_evidence: the same two scores of the images'
    bands ``log ‖F_k x‖``, without a gradient, to tell what the gradient adds.
    """

    def numbers(samples: Tensor) -> tuple[np.ndarray, ...]:
        seen = characterize(model, samples, layer=LAYERS)
        of_layers = {name: gradient.norm().log() for name, gradient in seen.gradients.items()}
        image = band_power(samples.reshape(len(samples), 3, size, size)) / 2
        bands = image + seen.gradients["encoder.0.weight"].delta.double().norm(dim=1, keepdim=True).log()
        gradient = torch.cat([bands, torch.stack(list(of_layers.values()), dim=1)], dim=1)
        return tuple(part.numpy() for part in (image, bands, gradient, seen.reconstruction.sum(1, keepdim=True)))

    def density(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        scale = StandardScaler().fit(values)
        normal = ShrunkCovariance().fit(scale.transform(values))
        square = lambda values: normal.mahalanobis(scale.transform(values))[:, None]  # noqa: E731
        z = StandardScaler().fit(square(values))
        return lambda found: z.transform(square(found))[:, 0]

    image, bands, gradient, error = numbers(x)
    of_image, of_gradient = density(image), density(gradient)
    z_bands, z_error = StandardScaler().fit(bands), StandardScaler().fit(error)
    features = lambda bands: torch.from_numpy(np.abs(z_bands.transform(bands))).float()  # noqa: E731
    noisy = numbers(distort(x, seed=seed))[1]
    classifier = train_classifier(features(bands), features(noisy), hidden_dim=hidden_dim, seed=seed)

    @torch.no_grad()
    def score(samples: Tensor) -> dict[str, np.ndarray]:
        image, bands, gradient, error = numbers(samples)
        plain, spectral, error = of_image(image), of_gradient(gradient), z_error.transform(error)[:, 0]
        values = (classifier(features(bands)).numpy(), spectral, spectral + error, plain, plain + error)
        return dict(zip(SPECTRAL, values, strict=True))

    def mean_z(samples: Tensor) -> list[float]:
        z = z_bands.transform(numbers(samples)[1]).mean(0)
        return [round(float(part.mean()), 3) for part in np.array_split(z, 3)]

    return score, mean_z


def read_cure_tsr(data_dir: str, size: int):
    """Challenge-free signs, every training image a group of its own, and ``(condition, level) -> test images``."""
    number = {condition: datasets.CURE_TSR_CHALLENGES.index(condition) for condition in CONDITIONS}
    found = datasets.load_cure_tsr(Path(data_dir, "CURE-TSR"), challenges=(0, *number.values()), size=size)
    pixels = lambda chosen: np.divide(found.images[chosen], 255, dtype=np.float32)  # noqa: E731
    free = found.challenge == 0
    train = pixels(free & found.train)

    def outliers(condition: str, level: int) -> np.ndarray:
        chosen = (found.challenge == number[condition]) & (found.level == level) & ~found.train
        if not chosen.any():
            raise datasets.DatasetError(f"CURE-TSR: expected test images of {condition} at level {level}, got none")
        return pixels(chosen)

    return Signs(train, np.arange(len(train)), pixels(free & ~found.train)), outliers


def _flat(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).flatten(1)


def _auroc(inside: np.ndarray, outside: np.ndarray, rng: np.random.Generator) -> float:
    """Of as many inliers as outliers, drawn where there are more."""
    count = min(len(inside), len(outside))
    inside, outside = (v if len(v) == count else rng.choice(v, count, replace=False) for v in (inside, outside))
    return round(float(roc_auc_score(np.repeat([0, 1], count), np.concatenate([inside, outside]))), 5)


# --- output ----------------------------------------------------------------------------------------------------------


def _mean(rows: Sequence[dict], name: str) -> np.ndarray:
    """[conditions, levels], over the seeds."""
    return np.mean([[row["auroc"][name][condition] for condition in CONDITIONS] for row in rows], axis=0)


def _title(rows: Sequence[dict]) -> str:
    return STAND_IN if rows[0]["set"] == "stand-in" else "CURE-TSR"


def render(rows: Sequence[dict], name: str) -> str:
    head = ["AUROC, mean over levels", *CONDITIONS, "average", "spread"]
    lines, by_level = [], []
    for score in (name for name in (*SPECTRAL, *CLASSIFIER_SCORES, *SCORES) if runs.has_score(rows, name)):
        values = _mean(rows, score)
        averages = [_mean([row], score).mean() for row in rows]
        spread = f"{np.std(averages, ddof=1):.3f}" if len(rows) > 1 else "one run"
        label = SPECTRAL.get(score, score.replace("_", " "))
        lines.append([label, *(f"{v:.3f}" for v in (*values.mean(1), values.mean())), spread])
        if score in CURVES:
            by_level += [
                [label, condition, *(f"{v:.3f}" for v in levels)]
                for condition, levels in zip(CONDITIONS, values, strict=True)
            ]
    bands = [
        [condition, *(f"{z:+.2f}" for z in np.mean([row["bands"][condition] for row in rows], axis=0))]
        for condition in ("none", *CONDITIONS)
    ]
    stand_in = rows[0]["set"] == "stand-in"
    sheet = f"\n![The simulated conditions, {STAND_IN}]({name}-conditions.png)\n" if stand_in else ""
    return (
        f"# Novel condition detection\n\n**{_title(rows)}.** Scores of one gradient: last decoder layer. The paper's "
        f"average for the gradient classifier, on CURE-TSR: {PAPER_AVERAGE}"
        f"{', not comparable with a stand-in' if stand_in else ''}. The two-sided and spectral scores: "
        "`experiments.fig4.fit_spectral`.\n\n"
        f"![AUROC by level]({name}.png)\n\n{markdown_table(head, lines)}\n\n"
        "The gradient of the encoder's first layer by spatial frequency: how far the condition at level 3 moves the "
        "logarithm of its norm, in standard deviations of training inliers, mean over the bands of a third each:\n\n"
        f"{markdown_table(['condition', 'low', 'middle', 'high frequencies'], bands)}\n\n"
        f"{markdown_table(['by level', 'condition', *map(str, LEVELS)], by_level)}\n{sheet}\n"
        f"Seeds {', '.join(str(row['seed']) for row in rows)}. {runs.origin(rows)}\n"
    )


def draw(rows: Sequence[dict]) -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 4), dpi=130, facecolor="white", layout="constrained")
        figure.suptitle(f"Novel condition detection. {_title(rows)}", fontsize=13, fontweight="bold")
        axes = figure.subplots(1, len(CONDITIONS), sharey=True)
        for k, (ax, condition) in enumerate(zip(axes, CONDITIONS, strict=True)):
            for name, (colour, style) in CURVES.items():
                label = name.replace("_", " ").replace("two sided", "two-sided")
                label += "" if name.endswith("classifier") else ", label-free"
                ax.plot(
                    LEVELS, _mean(rows, name)[k], color=colour, linestyle=style, marker="o", markersize=3.5, label=label
                )
            ax.axhline(0.5, color=INK, linewidth=0.6, alpha=0.4, label="chance" if k == 0 else None)
            ax.set(title=condition.capitalize(), xlabel="challenge level", xticks=list(LEVELS), ylim=(0, 1.02))
        axes[0].set_ylabel("AUROC")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CURVES) + 1, fontsize=9
        )
    return figure


def contact_sheet(signs: Signs, count: int = 4) -> Figure:
    """The first test image of a few groups under every condition and level."""
    chosen = signs.test[np.linspace(0, len(signs.test) - 1, count).astype(int)]
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 1.9 * len(CONDITIONS)), dpi=110, facecolor="white", layout="constrained")
        figure.suptitle(STAND_IN, fontsize=12, fontweight="bold")
        for row, (condition, axes) in enumerate(
            zip(CONDITIONS, figure.subplots(len(CONDITIONS), 1 + len(LEVELS)), strict=True)
        ):
            for level, ax in enumerate(axes):
                images = simulate(chosen, condition, level) if level else chosen
                pairs = images.transpose(0, 2, 3, 1).reshape(2, count // 2, *images.shape[2:], 3)
                ax.imshow(pairs.transpose(0, 2, 1, 3, 4).reshape(2 * images.shape[2], -1, 3), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if row == 0:
                    ax.set_title(f"level {level}" if level else "original", fontsize=10)
            axes[0].set_ylabel(condition, fontsize=10)
    return figure


if __name__ == "__main__":
    main()
