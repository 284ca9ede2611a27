"""Samples that come batch by batch: `DataLoader`s, data sets, generators. They are read once, in their order.

This file knows nothing of models and scores.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

BLOCK_ROWS, BLOCK_BYTES = 1024, 1 << 27
NO_SAMPLES = (
    "X: expected at least one sample, but got no batch that holds any; a generator gives its batches once only: make a "
    "new one, or pass what can be iterated over again"
)


def rows_at_a_time(features: int) -> int:
    """How many samples are in memory together: `BLOCK_ROWS`, or as many as make `BLOCK_BYTES` in double precision."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (8 * features)))


def comes_in_batches(X: object) -> bool:
    """Whether ``X`` is a `Dataset`, a `DataLoader`, or any other iterable that is neither array nor sequence."""
    if isinstance(X, (Dataset, DataLoader)):
        return True
    return hasattr(X, "__iter__") and not any(hasattr(X, name) for name in ("__getitem__", "__array__", "shape"))


def batches(X) -> Iterator[np.ndarray]:
    """The batches [n, ...] of ``X``; for tuples and lists, such as (sample, label), the first part.

    Raises TypeError for a batch that is not an array, ValueError for one whose shape or type differs from the first.
    """
    loader = DataLoader(X, batch_size=256) if isinstance(X, Dataset) else X
    first = None
    for k, batch in enumerate(loader):
        given = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
        array = as_array(given) if isinstance(given, Tensor) else np.asarray(given)
        if array.ndim < 2 or array.dtype.kind not in "fiub":
            raise TypeError(
                f"X: expected batches [n, D] or [n, ...] of numbers, but batch {k} is {type(batch).__name__}, its "
                f"samples {array.dtype} {list(array.shape)}"
            )
        first = array if first is None else first
        if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
            raise ValueError(
                f"X: expected all batches alike, but the first is {first.dtype} {list(first.shape)} and batch {k} is "
                f"{array.dtype} {list(array.shape)}"
            )
        if len(array):
            yield array


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array, on the CPU; half precision becomes single, which numpy's functions support."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def blocks(X) -> Iterator[np.ndarray]:
    """The same samples in the same order, cut into blocks of `rows_at_a_time`; the last one may be smaller."""
    held: list[np.ndarray] = []
    count = 0
    for batch in batches(X):
        held.append(batch)
        count += len(batch)
        rows = rows_at_a_time(batch[0].size)
        if count >= rows:
            whole = np.concatenate(held)
            cut = count - count % rows
            for start in range(0, cut, rows):
                yield whole[start : start + rows]
            held, count = [whole[cut:]], count - cut
    if count:
        yield np.concatenate(held)


def joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    """``np.concatenate(list(parts))`` in one growing buffer; an empty array for no parts.

    Many small arrays, allocated between larger ones that are freed, would keep the allocator from returning memory.
    """
    buffer, part = bytearray(), np.empty(0)
    for part in parts:
        buffer += part.tobytes()
    return np.frombuffer(buffer, part.dtype).reshape(-1, *part.shape[1:])


def spooled(X) -> np.ndarray:
    """All samples of ``X`` [N, ...], memory-mapped from a temporary file that is deleted with its last use.

    Memory holds one batch at a time, and every row can be read again: training draws rows at random, and rows that are
    held out must stay held out. Raises OSError if the disk is full.
    """
    with tempfile.TemporaryFile(prefix="gradext-") as file:
        count, empty = 0, np.empty(0)
        try:
            for batch in batches(X):
                empty = empty if count else batch[:0]
                file.write(np.ascontiguousarray(batch).data)
                count += len(batch)
            file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                f"X: its samples are kept in a temporary file in {tempfile.gettempdir()}, but "
                f"{os.strerror(error.errno)} after {count} samples; set TMPDIR to a folder on a larger disk, or pass a "
                "memory-mapped .npy"
            ) from error
        if not count:
            raise ValueError(NO_SAMPLES)
        return np.memmap(file, empty.dtype, mode="r", shape=(count, *empty.shape[1:]))
