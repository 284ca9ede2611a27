"""README's Python examples run as they stand, and the docstrings' examples print what they say."""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import gradext
from gradext.cli import main

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_readme_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names = {"X_normal": rng.random((60, 16)), "X": rng.random((5, 16)), "__name__": "readme"}
    assert len(EXAMPLES) >= 3
    for source in EXAMPLES:
        exec(compile(source, str(README), "exec"), names)
    assert names["norms"].shape == (256,)


def tour(name: str, folder: Path, monkeypatch) -> None:
    """Run the commands of a marked block, as they stand."""
    block = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README.read_text(), re.S)[1]
    monkeypatch.chdir(folder)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "gradext"
        assert main(arguments) == 0, line


def test_command_line_tour_on_image_files(tmp_path, monkeypatch, capsys):
    tour("tour", tmp_path, monkeypatch)
    assert float(re.search(r"AUROC +([\d.]+)", capsys.readouterr().out)[1]) > 0.9
    assert {"scores.csv", "report.html"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif("GRADEXT_DATA" not in os.environ, reason="real data: GRADEXT_DATA names no folder")
def test_command_line_tour_on_mnist(tmp_path, monkeypatch, capsys):
    tour("tour-mnist", tmp_path, monkeypatch)
    assert float(re.search(r"AUROC +([\d.]+)", capsys.readouterr().out)[1]) > 0.9
    assert {"mnist.csv", "mnist.html"} <= {path.name for path in tmp_path.iterdir()}


MODULES = [
    "gradext",
    *(m.name for m in pkgutil.walk_packages(gradext.__path__, "gradext.") if "__main__" not in m.name),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, request):
    if name.startswith("gradext.kernels") or name == "gradext._C":
        pytest.skip("kernels have no examples, and the compiled module no docstrings")
    if name == "gradext.novelty.pyod":
        pytest.importorskip("pyod")
    if name == "gradext.novelty.pytorch_ood":
        request.getfixturevalue("pytorch_ood")
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
