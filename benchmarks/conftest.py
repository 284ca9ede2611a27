"""What every benchmark shares: the machine in the header, models, inputs, and peak memory."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

import gradext
from gradext import native
from gradext.novelty import VAE


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def pytest_report_header() -> list[str]:
    build = native.C.build_config() if native.C else native.reason
    return [
        f"machine: {_cpu()}, {torch.get_num_threads()} threads, {platform.platform()}",
        f"versions: gradext {gradext.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"compiled module: {build}",
    ]


def pytest_addoption(parser) -> None:
    parser.addoption("--smoke", action="store_true", help="smallest sizes, no speed asserted: does everything run?")


@pytest.fixture(scope="session")
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


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


@pytest.fixture(scope="session")
def mnist_vae() -> VAE:
    """The 784-400-20 VAE; its last decoder layer has a 784x400 weight."""
    torch.manual_seed(0)
    return VAE(784, 400, 20).eval()


@pytest.fixture(scope="session")
def peak_bytes():
    """A function that tells how far resident memory rises during a call (Linux: resets the high-water mark)."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    def measure(call) -> int:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            pytest.skip(f"the high-water mark of memory cannot be reset here: {error}")
        before = status("VmRSS:")
        call()
        return status("VmHWM:") - before

    return measure
