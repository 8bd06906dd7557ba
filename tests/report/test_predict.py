"""docs/results/predict.py: ranks against definitions, and a made-up run whose recovery follows one number and no other."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report import consolidation as study
from tests.report.consolidation import write_scores
from tests.report.synthetic import ref
from tutelage.spec import digest
from tutelage.store import Store

FILE = Path(__file__).parents[2] / "docs" / "results" / "predict.py"
PREDICT = runpy.run_path(str(FILE))
ARMS = {"near": (0.01, 0.79), "middle": (0.2, 0.65), "far": (0.9, 0.4)}
"""arm -> the kl that was measured, and the student's score"""


def naive(values):
    """Mean ranks by counting who is smaller and who is equal."""
    return [sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def spearman(x, y, weights=None):
    return PREDICT["spearman"](*(np.array(v, float) for v in (x, y)), np.array([weights or [1] * len(x)], float))[0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=2, max_size=9))
def test_it_is_pearsons_of_ranks_by_counting_over_every_point_as_often_as_it_stands(points):
    x, y, weights = zip(*points, strict=True)
    each = [[v for v, n in zip(values, weights, strict=True) for _ in range(n)] for values in (x, y)]
    if min(len(set(values)) for values in each) > 1:
        expected = np.corrcoef(naive(each[0]), naive(each[1]))[0, 1]
        assert spearman(x, y, weights) == pytest.approx(expected, abs=1e-9)
    elif each[0]:
        assert np.isnan(spearman(x, y, weights))


@settings(deadline=None)
@given(st.permutations(range(7)))
def test_without_equals_it_is_spearmans_formula(order):
    d2 = sum((i - j) ** 2 for i, j in enumerate(order))
    assert spearman(range(7), order) == pytest.approx(1 - 6 * d2 / (7 * 48), abs=1e-12)


def test_the_interval_is_of_whole_diagnoses():
    """Copies of a point in one diagnosis bring no certainty; as diagnoses of their own they would."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 8))
    y = x + y
    copies = [np.repeat(v, 10) for v in (x, y)]
    one, same, apart = (
        PREDICT["correlation"](*pair, names)
        for pair, names in (
            ((x, y), list("abcdefgh")),
            (copies, [c for c in "abcdefgh" for _ in range(10)]),
            (copies, list(map(str, range(80)))),
        )
    )
    assert same["interval"] == pytest.approx(one["interval"])
    assert np.ptp(apart["interval"]) < 0.6 * np.ptp(one["interval"])
    assert (one["points"], same["points"]) == (8, 80)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three arms at two seeds, each with a distillation by two losses and a diagnosis of its student and teachers."""
    with mock.patch("os.fsync"):
        store, goals = Store(tmp_path_factory.mktemp("predict") / "store"), []
        for seed in (0, 1):
            goals.append(replicate(store, seed))
        body = {"recipe": "made", "arguments": {}, "started": 1.0, "argv": [], "state": "done", "goals": goals}
        store.save_run("made-1", body)
    return store


def replicate(store, seed):
    scores = {"sft": 0.3, "alone": 0.5, **{f"{arm} teacher": 0.8 for arm in ARMS}}
    scores |= {f"{arm} {loss}": score for arm, (_, score) in ARMS.items() for loss in "XY"}
    stages = {"sft": {"kind": "stages.fit.Fit"}, "alone": {"kind": "stages.fit.Fit"}}
    for arm in ARMS:
        pair = {"model": ref("sft"), "teachers": {"a": ref(f"{arm} teacher")}}
        stages[f"{arm} teacher"] = {"kind": "stages.online.Online", "model": ref("sft")}
        for loss in "XY":
            stages[f"{arm} {loss}"] = {"kind": "stages.online.Online", "loss": {"kind": f"losses.distill.{loss}"}, **pair}
        stages[f"look {arm}"] = {"kind": "stages.diagnose.Diagnose", **pair}
    stages["pick"] = {"kind": "stages.best.Best", "candidates": {"one": ref("near Y"), "two": ref("near X")}}
    sources = {row: ref(row) for row in scores} | {"near Y": ref("pick")}
    rows = {}
    for row in scores:
        stages[f"eval {row}"] = {"kind": "stages.evaluate.Evaluate", "model": sources[row]}
        rows[row] = {"a": ref(f"eval {row}", "scores")}
    methods = [row for row in scores if row != "sft" and "teacher" not in row]
    table = {"rows": rows, "before": "sft", "after": "near X", "teachers": {"a": "near teacher"}, "methods": methods}
    table |= {"sources": sources, "taught_by": {m: {"a": f"{m.split()[0]} teacher"} for m in methods if m.split()[0] in ARMS}}
    keys = {name: digest([name, seed]) for name in stages}
    for name, spec in stages.items():
        publish(store, name, spec, keys[name], seed, scores)
    return {
        "record": {"recipe": "made", "seed": seed, "stages": stages, "goals": [], "table": table},
        "seed": seed,
        "keys": keys,
    }


def publish(store, name, spec, key, seed, scores):
    work = store.work(key)
    told = {"key": key, "name": name, "kind": spec["kind"], "record": spec, "inputs": [], "outputs": {}, "facts": {}}
    if name.startswith("eval "):
        write_scores(work / "scores", scores[name.removeprefix("eval ")], "a", [seed, 7], 300)
    if name.startswith("look "):
        kl = ARMS[name.removeprefix("look ")][0] + 0.001 * seed
        one = {"domain": "a", "teacher": "a", "numbers": {"kl": {"mean": kl}, "top1": {"mean": 0.5}}}
        told["facts"] = {"diagnosis": {"teachers": [{**one, "drift": {"kl": {"mean": -kl}}}]}}
    store.publish(key, {**told, "cost": {"flops": 1.0, "tokens": {}}, "seconds": 1.0, "started": 1.0, "finished": 2.0})


def test_each_method_is_set_against_the_diagnosis_of_its_own_student_and_teachers(store):
    found = PREDICT["predictors"](store, "last")
    assert found["points"] == {"a": 12}  # three arms, two losses, two seeds; what no diagnosis speaks of is left out
    kl = found["numbers"]["kl"]["a"]
    assert set(kl) == {"all", "X", "Y"}
    for loss, points in (("all", 12), ("X", 6), ("Y", 6)):
        assert kl[loss]["points"] == points
        assert kl[loss]["rho"] < -0.9
    assert found["numbers"]["kl, drift"]["a"]["all"]["rho"] == pytest.approx(-kl["all"]["rho"])
    assert found["numbers"]["top1"]["a"]["all"] == {"rho": None, "interval": None, "points": 12}


def test_the_command_prints_a_table_or_says_what_is_missing(store, tmp_path):
    say = [sys.executable, str(FILE), str(store.root)]
    done = subprocess.run([*say, "last"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, _, *lines = done.stdout.splitlines()
    assert first.startswith("| number | a, all: ρ (95 %), points | a, X")
    assert lines[0].startswith(("| kl | -", "| kl, drift | +"))
    as_json = subprocess.run([*say, "last", "--json"], capture_output=True, text=True)
    assert json.loads(as_json.stdout)["points"] == {"a": 12}
    bare = study.build(tmp_path / "bare", n=10)
    done = subprocess.run([sys.executable, str(FILE), str(bare.root), "last"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: run 'last' measured no teachers of its methods; give a finished run of studies/diagnose\n"
