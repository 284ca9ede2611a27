"""Data sets: reading files that are good, damaged and hostile; finding them; the splits.

Small files are generated. The tests of the real sets run where the environment variable GRADEXT_DATA names a
folder that `gradext.datasets.load` finds them in.
"""

import gzip
import hashlib
import io
import lzma
import os
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from gradext.datasets import (
    FOLDS,
    NAMES,
    DatasetError,
    ImageSet,
    load,
    load_cifar10,
    load_digits,
    load_idx,
    one_class_split,
)

CIFAR10_FILES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
COMPRESS = {"plain": bytes, "gzip": gzip.compress, "xz": lzma.compress}


def random_uint8(*shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, np.uint8)


def idx(array, kind=8):
    return bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx_set(folder, *, spelling="{part}-{kind}-idx{dimensions}-ubyte", train=12, test=6, seed=0):
    """An MNIST look-alike of 4x5 images; returns its images and labels, training part first."""
    folder.mkdir(parents=True, exist_ok=True)
    images = random_uint8(train + test, 4, 5, seed=seed)
    labels = random_uint8(train + test, high=10, seed=seed)
    for part, rows in (("train", slice(train)), ("t10k", slice(train, None))):
        for kind, array in (("images", images[rows]), ("labels", labels[rows])):
            name = spelling.format(part=part, kind=kind, dimensions=array.ndim)
            (folder / name).write_bytes((gzip.compress if name.endswith(".gz") else bytes)(idx(array)))
    return images, labels


@pytest.fixture
def cifar10():
    """Name -> uint8 [N, 3073]: the six files of a small CIFAR-10, each of another size."""
    records = {}
    for number, file in enumerate(CIFAR10_FILES):
        records[file] = random_uint8(2 + number, 3073, seed=number)
        records[file][:, 0] %= 10
    return records


def write_folder(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(bytes(content))
    return folder


def plain_members(records, folder="cifar-10-batches-bin/"):
    return [(tarfile.TarInfo(folder + file), content.tobytes()) for file, content in records.items()]


def write_tar(path, members, compress=bytes):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.write_bytes(compress(archive.getvalue()))
    return path


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def assert_is_cifar10(arrays, records):
    train = np.concatenate([records[file] for file in CIFAR10_FILES[:-1]])
    for images, labels, expected in ((*arrays[:2], train), (*arrays[2:], records["test_batch.bin"])):
        assert images.dtype == labels.dtype == np.uint8
        assert images.shape == (len(expected), 3, 32, 32)
        np.testing.assert_array_equal(labels, expected[:, 0])
        np.testing.assert_array_equal(images[:, 1, 0], expected[:, 1 + 1024 : 1 + 1024 + 32])  # green, row 0


# IDX


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4, 5)])
def test_load_idx_returns_what_was_written(tmp_path, shape, compression):
    array = random_uint8(*shape)
    path = tmp_path / "any name"
    path.write_bytes(COMPRESS[compression](idx(array)))
    loaded = load_idx(path)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, array)
    np.testing.assert_array_equal(load_idx(str(path)), array)


def test_load_idx_reads_more_than_one_chunk(tmp_path):
    array = random_uint8(3, 1024, 1025)
    (tmp_path / "images").write_bytes(idx(array))
    np.testing.assert_array_equal(load_idx(tmp_path / "images"), array)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)])
def test_load_idx_refuses_content_cut_at_any_point(tmp_path, shape, compression):
    content = idx(random_uint8(*shape))
    path = tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(COMPRESS[compression](content[:length]))
        with pytest.raises(DatasetError, match=r"cut: .*expected .*got"):
            load_idx(path)


@pytest.mark.parametrize("compression", ["gzip", "xz"])
def test_load_idx_refuses_a_compressed_file_cut_at_any_point(tmp_path, compression):
    content = COMPRESS[compression](idx(random_uint8(2, 3, 4)))
    path = tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DatasetError, match="cut: "):
            load_idx(path)


@pytest.mark.parametrize("compression", ["gzip", "xz"])
def test_load_idx_refuses_a_compressed_file_with_a_changed_byte(tmp_path, compression):
    array = random_uint8(2, 3, 4)
    content = COMPRESS[compression](idx(array))
    path = tmp_path / "changed"
    for position in range(12, len(content)):  # after the header, where a byte may say nothing of the content
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        with pytest.raises(DatasetError, match="changed: "):
            load_idx(path)


