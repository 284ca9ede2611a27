"""pytorch-ood's gradient detectors against `gradext.novelty.pytorch_ood`: equal values, time and memory of a `predict`.

python -m benchmarks.pytorch_ood                            (prints the table; needs pip install '.[wrappers]')
python -m benchmarks.pytorch_ood --rise CASE DETECTOR HOME  (bytes by which resident memory rises in one call)
"""

from __future__ import annotations

import argparse
import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from . import measure
from .peers import CASES as PEERS_CASES

B = 256
DETECTORS = ("GradNorm", "GradUncertainty")
LIBRARIES = ("pytorch-ood", "gradext")
EXACT, SINGLE = 1e-9, 1e-4  # the relative differences that are let pass, fp64 and fp32
SECONDS = 10.0  # of measuring for a row
HEAD = f"""# pytorch-ood's gradient detectors, theirs and from factors

`predict` of {B} samples in fp32, over all parameters where nothing else is said: medians of calls that take turns in
one process, and how far resident memory rises in one call, each in a process of its own. Difference: the largest
relative one between the scores in fp64; the run ends where it is above {EXACT:g}, or in fp32 above {SINGLE:g}.
pytorch-ood {{pytorch_ood}}, {{versions}}, commit {{commit}}, {{machine}}.
Made by `python -m benchmarks.pytorch_ood`.

| classifier | detector | pytorch-ood, ms | gradext, ms | times as fast | pytorch-ood, MB | gradext, MB | difference |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Case:
    """A classifier, and which of its parameters are scored; None: all, which is pytorch-ood's default."""

    model: Callable[[], nn.Module]
    sample: tuple[int, ...]
    selected: Callable[[str], bool] | None = None


def _perceptron(*sizes: int) -> nn.Module:
    layers = [layer for I, O in itertools.pairwise(sizes) for layer in (nn.Linear(I, O), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


CASES = {
    "784-128-10": Case(lambda: _perceptron(784, 128, 10), (784,)),
    "1024-1024-10": Case(lambda: _perceptron(1024, 1024, 10), (1024,)),
    "1024-1024-1000": Case(lambda: _perceptron(1024, 1024, 1000), (1024,)),
    "1024-1024-1000, last weight": Case(
        lambda: _perceptron(1024, 1024, 1000), (1024,), lambda name: name == "2.weight"
    ),
    "two convolutions, 10 classes": Case(PEERS_CASES["conv"].build, PEERS_CASES["conv"].sample),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the first case alone, for a moment: does it run?")
    parser.add_argument("--rise", nargs=3, metavar=("CASE", "DETECTOR", "HOME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rise:
        case, detector, library = arguments.rise
        call = _call(CASES[case], detector, library)
        call(2)  # lazy imports and the like are not the detector's memory
        print(measure.resident_rise(lambda: call(B)))
        return
    print(HEAD.format(pytorch_ood=measure.version("pytorch-ood"), **measure.provenance()))
    for name, case in list(CASES.items())[: 1 if arguments.smoke else None]:
        for detector in DETECTORS:
            print(_row(name, case, detector, 0.3 if arguments.smoke else SECONDS), flush=True)


def _row(name: str, case: Case, detector: str, seconds: float) -> str:
    difference = _difference(case, detector, torch.float64)
    if max(difference / EXACT, _difference(case, detector, torch.float32) / SINGLE) > 1:
        raise SystemExit(f"{name}, {detector}: the values differ by {difference:g} in fp64")
    calls = {library: _call(case, detector, library) for library in LIBRARIES}
    times = measure.in_turns({library: lambda call=call: call(B) for library, call in calls.items()}, seconds)
    theirs, ours = (times[library]["ms"] for library in LIBRARIES)
    rises = [_short(_rise(name, detector, library) / 1e6) for library in LIBRARIES]
    return (
        f"| {name} | {detector} | {_short(theirs)} | {_short(ours)} | {_short(theirs / ours)} | {' | '.join(rises)} "
        f"| {difference:.0e} |"
    )


def _short(number: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _difference(case: Case, detector: str, dtype: torch.dtype) -> float:
    theirs, ours = (_call(case, detector, library, dtype)(B) for library in LIBRARIES)
    return float(((ours - theirs) / theirs).abs().max())


def _call(case: Case, detector: str, library: str, dtype: torch.dtype = torch.float32) -> Callable[[int], Tensor]:
    """A function of the number of samples, the same numbers for both libraries."""
    torch.manual_seed(0)
    model = case.model().eval().to(dtype)
    x = torch.rand(B, *case.sample, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = getattr(_library(library), detector)(copy.deepcopy(model), param_filter=case.selected)
    return lambda samples: found.predict(x[:samples])


def _library(name: str) -> ModuleType:
    try:
        import torchvision  # noqa: F401  (which pytorch-ood imports)
    except RuntimeError:
        # A build for CUDA beside a torch without it asks for these names when it is imported; nothing here calls them.
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    if name == "gradext":
        from gradext.novelty import pytorch_ood as library
    else:
        import pytorch_ood.detector as library
    return library


def _rise(*arguments: str) -> int:
    command = [sys.executable, "-m", "benchmarks.pytorch_ood", "--rise", *arguments]
    child = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: {child.stderr}")
    return int(child.stdout.split()[-1])


if __name__ == "__main__":
    main()
