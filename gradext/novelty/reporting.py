"""The HTML report: one file that contains everything, without scripts or external resources."""

from __future__ import annotations

import base64
import html
import io
import math
import platform

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score

from .._version import __version__
from ..sources import Source
from . import evaluation, guards, plots
from .detector import NoveltyDetector
from .explain import expected, heat, layer_shares, nearest_training, reasons
from .scaling import is_image
from .scoring import in_finite_numbers, novelties

SHOWN = 12  # most novel samples
BORDERLINE = 8  # samples on either side of the threshold
LISTED = 500  # flagged samples, and labels
NEIGHBOURS = 5
TRAINING_SHOWN = 4096  # training samples among which neighbours are sought
EXPLAINED = 1024  # samples over which the layers' shares are averaged
CSS = """
:root { --ink: #22272e; --grey: #6b7480; --line: #e3e7ec; --blue: #2a6fbb; --orange: #e8743b; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 12px; }
p { margin: 0 0 12px; } .note { color: var(--grey); font-size: 14px; }
section { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px; margin-top: 20px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 20px; }
.fact { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 12px 18px; flex: 1 1 140px; }
.fact b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.fact span { color: var(--grey); font-size: 14px; }
img { max-width: 100%; display: block; } .plot { width: 100%; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 16px; }
.wide { overflow-x: auto; } summary { cursor: pointer; color: var(--blue); }
@media (max-width: 600px) { main { padding: 16px 10px 40px; } section { padding: 14px 12px; } h1 { font-size: 21px; } }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 16px; }
figure { margin: 0; font-size: 13px; overflow-wrap: anywhere; }
figure .trio { display: flex; gap: 4px; } figure .trio img { width: 33%; }
figure img, td img { image-rendering: pixelated; border-radius: 4px; border: 1px solid var(--line); }
.novel { color: var(--orange); } .normal { color: var(--blue); }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); }
td:first-child { overflow-wrap: anywhere; min-width: 8em; }
th { color: var(--grey); font-weight: normal; } td img { width: 48px; }
.bar { background: var(--line); height: 10px; border-radius: 5px; } .bar i { display: block; height: 10px;
  border-radius: 5px; background: var(--blue); }
"""


def page(
    detector: NoveltyDetector,
    source: Source,
    normal: np.ndarray | None,
    training: tuple[Source, np.ndarray] | None = None,
    *,
    title: str,
    progress: bool = True,
) -> str:
    """The report on the samples of a source. normal: [N], which rows are normal; None: unknown.

    ``training``: samples, and their rows among which the nearest to the most novel ones are shown. Raises ValueError if
    no sample can be read.
    """
    parts = list(novelties(detector, source, progress=progress))
    index, novelty = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
    if not len(index):
        raise ValueError("expected at least one sample that can be read, but there is none")
    p_values = detector.calibration_.p_values(novelty)
    outlier = None if normal is None else ~normal[index]
    both = outlier is not None and outlier.any() and not outlier.all()
    top = np.argsort(-novelty, kind="stable")[:SHOWN]
    ranked = in_finite_numbers(novelty, -detector.offset_)
    pixels = evaluation.pixel_auroc(detector, source) if source.masks else None
    blocks = [
        _facts(detector, ranked, outlier, both, source, pixels),
        _warnings_of_the_fit(detector),
        _section("Scores", _plots(detector, ranked, p_values, outlier, both), _plots_note(outlier, both)),
        _most_novel(
            detector, source, index[top], novelty[top], p_values[top], None if outlier is None else outlier[top]
        ),
        _by_label(detector, source, index, ranked, outlier),
        _borderline(detector, source, index, ranked, p_values, outlier),
        _flagged(detector, source, index, novelty, p_values, outlier),
        _layers(detector, source, index, novelty > -detector.offset_),
    ]
    if training is not None:
        blocks.append(_neighbours(detector, source, index[top], *training))
    if source.skipped:
        rows = "".join(f"<tr><td>{_e(reason)}</td></tr>" for reason in list(source.skipped.values())[:50])
        blocks.append(_section(f"Skipped: {len(source.skipped)}", _scrolled(rows)))
    blocks.append(_section("Model", _model_table(detector)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)}</title><style>{CSS}</style></head>\n<body><main><h1>{_e(title)}</h1>"
        f'<p class="note">Novelty report by gradext {__version__}</p>{"".join(blocks)}</main></body></html>\n'
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{_e(title)}</h2>{note}{body}</section>\n"


