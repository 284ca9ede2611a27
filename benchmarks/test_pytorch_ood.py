"""The comparison with pytorch-ood runs, and ends where the values differ."""

import importlib.util
import sys

import pytest

from . import pytorch_ood

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_ood") is None,
    reason="pytorch-ood is not installed (pip install '.[wrappers]')",
)


def test_a_row_for_each_detector(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytorch_ood", "--smoke"])
    pytorch_ood.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 784")]
    assert [row[1] for row in rows] == list(pytorch_ood.DETECTORS)
    assert all(float(row[4]) > 1 for row in rows), "gradext is the faster one"


def test_other_values_end_the_run(monkeypatch):
    monkeypatch.setattr(pytorch_ood, "_difference", lambda *_: 1e-3)
    with pytest.raises(SystemExit, match="GradNorm: the values differ by"):
        pytorch_ood._row("784-128-10", pytorch_ood.CASES["784-128-10"], "GradNorm", 0.1)
