"""Image data sets read from local files, and the splits of the novelty-detection protocol.

Files are not trusted: headers are checked against the bytes that are really there, and memory grows with
those bytes, not with what a header claims. Nothing is downloaded, unpickled or unpacked to disk. This file
must know nothing about models, gradients or torch; images leave it as numpy arrays.
"""

import contextlib
import difflib
import gzip
import io
import lzma
import math
import operator
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

__all__ = [
    "CURE_TSR_CHALLENGES",
    "FOLDS",
    "NAMES",
    "ConditionSet",
    "DatasetError",
    "ImageSet",
    "OneClassSplit",
    "load",
    "load_cifar10",
    "load_cure_tsr",
    "load_digits",
    "load_idx",
    "one_class_split",
]

NAMES = ("digits", "mnist", "fashion-mnist", "cifar-10")
FOLDS = 5

StrPath = str | os.PathLike[str]
Stream = IO[bytes] | io.BufferedIOBase

_CHUNK = 1 << 20  # bytes asked of a stream at a time
_CLASSES = 10  # of every set that is read from files
# Raised by the readers on damaged content; tarfile lets the two in the middle out on forged numbers.
_READ_ERRORS = (OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError, tarfile.TarError)

_IDX_MAX_BYTES = 8 << 30  # of one array
_IDX_UINT8 = 0x08
_IDX_PARTS = ("train", "t10k")
_IDX_KINDS = ("images", "labels")
_IDX_DIMENSIONS = {"images": 3, "labels": 1}
# Folders that may hold a set's files, seen from the data folder. The data folder itself comes last: MNIST and
# Fashion-MNIST have the same file names, and only a folder of its own says which of them a file belongs to.
_IDX_FOLDERS = {
    "mnist": ("mnist", "mnist/raw", "MNIST", "MNIST/raw", "."),
    "fashion-mnist": ("fashion-mnist", "fashion-mnist/raw", "FashionMNIST", "FashionMNIST/raw", "."),
}

_CIFAR10_FOLDER = "cifar-10-batches-bin"
_CIFAR10_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
_CIFAR10_SPELLINGS = {file: (file,) for file in _CIFAR10_FILES}
_CIFAR10_TARS = tuple(f"cifar-10-binary{suffix}" for suffix in (".tar", ".tar.gz", ".tar.xz"))
_CIFAR10_TAR_MAX_BYTES = 256 << 20  # the original: 184 MB
_CIFAR10_SHAPE = (3, 32, 32)
_CIFAR10_RECORD = 1 + math.prod(_CIFAR10_SHAPE)  # a label byte, then the red, green and blue planes
_CIFAR10_MAX_RECORDS = 10_000  # in a file of the original; small copies hold fewer

# By the number in a file's name.
CURE_TSR_CHALLENGES = (
    *("challenge-free", "decolorization", "lens blur", "codec error", "darkening", "dirty lens", "exposure"),
    *("gaussian blur", "noise", "rain", "shadow", "snow", "haze"),
)
_CURE_TSR_SIGNS, _CURE_TSR_LEVELS = 14, 5
_CURE_TSR_SUFFIXES = (".bmp", ".png", ".jpg")

# Sets whose original training and test parts the protocol keeps; all others are dealt into folds.
_OFFICIAL_SPLIT = frozenset({"cifar-10"})
_OFFICIAL_VALIDATION_PARTS = 10  # one of them (10 % of the training inliers) is held out for validation

_PARTS, _OUTLIERS = 0, 1  # what a random stream is for


