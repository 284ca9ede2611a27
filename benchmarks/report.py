"""The rows of the full grid and of real models as a Markdown report and pictures.

    python -m benchmarks.report ROWS.jsonl... --out DIR

Writes DIR/report.md, speedup.png, memory.png and growth.png. Where a cell was measured more than once, its last row
counts. A ratio below one, where gradext is behind, stands in bold, and all of them are listed at the beginning.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradext.novelty.demo import markdown_table
from gradext.novelty.plots import GREY, INK, STYLE

from . import measure

COMPUTED = {  # what is computed -> the heading
    "gradients": "Per-sample gradients",
    "norms": "Norms",
    "clipped": "Sums of clipped gradients",
    "gram": "Gram matrix",
    "scores": "Ten linear functionals",
}
FLOORS = {  # routes of real models -> the heading
    "batched backward: sum": "a plain forward and backward",
    "training step: step": "a plain training step",
    "gradext: step norms": "with norms, by gradext",
}
HAND = ("by hand", "by hand, out=")
LARGE = ("MNIST VAE, last layer", "MNIST VAE, decoder", "wide")
LARGE_FROM = 64  # samples
STEP = "training step: step"  # a route that only real models have
PYTHON = 0.3  # ms by which a call of the smallest model at B = 1 may be behind, where there is little but Python
BARE = 1.15  # times the bare products by hand: how far the factor routes may be


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help="files that `pytest --rows` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    missing = [str(path) for path in arguments.rows if not path.exists()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}; `pytest benchmarks --grid full --rows FILE` writes it")
    write(Results([row for path in arguments.rows for row in measure.rows(path)]), arguments.out)


def write(results: Results, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    with rc_context(STYLE):
        for name, draw in (("speedup", draw_speedup), ("memory", draw_memory), ("growth", draw_growth)):
            figure = draw(results)
            if figure is not None:
                figure.savefig(out / f"{name}.png", dpi=150)
                pictures.append(name)
    (out / "report.md").write_text(render(results, pictures))


class Results:
    """The rows by kind, the last of those that were measured more than once."""

    def __init__(self, rows: Sequence[dict]) -> None:
        latest = {
            tuple(row.get(k) for k in ("kind", "case", "operator", "name", "axis", "size", "B")): row for row in rows
        }
        self.rows = list(latest.values())
        self.cells = {(row["case"], row["B"]): row["routes"] for row in self.of("cell")}
        self.cases = list(dict.fromkeys(case for case, _ in self.cells))

    def of(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row["kind"] == kind]

    def batches(self, case: str) -> list[int]:
        return sorted(B for name, B in self.cells if name == case)

    def names(self, case: str, computes: str) -> list[str]:
        """The routes to a result, in the order in which they were measured."""
        keys = (key for (name, _), routes in self.cells.items() if name == case for key in routes)
        return list(dict.fromkeys(key.rsplit(": ", 1)[0] for key in keys if key.endswith(f": {computes}")))

    def ms(self, case: str, B: int, computes: str, name: str) -> float | None:
        return self.cells[case, B].get(f"{name}: {computes}", {}).get("ms")

    def best(self, case: str, B: int, computes: str, wanted: Callable[[str], bool]) -> float | None:
        """The shortest time among the routes by whose name one asks."""
        times = (self.ms(case, B, computes, name) for name in self.names(case, computes) if wanted(name))
        return min((t for t in times if t is not None), default=None)


def ours(name: str) -> bool:
    return name.startswith("gradext")


def is_peer(name: str) -> bool:
    return not ours(name) and name not in HAND


# --- the report ------------------------------------------------------------------------------------------------------


def render(results: Results, pictures: Sequence[str]) -> str:
    facts = sorted({tuple(row[k] for k in ("machine", "versions", "commit")) for row in results.rows})
    real = {STEP in routes for routes in results.cells.values()}
    made = ", ".join(f"`pytest benchmarks --grid {'models' if r else 'full'} --rows ROWS`" for r in sorted(real))
    parts = [
        "# gradext and its peers",
        f"Made by {made} and `python -m benchmarks.report ROWS --out DIR`.",
        "\n".join(f"- {machine}; {versions}; commit {commit}" for machine, versions, commit in facts),
        "Medians in milliseconds, ± half the distance between quartiles where there was time for more than one, of "
        "calls that take turns in one process. Every result was compared with an fp64 backward of single samples "
        "before it was timed (relative error at most 1e-4; 1e-3 for a peer's fp32 sum over all entries of a gradient); "
        "what failed that is not timed. Each library watches only the weights whose gradients are wanted. "
        "*By hand* is what one writes in torch for just this "
        "model, with the closed form of the loss's gradient: for norms, Gram matrix and functionals the bare matrix "
        f"products that any route needs, of which gradext may take {BARE} times the time. Ratios below one stand in "
        "bold.",
        _aims(results),
        _behind(results),
        "## In pictures" if pictures else "",
        *(f"![{name}]({name}.png)" for name in pictures),
        *(_case(results, case) for case in results.cases),
        _not_measured(results),
        _memory(results),
        _operators(results),
        _slopes(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _aims(results: Results) -> str:
    """The aims of the whole calls: what is compared, in how many cells it holds, and the range."""
    large = [(case, B) for case, B in results.cells if case in LARGE and B >= LARGE_FROM]

    def ratios(cells: Iterable[tuple[str, int]], computes: Sequence[str], base, mine=ours) -> list[float]:
        pairs = (
            (results.best(*cell, kind, base), results.best(*cell, kind, mine)) for cell in cells for kind in computes
        )
        return [b / m for b, m in pairs if b and m]

    def named(name: str) -> Callable[[str], bool]:
        return lambda other: other == name

    def beside(base: str, mine: str) -> list[float]:
        """Of one route's time to another's, on real models."""
        pairs = ((routes.get(base, {}).get("ms"), routes[mine].get("ms")) for _, routes in real)
        return [b / m for b, m in pairs if b and m]

    factored = ("norms", "gram", "scores")
    real = [(cell, routes) for cell, routes in results.cells.items() if STEP in routes]
    rises = [row["routes"] for row in results.of("memory") if STEP in row["routes"]]
    aims = [
        ("gradients into `out=`, large layers, against the fastest peer", 8.0,
         ratios(large, ["gradients"], is_peer, named("gradext, out="))),
        ("gradients without `out=`, large layers, against the fastest peer", 4.0,
         ratios(large, ["gradients"], is_peer, named("gradext"))),
        ("norms, large layers, against `vmap(grad)`", 40.0, ratios(large, ["norms"], named("vmap(grad)"))),
        ("norms, large layers, against the fastest peer", 1.5, ratios(large, ["norms"], is_peer)),
        ("norms, Gram matrix, functionals, everywhere, against the bare products", 1 / BARE,
         ratios(results.cells, factored, named("by hand"))),
        ("everything, everywhere, against the fastest peer", 1.0, ratios(results.cells, COMPUTED, is_peer)),
        ("gradients, everywhere, against the better by hand", 1.0,
         ratios(results.cells, ["gradients"], lambda name: name in HAND)),
        ("real models, everything, against the fastest peer", 1.0,
         ratios([cell for cell, _ in real], COMPUTED, is_peer)),
        ("real models, norms, against a plain forward and backward", 1 / 1.1,
         beside("batched backward: sum", "gradext: norms")),
        ("real models, norms, against Opacus' ghost clipping", 1.4, beside("Opacus ghost: norms", "gradext: norms")),
        ("real models, a training step with norms, against a plain one", 1 / 1.15, beside(STEP, "gradext: step norms")),
        ("real models, memory of norms, against a plain step's", 1 / 1.2,
         [routes[STEP]["bytes"] / max(1, routes["gradext: norms"]["bytes"]) for routes in rises]),
    ]  # fmt: skip
    body = [
        [
            text,
            f"{aim:.2g}x",
            f"{_ratio(min(found))} to {_ratio(max(found))}",
            f"{sum(ratio >= aim for ratio in found)} of {len(found)}",
        ]
        for text, aim, found in aims
        if found
    ]
    return "## Aims\n\n" + markdown_table(["speed-up", "aim", "measured", "met in"], body) if body else ""


def _behind(results: Results) -> str:
    """Every cell in which a peer is faster, or by hand is: for what comes from factors by more than `BARE`."""
    groups = {"A peer is faster": is_peer, "By hand is faster": lambda name: name in HAND}
    behind: dict[str, list[str]] = {heading: [] for heading in groups}
    gaps: dict[str, list[float]] = {heading: [] for heading in groups}  # ms
    for case, B in results.cells:
        for computes in COMPUTED:
            mine = results.best(case, B, computes, ours)
            others = {n: results.ms(case, B, computes, n) for n in results.names(case, computes) if not ours(n)}
            for heading, wanted in groups.items():
                allowed = BARE if wanted is not is_peer and computes != "gradients" else 1.0
                faster = {n: t for n, t in others.items() if wanted(n) and mine and t and mine > allowed * t}
                if faster:
                    times = ", ".join(f"{n} {_number(t)} ms" for n, t in faster.items())
                    behind[heading].append(f"- {case}, B = {B:,}, {computes}: gradext {_number(mine)} ms; {times}")
                    gaps[heading].append(mine - min(faster.values()))
    lists = (
        f"### {heading}\n\n" + "\n".join([_gap_text(gaps[heading]), "", *lines] if lines else ["Nowhere."])
        for heading, lines in behind.items()
    )
    return "\n\n".join(["## Where gradext is behind", *lists]) if results.cells else ""


def _gap_text(gaps: Sequence[float]) -> str:
    """What tells a cost of every call, Python's, from one that grows with the batch."""
    small = sum(gap <= PYTHON for gap in gaps)
    least, most, median = (_number(gap, 2) for gap in (min(gaps), max(gaps), statistics.median(gaps)))
    return (
        f"By {least} to {most} ms (median {median}) in {len(gaps)} cells; in "
        f"{small} of them by no more than {PYTHON:g} ms, which is about what Python does in a call at any batch size: "
        "finding the layers, checking the arguments, following the graph."
    )


