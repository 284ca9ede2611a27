"""The GPU proof's own machinery, without a GPU: what is left of a step that fails, hangs or is cut."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from . import gpu_cases, gpu_check


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_stage_a_takes_four_minutes_and_the_runner_500_lines():
    assert sum(gpu_check.STAGES["A"].values()) <= 240
    assert len(Path(gpu_check.__file__).read_text().splitlines()) <= 500
    steps = {step for stage in gpu_check.STAGES.values() for step in stage}
    assert set(gpu_cases.CASES) <= steps


def test_twelve_main_cases_and_none_larger_than_8_gb():
    cases = [*gpu_cases.main_cases("cuda"), *gpu_cases.language_cases("cuda")]
    assert len(list(gpu_cases.main_cases("cuda"))) == 12
    for name, case in cases:
        if case.func is gpu_cases.outer_case:
            B, _, O, I, dtype, _ = case.args
            assert B * O * I * dtype.itemsize <= gpu_cases.LARGEST, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_is_what_it_says(tmp_path):
    command = [sys.executable, gpu_check.__file__, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"expected a GPU that torch can use, but torch {torch.__version__} says there is none" in done.stderr
    assert [row["step"] for row in rows(tmp_path)] == ["machine"]


def test_a_step_on_the_cpu_gives_rows_and_a_report(tmp_path):
    """The whole way: a child's cases, checked and timed, its rows, its log, and the report of them elsewhere."""
    command = [
        sys.executable,
        gpu_check.__file__,
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--steps",
        "machine,memcheck",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path)
    assert {row["state"] for row in found if "state" in row} == {"done"}
    cases = [row for row in found if row["step"] == "memcheck" and "case" in row]
    assert len(cases) > 20
    assert not [row for row in cases if "error" in row]
    assert "| memcheck | done |" in (tmp_path / "report.md").read_text()
    code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = ['--render', {str(tmp_path)!r}]; "
    code += f"sys.path.insert(0, {str(gpu_check.ROOT)!r}); from benchmarks import gpu_check; sys.exit(gpu_check.main())"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout in done.stdout + "\n"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_step_that_is_cut_says_so_and_leaves_nothing_running(tmp_path):
    child = "import time; time.sleep(3600)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    state = gpu_check.call([sys.executable, "-u", "-c", code], 5, tmp_path / "log", {})
    assert state == "cut after 5 s"
    pid = int((tmp_path / "log").read_text().splitlines()[0])
    deadline = time.time() + 60
    while is_running(pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)
    assert gpu_check.call([sys.executable, "-c", "exit(7)"], 60, tmp_path / "log", {}) == "failed: exit status 7"
    assert gpu_check.call(["/nowhere"], 60, tmp_path / "log", {}).startswith("failed: ")


def test_a_case_that_fails_costs_itself_alone(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("as a launch that fails")

    wrong = {"routes": {"cuda": {"wrong": "off by 1"}}}
    cases = [("a", dict), ("b", broken), ("c", lambda: wrong), ("d", dict)]
    monkeypatch.setitem(gpu_cases.CASES, "main", lambda device: cases)
    monkeypatch.setattr("benchmarks.gpu_cases", gpu_cases, raising=False)
    monkeypatch.setitem(sys.modules, "benchmarks.gpu_cases", gpu_cases)
    assert gpu_check.run_cases("main", "cpu", gpu_check.Rows(tmp_path, "main")) == 1
    found = rows(tmp_path)
    assert [row["case"] for row in found] == ["a", "b", "c", "d"]
    assert found[1]["error"] == "RuntimeError: as a launch that fails"
    assert gpu_check.render(tmp_path) == 0
    report = (tmp_path / "report.md").read_text()
    assert "4 cases, 1 failed" in report
    assert "off by 1" in report


def test_a_wrong_result_is_not_timed():
    exact = torch.ones(4, dtype=torch.float64)
    routes = {
        "right": lambda: torch.ones(4),
        "wrong": lambda: torch.full((4,), 1.1),
        "nan": lambda: torch.full((4,), torch.nan),
    }
    found = gpu_cases.timed(routes, [()], exact, 1e-5, "cpu")["routes"]
    assert found["right"]["device"] > 0
    assert found["wrong"]["wrong"].startswith("off by 1.0e-01")
    assert "wrong" in found["nan"]


def test_steps_and_time_are_the_callers(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu_check, "call", lambda words, seconds, log, variables: ran.append(seconds) or "done")
    options = ["--out", str(tmp_path), "--stage", "B", "--steps", "tiles,language"]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *options, "--minutes", "1"])
    assert gpu_check.main() == 0
    assert [round(seconds) for seconds in ran] == [60, 60]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *options, "--minutes", "0"])
    assert gpu_check.main() == 0
    assert [row["state"] for row in rows(tmp_path)][-2:] == ["cut: no time left"] * 2


def test_commands_are_those_of_the_machine(tmp_path):
    arguments = argparse.Namespace(device="cuda", out=tmp_path)
    assert gpu_check.command("memcheck", arguments)[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert gpu_check.environment(arguments)["GRADEXT_CUDA_ARCHS"] == "native"
    assert gpu_check.environment(arguments)["TORCHINDUCTOR_COMPILE_THREADS"] == "1"


def test_key_tests_are_there():
    texts = [(gpu_check.ROOT / "tests/ops" / name).read_text() for name in ("test_contract.py", "test_gpu.py")]
    names = re.findall(r"^def (test_\w+)", "\n".join(texts), re.MULTILINE)
    for word in gpu_check.KEY_TESTS.split(" or "):
        assert any(word in name for name in names), word


def test_nothing_but_that_machines_packages_is_imported():
    """By the tests and the cases: it has torch, Triton, NumPy, pytest and what builds, and no network."""
    missing = (
        "sklearn",
        "scipy",
        "hypothesis",
        "tqdm",
        "matplotlib",
        "PIL",
        "safetensors",
        "pandas",
        "pytest_benchmark",
    )
    names = ("test_contract.py", "test_gpu.py", "triton_operators.py", "test_ops.py")
    files = [str(gpu_check.ROOT / "tests/ops" / name) for name in names]
    code = (
        f"import sys; sys.modules |= dict.fromkeys({missing!r}); sys.path.insert(0, {str(gpu_check.ROOT)!r}); "
        "import benchmarks.gpu_cases, pytest; [list(make('cpu')) for make in benchmarks.gpu_cases.CASES.values()]; "
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--collect-only', *{files!r}]))"
    )
    variables = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
