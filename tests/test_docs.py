"""The documents: their examples run, their links lead somewhere, and every public name shows how it is used."""

import inspect
import re
from pathlib import Path

import pytest

import gradext
import gradext.novelty
import gradext.rules

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
RUNNABLE = [page for page in PAGES if page.parent.name == "docs" and "```python" in page.read_text()]


def test_there_are_examples():
    assert "extending.md" in [page.name for page in RUNNABLE]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_examples_run_one_after_the_other(page, monkeypatch):
    monkeypatch.setattr(
        gradext.registered, "_registered", dict(gradext.registered._registered)
    )  # their layers are theirs alone
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
