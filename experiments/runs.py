"""Runs of an experiment: independent tasks, a JSON line each; resumable, in parallel, with progress and provenance."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm import tqdm

import gradext

EPOCHS = 60  # of a VAE: for that long the validation loss, which chooses the epoch that is kept, falls
RESULTS = Path(__file__).parent / "results"
PROVENANCE = ("commit", "versions", "machine")


def parser(description: str, *, seeds: Sequence[int] = (0,)) -> argparse.ArgumentParser:
    """The options that all experiments have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--data-dir", metavar="DIR", help="default: the environment variable GRADEXT_DATA")
    made.add_argument("--seeds", type=int, nargs="+", default=list(seeds), metavar="S")
    made.add_argument("--quick", action="store_true", help="a few epochs and one run, in minutes: to see that it works")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each (default: 1)")
    made.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: experiments/results")
    return made


def run(
    log: Path, tasks: Sequence[dict], work: Callable[[dict], dict], *, jobs: int = 1, description: str = ""
) -> list[dict]:
    """The rows of all ``tasks``, in their order: those that ``log`` has already, and those that ``work`` makes now.

    A task is a dict of JSON values that says all that its result depends on; its row is ``task | work(task)``, the
    seconds that took, and `provenance`. Every row is appended to ``log`` as one line as soon as it is there, so that an
    interrupted run goes on where it stopped; a line that was cut off is dropped. Every task runs on one thread, in
    ``jobs`` processes: how many there are does not change a result. An error in one task ends the run, with all rows
    that were finished in ``log``; so does a process that is lost, with a RuntimeError.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = read(log)
    found = {k: row for k, task in enumerate(tasks) for row in rows if task.items() <= row.items()}
    open_tasks = {k: task for k, task in enumerate(tasks) if k not in found}
    if found:
        print(f"{len(found)} of {len(tasks)} runs read from {log}; --out DIR runs anew", file=sys.stderr, flush=True)
    facts = provenance() if open_tasks else {}
    bar = tqdm(total=len(tasks), initial=len(found), desc=description, unit="run", disable=None)
    with bar, log.open("a") as file:
        try:
            for k, result in _results(work, open_tasks, jobs):
                found[k] = tasks[k] | result | facts
                file.write(json.dumps(found[k]) + "\n")
                file.flush()
                bar.update()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process was lost (killed, or out of memory): {len(found)} of {len(tasks)} runs are kept in {log}; "
                "run the same command again to go on"
            ) from error
    return [found[k] for k in range(len(tasks))]


def has_score(rows: Sequence[dict], name: str) -> bool:
    """Whether the score existed when these rows were made."""
    return all(name in row["auroc"] for row in rows)


def read(log: Path) -> list[dict]:
    """The rows of a log; a last line that was cut off is removed from the file."""
    text = log.read_text() if log.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(log, len(whole.encode()))  # which cannot lose the other lines, as writing them anew could
    return [json.loads(line) for line in whole.splitlines()]


def _results(work: Callable[[dict], dict], tasks: dict[int, dict], jobs: int) -> Iterator[tuple[int, dict]]:
    timed = functools.partial(_timed, work)
    if jobs == 1 or len(tasks) <= 1:
        yield from ((k, timed(task)) for k, task in tasks.items())
        return
    # Spawned, not forked: a forked child inherits torch's thread pool without its threads.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        futures = {pool.submit(timed, task): k for k, task in tasks.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Of a parent that is killed, workers would go on with what nobody waits for."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _timed(work: Callable[[dict], dict], task: dict) -> dict:
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = work(task)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def provenance() -> dict[str, str]:
    """Command, commit, versions and machine of a result. The data folder is left out: it is the user's own."""
    main = sys.modules["__main__"]
    module = main.__spec__.name if getattr(main, "__spec__", None) else Path(sys.argv[0]).stem
    arguments = [a for k, a in enumerate(sys.argv[1:], 1) if "--data-dir" not in (a.split("=")[0], sys.argv[k - 1])]
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "-uno", "--", "*.py", "csrc")
    return {
        "command": " ".join(["python -m", module, *arguments]),
        "commit": commit + (" with changes" if changed else ""),
        "versions": f"gradext {gradext.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "machine": f"{_processor()}, one thread a run",
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    try:
        found = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def origin(rows: Sequence[dict]) -> str:
    """Where rows come from, for the foot of a rendered result: commands, commits, versions, machines, time."""
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    facts = dict.fromkeys(tuple(row[name] for name in PROVENANCE) for row in rows)
    hours = sum(row["seconds"] for row in rows) / 3600
    lines = [f"Made by {commands}: {len(rows)} runs, which took {hours:.2f} hours together."]
    return "\n".join([*lines, *(f"Commit {commit}; {versions}; {machine}." for commit, versions, machine in facts)])
