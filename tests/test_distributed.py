"""``torchrun -m gradext score``: the same table as one process', and nothing is lost where one dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed

from gradext.cli import main

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not sys.platform.startswith("linux"),
    reason="needs torch.distributed, Linux",
)
ROWS = 30_001  # not a multiple of the number of processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    X = np.random.default_rng(0).random((ROWS, 16))
    np.save(folder / "x.npy", X)
    np.save(folder / "train.npy", X[:200])
    arguments = ["--hidden-dim", "128", "--latent-dim", "8", "--epochs", "5", "--out", str(folder / "m")]
    assert main(["fit", str(folder / "train.npy"), *arguments]) == 0
    assert main(["score", str(folder / "m"), str(folder / "x.npy"), "--out", str(folder / "one.csv")]) == 0
    return folder


def torchrun(folder, out, processes):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--master-addr=127.0.0.1",
    ]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "gradext", "score"]
    command += [str(folder / "m"), str(folder / "x.npy"), "--out", str(out)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def columns(path):
    """row and sample as text; the numbers."""
    rows = [line.split(",") for line in Path(path).read_text().splitlines()]
    return [row[:2] for row in rows], np.array([row[2:5] for row in rows[1:]], float)


def assert_same(path, expected):
    names, values = columns(path)
    expected_names, expected_values = columns(expected)
    assert names == expected_names, "every row once, in order"
    np.testing.assert_allclose(values, expected_values, rtol=1e-9)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_write_the_table_of_one(folder, processes, tmp_path):
    process = torchrun(folder, tmp_path / "s.csv", processes)
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error
    assert_same(tmp_path / "s.csv", folder / "one.csv")
    assert os.listdir(tmp_path) == ["s.csv"]


def test_where_one_dies_the_next_run_goes_on(folder, tmp_path):
    out = tmp_path / "s.csv"
    process = torchrun(folder, out, 2)
    partial = tmp_path / "s.csv.partial-1-of-2"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 60_000):
        time.sleep(0.01)
    os.kill(worker(process.pid, rank=1), signal.SIGKILL)
    process.communicate(timeout=240)
    assert process.returncode != 0
    assert not out.exists()
    done = partial.read_bytes().count(b"\n") - 1
    assert 0 < done < ROWS // 2
    before = partial.read_bytes()[:50_000]
    process = torchrun(folder, out, 2)
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error
    assert_same(out, folder / "one.csv")
    assert before.split(b"\n")[1].decode() in out.read_text(), "what was there is kept, not computed anew"


def worker(launcher: int, rank: int) -> int:
    """The process id of one of torchrun's workers."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(pid)
    raise AssertionError(f"no worker of rank {rank}")
