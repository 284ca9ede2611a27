"""``gradext fit``, ``score``, ``evaluate`` from end to end, and their errors; no result is lost."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from gradext.cli import main
from gradext.novelty import load, scoring, writing
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
    assert novelty[-1] == novelty.max()
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


@pytest.mark.slow
def test_a_killed_process_loses_nothing(model, tmp_path):
    """SIGKILL in the middle; the second run's table equals an undisturbed one's."""
    X = np.random.default_rng(0).random((20_000, 64))
    np.save(tmp_path / "x.npy", X)
    out = tmp_path / "scores.csv"
    command = [sys.executable, "-m", "gradext", "score", model, str(tmp_path / "x.npy"), "--out", str(out)]
    process = subprocess.Popen(command)
    partial = tmp_path / "scores.csv.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 60_000):
        time.sleep(0.005)
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


def test_a_run_that_fails_at_once_leaves_nothing(model, tmp_path, capsys):
    """What was wrong is mended, and the command runs: with nothing done there is nothing to go on with."""
    np.save(tmp_path / "narrow.npy", np.zeros((5, 63)))
    np.save(tmp_path / "x.npy", np.zeros((5, 64)))
    out = tmp_path / "scores.csv"
    assert main(["score", model, str(tmp_path / "narrow.npy"), "--out", str(out)]) == 1
    assert "got rows of 63 columns" in capsys.readouterr().err
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


@pytest.mark.parametrize("same_name", [True, False])
@pytest.mark.parametrize("kind", ["array", "images"])
def test_other_data_of_the_same_size_and_time_are_noticed(
    kind, same_name, digits, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(scoring, "ROWS_AT_A_TIME", 20)
    original, calls = NoveltyDetector.score_samples, []

    def interrupted(self, X):
        calls.append(len(X))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, X)

    if kind == "array":
        data = path = tmp_path / "x.npy"
        np.save(path, np.random.default_rng(0).random((60, 64)))
        content = bytearray(path.read_bytes())
        content[-3] ^= 0xFF
    else:
        data = tmp_path / "images"
        data.mkdir()
        for k, image in enumerate(sorted((digits / "test" / "0").iterdir())):
            (data / f"{k}.png").write_bytes(image.read_bytes())
        path = data / "3.png"
        content = bytearray((data / "5.png").read_bytes())
    times = path.stat()
    out = tmp_path / "s.csv"
    monkeypatch.setattr(NoveltyDetector, "score_samples", interrupted)
    assert main(["score", model, str(data), "--out", str(out)]) == 130
    if same_name:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    calls[:] = [0] * 9
    assert main(["score", model, str(data), "--out", str(out)]) == int(same_name)
    assert ("other data" in capsys.readouterr().err) == same_name


# --- nothing is overwritten ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["fit", "{tmp}/x.npy", "--out", "{tmp}/x.npy"], "the data"),
        (["fit", "{tmp}/x.npy", "--out", "{tmp}/link.npy"], "the data"),
        (["fit", "{tmp}/x.npy", "--out", "{tmp}/sub/../x.npy"], "the data"),
        (
            ["fit", "{tmp}/x.npy", "--labels", "{tmp}/y.npy", "--normal", "0", "--out", "{tmp}/y.npy"],
            "the file of labels",
        ),
        (["fit", "{tmp}/sub", "--out", "{tmp}/sub/a.png"], "in the data"),
        (["score", "{tmp}/m", "{tmp}/t.csv", "--out", "{tmp}/t.csv"], "the data"),
        (["score", "{tmp}/m.csv", "{tmp}/t.csv", "--out", "{tmp}/m.csv"], "the model"),
        (["score", "{tmp}/m", "{tmp}/t.csv.partial", "--out", "{tmp}/t.csv"], "the data"),
        (["report", "{tmp}/m", "{tmp}/t.csv", "--out", "{tmp}/m"], "the model"),
        (["report", "{tmp}/m", "{tmp}/t.csv", "--out", "{tmp}/t.csv"], "the data"),
        (
            ["report", "{tmp}/m", "{tmp}/t.csv", "--training", "{tmp}/x.npy", "--out", "{tmp}/x.npy"],
            "the training data",
        ),
        (["export", "{tmp}/m", "--out", "{tmp}/m"], "the model"),
    ],
)
def test_an_output_that_is_an_input_is_refused(arguments, what, digits, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((40, 4)))
    np.save(tmp_path / "y.npy", np.zeros(40))
    (tmp_path / "link.npy").symlink_to(tmp_path / "x.npy")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(next((digits / "test" / "0").iterdir()).read_bytes())
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    (tmp_path / "t.csv.partial").write_text("a,b\n1,2\n")
    for name in ("m", "m.csv"):
        (tmp_path / name).write_bytes(b"a model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([a.format(tmp=tmp_path) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{what}, " in error
    assert "choose another name" in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_processes_on_one_output(digits, model, tmp_path, capsys):
    """One works, the other raises; the lock of a killed process has no effect."""
    out = tmp_path / "s.csv"
    arguments = ["score", model, str(digits / "test"), "--out", str(out)]
    with writing.alone(out):
        assert main(arguments) == 1
        assert "another process is writing it" in capsys.readouterr().err
    (tmp_path / ".s.csv.lock").write_bytes(b"")
    assert main(arguments) == 0
    assert os.listdir(tmp_path) == ["s.csv"]
    for other in (["fit", str(digits / "test" / "0")], ["report", model, str(digits / "test")], ["export", model]):
        with writing.alone(tmp_path / "o"):
            assert main([*other, "--out", str(tmp_path / "o")]) == 1
        assert "another process is writing it" in capsys.readouterr().err


def test_a_full_disk_at_the_end_of_a_fit_is_told(digits, tmp_path, capsys, monkeypatch):
    import errno

    out = tmp_path / "m"
    arguments = ["fit", str(digits / "test" / "0"), "--out", str(out), "--epochs", "3", *SMALL]
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:  # the first was the checkpoint's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "m.partial; run the same command again to go on" in error
    assert main(arguments) == 0
    assert os.listdir(tmp_path) == ["m"]


def test_another_threshold_when_scoring(digits, model, tmp_path, capsys):
    rows = []
    for k, rate in enumerate((None, "0.1", "0.5")):
        out = tmp_path / f"{k}.csv"
        arguments = [] if rate is None else ["--target-fpr", rate]
        assert main(["score", model, str(digits / "test"), "--out", str(out), *arguments]) == 0
        rows.append(rows_of(out))
    novel = [sum(int(row["novel"]) for row in table) for table in rows]
    assert novel[0] <= novel[1] <= novel[2]
    assert novel[0] < novel[2]
    assert [[row["novelty"] for row in table] for table in rows] == [[row["novelty"] for row in rows[0]]] * 3
    capsys.readouterr()
    alarms = []
    for rate in ("0.1", "0.5"):
        command = ["evaluate", model, str(digits / "test"), "--normal", "0", "--json", "--target-fpr", rate]
        assert main(command) == 0
        alarms.append(json.loads(capsys.readouterr().out)["false_alarm_rate"])
    assert alarms[0] < alarms[1]
    assert main(["score", model, str(digits / "test"), "--out", str(tmp_path / "x.csv"), "--target-fpr", "2"]) == 1
    assert "target_fpr: expected a number between 0 and 1" in capsys.readouterr().err


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


# --- folders and files as they are -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inspection(tmp_path_factory):
    """An inspection folder: 60 good images to train on, 8 good and 8 with a bright square to test, masks, a model."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("inspection") / "part", np.random.default_rng(0)
    y, x = np.mgrid[:24, :24]
    for folder, count in (("train/good", 60), ("test/good", 8), ("test/crack", 8)):
        (root / folder).mkdir(parents=True)
        for k in range(count):
            image = 120 + 60 * np.sin(x / 2 + rng.uniform(0, 6)) * np.cos(y / 3) + rng.normal(0, 8, (24, 24))
            if folder == "test/crack":
                mask = np.zeros((24, 24), np.uint8)
                mask[6:12, 9:15] = 255
                image[mask > 0] = 250
                (root / "ground_truth" / "crack").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / "ground_truth" / "crack" / f"{k:03}_mask.png")
            Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(root / folder / f"{k:03}.png")
    assert main(["fit", str(root), "--out", str(root.parent / "m"), "--quiet"]) == 0
    return root