class DatasetError(ValueError):
    """A data set that is missing, damaged, or unfit for what was asked of it."""


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class ImageSet:
    """Labelled images of one size.

    name    one of NAMES, or any other name for a set of one's own
    images  uint8 [N, H, W] (grey) or [N, C, H, W]
    labels  int64 [N]
    train   how many of the leading images are the original training part (the others are the test part);
            None where the set has no such parts
    scale   the largest value of a pixel: 255 or 16

    Raises DatasetError where these do not fit together.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    train: int | None
    scale: int

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise DatasetError(
                f"{self.name}: images: expected uint8 [N, H, W] or [N, C, H, W], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise DatasetError(
                f"{self.name}: labels: expected int64 [{len(images)}], one per image, "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        if self.train is not None and not 0 <= self.train <= len(images):
            raise DatasetError(f"{self.name}: train: expected 0 to {len(images)} or None, got {self.train}")
        if self.scale not in (16, 255):
            raise DatasetError(f"{self.name}: scale: expected 16 or 255, got {self.scale}")
        if images.max(initial=0) > self.scale:
            raise DatasetError(f"{self.name}: images: expected pixels up to {self.scale}, got {images.max()}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image: (H, W) or (C, H, W)."""
        return self.images.shape[1:]

    def pixels(self, index) -> np.ndarray:
        """images[index] / scale: float32 in [0, 1], for any index that numpy takes."""
        return np.divide(self.images[index], self.scale, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class ConditionSet:
    """Traffic signs with and without challenging conditions.

    images     uint8 [N, 3, H, W]
    sign       int64 [N], 1 to 14
    challenge  int64 [N], an index into CURE_TSR_CHALLENGES; 0 is challenge-free
    level      int64 [N], 1 to 5; 0 where challenge-free
    train      bool [N]: of the original training part, not the test part
    """

    images: np.ndarray
    sign: np.ndarray
    challenge: np.ndarray
    level: np.ndarray
    train: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class OneClassSplit:
    """Sorted, disjoint int64 indices into an ImageSet.

    train, validation, test  images of the inlier class
    outliers                 images of the other classes, to be told from `test`
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    outliers: np.ndarray


# Reading


@contextlib.contextmanager
def _decompressed(path: StrPath) -> Iterator[Stream]:
    """The content of a plain, gzip or xz file, told by its first bytes; DatasetError if it is damaged."""
    if not os.path.isfile(path):
        came = "a folder" if os.path.isdir(path) else "something else" if os.path.lexists(path) else "nothing"
        raise DatasetError(f"{os.fspath(path)}: expected a file, got {came}")
    try:
        with open(path, "rb") as file:
            start = file.read(6)
            file.seek(0)
            if start.startswith(b"\x1f\x8b"):
                with gzip.GzipFile(fileobj=file) as stream:
                    yield stream
            elif start == b"\xfd7zXZ\x00":
                with lzma.LZMAFile(file) as stream:
                    yield stream
            else:
                yield file
    except DatasetError:
        raise
    except _READ_ERRORS as error:
        raise DatasetError(f"{os.fspath(path)}: damaged or unreadable: {error}") from error


def _read(stream: Stream, limit: int) -> bytearray:
    """The next `limit` bytes, or all there are."""
    content = bytearray()
    while chunk := stream.read(min(_CHUNK, limit - len(content))):
        content += chunk
    return content


def load_idx(path: StrPath) -> np.ndarray:
    """An IDX file, plain or compressed by gzip or xz, as uint8: images [N, H, W] or labels [N].

    Layout: bytes 0, 0, type (8: uint8), number of dimensions D; D sizes as big-endian uint32; the elements in
    C order. Raises DatasetError unless the file holds exactly what its header says, and at most 8 GiB.
    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database", section "File formats".
    """
    name = os.fspath(path)
    with _decompressed(path) as stream:
        magic = _read(stream, 4)
        if len(magic) < 4 or magic[:3] != bytes((0, 0, _IDX_UINT8)) or magic[3] not in (1, 3):
            raise DatasetError(
                f"{name}: expected an IDX file of uint8 labels (first bytes 00 00 08 01) or images "
                f"(00 00 08 03), plain or compressed by gzip or xz, got {magic.hex(' ') or 'an empty file'}"
            )
        sizes = _read(stream, 4 * magic[3])
        if len(sizes) < 4 * magic[3]:
            raise DatasetError(f"{name}: expected a header of {4 + 4 * magic[3]} bytes, got {4 + len(sizes)}")
        shape = np.frombuffer(sizes, ">u4").tolist()
        expected = math.prod(shape)
        if not 0 < expected <= _IDX_MAX_BYTES:
            raise DatasetError(f"{name}: expected 1 to {_IDX_MAX_BYTES} elements, got a header that says {shape}")
        content = _read(stream, expected + 1)  # the byte too many also makes gzip and xz check their sums
    if len(content) != expected:
        came = "more" if len(content) > expected else f"{len(content)}"
        raise DatasetError(f"{name}: the header says {shape}: expected {expected} bytes after it, got {came}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def load_cifar10(path: StrPath) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """CIFAR-10's binary version: (train images, train labels, test images, test labels), all uint8.

    Images are [N, 3, 32, 32], labels [N] in 0..9; N is 50,000 and 10,000 (less in a small copy).
    `path` is a folder with the six .bin files, directly or in cifar-10-batches-bin/, or a tar of them (plain
    or compressed by gzip or xz; at most 256 MiB decompressed), which is read in memory: members of other
    names are passed over, and nothing is written. Raises DatasetError on a file that is missing, there twice,
    not a plain file, not 1 to 10,000 whole records of 3,073 bytes, or with a label above 9.
    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009;
    https://www.cs.toronto.edu/~kriz/cifar.html, section "Binary version".
    """
    if os.path.isdir(path):
        folders = (Path(path), Path(path, _CIFAR10_FOLDER))
        paths, missing = _find(_CIFAR10_SPELLINGS, folders)
        if missing:
            raise _missing("CIFAR-10's binary version", missing, folders)
        records = _cifar10_records_of_files(paths)
    else:
        records = _cifar10_records_of_tar(path)
    *train, test = (records[file] for file in _CIFAR10_FILES)
    return *_cifar10_images_and_labels(train), *_cifar10_images_and_labels([test])


def _cifar10_images_and_labels(batches: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    images = np.concatenate([records[:, 1:] for records in batches]).reshape(-1, *_CIFAR10_SHAPE)
    return images, np.concatenate([records[:, 0] for records in batches])


def _cifar10_records_of_files(paths: Mapping[str, Path]) -> dict[str, np.ndarray]:
    records = {}
    for file, path in paths.items():
        with _decompressed(path) as stream:
            records[file] = _cifar10_records(stream, str(path))
    return records


def _cifar10_records_of_tar(path: StrPath) -> dict[str, np.ndarray]:
    known = {f"{folder}{file}": file for file in _CIFAR10_FILES for folder in ("", f"{_CIFAR10_FOLDER}/")}
    name = os.fspath(path)
    records = {}
    with _decompressed(path) as stream:
        content = io.BytesIO(_read(stream, _CIFAR10_TAR_MAX_BYTES + 1))
        if content.getbuffer().nbytes > _CIFAR10_TAR_MAX_BYTES:
            raise DatasetError(
                f"{name}: expected a tar of at most {_CIFAR10_TAR_MAX_BYTES} bytes, decompressed, got more"
            )
        with tarfile.open(fileobj=content, mode="r:") as tar:
            for member in tar:
                file = known.get(member.name.removeprefix("./"))
                if file is None:
                    continue
                part = tar.extractfile(member) if member.isreg() else None
                if part is None:
                    raise DatasetError(f"{name}: {member.name}: expected a plain file, got a link or other")
                if file in records:
                    raise DatasetError(f"{name}: {member.name}: expected {file} once, got it twice")
                records[file] = _cifar10_records(part, f"{name}: {member.name}")
    missing = [file for file in _CIFAR10_FILES if file not in records]
    if missing:
        raise DatasetError(f"{name}: expected a tar of CIFAR-10's binary version, got one without {', '.join(missing)}")
    return records


def _cifar10_records(stream: Stream, name: str) -> np.ndarray:
    """uint8 [N, 3073]; `name` is for messages."""
    limit = _CIFAR10_MAX_RECORDS * _CIFAR10_RECORD
    content = _read(stream, limit + 1)
    if not 0 < len(content) <= limit or len(content) % _CIFAR10_RECORD:
        came = f"more than {limit}" if len(content) > limit else f"{len(content)}"
        raise DatasetError(
            f"{name}: expected 1 to {_CIFAR10_MAX_RECORDS} whole records of {_CIFAR10_RECORD} bytes, got {came} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR10_RECORD)
    _check_labels(records[:, 0], name)
    return records


def _check_labels(labels: np.ndarray, name: str) -> None:
    wrong = np.flatnonzero(labels >= _CLASSES)
    if wrong.size:
        raise DatasetError(
            f"{name}: expected labels 0 to {_CLASSES - 1}, got {labels[wrong[0]]} at position {wrong[0]}"
        )


def load_cure_tsr(
    folder: StrPath, *, challenges: Iterable[int] | None = None, size: int = 28, real: bool = True
) -> ConditionSet:
    """CURE-TSR from its folders (`Real_Train/ChallengeFree/*.bmp`, `Real_Test/...`), resized to `size` squared.

    What a picture shows is read from its name, `sequenceType_signType_challengeType_challengeLevel_Index`, or, in
    copies with seven fields, `sequenceType_sequenceNumber_challengeSource_challengeType_challengeLevel_signType_Index`;
    whether it is for training or testing from the folder above it that ends in `_train` or `_test`. `challenges` to
    read (default: all); of sequences, the real ones (type 1) or the simulated ones (type 2). Ordered by path.
    Raises DatasetError where there is no such picture, on a name of another form or with a field out of range, on a
    picture in neither part, and on a damaged one.
    Source: D. Temel, G. Kwon, M. Prabhushankar, G. AlRegib, "CURE-TSR: Challenging unreal and real environments for
    traffic sign recognition", NeurIPS MLITS workshop 2017.
    """
    from PIL import Image  # comes with matplotlib

    if not os.path.isdir(folder):
        raise DatasetError(f"CURE-TSR: expected a folder, got {os.fspath(folder)!r}")
    wanted = set(range(len(CURE_TSR_CHALLENGES)) if challenges is None else challenges)
    images, facts = [], []
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() not in _CURE_TSR_SUFFIXES:
            continue
        sequence, sign, challenge, level = _cure_tsr_fields(path)
        if challenge not in wanted or (sequence == 1) != real:
            continue
        parts = [part.lower() for part in path.relative_to(folder).parent.parts]
        train, test = (any(part.endswith(end) for part in parts) for end in ("_train", "_test"))
        if train == test:
            raise DatasetError(f"{path}: expected it below one folder that ends in _Train or _Test")
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DatasetError(f"{path}: damaged or unreadable: {error}") from error
        images.append(pixels.transpose(2, 0, 1))
        facts.append((sign, challenge, level, train))
    if not images:
        raise DatasetError(
            f"{os.fspath(folder)}: expected {'real' if real else 'simulated'} pictures of challenges {sorted(wanted)}, "
            "such as Real_Train/ChallengeFree/01_04_00_00_0012.bmp, got none"
        )
    sign, challenge, level, train = np.array(facts, np.int64).T
    return ConditionSet(np.stack(images), sign, challenge, level, train.astype(bool))


def _cure_tsr_fields(path: Path) -> tuple[int, int, int, int]:
    """(sequence type, sign type, challenge type, challenge level) of a picture's name."""
    fields = path.stem.split("_")
    if len(fields) not in (5, 7) or not all(field.isascii() and field.isdigit() for field in fields):
        raise DatasetError(f"{path}: expected a name of five or seven numbers, such as 01_04_09_03_0012.bmp")
    numbers = [int(field) for field in fields]
    if len(fields) == 5:
        sequence, sign, challenge, level, _ = numbers
    else:
        sequence, _, _, challenge, level, sign, _ = numbers
    levels = range(1, _CURE_TSR_LEVELS + 1) if challenge else (0,)
    ranges = {
        "sequence type": (sequence, range(1, 3)),
        "sign type": (sign, range(1, _CURE_TSR_SIGNS + 1)),
        "challenge type": (challenge, range(len(CURE_TSR_CHALLENGES))),
        "challenge level": (level, levels),
    }
    for name, (value, allowed) in ranges.items():
        if value not in allowed:
            raise DatasetError(f"{path}: {name}: expected {allowed[0]} to {allowed[-1]}, got {value}")
    return sequence, sign, challenge, level


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled digits: images uint8 [1797, 8, 8] in 0..16, labels int64 [1797].

    Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI, 1998 (its test part).
    """
    from sklearn.datasets import load_digits as bundled  # slow to import, and needed by this set alone

    digits = bundled()
    return digits.images.astype(np.uint8), digits.target.astype(np.int64)


# Finding


def load(name: str, data_dir: StrPath | None = None) -> ImageSet:
    """The data set of that name (one of NAMES), training part first.

    "digits" comes with scikit-learn. The others are searched for under their usual file names in `data_dir`
    (default: the environment variable GRADEXT_DATA) and in the folders below it that are usual for the set,
    its own first: MNIST and Fashion-MNIST have the same file names, so files that lie in `data_dir` itself
    are taken for whichever is asked for. Raises DatasetError on an unknown name, on files that are missing
    (it lists them and the folders searched) or damaged, and on counts that do not agree.
    """
    if name == "digits":
        images, labels = load_digits()
        return ImageSet(name, images, labels, train=None, scale=16)
    if name not in NAMES:
        near = difflib.get_close_matches(str(name).lower(), NAMES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DatasetError(f"data set: expected one of {', '.join(NAMES)}, got {name!r}{hint}")
    folder = _data_folder(name, data_dir)
    parts = _load_cifar10_parts(folder) if name == "cifar-10" else _load_idx_parts(name, folder)
    train_images, train_labels, test_images, test_labels = parts
    return ImageSet(
        name,
        np.concatenate([train_images, test_images]),
        np.concatenate([train_labels, test_labels]).astype(np.int64),
        train=len(train_images),
        scale=255,
    )


def _data_folder(name: str, data_dir: StrPath | None) -> Path:
    source = "data_dir"
    if data_dir is None:
        source = "GRADEXT_DATA"
        data_dir = os.environ.get(source)
        if not data_dir:
            raise DatasetError(
                f"{name} is read from local files: pass --data-dir DIR (data_dir in Python) or set {source}"
            )
    if not os.path.isdir(data_dir):
        raise DatasetError(f"{name}: {source}: expected a folder, got {os.fspath(data_dir)!r}")
    return Path(data_dir)


def _load_idx_parts(name: str, folder: Path) -> list[np.ndarray]:
    spellings = {
        f"{part}-{kind}": [
            f"{part}-{kind}{separator}idx{_IDX_DIMENSIONS[kind]}-ubyte{suffix}"
            for separator in "-."
            for suffix in ("", ".gz")
        ]
        for part in _IDX_PARTS
        for kind in _IDX_KINDS
    }
    folders = [folder / below for below in _IDX_FOLDERS[name]]
    paths, missing = _find(spellings, folders)
    if missing:
        raise _missing(name, [f"{spellings[key][0]}[.gz]" for key in missing], folders)
    arrays: list[np.ndarray] = []
    for part in _IDX_PARTS:
        images_path, labels_path = (paths[f"{part}-{kind}"] for kind in _IDX_KINDS)
        images, labels = load_idx(images_path), load_idx(labels_path)
        if images.ndim != 3 or labels.ndim != 1:
            raise DatasetError(
                f"{images_path}, {labels_path.name}: expected images [N, H, W] and labels [N], "
                f"got {list(images.shape)} and {list(labels.shape)}"
            )
        if len(images) != len(labels):
            raise DatasetError(
                f"{images_path}, {labels_path.name}: expected a label for each image, "
                f"got {len(images)} images and {len(labels)} labels"
            )
        if arrays and images.shape[1:] != arrays[0].shape[1:]:
            raise DatasetError(
                f"{images_path}: expected images of the training images' shape {list(arrays[0].shape[1:])}, "
                f"got {list(images.shape[1:])}"
            )
        _check_labels(labels, str(labels_path))
        arrays += [images, labels]
    return arrays


def _load_cifar10_parts(folder: Path) -> tuple[np.ndarray, ...]:
    bases = (folder / "cifar-10", folder)
    folders = [base / below for base in bases for below in (_CIFAR10_FOLDER, ".")]
    paths, missing = _find(_CIFAR10_SPELLINGS, folders)
    if not missing:  # before the tars, which take seconds to decompress
        return load_cifar10(paths[_CIFAR10_FILES[0]].parent)
    for tar in (base / tar for base in bases for tar in _CIFAR10_TARS):
        if os.path.isfile(tar):
            return load_cifar10(tar)
    raise _missing(f"cifar-10 (or one of {', '.join(_CIFAR10_TARS)})", missing, folders)


def _find(spellings: Mapping[str, Iterable[str]], folders: Iterable[Path]) -> tuple[dict[str, Path], list[str]]:
    """The files, by the keys of `spellings`, in the folder that lacks the fewest of them; the keys it lacks.

    All from one folder (the first of equals): parts of two sets must not be mixed.
    """
    best: dict[str, Path] = {}
    for folder in folders:
        paths = {}
        for key, names in spellings.items():
            path = next((folder / name for name in names if os.path.isfile(folder / name)), None)
            if path is not None:
                paths[key] = path
        if len(paths) > len(best):
            best = paths
    return best, [key for key in spellings if key not in best]


def _missing(what: str, missing: Iterable[str], folders: Iterable[Path]) -> DatasetError:
    return DatasetError(
        f"{what}: missing {', '.join(missing)}; no one of these folders holds all files: {', '.join(map(str, folders))}"
    )


# Splitting


def one_class_split(image_set: ImageSet, inlier: int, *, fold: int = 0, seed: int = 0) -> OneClassSplit:
    """Images of class `inlier` to fit, tune and test a novelty detector on, and outliers to tell from them.

    Folds (digits, MNIST, Fashion-MNIST, sets of one's own): the images of each class, original parts put
    together, are shuffled and dealt into 5 folds. Fold `fold` is the test part, the next one (cyclically) the
    validation part, the other three the training part: 60/20/20 % of each class, and every image is tested in
    exactly one fold. Who is in which fold depends on `seed` only, so an image's fold is the same whichever
    class is the inlier.

    Original parts (CIFAR-10): the test part is the original one, and 10 % of the training inliers are held
    out for validation, another 10 % for each `fold`.

    Outliers: as many as there are test inliers, drawn without replacement from the test part of the other
    classes, as evenly as their sizes allow: classes that are not used up differ by at most one. If there
    are fewer, all of them.

    The same arguments give the same split in every version of numpy. Raises DatasetError on an unknown inlier
    class, a fold that is not 0..4, a negative seed, a single class, and a class with less than 5 images (in
    the original training part, if that is kept) or none in the test part.
    Source: G. Kwon, M. Prabhushankar, D. Temel, G. AlRegib, "Backpropagated Gradient Representations for
    Anomaly Detection", ECCV 2020 (their published code keeps the original parts of MNIST, too, and draws the
    outliers without regard to class); folds as in S. Pidhorskyi, R. Almohsen, G. Doretto, "Generative
    Probabilistic Novelty Detection with Adversarial Autoencoders", NeurIPS 2018.
    """
    inlier, fold, seed = operator.index(inlier), operator.index(fold), operator.index(seed)
    name, labels = image_set.name, image_set.labels
    classes = np.unique(labels).tolist()
    if inlier not in classes:
        raise DatasetError(f"{name}: inlier: expected one of the classes {classes}, got {inlier}")
    if len(classes) == 1:
        raise DatasetError(f"{name}: expected outliers of other classes, got the one class {inlier}")
    if not 0 <= fold < FOLDS:
        raise DatasetError(f"fold: expected 0 to {FOLDS - 1}, got {fold}")
    if seed < 0:
        raise DatasetError(f"seed: expected 0 or more, got {seed}")

    if name in _OFFICIAL_SPLIT:
        if image_set.train is None:
            raise DatasetError(f"{name}: train: expected the number of original training images, got None")
        dealt = np.arange(len(labels)) < image_set.train
        part = _deal(labels, np.flatnonzero(dealt), _OFFICIAL_VALIDATION_PARTS, seed)
        in_test, in_validation = ~dealt, part == fold
    else:
        dealt = np.ones(len(labels), bool)
        part = _deal(labels, np.flatnonzero(dealt), FOLDS, seed)
        in_test, in_validation = part == fold, part == (fold + 1) % FOLDS
    for label in classes:
        of_class = labels == label
        enough, tested = np.count_nonzero(of_class & dealt), np.count_nonzero(of_class & in_test)
        if enough < FOLDS or not tested:
            raise DatasetError(
                f"{name}: class {label}: expected at least {FOLDS} images to split and one to test, "
                f"got {enough} and {tested}"
            )

    is_inlier = labels == inlier
    test = np.flatnonzero(is_inlier & in_test)
    # Each inlier class and fold draws outliers of its own.
    pool = _shuffled(np.flatnonzero(~is_inlier & in_test), seed, _OUTLIERS, classes.index(inlier), fold)
    return OneClassSplit(
        train=np.flatnonzero(is_inlier & ~in_test & ~in_validation),
        validation=np.flatnonzero(is_inlier & in_validation),
        test=test,
        outliers=_first_evenly(labels, pool, len(test)),
    )


def _deal(labels: np.ndarray, indices: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Each image's part [N]: `indices` are shuffled by class and dealt to 0..parts-1; the others are -1."""
    part = np.full(len(labels), -1, np.int64)
    for position, label in enumerate(np.unique(labels)):
        members = _shuffled(indices[labels[indices] == label], seed, _PARTS, position)
        part[members] = np.arange(len(members)) % parts
    return part


def _first_evenly(labels: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """`count` of `indices`, sorted: one of each class in turn, in the order they come, until it is enough."""
    of_class = [indices[labels[indices] == label] for label in dict.fromkeys(labels[indices].tolist())]
    turn = np.concatenate([np.arange(len(members)) for members in of_class])
    return np.sort(np.concatenate(of_class)[np.argsort(turn, kind="stable")[:count]])


def _shuffled(values: np.ndarray, seed: int, *stream: int) -> np.ndarray:
    """`values` in a random order; another stream of the same seed is independent of this one."""
    # Sorts by raw random bits, which are the same in every numpy; Generator.permutation's order need not be.
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream))
    return values[np.argsort(bits.random_raw(len(values)), kind="stable")]
