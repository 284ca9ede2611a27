"""How long a call keeps the host busy: `python -m benchmarks.host_share [--seconds S] [--top N]` prints two tables.

On a GPU the device works while Python goes on, so that a small model costs what its Python costs. Here the models are
so narrow that nothing else is left on a CPU either: norms from factors beside a plain forward and backward of the same
model, in turns; then where the norms' time goes, file by file, as cProfile sees it, which makes each call dearer.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradext
from gradext.novelty import VAE

from . import measure

B, WIDTH = 4, 6
PACKAGE = Path(gradext.__file__).parent
CALLS = 300  # that are profiled


def models() -> dict[str, nn.Module]:
    """Of the layers of the two models that the aim is set for, in few features."""
    chain = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, WIDTH), nn.Sigmoid())
    return {"two-layer chain": chain, "MNIST VAE": VAE(WIDTH, 5, 3)}


def calls(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """Of one loss, binary cross entropy summed over a sample; ``norm`` alone is of factors that are there."""
    parameters = list(model.parameters())

    def losses() -> Tensor:
        output = model(x)
        output = output if isinstance(output, Tensor) else output[0]
        return F.binary_cross_entropy(output, x, reduction="none").sum(1)

    def watched() -> Tensor:
        with gradext.watch(model, train=True) as watch:
            found = losses()
        found.sum().backward()
        return watch.factors().norm()

    factors = gradext.batch_layer_factors(model, x, loss="bce")
    return {
        "forward and backward": lambda: torch.autograd.grad(losses().sum(), parameters, allow_unused=True),
        "factors and norm": lambda: gradext.batch_layer_factors(model, x, loss="bce").norm(),
        "training step watched, and norm": watched,
        "norm": factors.norm,
    }


def by_file(call: Callable[[], object]) -> Counter[str]:
    """Own microseconds a call of each file of gradext, and of all beside it."""
    call()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(CALLS):
        call()
    profile.disable()
    found: Counter[str] = Counter()
    for (file, _, _), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        path = Path(file)
        inside = path.is_relative_to(PACKAGE)
        found[str(path.relative_to(PACKAGE)) if inside else "torch and Python"] += 1e6 * own / CALLS
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring a model (default: %(default)s)")
    parser.add_argument("--top", type=int, default=8, help="files to list (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    facts = measure.provenance()
    print(f"{facts['machine']}; {facts['versions']}; commit {facts['commit']}; microseconds, lower quartiles\n")
    print("| model | call | µs | of a forward and backward |\n| --- | --- | --- | --- |")
    files = {}
    for name, model in models().items():
        routes = calls(model, torch.rand(B, WIDTH))
        times = measure.in_turns(routes, arguments.seconds)
        floor = times["forward and backward"]["low"]
        for route, found in times.items():
            print(f"| {name} | {route} | {1e3 * found['low']:.0f} | {found['low'] / floor:.2f} |")
        files[name] = by_file(routes["factors and norm"])
    for name, found in files.items():
        whole = sum(found.values())
        print(f"\n{name}: factors and norm under the profiler, {whole:.0f} µs\n")
        print("| file | own µs | share |\n| --- | --- | --- |")
        for file, own in found.most_common(arguments.top):
            print(f"| {file} | {own:.0f} | {own / whole:.0%} |")


if __name__ == "__main__":
    main()
