"""Thresholds, p-values and selections: their guarantees, by simulation."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from gradext.novelty import Calibration, NoveltyDetector, Statistics, benjamini_hochberg, characterize
from gradext.novelty.scores import NEEDS, SCORES

FAST = {"hidden_dim": 32, "latent_dim": 4, "epochs": 40, "batch_size": 32, "learning_rate": 3e-3, "random_state": 0}


def test_threshold_is_the_conformal_quantile():
    calibration = Calibration(np.arange(19.0)[::-1])
    assert calibration.threshold(0.05) == 18  # k = ⌈20 · 0.95⌉ = 19
    assert calibration.threshold(0.1) == 17
    assert calibration.threshold(0.5) == 9
    assert calibration.threshold(0.01) == 18, "no score is high enough: the largest"
    assert calibration.threshold(1 - 1e-12) == 0, "the smallest"
    assert calibration.attainable_fpr == 0.05


def test_p_values_are_ranks_with_ties_counted_against_novelty():
    calibration = Calibration(np.array([1.0, 2.0, 2.0, 3.0]))
    np.testing.assert_allclose(calibration.p_values(np.array([4.0, 3.0, 2.0, 0.0])), [1 / 5, 2 / 5, 4 / 5, 1])


@pytest.mark.parametrize("target_fpr", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("n", [19, 50, 200])
def test_false_alarms_come_at_the_promised_rate(n, target_fpr):
    """Over many draws of calibration and sample, from a skewed distribution: within the binomial's interval."""
    rng = np.random.default_rng(n)
    trials = 20_000
    scores = rng.gamma(0.5, size=(trials, n + 1))
    alarms = sum(row[-1] > Calibration(row[:-1]).threshold(target_fpr) for row in scores)
    # The exact rate, which never exceeds the wanted one where that is attainable.
    k = min(int(np.ceil((n + 1) * (1 - target_fpr) - 1e-9)), n)
    exact = (n + 1 - k) / (n + 1)
    assert exact <= max(target_fpr, 1 / (n + 1)) + 1e-12
    low, high = binom.interval(1 - 1e-4, trials, exact)
    assert low <= alarms <= high


def test_p_values_are_valid_and_uniform_on_their_grid():
    rng = np.random.default_rng(1)
    n, trials = 39, 20_000
    scores = rng.standard_normal((trials, n + 1))
    p = np.array([Calibration(row[:-1]).p_values(row[-1:])[0] for row in scores])
    for t in (1 / 40, 0.1, 0.25, 0.5, 0.9):
        low, high = binom.interval(1 - 1e-4, trials, np.floor(t * 40 + 1e-9) / 40)
        assert low <= (p <= t + 1e-12).sum() <= high


def test_benjamini_hochberg_is_its_definition():
    p = np.array([0.01, 0.02, 0.03, 0.5, 0.9])
    np.testing.assert_array_equal(benjamini_hochberg(p, 0.05), [True, True, True, False, False])
    # 0.04 > 0.05 · 1/5 and 0.05 > 0.05 · 2/5, but a later one passes and takes the earlier along
    np.testing.assert_array_equal(benjamini_hochberg(np.array([0.04, 0.04, 0.04, 0.04, 0.045]), 0.05), [True] * 5)
    assert not benjamini_hochberg(np.array([0.5, 0.6]), 0.1).any()
    assert benjamini_hochberg(np.array([0.1, 0.5, 0.9]), 0.3).tolist() == [True, False, False]  # 0.3 · 1/3 is 0.1
    assert benjamini_hochberg(np.empty(0), 0.1).shape == (0,)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_array_equal(benjamini_hochberg(p[order], 0.05), benjamini_hochberg(p, 0.05)[order])


def test_false_discovery_rate_holds():
    """The mean share of false discoveries is at most the share of nulls times fdr, within simulation error."""
    rng = np.random.default_rng(2)
    fdr, shares, found = 0.2, [], []
    for _ in range(1500):
        calibration = Calibration(rng.standard_normal(200))
        novel = np.arange(60) >= 40
        selected = benjamini_hochberg(calibration.p_values(rng.standard_normal(60) + 3 * novel), fdr)
        shares.append((selected & ~novel).sum() / max(1, selected.sum()))
        found.append((selected & novel).sum() / 20)
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= fdr * 40 / 60 + 4 * error
    assert np.mean(found) > 0.5, "it finds what is there"


