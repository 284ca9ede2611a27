"""The GPU proof in one command: builds, tests, sanitizes and measures gradext on the GPU of this machine.

    python benchmarks/gpu_check.py --out DIR [--minutes 9] [--skip-tests] [--commit SHA]
    python benchmarks/gpu_check.py --out DIR --render DIR/results.json      (draws again, without a GPU)

Writes DIR/results.json (all that was measured), report.md, outer.png and speedup.png. Needs no network: nvcc, torch,
setuptools, pybind11, pytest and matplotlib are expected to be there.

Every stage is a process of its own with a share of the time: a fault costs the case that it came in, a hang its stage,
and what was measured so far is kept. No time is reported of a result that has not passed its check in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Name -> its share of the time that is left; what one leaves over is shared by the stages behind it.
STAGES = {
    "machine": 60,  # the first to load torch, from a cold disk
    "build": 120,
    "tests": 180,  # some 1,200 kernels of Triton are compiled in it
    "sanitizer": 80,
    "ceilings": 20,
    "outer": 90,
    "calls": 90,
    "positions": 25,
    "fusion": 30,
}
REPORT_SECONDS = 15  # kept back for the report and the pictures
GRACE_SECONDS = 15  # between an interruption and a kill; pytest-xdist waits 10 for its workers
Case = tuple[str, Callable[[], dict]]  # a name for the log, and what gives one row of the results


# --- the conductor: knows neither torch nor gradext ------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--skip-tests", action="store_true", help="leave out the tests and compute-sanitizer")
    parser.add_argument("--commit", help="the commit that is measured; default: git's answer")
    parser.add_argument("--render", type=Path, metavar="JSON", help="only write the report of these results")
    # For the conductor's own children, and to try the whole on small sizes without a GPU.
    parser.add_argument("--stage", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--sanitize-driver", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=math.inf, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sanitize_driver:
        return sanitize_driver(arguments.device, arguments.deadline)
    if arguments.stage:
        return run_cases(arguments.stage, arguments.device, arguments.out, arguments.deadline)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.render:
        render(json.loads(arguments.render.read_text()), arguments.out)
        return 0
    with tempfile.TemporaryDirectory(prefix="gradext-gpu-") as work:
        return Conductor(arguments, Path(work)).run()


class Conductor:
    """Runs the stages one after the other, each within its share of the time, and writes what each gave at once."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work, self.site = arguments, work, work / "site"
        self.start = time.time()
        self.end = self.start + 60 * arguments.minutes - REPORT_SECONDS
        # The package is the one built here, for every child: first on the path, and never hidden by the sources.
        path = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
        self.environment["PATH"] += os.pathsep + "/usr/local/cuda/bin"
        self.results: dict = {
            "command": " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "commit": arguments.commit or commit(),
            "stages": {},
        }

    def run(self) -> int:
        for name in STAGES:
            self.stage(name)
            if missing := [row["no_gpu"] for row in self.results.get("machine", []) if "no_gpu" in row]:
                print(f"gpu_check: expected a GPU that torch can use, but {missing[0]}", file=sys.stderr)
                return 2
        try:
            render(self.results, self.arguments.out)
        except Exception:
            self.results["stages"]["report"] = {"status": "failed", "error": traceback.format_exc()}
            traceback.print_exc()
        self.write()
        states = {name: stage["status"] for name, stage in self.results["stages"].items()}
        self.log(", ".join(f"{name} {status}" for name, status in states.items()))
        return int("failed" in states.values())

    def stage(self, name: str) -> None:
        stage = self.results["stages"][name] = {"status": "ok"}
        names = list(STAGES)
        shares = sum(STAGES[other] for other in names[names.index(name) :])
        seconds = (self.end - time.time()) * STAGES[name] / shares
        if self.arguments.skip_tests and name in ("tests", "sanitizer"):
            stage["status"] = "skipped"
        elif seconds < 3:
            stage |= {"status": "cut", "error": "no time left"}
        else:
            self.log(f"{name}: up to {seconds:.0f} s")
            began = time.time()
            try:
                function = getattr(self, name, partial(self.measure, name))
                stage |= function(began + seconds)
            except Exception:
                stage |= {"status": "failed", "error": traceback.format_exc()}
            stage["seconds"] = time.time() - began
        self.log(f"{name}: {stage['status']}")
        if stage.get("error"):
            print(stage["error"], flush=True)
        self.write()

    def log(self, text: str) -> None:
        print(f"[{time.time() - self.start:6.1f} s] {text}", flush=True)

    def write(self) -> None:
        (self.arguments.out / "results.json").write_text(json.dumps(self.results, indent=1))

    def call(self, command: Sequence[str], deadline: float, log: Path, **options) -> int | None:
        """Run a command to its end, or to the deadline; its exit status, or None where it was stopped."""
        with log.open("w") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT, "env": self.environment, "cwd": self.work} | options
            if streams["stderr"] is None:
                streams["stderr"] = file
            # A shell's background jobs ignore interruptions, and so would what they start.
            heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            process = subprocess.Popen(command, start_new_session=True, preexec_fn=heed, **streams)
            try:
                return process.wait(max(1.0, deadline - time.time()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # upon which pytest still tells what it found
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):  # its children, whether it has ended or not
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def build(self, deadline: float) -> dict:
        """The package and its extension into a folder of their own, by setuptools alone: no pip, no isolation."""
        log, began = self.work / "build.log", time.time()
        folders = ["--build-base", str(self.work / "build"), "--build-lib", str(self.site)]
        self.site.mkdir()
        cuda = {"GRADEXT_CUDA": "1", "GRADEXT_CUDA_ARCHS": "native"}
        code = self.call(
            [sys.executable, "setup.py", "egg_info", "--egg-base", str(self.site), "build", *folders],
            deadline,
            log,
            cwd=ROOT,
            env={**self.environment, **(cuda if self.arguments.device == "cuda" else {"GRADEXT_CUDA": "0"})},
        )
        self.results["build"] = {"seconds": time.time() - began}
        if code == 0:
            return {"status": "ok"}
        shutil.rmtree(self.site / "gradext", ignore_errors=True)
        # The stages that follow still run what needs no compiled module.
        self.environment["PYTHONPATH"] = str(ROOT)
        reason = "stopped at its time limit" if code is None else f"exit status {code}"
        return {"status": "failed", "error": f"{reason}\n{tail(log)}"}

    def tests(self, deadline: float) -> dict:
        log, junit = self.work / "tests.log", self.work / "tests.xml"
        files = ("test_gpu.py", "test_native.py", "test_ops.py", "triton_operators.py")
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        command += ["-p", "no:cacheprovider", "--tb=short", "--durations", "8", f"--junitxml={junit}"]
        if importlib.util.find_spec("xdist"):  # most of the time goes into compiling Triton's kernels
            command += ["-n", str(min(16, os.cpu_count() or 1))]
        command += [str(ROOT / "tests" / file) for file in files]
        code = self.call(command, deadline - GRACE_SECONDS, log)
        found = self.results["tests"] = {"files": files, "tail": tail(log, 40)}
        if junit.exists():
            suites = list(xml.etree.ElementTree.parse(junit).getroot().iter("testsuite"))
            for key in ("tests", "failures", "errors", "skipped"):
                found[key] = sum(int(suite.get(key, 0)) for suite in suites)
            found["failed"] = {  # in the order that they came: after a fault, the others of that process fail too
                f"{case.get('classname')}::{case.get('name')}": (problem.text or "")[-2000:]
                for case in itertools.chain.from_iterable(suite.iter("testcase") for suite in suites)
                for problem in (*case.iter("failure"), *case.iter("error"))
            }
        if code is None:
            status = "cut" if found.get("failed") == {} else "failed"  # a hang leaves no result at all
            return {"status": status, "error": f"stopped at its time limit\n{tail(log)}"}
        return {"status": "ok"} if code == 0 else {"status": "failed", "error": tail(log, 80)}

    def sanitizer(self, deadline: float) -> dict:
        """The three tools at once: none of them measures time, and most of theirs goes into loading torch."""
        tool = shutil.which("compute-sanitizer", path=self.environment["PATH"])
        if tool is None:
            self.results["sanitizer"] = {}
            return {"status": "skipped", "error": "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"}
        driver = [sys.executable, str(Path(__file__).resolve()), "--out", str(self.work), "--sanitize-driver"]
        driver += ["--device", self.arguments.device]
        driver += ["--deadline", str(deadline - GRACE_SECONDS)]  # only a tool whose program ends has a verdict
        environment = {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that bounds are those of tensors
        running = {}
        for name in ("memcheck", "racecheck", "initcheck"):
            log = self.work / f"{name}.log"
            command = [tool, "--tool", name, "--error-exitcode", "9", *driver]
            with log.open("w") as file:
                running[name] = (
                    log,
                    subprocess.Popen(
                        command, stdout=file, stderr=file, env=environment, cwd=self.work, start_new_session=True
                    ),
                )
        found = self.results["sanitizer"] = {}
        for name, (log, process) in running.items():
            try:
                code = process.wait(max(1.0, deadline - time.time()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait() and None
            text = log.read_text(errors="replace")
            summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
            found[name] = {"exit_status": code, "summary": summary[-1] if summary else "none", "tail": tail(log)}
            found[name]["cut"] = (re.findall(rf"^{CUT} .*", text, re.MULTILINE) or [None])[-1]
        # Cut is not failed: no verdict is neither.
        bad = {name: f for name, f in found.items() if f["exit_status"] not in (0, None)}
        if bad:
            return {"status": "failed", "error": "\n\n".join(f"{name}\n{f['tail']}" for name, f in bad.items())}
        cut = [f"{name} {f['cut'] or ''}" for name, f in found.items() if f["exit_status"] is None or f["cut"]]
        return {"status": "cut", "error": f"stopped at the time limit: {', '.join(cut)}"} if cut else {"status": "ok"}

    def measure(self, name: str, deadline: float) -> dict:
        """The cases of one stage in a child, which writes a line of JSON for each."""
        rows, errors = self.work / f"{name}.jsonl", self.work / f"{name}.log"
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(rows), "--stage", name]
        command += ["--device", self.arguments.device, "--deadline", str(deadline)]
        lines: list[dict] = []
        faults: list[str] = []
        while True:
            # A child stops by itself; more time only for the case that it is at.
            code = self.call(command, deadline + 10, errors, stdout=None, stderr=None)
            before, lines = len(lines), read_rows(rows)
            if code in (0, None):
                break
            # After a fault nothing works in a process: another one goes on behind the last row.
            faults.append(f"exit status {code}\n{tail(errors)}")
            if len(lines) == before:
                break
        planned = lines[0]["planned"] if lines else []
        self.results[name] = lines[1:]
        done = {row["case"] for row in self.results[name]}
        cut = [case for case in planned if case not in done]
        failed = [line for line in self.results[name] if "error" in line]
        routes = [route for line in self.results[name] for route in line.get("routes", {}).values()]
        failed += [route for route in routes if "wrong" in route or "failed" in route]
        stopped = [f"stopped {time.time() - self.start:.0f} s after the start"] if code is None else []
        if faults or failed:
            first = next((row[key] for row in failed for key in ("error", "wrong", "failed") if key in row), "")
            error = "\n".join([*stopped, f"{len(failed)} failures, the first: {first}", *(faults or [tail(errors)])])
            return {"status": "failed", "error": error, "cut": cut}
        if stopped:
            return {"status": "cut", "error": stopped[0], "cut": cut}
        return {"status": "cut", "error": f"no time for {len(cut)} cases", "cut": cut} if cut else {"status": "ok"}


def commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def read_rows(rows: Path) -> list[dict]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


# --- in a stage's own process ----------------------------------------------------------------------------------------


def run_cases(stage: str, device: str, rows: Path, deadline: float) -> int:
    """Run a stage's cases until the deadline, but for those that have their row; the first row holds all names."""
    import torch

    start, cases, found = time.time(), dict(CASES[stage](device)), read_rows(rows)
    done = {row["case"] for row in found[1:]}
    with rows.open("a") as file:

        def write(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        if not found:
            write({"planned": list(cases)})
        for name, case in cases.items():
            if name in done:
                continue
            if time.time() > deadline:
                break
            try:
                row = {"case": name, **case()}
            except Exception:
                row = {"case": name, "error": traceback.format_exc()}
            write(row)
            print(f"  [{time.time() - start:5.1f} s] {name}: {brief(row)}", flush=True)
            if device == "cuda" and "no_gpu" not in row:
                torch.cuda.synchronize()  # after a fault nothing works in this process: end it here
                torch.cuda.empty_cache()
    return 0


def brief(row: dict) -> str:
    if "error" in row:
        return row["error"].splitlines()[-1]
    found = (f"{name} {route_text(result, row)}" for name, result in row.get("routes", {}).items())
    return ", ".join(found) or str({key: value for key, value in row.items() if key != "case"})


def route_text(result: dict, row: dict) -> str:
    if "seconds" not in result:
        return next(f"{key}: {result[key]}" for key in ("wrong", "failed", "skipped") if key in result)
    text = duration(result["seconds"])
    return f"{text} ({row['bytes'] / result['seconds'] / 1e9:.0f} GB/s)" if "bytes" in row else text


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.2f} µs"


def seconds_per_call(calls: Sequence[Callable], device: str, target: float = 0.05) -> float:
    """Median over blocks of the time of one call; the calls are alike, on other buffers, and run in turn.

    Blocks lie between CUDA events and are queued without waiting; at least 5 of them, about ``target`` in all.
    """
    import torch

    on_gpu = device == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    for call in calls:
        call()
    synchronize()
    began = time.perf_counter()
    for call in calls:
        call()
    synchronize()
    once = max(time.perf_counter() - began, 1e-7)
    rounds = max(1, round(target / 20 / once))  # in a block
    blocks = min(50, max(5, round(target / (rounds * once))))

    def block() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    times = []
    if on_gpu:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(blocks)]
        for begin, end in events:
            begin.record()
            block()
            end.record()
        synchronize()
        times = [begin.elapsed_time(end) / 1e3 for begin, end in events]
    else:
        for _ in range(blocks):
            began = time.perf_counter()
            block()
            times.append(time.perf_counter() - began)
    return statistics.median(times) / (rounds * len(calls))


def captured(calls: Sequence[Callable], device: str) -> Callable:
    """One call that replays them all as a CUDA graph, so that launches cost the host nothing."""
    import torch

    if device != "cuda":
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels and workspaces must exist before the capture
        for call in {id(call): call for call in calls}.values():
            call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a graph's own memory cannot come from blocks that others left
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # as torch.cuda.graph does, less its garbage collection at every capture
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def kernel_seconds(calls: Sequence[Callable], device: str) -> float:
    """The time of one call on the device alone: where a launch counts, at least 32 of them in one graph."""
    if seconds_per_call(calls, device, 0.01) > 200e-6:  # the host is ahead, and launches cost nothing
        return seconds_per_call(calls, device)
    calls = list(calls) * math.ceil(32 / len(calls))
    return seconds_per_call([captured(calls, device)], device) / len(calls)


def checked(call: Callable, check: Callable[[object], str | None], clock: Callable[[], float]) -> dict:
    """{"seconds"} of a call whose result passes the check, {"wrong"} of one whose result does not."""
    import torch

    try:
        problem = check(call())
        return {"wrong": problem} if problem else {"seconds": clock()}
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:
        return {"failed": first_line(error)}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def half_of_free_memory(device: str) -> int:
    import torch

    if device != "cuda":
        return 1 << 28
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] // 2


def kernel_backends(device: str) -> list[str]:
    from gradext.backends import BACKENDS

    return [name for name in (("cuda", "triton") if device == "cuda" else ("cpu",)) if not BACKENDS[name].available()]


def type_name(dtype) -> str:
    return {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}[str(dtype)[6:]]


# --- machine and ceilings --------------------------------------------------------------------------------------------


def machine_cases(device: str) -> Iterator[Case]:
    yield "machine", partial(machine, device)


def machine(device: str) -> dict:
    import torch

    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": first_match(r"release ([\d.]+)", "nvcc", "--version"),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device == "cuda":
        try:
            properties = torch.cuda.get_device_properties(0)
        except (AssertionError, RuntimeError) as error:  # the former from builds for the CPU
            return {**found, "no_gpu": f"torch {torch.__version__} says: {error}"}
        query = "name,driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,memory.total,power.limit"
        answer = first_match(r"(.*)", "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0")
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "capability": f"{properties.major}.{properties.minor}",
            **(dict(zip(query.split(","), answer.split(", "), strict=False)) if answer else {}),
        }
    return found


