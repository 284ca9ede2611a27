"""Malicious and damaged files: a clear error or the content, in bounded memory and time; nothing is written.

test_datasets.py has the errors of each loader one by one; here hypothesis damages files at random.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import resource
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gradext import datasets, sources
from gradext.datasets import DatasetError, load, load_cifar10, load_idx
from gradext.novelty import ModelFileError, NoveltyDetector, persistence
from gradext.novelty.training import Checkpoint

pytestmark = [
    pytest.mark.medium,
    # of Pillow, NumPy and torch, about the damaged files
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore:overflow encountered in scalar multiply"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]

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


# --- arrays and tables -----------------------------------------------------------------------------------------------


def read(path, labels=None, **options):
    """All rows of a source: what a command does with it."""
    source = sources.open_source(path, labels=labels, **options)
    return source.read(np.arange(len(source)))


def resident(function, *arguments, **options):
    """As `bounded`, by the memory that the process really took, for what is allocated outside of Python."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        return function(*arguments, **options)
    except (DatasetError, ModelFileError) as error:
        if str(arguments[0]) in str(error):
            return error
        raise AssertionError("the file is not named") from error
    finally:
        assert time.process_time() - begin < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # kilobytes


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_of(header: str, content: bytes = bytes(64)) -> bytes:
    """With a header of one's own."""
    header = header.ljust(118) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode("latin1") + content


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


ARRAY = npy(np.arange(12, dtype=np.float32).reshape(4, 3))
LABELS = npy(np.array([0, 1, 0, 1]))


@given(data=st.data(), kind=st.sampled_from(["npy", "npz", "inner", "labels"]))
def test_damaged_arrays(guarded, data, kind):
    """``inner``: damaged and then zipped, so that the sums agree."""
    path, labels = guarded / ("x.npy" if kind in ("npy", "labels") else "x.npz"), None
    if kind == "inner":
        path.write_bytes(zipped({"X.npy": data.draw(damaged(ARRAY)), "y.npy": LABELS}))
    elif kind == "labels":
        path.write_bytes(ARRAY)
        labels = str(guarded / "y.npy")
        (guarded / "y.npy").write_bytes(data.draw(damaged(LABELS)))
    else:
        path.write_bytes(data.draw(damaged(ARRAY if kind == "npy" else zipped({"X.npy": ARRAY, "y.npy": LABELS}))))
    try:
        found = read(path, labels)
    except DatasetError:
        return
    assert found.samples.dtype.kind in "fiub"
    assert found.samples.nbytes <= path.stat().st_size + (0 if path.suffix == ".npy" else 64)


HEADERS = [
    f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 60}, 3)}}",
    f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 40}, 0)}}",
    f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {1 << 60})}}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (100000000, 16)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4, -3)}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}",
    f"{{'descr': '|V0', 'fortran_order': False, 'shape': ({1 << 40}, 2)}}",
    f"{{'descr': '|S0', 'fortran_order': False, 'shape': ({1 << 40}, 2)}}",
    "{'descr': '<U2', 'fortran_order': False, 'shape': (2, 2)}",
    "{'descr': '<c8', 'fortran_order': False, 'shape': (2, 2)}",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (2, 2)}",
    "{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (2, 2)}",
    "{'descr': __import__('os').system('touch outside'), 'fortran_order': False, 'shape': (2, 2)}",
    "(" * 5000,
    "{" * 300,
]


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_lying_headers_of_arrays(guarded, header, kind):
    path = guarded / f"x.{kind}"
    path.write_bytes(npy_of(header) if kind == "npy" else zipped({"X.npy": npy_of(header)}))
    assert isinstance(resident(read, path), DatasetError)
    assert os.listdir(guarded) == [path.name]


