"""The GPU proof in one command: builds, tests, checks the memory of and times gradext on the GPU of this machine.

    python benchmarks/gpu_check.py --out DIR              stage A: four minutes at most
    python benchmarks/gpu_check.py --out DIR --stage B    the rest, on the same machine or another day
    python benchmarks/gpu_check.py --render DIR           DIR/report.md of DIR/rows.jsonl, on any machine

Needs no network: nvcc, torch, setuptools, pybind11 and pytest are expected to be there. Every step is a process of its
own with a limit of time; what it prints is in DIR/STEP.log and what it found in DIR/rows.jsonl, line by line as it
comes, so that a step that fails, hangs or is cut costs nothing but its own rest. Before a route is timed its result is
compared with fp64. Times are the device's own, by replays of a CUDA graph between two events; `host` is what a call
keeps the host busy, and a call whose host takes longer than its device is reported as bound by the host.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Steps and their seconds. Stage A ends within four minutes of the first second, each at its limit.
STAGES = {
    "A": {"machine": 15, "build": 75, "tests": 55, "memcheck": 35, "main": 55},
    "B": {"all_tests": 180, "races": 60, "language": 90, "models": 60, "routes": 60, "tiles": 90, "blocks": 120},
}
KEY_TESTS = (
    "default or strided_inputs or converts or single_product or drift or test_group or graph_capture_of_a_group "
    "or norms_of_all_layers"
)


# --- the conductor: knows neither torch nor gradext ------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for rows, logs and the report")
    parser.add_argument("--stage", choices=STAGES, default="A")
    parser.add_argument("--steps", help="only these of the stage, by comma")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time for all: the last steps are cut")
    parser.add_argument("--render", type=Path, metavar="DIR", help="only write the report of these rows")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: tries the script, small")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a step in a process of its own
    arguments = parser.parse_args()
    if arguments.render or not arguments.out:
        return render(arguments.render or parser.error("expected --out or --render"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        return run_cases(arguments.child, arguments.device, Rows(arguments.out, arguments.child))
    end, failed = time.time() + 60 * arguments.minutes, False
    steps = STAGES[arguments.stage]
    for name in arguments.steps.split(",") if arguments.steps else steps:
        rows = Rows(arguments.out, name)
        begin, seconds = time.time(), min(steps[name], end - time.time())
        state = "cut: no time left"
        if seconds > 1:
            print(f"{name}: up to {seconds:.0f} s", flush=True)
            state = call(command(name, arguments), seconds, arguments.out / f"{name}.log", environment(arguments))
        rows.write(state=state, took=time.time() - begin)
        failed |= state.startswith("failed")
        print(f"{name}: {state} after {time.time() - begin:.0f} s", flush=True)
        if name == "machine" and state.startswith("failed"):
            print((arguments.out / f"{name}.log").read_text()[-2000:], file=sys.stderr)
            return 2
    return render(arguments.out) or int(failed)


class Rows:
    """The lines of DIR/rows.jsonl that a step writes, each at once."""

    def __init__(self, folder: Path, step: str) -> None:
        self.path, self.step = folder / "rows.jsonl", step

    def write(self, **facts) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": self.step, "at": time.time(), **facts}) + "\n")


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{os.environ['PATH']}{os.pathsep}/usr/local/cuda/bin",
        "GRADEXT_CUDA": "1",
        "GRADEXT_CUDA_ARCHS": "native" if arguments.device == "cuda" else os.environ.get("GRADEXT_CUDA_ARCHS", "90"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # whose pools of workers would outlive a test
        "OMP_NUM_THREADS": "2",
    }


def command(step: str, arguments: argparse.Namespace) -> list[str]:
    python = [sys.executable, "-u"]
    child = [*python, __file__, "--child", step, "--device", arguments.device, "--out", str(arguments.out)]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *workers()]
    cuda = arguments.device == "cuda"
    files = ["test_contract.py", "test_gpu.py"] if cuda else ["test_ops.py"]
    if step == "build":
        return [*python, "setup.py", "build_ext", "--inplace"]
    if step == "tests":
        return [*pytest, *(f"tests/ops/{name}" for name in files), "-k", KEY_TESTS if cuda else "group or table"]
    if step == "all_tests":
        files += ["triton_operators.py"] if cuda else []
        return [*pytest, *(f"tests/ops/{name}" for name in files)]
    tools = {"memcheck": "memcheck", "races": "racecheck"}
    if step in tools and cuda:
        options = ["--tool", tools[step], "--error-exitcode", "9", "--kernel-name", "kernel_substring=gradext"]
        return ["compute-sanitizer", *options, *child]
    return child


def workers() -> list[str]:
    import importlib.util

    return ["-n", "6"] if importlib.util.find_spec("xdist") else []


def call(words: list[str], seconds: float, log: Path, variables: dict[str, str]) -> str:
    """ "done", "cut ..." or "failed ..."; whatever the command started ends with it."""
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return f"failed: {error}"
        try:
            status = process.wait(seconds)
            state = "done" if status == 0 else f"failed: exit status {status}"
        except subprocess.TimeoutExpired:
            state = f"cut after {seconds:.0f} s"
        for end in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, end)
                time.sleep(0.5)
            except ProcessLookupError:
                break
        process.wait()
    return state


# --- in a step's own process -----------------------------------------------------------------------------------------


def run_cases(step: str, device: str, rows: Rows) -> int:
    """Every case of the step: a function that gives one row. One that raises costs itself alone."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(f"expected a GPU that torch can use, but torch {torch.__version__} says there is none")
            return 3
    failed = 0
    from benchmarks.gpu_cases import CASES

    for name, case in CASES[step](device):
        print(name, flush=True)
        try:
            row = case()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        failed += "error" in row or any("wrong" in route for route in row.get("routes", {}).values())
        print(json.dumps(row), flush=True)
        rows.write(case=name, **row)
    return int(failed > 0)