@pytest.mark.parametrize("compression", COMPRESS)
def test_load_idx_refuses_bytes_after_the_array(tmp_path, compression):
    path = tmp_path / "long"
    path.write_bytes(COMPRESS[compression](idx(random_uint8(2, 3, 4)) + b"\0"))
    with pytest.raises(DatasetError, match=r"long: .*\[2, 3, 4\]: expected 24 bytes .*got more"):
        load_idx(path)


@pytest.mark.parametrize(
    ("content", "came"),
    [
        (b"", "an empty file"),
        (b"\0\0\x08", "00 00 08"),
        (b"\x1f\x8c\x08\0 neither gzip nor IDX", "1f 8c 08 00"),
        (idx(random_uint8(3), kind=9), "00 00 09 01"),
        (idx(random_uint8(3), kind=0x0D), "00 00 0d 01"),
        (b"\1" + idx(random_uint8(3))[1:], "01 00 08 01"),
        (idx(random_uint8(2, 3)), "00 00 08 02"),
        (idx(random_uint8(1, 2, 3, 4)), "00 00 08 04"),
        (b"\0\0\x08\0", "00 00 08 00"),
    ],
)
def test_load_idx_refuses_other_formats(tmp_path, content, came):
    path = tmp_path / "other"
    for compress in COMPRESS.values():
        path.write_bytes(compress(content))
        with pytest.raises(DatasetError, match=f"other: expected an IDX file .*got {came}"):
            load_idx(path)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**32 - 1, 28, 28), (0, 28, 28), (0,)])
def test_load_idx_refuses_absurd_sizes(tmp_path, shape, compression):
    path = tmp_path / "absurd"
    header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
    path.write_bytes(COMPRESS[compression](header + b"content"))
    with pytest.raises(DatasetError, match=r"absurd: expected 1 to \d+ elements, got .*\[\d+"):
        load_idx(path)


@pytest.mark.parametrize("compression", COMPRESS)
def test_load_idx_does_not_allocate_what_a_header_claims(tmp_path, compression):
    path = tmp_path / "lying"
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**20, 32, 32)  # 1 GiB
    path.write_bytes(COMPRESS[compression](header + bytes(1000)))
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match=r"lying: .*expected 1073741824 bytes after it, got 1000"):
            load_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_load_idx_refuses_folders_and_missing_files(tmp_path):
    with pytest.raises(DatasetError, match="expected a file, got a folder"):
        load_idx(tmp_path)
    with pytest.raises(DatasetError, match="absent: expected a file, got nothing"):
        load_idx(tmp_path / "absent")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_load_idx_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatasetError, match="pipe: expected a file"):
        load_idx(tmp_path / "pipe")


# CIFAR-10


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_load_cifar10_reads_a_folder(tmp_path, cifar10, folder):
    write_folder(tmp_path / folder, cifar10)
    assert_is_cifar10(load_cifar10(tmp_path), cifar10)


