"""``gradext fit``, ``score``, ``evaluate`` from end to end, and what bad input is told; nothing is lost."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from gradext.cli import main
from gradext.novelty import load, scoring
from gradext.novelty.detector import NoveltyDetector

SMALL = ["--hidden-dim", "64", "--latent-dim", "8"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """scikit-learn's digits as PNG files, a model of their zeros, and the arrays."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    assert main(["images", "digits", "--out", str(folder)]) == 0
    model = folder / "zeros.gradext"
    assert main(["fit", str(folder / "train"), "--normal", "0", "--out", str(model), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def model(digits):
    return str(digits / "zeros.gradext")


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_images_are_the_set(digits):
    from PIL import Image

    files = sorted(digits.glob("*/*/*.png"))
    assert len(files) == 1797
    bunch = load_digits()
    for path in files[::200]:
        row = int(path.stem)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.round(bunch.images[row] * 255 / 16))
        assert path.parent.name == str(bunch.target[row])
        assert path.parent.parent.name == ("test" if row % 5 == 4 else "train")


def test_evaluate_tells_classes_apart(digits, model, capsys):
    assert main(["evaluate", model, str(digits / "test"), "--normal", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["auroc"] > 0.95
    assert result["detection_rate"] > 0.7
    assert result["false_alarm_rate"] < 0.3
    assert result["normal"] + result["novel"] == len(list((digits / "test").glob("*/*.png")))
    assert main(["evaluate", model, str(digits / "test"), "--normal", "0"]) == 0
    assert f"AUROC              {result['auroc']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_scores_are_the_detectors_own_bits(digits, model, kind, tmp_path):
    out = tmp_path / f"scores.{kind}"
    assert main(["score", model, str(digits / "test"), "--out", str(out)]) == 0
    table = rows_of(out) if kind == "csv" else pytest.importorskip("pyarrow.parquet").read_table(out).to_pylist()
    names = sorted(p.relative_to(digits / "test").as_posix() for p in (digits / "test").glob("*/*.png"))
    assert [row["sample"] for row in table] == names
    bunch = load_digits()
    X = np.round(bunch.images[[int(name[-9:-4]) for name in names]] * 255 / 16).astype(np.uint8)
    detector = load(model)
    np.testing.assert_array_equal([float(row["novelty"]) for row in table], -detector.score_samples(X))
    np.testing.assert_array_equal([float(row["p_value"]) for row in table], detector.p_values(X))
    np.testing.assert_array_equal([int(row["novel"]) for row in table], detector.predict(X) == -1)
    assert os.listdir(tmp_path) == [out.name]


def test_arrays_tables_and_sets_go_the_same_way(tmp_path, capsys):
    bunch = load_digits()
    X, novel = bunch.data / 16, (bunch.target != 0).astype(int)
    np.save(tmp_path / "x.npy", X[novel == 0])
    np.savez(tmp_path / "test.npz", X=X, y=novel)
    model = str(tmp_path / "m")
    assert main(["fit", str(tmp_path / "x.npy"), "--out", model, *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == (novel == 0).sum()
    assert main(["evaluate", model, str(tmp_path / "test.npz"), "--json"]) == 0
    by_array = json.loads(capsys.readouterr().out)["auroc"]
    assert main(["evaluate", model, "digits", "--normal", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auroc"] == by_array
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(X).assign(truth=novel).to_csv(tmp_path / "t.csv", index=False)
    assert main(["evaluate", model, str(tmp_path / "t.csv"), "--labels", "truth", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auroc"] == by_array


def test_samples_whose_scores_overflow_are_the_most_novel(tmp_path, capsys):
    X = np.random.default_rng(0).random((200, 16))
    model, test, out = str(tmp_path / "m"), str(tmp_path / "test.npz"), tmp_path / "r.html"
    np.save(tmp_path / "x.npy", X)
    np.savez(test, X=np.vstack([X[:30], X[:20] * 9, [X[0] * 1e200]]), y=np.repeat([0, 1], [30, 21]))
    assert main(["fit", str(tmp_path / "x.npy"), "--out", model, "--score", "latent_loss", *SMALL]) == 0
    capsys.readouterr()
    assert main(["evaluate", model, test, "--normal", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    novelty = -load(model).score_samples(np.load(test)["X"])
    assert novelty[-1] == np.inf
    novelty[-1] = 1e300
    assert result["auroc"] == roc_auc_score(np.load(test)["y"], novelty)
    assert main(["report", model, test, "--normal", "0", "--out", str(out)]) == 0
    assert f"{result['auroc']:.3f}" in out.read_text()


def test_scores_of_several_layers(digits, tmp_path, capsys):
    model = str(tmp_path / "m")
    arguments = ["--normal", "0", "--score", "combined_whitened_norm", "--layer", "first,last", "--out", model]
    assert main(["fit", str(digits / "train"), *arguments, *SMALL]) == 0
    assert load(model).layer == ("first", "last")
    capsys.readouterr()
    assert main(["evaluate", model, str(digits / "test"), "--normal", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auroc"] > 0.95


def test_unreadable_images_are_named_or_kept_as_rows_with_the_reason(digits, model, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for k, path in enumerate(sorted((digits / "test" / "0").iterdir())[:4]):
        (folder / f"{k}.png").write_bytes(path.read_bytes()[: 30 if k == 2 else None])
    out = tmp_path / "scores.csv"
    assert main(["score", model, str(folder), "--out", str(out)]) == 1
    assert "1 of 4 images cannot be used" in capsys.readouterr().err
    assert not out.exists()
    assert main(["score", model, str(folder), "--out", str(out), "--skip-unreadable"]) == 0
    assert "skipped: " in capsys.readouterr().err
    table = rows_of(out)
    assert [row["novelty"] == "" for row in table] == [False, False, True, False]
    assert "2.png" in table[2]["error"]


def test_evaluating_images_none_of_which_can_be_read_says_so(digits, model, tmp_path, capsys):
    path = next((digits / "test" / "0").iterdir())
    for label in "01":
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(path.read_bytes()[:30])
    assert main(["evaluate", model, str(tmp_path), "--normal", "0", "--skip-unreadable"]) == 1
    assert "none of 2 samples can be read, such as" in capsys.readouterr().err


def test_fit_names_unreadable_images_or_leaves_them_out(digits, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    files = sorted((digits / "train" / "0").iterdir())
    for path in files:
        (folder / path.name).write_bytes(path.read_bytes()[: 30 if path == files[7] else None])
    arguments = ["fit", str(folder), "--out", str(tmp_path / "m"), "--json", *SMALL]
    assert main(arguments) == 1
    assert f"{files[7].name}: " in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["images"]
    assert main([*arguments, "--skip-unreadable"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == len(files) - 1
    assert list(result["skipped"]) == [files[7].name]
    for path in files:
        (folder / path.name).write_bytes(b"")
    assert main([*arguments, "--skip-unreadable"]) == 1
    assert "none of 151 images can be read" in capsys.readouterr().err


def test_a_part_of_a_memory_map(tmp_path):
    bunch = load_digits()
    np.save(tmp_path / "x.npy", bunch.data / 16)
    np.save(tmp_path / "y.npy", bunch.target)
    np.save(tmp_path / "zeros.npy", bunch.data[bunch.target == 0] / 16)
    for data in (["x.npy", "--labels", str(tmp_path / "y.npy"), "--normal", "0"], ["zeros.npy"]):
        out = ["--out", str(tmp_path / f"m-{data[0]}")]
        assert main(["fit", str(tmp_path / data[0]), *data[1:], *out, "--epochs", "2", *SMALL]) == 0
    assert (tmp_path / "m-x.npy").read_bytes() == (tmp_path / "m-zeros.npy").read_bytes()


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_was(digits, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "ROWS_AT_A_TIME", 50)
    whole, out = tmp_path / "whole.csv", tmp_path / "scores.csv"
    arguments = ["score", model, str(digits / "test"), "--out"]
    assert main([*arguments, str(whole)]) == 0
    original, calls = NoveltyDetector.score_samples, []

    def interrupted(self, X):
        calls.append(len(X))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, X)

    monkeypatch.setattr(NoveltyDetector, "score_samples", interrupted)
    assert main([*arguments, str(out)]) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert not out.exists()
    partial = tmp_path / "scores.csv.partial"
    content = partial.read_bytes()
    assert content.count(b"\n") == 1 + 3 * 50
    partial.write_bytes(content + b"150,half a li")  # killed within a write
    calls[:] = [0] * 10
    assert main([*arguments, str(out)]) == 0
    assert len(calls) == 10 + len(list((digits / "test").glob("*/*.png"))) // 50 + 1 - 3
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_a_killed_process_loses_nothing(model, tmp_path):
    """SIGKILL in the middle; the second run's table equals an undisturbed one's."""
    X = np.random.default_rng(0).random((20_000, 64))
    np.save(tmp_path / "x.npy", X)
    out = tmp_path / "scores.csv"
    command = [sys.executable, "-m", "gradext", "score", model, str(tmp_path / "x.npy"), "--out", str(out)]
    process = subprocess.Popen(command)
    partial = tmp_path / "scores.csv.partial"
    for _ in range(600):
        if partial.exists() and partial.stat().st_size > 60_000:
            break
        try:
            process.wait(0.05)
            break
        except subprocess.TimeoutExpired:
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists(), "the run was over before it could be killed"
    done = partial.read_bytes().count(b"\n") - 1
    assert 0 < done < len(X)
    assert main(command[3:]) == 0
    table = rows_of(out)
    assert [int(row["row"]) for row in table] == list(range(len(X)))
    np.testing.assert_array_equal([float(row["novelty"]) for row in table], -load(model).score_samples(X))


def test_what_another_run_left_is_refused(digits, model, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    (tmp_path / "scores.csv.partial").write_text('{"model": "other"}\n0,a,1.0,0.5,0,\n')
    assert main(["score", model, str(digits / "test"), "--out", str(out)]) == 1
    assert "left over from a run with another model" in capsys.readouterr().err
    assert (tmp_path / "scores.csv.partial").exists()


def test_a_run_that_failed_at_once_is_in_nobodys_way(model, tmp_path, capsys):
    """What was wrong is mended, and the command runs: with nothing done there is nothing to go on with."""
    np.save(tmp_path / "narrow.npy", np.zeros((5, 63)))
    np.save(tmp_path / "x.npy", np.zeros((5, 64)))
    out = tmp_path / "scores.csv"
    assert main(["score", model, str(tmp_path / "narrow.npy"), "--out", str(out)]) == 1
    assert "63 features" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["narrow.npy", "x.npy"]
    assert main(["score", model, str(tmp_path / "x.npy"), "--out", str(out)]) == 0


def test_a_wrong_layer_is_told_before_the_training(digits, tmp_path, capsys):
    fit = ["fit", str(digits / "test" / "0"), "--out", str(tmp_path / "m"), "--epochs", "2", "--hidden-dim", "8"]
    assert main([*fit, "--layer", "first,decoder.7"]) == 1
    assert "no parameter, module or match of 'decoder.7'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
    assert main(fit) == 0


def test_a_full_disk_keeps_what_is_done(digits, model, tmp_path, capsys, monkeypatch):
    import errno

    out = tmp_path / "scores.csv"
    monkeypatch.setattr(scoring, "ROWS_AT_A_TIME", 100)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    arguments = ["score", model, str(digits / "test"), "--out", str(out)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "run the same command again to go on" in error
    assert main(arguments) == 0
    assert len(rows_of(out)) == len(list((digits / "test").glob("*/*.png")))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "{digits}/train", "--out", "{tmp}/none/m"], "expected a file in a folder that can be written to"),
        (["fit", "{digits}/train", "--out", "{tmp}"], "Is a directory"),
        (["fit", "{tmp}/none", "--out", "{tmp}/m"], "there is nothing of that name"),
        (["fit", "digit", "--out", "{tmp}/m"], "one of digits, mnist"),
        (["fit", "{digits}/train", "--normal", "x", "--out", "{tmp}/m"], "--normal: expected some of 0, 1, 2"),
        (["fit", "{digits}/train", "--size", "8", "--out", "{tmp}/m"], "--size: expected HxW"),
        (["fit", "{digits}/train", "--score", "norm", "--out", "{tmp}/m"], "novelty_score: expected one of"),
        (["fit", "{digits}/train", "--device", "none", "--out", "{tmp}/m"], "device: expected one that works here"),
        (["evaluate", "{model}", "digits", "--normal", "0", "--device", "cuda:77"], "device: expected one that works"),
        (["score", "{tmp}/none", "digits", "--out", "{tmp}/s.csv"], "there is no such file"),
        (["score", "{digits}/test/0/00010.png", "digits", "--out", "{tmp}/s.csv"], "no such file"),
        (["score", "{model}", "{digits}/test", "--out", "{tmp}/s.txt"], "expected a file of type .csv, .parquet"),
        (["score", "{model}", "{digits}/test", "--out", "{tmp}/none/s.csv"], "No such file or directory"),
        (["evaluate", "{model}", "{digits}/test"], "--normal: which labels are normal? There are 0, 1, 2"),
        (["evaluate", "{model}", "{digits}/test/0", "--normal", "0"], "it has none; say where they are with --labels"),
        (["images", "digits", "--out", "{digits}"], "expected a new or empty folder"),
    ],
)
def test_bad_input_is_named_and_exits_with_one(arguments, message, digits, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(NoveltyDetector, "_make_model", lambda *a: pytest.fail("training began"))
    filled = [a.format(digits=digits, model=model, tmp=tmp_path) for a in arguments]
    assert main(filled) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"gradext {arguments[0]}: ")
    assert message in error
    assert os.listdir(tmp_path) == []


def test_outputs_are_quiet_off_a_terminal(digits, model, capfd):
    assert main(["evaluate", model, str(digits / "test"), "--normal", "0", "--json"]) == 0
    out, error = capfd.readouterr()
    json.loads(out)
    assert error == ""


def test_auroc_is_that_of_the_scores(digits, model, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    assert main(["score", model, str(digits / "test"), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["evaluate", model, str(digits / "test"), "--normal", "0", "--json"]) == 0
    table = rows_of(out)
    novel = [not row["sample"].startswith("0/") for row in table]
    expected = roc_auc_score(novel, [float(row["novelty"]) for row in table])
    assert json.loads(capsys.readouterr().out)["auroc"] == pytest.approx(expected, abs=1e-12)