def _case(results: Results, case: str) -> str:
    parts = [f"## {case}"]
    for computes, heading in COMPUTED.items():
        names = results.names(case, computes)
        if not names:
            continue
        body = []
        for B in results.batches(case):
            mine = results.best(case, B, computes, ours)
            bases = (results.best(case, B, computes, is_peer), results.best(case, B, computes, lambda n: n in HAND))
            gains = [_gain(base / mine) if base and mine else "" for base in bases]
            body.append([f"{B:,}", *(_cell(results, case, B, computes, name) for name in names), *gains])
        parts.append(f"### {heading}\n\n" + markdown_table(["B", *names, "over the peers", "over by hand"], body))
    floors = [key for key in FLOORS if any(key in results.cells[case, B] for B in results.batches(case))]
    if STEP in floors:
        names = [(key.split(": ")) for key in floors]
        body = [
            [f"{B:,}", *(_cell(results, case, B, kind, name) for name, kind in names)] for B in results.batches(case)
        ]
        parts.append("### Training\n\n" + markdown_table(["B", *FLOORS.values()], body))
    return "\n\n".join(parts)


def _cell(results: Results, case: str, B: int, computes: str, name: str) -> str:
    row = results.cells[case, B].get(f"{name}: {computes}", {})
    if "ms" in row:
        spread = f" ± {_number((row['high'] - row['low']) / 2, 2)}" if row["calls"] > 1 else ""
        return f"{_number(row['ms'])}{spread}"
    return next((word for word in ("wrong", "failed") if word in row), "-")


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if value >= 10**digits else f"{value:.{digits}g}"