@pytest.mark.parametrize("folder", ["", "./", "cifar-10-batches-bin/", "./cifar-10-batches-bin/"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_load_cifar10_reads_a_tar(tmp_path, cifar10, compression, folder):
    path = write_tar(tmp_path / "any name", plain_members(cifar10, folder), COMPRESS[compression])
    assert_is_cifar10(load_cifar10(path), cifar10)
    assert os.listdir(tmp_path) == ["any name"]


def test_load_cifar10_reads_the_members_of_a_tar_in_any_order(tmp_path, cifar10):
    path = write_tar(tmp_path / "tar", plain_members(cifar10)[::-1])
    assert_is_cifar10(load_cifar10(path), cifar10)


def test_load_cifar10_passes_over_other_members(tmp_path, cifar10):
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    inside.mkdir()
    hostile = [
        (tarfile.TarInfo(str(outside)), b"absolute"),
        (tarfile.TarInfo("../outside"), b"parent"),
        (tarfile.TarInfo("../data_batch_1.bin"), b"parent"),
        (tarfile.TarInfo("/data_batch_1.bin"), b"absolute"),
        (tarfile.TarInfo("other/data_batch_1.bin"), b"other folder"),
        (tarfile.TarInfo("cifar-10-batches-bin/._data_batch_1.bin"), b"another name"),
        link("cifar-10-batches-bin/link", "/etc/passwd", tarfile.SYMTYPE),
        link("cifar-10-batches-bin", "/", tarfile.SYMTYPE),
        link("pipe", "", tarfile.FIFOTYPE),
        link("device", "", tarfile.CHRTYPE),
        (tarfile.TarInfo("batches.meta.txt"), b"airplane"),
        (tarfile.TarInfo("twice"), b"1"),
        (tarfile.TarInfo("twice"), b"2"),
    ]
    path = write_tar(inside / "tar", [*hostile, *plain_members(cifar10), *hostile])
    assert_is_cifar10(load_cifar10(path), cifar10)
    assert os.listdir(inside) == ["tar"]
    assert not outside.exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_load_cifar10_refuses_a_member_that_is_not_a_plain_file(tmp_path, cifar10, kind):
    secret = tmp_path / "secret"
    secret.write_bytes(cifar10["test_batch.bin"].tobytes())
    members = [*plain_members(cifar10)[:-1], link("test_batch.bin", str(secret), kind)]
    with pytest.raises(DatasetError, match=r"tar: test_batch.bin: expected a plain file"):
        load_cifar10(write_tar(tmp_path / "tar", members))


def test_load_cifar10_refuses_a_member_that_is_there_twice(tmp_path, cifar10):
    members = [*plain_members(cifar10), *plain_members(cifar10, "")[:1]]
    with pytest.raises(DatasetError, match=r"tar: data_batch_1.bin: expected data_batch_1.bin once"):
        load_cifar10(write_tar(tmp_path / "tar", members))


def test_load_cifar10_lists_the_files_that_are_missing(tmp_path, cifar10):
    del cifar10["data_batch_2.bin"], cifar10["test_batch.bin"]
    write_folder(tmp_path / "folder", cifar10)
    write_tar(tmp_path / "tar", plain_members(cifar10))
    write_tar(tmp_path / "no members", [])
    for name, missing in (
        ("folder", r"missing data_batch_2.bin, test_batch.bin; .*folder"),
        ("tar", r"without data_batch_2.bin, test_batch.bin"),
        ("no members", r"without data_batch_1.bin, .*, test_batch.bin"),
    ):
        with pytest.raises(DatasetError, match=missing):
            load_cifar10(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda content: content[:-1], "got 6145 bytes"),
        (lambda content: content + b"\0", "got 6147 bytes"),
        (lambda content: b"", "got 0 bytes"),
        (lambda content: bytes(10_001 * 3073), "got more than 30730000 bytes"),
        (lambda content: content[:3073] + b"\x0a" + content[3074:], "labels 0 to 9, got 10 at position 1"),
    ],
)
def test_load_cifar10_refuses_wrong_records(tmp_path, cifar10, change, came):
    cifar10["data_batch_1.bin"] = np.frombuffer(change(cifar10["data_batch_1.bin"].tobytes()), np.uint8)
    folder = write_folder(tmp_path / "folder", cifar10)
    tar = write_tar(tmp_path / "tar", plain_members(cifar10))
    for path in (folder, tar):
        with pytest.raises(DatasetError, match=f"{path.name}.*data_batch_1.bin: .*{came}"):
            load_cifar10(path)


@pytest.mark.parametrize("compression", COMPRESS)
def test_load_cifar10_refuses_a_tar_that_is_cut(tmp_path, cifar10, compression):
    content = write_tar(tmp_path / "tar", plain_members(cifar10), COMPRESS[compression]).read_bytes()
    end = len(content) - 1
    if compression == "plain":  # ends in zeros that say nothing: cut into the last member at the latest
        end = content.index(cifar10["test_batch.bin"].tobytes()) + cifar10["test_batch.bin"].size - 1
    for length in {*np.linspace(0, end, 40, dtype=int).tolist(), *range(0, 1100, 50), end}:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(DatasetError, match="cut: "):
            load_cifar10(tmp_path / "cut")


