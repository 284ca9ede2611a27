"""Samples as people have them: every kind that can be read, and what is told of those that cannot."""

import numpy as np
import pytest
from PIL import Image

from gradext import sources
from gradext.datasets import DatasetError
from gradext.sources import ImageFormat, open_source


def picture(path, size=(6, 4), mode="L", seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def everything(source):
    return source.read(np.arange(len(source)))


def test_nested_folders_of_many_formats_in_a_fixed_order(tmp_path):
    expected = {}
    for k, name in enumerate(["b/2.png", "b/10.bmp", "a/x.tiff", "a/deep/y.gif", "top.webp"]):
        options = {"lossless": True} if name.endswith("webp") else {}
        expected[name] = picture(tmp_path / name, seed=k, **options)
    source = open_source(tmp_path, mode="L")
    assert list(source.names) == sorted(expected)
    assert source.image_format == ImageFormat(4, 6, "L")
    block = everything(source)
    assert block.samples.shape == (5, 4, 6)
    assert block.samples.dtype == np.uint8
    for image, name in zip(block.samples, source.names, strict=True):
        np.testing.assert_array_equal(image, expected[name], err_msg=name)
    assert source.labels is None, "one image is in no folder"


def test_labels_are_the_folders_names(tmp_path):
    for name in ("x/cat/1.png", "x/dog/1.png", "cat/2.png"):
        picture(tmp_path / name)
    assert open_source(tmp_path).labels.tolist() == ["cat", "cat", "dog"]


def test_colour_and_grey_are_brought_to_one_mode(tmp_path):
    colour = picture(tmp_path / "1.png", mode="RGB")
    grey = picture(tmp_path / "2.png", mode="L", seed=1)
    picture(tmp_path / "3.png", mode="RGBA", seed=2)
    block = everything(open_source(tmp_path))
    assert block.samples.shape == (3, 3, 4, 6)
    np.testing.assert_array_equal(block.samples[0], colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(block.samples[1], np.stack([grey] * 3))
    assert everything(open_source(tmp_path, mode="L")).samples.shape == (3, 4, 6)


def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path):
    values = (np.arange(24, dtype=np.uint16) * 2800).reshape(4, 6)
    Image.fromarray(values).save(tmp_path / "1.png")
    (image,) = everything(open_source(tmp_path)).samples
    np.testing.assert_array_equal(image, values // 257)


def test_turned_photographs_are_set_upright(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    image.save(tmp_path / "1.png", exif=exif)
    (read,) = everything(open_source(tmp_path)).samples
    np.testing.assert_array_equal(read, np.rot90(pixels, -1))


def test_sizes_differ(tmp_path):
    picture(tmp_path / "1.png")
    picture(tmp_path / "2.png", size=(7, 4))
    with pytest.raises(
        DatasetError, match=r"2.png: expected 4x6 pixels, got 4x7; `gradext fit --size HxW` resizes all"
    ):
        everything(open_source(tmp_path))
    assert everything(open_source(tmp_path, size=(5, 3))).samples.shape == (2, 5, 3)


def broken(folder):
    picture(folder / "1.png", size=(40, 40))
    picture(folder / "2.png", size=(40, 40), seed=1)
    content = (folder / "2.png").read_bytes()
    (folder / "3.png").write_bytes(content[: len(content) // 2])
    (folder / "4.png").write_bytes(b"")
    (folder / "5.jpg").write_bytes(b"not an image")


def test_unreadable_images_are_named_or_skipped_on_request(tmp_path):
    broken(tmp_path)
    with pytest.raises(
        DatasetError, match=r"3 of 5 images cannot be used: .*3\.png.*4\.png.*5\.jpg.*--skip-unreadable"
    ):
        everything(open_source(tmp_path))
    source = open_source(tmp_path, skip_unreadable=True)
    block = everything(source)
    assert block.index.tolist() == [0, 1]
    assert len(block.samples) == 2
    assert set(source.skipped) == {2, 3, 4}
    assert "3.png" in source.skipped[2]


def test_bombs_are_refused(tmp_path, monkeypatch):
    picture(tmp_path / "1.png", size=(10, 10))
    picture(tmp_path / "2.png", size=(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DatasetError, match="decompression bomb"):
        everything(open_source(tmp_path, size=(4, 4)))


def test_files_without_an_images_suffix_are_told_and_hidden_ones_passed_over(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    picture(tmp_path / ".hidden" / "2.png")
    with pytest.warns(UserWarning, match=r"1 files have no image's suffix and are left out: notes.txt"):
        source = open_source(tmp_path)
    assert list(source.names) == ["1.png"]
    (tmp_path / "1.png").unlink()
    with pytest.raises(DatasetError, match="expected image files, got 1 files, none with an image's suffix"):
        open_source(tmp_path)


def test_blocks_hold_a_few_images_at_a_time(tmp_path, monkeypatch):
    for k in range(7):
        picture(tmp_path / f"{k}.png", seed=k)
    read = []
    original = sources.read_image
    monkeypatch.setattr(sources, "read_image", lambda *a: read.append(a) or original(*a))
    blocks = open_source(tmp_path).blocks(np.arange(7), 3)
    assert not read
    assert len(next(blocks).samples) == 3
    assert len(read) == 3
    assert [len(b.index) for b in blocks] == [3, 1]


def test_arrays(tmp_path):
    X, y = np.random.default_rng(0).random((5, 3)), np.array([0, 1, 0, 1, 1])
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", y)
    (tmp_path / "y.txt").write_text("\n".join(map(str, y)) + "\n")
    np.savez(tmp_path / "both.npz", X=X, y=y)
    np.savez(tmp_path / "one.npz", data=X, truth=y.astype(float))
    for source in (
        open_source(tmp_path / "x.npy", labels=str(tmp_path / "y.npy")),
        open_source(tmp_path / "x.npy", labels=str(tmp_path / "y.txt")),
        open_source(tmp_path / "both.npz"),
        open_source(tmp_path / "one.npz", labels="truth"),
    ):
        np.testing.assert_array_equal(everything(source).samples, X)
        assert source.labels.tolist() == ["0", "1", "0", "1", "1"]
    source = open_source(tmp_path / "x.npy")
    assert isinstance(source.rows, np.memmap)
    assert source.labels is None


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(tmp_path, kind):
    pandas = pytest.importorskip("pandas")
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"a": [1.5, 2, 3], "b": [4, 5, 6], "class": ["ok", "ok", "bad"]})
    path = tmp_path / f"t.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    source = open_source(path, labels="class")
    assert source.labels.tolist() == ["ok", "ok", "bad"]
    assert list(everything(source).samples.columns) == ["a", "b"]
    with pytest.raises(DatasetError, match="expected numeric columns, got class"):
        open_source(path)
    path.write_bytes(b'a,b\n"1' if kind == "csv" else b"PAR1")
    with pytest.raises(DatasetError, match=rf"t\.{kind}"):
        open_source(path)


def test_standard_sets():
    source = open_source("digits")
    assert everything(source).samples.shape == (1797, 8, 8)
    assert everything(source).samples.max() == 1
    assert source.labels[:3].tolist() == ["0", "1", "2"]
    with pytest.raises(DatasetError, match="expected no part, got 'train'"):
        open_source("digits:train")


def test_what_cannot_be_data_is_named(tmp_path):
    with pytest.raises(DatasetError, match="there is nothing of that name"):
        open_source(tmp_path / "none")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DatasetError, match=r"expected a file of type .npy, .npz, .csv, .parquet, got .txt"):
        open_source(tmp_path / "x.txt")
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(DatasetError, match=r"expected an array \[N, D\] or \[N, ...\], N >= 1, got \[3\]"):
        open_source(tmp_path / "flat.npy")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(DatasetError, match="damaged, or not an array of numbers"):
        open_source(tmp_path / "objects.npy")
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-20])
    with pytest.raises(DatasetError, match="damaged"):
        open_source(tmp_path / "cut.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 2)), b=np.zeros((3, 2)))
    with pytest.raises(DatasetError, match=r"expected an array named X, or a single one, got \['a', 'b'\]"):
        open_source(tmp_path / "two.npz")
    np.save(tmp_path / "y.npy", np.zeros(2))
    with pytest.raises(DatasetError, match=r"expected 3 labels, one a row, got shape \[2\]"):
        open_source(tmp_path / "x.npy", labels=str(tmp_path / "y.npy"))
    with pytest.raises(DatasetError, match="--labels nowhere"):
        open_source(tmp_path / "x.npy", labels="nowhere")
