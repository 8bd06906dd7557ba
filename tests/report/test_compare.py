"""Comparisons: what differs, what is paired and how it is tested, against naive forms of each."""

from __future__ import annotations

import io
import itertools
import json
import re

import numpy as np
import pytest
from rich.console import Console

from tests.report import synthetic
from tutelage.files import read_object
from tutelage.report import compare, compare_show, stats
from tutelage.report.compare import collect, paired, side_of_artifact, side_of_row, side_of_run
from tutelage.spec import UserError, digest

# --- tests of significance -----------------------------------------------------------------------------------------------


def every_flip(differences):
    """The share of all sign patterns whose sum is as far from 0 as the one seen."""
    seen = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips(len(differences))]
    return sum(s >= seen - 1e-12 for s in sums) / len(sums)


def flips(n):
    return list(itertools.product((-1, 1), repeat=n))


@pytest.mark.parametrize("seed", range(6))
def test_the_sign_flip_test_counts_every_flip_of_whole_numbers(seed):
    rng = np.random.default_rng(seed)
    differences = rng.integers(-3, 4, size=11).astype(float)
    assert stats.sign_flip(differences) == pytest.approx(every_flip(differences), abs=1e-12)


def test_right_and_wrong_at_one_seed_is_mcnemars_exact_test():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for better, worse in ((0, 0), (1, 0), (9, 2), (30, 31), (140, 90)):
        differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * 50)
        exact = binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
        assert stats.sign_flip(differences) == pytest.approx(exact, rel=1e-9)


def test_other_numbers_are_flipped_at_random_and_never_give_zero():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.4, 1.0, 12)
    assert stats.sign_flip(differences) == pytest.approx(every_flip(differences), abs=0.03)
    assert stats.sign_flip(np.full(60, 0.5)) == 1 / (1 + stats.DRAWS)


def test_the_test_keeps_its_level_over_tasks_that_seeds_share():
    """Tasks whose seeds agree are one task: flipping each seed by itself would reject far too often."""
    rng = np.random.default_rng(5)
    rejected, naive = 0, 0
    for _ in range(200):
        by_task = rng.integers(-1, 2, 60).astype(float)
        rejected += stats.sign_flip(3 * by_task) < 0.05
        naive += stats.sign_flip(np.repeat(by_task, 3)) < 0.05
    assert rejected <= 20
    assert naive > 30


def test_holms_correction_by_its_definition():
    chances = [0.01, 0.04, 0.03, 0.005, 0.9]
    order = sorted(range(5), key=lambda i: chances[i])
    naive = [0.0] * 5
    for rank, i in enumerate(order):
        naive[i] = min(1.0, max((5 - r) * chances[order[r]] for r in range(rank + 1)))
    assert stats.holm(chances) == pytest.approx(naive)
    assert stats.holm([0.005, 0.01, 0.03, 0.04]) == pytest.approx([0.02, 0.03, 0.06, 0.06])
    assert stats.holm([]) == []


# --- pairing -------------------------------------------------------------------------------------------------------------


def drawn(seed, n=80, p=0.5):
    values = np.random.default_rng(seed).random(n) < p
    return {f"t{i}": float(v) for i, v in enumerate(values)}


def test_one_seed_of_right_and_wrong():
    a, b = drawn(1), drawn(2, p=0.7)
    found = paired("d", {0: a}, {0: b})
    assert found["test"] == "McNemar"
    assert found["better"] == sum(b[t] > a[t] for t in a)
    assert found["worse"] == sum(b[t] < a[t] for t in a)
    assert found["difference"] == pytest.approx(np.mean([b[t] - a[t] for t in a]))
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    back = paired("d", {0: b}, {0: a})
    assert back["p"] == found["p"]
    assert back["difference"] == pytest.approx(-found["difference"])


def test_seeds_are_paired_with_themselves_and_summed_by_task():
    a, b = {s: drawn(s) for s in (0, 1, 2)}, {s: drawn(10 + s, p=0.6) for s in (0, 1, 5, 6)}
    found = paired("d", a, b)
    assert found["test"] == "sign flip"
    assert [s["seed"] for s in found["seeds"]["a"]] == [0, 1]  # the seeds both have
    summed = np.array([sum(b[s][t] - a[s][t] for s in (0, 1)) for t in a[0]])
    assert found["p"] == stats.sign_flip(summed)
    assert found["difference"] == pytest.approx(summed.mean() / 2)


