"""Whole calls of gradext against every other route, each result checked against fp64 before it is timed.

    pytest benchmarks                       a table of one size, and a few sizes with the routes in turns
    pytest benchmarks --smoke               the smallest sizes: does everything run?
    pytest benchmarks --grid full           every model by every batch size; what is measured already is left out
    pytest benchmarks --grid models         the same of real models (`benchmarks.models`)

The rows of these two are kept in ``--rows FILE`` (default: benchmarks/results/cpu/rows.jsonl), and rendered by
``python -m benchmarks.report``.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from gradext import native

from . import measure, models
from .peers import CASES, ROUTES, Call, Problem, Route

# BackPACK's and Opacus' own hooks, on models whose input needs no gradient, and on modules made of layers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Extension saving to"),
]

BATCHES = (1, 8, 64, 256, 1024, 4096)
LAST = "MNIST VAE, last layer"
CELLS = {
    "smoke": [("small", 1), ("small", 8), ("sequence", 2), ("conv", 2)],
    "default": [("small", 1), ("small", 256), (LAST, 256), ("wide", 8), ("sequence", 64), ("conv", 64)],
    "full": [(case, B) for case in CASES for B in BATCHES],
    "models": [(case, B) for case in models.CASES for B in (1, 4, 16, 64)],
}
EVERY = CASES | models.CASES


def routes(case: str) -> list[str]:
    """The keys of the routes that a case is measured by."""
    real = case in models.CASES
    apart = ("scores", "output") if real else ("step", "step norms")  # what is asked of the others alone
    by_hand = ("by hand", "by hand, out=", "gradext, out=", "nngeometry") if real else ()
    return [key for key, route in ROUTES.items() if route.computes not in apart and route.name not in by_hand]


MEMORY = {  # (case, B) -> the routes whose memory is measured, each in a process of its own
    "smoke": {("small", 2): ("gradext: norms",)},
    "default": {(LAST, 256): ("gradext, out=: gradients", "vmap(grad): norms", "gradext: norms")},
    "full": {(case, 256): [k for k in routes(case) if ROUTES[k].computes != "scores"] for case in (LAST, "conv")},
    "models": {(case, 16): routes(case) for case in models.CASES},
}
SECONDS = {"smoke": 0.3, "default": 6.0, "full": 10.0, "models": 40.0}  # of measuring for a cell
CALL_LIMIT = 4.0  # seconds above which a call is not measured
MEMORY_SHARE = 0.85  # of the available memory that a cell may count on
SMALL = 8  # samples, or an eighth of the batch, from whose time that of the whole is foretold


def pytest_generate_tests(metafunc) -> None:
    grid = "smoke" if metafunc.config.getoption("--smoke") else metafunc.config.getoption("--grid")
    if metafunc.function is test_cell:
        metafunc.parametrize(("case", "B"), CELLS[grid], ids=str)
    if metafunc.function is test_memory:
        metafunc.parametrize(("case", "B"), list(MEMORY[grid]), ids=str)


def test_cell(case, B, grid, kept_rows, benchmark, report):
    """One model and batch size, all routes in turns."""
    if kept_rows.has(kind="cell", case=case, B=B):
        pytest.skip("measured already")
    problem = Problem(EVERY[case], B)
    start = time.perf_counter()
    measured = measured_routes(problem, [ROUTES[key] for key in routes(case)], SECONDS[grid])
    kept_rows.append({"kind": "cell", "case": case, "B": B, "bytes": problem.gradient_bytes, "routes": measured})
    report("", f"{case}, B = {B} ({problem.gradient_bytes / 1e6:.2f} MB of gradients), ms:")
    for computes in dict.fromkeys(row["computes"] for row in measured.values()):
        found = {key.rpartition(": ")[0]: _text(row) for key, row in measured.items() if row["computes"] == computes}
        report(f"  {computes}: " + ", ".join(f"{name} {text}" for name, text in found.items()))
    report(f"  measured in {time.perf_counter() - start:.0f} s")
    assert not [key for key, row in measured.items() if ROUTES[key].ours and row.keys() & {"wrong", "failed"}]
    benchmark.group = "gradext, norms by factors"
    benchmark.pedantic(ROUTES["gradext: norms"].setup(problem), rounds=3, warmup_rounds=1)


def _text(row: dict) -> str:
    """A route's time, or one word for why there is none."""
    return f"{row['ms']:.3g}" if "ms" in row else next(word for word in ("wrong", "failed", "skipped") if word in row)


