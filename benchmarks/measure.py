"""How every benchmark measures: routes in turns, the rise of resident memory, rows that say where they come from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

import gradext

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("opacus", "backpack-for-pytorch", "nngeometry")

SLICE = 0.03  # seconds that a quick call is repeated for in its turn, at most
LONG = 1.0  # seconds from which on a call finds nothing of its own left in the caches, and needs no settling


def in_turns(calls: Mapping[str, Callable], seconds: float, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Time of every call, interleaved: ``{name: {"ms": median, "low": quartile, "high": quartile, "best", "calls"}}``.

    In every round each call has its turn: once unmeasured, so that it finds caches and allocator as it left them
    itself, then measured for a slice of time. A call that has used its share of ``seconds`` drops out of later rounds;
    every one is measured at least once.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    share = seconds / len(calls)
    turn = min(SLICE, share / rounds)
    for _ in range(rounds):
        for name, call in calls.items():
            if times[name] and spent[name] + statistics.median(times[name]) > share:
                continue
            start = time.perf_counter()
            call()
            settled = time.perf_counter()
            if settled - start > LONG:
                times[name].append(settled - start)
            else:
                end = settled
                while end == settled or end - settled < turn:
                    begin = time.perf_counter()
                    call()
                    end = time.perf_counter()
                    times[name].append(end - begin)
            spent[name] += time.perf_counter() - start
    return {name: _summary(values) for name, values in times.items()}


def _summary(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "ms": 1e3 * median,
        "low": 1e3 * low,
        "high": 1e3 * high,
        "best": 1e3 * min(seconds),
        "calls": len(seconds),
    }


def resident_rise(call: Callable) -> int:
    """Bytes by which resident memory rises during a call. Linux: OSError where the high-water mark cannot be reset."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    call()
    return max(0, status("VmHWM:") - before)


def available_bytes() -> int:
    """Memory that can be allocated now without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


@cache
def provenance() -> dict[str, str]:
    """Commit, versions and machine of a result."""
    versions = [
        f"gradext {gradext.__version__}",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
        *(f"{name} {version(name) or 'missing'}" for name in PEERS),
    ]
    return {"commit": _commit(), "versions": ", ".join(versions), "machine": machine()}


def _commit() -> str:
    """With "-dirty" where files were changed, other than the results themselves."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{cpu}, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}"


def append(path: Path, row: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**row, **provenance()}) + "\n")


def rows(path: Path) -> list[dict]:
    """The rows measured so far; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