def test_pickled_objects_are_not_loaded(guarded):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {guarded.parent / 'pwned'}",)

    content = npy(np.array([[Evil()]], dtype=object))
    for name, whole in (("x.npy", content), ("x.npz", zipped({"X.npy": content}))):
        (guarded / name).write_bytes(whole)
        assert isinstance(resident(read, guarded / name), DatasetError)
    (guarded / "model").write_bytes(content[content.index(b"\x80") :])
    assert isinstance(resident(persistence.load, guarded / "model"), ModelFileError)
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint(guarded / "model", "run").load()
    torch.save(Evil(), guarded / "checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint(guarded / "checkpoint", "run").load()


@pytest.mark.parametrize("trick", ["../outside.npy", "/outside.npy", "X.npy/../../outside.npy"])
def test_members_of_npz_with_paths_out_of_the_folder(guarded, trick):
    (guarded / "x.npz").write_bytes(zipped({trick: ARRAY, "X.npy": ARRAY}))
    assert len(read(guarded / "x.npz").samples) == 4
    assert os.listdir(guarded) == ["x.npz"]


@pytest.mark.medium
def test_bombs_of_arrays_and_tables(guarded):
    """Files of kilobytes, or few megabytes, that stand for gigabytes."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    header = npy_of(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2 << 30}, 1)}}", b"")
    with (
        zipfile.ZipFile(guarded / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("X.npy", "w", force_zip64=True) as member,
    ):
        member.write(header)
        for _ in range(32):
            member.write(bytes(64 << 20))
    column = pyarrow.array(np.zeros(1 << 20))
    with parquet.ParquetWriter(guarded / "x.parquet", pyarrow.schema([("a", pyarrow.float64())])) as writer:
        for _ in range(256):
            writer.write_table(pyarrow.table({"a": column}))
    (guarded / "x.csv").write_text(",".join(f"c{k}" for k in range(100_000)) + "\n" + "1\n" * 100_000)
    for name in ("x.npz", "x.parquet", "x.csv"):
        found = resident(read, guarded / name)
        assert isinstance(found, DatasetError), name
        assert "a decompression bomb?" in str(found)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@given(data=st.data())
def test_damaged_tables(guarded, kind, data):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"a": [1.5, 2, 3], "b": [4, 5, 6], "class": ["ok", "ok", "bad"]})
    path = guarded / f"x.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = resident(read, path, data.draw(st.sampled_from([None, "class", "b"])))
    assert isinstance(found, DatasetError) or all(dtype.kind in "fiub" for dtype in found.samples.dtypes)
    assert os.listdir(guarded) == [path.name]


@given(
    text=st.text(
        st.sampled_from(["1", ",", "\n", '"', "e", "9", "\0", "a", "-", "\r", " ", "\ufeff", "é"]), max_size=60
    )
)
def test_tables_of_any_text(guarded, text):
    pytest.importorskip("pandas")
    path = guarded / "x.csv"
    path.write_text(text, newline="")
    resident(read, path)
    resident(read, path, "a")


# --- images ----------------------------------------------------------------------------------------------------------

FORMATS = ["png", "jpg", "gif", "bmp", "tiff", "webp", "ico", "ppm", "tga", "pcx", "jp2"]


def picture(form: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels).convert(mode).save(buffer, {"jpg": "jpeg", "jp2": "jpeg2000"}.get(form, form))
    except (OSError, KeyError):
        pytest.skip(f"Pillow cannot write {form} here")
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data())
def test_damaged_images(guarded, form, data):
    path = guarded / f"1.{form}"
    path.write_bytes(data.draw(damaged(picture(form))))
    found = resident(read, guarded)
    assert isinstance(found, DatasetError) or found.samples.dtype == np.uint8
    (guarded / "0.png").write_bytes(picture("png"))
    block = read(guarded, skip_unreadable=True, size=(8, 8))
    assert 1 <= len(block.index) <= 2
    (guarded / "0.png").unlink()
    assert os.listdir(guarded) == [path.name]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
)
def test_images_of_odd_modes(guarded, mode):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    try:
        image = image.convert("RGB").convert(mode) if mode not in ("I", "F", "PA", "LAB") else image.convert(mode)
    except ValueError:
        image = Image.new(mode, (16, 16))
    for form in ("png", "tiff"):
        try:
            image.save(guarded / f"1.{form}")
        except (OSError, KeyError):
            (guarded / f"1.{form}").unlink(missing_ok=True)
            continue
        for wanted in ("L", "RGB"):
            found = resident(read, guarded, mode=wanted)
            kind = np.uint16 if (mode, wanted) == ("I", "L") else np.uint8  # grey of 16 bits keeps its levels
            assert isinstance(found, DatasetError) or found.samples.dtype == kind
        (guarded / f"1.{form}").unlink()


@pytest.mark.parametrize("name", ["1.png", "1.eps"])
def test_postscript_is_not_run(guarded, name, monkeypatch):
    """Pillow would hand it to Ghostscript, whatever the file is called."""
    path = guarded / name
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was run"))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was run"))
    assert isinstance(resident(read, guarded), DatasetError)


def test_an_image_that_unpacks_to_gigabytes(guarded):
    """A header of 30000 x 30000 pixels and the zeros for them, in 100 kilobytes."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(64 << 20), 9)
    path = guarded / "1.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    assert isinstance(resident(read, guarded), DatasetError)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links")
def test_links_in_a_folder_of_images(guarded):
    (guarded / "cat").mkdir()
    (guarded / "cat" / "1.png").write_bytes(picture("png"))
    (guarded / "cat" / "loop").symlink_to(guarded, target_is_directory=True)
    (guarded / "cat" / "up.png").symlink_to(guarded / "cat" / "up.png")
    (guarded / "cat" / "nowhere.png").symlink_to("nothing")
    (guarded / "cat" / "zero.png").symlink_to("/dev/zero")
    (guarded / "cat" / "secret.png").symlink_to(guarded.parent / "outside")
    os.mkfifo(guarded / "cat" / "fifo.png")
    found = resident(read, guarded)
    assert isinstance(found, DatasetError)
    assert "secret.png" in str(found)
    assert b"secret" not in str(found).replace("secret.png", "").encode(), "its content is not told"
    block = resident(read, guarded, skip_unreadable=True)
    assert block.index.tolist() == [0]


