"""Files made to do harm, or damaged: a clear error or what the file says, in bounded memory and time, nothing written.

What each loader refuses one by one is in test_datasets.py; here hypothesis damages files in ways nobody thought of.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import struct
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradext import datasets
from gradext.datasets import DatasetError, load, load_cifar10, load_idx

PLAIN, GZIP, XZ = "plain", "gzip", "xz"
COMPRESS = {
    PLAIN: bytes,
    GZIP: lambda content: gzip.compress(content, 1),
    XZ: lambda content: lzma.compress(content, preset=0),
}
SECONDS = 5  # for files of some kilobytes; a bomb unpacked would take many times as long
MEGABYTES = 32


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + content


def records(number: int, label: int = 1) -> bytes:
    return (bytes([label]) + bytes(3072)) * number


def tar_of(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


CIFAR10 = {name: records(2) for name in datasets._CIFAR10_FILES}


def bounded(function, *arguments):
    """The result, or the DatasetError; any other exception, much memory or much time is a failure."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        return function(*arguments)
    except DatasetError as error:
        return error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert time.process_time() - begin < SECONDS
        assert peak < MEGABYTES << 20


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Cut, lengthened, overwritten, repeated or shifted, several times over."""
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["cut", "append", "overwrite", "insert", "remove", "bit"]))
        at = draw(st.one_of(st.integers(0, min(20, len(content))), st.integers(0, len(content))))
        noise = draw(
            st.one_of(st.binary(min_size=1, max_size=16), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"9" * 12]))
        )
        if kind == "cut":
            content = content[:at]
        elif kind == "append":
            content = content + noise
        elif kind == "overwrite":
            content = content[:at] + noise + content[at + len(noise) :]
        elif kind == "insert":
            content = content[:at] + noise + content[at:]
        elif kind == "remove":
            content = content[:at] + content[at + len(noise) :]
        elif content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    return content


@pytest.fixture
def guarded(tmp_path):
    """A folder, and afterwards the proof that what is beside it is untouched and nothing new is in it."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.write_bytes(b"secret")
    inside.mkdir()
    yield inside
    assert outside.read_bytes() == b"secret"
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "inside"}


@pytest.mark.parametrize("compression", COMPRESS)
@given(data=st.data(), shape=st.sampled_from([(5,), (0,), (2, 3, 4), (1, 1, 1)]), inner=st.booleans())
def test_damaged_idx_files(guarded, compression, data, shape, inner):
    """``inner``: damaged and then compressed, so that the sums agree."""
    whole = idx(shape, bytes(range(int(np.prod(shape)))))
    content = (
        COMPRESS[compression](data.draw(damaged(whole))) if inner else data.draw(damaged(COMPRESS[compression](whole)))
    )
    path = guarded / "file"
    path.write_bytes(content)
    found = bounded(load_idx, path)
    if not isinstance(found, DatasetError):  # then it says what the file says
        assert found.dtype == np.uint8
        unpacked = path.read_bytes()
        if unpacked[:2] == b"\x1f\x8b":
            unpacked = gzip.decompress(unpacked)
        elif unpacked[:6] == b"\xfd7zXZ\0":
            unpacked = lzma.decompress(unpacked)
        assert unpacked == idx(found.shape, found.tobytes())
    assert os.listdir(guarded) == ["file"]


@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 255, 65535, 2**16, 2**31 - 1, 2**31, 2**32 - 1]), min_size=3, max_size=3)
)
def test_lying_idx_headers(guarded, sizes):
    path = guarded / "file"
    path.write_bytes(idx(tuple(sizes), bytes(7)))
    assert isinstance(bounded(load_idx, path), DatasetError)


@pytest.mark.parametrize("compression", COMPRESS)
@given(data=st.data(), inner=st.booleans())
def test_damaged_tars(guarded, compression, data, inner):
    whole = tar_of(CIFAR10)
    content = (
        COMPRESS[compression](data.draw(damaged(whole))) if inner else data.draw(damaged(COMPRESS[compression](whole)))
    )
    path = guarded / "file.tar"
    path.write_bytes(content)
    found = bounded(load_cifar10, path)
    if not isinstance(found, DatasetError):
        train, train_labels, test, test_labels = found
        assert train.shape[1:] == test.shape[1:] == (3, 32, 32)
        assert len(train) == len(train_labels)
        assert max(train_labels.max(), test_labels.max()) < 10
    assert os.listdir(guarded) == ["file.tar"]


@given(name=st.sampled_from(datasets._CIFAR10_FILES), data=st.data())
def test_damaged_cifar10_folders(guarded, name, data):
    for file, content in CIFAR10.items():
        (guarded / file).write_bytes(data.draw(damaged(content)) if file == name else content)
    found = bounded(load_cifar10, guarded)
    size = (guarded / name).stat().st_size
    assert isinstance(found, DatasetError) or size % 3073 == 0
    assert sorted(os.listdir(guarded)) == sorted(CIFAR10)


@pytest.mark.parametrize("compression", [GZIP, XZ])
@pytest.mark.parametrize("what", ["idx", "tar"])
def test_bombs(guarded, compression, what, monkeypatch):
    """Files of kilobytes that unpack to 64 MiB: no more is unpacked than may be there."""
    monkeypatch.setattr(datasets, "_CIFAR10_TAR_MAX_BYTES", 8 << 20)
    begin = idx((1, 28, 28), b"") if what == "idx" else b""
    path = guarded / "bomb"
    path.write_bytes(COMPRESS[compression](begin + bytes(64 << 20)))
    assert path.stat().st_size < 1 << 20 or compression == GZIP
    assert isinstance(bounded(load_idx if what == "idx" else load_cifar10, path), DatasetError)


@pytest.mark.parametrize("trick", ["../outside", "/outside", "data_batch_1.bin/../../outside", "..\\outside"])
def test_members_with_paths_out_of_the_folder(guarded, trick):
    path = guarded / "file.tar"
    path.write_bytes(tar_of({trick: b"overwritten", **CIFAR10}))
    train, *_ = load_cifar10(path)
    assert len(train) == 10
    assert os.listdir(guarded) == ["file.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_links_or_devices(guarded, kind):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, str(guarded.parent / "outside")
    path = guarded / "file.tar"
    path.write_bytes(tar_of({**CIFAR10, "data_batch_3.bin": info}))
    found = bounded(load_cifar10, path)
    assert isinstance(found, DatasetError)
    assert "plain file" in str(found)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links")
def test_links_in_a_folder(guarded):
    """To itself, to a folder, to nothing, to an endless file: an error, and no waiting."""
    for number, target in enumerate(["loop", guarded, "nowhere", "/dev/zero", "/dev/null"]):
        folder = guarded / str(number)
        folder.mkdir()
        for name, content in CIFAR10.items():
            (folder / name).write_bytes(content)
        (folder / "data_batch_2.bin").unlink()
        (folder / "data_batch_2.bin").symlink_to(target if target != "loop" else folder / "data_batch_2.bin")
        assert isinstance(bounded(load_cifar10, folder), DatasetError)
        (folder / "train-images-idx3-ubyte").symlink_to(folder / "data_batch_2.bin")
        assert isinstance(bounded(load, "mnist", folder), DatasetError)
        assert isinstance(bounded(load_idx, Path(folder, "train-images-idx3-ubyte")), DatasetError)