def test_without_a_common_seed_the_means_are_compared():
    a, b = {0: drawn(1), 1: drawn(2)}, {7: drawn(3, p=0.8)}
    found = paired("d", a, b)
    gaps = np.array([b[7][t] - (a[0][t] + a[1][t]) / 2 for t in a[0]])
    assert found["difference"] == pytest.approx(gaps.mean())
    assert found["p"] == stats.sign_flip(2 * gaps)
    assert found["n"] == 80


def test_other_tasks_are_not_paired():
    a, b = drawn(1), drawn(2)
    del b["t0"]
    b["u"] = 1.0
    assert paired("d", {0: a}, {0: b})["why"] == "the tasks differ: 79 in both, 1 and 1 in one only"
    assert "why" in paired("d", {0: a, 1: a}, {0: a, 1: b})
    assert "why" in paired("d", {0: a}, {1: b})


def test_partial_credit_is_flipped_at_random():
    a = {f"t{i}": i / 80 for i in range(80)}
    found = paired("d", {0: a}, {0: {t: v + 0.1 for t, v in a.items()}})
    assert found["test"] == "sign flip"
    assert found["p"] == 1 / (1 + stats.DRAWS)


# --- runs, rows, artifacts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A store with two runs: the second has another learning rate in mopd, one stage less, one more, and other scores of it."""
    store = synthetic.build(tmp_path_factory.mktemp("two") / "s", n=120)
    body = store.load_run("quickstart-1")
    del body["run"]
    for goal in body["goals"]:
        tell_model(store, goal["keys"])
        rec, keys = goal["record"], goal["keys"]
        rec["stages"]["mopd"] = {**rec["stages"]["mopd"], "steps": 7, "loss": {"kind": "losses.policy.DAPO", "clip_low": 0.3}}
        rec["stages"]["more"] = {"kind": "stages.model.NewModel", "width": 1}
        for name in [n for n in rec["stages"] if n == "mopd" or n.startswith("eval student")] + ["more"]:
            keys[name] = digest([name, goal["seed"], "again"])
            if name.startswith("eval student / base"):
                synthetic.make(store, name, rec["stages"][name], keys, goal["seed"], 60)  # other tasks
            elif name != "more":
                synthetic.make(store, name, rec["stages"][name], keys, goal["seed"] + 10 * (name == "mopd"), 120)
        tell_model(store, keys)
        del rec["stages"]["rl-base"], keys["rl-base"]
    store.save_run("quickstart-2", {**body, "arguments": {"seeds": 2, "width": 64}})
    return store


@pytest.fixture(scope="module")
def runs(two):
    return collect(two, side_of_run(two, "quickstart-1"), side_of_run(two, "quickstart-2"))


def test_stages_of_two_runs(runs):
    stages = runs["stages"]
    assert stages["only_a"] == ["rl-base"]
    assert stages["only_b"] == ["more"]
    assert [c["stage"] for c in stages["changed"]] == ["mopd"]
    changes = {c["path"]: (c["old"], c["new"]) for c in stages["changed"][0]["changes"]}
    assert changes == {"loss.clip_low": (0.2, 0.3), "steps": (100, 7)}  # an older record has the default
    assert sorted(stages["inputs_only"]) == [f"eval student / {d}" for d in sorted(synthetic.DOMAINS)]
    assert [(c["path"], c["old"], c["new"]) for c in runs["arguments"]] == [("width", None, 64)]
    assert not runs["same"]


def test_scores_of_two_runs(runs, two):
    """Evaluations that both share are not tested; the family of Holm's correction is what was."""
    scores = runs["scores"]
    assert {(r["row"], r["domain"]) for r in scores["rows"]} == {("student", d) for d in ("sum", "reverse", "sort")}
    assert [(r["row"], r["domain"]) for r in scores["refused"]] == [("student", "base")]
    assert scores["refused"][0]["why"] == "the tasks differ: 60 in both, 60 and 0 in one only"
    assert scores["shared"] == (len(synthetic.ACCURACY) - 1) * 4
    assert [r["p_holm"] for r in scores["rows"]] == stats.holm([r["p"] for r in scores["rows"]])