@pytest.mark.parametrize("compression", ["gzip", "xz"])
def test_load_cifar10_checks_the_sum_of_a_compressed_tar(tmp_path, cifar10, compression):
    path = write_tar(tmp_path / "tar", plain_members(cifar10), COMPRESS[compression])
    content = path.read_bytes()
    for position in np.linspace(len(content) // 2, len(content) - 1, 20, dtype=int):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        with pytest.raises(DatasetError, match="tar: damaged"):
            load_cifar10(path)


def test_load_cifar10_refuses_a_tar_that_unpacks_to_too_much(tmp_path, cifar10, monkeypatch):
    path = write_tar(tmp_path / "bomb", plain_members(cifar10), lambda tar: gzip.compress(tar + bytes(2**20)))
    assert_is_cifar10(load_cifar10(path), cifar10)
    monkeypatch.setattr("gradext.datasets._CIFAR10_TAR_MAX_BYTES", 2**20)
    with pytest.raises(DatasetError, match=r"bomb: expected a tar of at most 1048576 bytes.* got more"):
        load_cifar10(path)


@pytest.mark.parametrize("size", [b"\x80" + (2**80).to_bytes(11, "big"), b"\xff" * 12, b"77777777777\0", b"9" * 12])
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"S"])
def test_load_cifar10_refuses_a_forged_size(tmp_path, cifar10, kind, size):
    path = write_tar(tmp_path / "forged", plain_members(cifar10))
    content = bytearray(path.read_bytes())
    content[124:136], content[156:157] = size, kind
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="forged: "):
        load_cifar10(path)


def test_load_cifar10_refuses_what_is_no_tar(tmp_path):
    (tmp_path / "text").write_bytes(b"no tar at all " * 100)
    for name in ("text", "absent"):
        with pytest.raises(DatasetError, match=f"{name}: "):
            load_cifar10(tmp_path / name)


# ImageSet and digits


def test_load_digits():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert images.max() == 16
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_need_no_data_folder(monkeypatch):
    monkeypatch.delenv("GRADEXT_DATA", raising=False)
    digits = load("digits")
    assert (digits.name, digits.shape, digits.train, digits.scale) == ("digits", (8, 8), None, 16)


@pytest.mark.parametrize("scale", [16, 255])
@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 3, 4, 5)])
def test_pixels_are_images_over_scale(shape, scale):
    images = random_uint8(*shape, high=scale + 1)
    images[0].flat[:2] = 0, scale
    image_set = ImageSet("own", images, np.arange(6), train=None, scale=scale)
    assert image_set.shape == shape[1:]
    assert len(image_set) == 6
    for index in (0, slice(0, 4), np.array([0, 5, 0]), np.arange(6) < 2):
        pixels = image_set.pixels(index)
        assert pixels.dtype == np.float32
        assert (pixels.min(), pixels.max()) == (0, 1)
        np.testing.assert_array_equal(pixels, images[index].astype(np.float32) / np.float32(scale))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 2, 2), np.float32)}, r"images: expected uint8 .*, got float32 \[4, 2, 2\]"),
        ({"images": np.zeros((4, 2), np.uint8)}, r"images: .*, got uint8 \[4, 2\]"),
        ({"labels": np.zeros(4, np.int32)}, r"labels: expected int64 \[4\], .*, got int32 \[4\]"),
        ({"labels": np.zeros(3, np.int64)}, r"labels: .*, got int64 \[3\]"),
        ({"train": 5}, "train: expected 0 to 4 or None, got 5"),
        ({"scale": 1}, "scale: expected 16 or 255, got 1"),
        ({"scale": 16}, "images: expected pixels up to 16, got 17"),
    ],
)
def test_image_set_refuses_parts_that_do_not_fit(change, message):
    parts = {"images": np.full((4, 2, 2), 17, np.uint8), "labels": np.zeros(4, np.int64)}
    with pytest.raises(DatasetError, match=f"own: {message}"):
        ImageSet(**{"name": "own", "train": None, "scale": 255, **parts, **change})


