"""``torchrun -m gradext fit``, ``score``, ``evaluate``: the results of one process; nothing is lost if one dies."""

import json
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not sys.platform.startswith("linux"),
        reason="needs torch.distributed, Linux",
    ),
]
ROWS = 30_001  # not a multiple of the number of processes
FIT = ["--score", "combined_whitened_norm", "--layer", "first,last", "--epochs", "2", "--hidden-dim", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    X = np.random.default_rng(0).random((ROWS, 16))
    np.save(folder / "x.npy", X)
    np.save(folder / "train.npy", X[:200])
    arguments = ["--hidden-dim", "128", "--latent-dim", "8", "--epochs", "5", "--out", str(folder / "m")]
    assert main(["fit", str(folder / "train.npy"), *arguments]) == 0
    assert main(["score", str(folder / "m"), str(folder / "x.npy"), "--out", str(folder / "one.csv")]) == 0
    np.save(folder / "y.npy", np.arange(ROWS) % 2)
    assert main(["fit", str(folder / "x.npy"), *FIT, "--out", str(folder / "whole")]) == 0
    return folder


def torchrun(arguments, processes):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--master-addr=127.0.0.1",
    ]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "gradext", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def scoring(folder, out, processes):
    return torchrun(["score", folder / "m", folder / "x.npy", "--out", out], processes)


def fitting(folder, out, processes):
    return torchrun(["fit", folder / "x.npy", *FIT, "--out", out], processes)


def finished(process):
    """Its standard output."""
    output, error = process.communicate(timeout=900)
    assert process.returncode == 0, error
    return output


def columns(path):
    """row and sample as text; the numbers."""
    rows = [line.split(",") for line in Path(path).read_text().splitlines()]
    return [row[:2] for row in rows], np.array([row[2:5] for row in rows[1:]], float)


def assert_same(path, expected):
    names, values = columns(path)
    expected_names, expected_values = columns(expected)
    assert names == expected_names, "every row once, in order"
    np.testing.assert_allclose(values, expected_values, rtol=1e-9)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_table_of_one(folder, processes, tmp_path):
    finished(scoring(folder, tmp_path / "s.csv", processes))
    assert (tmp_path / "s.csv").read_bytes() == (folder / "one.csv").read_bytes()
    assert os.listdir(tmp_path) == ["s.csv"]


def test_where_one_dies_the_next_run_goes_on(folder, tmp_path):
    out = tmp_path / "s.csv"
    process = scoring(folder, out, 2)
    partial = tmp_path / "s.csv.partial-1-of-2"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 60_000):
        time.sleep(0.01)
    os.kill(worker(process.pid, rank=1), signal.SIGKILL)
    process.communicate(timeout=900)
    assert process.returncode != 0
    assert not out.exists()
    done = partial.read_bytes().count(b"\n") - 1
    assert 0 < done < ROWS // 2
    before = partial.read_bytes()[:50_000]
    finished(scoring(folder, out, 2))
    assert_same(out, folder / "one.csv")
    assert before.split(b"\n")[1].decode() in out.read_text(), "what was there is kept, not computed anew"


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_fit_the_detector_of_one(folder, processes, tmp_path):
    """Weights, statistics, calibration and threshold bit by bit, from 21 blocks of training samples."""
    printed = finished(fitting(folder, tmp_path / "m", processes))
    assert printed.count("novel above") == 1
    assert (tmp_path / "m").read_bytes() == (folder / "whole").read_bytes()


def test_a_fit_whose_process_dies_leaves_the_old_file_and_ends(folder, tmp_path):
    out = tmp_path / "m"
    out.write_bytes(b"what was there")
    process = fitting(folder, out, 3)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
        try:
            pid = worker(process.pid, rank=2)
        except (AssertionError, OSError):
            continue
        if "x.npy" in Path(f"/proc/{pid}/maps").read_text():  # it has begun
            os.kill(pid, signal.SIGKILL)
            break
    _, error = process.communicate(timeout=900)
    assert process.returncode != 0, error
    assert "Signal 9" in error
    assert out.read_bytes() == b"what was there"
    # The launcher may kill the process that holds the lock, whose file the next run then takes over and removes.
    assert set(os.listdir(tmp_path)) <= {"m", ".m.lock"}
    finished(fitting(folder, out, 2))
    assert out.read_bytes() == (folder / "whole").read_bytes()
    assert os.listdir(tmp_path) == ["m"]


def test_an_error_of_the_training_process_is_everyones(folder, tmp_path):
    """The others do not wait for weights that never come."""
    broken = ["fit", folder / "x.npy", "--epochs", "-1", "--out", tmp_path / "m"]
    process = torchrun(broken, 2)
    error = process.communicate(timeout=900)[1]
    assert process.returncode != 0
    assert error.count("gradext fit: epochs: expected a positive integer") == 2
    assert os.listdir(tmp_path) == []


def test_several_processes_evaluate_as_one(folder, capsys):
    arguments = ["evaluate", str(folder / "whole"), str(folder / "x.npy"), "--labels", str(folder / "y.npy"), "--json"]
    capsys.readouterr()
    assert main(arguments) == 0
    alone = json.loads(capsys.readouterr().out)
    output = finished(torchrun(arguments, 2))
    assert json.loads(output[output.index("{") :]) == alone  # torch 2.8's Gloo prints who is connected before
    assert alone["normal"] + alone["novel"] == ROWS


def worker(launcher: int, rank: int) -> int:
    """The process id of one of torchrun's workers."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(pid)
    raise AssertionError(f"no worker of rank {rank}")
