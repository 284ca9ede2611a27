"""Data larger than memory: bit for bit the results of an array, within a memory limit."""

import itertools
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gradext.novelty import NoveltyDetector, batches, detector
from gradext.novelty.passes import Blocks, Processes, share

FAST = {"hidden_dim": 16, "latent_dim": 4, "epochs": 3, "batch_size": 32, "random_state": 0}
COMBINED = {"novelty_score": "combined_whitened_norm", "layer": ("first", "last")}


class Rows(Dataset):
    def __init__(self, X):
        self.X = X

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return self.X[row], "label"


class Stream(IterableDataset):
    def __init__(self, X):
        self.X = X

    def __iter__(self):
        return iter(self.X)


class Shards:
    """Has a length, in batches, as loaders of one's own have."""

    def __init__(self, X):
        self.parts = np.array_split(X, 5)

    def __len__(self):
        return len(self.parts)

    def __iter__(self):
        return iter(self.parts)


def memory_map(X, folder):
    np.save(folder / "x.npy", X)
    return np.load(folder / "x.npy", mmap_mode="r")


FORMS = {
    "memory map": memory_map,
    "DataLoader": lambda X, _: DataLoader(TensorDataset(torch.tensor(X), torch.arange(len(X))), batch_size=7),
    "DataLoader of two workers": lambda X, _: DataLoader(torch.tensor(X), batch_size=50, num_workers=2),
    "Dataset": lambda X, _: Rows(X),
    "IterableDataset": lambda X, _: Stream(X),
    "generator": lambda X, _: (part for part in np.array_split(X, 9)),
    "iterable": lambda X, _: Shards(X),
    "map": lambda X, _: map(torch.tensor, np.array_split(X, 3)),
}


def assert_same(found, expected):
    for name, value in expected.model_.state_dict().items():
        assert torch.equal(found.model_.state_dict()[name], value), name
    for name, value in expected.score_.tensors().items():
        assert torch.equal(found.score_.tensors()[name], value), name
    np.testing.assert_array_equal(found.calibration_.scores, expected.calibration_.scores)
    assert (found.offset_, found.profile_, found.history_) == (expected.offset_, expected.profile_, expected.history_)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks, and training samples that are read anew for each batch."""
    monkeypatch.setattr(batches, "BLOCK_ROWS", 16)
    monkeypatch.setattr(detector, "HELD_BYTES", 0)


@pytest.mark.medium
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_bits_of_an_array(form, digits, small_blocks, tmp_path):
    expected = NoveltyDetector(**COMBINED, **FAST).fit(digits[0])
    found = NoveltyDetector(**COMBINED, **FAST).fit(FORMS[form](digits[0], tmp_path))
    assert_same(found, expected)
    scores = found.score_samples(FORMS[form](digits[1][:100], tmp_path))
    np.testing.assert_array_equal(scores, expected.score_samples(digits[1][:100]))


@pytest.mark.parametrize("options", [{"contamination": 0.1}, {"novelty_score": "gradient_cosine"}, COMBINED])
@pytest.mark.parametrize("images", [False, True])
def test_what_is_held_in_memory_does_not_matter(options, images, digits, monkeypatch):
    X = np.stack([digits[0].reshape(-1, 8, 8)] * 3, axis=1) * np.array([1, 0.7, 0.4])[:, None, None]
    X = X if images else digits[0]
    held = NoveltyDetector(**options, **FAST).fit(X)
    monkeypatch.setattr(detector, "HELD_BYTES", 0)
    assert_same(NoveltyDetector(**options, **FAST).fit(X), held)
    # The statistics' sums are taken in another order: their rounding differs, 1e-16 of each term.
    monkeypatch.setattr(batches, "BLOCK_ROWS", 16)
    in_blocks = NoveltyDetector(**options, **FAST).fit(X)
    np.testing.assert_allclose(in_blocks.score_samples(X), held.score_samples(X), rtol=1e-9)


@pytest.mark.medium
def test_a_classifier_is_trained_on_as_many_samples_as_fit(digits, monkeypatch):
    seen = []
    original = detector.distort
    monkeypatch.setattr(detector, "distort", lambda x, **options: seen.append(len(x)) or original(x, **options))
    NoveltyDetector("gradient_classifier", **FAST).fit(digits[0])
    monkeypatch.setattr(detector, "HELD_BYTES", 2 * 10 * 8 * (64 + 64 + 16))  # 10 pairs of losses and factors
    NoveltyDetector("gradient_classifier", **FAST).fit(digits[0])
    assert seen == [len(digits[0]) - 27 - 36, 10]


def test_calibration_samples_come_in_batches_too(digits, small_blocks):
    expected = NoveltyDetector(**FAST).fit(digits[0][:140], X_calibration=digits[0][140:])
    assert_same(NoveltyDetector(**FAST).fit(digits[0][:140], X_calibration=Shards(digits[0][140:])), expected)


def test_batches_are_scored_as_they_come_in_their_order(digits, small_blocks):
    fitted = NoveltyDetector(**FAST).fit(digits[0])
    X, taken = digits[1][:100], []

    def given():
        for row in range(100):
            taken.append(row)
            yield X[row : row + 1]

    np.testing.assert_array_equal(fitted.p_values(given()), fitted.p_values(X))
    np.testing.assert_array_equal(fitted.predict(given()), fitted.predict(X))
    assert taken == [*range(100)] * 2, "once each time"
    np.testing.assert_array_equal(fitted.score_samples(iter([X.reshape(-1, 1, 8, 8)])), fitted.score_samples(X))


def test_odd_batches_are_refused_with_their_number(digits):
    X = digits[0]
    fitted = NoveltyDetector(**FAST).fit(X)
    broken = X.copy()
    broken[130, 5] = np.nan
    for call in (NoveltyDetector(**FAST).fit, fitted.score_samples):
        with pytest.raises(ValueError, match=r"the first is float32 \[3, 64\] and batch 1 is float64 \[2, 64\]"):
            call(iter([X[:3], X[:2].astype(np.float64)]))
        with pytest.raises(ValueError, match=r"the first is float32 \[3, 64\] and batch 1 is float32 \[3, 60\]"):
            call(iter([X[:3], X[:3, :60]]))
        with pytest.raises(TypeError, match="batch 0 is dict, its samples object"):
            call(iter([{"x": X[:3]}]))
        with pytest.raises(TypeError, match=r"batch 0 is ndarray, its samples float32 \[64\]"):
            call(iter(X))
        for nothing in (iter([]), iter([X[:0]])):
            with pytest.raises(ValueError, match="at least one sample, but got no batch that holds any"):
                call(nothing)
        with pytest.raises(ValueError, match=r"1 samples hold NaN or infinity, first \[130\]"):
            call(iter([broken[:70], broken[70:]]))


def test_a_full_disk_is_told_with_what_to_do(digits, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: open("/dev/full", "w+b"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device after 0 samples; set TMPDIR"):
        NoveltyDetector(**FAST).fit(iter([digits[0]]))


# --- memory ----------------------------------------------------------------------------------------------------------

CHILD = """
import resource, sys
import numpy as np, torch
from gradext.novelty import NoveltyDetector, detector