def test_an_inspection_folder_needs_no_option(inspection, tmp_path, capsys):
    model, maps = str(inspection.parent / "m"), tmp_path / "maps"
    assert load(model).input_shape_ == (24, 24)
    assert main(["evaluate", model, str(inspection), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["normal"], result["novel"]) == (8, 8)
    assert result["auroc"] > 0.95
    assert result["pixel_auroc"] > 0.95
    assert [(kind["label"], kind["normal"]) for kind in result["labels"]] == [("good", True), ("crack", False)]
    out = tmp_path / "s.csv"
    assert main(["score", model, str(inspection), "--out", str(out), "--maps", str(maps)]) == 0
    assert len(rows_of(out)) == 16
    from PIL import Image

    aurocs = []
    for k in range(8):
        heat = np.asarray(Image.open(maps / "test" / "crack" / f"{k:03}.png"))
        mask = np.asarray(Image.open(inspection / "ground_truth" / "crack" / f"{k:03}_mask.png"))
        aurocs.append(roc_auc_score(mask.ravel() > 0, heat.ravel()))
    assert np.mean(aurocs) > 0.95
    for folder in (str(inspection), str(inspection / "maps")):
        assert main(["score", model, str(inspection), "--out", str(out), "--maps", folder]) == 1
        assert "expected a folder apart from the data" in capsys.readouterr().err


def test_one_picture_is_scored(inspection, tmp_path):
    out = tmp_path / "s.csv"
    picture = inspection / "test" / "crack" / "000.png"
    assert main(["score", str(inspection.parent / "m"), str(picture), "--out", str(out)]) == 0
    assert [row["sample"] for row in rows_of(out)] == ["000.png"]


def test_a_table_with_an_index_a_name_and_a_reason(tmp_path, capsys):
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(rng.normal(size=(200, 4)), columns=list("abcd"))
    frame.to_csv(tmp_path / "train.csv")
    model, out = str(tmp_path / "m"), tmp_path / "s.csv"
    assert main(["fit", str(tmp_path / "train.csv"), "--out", model, "--quiet"]) == 0
    assert "'Unnamed: 0' counts the rows and is left out" in capsys.readouterr().err
    test = frame.iloc[:3].assign(name=["x", "y", "z"])
    test.loc[1, "c"] = 60.0
    test[["name", "d", "c", "b", "a"]].to_csv(tmp_path / "test.csv", sep=";", decimal=",", index=False)
    assert main(["score", model, str(tmp_path / "test.csv"), "--out", str(out)]) == 0
    error = capsys.readouterr().err
    assert "columns that the model does not know are left out: name" in error
    assert "warning" not in error
    rows = rows_of(out)
    assert (rows[1]["feature"], float(rows[1]["value"]), rows[1]["novel"]) == ("c", 60.0, "1")
    assert float(rows[1]["share"]) > 0.5
    assert abs(float(rows[1]["expected"])) < 30


def test_samples_of_another_kind_are_named(digits, model, tmp_path, capsys):
    for shape, what in (((5, 7), "rows of 7 columns"), ((5, 3, 16, 16), "images of 3x16x16")):
        np.save(tmp_path / "x.npy", np.zeros(shape))
        assert main(["score", model, str(tmp_path / "x.npy"), "--out", str(tmp_path / "s.csv")]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == (
            f"gradext score: {tmp_path}/x.npy: expected what {model} was fit on, images of 8x8, got {what}"
        )


def test_photos_that_no_memory_holds_are_told_with_a_size(tmp_path, capsys):
    from PIL import Image

    for k in range(4):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(
            tmp_path / f"{k}.png"
        )
    arguments = ["fit", str(tmp_path), "--out", str(tmp_path / "m")]
    assert main([*arguments, "--size", "9000x12000"]) == 1
    error = capsys.readouterr().err
    assert "GB of memory, and this machine has" in error
    assert "such as --size 48x64" in error
    assert error.count("\n") == 1


def test_progress_is_told_where_there_is_no_terminal(capfd):
    X = np.random.default_rng(0).random((200, 6))
    NoveltyDetector(verbose=True, epochs=30, hidden_dim=8, random_state=0).fit(X)
    error = capfd.readouterr().err
    lines = error.splitlines()
    assert len(lines) == 11
    assert "epoch 3 of 30" in lines[0]
    assert "s left" in lines[0]
    assert "the best was" in lines[-1]
    NoveltyDetector(epochs=30, hidden_dim=8, random_state=0).fit(X)
    assert capfd.readouterr().err == ""


def test_a_device_that_is_not_there_is_one_line(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((5, 3)))
    for device in ("mps", "xpu", "cuda:9", "nonsense"):
        assert main(["fit", str(tmp_path / "x.npy"), "--out", str(tmp_path / "m"), "--device", device]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert len(error) < 300
