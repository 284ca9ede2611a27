"""The GPU proof's own machinery, without a GPU: what is left of a stage that was stopped or that failed."""

import argparse
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from gradext.backends import reference

from . import gpu_check


@pytest.fixture
def conductor(tmp_path):
    arguments = argparse.Namespace(out=tmp_path, minutes=1, commit="0", device="cpu", skip_tests=False)
    return gpu_check.Conductor(arguments, tmp_path)


def test_stopped_tests_keep_their_results(conductor, tmp_path, monkeypatch):
    """One that hangs at the end of the time hides neither the failure before it nor how many passed."""
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    for name in ("test_native.py", "test_ops.py", "triton_operators.py"):
        (tmp_path / "tests" / name).write_text("def test_right(): pass\n")
    (tmp_path / "tests" / "test_gpu.py").write_text("def test_wrong(): assert 2 + 2 == 5\n")
    (tmp_path / "tests" / "triton_operators.py").write_text("import time\ndef test_hang(): time.sleep(3600)\n")
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background jobs
    try:
        for seconds in 5, 20, 80:  # until a busy machine comes to the test that hangs
            stage = conductor.tests(time.time() + gpu_check.GRACE_SECONDS + seconds)
            found = conductor.results["tests"]
            if found.get("tests", 0) >= 3:
                break
    finally:
        signal.signal(signal.SIGINT, former)
    assert stage["status"] == "failed"
    assert found["tests"] >= 3
    assert found["failures"] == 1
    [(name, text)] = found["failed"].items()
    assert name.endswith("test_gpu::test_wrong")
    assert "assert (2 + 2) == 5" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_is_what_it_says(tmp_path):
    command = [sys.executable, gpu_check.__file__, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu_check: expected a GPU that torch can use, but torch {torch.__version__} says: ")
    assert list(json.loads((tmp_path / "results.json").read_text())["stages"]) == ["machine"]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_what_a_stopped_command_started_ends_with_it(conductor, tmp_path):
    child = "import time; time.sleep(3600)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    command = [sys.executable, "-u", "-c", code]
    assert conductor.call(command, time.time() + 5, tmp_path / "log") is None
    pid = int((tmp_path / "log").read_text().splitlines()[0])
    deadline = time.time() + 60
    while is_running(pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


def test_a_stage_goes_on_behind_a_fault(conductor, monkeypatch):
    class Fault(BaseException):
        """Ends the process."""

    ran = []

    def case(name):
        ran.append(name)
        if ran == ["a", "b", "c"]:
            raise Fault
        return {"routes": {}}

    def child(command, *_, **__):
        try:
            return gpu_check.run_cases("outer", "cpu", Path(command[command.index("--out") + 1]), float("inf"))
        except Fault:
            return 1

    monkeypatch.setitem(gpu_check.CASES, "outer", lambda device: [(name, partial(case, name)) for name in "abcd"])
    monkeypatch.setattr(conductor, "call", child)
    stage = conductor.measure("outer", time.time() + 60)
    assert stage["status"] == "failed"
    assert "exit status 1" in stage["error"]
    assert stage["cut"] == []
    assert ran == ["a", "b", "c", "c", "d"]
    assert [row["case"] for row in conductor.results["outer"]] == ["a", "b", "c", "d"]


def test_a_stage_that_hangs_tells_what_failed_before(conductor, tmp_path, monkeypatch):
    rows = ({"planned": ["a", "b"]}, {"case": "a", "routes": {"cuda": {"wrong": "differs"}}})
    (tmp_path / "outer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(conductor, "call", lambda *_, **__: None)
    stage = conductor.measure("outer", time.time() + 60)
    assert stage["status"] == "failed"
    assert "differs" in stage["error"]
    assert stage["cut"] == ["b"]


def test_a_stage_that_fails_at_once_ends(conductor, monkeypatch):
    monkeypatch.setattr(conductor, "call", lambda *_, **__: 1)
    assert conductor.measure("outer", time.time() + 60)["status"] == "failed"


def test_sanitized_program_ends_by_itself(monkeypatch, capsys):
    """compute-sanitizer has no verdict of a program that was killed."""
    monkeypatch.setattr(gpu_check, "kernel_backends", lambda device: ["reference"])
    assert gpu_check.sanitize_driver("cpu", deadline=0) == 0
    assert f"{gpu_check.CUT} before reference (3, None, 33, 129) fp32, case 1 of 24" in capsys.readouterr().out


def test_sanitizing_nothing_is_no_success(monkeypatch):
    """As where a tool keeps torch from seeing the GPU."""
    monkeypatch.setattr(gpu_check, "kernel_backends", lambda device: [])
    assert gpu_check.sanitize_driver("cpu", deadline=float("inf")) != 0


@pytest.mark.parametrize(("factor", "route"), [(1 - 3e-6, "seconds"), (1 - 3e-5, "wrong")])
def test_norms_on_tensor_cores_may_be_cut_off(factor, route, monkeypatch):
    """They lose up to 3e-6 here: sums of 784 and 400 products, cut off at every eighth or sixteenth."""
    exact = reference.sq_norm
    monkeypatch.setattr(reference, "sq_norm", lambda d, a: (exact(d.double(), a.double()) * factor).float())
    monkeypatch.setattr(gpu_check, "kernel_seconds", lambda *_: 1.0)
    row = gpu_check.position_case("sq_norm", 2, 4, 784, 400, torch.bfloat16, "cpu")
    assert route in row["routes"]["reference"]