def first_match(pattern: str, *command: str) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    match = re.search(pattern, output)
    return match[1].strip() if match else None


def ceiling_cases(device: str) -> Iterator[Case]:
    import torch

    size = 4 << 30 if device == "cuda" else 1 << 24
    n = 8192 if device == "cuda" else 256
    for name in ("fill_", "zero_", "copy_"):
        yield name, partial(memory_ceiling, name, size, device)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"matmul {type_name(dtype)}", partial(matmul_ceiling, dtype, n, device)


def memory_ceiling(name: str, size: int, device: str) -> dict:
    """GB/s: bytes written, for a copy bytes read too; of random data, as zeros may be faster."""
    import torch

    to = torch.empty(size // 4, device=device)
    arguments = {"fill_": (0.7,), "zero_": (), "copy_": (torch.rand(size // 4, device=device),)}[name]
    call = partial(getattr(to, name), *arguments)
    moved = 2 * size if name == "copy_" else size
    return {"bytes": moved, "routes": {name: {"seconds": seconds_per_call([call], device, 0.2)}}}


def matmul_ceiling(dtype, n: int, device: str) -> dict:
    import torch

    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = seconds_per_call([partial(torch.mm, a, b, out=out)], device, 0.3)
    return {"flops": 2 * n**3, "routes": {"mm": {"seconds": seconds}}}


# --- the outer product -----------------------------------------------------------------------------------------------


def outer_cases(device: str) -> Iterator[Case]:
    """The sizes of the MNIST VAE first, then odd and wide ones; so ordered that a cut costs the least."""
    import torch

    on_gpu = device == "cuda"
    shapes = [(784, 400), (400, 20), (3072, 1024), (783, 399), (401, 21)] if on_gpu else [(78, 40), (41, 21)]
    batches = (1024, 16384, 1, 64, 4096, 256, 16, 4) if on_gpu else (16, 1)
    compiled = {(O, I, 1024 if on_gpu else 16) for O, I in shapes[:2]}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for B, (O, I) in itertools.product(batches, shapes):
            case = partial(outer_case, B, O, I, dtype, device)
            yield f"{type_name(dtype)} [{B}, {O}, {I}]", case
    for dtype, (O, I, B) in itertools.product((torch.float32, torch.bfloat16), sorted(compiled, reverse=True)):
        yield f"compiled {type_name(dtype)} [{B}, {O}, {I}]", partial(compiled_outer, B, O, I, dtype, device)
    O, I = shapes[0]
    yield f"fp64 [{batches[0]}, {O}, {I}]", partial(outer_case, batches[0], O, I, torch.float64, device)


def outer_buffers(B: int, O: int, I: int, dtype, device: str) -> list[tuple]:
    """(delta, activation, out) as often as passes an L2 cache of 60 MB four times over, but at most 256 times."""
    import torch

    size = B * O * I * dtype.itemsize
    count = max(1, min(256, (256 << 20) // size)) if device == "cuda" else 2
    generator = torch.Generator(device).manual_seed(B + O + I)
    draw = partial(torch.randn, generator=generator, device=device, dtype=torch.float32)
    deltas, activations = draw(count, B, O).to(dtype), draw(count, B, I).to(dtype)
    outs = torch.empty(count, B, O, I, device=device, dtype=dtype)
    return list(zip(deltas, activations, outs, strict=True))


def outer_problem(delta, activation, result) -> str | None:
    """A product of two numbers is exact in fp64 (or is torch's own), and rounded once: nothing else is right."""
    step = max(1, (1 << 28) // max(1, 8 * result[0].numel()))
    for b in range(0, len(result), step):
        exact = (delta[b : b + step].double()[:, :, None] * activation[b : b + step].double()[:, None]).to(result.dtype)
        if not result[b : b + step].equal(exact):
            error = (result[b : b + step].double() - exact.double()).abs().max().item()
            return f"differs from the rounded product by up to {error:.3g} in samples {b} to {b + step}"
    return None


def outer_case(B: int, O: int, I: int, dtype, device: str) -> dict:
    """All on the device's own time, by graph replay. A result of its own lies in memory that the allocator reuses."""
    import torch

    from gradext import ops

    size = B * O * I * dtype.itemsize
    row = {"B": B, "O": O, "I": I, "type": type_name(dtype), "bytes": size, "routes": {}}
    if size > half_of_free_memory(device):
        return row | {"routes": {"all": {"skipped": "does not fit into memory"}}}
    buffers = outer_buffers(B, O, I, dtype, device)
    row["buffers"] = len(buffers)
    into = {f"{name}, out=": partial(ops.outer, backend=name) for name in kernel_backends(device)}
    into["torch.mul, out="] = lambda d, a, out: torch.mul(d[:, :, None], a[:, None], out=out)
    fresh = {name: partial(ops.outer, backend=name) for name in kernel_backends(device)}
    fresh["torch.mul"] = lambda d, a: d[:, :, None] * a[:, None]
    for name, function in into.items():
        calls = [partial(function, d, a, out=out) for d, a, out in buffers]
        buffers[-1][2].fill_(math.nan)  # no element may be left unwritten, nor come from the route before
        row["routes"][name] = checked(
            calls[-1], partial(outer_problem, *buffers[-1][:2]), partial(kernel_seconds, calls, device)
        )
    for name in ("fill_", "zero_"):
        calls = [partial(getattr(out, name), *((0.7,) if name == "fill_" else ())) for _, _, out in buffers]
        row["routes"][name] = {"seconds": kernel_seconds(calls, device)}
    inputs = [buffer[:2] for buffer in buffers]
    del buffers, calls
    for name, function in fresh.items():
        calls = [partial(function, d, a) for d, a in inputs]
        row["routes"][name] = checked(
            calls[-1], partial(outer_problem, *inputs[-1]), partial(kernel_seconds, calls, device)
        )
    return row


def compiled_outer(B: int, O: int, I: int, dtype, device: str) -> dict:
    """torch.compile of the same product, in Inductor's kernel, on the buffers' inputs."""
    import torch

    inputs = [buffer[:2] for buffer in outer_buffers(B, O, I, dtype, device)]
    product = torch.compile(lambda d, a: d[:, :, None] * a[:, None])
    calls = [partial(product, d, a) for d, a in inputs]
    clock = partial(kernel_seconds, calls, device)
    result = checked(calls[-1], partial(outer_problem, *inputs[-1]), clock)
    size = B * O * I * dtype.itemsize
    return {
        "B": B, "O": O, "I": I, "type": type_name(dtype), "bytes": size, "routes": {"torch.compile": result},
    }  # fmt: skip


# --- whole calls -----------------------------------------------------------------------------------------------------

MODELS = {"MNIST VAE 784-400-20": (784, 400, 20), "wide VAE 3072-1024-128": (3072, 1024, 128)}
QUANTITIES = ("norm", "cosine", "linear, H = 64", "Gram")
LOOP_SAMPLES = 256  # of the single-sample loop, whose time is proportional to them


def call_cases(device: str) -> Iterator[Case]:
    on_gpu = device == "cuda"
    for name, B in itertools.product(MODELS, (1024, 256, 4096, 1, 64, 16384, 8, 16) if on_gpu else (8, 1)):
        sizes = MODELS[name] if on_gpu else tuple(n // 16 for n in MODELS[name])
        yield f"{name}, B = {B}, gradients", lambda name=name, sizes=sizes, B=B: {
            "model": name, "B": B, "quantity": "gradients", **Calls(sizes, B, device).gradients(),
        }  # fmt: skip
        for quantity in QUANTITIES:
            yield f"{name}, B = {B}, {quantity}", lambda name=name, sizes=sizes, B=B, quantity=quantity: {
                "model": name, "B": B, "quantity": quantity, **Calls(sizes, B, device).by_factors(quantity),
            }  # fmt: skip
    name = next(iter(MODELS))
    sizes, B = (MODELS[name], 1024) if on_gpu else ((49, 25, 4), 8)
    yield f"{name}, B = {B}, compiled vmap(grad)", lambda: {
        "model": name, "B": B, "quantity": "gradients", **Calls(sizes, B, device).compiled(),
    }  # fmt: skip


@cache
def vae(sizes: tuple[int, int, int], device: str):
    import torch

    from gradext.novelty import VAE

    torch.manual_seed(0)
    return VAE(*sizes).to(device).eval()


@cache
def loop_seconds(sizes: tuple[int, int, int], samples: int, device: str) -> dict:
    calls = Calls(sizes, samples, device)
    from gradext.losses import bce
    from gradext.oracles import loop_layer_grads

    call = partial(loop_layer_grads, calls.model, calls.x, bce, calls.names)
    return checked(call, calls.gradient_problem, lambda: seconds_per_call([call], device))


class Calls:
    """Everything one can ask about B samples of one model, by gradext and by the plain ways."""

    def __init__(self, sizes: tuple[int, int, int], B: int, device: str) -> None:
        import torch

        self.sizes, self.B, self.device = sizes, B, device
        self.model = vae(sizes, device)
        self.names = [f"decoder.{k}.weight" for k in (0, 2)]
        parameters = dict(self.model.named_parameters())
        self.shapes = {name: tuple(parameters[name].shape) for name in self.names}
        self.sample_bytes = 4 * sum(math.prod(shape) for shape in self.shapes.values())
        generator = torch.Generator(device).manual_seed(1)
        self.x = torch.rand(B, sizes[0], generator=generator, device=device)
        self.reference = {
            name: torch.randn(shape, generator=generator, device=device) for name, shape in self.shapes.items()
        }
        self.weight: torch.Tensor | None = None
        # The samples that are compared with fp64; the sum over the batch covers all others. None where a ReLU's
        # input is so near zero that rounding decides its gradient.
        with torch.no_grad():
            hidden = self.model.decoder[0](self.model._encode(self.x)[0])
        clear = (hidden.abs().amin(1) > 1e-6).nonzero().flatten().tolist() or list(range(B))
        self.picked = sorted({clear[round(k * (len(clear) - 1) / 15)] for k in range(16)})

    # The plain ways.

    @cached_property
    def chunk(self) -> int:
        """Samples whose gradients vmap may hold at once: it needs about three times their bytes."""
        return max(1, min(self.B, half_of_free_memory(self.device) // (3 * self.sample_bytes)))

    def vmap(self, reduce: Callable):
        """``reduce`` of the gradients of every chunk of samples, and each chunk dropped before the next."""
        from gradext.losses import bce
        from gradext.oracles import vmap_layer_grads

        return [reduce(vmap_layer_grads(self.model, part, bce, self.names)) for part in self.x.split(self.chunk)]

    def exact(self) -> dict:
        """fp64 gradients of the picked samples."""
        from gradext.losses import bce
        from gradext.oracles import vmap_layer_grads

        return vmap_layer_grads(copy.deepcopy(self.model).double(), self.x[self.picked].double(), bce, self.names)

    def reduced(self, quantity: str, gradients: dict):
        """A quantity from written gradients."""
        import torch

        flat = {name: gradient.flatten(1) for name, gradient in gradients.items()}
        if quantity == "linear, H = 64":
            last = self.names[-1]
            return flat[last] @ self.functionals().to(flat[last].dtype).flatten(1).mT
        if quantity == "Gram":
            return sum(gradient @ gradient.mT for gradient in flat.values())
        square = sum(torch.linalg.vecdot(gradient, gradient) for gradient in flat.values())
        if quantity == "norm":
            return square.sqrt()
        reference = {name: R.to(square.dtype).flatten() for name, R in self.reference.items()}
        dot = sum(flat[name] @ R for name, R in reference.items())
        return dot / (square.sqrt() * sum(R @ R for R in reference.values()).sqrt())

    def functionals(self):
        import torch

        if self.weight is None:
            generator = torch.Generator(self.device).manual_seed(2)
            self.weight = torch.randn(64, *self.shapes[self.names[-1]], generator=generator, device=self.device)
        return self.weight

    # Checks.

    def gradient_problem(self, gradients: dict) -> str | None:
        """Picked samples against fp64, and the sum over the batch against the gradient of the summed loss."""
        import torch

        from gradext.losses import bce

        for name, exact in self.exact().items():
            error = relative_error(gradients[name][self.picked], exact)
            if not error < 1e-4:
                return f"{name}: relative error {error:.2e} against fp64"
        parameters = [self.model.get_parameter(name) for name in self.names]
        totals = torch.autograd.grad(bce(self.model(self.x)[0], self.x).sum(), parameters)
        for name, total in zip(self.names, totals, strict=True):
            error = relative_error(gradients[name].sum(0), total.double())
            if not error < 1e-3:
                return f"{name}: the sum over the batch has relative error {error:.2e}"
        return None

    def quantity_problem(self, quantity: str, value) -> str | None:
        wanted = self.reduced(quantity, self.exact())
        value = value[self.picked][:, self.picked] if quantity == "Gram" else value[self.picked]
        error = relative_error(value, wanted)
        return None if error < 1e-4 else f"relative error {error:.2e} against fp64"

    # Measurements.

    def loop(self) -> dict:
        samples = min(self.B, LOOP_SAMPLES if self.device == "cuda" else 4)
        found = loop_seconds(self.sizes, samples, self.device)
        if "seconds" not in found:
            return found
        return {"seconds": found["seconds"] * self.B / samples, "timed_samples": samples}

    def time(self, call: Callable, problem: Callable) -> dict:
        """Seconds of a whole call, launches and all, and by how much it raises the memory in use."""
        import torch

        found = checked(call, problem, lambda: seconds_per_call([call], self.device))
        if "seconds" in found and self.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        return found

    def graph(self, call: Callable, problem: Callable) -> dict:
        """Seconds of a replay of the whole call as a CUDA graph, whose result is checked after a replay."""
        result = []

        def keep() -> None:
            result[:] = [call()]

        def replayed():
            replay()
            return result[0]

        try:
            replay = captured([keep], self.device)
        except Exception as error:
            return {"failed": f"capture: {first_line(error)}"}
        return checked(replayed, problem, lambda: seconds_per_call([replay], self.device))

    def gradients(self) -> dict:
        import torch

        import gradext

        size = self.B * self.sample_bytes
        found: dict = {"bytes": size, "routes": {}}
        if size > half_of_free_memory(self.device):
            return found | {"routes": {"all": {"skipped": "does not fit into half of the free memory"}}}
        call = partial(gradext.batch_layer_grads, self.model, self.x, loss="bce")
        routes = found["routes"]
        with torch.no_grad():
            routes["forward alone"] = self.time(partial(self.model, self.x), lambda _: None)
            routes["forward alone, CUDA graph"] = self.graph(partial(self.model, self.x), lambda _: None)
        routes["gradext"] = self.time(call, self.gradient_problem)
        out = {name: torch.full((self.B, *s), math.nan, device=self.device) for name, s in self.shapes.items()}
        into = partial(call, out=out)
        routes["gradext, out="] = self.time(into, self.gradient_problem)
        for tensor in out.values():
            tensor.fill_(math.nan)
        routes["gradext, out=, CUDA graph"] = self.graph(into, self.gradient_problem)
        if self.device == "cuda":
            routes["gradext, graphed"] = self.graphed()
        del out, into
        whole = self.chunk >= self.B  # else only the last sample of each chunk is kept

        def by_vmap():
            return self.vmap(lambda g: g if whole else {name: gradient[-1:] for name, gradient in g.items()})[-1]

        problem = self.gradient_problem if whole else self.last_sample_problem
        routes["vmap(grad)"] = self.time(by_vmap, problem) | {"chunk": self.chunk}
        routes["single-sample loop"] = self.loop()
        return found

    def graphed(self) -> dict:
        """Seconds of a call of what `gradext.make_graphed_layer_grads` gives, the copy of the input and all."""
        import gradext

        def recorded():
            return gradext.make_graphed_layer_grads(self.model, self.x, loss="bce")

        try:
            call = partial(recorded(), self.x)
        except Exception as error:
            return {"failed": f"capture: {first_line(error)}"}
        return checked(call, self.gradient_problem, lambda: seconds_per_call([call], self.device))

    def last_sample_problem(self, gradients: dict) -> str | None:
        if self.picked[-1] != self.B - 1:
            return None
        errors = {name: relative_error(gradients[name][-1], exact[-1]) for name, exact in self.exact().items()}
        return None if max(errors.values()) < 1e-4 else f"relative errors {errors} against fp64"

    def by_factors(self, quantity: str) -> dict:
        import torch

        import gradext

        def by_factors():
            factors = gradext.batch_layer_factors(self.model, self.x, loss="bce")
            if quantity == "linear, H = 64":
                return factors["decoder.2"].linear(self.functionals())
            if quantity == "cosine":
                return factors.cosine({name.removesuffix(".weight"): R for name, R in self.reference.items()})
            return factors.norm() if quantity == "norm" else factors.gram()

        def by_vmap():
            return torch.cat(self.vmap(partial(self.reduced, quantity)))

        problem = partial(self.quantity_problem, quantity)
        with torch.no_grad():
            routes = {"forward alone": self.time(partial(self.model, self.x), lambda _: None)}
        routes["gradext factors"] = self.time(by_factors, problem)
        routes["gradext factors, CUDA graph"] = self.graph(by_factors, problem)
        if quantity == "Gram" and self.chunk < self.B:
            routes["vmap(grad)"] = {"skipped": "a Gram matrix needs all gradients at once, which do not fit"}
        else:
            routes["vmap(grad)"] = self.time(by_vmap, problem) | {"chunk": self.chunk}
        routes["single-sample loop"] = self.loop()
        return {"routes": routes}

    def compiled(self) -> dict:
        import torch

        from gradext.losses import bce
        from gradext.oracles import vmap_layer_grads

        call = partial(torch.compile(lambda x: vmap_layer_grads(self.model, x, bce, self.names)), self.x)
        found = checked(call, self.gradient_problem, lambda: seconds_per_call([call], self.device))
        return {"bytes": self.B * self.sample_bytes, "routes": {"torch.compile of vmap(grad)": found}}


def relative_error(value, exact) -> float:
    """``‖value - exact‖ / ‖exact‖`` in fp64; NaN where value holds one, which passes no comparison."""
    import torch

    return (torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact)).item()


# --- many positions --------------------------------------------------------------------------------------------------


def position_cases(device: str) -> Iterator[Case]:
    import torch

    sizes = [(256, 784, 400), (255, 783, 399)] if device == "cuda" else [(3, 20, 9)]
    positions = (16, 64, 4, 256) if device == "cuda" else (4, 16)
    for dtype, T, (B, O, I), operator in itertools.product(
        (torch.float32, torch.bfloat16), positions, sizes, ("outer_sum", "sq_norm")
    ):
        name = f"{operator} {type_name(dtype)} [{B}, {T}, {O}] x [{B}, {T}, {I}]"
        yield name, partial(position_case, operator, B, T, O, I, dtype, device)


def position_case(operator: str, B: int, T: int, O: int, I: int, dtype, device: str) -> dict:
    """An error of at most twice that of plain torch in the same type, and of what one rounding of the result makes.

    The norms that torch is asked for are those of fp32 factors, on the CUDA cores, which round to nearest.
    """
    import torch

    from gradext import ops
    from gradext.backends import BACKENDS, reference

    generator = torch.Generator(device).manual_seed(T)
    d, a = (torch.randn(B, T, n, generator=generator, device=device).to(dtype) for n in (O, I))
    row = {"operator": operator, "B": B, "T": T, "O": O, "I": I, "type": type_name(dtype), "routes": {}}
    row["flops"] = 2 * B * T * O * I if operator == "outer_sum" else 2 * B * T * min(T * (O + I), O * I)
    gradients = torch.bmm(d.double().mT, a.double())
    if operator == "outer_sum":
        row["bytes"] = gradients.numel() * dtype.itemsize
        exact = gradients
        out = torch.empty(B, O, I, device=device, dtype=dtype)
        plain = {
            "torch.bmm, out=": partial(torch.bmm, d.mT, a, out=out),
            "einsum": partial(torch.einsum, "bto,bti->boi", d, a),
        }
        ours = {f"{name}, out=": partial(ops.outer, d, a, out=out, backend=name) for name in kernel_backends(device)}
    else:
        exact = torch.linalg.vecdot(gradients.flatten(1), gradients.flatten(1))
        wide = reference.widen(d, a)
        plain = {
            "bmm, then norm": lambda: torch.bmm(wide[0].mT, wide[1]).square().sum((1, 2)),
            "einsum of Gram matrices": lambda: torch.einsum("bts,bts->b", wide[0] @ wide[0].mT, wide[1] @ wide[1].mT),
        }
        having = [name for name in (*kernel_backends(device), "reference") if hasattr(BACKENDS[name], "sq_norm")]
        ours = {name: partial(ops.sq_norm, d, a, backend=name) for name in having}
    del gradients
    largest = exact.abs().max().item()
    errors = {}

    def error(value) -> float:
        return (value.double() - exact).abs().max().item()

    for name, call in plain.items():
        errors[name] = error(call())
        row["routes"][name] = {"seconds": kernel_seconds([call], device), "error": errors[name] / largest}
    for name, call in ours.items():
        if operator == "outer_sum":
            out.fill_(math.nan)

        def problem(value, name=name) -> str | None:
            errors[name] = error(value)
            rounding = torch.finfo(value.dtype).eps * largest
            allowed = 2 * max(errors[p] for p in plain) + rounding
            if operator == "sq_norm" and dtype.itemsize == 2:  # tensor cores cut their sums off, after 16 products each
                allowed += (O + I) / 16 * rounding
            return None if errors[name] <= allowed else f"error {errors[name]:.2e}, allowed {allowed:.2e}"

        row["routes"][name] = checked(call, problem, partial(kernel_seconds, [call], device))
        row["routes"][name]["error"] = errors.get(name, math.nan) / largest
    return row


# --- fusion: epilogues, grouped launches, and what is never written --------------------------------------------------


def fusion_cases(device: str) -> Iterator[Case]:
    import torch

    on_gpu = device == "cuda"
    fp32, bf16 = torch.float32, torch.bfloat16
    shapes = ((1024, 784, 400), (64, 784, 400), (1024, 401, 21)) if on_gpu else ((3, 20, 9),)
    for dtype, (B, O, I), epilogue in itertools.product((fp32, bf16), shapes, ("residual", "gelu")):
        name = f"outer of {epilogue}, {type_name(dtype)} [{B}, {O}, {I}]"
        yield name, partial(epilogue_case, epilogue, B, O, I, dtype, device)
    for B, (O, I, layers) in itertools.product((1, 8, 64) if on_gpu else (2,), ((64, 64, 16), (400, 20, 2))):
        yield f"{layers} layers [{B}, {O}, {I}]", partial(group_case, layers, B, O, I, device)
    for dtype, B in itertools.product((fp32, bf16), (1, 64, 1024, 16384) if on_gpu else (3,)):
        yield f"sq_norm {type_name(dtype)} [{B}, 784] x [{B}, 400]", partial(norm_case, B, 784, 400, dtype, device)
    for dtype, (B, T, O, I) in itertools.product(
        (fp32, bf16), ((1024, None, 784, 400), (256, 16, 784, 400)) if on_gpu else ((3, 2, 20, 9),)
    ):
        name = f"gram {type_name(dtype)} [{B}, {T or 1}, {O}] x [{B}, {T or 1}, {I}]"
        yield name, partial(gram_case, B, T, O, I, dtype, device)


def drawn(*shape: int, dtype, device: str, seed: int = 0):
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def timed(routes: dict[str, Callable], problem: Callable[[object], str | None], device: str) -> dict:
    """Each route on the device's own time, its result checked before."""
    return {name: checked(call, problem, partial(kernel_seconds, [call], device)) for name, call in routes.items()}


def within(allowed: float, exact) -> Callable[[object], str | None]:
    """A check: relative to the largest number of the exact result."""
    largest = exact.abs().max().item()

    def problem(value) -> str | None:
        error = (value.double() - exact).abs().max().item() / largest
        return None if error <= allowed else f"relative error {error:.2e}, allowed {allowed:.2e}"

    return problem


def epilogue_case(epilogue: str, B: int, O: int, I: int, dtype, device: str) -> dict:
    """Fused, and with the delta as a pass of its own before."""
    import torch

    from gradext import ops
    from gradext.backends import reference

    delta, operand = (drawn(B, O, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    activation = drawn(B, I, dtype=dtype, device=device, seed=2)
    out = torch.empty(B, O, I, dtype=dtype, device=device)
    formula = reference.EPILOGUES[epilogue]
    exact = formula(delta.double(), operand.double())[:, :, None] * activation.double()[:, None]
    fused = partial(ops.outer, delta, activation, out=out, epilogue=epilogue, operand=operand)
    routes = {f"{name}, fused": partial(fused, backend=name) for name in kernel_backends(device)}
    for name in kernel_backends(device):
        routes[f"{name}, delta before"] = lambda name=name: ops.outer(
            formula(delta, operand), activation, out=out, backend=name
        )
    routes["torch.mul"] = lambda: torch.mul(formula(delta, operand)[:, :, None], activation[:, None], out=out)
    routes["no epilogue"] = partial(torch.mul, delta[:, :, None], activation[:, None], out=out)
    # Two roundings, of the delta where it is a pass of its own and of the product.
    problem = within(2 * torch.finfo(dtype).eps + 1e-6, exact)
    row = {"bytes": out.numel() * dtype.itemsize, "routes": {}}
    for name, call in routes.items():
        out.fill_(math.nan)
        row["routes"] |= timed({name: call}, problem if name != "no epilogue" else lambda _: None, device)
    return row


def group_case(layers: int, B: int, O: int, I: int, device: str) -> dict:
    """All layers in one launch, or one each: on the device's own time, and as a call of Python's."""
    import torch

    from gradext import ops

    products = []
    for seed in range(layers):
        delta, activation = (drawn(B, n, dtype=torch.float32, device=device, seed=seed) for n in (O, I))
        products.append(ops.Product(delta, activation, torch.empty(B, O, I, device=device)))
    exact = torch.stack([p.delta.double()[:, :, None] * p.activation.double()[:, None] for p in products])

    def separate(backend: str) -> list:
        return [ops.outer(p.delta, p.activation, out=p.out, backend=backend) for p in products]

    def problem(found) -> str | None:
        return within(1e-7, exact)(torch.stack(found))

    routes = {}
    for name in kernel_backends(device):
        calls = {"grouped": partial(ops.outer_group, products, backend=name), "separate": partial(separate, name)}
        for kind, call in calls.items():
            for product in products:
                product.out.fill_(math.nan)
            routes |= timed({f"{name}, {kind}": call}, problem, device)
            eager = partial(seconds_per_call, [call], device)
            routes[f"{name}, {kind}, eager"] = checked(call, problem, eager)
    return {"bytes": exact.numel() * 4, "routes": routes}


def norm_case(B: int, O: int, I: int, dtype, device: str) -> dict:
    import torch

    from gradext import ops
    from gradext.backends import BACKENDS

    delta, activation = (drawn(B, n, dtype=dtype, device=device, seed=n) for n in (O, I))
    exact = delta.double().square().sum(1) * activation.double().square().sum(1)
    having = [name for name in (*kernel_backends(device), "reference") if hasattr(BACKENDS[name], "sq_norm")]
    routes = {name: partial(ops.sq_norm, delta, activation, backend=name) for name in having}
    wide = delta.float(), activation.float()
    routes["torch, fp32 factors"] = lambda: (
        torch.linalg.vecdot(wide[0], wide[0]) * torch.linalg.vecdot(wide[1], wide[1])
    )
    return {"bytes": B * (O + I) * dtype.itemsize, "routes": timed(routes, within(1e-5, exact), device)}


def gram_case(B: int, T: int | None, O: int, I: int, dtype, device: str) -> dict:
    """Two batches of B samples; torch writes the gradients of both."""
    from gradext import ops
    from gradext.backends import BACKENDS

    leading = (B,) if T is None else (B, T)
    d, a, d2, a2 = (drawn(*leading, n, dtype=dtype, device=device, seed=k) for k, n in enumerate((O, I, O, I)))
    rows = [x.double().reshape(B, T or 1, -1) for x in (d, a, d2, a2)]
    exact = (rows[0].mT @ rows[1]).flatten(1) @ (rows[2].mT @ rows[3]).flatten(1).mT
    having = [name for name in (*kernel_backends(device), "reference") if hasattr(BACKENDS[name], "gram")]
    routes = {name: partial(ops.gram, d, a, d2, a2, backend=name) for name in having}
    gradients = "torch, gradients written"
    wide = [x.float().reshape(B, T or 1, -1) for x in (d, a, d2, a2)]
    routes[gradients] = lambda: (wide[0].mT @ wide[1]).flatten(1) @ (wide[2].mT @ wide[3]).flatten(1).mT
    return {"routes": timed(routes, within(1e-4, exact), device)}


CASES = {
    "fusion": fusion_cases,
    "machine": machine_cases,
    "ceilings": ceiling_cases,
    "outer": outer_cases,
    "calls": call_cases,
    "positions": position_cases,
}


# --- under compute-sanitizer -----------------------------------------------------------------------------------------


CUT = "stopped at the time limit"


def sanitize_driver(device: str, deadline: float) -> int:
    """Every kernel once, on sizes with edges; inputs come from the host, so that few other kernels run."""
    import torch

    from gradext import ops
    from gradext.backends import reference

    fp32, bf16, fp16, fp64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    result_types = {fp32: (fp32, bf16, fp16), bf16: (bf16, fp32), fp16: (fp16, fp32), fp64: (fp64,)}
    # B, T, O, I: vectors whole and cut, rows of less than a vector, tiles with edges, positions few and many.
    shapes = [(3, None, 33, 129), (2, None, 5, 3), (5, None, 1, 1), (2, None, 16, 64), (2, 2, 17, 35), (2, 33, 66, 70)]
    backends, wrong = kernel_backends(device), []
    print(f"backends: {', '.join(backends) or 'none'}", flush=True)
    if not backends:  # nor does a tool find fault with nothing
        return 1
    generator = torch.Generator().manual_seed(0)
    for backend in backends:
        products = [
            ops.Product(*(torch.randn(3, n, generator=generator).to(device) for n in (5 + 9 * k, 7 + k)), None)
            for k in range(18)
        ]
        for product, value in zip(products, ops.outer_group(products, backend=backend), strict=True):
            if not relative_error(value.cpu(), reference.outer(*(t.cpu().double() for t in product[:2]))) < 1e-2:
                wrong.append(f"{backend} group {list(value.shape)}")
    for leading in ((5,), (3, 2)) if "triton" in backends else ():  # a kernel of half precision alone
        factors = [torch.randn(*leading, n, generator=generator).to(bf16) for n in (33, 17, 33, 17)]
        value = ops.gram(*(t.to(device) for t in factors), backend="triton").cpu()
        if not relative_error(value, reference.gram(*(t.double() for t in factors))) < 1e-2:
            wrong.append(f"triton gram {leading}")
    cases = list(itertools.product(backends, shapes, result_types))
    for n, (backend, (B, T, O, I), dtype) in enumerate(cases):
        if time.time() > deadline:  # most of it goes into compiling Triton's kernels
            print(f"{CUT} before {backend} {(B, T, O, I)} {type_name(dtype)}, case {n + 1} of {len(cases)}", flush=True)
            break
        generator = torch.Generator().manual_seed(O)
        leading = (B,) if T is None else (B, T)
        sizes = ((*leading, O), (*leading, I), (O, I), (3 if T is None else 1, O, I))
        delta, activation, *operands = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
        operands_of = {"dot": operands[:1], "linear": operands[1:], "sq_norm": []}
        calls = [(name, partial(getattr(ops, name), backend=backend), extra) for name, extra in operands_of.items()]
        for result_type in result_types[dtype]:  # into padded and unaligned memory
            padded = torch.zeros(B, O + 1, I + 3, dtype=result_type).to(device)[:, :O, 1 : I + 1]
            calls.append(("outer", partial(ops.outer, dtype=result_type, backend=backend), []))
            calls.append(("outer", partial(ops.outer, out=padded, backend=backend), []))
        operand = delta.flip(0)
        for epilogue in ("residual", "gelu") if has_kernel(backend, "outer", T or 1, dtype) else ():
            call = partial(ops.outer, epilogue=epilogue, operand=operand.to(device), backend=backend)
            value = call(delta.to(device), activation.to(device)).cpu()
            plain_delta = reference.EPILOGUES[epilogue](delta.double(), operand.double())
            if not relative_error(value, reference.outer(plain_delta, activation.double())) < 1e-2:
                wrong.append(f"{backend} outer of {epilogue} {(B, T, O, I)} {type_name(dtype)}")
        for name, call, extra in calls:
            if not has_kernel(backend, name, T or 1, dtype):
                continue
            inputs = (delta, activation, *extra)
            value = call(*(tensor.to(device) for tensor in inputs)).cpu()
            if not relative_error(value, getattr(reference, name)(*(t.double() for t in inputs))) < 1e-2:
                wrong.append(f"{backend} {name} {(B, T, O, I)} {type_name(dtype)} -> {type_name(value.dtype)}")
    print(f"wrong: {', '.join(wrong)}" if wrong else "all results right", flush=True)
    return int(bool(wrong))


def has_kernel(backend: str, name: str, T: int, dtype) -> bool:
    """Whether gradext has a kernel of its own for this, and does not leave it to torch, which is not judged here."""
    if backend != "triton":
        return name in ("outer", "sq_norm") if backend == "cuda" else name == "outer"
    from gradext.kernels.outer import ONE_BY_ONE

    return dtype.itemsize <= 2 or not (name == "dot" or (name == "outer" and ONE_BY_ONE < T))


# --- the report ------------------------------------------------------------------------------------------------------


def render(results: dict, folder: Path) -> None:
    (folder / "report.md").write_text(report(results))
    from matplotlib import rc_context

    with rc_context(STYLE):
        draw_outer(results, folder / "outer.png")
        draw_speedup(results, folder / "speedup.png")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def seconds_of(row: dict, route: str) -> float | None:
    return row.get("routes", {}).get(route, {}).get("seconds")


def cell(row: dict, route: str, text: Callable[[float], str]) -> str:
    found = row.get("routes", {}).get(route)
    if found is None:
        return ""
    if "seconds" in found:
        return text(found["seconds"])
    return "**wrong**" if "wrong" in found else "failed" if "failed" in found else "-"


def ratio(row: dict, base: str, route: str) -> str:
    times = seconds_of(row, base), seconds_of(row, route)
    return "" if None in times else f"{plain(times[0] / times[1])}x"


def plain(number: float) -> str:
    """Three digits, and never an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def best_fill(row: dict) -> float | None:
    return min(filter(None, (seconds_of(row, "fill_"), seconds_of(row, "zero_"))), default=None)


def count(number: float) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"


def report(results: dict) -> str:
    machine = (results.get("machine") or [{}])[0]
    named = f"{machine.get('gpu', 'no GPU')}, torch {machine.get('torch')}, CUDA {machine.get('cuda')}"
    parts = [
        "# gradext on a GPU\n",
        f"{named}, commit {results.get('commit')}, {results.get('date')}; made by `{results.get('command')}`.\n",
        "## Stages\n",
        table(
            ("stage", "result", "seconds", "what was cut"),
            [
                (name, f"**{s['status']}**" if s["status"] == "failed" else s["status"], f"{s.get('seconds', 0):.0f}",
                 shorten(s.get("cut", []), 6))
                for name, s in results["stages"].items()
            ],
        ),
        "## Machine\n",
        table(("", ""), [(key, value) for key, value in machine.items() if key != "case"]),
        f"Build of the extension: {results.get('build', {}).get('seconds', math.nan):.0f} s.\n",
        "## Tests and sanitizer\n",
    ]  # fmt: skip
    tests = results.get("tests", {})
    keys = ("tests", "failures", "errors", "skipped")
    parts.append(table(keys, [[tests.get(key, "") for key in keys]]) if tests else "Tests were not run.\n")
    parts += [f"- {name}: {found['summary']}" for name, found in results.get("sanitizer", {}).items()]
    errors = {name: stage["error"] for name, stage in results["stages"].items() if stage.get("error")}
    parts += [f"\n{name}:\n\n```\n{error}\n```\n" for name, error in errors.items()]
    parts += ["\n## Ceilings\n", table(("what", "rate"), [ceiling(row) for row in results.get("ceilings", [])])]
    parts += [*outer_report(results), *calls_report(results), *positions_report(results), *fusion_report(results)]
    return "\n".join(parts)


def shorten(names: Sequence[str], most: int) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def ceiling(row: dict) -> tuple[str, str]:
    for result in row.get("routes", {}).values():
        if "seconds" in result:
            if "flops" in row:
                return row["case"], f"{row['flops'] / result['seconds'] / 1e12:.1f} TFLOP/s"
            return row["case"], f"{row['bytes'] / result['seconds'] / 1e9:.0f} GB/s"
    return row["case"], "failed"


OUTER_ROUTES = (
    "cuda, out=", "triton, out=", "cpu, out=", "torch.mul, out=", "cuda", "triton", "cpu", "torch.mul", "torch.compile",
)  # fmt: skip


def outer_rows(results: dict) -> list[dict]:
    """One row a size, the compiled product of the same size among its routes."""
    merged: dict[tuple, dict] = {}
    for row in results.get("outer", []):
        if "bytes" in row:
            key = tuple(row[k] for k in ("type", "O", "I", "B"))
            into = merged.setdefault(key, {**row, "routes": {}})
            into["routes"] |= row["routes"]
    order = {"fp32": 0, "bf16": 1, "fp16": 2, "fp64": 3}
    return [row for _, row in sorted(merged.items(), key=lambda item: (order[item[0][0]], *item[0][1:]))]


def outer_report(results: dict) -> list[str]:
    rows = outer_rows(results)
    if not rows:
        return []
    routes = [route for route in OUTER_ROUTES if any(route in row["routes"] for row in rows)]
    body = []
    for row in rows:

        def rate(s, row=row):
            return f"{row['bytes'] / s / 1e9:.0f}"

        fill = best_fill(row)
        share = [ratio({"routes": row["routes"] | {"fill": {"seconds": fill}}}, "fill", r)[:-1] for r in routes[:2]]
        shape = f"[{row['B']}, {row['O']}, {row['I']}]"
        cells = [cell(row, route, rate) for route in routes]
        body.append((row["type"], shape, count(row["bytes"]), rate(fill) if fill else "", *share, *cells))
    head = ("type", "shape", "bytes", "fill", *(f"{route.split(',')[0]} / fill" for route in routes[:2]), *routes)
    return [
        "\n## Outer product, GB/s of the output\n",
        "Device time by graph replay. Where `out=` is given, buffers take turns that together exceed the L2 cache four "
        "times over, but at most 256 of them: results below some 200 kB stay in that cache. Without `out=` the "
        "allocator gives the same memory again. `fill`: the faster of `fill_` and `zero_` of the same bytes, rotated "
        "alike. Every result equals the rounded fp64 product bit for bit.\n",
        table(head, body),
    ]


def calls_report(results: dict) -> list[str]:
    rows = [row for row in results.get("calls", []) if "quantity" in row]
    parts = []
    for model, quantity in dict.fromkeys((row["model"], row["quantity"]) for row in rows):
        merged: dict[int, dict] = {}
        for row in rows:
            if (row["model"], row["quantity"]) == (model, quantity):
                merged.setdefault(row["B"], {"routes": {}})["routes"] |= row["routes"]
        of_it = [merged[B] | {"B": B} for B in sorted(merged)]
        routes = list(dict.fromkeys(route for row in of_it for route in row["routes"] if route != "all"))
        ours = [route for route in routes if route.startswith("gradext")]
        eager = next((route for route in ("gradext, out=", "gradext factors") if route in ours), None)
        body = []
        for row in of_it:
            peak = row["routes"].get(eager, {}).get("peak_bytes")
            cells = [cell(row, route, duration) for route in routes]
            gains = [ratio(row, base, eager) for base in ("vmap(grad)", "single-sample loop")]
            body.append((row["B"], *cells, *gains, count(peak) if peak is not None else ""))
        head = ("B", *routes, "over vmap", "over the loop", "peak memory")
        parts += [f"\n### {model}: {quantity}\n", table(head, body)]
    if parts:
        parts.insert(
            0,
            "\n## Whole calls\n\nModel, batch and loss in, result out, launches and all. The gains and the peak "
            "(how far the call raises the memory in use) are those of `gradext, out=` or `gradext factors`. vmap runs "
            "in chunks that fit into memory; the loop is timed on at most "
            f"{LOOP_SAMPLES} samples, scaled to B, and writes the gradients only, whatever is asked of them.\n",
        )
    return parts


def positions_report(results: dict) -> list[str]:
    rows = [row for row in results.get("positions", []) if "operator" in row]
    parts = ["\n## Many positions\n"] if rows else []
    for operator in dict.fromkeys(row["operator"] for row in rows):
        of_it = sorted((r for r in rows if r["operator"] == operator), key=lambda r: (r["type"], r["O"], r["T"]))
        routes = list(dict.fromkeys(route for row in of_it for route in row["routes"]))
        body = []
        for row in of_it:
            plain = min(filter(None, (seconds_of(row, route) for route in routes[:2])), default=None)
            mine = min(filter(None, (seconds_of(row, route) for route in routes[2:])), default=None)
            gain = f"{plain / mine:.3g}x" if plain and mine else ""
            shape = f"[{row['B']}, {row['T']}, {row['O']}] x [{row['B']}, {row['T']}, {row['I']}]"
            body.append((row["type"], shape, *(cell(row, route, duration) for route in routes), gain))
        parts += [
            f"### {operator}\n",
            table(("type", "shape", *routes, "best of gradext against best of torch"), body),
        ]
    return parts


def fusion_report(results: dict) -> list[str]:
    """One table for the cases of the same routes."""
    rows = [row for row in results.get("fusion", []) if "routes" in row]
    parts = [
        "\n## Fusion\n",
        "Device time by graph replay; `eager`: a call from Python, launches and all. `delta before`: the epilogue by "
        "torch, as a pass of its own. Each case has one set of buffers: what fits into the L2 cache stays there.\n",
    ]
    for routes in dict.fromkeys(tuple(row["routes"]) for row in rows):
        of_it = [row for row in rows if tuple(row["routes"]) == routes]
        body = [(row["case"], *(cell(row, route, duration) for route in routes)) for row in of_it]
        parts.append(table(("case", *routes), body))
    return parts if rows else []


COLOURS = {
    "cuda, out=": "#2a6fbb", "triton, out=": "#e8743b", "cpu, out=": "#2a6fbb", "torch.mul, out=": "#8a939e",
    "torch.mul": "#c3c9d0",
}  # fmt: skip


STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a939e",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.titlesize": 17,
    "figure.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 12,
}


def figure(panels: int):
    from matplotlib.figure import Figure

    made = Figure(figsize=(13.33, 6.2), dpi=150, layout="constrained", facecolor="white")
    axes = made.subplots(1, panels, sharey=True, squeeze=False)[0]
    for ax in axes:
        ax.grid(color="#e6e9ec", linewidth=0.8)
        ax.set_axisbelow(True)
    return made, axes


def gpu_name(results: dict) -> str:
    return (results.get("machine") or [{}])[0].get("gpu", "CPU")


def draw_outer(results: dict, path: Path) -> None:
    """Achieved GB/s against the bytes of the output, and the fill that none can pass."""
    rows = outer_rows(results)
    types = [kind for kind in ("fp32", "bf16", "fp16") if any(row["type"] == kind for row in rows)]
    if not types:
        return
    fill = max(
        (row["bytes"] / result["seconds"] / 1e9 for row in results.get("ceilings", []) if row["case"] in
         ("fill_", "zero_") for result in row.get("routes", {}).values()), default=None,
    )  # fmt: skip
    made, axes = figure(len(types))
    for ax, kind in zip(axes, types, strict=True):
        chosen = [row for row in rows if row["type"] == kind]
        for route, colour in COLOURS.items():
            points = [(r["bytes"], r["bytes"] / s / 1e9) for r in chosen if (s := seconds_of(r, route))]
            if points:
                ours = not route.startswith("torch")
                ax.scatter(*zip(*points, strict=True), s=46, color=colour, label=route, zorder=3 if ours else 2,
                           marker="o" if ours else "D", alpha=0.85, linewidths=0)  # fmt: skip
        fills = sorted((r["bytes"], r["bytes"] / s / 1e9) for r in chosen if (s := best_fill(r)))
        if fills:
            ax.scatter(*zip(*fills, strict=True), s=60, marker="_", color="#22272e", label="fill of the same bytes",
                       zorder=4)  # fmt: skip
        if fill is not None:
            ax.axhline(fill, color="#22272e", linewidth=1.4, linestyle="--", label=f"device fill, {fill:,.0f} GB/s")
        ax.set(xscale="log", yscale="log", title=kind, xlabel="bytes of the output, B·O·I·size")
    axes[0].set_ylabel("GB/s")
    made.suptitle(f"Outer product on {gpu_name(results)}: distance from a device fill")
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=6)
    made.savefig(path)


def draw_speedup(results: dict, path: Path) -> None:
    """How much faster whole calls are than vmap(grad) and than the loop, by batch size."""
    rows = [row for row in results.get("calls", []) if "quantity" in row]
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    if not models:
        return
    curves = [
        ("gradients into out= over vmap(grad)", "gradients", "gradext, out=", "vmap(grad)", "#2a6fbb", "-"),
        ("norms by factors over vmap(grad)", "norm", "gradext factors", "vmap(grad)", "#e8743b", "-"),
        ("gradients into out= over the loop", "gradients", "gradext, out=", "single-sample loop", "#2a6fbb", ":"),
        ("norms by factors over the loop", "norm", "gradext factors", "single-sample loop", "#e8743b", ":"),
    ]
    made, axes = figure(len(models))
    for ax, model in zip(axes, models, strict=True):
        for label, quantity, route, base, colour, line in curves:
            points = sorted(
                (row["B"], b / s) for row in rows if (row["model"], row["quantity"]) == (model, quantity)
                if (b := seconds_of(row, base)) and (s := seconds_of(row, route))
            )  # fmt: skip
            if points:
                ax.plot(
                    *zip(*points, strict=True), color=colour, linestyle=line, linewidth=2.6, marker="o", label=label
                )
        ax.axhline(1, color="#22272e", linewidth=1)
        ax.margins(y=0.06)
        batches = sorted({row["B"] for row in rows})
        ax.set(xscale="log", yscale="log", title=model, xlabel="batch size B")
        ax.set_xticks(batches, [f"{B:,}" for B in batches])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}x")
    axes[0].set_ylabel("times as fast")
    made.suptitle(f"Whole calls on {gpu_name(results)}: speed-up of gradext")
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[0]))
    made.legend(handles, labels, loc="outside lower center", ncols=2)
    made.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
