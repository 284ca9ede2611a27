"""Samples to fit and score: image folders, arrays, tables, and the standard data sets by name.

A `Source` reads its samples in blocks of rows, so that memory holds one block and not the whole set. This file must
know nothing about models, gradients or torch.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import datasets
from .datasets import DatasetError

TEXT_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
TABLES = (*TEXT_TABLES, ".parquet")
ARRAYS = (".npy", ".npz")
MODES = ("L", "RGB")
AUTO_SIDE = 64  # the longer side that photos are brought to where no size is said
GOOD, GROUND_TRUTH = "good", "ground_truth"  # names of an inspection root: train/good, test/*, ground_truth/*
# A file that unpacks to more than both is treated as a decompression bomb: useful data do not compress so well.
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200


@dataclass(frozen=True)
class ImageFormat:
    """The common format of all images: height and width in pixels, mode "L" (grey) or "RGB", bits a channel.

    resize: whether images of other sizes are resized, or refused; pad: whether resizing keeps the proportions and adds
    black edges. bits: 8, or for grey images 16, whose levels are kept.
    """

    height: int
    width: int
    mode: str
    resize: bool = False
    pad: bool = False
    bits: int = 8

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= 1 << 16:
                raise DatasetError(f"image {name}: expected 1 to {1 << 16} pixels, got {value!r}")
        if self.mode not in MODES:
            raise DatasetError(f"image mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        for name in ("resize", "pad"):
            if type(getattr(self, name)) is not bool:
                raise DatasetError(f"image {name}: expected true or false, got {getattr(self, name)!r}")
        if type(self.bits) is not int or self.bits not in (8, 16) or (self.bits == 16 and self.mode != "L"):
            raise DatasetError(f"image bits: expected 8, or 16 of grey images, got {self.bits!r} of {self.mode}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) or (3, H, W)."""
        return (self.height, self.width) if self.mode == "L" else (3, self.height, self.width)

    def __str__(self) -> str:
        return f"{self.height}x{self.width} {self.mode}{' of 16 bits' if self.bits == 16 else ''}"


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of a source: their indices [n], and the samples [n, ...] (an array or a data frame)."""

    index: np.ndarray
    samples: Any  # an array or a data frame


@dataclass(eq=False)
class Source:
    """N samples by row. names: one a row; labels: one a row, as text, or None; skipped: row -> why it is left out.

    normal: the labels that are normal, if the data say so; masks: row -> an image that is not black where the sample is
    novel; notes: decisions about the data, to be printed.
    """

    names: Sequence[str]
    labels: np.ndarray | None
    fingerprint: str  # the same as long as nobody changes the data
    skipped: dict[int, str] = field(default_factory=dict)
    image_format: ImageFormat | None = None
    normal: tuple[str, ...] | None = None
    masks: dict[int, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        raise NotImplementedError

    def blocks(self, rows: np.ndarray, size: int) -> Iterator[Block]:
        """The given rows in their order, at most ``size`` at a time; rows that had to be skipped are not among them."""
        for start in range(0, len(rows), size):
            yield self.read(rows[start : start + size])

    def read(self, rows: np.ndarray) -> Block:
        raise NotImplementedError

    def samples(self, rows: np.ndarray) -> Any:
        """The samples of the given rows as `NoveltyDetector.fit` takes them: batches of them, read when asked for."""
        return (block.samples for block in self.blocks(rows, 256) if len(block.index))


class _Numbered(Sequence):
    """The names "0", "1", ... of N rows, made when asked for: they can be larger than the rows."""

    def __init__(self, N: int) -> None:
        self._rows = range(N)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row):
        return [str(k) for k in self._rows[row]] if isinstance(row, slice) else str(self._rows[row])


@dataclass(eq=False)
class ArraySource(Source):
    """Rows of an array in memory or mapped, or of a data frame."""

    rows: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape[1:]

    def read(self, rows: np.ndarray) -> Block:
        taken = self.rows.iloc[rows] if hasattr(self.rows, "iloc") else self.rows[rows]
        return Block(rows, taken)

    def samples(self, rows: np.ndarray) -> Any:
        """The array or data frame itself, or a part of it; of a map batches, so that no part need be in memory."""
        if len(rows) == len(self):
            return self.rows
        return super().samples(rows) if isinstance(self.rows, np.memmap) else self.read(rows).samples


@dataclass(eq=False, kw_only=True)
class ImageFolder(Source):
    """Image files, decoded when their rows are read."""

    image_format: ImageFormat
    root: Path = Path()
    skip_unreadable: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image_format.shape

    def read(self, rows: np.ndarray) -> Block:
        kept, images, failed = [], [], {}
        for row in rows.tolist():
            try:
                images.append(read_image(self.root / self.names[row], self.image_format))
                kept.append(row)
            except DatasetError as error:
                failed[row] = str(error)
        if failed and not self.skip_unreadable:
            some = "; ".join([*list(failed.values())[:3], *(["and others"] if len(failed) > 3 else [])])
            raise DatasetError(
                f"{len(failed)} of {len(rows)} images cannot be used: {some}. "
                "Mend or remove them, or pass --skip-unreadable"
            )
        self.skipped |= failed
        kind = np.uint16 if self.image_format.bits == 16 else np.uint8
        samples = np.stack(images) if images else np.empty((0, *self.image_format.shape), kind)
        return Block(np.asarray(kept, np.int64), samples)


def open_source(
    data: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    labels: str | None = None,
    image_format: ImageFormat | None = None,
    size: tuple[int, int] | None = None,
    mode: str | None = None,
    skip_unreadable: bool = False,
    pad: bool = False,
    auto_size: bool = False,
    part: str | None = None,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    fitted_columns: Sequence[str] | None = None,
) -> Source:
    """The samples that ``data`` names.

    A folder of images in any format that Pillow reads, nested or not, or one image; ``.npy`` (memory-mapped), ``.npz``
    (its array ``X``, or its only one); a table of numeric columns (``.csv`` or ``.tsv`` with any separator, with
    decimal commas, compressed or not; ``.parquet``); or a set of `datasets.NAMES`, such as ``mnist``, ``mnist:train``,
    ``mnist:test``.
    An inspection root (``train/good``, ``test/*``, ``ground_truth/*``) gives its training images for ``part="train"``
    and its test images, with their masks, for ``part="test"``.

    ``labels``: where each row's label is found: a column of the table, an array of the ``.npz``, or a file (``.npy``,
    or text with one a line). Without it: the folder below ``data`` that an image is in, the ``y`` of an ``.npz``, the
    classes of a set.
    ``image_format``: what images are brought to; None: ``size`` (height, width) and ``mode``, or those of the first
    readable image, which all others must then have; with ``auto_size``, photos larger than `AUTO_SIDE`, or of several
    sizes, are brought to it. ``pad``: with black edges in place of other proportions.
    ``columns``, ``drop``: the columns of a table to take, or to leave out; ``fitted_columns``: those of a model, taken
    where a table has them all.

    Raises DatasetError for what is missing, of no known kind, or does not fit.
    """
    text = os.fspath(data)
    path = Path(text)
    name, _, named_part = text.partition(":")
    if name in datasets.NAMES and not path.exists():
        return _standard_set(name, named_part, data_dir)
    images: dict[str, Any] = {
        "size": size, "mode": mode, "skip_unreadable": skip_unreadable, "pad": pad, "auto_size": auto_size,
    }  # fmt: skip
    if path.is_dir():
        return _image_folder(path, labels, image_format, part=part, **images)
    if not path.is_file():
        raise DatasetError(
            f"{text}: expected a folder of images, a file ({', '.join(ARRAYS + TABLES)}), or one of "
            f"{', '.join(datasets.NAMES)}, but there is nothing of that name"
        )
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        return _array_file(path, labels)
    if suffix == ".parquet" or _is_text_table(path):
        return _table(path, labels, columns, drop, fitted_columns)
    if suffix in _image_suffixes() or suffix in HEIC:
        return _image_folder(path.parent, labels, image_format, only=path, **images)
    raise DatasetError(
        f"{text}: expected a file of type {', '.join(ARRAYS + TABLES)}, or an image, got {suffix or 'no suffix'}"
    )


def _is_text_table(path: Path) -> bool:
    return path.name.lower().endswith(TEXT_TABLES)


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _stamp(path: Path) -> str:
    """Size and times. The time of the last status change cannot be set: it differs for a file that was replaced."""
    status = path.stat()
    return f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _content(path: Path) -> str:
    """A digest of a file: of its whole content up to 64 MB; of larger ones of 64 parts, with the stamp."""
    digest, size = hashlib.sha256(), path.stat().st_size
    if size <= 1 << 26:
        digest.update(path.read_bytes())
        return f"{path} {size} {digest.hexdigest()}"
    with open(path, "rb") as file:
        for k in range(64):
            file.seek(k * (size - (1 << 20)) // 63)
            digest.update(file.read(1 << 20))
    return f"{_stamp(path)} {digest.hexdigest()}"


def _standard_set(name: str, part: str, data_dir) -> Source:
    image_set = datasets.load(name, data_dir)
    parts = {"": slice(None)}
    if image_set.train is not None:
        parts |= {"train": slice(image_set.train), "test": slice(image_set.train, None)}
    if part not in parts:
        named = ", ".join(p for p in parts if p)
        raise DatasetError(f"{name}: expected {f'one of the parts {named}' if named else 'no part'}, got {part!r}")
    chosen = parts[part]
    images = image_set.images[chosen] if image_set.scale == 255 else image_set.pixels(chosen)
    first = chosen.start or 0
    return ArraySource(
        names=[f"{name}/{first + k}" for k in range(len(images))],
        labels=image_set.labels[chosen].astype(str),
        fingerprint=_fingerprint(name, part, hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()),
        rows=images,
    )


def _array_file(path: Path, labels: str | None) -> Source:
    try:
        content = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
        if isinstance(content, np.ndarray):
            array, others = content, {}
        else:
            with content:
                _refuse_bomb(path, sum(member.file_size for member in content.zip.infolist()))
                others = {key: np.asarray(content[key]) for key in content.files}  # what is no array is bytes there
            array = _main_array(path, others, labels)
    except DatasetError:
        raise
    except Exception as error:  # zipfile, zlib, struct and numpy each have their own
        raise DatasetError(f"{path}: damaged, or not an array of numbers: {error}") from error
    if array.ndim < 2 or array.size == 0:
        raise DatasetError(f"{path}: expected an array [N, D] or [N, ...], N >= 1, got {list(array.shape)}")
    if array.dtype.kind not in "fiub":
        raise DatasetError(f"{path}: expected an array of numbers, got one of {array.dtype}")
    if labels is None:
        given = others.get("y")
    elif labels in others:
        given = others[labels]
    else:
        given = _label_file(Path(labels), path)
    return ArraySource(
        names=_Numbered(len(array)),
        labels=_as_labels(given, len(array), str(path)),
        fingerprint=_fingerprint(_content(path)),
        rows=array,
    )


def _refuse_bomb(path: Path, unpacked: int) -> None:
    size = path.stat().st_size
    if unpacked > max(BOMB_BYTES, BOMB_RATIO * size):
        raise DatasetError(f"{path}: a decompression bomb? It unpacks from {size} bytes to {unpacked}")


def _main_array(path: Path, arrays: dict[str, np.ndarray], labels: str | None) -> np.ndarray:
    if "X" in arrays:
        return arrays["X"]
    candidates = [key for key in arrays if key not in ("y", labels)]
    if len(candidates) != 1:
        raise DatasetError(f"{path}: expected an array named X, or a single one, got {candidates}")
    return arrays[candidates[0]]


def _label_file(path: Path, data: Path) -> np.ndarray:
    if not path.is_file():
        raise DatasetError(f"--labels {path}: expected a column or array of {data}, or a file, got neither")
    if path.suffix.lower() == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except Exception as error:  # tokenize's and others, from the header
            raise DatasetError(f"--labels {path}: damaged, or not an array: {error}") from error
    try:
        return np.asarray(path.read_text(encoding="utf-8").splitlines(), dtype=str)
    except UnicodeDecodeError as error:
        raise DatasetError(f"--labels {path}: expected text, one label a line: {error}") from error


def _as_labels(values, N: int, where: str) -> np.ndarray | None:
    if values is None:
        return None
    values = np.asarray(values)
    if values.shape != (N,):
        raise DatasetError(f"{where}: expected {N} labels, one a row, got shape {list(values.shape)}")
    if values.dtype.kind == "f" and (values == values.round()).all():
        values = values.astype(np.int64)
    return np.char.strip(values.astype(str))


def _table(
    path: Path,
    labels: str | None,
    columns: Sequence[str] | None,
    drop: Sequence[str],
    fitted_columns: Sequence[str] | None,
) -> Source:
    try:
        import pandas
    except ImportError:
        raise DatasetError(
            f"{path}: tables need pandas (and pyarrow for .parquet): pip install 'gradext[tables]'"
        ) from None
    try:
        if _is_text_table(path):
            separator, decimal = _dialect(path)
            _refuse_bomb(path, 8 * _cells(path, separator))
            frame = pandas.read_csv(path, sep=separator, decimal=decimal)
        else:
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as file:
                _refuse_bomb(path, 8 * file.metadata.num_rows * file.metadata.num_columns)
            frame = pandas.read_parquet(path)
    except ImportError as error:
        raise DatasetError(f"{path}: .parquet needs pyarrow: pip install 'gradext[tables]'") from error
    except DatasetError:
        raise
    except Exception as error:  # pandas and pyarrow have many of their own
        raise DatasetError(f"{path}: damaged, or not a table: {error}") from error
    frame.columns = [str(c) for c in frame.columns]
    notes = []
    given = None
    if labels is not None:
        given = frame.pop(labels).to_numpy() if labels in frame.columns else _label_file(Path(labels), path)
    unknown = [c for c in (*(columns or ()), *drop) if c not in frame.columns and c != labels]
    if unknown:
        raise DatasetError(
            f"{path}: --columns and --drop: expected some of {_some(frame.columns)}, got {', '.join(unknown)}"
        )
    frame = frame[[c for c in (frame.columns if columns is None else columns) if c not in drop and c != labels]]
    fitted = None if fitted_columns is None else [str(c) for c in fitted_columns]
    if columns is None and fitted is not None and set(fitted) <= set(frame.columns):
        others = [c for c in frame.columns if c not in fitted]
        if others:
            notes.append(f"{path}: columns that the model does not know are left out: {_some(others)}")
        frame = frame[fitted]
    elif columns is None and fitted is not None:
        missing = [c for c in fitted if c not in frame.columns]
        raise DatasetError(
            f"{path}: expected the columns of the model, {_some(fitted)}, but has no {_some(missing)}; name them alike"
        )
    elif columns is None and len(frame.columns) > 1 and _is_row_number(frame.iloc[:, 0], frame.columns[0]):
        notes.append(f"{path}: the column {frame.columns[0]!r} counts the rows and is left out; --columns takes it in")
        frame = frame.iloc[:, 1:]
    if not frame.columns.is_unique:
        doubled = frame.columns[frame.columns.duplicated()][0]
        raise DatasetError(f"{path}: expected columns of different names, got {doubled!r} twice")
    text = [c for c in frame.columns if frame[c].dtype.kind not in "fiub"]
    if text and len(frame):
        raise DatasetError(
            f"{path}: expected numeric columns, got {_some(text)} with values such as {str(frame[text[0]].iloc[0])!r}; "
            f"leave them out by --drop {' '.join(text[:5])}, name one with --labels, or write one column of 0 and 1 "
            "for each value"
        )
    gaps = [(c, ~np.isfinite(frame[c].to_numpy(np.float64, na_value=np.nan))) for c in frame.columns]
    gaps = [(c, rows) for c, rows in gaps if rows.any()]
    if gaps:
        column, rows = gaps[0]
        raise DatasetError(
            f"{path}: expected numbers in all cells, but {_some([c for c, _ in gaps])} has empty or infinite ones, "
            f"{column} in {rows.sum()} of {len(frame)} rows, first in row {rows.argmax()}; fill them, remove these "
            f"rows, or leave the column out by --drop {column}"
        )
    if frame.empty:
        raise DatasetError(f"{path}: expected at least one row and one column, got {list(frame.shape)}")
    return ArraySource(
        names=_Numbered(len(frame)),
        labels=_as_labels(given, len(frame), str(path)),
        fingerprint=_fingerprint(_content(path), list(frame.columns)),
        rows=frame,
        notes=notes,
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def _is_row_number(column: Any, name: str) -> bool:
    """Whether a first column is the index that pandas wrote: without a name of its own, 0, 1, 2, ..."""
    unnamed = name.startswith("Unnamed:") or name.strip().lower() in ("", "index")
    return unnamed and column.dtype.kind in "iu" and bool((column.to_numpy() == np.arange(len(column))).all())


def _opened_text(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _dialect(path: Path) -> tuple[str, str]:
    """(separator, decimal point) of a table of text, from its first lines.

    The separator is the one that splits them into the most cells, the same number in each; commas between digits are
    decimal commas where something else separates.
    """
    with _opened_text(path) as file:
        lines = file.read(1 << 16).decode("utf-8", "replace").splitlines()
    lines = [line for line in (lines[:-1] if len(lines) > 20 else lines) if line.strip()][:200]
    best, cells = ",", 1
    for separator in (",", ";", "\t", "|"):
        counts = {line.count(separator) for line in lines}
        if len(counts) == 1 and min(counts) >= cells:
            best, cells = separator, min(counts) + 1
    commas = best != "," and any(
        re.fullmatch(r"-?\d+,\d+(?:[eE][-+]?\d+)?", cell.strip()) for line in lines[1:] for cell in line.split(best)
    )
    return best, "," if commas else "."


def _cells(path: Path, separator: str) -> int:
    """About how many cells a table of text has: rows may be shorter than the first."""
    with _opened_text(path) as file:
        columns = file.readline().count(separator.encode()) + 1
        return columns * (1 + sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b"")))


# --- images ----------------------------------------------------------------------------------------------------------


HEIC = (".heic", ".heif")


def _image_suffixes() -> set[str]:
    from PIL import Image

    return set(Image.registered_extensions())


def _files(root: Path) -> list[Path]:
    """All files below a folder that are not hidden; links to folders are followed, each folder once."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _image_folder(
    root: Path,
    labels: str | None,
    image_format: ImageFormat | None,
    *,
    size: tuple[int, int] | None,
    mode: str | None,
    skip_unreadable: bool,
    pad: bool,
    auto_size: bool,
    part: str | None = None,
    only: Path | None = None,
) -> Source:
    if labels is not None:
        raise DatasetError(f"--labels {labels}: an image's label is the folder it is in; leave --labels out")
    notes: list[str] = []
    start, inspection = root, part in ("train", "test") and _is_inspection_root(root)
    if inspection:
        start = root / str(part)
        kept = f"{root.name}/{part}"
        notes.append(f"{root}: an inspection folder; {kept} is taken, {GOOD!r} is normal")
    files = [only] if only is not None else _files(start)
    known = _image_suffixes()
    if any(p.suffix.lower() in HEIC for p in files) and not known & set(HEIC):
        known |= _heif_suffixes(root, skip_unreadable, notes)
    paths = [p for p in files if p.suffix.lower() in known]
    others = [p for p in files if p.suffix.lower() not in known]
    if not paths:
        raise DatasetError(f"{root}: expected image files, got {len(files)} files, none with an image's suffix")
    if others:
        warnings.warn(
            f"{root}: {len(others)} files have no image's suffix and are left out: "
            f"{', '.join(str(p.relative_to(root)) for p in others[:3])}{', ...' if len(others) > 3 else ''}",
            stacklevel=2,
        )
    if image_format is None:
        if size is None and auto_size:
            size = _auto_size(paths, notes)
        image_format = _first_format(paths, size, mode, pad)
    names = [p.relative_to(root).as_posix() for p in paths]
    odd = [name for name in names if not name.isprintable()]
    if odd:
        raise DatasetError(f"{root}: expected names of printable characters, got {odd[0]!r}; rename {len(odd)} files")
    folders = np.asarray([name.rpartition("/")[0].rpartition("/")[2] for name in names])
    return ImageFolder(
        names=names,
        labels=folders if (folders != "").all() else None,
        fingerprint=_fingerprint(image_format, *map(_stamp, paths)),
        image_format=image_format,
        root=root,
        skip_unreadable=skip_unreadable,
        normal=(GOOD,) if inspection else None,
        masks=_masks(root, names) if inspection and part == "test" else {},
        notes=notes,
    )


def _is_inspection_root(root: Path) -> bool:
    """train/good and a folder test, as of MVTec AD and its kin."""
    return (root / "train" / GOOD).is_dir() and (root / "test").is_dir()


def _masks(root: Path, names: Sequence[str]) -> dict[int, Path]:
    """Of the test images that have one: ``ground_truth/KIND/NAME_mask.png`` or ``ground_truth/KIND/NAME.png``."""
    found = {}
    for row, name in enumerate(names):
        below = Path(*Path(name).parts[1:])
        for stem in (f"{below.stem}_mask", below.stem):
            matches = sorted((root / GROUND_TRUTH / below.parent).glob(f"{glob.escape(stem)}.*"))
            if matches:
                found[row] = matches[0]
                break
    return found


def _heif_suffixes(root: Path, skip_unreadable: bool, notes: list[str]) -> set[str]:
    try:
        import pillow_heif
    except ImportError:
        message = f"{root}: .heic and .heif images need pillow-heif: pip install pillow-heif"
        if not skip_unreadable:
            raise DatasetError(f"{message}, or pass --skip-unreadable to go on without them") from None
        notes.append(message)
        return set()
    pillow_heif.register_heif_opener()
    return set(HEIC)


def _auto_size(paths: Sequence[Path], notes: list[str]) -> tuple[int, int] | None:
    """(height, width) for photos that are large or differ in size, from at most 500 of them; None: as they are."""
    sizes = set()
    for path in paths[:: max(1, len(paths) // 500)]:
        with contextlib.suppress(DatasetError):
            sizes.add(_size_of(path))
    if not sizes or (len(sizes) == 1 and max(next(iter(sizes))) <= AUTO_SIDE):
        return None
    height, width = (float(np.median([size[k] for size in sizes])) for k in (0, 1))
    factor = AUTO_SIDE / max(height, width)
    found = max(4, 4 * round(height * factor / 4)), max(4, 4 * round(width * factor / 4))
    what = f"are of {len(sizes)} sizes" if len(sizes) > 1 else "are of {}x{} pixels".format(*next(iter(sizes)))
    notes.append(f"the images {what} and are brought to {found[0]}x{found[1]}; --size HxW says another size")
    return found


def _size_of(path: Path) -> tuple[int, int]:
    """(height, width) from the head of a file, upright."""
    from PIL import Image

    Image.init()
    try:
        with Image.open(path, formats=[name for name in Image.ID if name != "EPS"]) as image:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # every decoder has its own
        raise DatasetError(f"{path}: {error or type(error).__name__}") from error


def _first_format(paths: Sequence[Path], size, mode, pad: bool) -> ImageFormat:
    for path in paths:
        try:
            image = _opened(path)
        except DatasetError:
            continue
        deep = image.mode.startswith("I")
        if mode is None:
            mode = "L" if image.mode in ("1", "L", "LA") or deep else "RGB"
        height, width = size or (image.height, image.width)
        bits = 16 if deep and mode == "L" else 8
        return ImageFormat(height, width, mode, resize=size is not None, pad=pad, bits=bits)
    raise DatasetError(f"{paths[0].parent}: none of {len(paths)} images can be read")


def _opened(path: Path):
    """A decoded, upright image; DatasetError where it cannot be."""
    from PIL import Image, ImageOps

    Image.init()
    # The content decides, not the name. PostScript is a program, which Pillow would let Ghostscript execute.
    formats = [name for name in Image.ID if name != "EPS"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except Exception as error:  # every decoder has its own
        raise DatasetError(f"{path}: {error or type(error).__name__}") from error


def read_image(path: str | os.PathLike, image_format: ImageFormat) -> np.ndarray:
    """One image as uint8 [H, W] or [3, H, W], or of 16 bits as uint16 [H, W]. DatasetError where it cannot be used.

    16-bit grey is scaled to 8 where the format has 8, 8-bit grey by 257 where it has 16.
    """
    from PIL import Image, ImageOps

    image = _opened(Path(path))
    deep = image_format.bits == 16
    if image.mode.startswith("I"):  # 16 or 32 bits; convert() would cut them off at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise DatasetError(f"{path}: expected grey values of 16 bits, got {values.min()} to {values.max()}")
        image = Image.fromarray(values.astype(np.int32) if deep else (values // 257).astype(np.uint8))
    elif image.mode == "F":
        raise DatasetError(f"{path}: expected 8 or 16 bits a channel, got floating-point pixels")
    elif deep:
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 257)
    try:
        image = image if deep else image.convert(image_format.mode)
    except ValueError as error:
        raise DatasetError(f"{path}: {error}") from error
    if image.size != (image_format.width, image_format.height):
        if not image_format.resize:
            raise DatasetError(
                f"{path}: expected {image_format.height}x{image_format.width} pixels, "
                f"got {image.height}x{image.width}; `gradext fit --size HxW` resizes all"
            )
        size = (image_format.width, image_format.height)
        if image_format.pad:
            image = ImageOps.pad(image, size, Image.Resampling.BILINEAR)
        else:
            image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    if deep:
        pixels = np.clip(pixels, 0, 0xFFFF).astype(np.uint16)
    return pixels if image_format.mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