@pytest.mark.parametrize("name", [b"new\nline.png", b"\x1b[31m.png", b"\xff\xfe.png", "\u202egnp.exe.png".encode()])
def test_names_that_would_spoil_a_table_or_a_terminal(guarded, name):
    try:
        (Path(os.fsdecode(os.fsencode(guarded) + b"/" + name))).write_bytes(picture("png"))
    except OSError:
        pytest.skip("the file system refuses it")
    found = resident(read, guarded)
    assert isinstance(found, DatasetError)
    assert str(found).isprintable()


# --- saved detectors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "model"
    X = np.random.default_rng(0).random((60, 4))
    persistence.save(NoveltyDetector(hidden_dim=3, latent_dim=2, epochs=1, random_state=0).fit(X), path)
    return path.read_bytes()


@given(data=st.data())
def test_damaged_detectors(guarded, saved, data):
    path = guarded / "model"
    content = data.draw(damaged(saved))
    path.write_bytes(content)
    found = resident(persistence.load, path)
    assert isinstance(found, ModelFileError) or content == saved


def test_a_detector_with_any_bit_flipped_or_cut_anywhere(guarded, saved):
    """In each region: the length, the header, its metadata, every tensor. (Other spaces in the header say the same.)"""
    path = guarded / "model"
    rng = np.random.default_rng(0)
    length = struct.unpack("<Q", saved[:8])[0]
    flips = [*range(8 * 8), *(8 * rng.integers(8, len(saved), 600) + rng.integers(0, 8, 600)).tolist()]
    cuts = [*range(0, 16), *rng.integers(16, len(saved), 60).tolist(), 8 + length - 1, 8 + length, len(saved) - 1]
    for bit in flips:
        altered = bytearray(saved)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        assert isinstance(resident(persistence.load, path), ModelFileError), bit
    for cut in cuts:
        path.write_bytes(saved[:cut])
        assert isinstance(resident(persistence.load, path), ModelFileError), cut


def forged(saved: bytes, change) -> bytes:
    """With another description and other tensors, and the right SHA-256."""
    held = safetensors.torch.load(saved)
    length = struct.unpack("<Q", saved[:8])[0]
    description = json.loads(json.loads(saved[8 : 8 + length])["__metadata__"][persistence.FORMAT])
    change(description, held)
    description["sha256"] = persistence._digest(description, held)
    return safetensors.torch.save(held, {persistence.FORMAT: json.dumps(description)})


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-(2**40), 2**40), st.none(), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=6), st.integers(), max_size=2),
)


@pytest.mark.medium
@given(data=st.data())
def test_detectors_that_say_anything(guarded, saved, data):
    """A description with values of any kind in the place of its own, at any depth."""

    def change(description: dict, held: dict) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            at, keys = description, []
            while isinstance(at, dict) and at:
                keys.append(data.draw(st.sampled_from(sorted(at))))
                if not data.draw(st.booleans()):
                    break
                parent, at = at, at[keys[-1]]
                if not isinstance(at, dict) or not at:
                    at = parent
                    break
            if isinstance(at, dict) and keys[-1] in at:
                at[keys[-1]] = data.draw(ODD)

    path = guarded / "model"
    path.write_bytes(forged(saved, change))
    found = resident(persistence.load, path)
    if not isinstance(found, ModelFileError):
        found.score_samples(np.zeros((2, 4)))


@given(data=st.data())
def test_detectors_with_any_tensors(guarded, saved, data):
    types = [torch.float64, torch.float32, torch.int64, torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn]

    def change(description: dict, held: dict) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            name = data.draw(st.sampled_from([*sorted(held), "model.x", "score.y", "z"]))
            shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
            fill = data.draw(st.sampled_from([0.0, 1.0, -1.0, 3e38]))
            held[name] = torch.full(shape, fill, dtype=torch.float64).to(data.draw(st.sampled_from(types)))

    path = guarded / "model"
    path.write_bytes(forged(saved, change))
    found = resident(persistence.load, path)
    if not isinstance(found, ModelFileError):
        found.score_samples(np.zeros((2, 4)))


HUGE = 1 << 50


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        *(
            struct.pack("<Q", len(header)) + header
            for header in (
                json.dumps({"a": {"dtype": "F64", "shape": [HUGE], "data_offsets": [0, 8 * HUGE]}}).encode(),
                json.dumps({"a": {"dtype": "F64", "shape": [HUGE, HUGE, 0], "data_offsets": [0, 0]}}).encode(),
                json.dumps({"a": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}}).encode(),
                json.dumps({"__metadata__": {persistence.FORMAT: "[" * 90_000}}).encode(),
                json.dumps({"__metadata__": {persistence.FORMAT: '{"format":' * 9_000}}).encode(),
                json.dumps({"__metadata__": {persistence.FORMAT: "9" * 90_000}}).encode(),
                json.dumps({"__metadata__": {persistence.FORMAT: "NaN"}}).encode(),
            )
        ),
    ],
    ids=range(10),
)
def test_detectors_with_lying_or_bottomless_headers(guarded, content):
    path = guarded / "model"
    path.write_bytes(content)
    assert isinstance(resident(persistence.load, path), ModelFileError)
