"""Data attribution: which training samples help or harm a prediction, by projected gradients in one memory map.

    python -m experiments.attribution

`write` goes through a training set once and puts each sample's projected gradient into a row of a file, as they come;
stopped, it goes on where it was. `query` goes through the file in blocks. The score of a training sample is the inner
product of its gradient with the test sample's: what a step on it takes off the test loss (Pruthi et al., "Estimating
training data influence by tracing gradient descent", NeurIPS 2020). Where the rank is full it is exact.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import gradext

from .influence import losses, mislabelled


def projected(model: nn.Module, batch: tuple[Tensor, ...], losses: Callable, rank: int, seed: int) -> Tensor:
    """The projected gradients of ``losses(model, *batch)`` [B] -> [B, K], the same projection for all batches."""
    with gradext.watch(model) as watch:
        found = losses(model, *batch)
    return watch.factors(found).project(rank, seed=seed).float().cpu()


def write(path: Path, model, batches: Iterable, losses: Callable, *, count: int, rank: int, seed: int = 0) -> np.memmap:
    """Rows [count, K] of ``path``, an .npy file, one for each sample of ``batches`` (tuples of tensors) in their order.

    Beside it lies ``path.json``: how many rows are done, and of which model. Raises ValueError where it is another one.
    """
    state = Path(f"{path}.json")
    weights = [zlib.crc32(p.detach().cpu().flatten().view(torch.uint8).numpy()) for p in model.parameters()]
    run = {"rank": rank, "seed": seed, "count": count, "weights": weights}
    before = json.loads(state.read_text()) if state.exists() else {"run": run, "done": 0}
    if before["run"] != run:
        raise ValueError(f"{path}: expected rows of this model, rank and seed, but it holds others; take another path")
    done, end, rows = before["done"], 0, None
    for batch in batches:
        start, end = end, end + len(batch[0])
        if end <= done or end > count:
            continue
        part = projected(model, batch, losses, rank, seed)
        if rows is None:
            rows = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float32, (count, part.shape[1]))
        rows[start:end] = part
        rows.flush()
        Path(f"{state}.new").write_text(json.dumps({"run": run, "done": end}))
        os.replace(f"{state}.new", state)
    if end != count:
        raise ValueError(f"count: expected the number of samples, which is {end}, but got {count}")
    return np.load(path, mmap_mode="r")


def query(path: Path, projections: Tensor, k: int, block: int = 4096) -> tuple[Tensor, Tensor]:
    """The k most helpful and the k most harmful training samples of each row [M, K], best and worst first -> [M, k]."""
    rows, M = np.load(path, mmap_mode="r"), len(projections)
    best = {sign: (torch.empty(M, 0), torch.empty(M, 0, dtype=torch.long)) for sign in (1, -1)}
    for start in range(0, len(rows), block):
        scores = projections @ torch.from_numpy(np.array(rows[start : start + block])).mT
        index = torch.arange(start, start + scores.shape[1]).expand(M, -1)
        for sign, (values, found) in best.items():
            values, found = torch.cat([values, sign * scores], 1), torch.cat([found, index], 1)
            top = values.topk(min(k, values.shape[1]), dim=1)
            best[sign] = top.values, found.gather(1, top.indices)
    return best[1][1], best[-1][1]


def main() -> None:
    model, train, test, wrong = mislabelled()
    exact = None
    print("rank  numbers  rank correlation  10 most helpful found  wrong labels of the 10 most harmful")
    with tempfile.TemporaryDirectory() as folder:
        for rank in 64, 32, 16, 8, 4:
            path, batches = Path(folder) / f"{rank}.npy", zip(*(part.split(100) for part in train), strict=True)
            rows = write(path, model, batches, losses, count=len(wrong), rank=rank)
            tests = projected(model, test, losses, rank, 0)
            helpful, harmful = query(path, tests, 10)
            scores = (tests @ torch.from_numpy(np.array(rows)).mT).numpy()
            exact = exact or (scores, helpful)
            spearman = np.mean([spearmanr(*pair).statistic for pair in zip(scores, exact[0], strict=True)])
            same = (helpful[:, :, None] == exact[1][:, None]).any(2).float().mean()
            found = wrong[harmful].float().mean()
            print(f"{rank:4}  {rows.shape[1]:7}  {spearman:16.2f}  {same:21.0%}  {found:35.0%}")


if __name__ == "__main__":
    main()
