"""Sources of samples: every kind that can be read, and the errors for those that cannot."""

import gzip
import sys

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


@pytest.mark.parametrize("top", [0xFFFF, 0xFFF])
def test_16_bit_grey_keeps_its_levels(tmp_path, top):
    values = np.random.default_rng(0).integers(0, top, (2, 40, 60), endpoint=True).astype(np.uint16)
    for k, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    picture(tmp_path / "8-bit.png", size=(60, 40))
    source = open_source(tmp_path)
    assert source.image_format == ImageFormat(40, 60, "L", bits=16)
    images = everything(source).samples
    assert images.dtype == np.uint16
    np.testing.assert_array_equal(images[:2], values)
    np.testing.assert_array_equal(images[2], 257 * np.asarray(Image.open(tmp_path / "8-bit.png")).astype(int))
    grey = everything(open_source(tmp_path, image_format=ImageFormat(40, 60, "L"))).samples
    np.testing.assert_array_equal(grey[:2], values // 257)
    assert np.ptp(everything(open_source(tmp_path, size=(20, 30))).samples[0].astype(int)) > top // 3, "resized"


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
    with pytest.raises(
        DatasetError,
        match="expected numeric columns, got class with values such as 'ok'; leave them out by --drop class",
    ):
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
    with pytest.raises(
        DatasetError,
        match=r"expected a file of type .npy, .npz, .csv, .tsv, .csv.gz, .tsv.gz, .parquet, or an image, got .txt",
    ):
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


# --- folders and files as they are -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["{}_mask.png", "{}.png"])
def test_an_inspection_root_has_its_parts(tmp_path, mask):
    for k in range(3):
        picture(tmp_path / f"train/good/{k:03}.png", mode="RGB", seed=k)
        picture(tmp_path / f"test/good/{k:03}.png", mode="RGB", seed=10 + k)
        picture(tmp_path / f"test/crack/{k:03}.png", mode="RGB", seed=20 + k)
        picture(tmp_path / "ground_truth" / "crack" / mask.format(f"{k:03}"), seed=30 + k)
    train, test = (open_source(tmp_path, part=part) for part in ("train", "test"))
    assert list(train.names) == [f"train/good/{k:03}.png" for k in range(3)]
    assert train.image_format.mode == "RGB"
    assert set(test.labels) == {"good", "crack"}
    assert train.normal == test.normal == ("good",)
    assert [test.names[row] for row in test.masks] == [f"test/crack/{k:03}.png" for k in range(3)]
    assert "inspection folder" in train.notes[0]
    assert len(open_source(tmp_path)) == 12, "without a part all images are there"


def test_links_to_folders_are_followed_once(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for k in range(3):
        picture(elsewhere / f"{k}.png", seed=k)
    root = tmp_path / "root"
    picture(root / "own" / "3.png")
    (root / "a").symlink_to(elsewhere, target_is_directory=True)
    (root / "b").symlink_to(elsewhere, target_is_directory=True)
    (root / "own" / "loop").symlink_to(root, target_is_directory=True)
    source = open_source(root)
    assert list(source.names) == ["a/0.png", "a/1.png", "a/2.png", "own/3.png"]
    assert everything(source).samples.shape == (4, 4, 6)
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert len(open_source(tmp_path / "link")) == 4


def test_one_picture(tmp_path):
    pixels = picture(tmp_path / "x" / "one.png")
    picture(tmp_path / "x" / "other.png", seed=1)
    source = open_source(tmp_path / "x" / "one.png")
    assert list(source.names) == ["one.png"]
    np.testing.assert_array_equal(everything(source).samples, pixels[None])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(640, 480)] * 3, (48, 64)), ([(90, 60), (60, 90), (50, 50)], None), ([(20, 10)] * 2, (10, 20))],
)
def test_photos_are_brought_to_a_size_of_their_own_accord(tmp_path, sizes, expected):
    for k, size in enumerate(sizes):
        picture(tmp_path / f"{k}.png", size=size, seed=k)
    source = open_source(tmp_path, auto_size=True)
    images = everything(source).samples
    assert max(images.shape[1:]) <= 64
    assert expected is None or images.shape[1:] == expected
    assert bool(source.notes) == (sizes[0] != (20, 10))
    assert all("--size HxW" in note for note in source.notes)


