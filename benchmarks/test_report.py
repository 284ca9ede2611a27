"""The report on a few rows whose ratios are known."""

import json
import sys

import pytest

from . import report

FACTS = {"commit": "abc1234", "versions": "gradext 1, torch 2", "machine": "a CPU, 2 threads"}


def cell(case: str, B: int, **ms_or_outcome) -> dict:
    """Routes by "name: computes"; a number is a time in ms."""
    routes = {
        key: {"computes": key.rsplit(": ", 1)[1]}
        | (value if isinstance(value, dict) else {"ms": value, "low": 0.9 * value, "high": 1.1 * value, "calls": 5})
        for key, value in ms_or_outcome.items()
    }
    return {"kind": "cell", "case": case, "B": B, "bytes": 4000 * B, "routes": routes, **FACTS}


LAST = "MNIST VAE, last layer"
ROWS = [
    cell("small", 1, **{
        "single-sample loop: gradients": 1.0, "vmap(grad): gradients": 2.0, "by hand: gradients": 0.1,
        "gradext: gradients": 0.4, "gradext, out=: gradients": 0.5,
        "Opacus ghost: norms": 0.25, "BackPACK BatchL2Grad: norms": {"failed": "ValueError: not this layer"},
        "by hand: norms": 0.45, "gradext: norms": 0.5,
    }),
    cell(LAST, 64, **{"vmap(grad): gradients": 99.0, "gradext, out=: gradients": 99.0}),  # measured again below
    cell(LAST, 64, **{
        "single-sample loop: gradients": 100.0, "vmap(grad): gradients": 40.0, "by hand: gradients": 30.0,
        "Opacus: gradients": {"wrong": 0.5}, "gradext: gradients": 8.0, "gradext, out=: gradients": 4.0,
        "vmap(grad): norms": 45.0, "by hand: norms": 0.9, "gradext: norms": 1.0,
    }),
    cell(LAST, 4096, **{
        "vmap(grad): gradients": {"skipped": "needs about 20 GB, of 10 GB that are free"},
        "gradext, out=: gradients": 200.0,
    }),
    {"kind": "memory", "case": LAST, "B": 64, "bytes": 80_000_000, **FACTS, "routes": {
        "vmap(grad): norms": {"computes": "norms", "bytes": 160_000_000},
        "gradext: norms": {"computes": "norms", "bytes": 800_000},
    }},
    *({"kind": "growth", "axis": axis, "size": n, "B": n, "O": 8, "I": 8, **FACTS,
       "ms": {"outer": 0.01 * n, "gram": 0.001 * n**1.5}, "operations": {"outer": 64 * n, "gram": 16 * n**2}}
      for axis in ("B", "O") for n in (64, 128, 256, 512)),
    {"kind": "operator", "operator": "outer", "name": "odd", "B": 2, "T": 1, "O": 3, "I": 5, "bytes": 1_000_000,
     "operations": 30, **FACTS,
     "ms": {"gradext": 0.1, "its kernel": 0.09, "torch.mul(out=)": 0.2, "streaming fill": 0.5, "fill_": 0.05}},
    {"kind": "operator", "operator": "dot", "name": "wide", "B": 2, "T": 1, "O": 3, "I": 5, "bytes": 2_000_000,
     "operations": 4_000_000, "ms": {"gradext": 0.1, "matrix product": 1.0, "sum of the same bytes": 0.05},
     "ceiling_operations": 80_000_000, **FACTS},
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", str(folder / "rows.jsonl"), "--out", str(folder / "made")])
        report.main()
    return folder / "made"


def section(text: str, heading: str) -> str:
    return text.split(f"# {heading}\n", 1)[1].split("\n## ", 1)[0]


def columns(line: str) -> list[str]:
    return [column.strip() for column in line.strip("|").split("|")]


def test_ratios_of_a_cell(made):
    """Ours at its best against the peers and by hand; behind in bold; the last row of a cell counts."""
    text = (made / "report.md").read_text()
    small = section(text, "small").splitlines()
    rows = [columns(line) for line in small if line.startswith("| 1 ")]
    assert rows[0] == ["1", "1 ± 0.1", "2 ± 0.2", "0.1 ± 0.01", "0.4 ± 0.04", "0.5 ± 0.05", "2.5x", "**0.25x**"]
    assert rows[1] == ["1", "0.25 ± 0.025", "failed", "0.45 ± 0.045", "0.5 ± 0.05", "**0.5x**", "**0.9x**"]
    last = section(text, LAST).splitlines()
    rows = [columns(line) for line in last if line.startswith("| 64 ")]
    assert rows[0][1:] == ["100 ± 10", "40 ± 4", "30 ± 3", "wrong", "8 ± 0.8", "4 ± 0.4", "10x", "7.5x"]


def test_where_gradext_is_behind(made):
    behind = section((made / "report.md").read_text(), "Where gradext is behind")
    peers, by_hand = (part.strip().splitlines()[1:] for part in behind.split("### ")[1:])
    peers, by_hand = ([line for line in lines if line] for lines in (peers, by_hand))
    assert peers.pop(0).startswith("By 0.25 to 0.25 ms (median 0.25) in 1 cells; in 1 of them by no more than 0.3 ms")
    assert by_hand.pop(0).startswith("By 0.3 to 0.3 ms")
    assert peers == ["- small, B = 1, norms: gradext 0.5 ms; Opacus ghost 0.25 ms"]
    assert by_hand == ["- small, B = 1, gradients: gradext 0.4 ms; by hand 0.1 ms"]


def test_aims(made):
    aims = section((made / "report.md").read_text(), "Aims").splitlines()
    found = {columns(line)[0]: columns(line)[1:] for line in aims if line.startswith("| ")}
    assert found["gradients into `out=`, large layers, against the fastest peer"] == ["8x", "10x to 10x", "1 of 1"]
    assert found["norms, large layers, against `vmap(grad)`"] == ["40x", "45x to 45x", "1 of 1"]
    bare = found["norms, Gram matrix, functionals, everywhere, against the bare products"]
    assert bare == ["0.87x", "0.9x to 0.9x", "2 of 2"]
    assert found["everything, everywhere, against the fastest peer"] == ["1x", "0.5x to 45x", "3 of 4"]


def test_aims_of_real_models(tmp_path):
    routes = {
        "batched backward: sum": 100.0, "training step: step": 100.0, "gradext: step norms": 110.0,
        "Opacus ghost: norms": 160.0, "gradext: norms": 100.0, "vmap(grad): gram": 90.0, "gradext: gram": 100.0,
        "Opacus ghost: clipped": {"wrong": 0.5}, "gradext: clipped": 130.0,
    }  # fmt: skip
    rises = {
        "training step: step": {"computes": "step", "bytes": 100},
        "gradext: norms": {"computes": "norms", "bytes": 110},
    }
    memory = {"kind": "memory", "case": "GPT-2", "B": 16, "bytes": 1000, "routes": rises, **FACTS}
    report.write(report.Results([*ROWS, cell("GPT-2", 16, **routes), memory]), tmp_path)
    text = (tmp_path / "report.md").read_text()
    found = {
        columns(line)[0]: columns(line)[1:] for line in section(text, "Aims").splitlines() if line.startswith("| ")
    }
    assert found["real models, everything, against the fastest peer"] == ["1x", "0.9x to 1.6x", "1 of 2"]
    assert found["real models, norms, against a plain forward and backward"] == ["0.91x", "1x to 1x", "1 of 1"]
    assert found["real models, norms, against Opacus' ghost clipping"] == ["1.4x", "1.6x to 1.6x", "1 of 1"]
    assert found["real models, a training step with norms, against a plain one"] == [
        "0.87x",
        "0.909x to 0.909x",
        "1 of 1",
    ]
    assert found["real models, memory of norms, against a plain step's"] == ["0.83x", "0.909x to 0.909x", "1 of 1"]
    rows = [columns(line) for line in section(text, "GPT-2").splitlines() if line.startswith("| 16 ")]
    assert rows[-1] == ["16", "100 ± 10", "100 ± 10", "110 ± 11"]


def test_reasons_memory_operators_and_slopes(made):
    text = (made / "report.md").read_text()
    missing = section(text, "Not measured")
    assert f"- Opacus: gradients, {LAST}, B = 64: wrong, relative error 0.5" in missing
    assert f"{LAST}, B = 4,096: skipped, needs about 20 GB" in missing
    assert "small, B = 1: failed, ValueError: not this layer" in missing
    assert ["gradext: norms", "0.8", "1.0%"] in [columns(line) for line in text.splitlines()]
    assert ["odd [2, 3, 5]", "1", "10.0", "11.1", "5.0", "20.0"] in [columns(line) for line in text.splitlines()]
    dot = ["dot", "wide, B = 2, T = 1", "0.1", "40.0", "80.0", "20.0", "40.0"]
    assert dot in [columns(line) for line in text.splitlines()]
    assert ["B", "gram", "1.50", "2.00"] in [columns(line) for line in text.splitlines()]


def test_pictures(made):
    """There are three, and the report shows them."""
    text = (made / "report.md").read_text()
    for name in ("speedup", "memory", "growth"):
        assert (made / f"{name}.png").stat().st_size > 10_000
        assert f"![{name}]({name}.png)" in text


def test_parts_without_rows_are_left_out(tmp_path):
    report.write(report.Results(ROWS[:1]), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## small" in text
    for heading in ("Peak memory", "Operators", "Growth"):
        assert heading not in text
    assert not (tmp_path / "memory.png").exists()


def test_missing_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", "nowhere.jsonl", "--out", "nowhere"])
    with pytest.raises(SystemExit):
        report.main()
    assert (
        "no such file: nowhere.jsonl; `pytest benchmarks --grid full --rows FILE` writes it" in capsys.readouterr().err
    )