# load


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *(("mnist", folder) for folder in (".", "mnist", "mnist/raw", "MNIST", "MNIST/raw")),
        ("fashion-mnist", "."),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_load_finds_idx_sets(tmp_path, name, folder, separator, suffix):
    spelling = f"{{part}}-{{kind}}{separator}idx{{dimensions}}-ubyte{suffix}"
    images, labels = write_idx_set(tmp_path / folder, spelling=spelling)
    image_set = load(name, tmp_path)
    assert (image_set.name, image_set.train, image_set.scale) == (name, 12, 255)
    np.testing.assert_array_equal(image_set.images, images)
    np.testing.assert_array_equal(image_set.labels, labels)
    assert image_set.labels.dtype == np.int64


def test_load_prefers_the_folder_of_the_set(tmp_path):
    write_idx_set(tmp_path, seed=0)
    images, _ = write_idx_set(tmp_path / "fashion-mnist", seed=1)
    np.testing.assert_array_equal(load("fashion-mnist", tmp_path).images, images)


def test_load_does_not_mix_folders(tmp_path):
    write_idx_set(tmp_path / "mnist")
    images, _ = write_idx_set(tmp_path / "MNIST/raw", seed=1)
    (tmp_path / "mnist/t10k-labels-idx1-ubyte").unlink()
    np.testing.assert_array_equal(load("mnist", tmp_path).images, images)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").unlink()
    with pytest.raises(DatasetError, match=r"mnist: missing t10k-labels-idx1-ubyte\[.gz\]; .*MNIST/raw"):
        load("mnist", tmp_path)


def test_load_takes_nothing_of_the_other_set(tmp_path):
    write_idx_set(tmp_path / "mnist")
    with pytest.raises(DatasetError, match="fashion-mnist: missing train-images-idx3-ubyte"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("base", ["", "cifar-10"])
@pytest.mark.parametrize("form", ["", "cifar-10-batches-bin", ".tar", ".tar.gz", ".tar.xz"])
def test_load_finds_cifar10(tmp_path, cifar10, base, form):
    folder = tmp_path / base
    folder.mkdir(exist_ok=True)
    if form.startswith("."):
        compress = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.xz": lzma.compress}[form]
        write_tar(folder / f"cifar-10-binary{form}", plain_members(cifar10), compress)
    else:
        write_folder(folder / form, cifar10)
    image_set = load("cifar-10", tmp_path)
    assert (image_set.name, image_set.train, image_set.scale) == ("cifar-10", 20, 255)
    assert image_set.images.shape == (27, 3, 32, 32)
    assert image_set.labels.dtype == np.int64
    np.testing.assert_array_equal(image_set.labels[20:], cifar10["test_batch.bin"][:, 0])


def test_load_reads_the_tar_where_the_folder_is_incomplete(tmp_path, cifar10):
    write_tar(tmp_path / "cifar-10-binary.tar", plain_members(cifar10))
    del cifar10["test_batch.bin"]
    write_folder(tmp_path / "cifar-10-batches-bin", cifar10)
    assert len(load("cifar-10", tmp_path)) == 27


@pytest.mark.parametrize("name", NAMES[1:])
def test_load_lists_missing_files_and_the_folders_searched(tmp_path, name):
    with pytest.raises(DatasetError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(name)
    assert str(tmp_path / name) in message
    expected = CIFAR10_FILES if name == "cifar-10" else ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    assert all(file in message for file in expected)


def test_load_refuses_counts_that_do_not_agree(tmp_path):
    write_idx_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(random_uint8(5, high=10)))
    with pytest.raises(DatasetError, match=r"t10k-images.*, t10k-labels.*got 6 images and 5 labels"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("t10k-images-idx3-ubyte", random_uint8(6, 5, 5), r"shape \[4, 5\], got \[5, 5\]"),
        ("t10k-images-idx3-ubyte", random_uint8(6), r"expected images \[N, H, W\] .*got \[6\]"),
        ("train-labels-idx1-ubyte", random_uint8(12, 1, 1), r"expected images .*\[12, 1, 1\]"),
        ("train-labels-idx1-ubyte", np.full(12, 10, np.uint8), "labels 0 to 9, got 10 at position 0"),
    ],
)
def test_load_refuses_idx_files_that_do_not_fit(tmp_path, file, array, message):
    write_idx_set(tmp_path)
    (tmp_path / file).write_bytes(idx(array))
    with pytest.raises(DatasetError, match=f"{file}.*{message}"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("MNIST", "'mnist'"), ("cifar10", "'cifar-10'"), ("fashionmnist", "'fashion-mnist'")],
)
def test_load_names_the_sets_it_knows(name, hint):
    with pytest.raises(DatasetError, match=rf"one of {', '.join(NAMES)}, got '{name}' \(did you mean {hint}"):
        load(name)