def test_padding_keeps_the_proportions(tmp_path):
    Image.fromarray(np.full((10, 40), 255, np.uint8)).save(tmp_path / "wide.png")
    stretched, padded = (everything(open_source(tmp_path, size=(20, 20), pad=pad)).samples[0] for pad in (False, True))
    assert (stretched == 255).all()
    assert (padded[8:12] > 200).all()
    assert (padded[:7] == 0).all()


def test_heic_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.HEIC").write_bytes(b"x")
    for data in (tmp_path, tmp_path / "a.HEIC"):
        with pytest.raises(DatasetError, match="need pillow-heif: pip install pillow-heif"):
            open_source(data)
    picture(tmp_path / "b.png")
    with pytest.warns(UserWarning, match=r"left out: a\.HEIC"):
        source = open_source(tmp_path, skip_unreadable=True)
    assert list(source.names) == ["b.png"]
    assert "pillow-heif" in source.notes[0]


TEXTS = {
    "comma": ("t.csv", "a,b\n1.5,2\n3,4\n"),
    "semicolon and decimal comma": ("t.csv", "a;b\n1,5;2\n3,0;4\n"),
    "semicolon": ("t.csv", "a;b\n1.5;2\n3;4\n"),
    "tab": ("t.tsv", "a\tb\n1.5\t2\n3\t4\n"),
    "tab and decimal comma": ("t.csv", "a\tb\n1,5\t2\n3,0\t4\n"),
    "bar": ("t.csv", "a|b\n1.5|2\n3|4\n"),
    "pandas index": ("t.csv", ",a,b\n0,1.5,2\n1,3,4\n"),
    "named index": ("t.csv", "index,a,b\n0,1.5,2\n1,3,4\n"),
    "gzip": ("t.csv.gz", "a,b\n1.5,2\n3,4\n"),
    "gzip, tab": ("T.TSV.GZ", "a\tb\n1.5\t2\n3\t4\n"),
    "one column of thousands": ("t.csv", "a\n1.5\n3\n"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_tables_of_text_in_any_dialect(tmp_path, name):
    pytest.importorskip("pandas")
    file, text = TEXTS[name]
    content = text.encode()
    (tmp_path / file).write_bytes(gzip.compress(content) if file.lower().endswith(".gz") else content)
    source = open_source(tmp_path / file)
    samples = everything(source).samples
    assert list(samples.columns) == (["a"] if "one column" in name else ["a", "b"])
    np.testing.assert_array_equal(samples["a"], [1.5, 3])
    assert bool(source.notes) == ("index" in name)


def test_columns_are_chosen_and_left_out(tmp_path):
    pytest.importorskip("pandas")
    path = tmp_path / "t.csv"
    path.write_text("id,a,b,kind\nx,1,2,ok\ny,3,4,bad\n")
    with pytest.raises(DatasetError, match="got id, kind with values such as 'x'; leave them out by --drop id kind"):
        open_source(path)
    assert list(everything(open_source(path, drop=["id", "kind"])).samples.columns) == ["a", "b"]
    assert list(everything(open_source(path, columns=["b", "a"])).samples.columns) == ["b", "a"]
    source = open_source(path, labels="kind", fitted_columns=["b", "a"])
    assert list(everything(source).samples.columns) == ["b", "a"]
    assert source.labels.tolist() == ["ok", "bad"]
    assert "left out: id" in source.notes[0]
    with pytest.raises(DatasetError, match="--columns and --drop: expected some of id, a, b, kind, got c"):
        open_source(path, drop=["c"])


def test_gaps_and_missing_columns_are_named(tmp_path):
    pytest.importorskip("pandas")
    path = tmp_path / "t.csv"
    path.write_text("a,b,c\n1,2,3\n1,,inf\n4,,6\n")
    with pytest.raises(DatasetError, match=r"b, c has empty .* b in 2 of 3 rows, first in row 1; .* --drop b"):
        open_source(path)
    assert list(everything(open_source(path, drop=["b", "c"])).samples.columns) == ["a"]
    path.write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(DatasetError, match=r"the columns of the model, b, d, a, but has no d; name them alike"):
        open_source(path, fitted_columns=["b", "d", "a"])
