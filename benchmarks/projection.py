"""How well random projections keep inner products of gradients: `python -m benchmarks.projection [--out FILE]`.

`LayerFactors.project` of GPT-2 (`benchmarks.models`) by ranks, over seeds: the error of inner products of 16 samples'
gradients, relative to the product of their norms, beside the bound that the docstring states.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import gradext

from . import measure, models
from .peers import Problem

RANKS, SEEDS = (4, 8, 16, 32, 64, 128, 256), 16


def bound(factors: gradext.LayerFactors, rank: int) -> torch.Tensor:
    """The standard deviation of the error at most, relative to ‖G_b‖‖G_c‖ -> [B, B]."""
    variance, norms = 0.0, factors.norm()
    for layer in factors.values():
        O, I = layer.shape[1:]
        r, s = (rank if rank < n else float("inf") for n in (O, I))
        squares = layer.sq_norm() / norms.square()
        variance = variance + (2 / r + 2 / s + 4 / (r * s)) * squares[:, None] * squares
    return variance.sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projection", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()
    problem = Problem(models.CASES["GPT-2"], 16)
    arguments = {"loss": problem.case.loss, "target": problem.target}
    factors = gradext.batch_layer_factors(problem.trainable(), problem.x, **arguments)
    gram, norms = factors.gram(), factors.norm()
    off = ~torch.eye(16, dtype=torch.bool)
    size = sum(p.numel() for p in problem.trainable().parameters())
    lines = [
        "# Inner products of projected gradients",
        "",
        f"Made by `python -m benchmarks.projection` at {measure.provenance()['commit']}, torch {torch.__version__}: "
        f"GPT-2 with random weights, {size:,} numbers a gradient, 16 samples of 64 random tokens, {SEEDS} seeds. The "
        "error of ⟨G, H⟩ relative to ‖G‖‖H‖, as the root of its mean square over seeds and pairs of different samples; "
        "its bound; the error of ‖G‖² relative to itself; the rank correlation of inner products.",
        "",
        "| rank | numbers a sample | error | bound | error of squares | rank correlation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rank in RANKS:
        errors, correlations = [], []
        for seed in range(SEEDS):
            projected = factors.project(rank, seed=seed)
            found = projected @ projected.mT
            errors.append((found - gram) / (norms[:, None] * norms))
            order = [g[off].argsort().argsort().double() for g in (found, gram)]
            correlations.append(torch.corrcoef(torch.stack(order))[0, 1])
        error, most = torch.stack(errors), bound(factors, rank)
        of_norms = error.diagonal(dim1=1, dim2=2).square().mean().sqrt()
        cells = (error[:, off].square().mean().sqrt(), most[off].square().mean().sqrt(), of_norms)
        numbers = " | ".join(f"{value:.1e}" for value in cells)
        lines.append(f"| {rank} | {projected.shape[1]:,} | {numbers} | {torch.stack(correlations).mean():.2f} |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
