"""The conformance suite: its verdicts tell the four words apart, gradext is right or refuses, and the table is true."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[2]


def load(name: str):
    # By path: the tests run on the installed package, without the source folder on sys.path.
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"benchmarks.{name}")


conformance, situations = load("conformance"), load("situations")
TABLE = (ROOT / "docs" / "conformance.md").read_text()
COLUMNS = [c.rpartition(" ")[0] or c for c in re.search(r"^\| \| (.*) \|$", TABLE, re.M)[1].split(" | ")]
CLAIMED = {
    cells[0]: dict(zip(COLUMNS, [cell.strip("* ") for cell in cells[1:]], strict=True))
    for cells in (line[2:-2].split(" | ") for line in TABLE.splitlines() if line.startswith("| "))
    if cells[-1].strip("*") in ("right", "wrong", "left out", "refused")
}
REFUSED = {  # by gradext -> a part of the reason
    "lazy layers": "call the model once",
    "a reentrant checkpoint": "use_reentrant=False",
    "BatchNorm in training mode": "samples mix",
    "a contrastive loss": "samples mix",
    "a loss that mixes from the second call on": "samples mix",
}


@pytest.mark.parametrize("name", situations.SITUATIONS)
def test_gradext_is_right_or_refuses_with_a_reason(name):
    word, why = conformance.outcome(conformance.with_gradext, situations.SITUATIONS[name])
    if name in REFUSED:
        assert (word, REFUSED[name] in why) == ("refused", True), why
    else:
        assert word == "right", why


def changed(change):
    """An adapter whose results are changed after the fact."""

    def adapter(model, call, loss):
        return change(dict(conformance.with_a_loop(model, call, loss)))

    return adapter


def raising(found):
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda found: found, "right"),
        (lambda found: found | {"0.weight": found["0.weight"] * 1.001}, "wrong"),
        (lambda found: found | {"0.weight": found["0.weight"].roll(1, 0)}, "wrong"),
        (lambda found: found | {"0.weight": found["0.weight"][:-1]}, "wrong"),
        (lambda found: found | {"0.weight": found["0.weight"] * torch.nan}, "wrong"),
        (lambda found: {name: g for name, g in found.items() if name != "2.bias"}, "left out"),
        (lambda found: found | {"2.bias": None}, "left out"),
        (lambda found: {"0.weight": found["0.weight"] * 2}, "wrong"),
        (raising, "refused"),
    ],
)
def test_the_four_words(change, word):
    assert conformance.outcome(changed(change), situations.SITUATIONS["`model.train()`"])[0] == word


def test_a_small_sample_beside_an_outlier_counts():
    name = "two samples that read each other, beside an outlier of 1e9"

    def adapter(model, call, loss):
        found = dict(conformance.with_gradext(model, call, loss))
        found["a.weight"][0] *= 1.001
        return found

    assert conformance.outcome(adapter, situations.SITUATIONS[name])[0] == "wrong"


@pytest.fixture
def every(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)  # of the models in tests.zoo
    return {**situations.SITUATIONS, **situations.zoo()}


def test_the_table_has_every_situation(every):
    assert list(CLAIMED) == list(every)


@pytest.mark.peers
@pytest.mark.parametrize("library", conformance.LIBRARIES)
def test_the_table_says_what_libraries_do(library, every):
    try:
        _, adapter = conformance.adapter_of(library)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    found = {name: conformance.outcome(adapter, s)[0] for name, s in every.items() if not s.unavailable}
    assert found == {name: CLAIMED[name][library] for name in found}