def test_load_has_no_hint_for_a_name_like_none():
    with pytest.raises(DatasetError, match=r"got 'imagenet-21k'$"):
        load("imagenet-21k")


def test_load_falls_back_to_the_environment(tmp_path, monkeypatch):
    write_idx_set(tmp_path / "mnist")
    monkeypatch.setenv("GRADEXT_DATA", str(tmp_path))
    assert len(load("mnist")) == 18
    monkeypatch.setenv("GRADEXT_DATA", str(tmp_path / "absent"))
    assert len(load("mnist", tmp_path)) == 18
    with pytest.raises(DatasetError, match=r"GRADEXT_DATA: expected a folder, got .*absent"):
        load("mnist")
    for unset in (lambda: monkeypatch.setenv("GRADEXT_DATA", ""), lambda: monkeypatch.delenv("GRADEXT_DATA")):
        unset()
        with pytest.raises(DatasetError, match="pass --data-dir DIR"):
            load("mnist")


def test_load_refuses_a_data_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name in ("file", "absent"):
        with pytest.raises(DatasetError, match=f"data_dir: expected a folder, got .*{name}"):
            load("mnist", tmp_path / name)


# Splits


def image_set(counts, *, name="own", test_counts=None, seed=0):
    """Blank images in random order, counts[label] of each class (and test_counts[label] in the test part)."""
    random = np.random.default_rng(seed)
    parts = [random.permutation(np.repeat(list(c), list(c.values()))) for c in (counts, test_counts or {})]
    labels = np.concatenate(parts).astype(np.int64)
    train = None if test_counts is None else len(parts[0])
    return ImageSet(name, np.zeros((len(labels), 1, 1), np.uint8), labels, train=train, scale=255)


FOLDED = image_set({0: 50, 1: 53, 2: 47, 3: 120, 7: 60})
OFFICIAL = image_set(dict.fromkeys(range(5), 50), name="cifar-10", test_counts=dict.fromkeys(range(5), 12))
parts_of = pytest.mark.parametrize("images", [FOLDED, OFFICIAL], ids=["folds", "official"])


def arrays(split):
    return [split.train, split.validation, split.test, split.outliers]


@parts_of
@pytest.mark.parametrize("fold", range(FOLDS))
def test_split_parts_are_sorted_disjoint_and_of_their_classes(images, fold):
    for inlier in np.unique(images.labels):
        split = one_class_split(images, inlier, fold=fold)
        everything = np.concatenate(arrays(split))
        assert len(np.unique(everything)) == len(everything)
        for part in arrays(split):
            assert part.dtype == np.int64
            assert (np.diff(part) > 0).all()
        inliers = np.sort(np.concatenate([split.train, split.validation, split.test]))
        np.testing.assert_array_equal(inliers, np.flatnonzero(images.labels == inlier))
        assert (images.labels[split.outliers] != inlier).all()


def test_folds_are_60_20_20_percent_within_an_image():
    for inlier, count in zip(*np.unique(FOLDED.labels, return_counts=True), strict=True):
        for fold in range(FOLDS):
            split = one_class_split(FOLDED, inlier, fold=fold)
            for part, share in ((split.train, 0.6), (split.validation, 0.2), (split.test, 0.2)):
                assert abs(len(part) - share * count) < (2 if share == 0.6 else 1)


def test_every_image_is_tested_and_validated_in_one_fold():
    for inlier in np.unique(FOLDED.labels):
        splits = [one_class_split(FOLDED, inlier, fold=fold) for fold in range(FOLDS)]
        for part in ("test", "validation"):
            together = np.sort(np.concatenate([getattr(split, part) for split in splits]))
            np.testing.assert_array_equal(together, np.flatnonzero(FOLDED.labels == inlier))


@parts_of
def test_an_images_fold_is_the_same_for_every_inlier(images):
    for fold in range(FOLDS):
        splits = {inlier: one_class_split(images, inlier, fold=fold) for inlier in np.unique(images.labels)}
        tested = np.concatenate([split.test for split in splits.values()])
        for split in splits.values():
            assert np.isin(split.outliers, tested).all()


