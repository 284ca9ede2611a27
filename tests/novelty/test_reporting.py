"""The report is one complete file: all sections are in it, no external resources, names are escaped."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from gradext.cli import main
from gradext.novelty.evaluation import auroc_interval


class Page(html.parser.HTMLParser):
    """What a page loads, and whether its tags close."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.tags, self.text, self.last = [], [], set(), "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "table":
            assert self.last == ("div", [("class", "wide")]), "a table scrolls on a phone"
        self.last = tag, attrs
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "digits"
    assert main(["images", "digits", "--out", str(folder)]) == 0
    arguments = ["--hidden-dim", "32", "--latent-dim", "4", "--epochs", "100"]
    assert main(["fit", str(folder / "train" / "0"), "--out", str(folder / "m"), *arguments]) == 0
    return folder


def report(digits, *arguments):
    out = digits / "report.html"
    assert main(["report", str(digits / "m"), *map(str, arguments), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert page.loaded
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", value) for value in page.loaded)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"url\(|@import|https?:", text)
    assert 'name="viewport" content="width=device-width' in text
    assert max(int(width) for width in re.findall(r"[; {](?:min-)?width: (\d+)px", text)) <= 320
    return page


def test_labelled_images_with_training_samples(digits, capsys):
    page = report(digits, digits / "test", "--normal", "0", "--training", digits / "train" / "0")
    for part in ("AUROC", "average precision", "Most novel", "Layers", "decoder.2", "Nearest training gradients"):
        assert part in page.text
    capsys.readouterr()
    assert main(["evaluate", str(digits / "m"), str(digits / "test"), "--normal", "0", "--json"]) == 0
    assert f"{json.loads(capsys.readouterr().out)['auroc']:.3f}" in page.text
    # four plots, 12 samples with reconstruction and map, 12 rows of a sample and 5 neighbours
    assert len(page.loaded) == 4 + 12 * 3 + 12 * 6
    for part in ("By label", "Borderline", "Called novel: ", "95%: "):
        assert part in page.text
    assert not re.search("inlier|outlier", page.text)


@pytest.mark.medium
def test_neighbours_are_sought_among_normal_training_samples(digits, tmp_path):
    """Of images by their folders, of tables by the column of labels, which is no feature."""
    page = report(digits, digits / "test" / "1", "--training", digits / "train")
    assert f"among {len(list((digits / 'train').glob('*/*.png'))):,} training samples" in page.text
    page = report(digits, digits / "test", "--normal", "0", "--training", digits / "train")
    assert f"among {len(list((digits / 'train' / '0').glob('*.png')))} training samples" in page.text

    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.random.default_rng(0).normal(size=(120, 3)), columns=list("abc"))
    frame.to_csv(tmp_path / "normal.csv", index=False)
    frame.assign(kind=["good", "bad"] * 60).to_csv(tmp_path / "t.csv", index=False)
    model, labels = tmp_path / "m", ["--labels", "kind", "--normal", "good"]
    fit = ["fit", str(tmp_path / "t.csv"), *labels, "--out", str(model), "--hidden-dim", "8", "--epochs", "3"]
    assert main(fit) == 0
    for training, among in (("t.csv", 60), ("normal.csv", 120)):
        arguments = [str(model), str(tmp_path / "t.csv"), *labels, "--training", str(tmp_path / training)]
        assert main(["report", *arguments, "--out", str(tmp_path / "r.html")]) == 0
        assert f"among {among} training samples" in (tmp_path / "r.html").read_text()


def test_folders_are_told_apart_also_where_no_normal_one_is_named(digits):
    page = report(digits, digits / "test")
    assert "By label" in page.text
    assert "95% interval" not in page.text
    assert re.search(r"labelsamplescalled novel0\d\d[\d.]+%1\d\d[\d.]+%2", page.text)


def test_without_labels_and_with_one_kind(digits):
    assert "AUROC" not in report(digits, digits / "test").text
    one = report(digits, digits / "test" / "0").text
    assert "AUROC" not in one
    assert "called novel" in one


def test_tables_name_the_strongest_features(digits, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.random.default_rng(0).normal(size=(120, 5)), columns=list("abcde"))
    frame.to_csv(tmp_path / "t.csv", index=False)
    model = tmp_path / "m"
    assert main(["fit", str(tmp_path / "t.csv"), "--out", str(model), "--hidden-dim", "8", "--epochs", "3"]) == 0
    out = tmp_path / "r.html"
    assert main(["report", str(model), str(tmp_path / "t.csv"), "--out", str(out)]) == 0
    assert re.search(r"<br>[a-e]: -?[\d.]+, expected -?[\d.]+ \(\d+%\)", out.read_text())


def test_what_the_fit_warned_of_is_in_the_report(tmp_path):
    X = np.random.default_rng(0).normal(size=(40, 4))
    X[:, 2] = 7
    np.save(tmp_path / "x.npy", X)
    assert main(["fit", str(tmp_path / "x.npy"), "--out", str(tmp_path / "m"), "--quiet"]) == 0
    assert main(["report", str(tmp_path / "m"), str(tmp_path / "x.npy"), "--out", str(tmp_path / "r.html")]) == 0
    page = Page((tmp_path / "r.html").read_text())
    assert "constant features: 1 of 4" in page.text
    assert "target_fpr=0.05 cannot be promised with 8 held-out samples" in page.text


def test_intervals_hold_the_auroc_they_are_of():
    """Of 300 draws from two normals, whose AUROC is Φ(1/√2), about 95%."""
    rng, true, held = np.random.default_rng(0), 0.7602499, 0
    for _ in range(300):
        novelty = np.r_[rng.normal(0, 1, 60), rng.normal(1, 1, 40)]
        area, low, high = auroc_interval(np.arange(100) >= 60, novelty)
        assert area == pytest.approx(roc_auc_score(np.arange(100) >= 60, novelty))
        assert 0 <= low <= area <= high <= 1
        held += low <= true <= high
    assert 275 <= held <= 295
    area, low, high = auroc_interval(np.array([0, 0, 0, 1, 1], bool), np.arange(5.0))
    assert area == high == 1
    assert 0.3 < low < 1


def test_names_are_escaped_and_skipped_images_shown(digits, tmp_path):
    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"<b>{k}&.png")
    (folder / "broken.png").write_bytes(b"")
    page = report(digits, tmp_path, "--skip-unreadable")
    assert "<b>0&.png" in page.text
    assert "Skipped: 1" in page.text


def test_an_unwritable_report_is_told_before_anything_is_scored(digits, tmp_path, capsys):
    assert main(["report", str(digits / "m"), str(digits / "test"), "--out", str(tmp_path / "none" / "r.html")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
