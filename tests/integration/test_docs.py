"""The documents: their examples run, their links exist, and every public name has an example."""

import inspect
import re
import subprocess
from pathlib import Path

import pytest

import gradext
import gradext.novelty
import gradext.registered

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
RUNNABLE = [page for page in PAGES if page.parent.name == "docs" and "```python" in page.read_text()]


def test_there_are_examples():
    assert {page.name for page in RUNNABLE} >= {"extending.md", "usage.md", "novelty.md"}


@pytest.mark.medium
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_examples_run_one_after_the_other(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    layers = dict(gradext.registered._registered)  # a copy: what a page registers is for this test alone
    monkeypatch.setattr(gradext.registered, "_registered", layers)
    names = {"__name__": page.stem}
    for source in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(source, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_front_page_of_the_api_names_what_to_use_first_and_the_other_pages():
    page = gradext.__doc__
    for name in ("batch_layer_grads", "batch_layer_factors", "watch", "iter_layer_grads", "gradext.novelty"):
        assert f"`{name}`" in page
    assert gradext.__all__[:3] == ["batch_layer_grads", "batch_layer_factors", "watch"]


SEARCHES = re.findall(r"^\| [^|]+ \| `(grep [^`]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_searches_of_contributing_find_something(search):
    found = subprocess.run(search, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout
    assert not found.stderr


def test_there_are_four_searches():
    assert len(SEARCHES) == 4


def test_the_citation_has_what_its_format_requires():
    text = (ROOT / "CITATION.cff").read_text()
    for key in ("cff-version", "message", "title", "authors", "preferred-citation"):
        assert re.search(rf"^{key}:", text, re.M), key
    assert "Novelty Detection Through Model-Based Characterization of Neural Networks" in text


# Functions whose example would need a GPU, or that examples elsewhere show: kinds of factors, parts of the detector.
SHOWN_ELSEWHERE = {
    "make_graphed_layer_grads", "Checkpoint", "ConvFactors", "EmbeddingFactors", "FittedScore", "GradientAlignment",
    "GradientFeatures", "History", "NoiseClassifier", "Characterization", "Statistics", "distort", "features",
    "fit_score", "load", "train", "train_classifier",
}  # fmt: skip


@pytest.mark.parametrize("module", [gradext, gradext.novelty], ids=lambda module: module.__name__)
def test_public_names_show_how_they_are_used(module):
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value) or (isinstance(value, type) and issubclass(value, (Exception, Warning))):
            continue
        assert inspect.getdoc(value), name
        assert ">>>" in value.__doc__ or name in SHOWN_ELSEWHERE, f"{name} has no example"