def test_original_parts_are_kept():
    validated = []
    for fold in range(FOLDS):
        split = one_class_split(OFFICIAL, 3, fold=fold)
        assert [len(part) for part in arrays(split)] == [45, 5, 12, 12]
        assert max(split.train[-1], split.validation[-1]) < OFFICIAL.train
        assert min(split.test[0], split.outliers[0]) >= OFFICIAL.train
        validated.append(split.validation)
    assert len(np.unique(validated)) == 25  # another 10 % for each fold


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion-mnist", "own"])
def test_sets_other_than_cifar10_are_dealt_into_folds_across_their_original_parts(name):
    images = image_set({0: 60, 1: 60}, name=name, test_counts={0: 40, 1: 40})
    split = one_class_split(images, 0)
    assert (len(split.train), len(split.validation), len(split.test)) == (60, 20, 20)
    for part in arrays(split):
        assert part[0] < images.train <= part[-1]


@parts_of
@pytest.mark.parametrize("fold", range(FOLDS))
def test_outliers_are_as_many_as_inliers_and_even_over_classes(images, fold):
    for inlier in np.unique(images.labels)[:3]:
        split = one_class_split(images, inlier, fold=fold)
        assert len(split.outliers) == len(split.test)
        _, counts = np.unique(images.labels[split.outliers], return_counts=True)
        assert len(counts) == 4
        assert counts.max() - counts.min() <= 1


def test_a_class_with_few_outliers_gives_all_and_the_others_the_rest():
    images = image_set({0: 100, 1: 15, 2: 80, 3: 80})
    split = one_class_split(images, 0)
    counts = np.bincount(images.labels[split.outliers], minlength=4)
    assert counts[1] == 3
    assert sorted(counts[2:]) == [8, 9]


def test_all_outliers_are_taken_where_there_are_fewer_than_inliers():
    split = one_class_split(image_set({0: 100, 1: 15, 2: 20}), 0)
    assert (len(split.test), len(split.outliers)) == (20, 7)


@parts_of
def test_split_depends_on_its_arguments_alone(images):
    np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = one_class_split(images, 1, fold=2, seed=3)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    for one, other in zip(arrays(first), arrays(one_class_split(images, 1, fold=2, seed=3)), strict=True):
        np.testing.assert_array_equal(one, other)
    other = one_class_split(images, 1, fold=2, seed=4)
    assert not np.array_equal(first.train, other.train)
    assert not np.array_equal(first.outliers, other.outliers)


def test_split_is_the_same_in_every_version():
    images = ImageSet("own", np.zeros((30, 1, 1), np.uint8), np.arange(30) % 3, train=None, scale=255)
    split = one_class_split(images, 1, fold=1, seed=5)
    # Written down when first run: a change moves images between training and test part of published results.
    assert [part.tolist() for part in arrays(split)] == [[1, 7, 10, 19, 25, 28], [13, 22], [4, 16], [17, 21]]


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (FOLDED, {"inlier": 4}, r"own: inlier: expected one of the classes \[0, 1, 2, 3, 7\], got 4"),
        (FOLDED, {"inlier": -1}, "inlier: .* got -1"),
        (FOLDED, {"inlier": 0, "fold": 5}, "fold: expected 0 to 4, got 5"),
        (FOLDED, {"inlier": 0, "fold": -1}, "fold: expected 0 to 4, got -1"),
        (OFFICIAL, {"inlier": 0, "fold": 5}, "fold: expected 0 to 4, got 5"),
        (FOLDED, {"inlier": 0, "seed": -1}, "seed: expected 0 or more, got -1"),
        (image_set({2: 50}), {"inlier": 2}, "own: expected outliers of other classes, got the one class 2"),
        (image_set({}), {"inlier": 0}, r"one of the classes \[\], got 0"),
        (image_set({0: 50, 1: 4}), {"inlier": 1}, "class 1: expected at least 5 images .*got 4"),
        (image_set({0: 50, 1: 4}), {"inlier": 0}, "class 1: expected at least 5 images .*got 4"),
        (
            image_set({0: 50, 1: 4}, name="cifar-10", test_counts={0: 9, 1: 9}),
            {"inlier": 1},
            "class 1: expected at least 5 images to split and one to test, got 4 and 9",
        ),
        (
            image_set({0: 50, 1: 50}, name="cifar-10", test_counts={0: 9}),
            {"inlier": 1},
            "class 1: expected at least 5 images to split and one to test, got 50 and 0",
        ),
        (image_set({0: 50, 1: 50}, name="cifar-10"), {"inlier": 1}, "train: expected .*got None"),
    ],
)
def test_split_refuses_what_it_cannot_split(images, arguments, message):
    with pytest.raises(DatasetError, match=message):
        one_class_split(images, **arguments)