def _gain(ratio: float) -> str:
    return _ratio(ratio) if ratio >= 1 else f"**{_ratio(ratio)}**"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def _not_measured(results: Results) -> str:
    """Why a time is missing: each reason once, with the cells that it holds for."""
    reasons: dict[tuple[str, str, str], list[int]] = {}
    for (case, B), routes in sorted(results.cells.items()):
        for key, row in routes.items():
            for word in ("wrong", "failed", "skipped"):
                if word in row:
                    reason = f"relative error {row[word]:.2g}" if word == "wrong" else row[word]
                    reasons.setdefault((key, case, f"{word}, {reason}"), []).append(B)
    lines = [
        f"- {key}, {case}, B = {', '.join(f'{B:,}' for B in batches)}: {reason}"
        for (key, case, reason), batches in reasons.items()
    ]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _memory(results: Results) -> str:
    parts = []
    for row in results.of("memory"):
        body = [
            [key, f"{r['bytes'] / 1e6:,.1f}", f"{r['bytes'] / row['bytes']:.1%}"] for key, r in row["routes"].items()
        ]
        parts.append(
            f"### {row['case']}, B = {row['B']}, {row['bytes'] / 1e6:,.1f} MB of gradients\n\n"
            + markdown_table(["route", "MB", "of the gradients' bytes"], body)
        )
    if not parts:
        return ""
    how = "Rise of resident memory in one call, in a process of its own; an `out` counts where one is written into."
    return "\n\n".join(["## Peak memory", how, *parts])