def _scrolled(rows: str) -> str:
    """A table that scrolls sideways on a narrow screen."""
    return f'<div class="wide"><table>{rows}</table></div>'


def _facts(detector, novelty, outlier, both: bool, source: Source, pixels: float | None) -> str:
    called = novelty > -detector.offset_
    facts = [("samples", f"{len(novelty):,}"), ("called novel", f"{called.mean():.1%}")]
    if both:
        area, low, high = evaluation.auroc_interval(outlier, novelty)
        facts += [
            (f"AUROC (95%: {low:.3f} to {high:.3f})", f"{area:.3f}"),
            ("average precision", f"{average_precision_score(outlier, novelty):.3f}"),
            ("of the novel found", f"{called[outlier].mean():.1%}"),
        ]
    if outlier is not None and not outlier.all():
        facts.append(("false alarms", f"{called[~outlier].mean():.1%}"))
    if pixels is not None:
        facts.append(("AUROC by pixel, against masks", f"{pixels:.3f}"))
    if source.skipped:
        facts.append(("skipped", str(len(source.skipped))))
    cells = "".join(f'<div class="fact"><b>{value}</b><span>{name}</span></div>' for name, value in facts)
    return f'<div class="facts">{cells}</div>'


def _warnings_of_the_fit(detector) -> str:
    """The warnings of `fit`, and what few held-out samples guarantee."""
    told = list(detector.warnings_)
    if detector.contamination is None:
        told += [
            m for m in guards.of_calibration(len(detector.calibration_.scores), detector.target_fpr) if m not in told
        ]
    if not told:
        return ""
    return _section("Warnings of the fit", f"<ul>{''.join(f'<li>{_e(message)}</li>' for message in told)}</ul>")


def _plots(detector, novelty, p_values, outlier, both: bool) -> str:
    """Each plot is a separate picture: side by side on a wide screen, one below the other on a phone."""
    unit = detector.score_.name.replace("_", " ")
    known = p_values[~outlier] if outlier is not None and not outlier.all() else p_values
    n, m = len(detector.calibration_.scores), len(known)
    # Two samples: the calibration scores and these.
    band = 1.358 * math.sqrt((n + m) / (n * m)) if outlier is not None and not outlier.all() else None

    def distribution(ax) -> None:
        if both:
            plots.draw_histogram(ax, novelty[~outlier], novelty[outlier], "Novelty", unit)
            plots.draw_threshold(ax, -detector.offset_)
        else:
            plots.draw_distribution(ax, novelty, -detector.offset_, unit)

    def roc(ax) -> None:
        plots.draw_roc(ax, {unit: novelty}, outlier)
        ax.legend(loc="best", fontsize=9)

    drawn = {
        "histogram of the novelties": distribution,
        "reliability of the p-values": lambda ax: plots.draw_reliability(ax, known, band),
    }
    if both:
        drawn |= {
            "receiver operating characteristic": roc,
            "precision over recall": lambda ax: plots.draw_precision_recall(ax, novelty, outlier),
        }
    pictures = ""
    for name, draw in drawn.items():
        with rc_context(plots.STYLE):
            figure = Figure(figsize=(5.6, 4), facecolor="white", layout="constrained")
            draw(figure.subplots())
            content = io.BytesIO()
            figure.savefig(content, format="svg", metadata={"Date": None})
        pictures += f'<img class="plot" alt="{name}" src="{_data("image/svg+xml", content.getvalue())}">'
    return f'<div class="plots">{pictures}</div>'


def _plots_note(outlier, both: bool) -> str:
    if both:
        return (
            "The p-values are those of the normal samples: a valid p-value stays on or below the diagonal, in the band."
        )
    if outlier is None:
        return "No labels: these are all samples' p-values. Normal ones follow the diagonal, novel ones rise above it."
    return "All samples are of one kind, so the separation of normal and novel samples is unknown."


