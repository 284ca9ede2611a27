"""Passes over data block by block, by one process or by several that divide the blocks.

The result of a pass does not depend on the number of processes, bit for bit: concatenations are in the order of the
blocks, and totals follow one binary tree over the blocks, of which every process computes some branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .batches import joined

T = TypeVar("T")
S = TypeVar("S")


def share(count: int, rank: int, world: int) -> range:
    """The contiguous part of ``range(count)`` for one of ``world`` processes, in their order."""
    return range(count * rank // world, count * (rank + 1) // world)


class Processes:
    """The processes of a `torch.distributed` group, which all make the same calls; None: this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def share(self, count: int) -> range:
        """This process' part of ``range(count)``."""
        return share(count, self.rank, self.world)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.group is None:
            return [value]
        found: list = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    def by_first(self, call: Callable[[], T]) -> T:
        """What ``call()`` returns in the first process; if it raises, all processes raise the same."""
        if self.group is None:
            return call()
        box: list = [None]
        if self.rank == 0:
            try:
                box = [(call(), None)]
            except Exception as error:
                box = [(None, error)]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        value, raised = box[0]
        if raised is not None:
            raise raised
        return value


@dataclass(frozen=True, eq=False)
class Blocks(Generic[T]):
    """``count`` blocks of data, ``read(0)``, ``read(1)``, ..., which the processes divide.

    like: an empty tensor of the type and on the device of the blocks' content.
    """

    read: Callable[[int], T]
    count: int
    like: Tensor
    processes: Processes = field(default_factory=Processes)

    def concatenate(self, function: Callable[[T], Tensor]) -> Tensor:
        """``torch.cat([function(block) for block in blocks])``, in every process, on the CPU."""
        own = joined(function(self.read(k)).cpu().numpy() for k in self.processes.share(self.count))
        return torch.from_numpy(np.concatenate([part for part in self.processes.gather(own) if len(part)]))

    def total(self, function: Callable[[T], S], merge: Callable[[S, S], S]) -> S:
        """``merge`` of ``function(block)`` over all blocks, in every process; neighbours are merged, in their order.

        A process holds at most about ``2 log2(count)`` results at a time. ``merge`` may change its first argument.
        """
        branches: list[tuple[int, int, S]] = []
        for k in self.processes.share(self.count):
            _grow(branches, (0, k, function(self.read(k))), merge)
        tree: list[tuple[int, int, S]] = []
        for branch in itertools.chain.from_iterable(self.processes.gather(branches)):
            _grow(tree, branch, merge)
        value = tree.pop()[2]
        while tree:
            value = merge(tree.pop()[2], value)
        return value


def _grow(branches: list[tuple[int, int, S]], branch: tuple[int, int, S], merge: Callable[[S, S], S]) -> None:
    """Put a branch (level, index, value) after the others: of blocks ``index · 2^level`` to ``(index + 1) 2^level``."""
    level, index, value = branch
    while branches and index % 2 and branches[-1][:2] == (level, index - 1):
        value = merge(branches.pop()[2], value)
        level, index = level + 1, index // 2
    branches.append((level, index, value))
