"""The examples of README and the command line run as they stand, and docstrings' examples print what they say."""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import gradext
from gradext.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_readme_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    assert len(EXAMPLES) >= 3
    for source in EXAMPLES:
        exec(compile(source, str(README), "exec"), names)
    assert (names["detector"].predict(names["normal"]) == 1).mean() > 0.8


def test_readme_is_one_screen_and_its_figures_are_those_of_the_results():
    assert len(README.read_text().splitlines()) <= 120
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.readme", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    prose = re.sub(r"<!-- figures: .*?<!-- end -->|```.*?```|`[^`]*`|\([^)]*\)", "", README.read_text(), flags=re.S)
    allowed = {"0.1.0", "3.10", "2.8", "2.13", "2.0"}  # versions
    assert set(re.findall(r"\d+(?:\.\d+)+", prose)) <= allowed


def tour(name: str, folder: Path, monkeypatch) -> None:
    """Run the commands of a marked block, as they stand."""
    page = (ROOT / "docs" / "command-line.md").read_text()
    block = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", page, re.S)[1]
    monkeypatch.chdir(folder)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "gradext"
        assert main(arguments) == 0, line


@pytest.mark.medium
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


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no sources beside the tests")
def test_a_package_index_gets_readme_without_links_that_break(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = (tmp_path / "gradext.egg-info" / "PKG-INFO").read_text()
    assert "# gradext" in text
    assert "docs/usage.md" in text
    assert not re.findall(r"\]\((?!https://)", text)