def _operators(results: Results) -> str:
    rows = results.of("operator")
    outer = [
        [f"{r['name']} [{r['B']}, {r['O']}, {r['I']}]", f"{r['bytes'] / 1e6:.3g}",
         *(f"{r['bytes'] / r['ms'][route] / 1e6:.1f}" for route in ("gradext", "its kernel", "torch.mul(out=)")),
         f"{r['bytes'] / min(r['ms']['streaming fill'], r['ms']['fill_']) / 1e6:.1f}"]
        for r in rows if r["operator"] == "outer"
    ]  # fmt: skip
    contractions = [
        [r["operator"], f"{r['name']}, B = {r['B']}, T = {r['T']}", _number(r["ms"]["gradext"]),
         f"{r['operations'] / r['ms']['gradext'] / 1e6:.1f}",
         f"{r['ceiling_operations'] / r['ms']['matrix product'] / 1e6:.1f}",
         f"{r['bytes'] / r['ms']['gradext'] / 1e6:.1f}",
         f"{r['bytes'] / r['ms']['sum of the same bytes'] / 1e6:.1f}"]
        for r in rows if r["operator"] != "outer"
    ]  # fmt: skip
    parts = []
    if outer:
        head = ["[B, O, I]", "MB", "gradext", "its kernel", "`torch.mul(out=)`", "best fill"]
        parts.append("### Outer product, GB/s of the output\n\n" + markdown_table(head, outer))
    if contractions:
        head = ["operator", "shape", "ms", "GFLOP/s", "matrix product's", "GB/s", "sum's"]
        parts.append("### Contractions, beside both ceilings\n\n" + markdown_table(head, contractions))
    return "\n\n".join(["## Operators", *parts]) if parts else ""


