"""What every benchmark shares: the machine in the header, the options, and where rows are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradext import native

from . import measure


def pytest_report_header() -> list[str]:
    facts = measure.provenance()
    return [
        f"machine: {facts['machine']}",
        f"versions: {facts['versions']}, commit {facts['commit']}",
        f"compiled module: {native.C.build_config() if native.C else native.reason}",
    ]


def pytest_addoption(parser) -> None:
    parser.addoption("--smoke", action="store_true", help="smallest sizes, no speed asserted: does everything run?")
    parser.addoption(
        "--grid", default="default", choices=["default", "full", "models"], help="which sizes are measured"
    )
    parser.addoption(
        "--rows",
        type=Path,
        default=measure.ROOT / "benchmarks/results/cpu/rows.jsonl",
        help="where rows of full and models are kept; what stands there is not measured again (default: %(default)s)",
    )


def pytest_collection_modifyitems(config, items) -> None:
    """Real models have a grid of their own, without operators, detectors and the table of one size."""
    if config.getoption("--grid") == "models" and not config.getoption("--smoke"):
        kept = [item for item in items if item.originalname in ("test_cell", "test_memory")]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="session")
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture(scope="session")
def grid(request, smoke) -> str:
    return "smoke" if smoke else request.config.getoption("--grid")


class Rows:
    """The rows of the full grid and of models; those of smaller ones are printed, not kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def has(self, **facts) -> bool:
        """Whether a row with these facts was measured before."""
        return self.path is not None and any(facts.items() <= row.items() for row in measure.rows(self.path))

    def append(self, row: dict) -> None:
        if self.path:
            measure.append(self.path, row)


@pytest.fixture(scope="session")
def kept_rows(request, grid) -> Rows:
    return Rows(request.config.getoption("--rows") if grid in ("full", "models") else None)


@pytest.fixture(scope="session")
def report(request):
    """Print lines that stand in the output whatever pytest captures."""
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(*lines: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            for line in lines:
                terminal.write_line(line)

    return write
