"""Processes killed at random moments, full disks, read-only folders, lost workers: a second run gives the same.

``GRADEXT_KILLS=100 pytest tests/novelty/test_faults.py -m slow`` kills a hundred times each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gradext.cli import main
from gradext.novelty import Checkpoint, NoveltyDetector

pytestmark = [pytest.mark.medium, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")]
ROOT = Path(__file__).parents[2]

# Starts a command again and again and kills it, each time at another moment, until it was killed often enough; then
# lets it end. Nothing may ever lie under its name but the whole result. Prints what happened.
KILLER = """
import json, os, pathlib, random, signal, sys, time
import torch
torch.set_num_threads(1)
from gradext.cli import main
from gradext.novelty import commands, scoring, training  # now, and not in every process

kills, folder, arguments = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
training.Checkpoint.SECONDS, scoring.ROWS_AT_A_TIME = 0.0, 16
seed = random.SystemRandom().getrandbits(32)
draw = random.Random(seed)

def start(out):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main([*arguments, "--out", str(out)]))
    return child

whole, out = folder / "whole" / sys.argv[-1], folder / "killed" / sys.argv[-1]
arguments.pop()
begin = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
seconds = time.monotonic() - begin
expected = whole.read_bytes()
killed = ends = resumed = 0
while killed < kills:
    resumed += out.with_name(out.name + ".partial").exists()
    child = start(out)
    time.sleep(draw.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not out.exists() or out.read_bytes() == expected, seed
    if os.WIFSIGNALED(status):
        killed += 1
    else:  # it was through
        assert status == 0 and out.exists(), (status, seed)
    if out.exists():
        ends += 1
        out.unlink()
        # killed between its last two steps, of which the second is to clear up
        for left in out.parent.iterdir():
            left.unlink()
assert os.waitpid(start(out), 0)[1] == 0
assert out.read_bytes() == expected, seed
assert os.listdir(out.parent) == [out.name], os.listdir(out.parent)
assert os.listdir(whole.parent) == [whole.name]
print(json.dumps({"killed": killed, "resumed": resumed, "came to an end": ends + 1, "seed": seed}))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    X = np.random.default_rng(0).random((700, 16), dtype=np.float32)
    np.save(folder / "x.npy", X)
    np.save(folder / "few.npy", X[:200])
    arguments = ["--hidden-dim", "8", "--latent-dim", "2", "--epochs", "2", "--quiet"]
    assert main(["fit", str(folder / "few.npy"), *arguments, "--out", str(folder / "model")]) == 0
    return folder


def killed(kills: int, folder: Path, *arguments: str) -> dict:
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    command = [sys.executable, "-c", KILLER, str(kills), str(folder), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr
    print(arguments[0], run.stdout.strip())
    found = json.loads(run.stdout)
    assert found["killed"] == kills
    return found


KILLS = int(os.environ.get("GRADEXT_KILLS", "8"))


@pytest.mark.slow
def test_a_training_that_is_killed_comes_to_the_same_model(data, tmp_path):
    options = ["--hidden-dim", "64", "--latent-dim", "2", "--epochs", "300", "--quiet"]
    found = killed(KILLS, tmp_path, "fit", str(data / "few.npy"), *options, "model")
    assert found["resumed"] or KILLS < 20


@pytest.mark.slow
def test_a_scoring_that_is_killed_comes_to_the_same_table(data, tmp_path):
    found = killed(KILLS, tmp_path, "score", str(data / "model"), str(data / "x.npy"), "--quiet", "scores.csv")
    assert found["resumed"] or KILLS < 20


def test_a_training_goes_on_and_does_not_begin_anew(data, tmp_path, monkeypatch):
    """Even where only the last steps are left; and not with other options."""
    from gradext.novelty import persistence, training

    options = ["--hidden-dim", "8", "--latent-dim", "2", "--epochs", "3", "--quiet"]
    command = ["fit", str(data / "few.npy"), "--out", str(tmp_path / "model")]
    assert main([*command, *options]) == 0
    expected = (tmp_path / "model").read_bytes()
    (tmp_path / "model").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(persistence, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*command, *options]) == 130
    assert os.listdir(tmp_path) == ["model.partial"]
    kept = (tmp_path / "model.partial").read_bytes()
    assert main([*command, *options, "--seed", "1"]) == 1, "of other options"
    assert (tmp_path / "model.partial").read_bytes() == kept
    monkeypatch.setattr(training.PlainAdam, "step", lambda *_: pytest.fail("trained anew"))
    assert main([*command, *options]) == 0
    assert (tmp_path / "model").read_bytes() == expected
    assert os.listdir(tmp_path) == ["model"]


def test_a_training_does_not_go_on_with_other_rows(data, tmp_path, monkeypatch, capsys):
    """Of labels that changed meanwhile: the model has seen what would be held out now."""
    from gradext.novelty import persistence

    labels = tmp_path / "labels.txt"
    rows = len(np.load(data / "few.npy"))
    labels.write_text("\n".join(str(k % 2) for k in range(rows)))
    options = ["--hidden-dim", "8", "--latent-dim", "2", "--epochs", "3", "--quiet"]
    command = ["fit", str(data / "few.npy"), "--labels", str(labels), "--normal", "0", "--out", str(tmp_path / "model")]
    with monkeypatch.context() as patch:
        patch.setattr(persistence, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*command, *options]) == 130
    labels.write_text("\n".join(str((k + 1) % 2) for k in range(rows)))
    assert main([*command, *options]) == 1
    assert "other data, options or versions" in capsys.readouterr().err