def test_cost_and_curves_of_two_runs(runs):
    cost = {c["what"]: c for c in runs["cost"]}
    assert "sft" not in cost  # the same artifact
    assert cost["mopd"]["ratio"]["flops"] == 1.0
    whole = cost["the whole run, all seeds"]
    assert whole["ratio"]["flops"] == pytest.approx(whole["b"]["flops"] / whole["a"]["flops"])
    assert [c["stage"] for c in runs["curves"]] == ["mopd"]
    curve = runs["curves"][0]["metrics"]["reward"]
    assert [s["seed"] for s in curve["a"]] == [s["seed"] for s in curve["b"]] == [0, 1]
    assert curve["a"] != curve["b"]


def printed(found, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    compare_show.show(found, console)
    return console.file.getvalue()


def test_equal_things_differ_in_nothing(two):
    for sides in (
        [side_of_run(two, "quickstart-1") for _ in "ab"],
        [side_of_row(two, "quickstart-1", "sft"), side_of_row(two, "quickstart-2", "sft")],
    ):
        found = collect(two, *sides)
        assert found["same"]
        assert "nothing differs" in printed(found)
        assert "Nothing differs." in compare_show.page(found)


def test_rows_of_one_run_are_paired_by_domain(two):
    found = collect(two, side_of_row(two, "quickstart-1", "sft"), side_of_row(two, "quickstart-1", "student"))
    assert {r["domain"] for r in found["scores"]["rows"]} == set(synthetic.DOMAINS)
    assert all(r["row"] == "" for r in found["scores"]["rows"])
    assert found["stages"]["only_a"] == []
    assert set(found["stages"]["only_b"]) == {"mopd", *(f"rl-{d}" for d in synthetic.DOMAINS)}
    for row in found["scores"]["rows"]:
        cells = [
            [two.path(g["keys"][f"eval {name} / {row['domain']}"], "scores") for g in two.load_run("quickstart-1")["goals"]]
            for name in ("sft", "student")
        ]
        means = [np.mean([json.loads((p / "summary.json").read_text())["mean"] for p in paths]) for paths in cells]
        assert row["difference"] == pytest.approx(means[1] - means[0], abs=1e-5)
    assert found["cost"][0]["what"] == "sft → mopd"
    assert found["curves"][0]["stage"] == "sft → mopd"


def test_a_row_may_measure_another_stage_in_each_domain(tmp_path):
    store = synthetic.build(tmp_path, n=30)
    body = read_object(store.root / "runs" / "quickstart-1.json")
    for goal in body["goals"]:
        rows = goal["record"]["table"]["rows"]
        rows["own"] = {d: rows[f"specialist {d}"][d] for d in ("sort", "reverse")}
    store.save_run("quickstart-1", body)
    found = compare.scores(store, side_of_row(store, "quickstart-1", "sft"), side_of_row(store, "quickstart-1", "own"))
    assert [(r["domain"], [s["seed"] for s in r["seeds"]["b"]]) for r in found["rows"]] == [
        ("reverse", [0, 1]),
        ("sort", [0, 1]),
    ]


def test_artifacts_are_compared_by_the_evaluations_that_read_them(tmp_path):
    store = synthetic.build(tmp_path / "s", n=60, seeds=(0,))
    keys = store.load_run("quickstart-1")["goals"][0]["keys"]
    for name in ("sft", "mopd"):  # the made-up store tells no inputs and outputs
        tell(store, keys[name], outputs={"policy": {"kind": "model"}})
        row = {"sft": "sft", "mopd": "student"}[name]
        for domain in synthetic.DOMAINS:
            data = keys["tasks"] if (name, domain) != ("mopd", "sort") else keys["init"]
            edges = [("model", keys[name], "policy"), ("tasks", data, "heldout")]
            inputs = [{"path": p, "key": k, "port": port, "step": None, "name": "-"} for p, k, port in edges]
            tell(store, keys[f"eval {row} / {domain}"], inputs=inputs, outputs={"scores": {"kind": "scores", "domain": domain}})
    a, b = (side_of_artifact(store, n, keys[n], "policy") for n in ("sft", "mopd"))
    found = collect(store, a, b)
    assert [r["domain"] for r in found["scores"]["rows"]] == ["base", "reverse", "sum"]  # sort read other data
    assert found["scores"]["unmatched"] == {"a": ["sort"], "b": ["sort"]}
    assert {r["test"] for r in found["scores"]["rows"]} == {"McNemar"}
    assert found["scores"]["rows"][0]["seeds"]["a"][0]["seed"] is None
    scores = [side_of_artifact(store, r, keys[f"eval {r} / sort"], "") for r in ("sft", "student")]
    assert [r["domain"] for r in collect(store, *scores)["scores"]["rows"]] == ["sort"]


def tell_model(store, keys):
    """The made-up store tells no inputs: here the student's evaluations read the student."""
    for domain in synthetic.DOMAINS:
        edge = {"path": "model", "key": keys["mopd"], "port": "policy", "step": None, "name": "mopd"}
        tell(store, keys[f"eval student / {domain}"], inputs=[edge])


def tell(store, key, **facts):
    file = store.folder(key) / "artifact.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))


def test_code_that_made_the_one_and_not_the_other_is_told(two):
    a, b = side_of_run(two, "quickstart-1"), side_of_run(two, "quickstart-2")
    for side, code in ((a, "abc"), (b, "def")):
        for meta in side.metas.values():
            meta |= {"code": code, "versions": {"torch": "2.6", "python": code}}
    found = collect(two, a, b)
    assert found["versions"] == [{"what": w, "a": ["abc"], "b": ["def"]} for w in ("code", "python")]
    assert "made by" in printed(found)


def test_what_a_record_does_not_hold_is_compared_by_versions_and_marks():
    one = {"key": "1", "version": 1, "inputs": [], "code": "c1", "marks": {"": {"version": 1}, "loss": {"version": 1}}}
    two = {**one, "key": "2", "version": 2, "marks": {"": {"version": 2}, "loss": {"version": 3}, "file": {"content": "x"}}}
    assert [(c["what"], c["path"], c["old"], c["new"]) for c in compare.beside(one, two, True)] == [
        ("version", "", 1, 2),
        ("version", "loss", 1, 3),
    ]
    assert compare.beside(one, {**one, "key": "2"}, True) == [{"what": "code", "path": "", "old": "c1", "new": "c1"}]
    assert compare.beside(one, {**one, "key": "2"}, False) == []


def test_a_run_is_compared_with_a_run_and_a_row_must_be_there(two):
    with pytest.raises(UserError, match=r"quickstart-1 is a whole run and quickstart-1:sft is not; name one of its rows"):
        collect(two, side_of_run(two, "quickstart-1"), side_of_row(two, "quickstart-1", "sft"))
    with pytest.raises(UserError, match=r"run 'quickstart-1' has no row 'stuudent'; did you mean 'student'\?"):
        side_of_row(two, "quickstart-1", "stuudent")


# --- drawing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_and_cut_nothing(runs, width):
    text = printed(runs, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for words in ("loss.clip_low", "only in A: rl-base", "only in B: more", "not paired: the tasks differ", "student"):
        assert words in re.sub(r"\s+", " ", text)


def test_the_page_needs_nothing_else_and_shows_both(runs, two, monkeypatch):
    page = compare_show.page(runs)
    assert not re.search(r"""(?:https?:)?//[a-z]|<script|<link(?![^>]*data:,)""", page)
    assert page.count('<svg class="plot"') == len(runs["curves"][0]["metrics"])
    assert page.count("stroke-dasharray") > len(runs["curves"][0]["metrics"])
    hostile = {**runs, "a": {"name": "<img src=x>", "kind": "run"}}
    assert "<img" not in compare_show.page(hostile)


def test_the_mean_of_curves_is_over_the_steps_that_all_took():
    series = [{"step": [0, 10, 20], "value": [0.0, 1.0, 2.0]}, {"step": [5, 10, 15], "value": [2.0, 3.0, 4.0]}]
    steps, means = compare_show.mean_curve(series)
    assert steps.tolist() == [5, 10, 15]
    assert means.tolist() == pytest.approx([1.25, 2.0, 2.75])