def _most_novel(detector, source, rows, novelty, p_values, outlier) -> str:
    block = source.read(rows)
    samples, images = block.samples, _is_image(detector)
    maps = heat(detector, samples) if images else None
    seen = [samples] if not images or detector.loss_ == "rotation" else [samples, expected(detector, samples)]
    shown = _shown(detector, *seen) if images else None
    why = None if images else reasons(detector, samples)
    figures = []
    for k, row in enumerate(rows.tolist()):
        pictures = what = ""
        if maps is not None and shown is not None:
            parts = (*(part[k] for part in shown), _heated(maps[k]))
            pictures = f'<div class="trio">{"".join(map(_image, parts))}</div>'
        truth = "" if outlier is None else f' <b class="{_kind(outlier[k])}">{_kind(outlier[k])}</b>'
        if why is not None:
            lines = (
                f"{r.feature}: {r.value:.4g}, expected {r.expected:.4g} ({r.share:.0%})" for r in why[k] if r.share > 0
            )
            what = "".join(f"<br>{_e(line)}" for line in lines)
        figures.append(
            f"<figure>{pictures}{_e(source.names[row])}{truth}<br>{novelty[k]:.4g}, p = {p_values[k]:.3g}{what}"
            "</figure>"
        )
    if images:
        note = "By novelty; the image, what the model makes of it, and where the two differ."
    else:
        note = "By novelty; the features that differ most from what the model expects, with their share."
    return _section("Most novel", f'<div class="grid">{"".join(figures)}</div>', note)


def _by_label(detector, source, index, novelty, outlier) -> str:
    if source.labels is None or not 2 <= len(set(source.labels[index])) <= LISTED:
        return ""
    labels, known = source.labels[index], outlier is not None
    rows = ""
    for kind in evaluation.by_label(
        labels, ~outlier if known else np.ones(len(labels), bool), novelty, -detector.offset_
    ):
        rows += f"<tr><td>{_e(kind.label)}</td><td>{kind.samples:,}</td><td>{kind.called_novel:.1%}</td>"
        if known:
            area = "" if kind.auroc is None else f"{kind.auroc:.3f} ({kind.low:.3f} to {kind.high:.3f})"
            rows += f'<td class="{_kind(not kind.normal)}">{_kind(not kind.normal)}</td><td>{area}</td>'
        rows += "</tr>"
    more = "<th></th><th>AUROC, 95% interval</th>" if known else ""
    return _section("By label", _scrolled(f"<tr><th>label</th><th>samples</th><th>called novel</th>{more}</tr>{rows}"))


def _table_of(source, index, order, novelty, p_values, outlier) -> str:
    rows = ""
    for k in order.tolist():
        truth = "" if outlier is None else f'<td class="{_kind(outlier[k])}">{_kind(outlier[k])}</td>'
        rows += (
            f"<tr><td>{_e(source.names[index[k]])}</td><td>{novelty[k]:.4g}</td><td>{p_values[k]:.3g}</td>{truth}</tr>"
        )
    head = f"<tr><th>sample</th><th>novelty</th><th>p</th>{'' if outlier is None else '<th>label</th>'}</tr>"
    return _scrolled(head + rows)


def _borderline(detector, source, index, novelty, p_values, outlier) -> str:
    threshold, order = -detector.offset_, np.argsort(novelty, kind="stable")
    place = int((novelty <= threshold).sum())
    near = order[max(0, place - BORDERLINE) : place + BORDERLINE][::-1]
    note = f"Nearest to the threshold, {threshold:.4g}: a second look at these is worth the most."
    return _section("Borderline", _table_of(source, index, near, novelty, p_values, outlier), note)


def _flagged(detector, source, index, novelty, p_values, outlier) -> str:
    order = np.argsort(-novelty, kind="stable")
    order = order[novelty[order] > -detector.offset_]
    if not len(order):
        return _section("Called novel: none", "")
    shown = order[:LISTED]
    rest = "" if len(shown) == len(order) else f"<p>and {len(order) - len(shown):,} more; `gradext score` lists all</p>"
    table = _table_of(source, index, shown, novelty, p_values, outlier)
    body = f"<details><summary>all {len(shown):,}, the most novel first</summary>{table}{rest}</details>"
    return _section(f"Called novel: {len(order):,}", body)


