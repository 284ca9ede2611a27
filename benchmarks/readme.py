"""Fills the figures of README.md and docs/ from the committed results: `python -m benchmarks.readme [--check]`.

A block `<!-- figures: NAME -->` ... `<!-- end -->` holds what the function NAME in `FIGURES` makes of the results.
``--check`` writes nothing and fails where a page differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/benchmarks.md", "docs/novelty.md")
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.S)


def read_table(path: Path, first: str, heading: str = "") -> list[list[str]]:
    """Header and rows of the first Markdown table below ``heading`` whose first column has the title ``first``."""
    table: list[list[str]] = []
    text = path.read_text()
    for line in text[text.index(heading) :].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if table and not line.startswith("|"):
            break
        if table or (line.startswith("|") and cells[0] == first):
            table.append(cells)
    if not table:
        raise SystemExit(f"{path}: expected a table whose first column has the title {first!r}")
    del table[1]
    return table


def markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "| " + " | ".join("---" for _ in table[0]) + " |")
    return "\n".join(lines)


def columns(table: list[list[str]], *titles: str) -> list[list[str]]:
    missing = set(titles) - set(table[0])
    if missing:
        raise SystemExit(f"expected columns {', '.join(sorted(missing))}, but the table has {', '.join(table[0])}")
    return [[row[table[0].index(title)] for title in titles] for row in table]


def _zoo() -> str:
    """How many real models are exact."""
    path = ROOT / "docs" / "models.md"
    found = re.search(r"^- complete and exact: (\d+) of (\d+); refused: (\d+)", path.read_text(), re.M)
    if not found:
        raise SystemExit(f"{path}: expected a line '- complete and exact: N of N; refused: N'")
    return (
        f"Exact in every parameter of every sample: {found[1]} of {found[2]} "
        f"[small real models](docs/models.md); refused: {found[3]}."
    )


def models() -> str:
    """How many real models are exact, and milliseconds for some."""
    path = RESULTS / "models.md"
    kept = ("model", "plain", "gradients", "by vmap(grad)", "norms", "training step", "with norms")
    where = re.search(r"at ([0-9a-f]{7,}\S*), .*?, (torch \d[^,]+), .* on (.*?)\. ", path.read_text())
    if not where:
        raise SystemExit(f"{path}: expected a line 'Made by COMMAND at COMMIT, ... torch VERSION, ... on MACHINE.'")
    title = (
        "Milliseconds for all parameters (in brackets: the ratio to a plain forward and backward; in the last column:\n"
        f"to a plain training step) on {where[3]}, {where[2]}, commit {where[1]}:"
    )
    return f"{_zoo()}\n{title}\n\n{markdown(columns(read_table(path, 'model'), *kept)[:6])}"


def libraries() -> str:
    """How often each library gives what, in the situations of docs/conformance.md."""
    head, *rows = read_table(ROOT / "docs" / "conformance.md", "")
    return markdown([[f"of {sum(map(int, (row[1] for row in rows[:4])))} situations", *head[1:]], *rows[:4]])


def detectors() -> str:
    """AUROC of detectors with their defaults: on tables the mean and the lowest, on images the mean."""
    path = RESULTS / "detectors" / "detectors.md"
    tables = columns(read_table(path, ""), "", "mean AUROC", "lowest")
    images = dict(columns(read_table(path, "", "## One-class images"), "", "mean AUROC"))
    rows = [["", "twelve tables: mean", "lowest", "eight image tasks: mean"]]
    rows += [[*row, images.get(row[0], "not measured")] for row in tables[1:]]
    return markdown([list(row) for row in zip(*rows, strict=True)])


def paper() -> str:
    """AUROC of the paper's experiment: the convolutional VAE and the paper, for each set."""
    kept = {"", "gradient classifier", "latent classifier", "reconstruction classifier"}
    kept |= {"whitened delta norm", "combined evidence: the joint density and both losses"}
    kept |= {"reconstruction error, summed"}
    table = read_table(ROOT / "experiments" / "results" / "summary.md", "")
    return markdown([[row[k] for k in (0, 1, 3, 4, 6, 7, 9)] for row in table if row[0] in kept])


def pytorch_ood() -> str:
    return markdown(read_table(RESULTS / "pytorch-ood.md", "classifier"))


def report_rows(kind: str, **wanted) -> list[dict]:
    found = map(json.loads, (RESULTS / "cpu" / "rows.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind and all(row[k] == v for k, v in wanted.items())]


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def peers() -> str:
    """Medians for the last layer of the VAE."""
    small, large = (report_rows("cell", case="MNIST VAE, last layer", B=B)[0] for B in (256, 1024))
    table = [["route", "B = 256, ms", "B = 1,024, ms"]]
    for route, times in small["routes"].items():
        if not route.endswith((": scores", ": sum")):
            other = large["routes"].get(route)
            table.append([route, milliseconds(times["ms"]), milliseconds(other["ms"]) if other else "-"])
    return f"{markdown(table)}\n\n({small['machine']}; {small['versions']}; commit {small['commit']}.)"


def outer() -> str:
    """GB/s of the outer product and of fills of the same bytes."""
    found = report_rows("operator", operator="outer")
    table = [["`[B, O, I]`", "MB", *found[0]["ms"]]]
    for row in found:
        speeds = [f"{row['bytes'] / ms / 1e6:.1f}" for ms in row["ms"].values()]
        table.append([f"{row['name']}: `[{row['B']}, {row['O']}, {row['I']}]`", f"{row['bytes'] / 1e6:.3g}", *speeds])
    return markdown(table)


FIGURES = {f.__name__: f for f in (models, libraries, detectors, paper, pytorch_ood, peers, outer)}


def filled(page: Path) -> str:
    return BLOCK.sub(lambda found: f"{found[1]}{FIGURES[found[2]]()}\n{found[3]}", page.read_text())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    check = parser.parse_args(argv).check
    stale = [name for name in PAGES if filled(ROOT / name) != (ROOT / name).read_text()]
    if check and stale:
        print(f"{', '.join(stale)}: not the figures of the results; run python -m benchmarks.readme", file=sys.stderr)
        return 1
    for name in stale:
        (ROOT / name).write_text(filled(ROOT / name))
    print(f"{'filled: ' + ', '.join(stale) if stale else 'all figures are those of the results'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
