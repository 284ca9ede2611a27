"""Twenty planted faults, each of which a named quick test must find: `python -m tests.mutations [ROOM ...]`.

Each fault is one edit of one source file in a copy of the working tree. The named test must pass without the fault and
fail with it. Prints a table, and fails if a fault, or its line in the file, is not found. A fault in C++ builds the
compiled module again. Rooms: core, operators, detector, data.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    room: str
    what: str
    file: str
    line: str
    fault: str
    tests: str  # a file, and after a space an expression for -k


FAULTS = (
    Fault(
        "core", "requires_grad is not restored", "gradext/watch.py",
        "stack.callback(parameter.requires_grad_, False)", "pass",
        "core/test_watch.py leaves_the_model_and_torch",
    ),
    Fault(
        "core", "the proof of rows accepts everything", "gradext/rows.py",
        "return ~(difference > scale[owners]", "return ~(difference > math.inf * scale[owners]",
        "core/test_cases.py mix",
    ),
    Fault(
        "core", "the weights of a training step's losses stay in its gradients", "gradext/backward.py",
        "scale, done = self.weights.reciprocal(), set()", "scale, done = torch.ones_like(self.weights), set()",
        "core/test_watch.py training",
    ),
    Fault(
        "core", "the dilation of a convolution is ignored", "gradext/rules.py",
        "Windows(kernel, stride, dilation, pads)", "Windows(kernel, stride, (1,) * dimensions, pads)",
        "core/test_zoo.py dilat",
    ),
    Fault(
        "core", "binary cross entropy begins with the wrong sign", "gradext/losses.py",
        "gradient = _widened(output) - target", "gradient = target - _widened(output)",
        "core/test_losses.py saturates",
    ),
    Fault(
        "core", "the fallback gives every gradient to the first sample", "gradext/fallback.py",
        "found[k][b] = dense(g)", "found[k][0] += dense(g)",
        "core/test_fallback.py cannot_be_seen",
    ),
    Fault(
        "core", "samples that mix are not refused", "gradext/fallback.py",
        "int(count.max()) > 1", "int(count.max()) > len(gradient)",
        "core/test_fallback.py mixes",
    ),
    Fault(
        "core", "exclude= leaves nothing out by pattern", "gradext/selection.py",
        "or fnmatch.fnmatchcase(name, item)]", "or name == item]",
        "core/test_watch.py layers_and_exclude",
    ),
    Fault(
        "core", "the last samples of a batch are dropped", "gradext/streaming.py",
        "range(0, parts.count, size)", "range(0, parts.count - size + 1, size)",
        "core/test_streaming.py",
    ),
    Fault(
        "operators", "half of the Gram matrix is counted once", "gradext/backends/reference.py",
        "alpha=2)", "alpha=1)",
        "ops/test_ops.py norms",
    ),
    Fault(
        "operators", "the C++ kernel leaves out the end of a row", "csrc/cpu/outer_kernel.cpp",
        "if (tail > 0) to_stage(tail);", "if (tail > 1) to_stage(tail);",
        "ops/test_native.py",
    ),
    Fault(
        "operators", "the threads of the C++ kernel skip the last part", "csrc/cpu/outer.cpp",
        "parallel(threads, parts, work);", "parallel(threads, parts - 1, work);",
        "ops/test_native.py",
    ),
    Fault(
        "operators", "the Triton kernel writes beyond the end of a row", "gradext/kernels/outer.py",
        "mask=(o < O)[:, None] & (i < I)[None, :], cache", "mask=(o < O)[:, None] & (i >= 0)[None, :], cache",
        "ops/test_triton.py operators and few",
    ),
    Fault(
        "operators", "gradients are clipped by the wrong side", "gradext/factors/numerics.py",
        ".clamp_max(1)", ".clamp_min(1)",
        "core/test_statistics.py clipped_sums",
    ),
    Fault(
        "detector", "p-values do not count the sample itself", "gradext/novelty/calibration.py",
        "return (1 + above) / (len(self.scores) + 1)", "return above / len(self.scores)",
        "novelty/test_calibration.py p_value",
    ),
    Fault(
        "detector", "a score of equal size is called novel", "gradext/novelty/detector.py",
        "return threshold + 1e-9 * abs(threshold)", "return threshold - 1e-9 * abs(threshold)",
        "novelty/test_calibration.py",
    ),
    Fault(
        "detector", "the last epoch is kept, not the best", "gradext/novelty/training.py",
        "    model.load_state_dict(best)\n", "",
        "novelty/test_novelty.py train",
    ),
    Fault(
        "detector", "a score takes the norm's square", "gradext/novelty/scores.py",
        ".clamp_min(0).sqrt()", ".clamp_min(0)",
        "novelty/test_novelty.py formula",
    ),
    Fault(
        "data", "the test part is in the training part", "gradext/datasets.py",
        "in_test, in_validation = part == fold, part == (fold + 1) % FOLDS",
        "in_test, in_validation = part == fold, part == fold",
        "novelty/test_datasets.py split",
    ),
    Fault(
        "data", "an --out that is an input by a link is overwritten", "gradext/novelty/writing.py",
        "path.samefile(source)", "path == source",
        "novelty/test_commands.py input",
    ),
)  # fmt: skip


def passes(tree: Path, tests: str) -> tuple[bool, str]:
    """Whether the tests pass, and pytest's last line."""
    file, _, expression = tests.partition(" ")
    command = [sys.executable, "-m", "pytest", "-c", str(tree / "pyproject.toml"), "--rootdir", str(tree), "-qx"]
    command += ["-m", "not slow and not peers and not zoo", str(tree / "tests" / file)]
    command += ["-k", expression] if expression else []
    result = subprocess.run(
        command, cwd=tree.parent, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True
    )
    last = (result.stdout.strip().splitlines() or [result.stderr.strip()[-200:]])[-1]
    if result.returncode not in (0, 1):
        raise SystemExit(f"{tests}: {last}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.returncode == 0, last


def build(tree: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree, env=os.environ | {"GRADEXT_CUDA": "0"}, check=True, capture_output=True,
    )  # fmt: skip


def copy_of_the_tree(folder: Path) -> Path:
    tree = folder / "tree"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    build(tree)
    return tree


def verdict(tree: Path, fault: Fault) -> str:
    path = tree / fault.file
    text = path.read_text()
    if text.count(fault.line) < 1:
        return "line not found"
    found, last = passes(tree, fault.tests)
    if not found:
        return f"fails without the fault: {last}"
    try:
        path.write_text(text.replace(fault.line, fault.fault, 1))
        if path.suffix == ".cpp":
            build(tree)
        return "NOT FOUND" if passes(tree, fault.tests)[0] else "found"
    finally:
        path.write_text(text)
        if path.suffix == ".cpp":
            build(tree)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help="core, operators, detector, data (default: all)")
    rooms = parser.parse_args(argv).rooms
    chosen = [fault for fault in FAULTS if not rooms or fault.room in rooms]
    missed = 0
    print("| room | fault | file | tests | verdict | s |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_the_tree(Path(folder))
        for fault in chosen:
            start = time.monotonic()
            said = verdict(tree, fault)
            missed += said != "found"
            cells = (fault.room, fault.what, fault.file, fault.tests, said, f"{time.monotonic() - start:.0f}")
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