def _layers(detector, source, index, called) -> str:
    chosen = index[np.linspace(0, len(index) - 1, min(EXPLAINED, len(index))).astype(int)]
    shares = layer_shares(detector, source.read(chosen).samples)
    called = called[np.isin(index, chosen)]
    rows = []
    for name, share in shares.items():
        cells = ""
        for kind in (~called, called):
            mean = share[kind].mean() if kind.any() else 0.0
            bar = f'<div class="bar"><i style="width:{100 * mean:.1f}%"></i></div>'
            cells += f"<td>{mean:.1%}{bar}</td>" if kind.any() else "<td>none</td>"
        rows.append(f"<tr><td>{_e(name)}</td>{cells}</tr>")
    head = "<tr><th>layer</th><th>called normal</th><th>called novel</th></tr>"
    return _section(
        "Layers",
        _scrolled(head + "".join(rows)),
        f"Mean share of the squared gradient norm, over {len(chosen):,} samples.",
    )


def _neighbours(detector, source, rows, training: Source, training_rows: np.ndarray) -> str:
    among = np.linspace(0, len(training_rows) - 1, min(TRAINING_SHOWN, len(training_rows))).astype(int)
    block = training.read(training_rows[among])
    samples = source.read(rows).samples
    k = min(NEIGHBOURS, len(block.index))
    nearest, cosines = nearest_training(detector, samples, block.samples, k=k)
    lines = []
    for j, row in enumerate(rows.tolist()):
        cells = f"<td>{_thumbnail(detector, samples, j)}{_e(source.names[row])}</td>"
        for i, cosine in zip(nearest[j], cosines[j], strict=True):
            name = training.names[block.index[i]]
            cells += f"<td>{_thumbnail(detector, block.samples, i)}{_e(name)}<br>{cosine:.3f}</td>"
        lines.append(f"<tr>{cells}</tr>")
    head = f'<tr><th>sample</th><th colspan="{k}">training samples and cosines</th></tr>'
    note = f"By the cosine of the gradients of the detector's layer, among {len(block.index):,} training samples."
    return _section("Nearest training gradients", _scrolled(head + "".join(lines)), note)


def _model_table(detector: NoveltyDetector) -> str:
    history = detector.history_
    rows = {
        "score": detector.score_.name,
        "layer": ", ".join(detector.layers_),
        "model": type(detector.model_).__name__,
        "parameters": f"{sum(p.numel() for p in detector.model_.parameters()):,}",
        "input": "x".join(map(str, detector.input_shape_)),
        "best epoch": "trained elsewhere" if history is None else f"{history.best_epoch + 1} of {len(history.train)}",
        "threshold": f"{-detector.offset_:.6g}",
        "held-out samples": f"{len(detector.calibration_.scores):,}",
        "wanted rate of false alarms": f"{detector.target_fpr:g}"
        if detector.contamination is None
        else f"none; contamination {detector.contamination:g}",
        "versions": f"gradext {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    return _scrolled("".join(f"<tr><th>{_e(k)}</th><td>{_e(v)}</td></tr>" for k, v in rows.items()))


# --- pictures --------------------------------------------------------------------------------------------------------


def _kind(novel: bool) -> str:
    return "novel" if novel else "normal"


def _is_image(detector: NoveltyDetector) -> bool:
    """Whether samples are shown as images: [H, W], [1, H, W] or [3, H, W]."""
    shape = detector.input_shape_
    return is_image(shape) and (len(shape) == 2 or shape[0] in (1, 3))


def _shown(detector: NoveltyDetector, *parts) -> list[np.ndarray]:
    """Samples as pictures in [0, 1], channels first, of the same scale."""
    units = [
        detector._arranged(torch.from_numpy(detector.scaling_.units(np.asarray(part).reshape(len(part), -1)))).numpy()
        for part in parts
    ]
    if detector.scaling_.bent:
        low, high = (np.quantile(units[0], q) for q in (0.01, 0.99))
        units = [(u - low) / max(high - low, 1e-12) for u in units]
    return units


def _thumbnail(detector, samples, k: int) -> str:
    if not _is_image(detector):
        return ""
    return _image(_shown(detector, np.asarray(samples)[k : k + 1])[0][0])


def _heated(values: np.ndarray) -> np.ndarray:
    top = values.max()
    return colormaps["magma"](values / top if top > 0 else values)[..., :3].transpose(2, 0, 1)


def _image(pixels: np.ndarray) -> str:
    """[H, W], [1, H, W] or [3, H, W] in [0, 1] as a PNG."""
    from PIL import Image

    pixels = pixels[0] if pixels.ndim == 3 and len(pixels) == 1 else pixels
    array = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(array if array.ndim == 2 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    content = io.BytesIO()
    image.save(content, "PNG")
    return f'<img alt="" src="{_data("image/png", content.getvalue())}">'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