def test_a_training_does_not_go_on_with_another_seed(tmp_path):
    X, checkpoint = np.random.default_rng(0).random((120, 9)), Checkpoint(tmp_path / "partial", "mine")
    detector = NoveltyDetector(hidden_dim=8, latent_dim=2, epochs=2)
    detector.fit(X, checkpoint=checkpoint)
    assert checkpoint.path.exists()
    with pytest.raises(ValueError, match="other data, options or versions"):
        detector.fit(X, checkpoint=checkpoint)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."])
def test_a_damaged_checkpoint_is_refused(content, data, tmp_path, capsys):
    (tmp_path / "model.partial").write_bytes(content)
    assert main(["fit", str(data / "few.npy"), "--out", str(tmp_path / "model"), "--quiet"]) == 1
    assert "model.partial: damaged; delete it to start anew" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model.partial"]


# --- experiments -----------------------------------------------------------------------------------------------------

RUNS = """
import os, pathlib, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
from experiments import runs

def work(task):
    if task.get("dies") and not pathlib.Path(task["dies"]).exists():
        pathlib.Path(task["dies"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.005)
    return {"square": task["k"] ** 2, "text": "x" * 3000}

if __name__ == "__main__":
    log, kills = pathlib.Path(sys.argv[2]), int(sys.argv[3])
    if kills < 0:  # a worker dies
        tasks = [{"k": k, "dies": sys.argv[4] if k == 20 else ""} for k in range(30)]
        runs.run(log, tasks, work, jobs=2)
        sys.exit()
    runs.provenance = lambda: {}
    draw, killed, before = random.Random(), 0, set()
    tasks = [{"k": k} for k in range(3 * kills)]
    while killed < kills:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            runs.run(log, tasks, work)
            os._exit(0)
        time.sleep(draw.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            log.unlink()
            before = set()
            continue
        killed += 1
        lines = log.read_text().split("\\n")[:-1] if log.exists() else []
        assert before <= set(lines), "a run was lost"
        before = set(lines)
    rows = runs.run(log, tasks, work)
    assert [(row["k"], row["square"]) for row in rows] == [(k, k * k) for k in range(3 * kills)]
    assert before <= set(log.read_text().splitlines())
    assert sorted(row["k"] for row in runs.read(log)) == list(range(3 * kills)), "each once"
    print("killed", killed)
"""


