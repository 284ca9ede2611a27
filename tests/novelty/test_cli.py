"""The command line: the demo from end to end, ``info``, and the errors for bad input."""

import os
import re
import stat

import numpy as np
import pytest
import torch

from gradext import backends
from gradext.cli import main
from gradext.novelty import demo


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    lines = []
    results = demo.run("digits", inliers=(0, 5), out=out, echo=lines.append)
    return results, "\n".join(lines), out


@pytest.mark.medium
def test_demo_prints_its_tables(demo_run):
    results, text, _ = demo_run
    assert list(results) == [0, 5]
    for name in ("gradient norm", "gradient classifier", "reconstruction error", "latent classifier"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        values = [float(value) for value in re.findall(r"\d\.\d{3}", row)]
        assert len(values) == 3, "two classes and their mean"
        assert values[2] == pytest.approx(np.mean(values[:2]), abs=1e-3)
    for route in ("single-sample loop", "torch.func vmap(grad)", "gradext.batch_layer_grads", "gradext factors"):
        assert re.search(rf"^\| {re.escape(route)}.*\d+\.\d\d +\| \d+\.\d+x", text, re.M), route


def test_demo_runs_on_one_thread_and_restores_their_number(tmp_path, monkeypatch):
    seen, threads = [], torch.get_num_threads()
    monkeypatch.setattr(demo, "evaluate_class", lambda *a, **k: seen.append(torch.get_num_threads()) or pytest.skip())
    torch.set_num_threads(2)
    try:
        with pytest.raises(pytest.skip.Exception):
            demo.run("digits", out=tmp_path)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.medium
def test_demo_detects(demo_run):
    """On real images the label-free gradient norm and the reconstruction error are far above chance."""
    results, _, _ = demo_run
    for auroc in results.values():
        assert auroc["gradient_norm"] > 0.8
        assert auroc["reconstruction_error"] > 0.85


@pytest.mark.medium
def test_demo_writes_its_pictures(demo_run):
    _, text, out = demo_run
    for inlier in (0, 5):
        picture = out / f"digits-{inlier}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 50_000
        assert str(picture) in text


def test_demo_refuses_an_unwritable_folder_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "evaluate_class", lambda *a, **k: pytest.fail("training began"))
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert main(["demo", "--out", str(blocker / "folder")]) == 1
    assert "expected a folder that can be written to" in capsys.readouterr().err
    if os.geteuid() != 0:  # root writes everywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        assert main(["demo", "--out", str(closed)]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inlier", "five"], "--inlier: expected class numbers or 'all'"),
        (["--inlier", "12"], "12"),
        (["--dataset", "mnits"], "mnist"),
        (["--dataset", "mnist", "--data-dir", "no-such-folder"], "no-such-folder"),
        (["--fold", "7"], "fold"),
    ],
)
def test_demo_names_what_is_wrong_before_training(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "evaluate_class", lambda *a, **k: pytest.fail("training began"))
    assert main(["demo", "--out", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gradext demo: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.skipif("GRADEXT_DATA" not in os.environ, reason="real data: GRADEXT_DATA names no folder")
def test_demo_on_real_mnist(tmp_path):
    """Two epochs on one digit: the whole path over the real files."""
    results = demo.run("mnist", inliers=(1,), out=tmp_path, epochs=2, echo=lambda line: None)
    assert results[1]["gradient_norm"] > 0.9
    assert (tmp_path / "mnist-1.png").exists()


def test_info_says_what_works(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  reference +works$", text, re.M)
    assert re.search(r"^  cuda +(works|no: .{10,})$", text, re.M)
    assert re.search(r"^  torch +\d+\.\d+", text, re.M)


def test_info_prints_the_choice_of_backends(capsys, monkeypatch):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "GRADEXT_BACKEND" not in text
    lines = text.splitlines()[-len(backends.TABLE) :]
    for line, row in zip(lines, backends.TABLE, strict=True):
        assert line.split()[0] == row.device
        assert row.when in line
        assert line.endswith(f"{', '.join(row.backends)}: {row.why}")
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    assert main(["info"]) == 0
    assert "GRADEXT_BACKEND=reference is taken" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "fit", "score", "evaluate", "report", "export", "images", "info"])
def test_every_command_describes_itself(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage, description, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: gradext {command}")
    assert description.endswith(".")


def test_wrong_arguments_exit_with_two(capsys):
    with pytest.raises(SystemExit) as wrong:
        main(["demon"])
    assert wrong.value.code == 2