def measured(calls: list[Callable], device: str) -> dict[str, float]:
    """Seconds of a call on the device, those that it keeps the host, and whether the host is what it waits for.

    ``calls`` do the same on different memory, so that none finds its inputs in the cache.
    """
    import torch

    for function in calls:
        function()
    if device == "cpu":
        times = []
        while len(times) < 3 or (sum(times) < 0.02 and len(times) < 100):
            begin = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(time.perf_counter() - begin)
        return {"device": statistics.median(times), "host": statistics.median(times), "calls": len(times)}
    torch.cuda.synchronize()
    hosts = []
    for n in range(20):
        begin = time.perf_counter()
        calls[n % len(calls)]()
        hosts.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    result: dict = {"host": statistics.median(hosts)}
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for function in calls:
                function()
        replay: Callable = graph.replay
    except RuntimeError as error:  # what waits for the host cannot be recorded
        torch.cuda.synchronize()
        result["no_graph"] = str(error)[:120]
        replay = lambda: [function() for function in calls]  # noqa: E731
    replay()
    times, spent = [], 0.0
    while len(times) < 5 or (spent < 0.1 and len(times) < 200):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(calls))
        spent += times[-1] * len(calls)
    result |= {"device": statistics.median(times), "best": min(times), "calls": len(times) * len(calls)}
    result["bound_by_host"] = result["host"] > result["device"]
    return result


# --- the report ------------------------------------------------------------------------------------------------------


def render(folder: Path) -> int:
    """DIR/report.md: the steps, and a table of each step's cases. Needs nothing but the rows."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    machine = next((row for row in reversed(rows) if row["step"] == "machine" and "python" in row), {})
    lines = ["# gradext on a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items() if key not in ("step", "at", "case", "routes")]
    lines += ["", "| step | state | seconds |", "| --- | --- | --- |"]
    lines += [f"| {row['step']} | {row['state']} | {row['took']:.1f} |" for row in rows if "state" in row]
    for step in dict.fromkeys(row["step"] for row in rows):
        cases = [row for row in rows if row["step"] == step and "case" in row and step != "machine"]
        broken = [row for row in cases if "error" in row]
        routes = [row for row in cases if row.get("routes")]
        if not cases:
            continue
        lines += ["", f"## {step}", "", f"{len(cases)} cases, {len(broken)} failed."]
        lines += [f"- {row['case']}: {row['error']}" for row in broken]
        facts = {key for row in cases for key in row} - {"step", "at", "case", "error", "routes", *UNITS, *NOTES}
        lines += [f"- {row['case']}, {key}: {row[key]}" for row in cases for key in sorted(facts) if key in row]
        if routes:
            lines += ["", "| case | route | device, ms | host, ms | GB/s | TFLOP/s | |", "| --- | " + "--- | " * 6]
            lines += [line for row in routes for line in route_lines(row)]
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text)
    print(text)
    return 0


UNITS = {"bytes": 1e9, "flops": 1e12}  # of a case, that a route's rates are told in
NOTES = ("waits", "paste")


def route_lines(row: dict) -> Iterator[str]:
    for name, found in row["routes"].items():
        if "wrong" in found:
            yield f"| {row['case']} | {name} | | | | | {found['wrong']} |"
            continue
        seconds = found["device"]
        notes = [row[key] for key in NOTES if key in row]
        notes += ["bound by the host"] if found.get("bound_by_host") else []
        notes += ["no graph"] if "no_graph" in found else []
        rates = [f"{row[key] / seconds / unit:.1f}" if key in row else "" for key, unit in UNITS.items()]
        yield (
            f"| {row['case']} | {name} | {1e3 * seconds:.4f} | {1e3 * found['host']:.4f} | {rates[0]} | {rates[1]} | "
            f"{', '.join(notes)} |"
        )


if __name__ == "__main__":
    sys.exit(main())