@pytest.mark.parametrize("argument", ["inlier", "fold", "seed"])
def test_split_takes_whole_numbers_only(argument):
    with pytest.raises(TypeError):
        one_class_split(FOLDED, **{"inlier": 0, argument: 1.0})


def test_split_of_the_digits():
    digits = load("digits")
    for inlier in range(10):
        split = one_class_split(digits, inlier)
        assert len(split.outliers) == len(split.test)
        assert len(split.train) + len(split.validation) + len(split.test) == (digits.labels == inlier).sum()


# The real sets. Counts are those of the classes 0 to 9.

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
# MD5 of the original files, decompressed: training images and labels, test images and labels.
IDX_MD5 = {
    "mnist": [
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ],
    "fashion-mnist": [
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ],
}
CIFAR10_MD5 = [
    "5dd7e06a14cb22eb9f671a540d1b7c25",
    "5ea93a67294ea407fff1d09f752e9692",
    "942cd6a4bcdd0dd3c604fbe906cb4421",
    "ae636b3ba5c66a11e91e8cb52e771fcb",
    "53f37980c15c3d472c316c40844f3f0d",
    "803d5f7f4d78ea53de84dbe85f74fb6d",
]


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture(scope="module")
def data_dir():
    if not os.environ.get("GRADEXT_DATA"):
        pytest.skip("GRADEXT_DATA is not set: it names the folder of the real data sets")
    return Path(os.environ["GRADEXT_DATA"])


@pytest.fixture(scope="module")
def real_cifar10(data_dir):
    return load("cifar-10", data_dir)  # once: a tar.xz takes some 15 s


def class_counts(image_set):
    labels = image_set.labels
    return [np.bincount(part).tolist() for part in (labels[: image_set.train], labels[image_set.train :])]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_idx_sets_are_the_originals(data_dir, name):
    images = load(name, data_dir)
    assert (images.shape, images.train, len(images)) == ((28, 28), 60_000, 70_000)
    counts = [MNIST_TRAIN, MNIST_TEST] if name == "mnist" else [[6000] * 10, [1000] * 10]
    assert class_counts(images) == counts
    files = [
        idx(array)
        for part in (slice(images.train), slice(images.train, None))
        for array in (images.images[part], images.labels[part].astype(np.uint8))
    ]
    assert [md5(file) for file in files] == IDX_MD5[name]


def test_real_cifar10_is_the_original(real_cifar10):
    assert (real_cifar10.shape, real_cifar10.train, len(real_cifar10)) == ((3, 32, 32), 50_000, 60_000)
    assert class_counts(real_cifar10) == [[5000] * 10, [1000] * 10]
    for start, expected in zip(range(0, 60_000, 10_000), CIFAR10_MD5, strict=True):
        part = slice(start, start + 10_000)
        labels = real_cifar10.labels[part, None].astype(np.uint8)
        assert md5(np.hstack([labels, real_cifar10.images[part].reshape(10_000, -1)]).tobytes()) == expected


def test_split_of_the_real_cifar10(real_cifar10):
    split = one_class_split(real_cifar10, 3)
    assert [len(part) for part in arrays(split)] == [4500, 500, 1000, 1000]
    counts = np.bincount(real_cifar10.labels[split.outliers], minlength=10)
    assert counts[3] == 0
    assert set(np.delete(counts, 3)) == {111, 112}


def test_split_of_the_real_mnist(data_dir):
    images = load("mnist", data_dir)
    split = one_class_split(images, 1)
    assert [len(part) for part in arrays(split)] == [4725, 1576, 1576, 1576]
