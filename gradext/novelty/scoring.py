"""Scores of a whole source into a file: in bounded memory, resumable, by one process or several.

Rows are written to ``OUT.partial`` block by block. When all are written, the table appears under its name. A stopped
run resumes after the last whole block. Several processes (`torchrun`) each write a contiguous part of the rows to a
file of their own; the first one joins them in the order of the rows.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..datasets import DatasetError
from ..sources import Block, Source
from . import explain
from .batches import rows_at_a_time
from .detector import NoveltyDetector
from .passes import share
from .scaling import is_image
from .training import ProgressLines
from .writing import atomic_write, check_writable, clear_leftovers

COLUMNS = ("row", "sample", "novelty", "p_value", "novel", "error")
REASON = ("feature", "value", "expected", "share")  # of tables: the feature with the largest residual
FILE_TYPES = (".csv", ".parquet")
ROWS_AT_A_TIME = 1024
MAP_WHITE = 0.25  # of the range of the pixels


def novelties(
    detector: NoveltyDetector, source: Source, rows: np.ndarray | None = None, *, progress: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By block: the requested rows [n]; for those that could be read, their rows [m] and novelties [m]."""
    for asked, block, found in scored_blocks(detector, source, rows, progress=progress):
        yield asked, block.index, found


def scored_blocks(
    detector: NoveltyDetector, source: Source, rows: np.ndarray | None = None, *, progress: bool = True
) -> Iterator[tuple[np.ndarray, Block, np.ndarray]]:
    """By block: the requested rows [n], those that could be read with their samples, and their novelties [m]."""
    rows = np.arange(len(source)) if rows is None else rows
    size = block_rows(detector)
    lines, done = ProgressLines(len(rows), "scoring", "sample", shown=progress, quiet=2.0), 0
    with tqdm(total=len(rows), desc="scoring", unit=" samples", leave=False, disable=None if progress else True) as bar:
        for start in range(0, len(rows), size):
            asked = rows[start : start + size]
            block = source.read(asked)
            found = -detector.score_samples(block.samples) if len(block.index) else np.empty(0)
            yield asked, block, found
            bar.update(len(asked))
            done += len(asked)
            lines.at(done)


def in_finite_numbers(novelty: np.ndarray, threshold: float) -> np.ndarray:
    """Finite numbers in the same order, for metrics and pictures; an overflow is the largest, above the threshold."""
    overflows = np.isposinf(novelty)
    above = np.nextafter(np.max(novelty, where=~overflows, initial=threshold), np.inf)
    return np.where(overflows, above, novelty)


def block_rows(detector: NoveltyDetector) -> int:
    return min(ROWS_AT_A_TIME, rows_at_a_time(detector.n_features_in_))