torch.set_num_threads(1)
path, form = sys.argv[1:]
detector.HELD_BYTES = 1 << 24
options = dict(hidden_dim=16, latent_dim=4, epochs=1, random_state=0)
score = dict(novelty_score="combined_whitened_norm", layer=("first", "last"))
NoveltyDetector(**score, **options).fit(np.random.default_rng(0).random((300, 256)))  # what is loaded at first use
(data,) = (int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + (40 << 20),) * 2)
X = np.load(path, mmap_mode=None if form == "array" else "r")
if form == "generator":
    X, mapped = (mapped[k : k + 500] for mapped in [X] for k in range(0, len(mapped), 500)), X
fitted = NoveltyDetector(**score, **options).fit(X)
scores = fitted.score_samples((X[k : k + 500] for k in range(0, len(X), 500)) if form == "map" else mapped)
print(len(scores))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux' limit on private memory")
@pytest.mark.parametrize("form", ["map", "generator", "array"])
def test_fit_and_score_in_a_fifth_of_the_datas_size(form, tmp_path):
    """205 MB with 42 MB more than a small fit takes. Pages of a map are the system's to take back and not counted.

    Nor counted is what the C library keeps of freed memory, which depends on the machine: large blocks are given back.
    """
    N, D = 100_000, 256
    X = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float64, shape=(N, D))
    rng = np.random.default_rng(0)
    for k in range(0, N, 5000):
        X[k : k + 5000] = rng.random((5000, D))
    X.flush()
    command = [sys.executable, "-c", CHILD, str(tmp_path / "x.npy"), form]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    if form == "array":
        assert "MemoryError" in done.stderr, "the limit would not be felt"
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{N}\n"


# --- several processes -----------------------------------------------------------------------------------------------


class Pretended(Processes):
    """One of ``world`` processes that run one after the other: what one gathers is kept for the last."""

    def __init__(self, rank, world, given):
        super().__init__()
        self.rank, self.world, self.given = rank, world, given

    def gather(self, value):
        self.given.append(value)
        return self.given if self.rank == self.world - 1 else [value]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 37])
def test_passes_do_not_depend_on_the_number_of_processes(count):
    def totals(world):
        given = []
        for rank in range(world):
            blocks = Blocks(lambda k: k, count, torch.empty(0), Pretended(rank, world, given))
            if rank < world - 1 and not blocks.processes.share(count):
                given.append([])  # nothing of its own to return
            else:
                found = blocks.total(str, lambda left, right: f"({left} {right})")
        return found

    alone = totals(1)
    assert [int(n) for n in alone.replace("(", " ").replace(")", " ").split()] == list(range(count))
    depth = max(itertools.accumulate((c == "(") - (c == ")") for c in alone))
    assert depth <= np.ceil(np.log2(count)), "a tree, in which rounding does not pile up"
    for world in range(2, 12):
        assert totals(world) == alone


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_follow_one_another(world):
    assert [k for rank in range(world) for k in share(13, rank, world)] == list(range(13))