def test_wrong_arguments_are_named():
    calibration = Calibration(np.arange(5.0))
    for call, name in (
        (lambda: calibration.threshold(0), "target_fpr"),
        (lambda: Calibration(np.empty(0)), "scores"),
        (lambda: Calibration(np.array([1, np.nan])), "scores"),
        (lambda: benjamini_hochberg(np.array([0.1]), 1.0), "fdr"),
        (lambda: benjamini_hochberg(np.array([1.1]), 0.1), "p_values"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


# --- in the detector -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_detector_holds_the_wanted_rate_on_its_calibration_part(digits, rate):
    held_out = digits[0][100:]
    detector = NoveltyDetector(target_fpr=rate, **FAST).fit(digits[0][:100], X_calibration=held_out)
    alarms = (detector.predict(held_out) == -1).sum()
    # One of the n + 1 ranks belongs to the sample to come.
    assert alarms == int((len(held_out) + 1) * rate + 1e-9) - 1


@pytest.mark.medium
@pytest.mark.parametrize(
    "score", [{}, {"novelty_score": "combined_whitened_norm", "layer": ("first", "last")}], ids=["norm", "whitened"]
)
def test_detectors_false_alarms_on_new_samples(score, digits):
    """Real images parted in 40 ways into training, calibration and test: the mean rate is at most the wanted one."""
    rates = []
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(len(digits[0]))
        train, test = digits[0][order[:130]], digits[0][order[130:]]
        detector = NoveltyDetector(target_fpr=0.2, **score, **{**FAST, "epochs": 5, "random_state": seed}).fit(train)
        rates.append((detector.predict(test) == -1).mean())
    error = np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) <= 0.2 + 3 * error
    assert np.mean(rates) > 0.05, "and it is not silent"


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::gradext.novelty.DetectorWarning")
@pytest.mark.parametrize(("N", "novel"), [(300, 0), (300, 15), (30, 0)])
def test_the_wanted_rate_holds_over_many_fits(N, novel):
    """On average over fits, also with novelties among the samples; with few samples at the rate that these attain."""
    rng = np.random.default_rng(0)
    mixing, alarms = rng.normal(size=(3, 10)), []

    def drawn(n):
        return rng.normal(size=(n, 3)) @ mixing + 0.3 * rng.normal(size=(n, 10))

    for k in range(20):
        X = np.concatenate([drawn(N - novel), 4 * rng.normal(size=(novel, 10))])
        detector = NoveltyDetector(epochs=8, hidden_dim=16, target_fpr=0.05, random_state=k).fit(X)
        alarms.append((detector.predict(drawn(1000)) == -1).mean())
    promised = max(0.05, detector.calibration_.attainable_fpr)
    assert np.mean(alarms) <= promised + 2 * np.std(alarms) / np.sqrt(20)
    assert novel or np.mean(alarms) >= promised / 2 - 2 * np.std(alarms) / np.sqrt(20)


@pytest.mark.parametrize("score", [name for name in SCORES if NEEDS[name]])
def test_statistics_are_of_all_samples_but_those_of_calibration(score, digits, monkeypatch):
    """Which is why p-values are valid: calibration samples and new ones meet the same finished score."""
    parts, split = [], NoveltyDetector._split
    monkeypatch.setattr(NoveltyDetector, "_split", lambda *arguments: parts.append(split(*arguments)) or parts[-1])
    options = {"layer": ("first", "last"), **FAST, "epochs": 3}
    fitted = NoveltyDetector(score, **options).fit(digits[0])
    training, validation, calibration = parts[0]
    others = fitted._as_samples(digits[0][np.concatenate([training, validation])], torch.float64)
    seen = characterize(fitted.model_, others, layer=("first", "last"), loss=fitted.loss_)
    expected = Statistics.of(seen, [score])
    for name, value in fitted.score_.tensors().items():
        assert torch.equal(value, expected.tensors()[name]), name
    other = digits[0].copy()
    other[calibration] = digits[1][: len(calibration)]
    again = NoveltyDetector(score, **options).fit(other)
    assert not np.array_equal(again.calibration_.scores, fitted.calibration_.scores)
    for name, value in fitted.score_.tensors().items():
        assert torch.equal(again.score_.tensors()[name], value), name


def test_p_values_and_discoveries_find_other_classes(digits):
    detector = NoveltyDetector(**{**FAST, "epochs": 200, "calibration_fraction": 0.4}).fit(digits[0][:140])
    inside, outside = detector.p_values(digits[0][140:]), detector.p_values(digits[1][:100])
    assert np.median(outside) < 0.1 < np.median(inside)
    found = detector.discoveries(np.concatenate([digits[0][140:], digits[1][:100]]), fdr=0.2)
    assert found[len(inside) :].mean() > 0.5
    assert found[: len(inside)].mean() < 0.3


def test_contamination_is_the_share_of_training_samples_called_novel(digits):
    X = np.concatenate([digits[0], digits[1][:20]])
    for share in (0.05, 0.2):
        predicted = NoveltyDetector(contamination=share, **FAST).fit_predict(X)
        assert (predicted == -1).sum() == pytest.approx(share * len(X), abs=1)
    for wrong in (0, 0.6, -1):
        with pytest.raises(ValueError, match=r"contamination: expected None or a number in \(0, 0.5\]"):
            NoveltyDetector(contamination=wrong).fit(X)


@pytest.mark.filterwarnings("ignore::gradext.novelty.DetectorWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_contamination_counts_what_overflows_as_novel(dtype, digits):
    X = np.concatenate([digits[0], digits[1][:20]]).astype(np.float64)
    X[[3, 30]] = 1e308
    model = nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 64))
    options = {"model": model, "epochs": 0, "scaling": "none", "loss": "mse", "layer": "last", "random_state": 0}
    options["dtype"] = dtype
    detector = NoveltyDetector(contamination=0.1, **options)
    predicted = detector.fit(X, X_calibration=digits[0]).predict(X)
    assert (predicted == -1).sum() == pytest.approx(0.1 * len(X), abs=1)
    assert predicted[3] == predicted[30] == -1
    with pytest.raises(ValueError, match=r"contamination: expected .* which overflow, 2, but got 0.001"):
        NoveltyDetector(contamination=0.001, **options).fit(X, X_calibration=digits[0])


def test_too_few_calibration_samples_are_told(digits):
    with pytest.warns(UserWarning, match=r"target_fpr=0.01 cannot be promised with 36 held-out samples.*hold out 99"):
        NoveltyDetector(target_fpr=0.01, **{**FAST, "epochs": 1}).fit(digits[0])