def experiment(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess:
    (tmp_path / "experiment.py").write_text(RUNS)
    command = [sys.executable, "experiment.py", str(ROOT), "log.jsonl", *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_an_experiment_that_is_killed_loses_and_doubles_no_run(tmp_path):
    run = experiment(tmp_path, KILLS)
    assert run.stdout.strip() == f"killed {KILLS}", run.stderr


def test_an_experiments_lost_worker_is_told_and_the_next_run_goes_on(tmp_path):
    run = experiment(tmp_path, -1, tmp_path / "died")
    assert run.returncode == 1
    assert "RuntimeError: a process was lost (killed, or out of memory): " in run.stderr
    assert "run the same command again to go on" in run.stderr
    kept = (tmp_path / "log.jsonl").read_text().splitlines()
    assert 10 < len(kept) < 30
    run = experiment(tmp_path, -1, tmp_path / "died")
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines[: len(kept)] == kept
    assert sorted(json.loads(line)["k"] for line in lines) == list(range(30))


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a file system in memory with the given options, and returns its folder."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        run = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"mount: {run.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


LIMITED = """
import resource, signal, sys
from gradext.cli import main
from gradext.novelty import scoring
scoring.ROWS_AT_A_TIME = 64
if int(sys.argv[1]):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def limited(bytes_a_file: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LIMITED, str(bytes_a_file), *map(str, arguments), "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", ["full disk", "file too large"])
def test_scoring_survives_where_there_is_no_room(kind, data, tmp_path, mounted):
    whole = tmp_path / "whole.csv"
    assert limited(0, "score", data / "model", data / "x.npy", "--out", whole).returncode == 0
    folder = mounted("size=20k") if kind == "full disk" else tmp_path
    out = folder / "s.csv"
    run = limited(20_000 if kind != "full disk" else 0, "score", data / "model", data / "x.npy", "--out", out)
    assert run.returncode == 1, run.stdout
    reason = "No space left on device" if kind == "full disk" else "File too large"
    assert f"gradext score: {out}.partial: could not be written: {reason}" in run.stderr
    assert f"what is done is kept in {out}.partial; run the same command again to go on" in run.stderr
    done = Path(f"{out}.partial").read_text().splitlines()[1:-1]
    assert len(done) > 64
    if kind == "full disk":
        subprocess.run(["mount", "-o", "remount,size=1m", folder], check=True)
    run = limited(0, "score", data / "model", data / "x.npy", "--out", out)
    assert run.returncode == 0, run.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert not Path(f"{out}.partial").exists()


@pytest.mark.parametrize("kind", ["full disk", "file too large"])
def test_fit_says_where_there_is_no_room_and_leaves_the_old_model(kind, data, tmp_path, mounted):
    folder = mounted("size=8k") if kind == "full disk" else tmp_path
    out = folder / "model"
    out.write_bytes(b"old")
    options = ["--hidden-dim", "64", "--latent-dim", "2", "--epochs", "2", "--out", out]
    run = limited(0 if kind == "full disk" else 5000, "fit", data / "few.npy", *options)
    assert run.returncode == 1, run.stdout
    assert "model.partial: could not be written, what was there is unchanged" in run.stderr
    assert "Traceback" not in run.stderr
    assert out.read_bytes() == b"old"
    assert [name for name in os.listdir(folder) if name.startswith(("model", "."))] == ["model"]


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_computed(data, tmp_path, mounted, capsys):
    if os.geteuid() == 0:  # whom no permissions stop
        folder = mounted("ro")
    else:
        folder = tmp_path / "folder"
        folder.mkdir(mode=0o555)
    model, x = str(data / "model"), str(data / "x.npy")
    for command, out in (
        (["fit", x], "model"),
        (["score", model, x], "s.csv"),
        (["report", model, x], "r.html"),
        (["images", "digits"], "images"),
    ):
        begin = time.monotonic()
        assert main([*command, "--out", str(folder / out)]) == 1
        assert time.monotonic() - begin < 5
        error = capsys.readouterr().err
        assert error.startswith(f"gradext {command[0]}: ")
        assert str(folder) in error
        assert "Read-only" in error or "Permission" in error
    assert os.listdir(folder) == []


ORPHANS = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from experiments import runs

def work(task):
    pathlib.Path(sys.argv[2], str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    runs.run(pathlib.Path(sys.argv[2], "log"), [{"k": 0}, {"k": 1}], work, jobs=2)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to look for processes in")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    folder = tmp_path / "seen"
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(ROOT), str(folder)], stderr=subprocess.DEVNULL)
    try:
        workers = wait_for(lambda: [name for name in os.listdir(folder) if name.isdigit()], count=2)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: [pid for pid in workers if not runs_still(pid)], count=2)


def wait_for(found, count, seconds=120):
    end = time.monotonic() + seconds
    while len(now := found()) < count:
        assert time.monotonic() < end, f"{now} after {seconds} s"
        time.sleep(0.1)
    return now


def runs_still(pid):
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