def measured_routes(problem: Problem, routes, seconds: float) -> dict[str, dict]:
    """By route: its times, or ``{"wrong": relative error}``, ``{"failed": message}``, ``{"skipped": reason}``."""
    outcomes: dict[str, dict] = {}
    calls: dict[str, Call] = {}
    available = MEMORY_SHARE * measure.available_bytes()
    small = max(SMALL, len(problem) // 8)
    foretold = Problem(problem.case, small) if len(problem) > small else None
    for route in routes:
        outcome = _prepared(route, problem, foretold, available)
        if callable(outcome):
            calls[route.key] = outcome
        outcomes[route.key] = {"computes": route.computes, **({} if callable(outcome) else outcome)}
    for key, times in measure.in_turns(calls, seconds).items() if calls else ():
        outcomes[key] |= times
    return outcomes


def _prepared(route: Route, problem: Problem, foretold: Problem | None, available: float) -> Call | dict:
    """The call, once its result has been seen to be right, else why it is not measured."""
    reason = route.unavailable()
    if reason:
        return {"skipped": reason}
    # Beside a route's own copies lie the `out` that those that write into one share, and gradext's workspace.
    needed = (route.copies + 2) * problem.gradient_bytes if route.copies or route.computes == "gradients" else 0
    if needed > available:
        return {"skipped": f"needs about {needed / 1e9:.0f} GB, of {available / 1e9:.0f} GB that are free"}
    try:
        if foretold is not None:
            call = _checked(route, foretold)
            if isinstance(call, dict):
                return call
            start = time.perf_counter()
            call()
            exponent = 1.5 if route.computes == "gram" else 1.0  # between the forward pass's and the products'
            seconds = (time.perf_counter() - start) * (len(problem) / len(foretold)) ** exponent
            if seconds > CALL_LIMIT:
                return {"skipped": f"would take about {seconds:.0f} s a call, by its time for {len(foretold)} samples"}
        return _checked(route, problem)
    except Exception as error:  # a peer that cannot do this is a finding, not the end of the run
        if route.ours:
            raise
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _checked(route: Route, problem: Problem) -> Call | dict:
    call = route.setup(problem)
    error = problem.expected.error(route.computes, call())
    return call if error <= route.tolerance else {"wrong": error}


@pytest.fixture(scope="module")
def one_size(smoke):
    return Problem(CASES[LAST], 8 if smoke else 256)


@pytest.mark.parametrize("key", ROUTES)
def test_route(benchmark, one_size, key):
    """pytest-benchmark's own table, by what is computed: the last decoder layer of the MNIST VAE."""
    route = ROUTES[key]
    call = _prepared(route, one_size, None, MEMORY_SHARE * measure.available_bytes())
    if isinstance(call, dict):
        pytest.skip(str(call))
    benchmark.group = f"{LAST}, B = {len(one_size)}: {route.computes}"
    slow = route.name in ("single-sample loop", "vmap(grad)", "Opacus", "BackPACK BatchGrad")
    benchmark.pedantic(call, rounds=3 if slow else 15, warmup_rounds=1)


@pytest.mark.skipif(native.C is None, reason=f"compiled module missing: {native.reason}")
def test_guard(one_size, smoke, report):
    """The aims of repeated calls against vmap(grad) on a large layer."""
    compared = [ROUTES[f"{name}: {computes}"] for name, computes in (
        ("vmap(grad)", "gradients"), ("gradext", "gradients"), ("gradext, out=", "gradients"),
        ("vmap(grad)", "norms"), ("gradext", "norms"),
    )]  # fmt: skip
    ms = {key: row["ms"] for key, row in measured_routes(one_size, compared, 0.2 if smoke else 10).items()}
    fresh = ms["vmap(grad): gradients"] / ms["gradext: gradients"]
    reused = ms["vmap(grad): gradients"] / ms["gradext, out=: gradients"]
    norms = ms["vmap(grad): norms"] / ms["gradext: norms"]
    report(
        "",
        f"gradients against vmap(grad):           {fresh:6.1f}x   (aim 4x)",
        f"gradients into out= against vmap(grad): {reused:6.1f}x   (aim 8x)",
        f"norms by factors against vmap(grad):    {norms:6.1f}x   (aim 40x)",
    )
    if not smoke:  # machines are noisy: a guard against losing it, not the aim
        assert fresh >= 0.7 * 4
        assert reused >= 0.7 * 8
        assert norms >= 0.7 * 40


def test_memory(case, B, smoke, grid, kept_rows, report):
    """How far resident memory rises in one call of a route; `out=` counts, for somebody has to have it."""
    if kept_rows.has(kind="memory", case=case, B=B):
        pytest.skip("measured already")
    size = Problem(EVERY[case], B).gradient_bytes
    small = Problem(EVERY[case], min(B, SMALL))
    available = MEMORY_SHARE * measure.available_bytes()
    rises = {
        route.key: {"computes": route.computes, "bytes": _resident_rise(case, B, route.key)}
        for route in (ROUTES[key] for key in MEMORY[grid][case, B])
        if callable(_prepared(route, small, None, available))  # what is wrong may take what it likes
    }
    kept_rows.append({"kind": "memory", "case": case, "B": B, "bytes": size, "routes": rises})
    report("", f"{case}, B = {B}, {size / 1e6:.1f} MB of gradients; rise of resident memory, MB:")
    report("  " + ", ".join(f"{key} {row['bytes'] / 1e6:.1f}" for key, row in rises.items()))
    if not smoke and case == LAST:
        assert rises["gradext: norms"]["bytes"] < 0.05 * size


def _resident_rise(case: str, B: int, key: str) -> int:
    command = [sys.executable, "-m", "benchmarks.peers", case, str(B), key]
    child = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, check=False)
    if "clear_refs" in child.stderr:
        pytest.skip(f"the high-water mark of memory cannot be reset here: {child.stderr.splitlines()[-1]}")
    assert child.returncode == 0, child.stderr
    return int(child.stdout.split()[-1])
