"""Pictures, drawn on `matplotlib.figure.Figure` objects, which need no global state and no display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

INLIER, OUTLIER, INK, GREY = "#2a6fbb", "#e8743b", "#22272e", "#8a939e"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def overlap(inliers: np.ndarray, outliers: np.ndarray) -> tuple[float, np.ndarray]:
    """Overlap of two histograms, ``Σ_k min(p_k, q_k)`` in [0, 1], over shared equal bins; returns it and the edges.

    p, q: shares of each set's samples in a bin. The edges span both sets, with the top 1% of each left to the last bin.
    """
    both = np.concatenate([inliers, outliers])
    low, high = both.min(), max(np.quantile(inliers, 0.99), np.quantile(outliers, 0.99))
    edges = _edges(low, high, min(len(inliers), len(outliers)))
    p, q = (_shares(values, edges) for values in (inliers, outliers))
    return float(np.minimum(p, q).sum()), edges


def _edges(low: float, high: float, samples: int) -> np.ndarray:
    """Edges of at most 40 bins; fewer on small sets, so that a bin holds at least two samples on average."""
    return np.linspace(low, high if high > low else low + 1, 1 + max(1, min(40, samples // 2)))


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)


def draw_histogram(ax: Axes, inliers: np.ndarray, outliers: np.ndarray, title: str, unit: str) -> None:
    """Histograms of one score for inliers and outliers, with their overlap shaded and in percent."""
    share, edges = overlap(inliers, outliers)
    heights = [_shares(values, edges) for values in (inliers, outliers)]
    for height, colour, label in zip(heights, (INLIER, OUTLIER), ("normal", "novel"), strict=True):
        ax.stairs(height, edges, fill=True, color=colour, alpha=0.28)
        ax.stairs(height, edges, color=colour, linewidth=1.6, label=label)
    ax.stairs(np.minimum(*heights), edges, fill=True, color=INK, alpha=0.35, label=f"overlap {share:.0%}")
    top = 1.42 * max(map(np.max, heights))  # room for the legend
    ax.set(title=title, xlabel=unit, yticks=[], xlim=(edges[0], edges[-1]), ylim=(0, top))
    ax.spines["left"].set_visible(False)
    ax.legend(loc="upper right", fontsize=9, handlelength=1.2)


def draw_roc(ax: Axes, scores: Mapping[str, np.ndarray], outlier: np.ndarray) -> None:
    """Receiver operating characteristics, one curve a score, AUROC in the legend, best first."""
    order = sorted(scores, key=lambda name: -roc_auc_score(outlier, scores[name]))
    colours = colormaps["viridis"](np.linspace(0.0, 0.88, len(order)))
    for name, colour in zip(order, colours, strict=True):
        false_alarms, hits, _ = roc_curve(outlier, scores[name])
        label = f"{roc_auc_score(outlier, scores[name]):.3f}  {name}"
        gradient = name.startswith("gradient")
        ax.plot(false_alarms, hits, color=colour, linewidth=2.4 if gradient else 1.3, label=label)
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    ax.set(
        title="ROC, by AUROC" if len(order) > 1 else "ROC",
        xlabel="false-positive rate",
        ylabel="true-positive rate",
        aspect="equal",
    )
    ax.set(xlim=(-0.01, 1), ylim=(0, 1.01), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    ax.legend(loc="upper left", bbox_to_anchor=(1.03, 1.02), fontsize=9, handlelength=1.4, borderaxespad=0)


def draw_precision_recall(ax: Axes, novelty: np.ndarray, outlier: np.ndarray) -> None:
    """Precision over recall of the novel samples; the dotted line is chance."""
    precision, recall, _ = precision_recall_curve(outlier, novelty)
    label = f"average precision {average_precision_score(outlier, novelty):.3f}"
    ax.step(recall, precision, where="post", color=INLIER, linewidth=2, label=label)
    ax.axhline(outlier.mean(), color=GREY, linewidth=0.8, linestyle=":")
    ax.set(title="Precision and recall", xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
    ax.legend(loc="best", fontsize=9)


def draw_reliability(ax: Axes, p_values: np.ndarray, band: float | None) -> None:
    """Share of samples with a p-value of at most t, over t: on the diagonal for normal samples.

    band: half the width of the band around the diagonal in which normal samples stay (Kolmogorov); None: no band.
    """
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="normal samples, expected")
    if band is not None:
        t = np.array([0, 1])
        ax.fill_between(t, t - band, t + band, color=GREY, alpha=0.18, linewidth=0, label="95% band")
    ordered = np.sort(p_values)
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    ax.step(np.r_[0, ordered, 1], np.r_[0, shares, 1], where="post", color=INLIER, linewidth=2, label="observed")
    ax.set(title="Reliability of the p-values", xlabel="p-value t", ylabel="share with p at most t")
    ax.set(xlim=(0, 1), ylim=(0, 1.01))
    ax.legend(loc="best", fontsize=9)


def draw_distribution(ax: Axes, novelty: np.ndarray, threshold: float, unit: str) -> None:
    """One histogram, of samples without labels."""
    edges = _edges(novelty.min(), np.quantile(novelty, 0.99), len(novelty))
    heights = _shares(novelty, edges)
    ax.stairs(heights, edges, fill=True, color=INLIER, alpha=0.35)
    ax.set(title="Novelty", xlabel=unit, yticks=[], xlim=(edges[0], edges[-1]), ylim=(0, 1.22 * heights.max()))
    ax.spines["left"].set_visible(False)
    draw_threshold(ax, threshold)


def draw_threshold(ax: Axes, threshold: float) -> None:
    ax.axvline(threshold, color=INK, linewidth=1.2, linestyle="--", label="threshold")
    ax.legend(loc="upper right", fontsize=9, handlelength=1.2)  # a label beside the line would overlap the curves
    if not ax.get_xlim()[0] <= threshold <= ax.get_xlim()[1]:
        ax.set_xlim(min(ax.get_xlim()[0], threshold), max(ax.get_xlim()[1], threshold * 1.02))


def draw_images(ax: Axes, images: np.ndarray, outlier: np.ndarray, title: str, columns: int) -> None:
    """A grid of images [N, H, W] or [N, C, H, W], each framed in the colour of its true class."""
    images = np.stack([images] * 3, axis=1) if images.ndim == 3 else images
    height, width = images.shape[2:]
    frame = max(1, round(height / 14))
    rows = -(-len(images) // columns)
    cell_height, cell_width = height + 3 * frame, width + 3 * frame
    canvas = np.ones((rows * cell_height, columns * cell_width, 3))
    for k, (image, novel) in enumerate(zip(images, outlier, strict=True)):
        top, left = k // columns * cell_height, k % columns * cell_width
        colour = tuple(int((OUTLIER if novel else INLIER)[c : c + 2], 16) / 255 for c in (1, 3, 5))
        canvas[top : top + height + 2 * frame, left : left + width + 2 * frame] = colour
        canvas[top + frame : top + frame + height, left + frame : left + frame + width] = image.transpose(1, 2, 0)
    ax.imshow(canvas[: -frame or None, : -frame or None], interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def novelty_figure(
    title: str,
    histograms: Mapping[str, tuple[np.ndarray, str]],
    roc_scores: Mapping[str, np.ndarray],
    outlier: np.ndarray,
    images: np.ndarray,
    ranking: str,
) -> Figure:
    """The demo's picture: a histogram for each representation, ROC curves, the most normal and most novel images.

    histograms: name -> (score [N], unit); roc_scores: name -> score [N]; outlier [N], true for outliers; images
    [N, H, W] or [N, C, H, W] in [0, 1]; ranking: the name in ``roc_scores`` by which the images are chosen.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(13.33, 7.5), dpi=150, facecolor="white")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.06), squeeze=False)[:, 0]
        figure.suptitle(title, x=0.035, y=0.975, ha="left", fontsize=16, fontweight="bold")
        axes = top.subplots(1, len(histograms), gridspec_kw={"left": 0.035, "right": 0.975, "top": 0.8, "bottom": 0.15})
        for ax, (name, (score, unit)) in zip(axes, histograms.items(), strict=True):
            draw_histogram(ax, score[~outlier], score[outlier], name, unit)
        roc = bottom.add_axes((0.055, 0.15, 0.20, 0.72))
        draw_roc(roc, roc_scores, outlier)
        order = np.argsort(roc_scores[ranking], kind="stable")
        rows, columns = 4, 5
        for k, (name, chosen) in enumerate((("Most normal", order), ("Most novel", order[::-1]))):
            ax = bottom.add_axes((0.475 + 0.262 * k, 0.06, 0.245, 0.81))
            chosen = chosen[: rows * columns]
            right = int((outlier[chosen] == bool(k)).sum())
            what = "outliers" if k else "inliers"
            draw_images(ax, images[chosen], outlier[chosen], f"{name}: {right} of {len(chosen)} are {what}", columns)
        bottom.text(0.475, 0.03, f"by {ranking}; blue frames: inliers, orange: outliers", fontsize=9)
    return figure