def shared_rows(detector: NoveltyDetector, N: int, rank: int, world: int) -> np.ndarray:
    """The rows of one process: whole blocks, so that its results are bit for bit those of a single process."""
    size = block_rows(detector)
    blocks = share(-(-N // size), rank, world)
    return np.arange(blocks.start * size, min(N, blocks.stop * size))


def score_to_file(
    detector: NoveltyDetector,
    source: Source,
    out: str | os.PathLike,
    *,
    model_id: str,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    maps: str | os.PathLike | None = None,
) -> Path:
    """Score this process's part of the rows, resuming a stopped run -> its file of rows.

    ``model_id`` identifies the detector: a file of another detector or of other data raises. `finish` makes the table
    of the files of all processes. ``maps``: a folder, into which the `explain.heat` of each image is written.
    """
    check_out(out)
    partial = partial_path(out, rank, world)
    rows = shared_rows(detector, len(source), rank, world)
    head = json.dumps({"model": model_id, "data": source.fingerprint, "rows": len(source), "world": world})
    done = _resume(partial, head)
    due = f"{head}\n" if done is None else ""  # written with the first block
    with _appending(partial) as file:
        tables = not is_image(detector.input_shape_)
        for asked, block, found in scored_blocks(detector, source, rows[done or 0 :], progress=progress):
            p_values = detector.calibration_.p_values(found)
            index, why = block.index, [[""] * len(REASON)] * len(found)
            if tables and len(found):
                # Six digits: further ones depend on how many rows are reconstructed together.
                why = [
                    [r[0].feature, *(f"{number:.6g}" for number in r[0][1:])]
                    for r in explain.reasons(detector, block.samples, k=1)
                ]
            if maps is not None and len(found):
                names = [source.names[row] for row in index.tolist()]
                _write_maps(Path(maps), names, explain.heat(detector, block.samples))
            columns = zip(found.tolist(), p_values.tolist(), why, strict=True)
            values = dict(zip(index.tolist(), columns, strict=True))
            text = io.StringIO(newline="")
            writer = csv.writer(text, lineterminator="\n")
            for row in asked.tolist():
                if row in values:
                    novelty, p, reason = values[row]
                    # repr round-trips: the table holds the same bits as score_samples
                    writer.writerow(
                        [row, source.names[row], repr(novelty), repr(p), int(-novelty < detector.offset_), "", *reason]
                    )
                else:
                    reason = " ".join(source.skipped[row].split())
                    writer.writerow([row, source.names[row], "", "", "", reason, *[""] * len(REASON)])
            _append(file, due + text.getvalue())
            due = ""
    return partial


@contextlib.contextmanager
def _appending(partial: Path) -> Iterator[io.FileIO]:
    """The file; removed if the run fails before anything is written: the corrected command may be another run."""
    with open(partial, "ab", buffering=0) as file:  # a buffer would be tried again when the file is closed
        try:
            yield file
        except BaseException:
            if not os.fstat(file.fileno()).st_size:
                partial.unlink()
            raise


def _append(file: io.FileIO, text: str) -> None:
    content = text.encode()
    try:
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{file.name}: could not be written: {error.strerror or error}") from error


def check_out(out: str | os.PathLike) -> None:
    """Raise ValueError or OSError for a table that cannot be written, before anything is computed."""
    path = Path(out)
    if path.suffix.lower() not in FILE_TYPES:
        raise ValueError(f"--out {path}: expected a file of type {', '.join(FILE_TYPES)}")
    check_writable(path)
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ValueError(f"--out {path}: .parquet needs pyarrow: pip install 'gradext[tables]'") from None


def partial_path(out: str | os.PathLike, rank: int = 0, world: int = 1) -> Path:
    path = Path(out)
    return path.with_name(f"{path.name}.partial" + ("" if world == 1 else f"-{rank}-of-{world}"))


def _resume(partial: Path, head: str) -> int | None:
    """How many rows the file has, after an incomplete last line is cut off; None: there is no file."""
    try:
        content = partial.read_bytes()
    except FileNotFoundError:
        return None
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        partial.unlink()
        return None
    first, _, rows = whole.partition(b"\n")
    if first != head.encode():
        raise DatasetError(
            f"{partial}: left over from a run with another model, other data or another number of processes; "
            "delete it to start anew"
        )
    if len(whole) < len(content):
        os.truncate(partial, len(whole))
    return rows.count(b"\n")


def _write_maps(folder: Path, names: list[str], maps: np.ndarray) -> None:
    """FOLDER/NAME.png of each image: black for a residual of zero, white for the largest.

    White is the largest residual of the picture, but at least `MAP_WHITE`, so that noise stays dark.
    """
    for name, values in zip(names, maps, strict=True):
        path = (folder / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.round(255 * values / max(float(values.max()), MAP_WHITE)).astype(np.uint8)
        Image.fromarray(grey).save(path)


def finish(out: str | os.PathLike, rows: int, world: int = 1, *, reasons: bool = False) -> list[dict]:
    """Join the parts under the name ``out``, delete them, and return the rows that have an error.

    ``reasons``: with the columns of `REASON`. Raises DatasetError if a row is missing or doubled.
    """
    path, columns = Path(out), COLUMNS + (REASON if reasons else ())
    partials = [partial_path(path, rank, world) for rank in range(world)]
    missing = [str(partial) for partial in partials if not partial.exists()]
    if missing:
        raise DatasetError(f"{path}: expected the shares of all processes, but {', '.join(missing)} are not there")
    count, errors = 0, []

    def lines() -> Iterator[list[str]]:
        nonlocal count
        for partial in partials:
            with open(partial, encoding="utf-8", newline="") as file:
                file.readline()
                for line in csv.reader(file):
                    if int(line[0]) != count:
                        raise DatasetError(f"{partial}: expected row {count}, but got row {line[0]}; delete it")
                    count += 1
                    line = line[: len(columns)]
                    if line[len(COLUMNS) - 1]:
                        errors.append(dict(zip(columns, line, strict=True)))
                    yield line
        if count != rows:
            raise DatasetError(f"{path}: expected {rows} rows, but got {count}; run the same command again to go on")

    if path.suffix.lower() == ".csv":
        with atomic_write(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(lines())
    else:
        _write_parquet(path, lines(), columns)
    for partial in partials:
        partial.unlink()
    clear_leftovers(path)
    return errors


def _write_parquet(path: Path, lines: Iterator[list[str]], names: tuple[str, ...]) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {
        "row": pyarrow.int64(),
        "novelty": pyarrow.float64(),
        "p_value": pyarrow.float64(),
        "novel": pyarrow.bool_(),
        **dict.fromkeys(REASON[1:], pyarrow.float64()),
    }
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in names])
    read: dict[str, Callable[[str], object]]
    read = {"row": int, "novelty": float, "p_value": float, "novel": lambda text: text == "1"}
    read |= dict.fromkeys(REASON[1:], float)
    with atomic_write(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        block: list[list] = []

        def write() -> None:
            columns = zip(*block, strict=True)
            writer.write_table(pyarrow.table(dict(zip(names, map(list, columns), strict=True)), schema))
            block.clear()

        for line in lines:
            block.append(
                [read.get(n, str)(value) if value != "" else None for n, value in zip(names, line, strict=True)]
            )
            if len(block) == 1 << 16:
                write()
        if block:
            write()