def _slopes(results: Results) -> str:
    """Exponents of growth over the upper half of the sizes, measured and counted."""
    body = []
    for axis in ("B", "O", "I"):
        points = _growth(results, axis)
        if len(points) < 2:
            continue
        upper = points[len(points) // 2 - 1 :]
        for name in points[0]["ms"]:
            slopes = (_slope([(p["size"], p[k][name]) for p in upper]) for k in ("ms", "operations"))
            body.append([axis, name, *(f"{slope:.2f}" for slope in slopes)])
    if not body:
        return ""
    head = ["with", "operator", "measured exponent", "counted exponent"]
    return "## Growth of the cost\n\n" + markdown_table(head, body)


def _growth(results: Results, axis: str) -> list[dict]:
    return sorted((row for row in results.of("growth") if row["axis"] == axis), key=lambda row: row["size"])


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through the logarithms."""
    xs, ys = ([math.log(p[k]) for p in points] for k in (0, 1))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


# --- the pictures ----------------------------------------------------------------------------------------------------

BLUE, LIGHT, ORANGE, GREEN, PURPLE = "#2a6fbb", "#8fb8e3", "#e8743b", "#3a9a5b", "#8a5bb5"
OPERATORS = {"outer, out=": BLUE, "sq_norm": ORANGE, "dot": "#2b2f36", "linear": PURPLE, "gram": GREEN}
CURVES = (  # label, what is computed, our route, colour
    ("gradients into out=", "gradients", "gradext, out=", BLUE),
    ("gradients, fresh", "gradients", "gradext", LIGHT),
    ("norms", "norms", "gradext", ORANGE),
    ("Gram matrix", "gram", "gradext", GREEN),
    ("ten functionals", "scores", "gradext", PURPLE),
)


def _panels(figure: Figure, rows: int, columns: int, **options) -> list[Axes]:
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes:
        ax.grid(color="#e6e9ec", linewidth=0.8)
        ax.set_axisbelow(True)
    return axes


def _times(value: float, _) -> str:
    return f"{value:,.10g}x"


def draw_speedup(results: Results) -> Figure | None:
    """How many times as fast as the fastest peer, by batch size; dotted: as the single-sample loop."""
    if not results.cases:
        return None
    columns = min(3, len(results.cases))
    figure = Figure(figsize=(4.2 * columns, 3.5 * math.ceil(len(results.cases) / columns) + 1.0), layout="constrained")
    axes = _panels(figure, math.ceil(len(results.cases) / columns), columns, sharey=True)
    batches = sorted({B for _, B in results.cells})
    for ax, case in zip(axes, results.cases, strict=False):
        for label, computes, mine, colour in CURVES:
            found = [
                (B, base / t)
                for B in results.batches(case)
                if (base := results.best(case, B, computes, is_peer)) and (t := results.ms(case, B, computes, mine))
            ]
            if found:
                ax.plot(*zip(*found, strict=True), color=colour, marker="o", markersize=5, linewidth=2, label=label)
        loop = [
            (B, base / t)
            for B in results.batches(case)
            if (base := results.ms(case, B, "gradients", "single-sample loop"))
            and (t := results.ms(case, B, "gradients", "gradext, out="))
        ]
        if loop:
            label = "gradients into out=, over the single-sample loop"
            ax.plot(*zip(*loop, strict=True), color=BLUE, linestyle=":", linewidth=1.8, label=label)
        ax.axhline(1, color=INK, linewidth=1)
        ax.set(xscale="log", yscale="log", title=case, xlabel="batch size B")
        ax.set_xticks(batches, [f"{B:,}" for B in batches])
        ax.set_xlim(batches[0] / 1.6, batches[-1] * 1.6)
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(_times)
    for ax in axes[len(results.cases) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel("times as fast as the fastest peer")
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    return figure


def draw_memory(results: Results) -> Figure | None:
    """Bars of the rise of resident memory, by what is computed."""
    rows = results.of("memory")
    if not rows:
        return None
    longest = max(len(row["routes"]) for row in rows)
    columns = min(2, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(6.4 * columns, (0.3 * longest + 2.0) * lines), layout="constrained")
    axes = _panels(figure, lines, columns)
    for ax in axes[len(rows) :]:
        ax.set_visible(False)
    for ax, row in zip(axes, rows, strict=False):
        keys, top = list(row["routes"]), max(r["bytes"] for r in row["routes"].values())
        positions, at = [], 0.0
        for k, key in enumerate(keys):  # a gap between what computes different things
            at += 1.7 if k and row["routes"][key]["computes"] != row["routes"][keys[k - 1]]["computes"] else 1.0
            positions.append(at)
        sizes = [row["routes"][key]["bytes"] / 1e6 for key in keys]
        ax.barh(positions, sizes, color=[BLUE if ours(key) else "#c3c9d0" for key in keys])
        for position, size in zip(positions, sizes, strict=True):
            shown = f"{size:,.0f}" if size >= 1000 else f"{size:.3g}"
            ax.text(size + top / 1e6 * 0.012, position, shown, va="center", fontsize=9, color=INK)
        ax.axvline(row["bytes"] / 1e6, color=INK, linewidth=1, linestyle="--")
        ax.set_yticks(positions, [key.replace(": ", ", ") for key in keys])
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set(title=f"{row['case']}, B = {row['B']}", xlabel="MB above the baseline; dashed: the gradients' bytes")
        ax.set_xlim(0, max(top, row["bytes"]) / 1e6 * 1.12)
    return figure


def draw_growth(results: Results) -> Figure | None:
    """Time against B, O and I, each beside the count of operations, scaled to the last point."""
    axes_of = [axis for axis in ("B", "O", "I") if _growth(results, axis)]
    if not axes_of:
        return None
    figure = Figure(figsize=(4.4 * len(axes_of), 4.6), layout="constrained")
    for ax, axis in zip(_panels(figure, 1, len(axes_of), sharey=True), axes_of, strict=True):
        points = _growth(results, axis)
        sizes = [point["size"] for point in points]
        for name in points[0]["ms"]:
            colour = OPERATORS.get(name, GREY)
            ms, counted = ([point[k][name] for point in points] for k in ("ms", "operations"))
            ax.plot(sizes, ms, color=colour, marker="o", markersize=5, linewidth=2, label=name)
            ax.plot(sizes, [n * ms[-1] / counted[-1] for n in counted], color=colour, linestyle="--", linewidth=1.1)
        fixed = ", ".join(f"{k} = {points[0][k]}" for k in ("B", "O", "I") if k != axis)
        ax.set(xscale="log", yscale="log", title=f"{axis} grows; {fixed}", xlabel=axis)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.minorticks_off()
    figure.axes[0].set_ylabel("ms; dashed: as counted")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


if __name__ == "__main__":
    main()
