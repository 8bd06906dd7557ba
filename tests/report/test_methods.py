"""Methods side by side: ledgers against sums by hand, scores against the files, the picture and the command."""

from __future__ import annotations

import io
import json
import math
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.report import consolidation as study
from tests.report import synthetic
from tests.report.consolidation import UNIT
from tutelage import cli
from tutelage.report import data, html, ledgers, methods_show, plots, scatter, stats, terminal
from tutelage.report.read import Replicate, load

ROOT = Path(__file__).parents[2]
METHODS = ("MOPD", "trace SFT", "mixed RL", "average", "task arithmetic")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return study.build(tmp_path_factory.mktemp("study") / "store", n=60)


@pytest.fixture(scope="module")
def found(store):
    return data.collect(store, "last")


def units(methods, row, seed=None):
    """(consolidation, with teachers, trials) in units, at a seed or on average."""
    of = methods["rows"][row]["ledgers"]
    spent = of["mean"] if seed is None else next(s for s in of["seeds"] if s["seed"] == seed)
    return tuple(None if spent[k] is None else spent[k] / UNIT for k in ("consolidation", "with_teachers", "trials"))


def by_hand(store, row, domain, seed):
    goal = next(g for g in store.load_run("last")["goals"] if g["seed"] == seed)
    file = store.path(goal["keys"][f"eval {row} / {domain}"], "scores") / "scores.parquet"
    return pq.read_table(file)["value"].to_numpy()


# --- ledgers -------------------------------------------------------------------------------------------------------------


def test_ledgers_equal_the_sums_by_hand(found):
    methods = found["methods"]
    assert units(methods, "MOPD", 0) == (3, 3 + 30, 0)
    assert units(methods, "MOPD", 1) == (4, 4 + 30, 0)
    assert units(methods, "MOPD") == (3.5, 33.5, 0)
    assert units(methods, "mixed RL") == (40, 40, 0)  # its budget's stages are not what it is made from
    assert units(methods, "average") == (0, 30, 0)
    assert units(methods, "task arithmetic") == (0, 30, 7)


def test_a_pick_that_differs_by_seed_is_charged_by_seed(found):
    """Traces that both candidates read are counted once, and not again among the trials; selection is no ancestry."""
    methods = found["methods"]
    assert units(methods, "trace SFT", 0) == (4 + 5, 4 + 5 + 30, 8 + 6 + 2)
    assert units(methods, "trace SFT", 1) == (8 + 5 + 6, 8 + 5 + 6 + 30, 4 + 2)
    assert units(methods, "trace SFT") == (14, 44, 11)
    picks = methods["rows"]["trace SFT"]["picks"]
    assert [(p["seed"], p["candidate"], p["dev"]) for p in picks] == [(0, "short", 0.6), (1, "long", 0.6)]
    assert picks[0]["trials"] == {"short": 0.6, "long": 0.5}
    assert found["scores"]["trace SFT"]["parent"] == "2 trials"


def test_the_runs_ledgers_are_those_of_its_student(store, tmp_path):
    """The mean over replicates, where they are charged for different stages."""
    file = store.root / "runs" / "consolidation-1.json"
    body = json.loads(file.read_text())
    for goal in body["goals"]:
        goal["record"]["table"]["after"] = "trace SFT"
    store.save_run("other-1", body)
    sums = data.collect(store, "other-1")["cost"]["ledgers"]
    (store.root / "runs" / "other-1.json").unlink()
    assert sums["consolidation"]["flops"] == 14 * UNIT
    assert sums["with_teachers"]["flops"] == 44 * UNIT
    assert sums["consolidation"]["stages"] == ["best-fit", "fit-long", "fit-short", "more-traces", "traces"]


def test_a_method_that_was_taught_by_others_is_held_to_them(store):
    file = store.root / "runs" / "consolidation-1.json"
    body = json.loads(file.read_text())
    for goal in body["goals"]:
        goal["record"]["table"]["taught_by"] = {"average": {"a": "mixed RL", "b": "mixed RL"}}
        goal["record"]["stages"]["average"]["models"] = [synthetic.ref("mixed")]
    store.save_run("others-1", body)
    rows = data.collect(store, "others-1")["methods"]["rows"]
    (store.root / "runs" / "others-1.json").unlink()
    ratios = []
    for seed in (0, 1):
        before, own, after = (
            sum(by_hand(store, row, d, seed).mean() for d in ("a", "b")) for row in ("sft", "mixed RL", "average")
        )
        ratios.append((after - before) / (own - before))
    assert rows["average"]["recovery"]["mean"] == pytest.approx(np.mean(ratios), abs=1e-6)
    assert units({"rows": rows}, "average") == (0, 40, 0)
    assert units({"rows": rows}, "MOPD") == (3.5, 33.5, 0)


def test_a_stage_that_goes_by_two_names_is_counted_once(store):
    run = load(store, "last")
    each = run.first
    stages = {**each.record["stages"], "twin": each.record["stages"]["fit-short"]}
    stages["best-fit"] = {
        **stages["best-fit"],
        "candidates": {"short": synthetic.ref("fit-short"), "again": synthetic.ref("twin")},
    }
    twins = Replicate(0, {**each.record, "stages": stages}, {**each.keys, "twin": each.keys["fit-short"]})
    mine = ledgers.parts(twins, "trace SFT", lambda name: {"selected": {"candidate": "again"}})
    assert mine.consolidation == {"best-fit", "fit-short", "traces"}
    assert mine.trials == set()


def test_a_teacher_that_is_continued_is_a_teachers_cost(store):
    each = load(store, "last").first
    stages = {**each.record["stages"], "mixed": {"kind": "stages.online.Online", "model": synthetic.ref("rl-a")}}
    mine = ledgers.parts(Replicate(0, {**each.record, "stages": stages}, each.keys), "mixed RL", lambda name: {})
    assert (mine.consolidation, mine.with_teachers) == ({"mixed"}, {"mixed", "rl-a"})


def test_what_the_recipe_is_charged_for():
    """The recipe itself, with made-up picks: no stage is made."""
    from tutelage.graph import record
    from tutelage.recipes.consolidation import consolidation

    rec = record(consolidation(0))
    each = Replicate(0, rec, {})
    first = {n: next(iter(s["candidates"])) for n, s in rec["stages"].items() if "candidates" in s}
    rl = {f"rl-{d}" for d in rec["table"]["teachers"]}
    for row in rec["table"]["methods"]:
        mine = ledgers.parts(each, row, lambda name: {"selected": {"candidate": first.get(name)}})
        best = each.source(row).ref
        assert mine.picks == {best: first[best]}
        assert len(ledgers.candidates(each, best)) == 3
        assert mine.with_teachers - mine.consolidation in (rl, set()), row
        assert (mine.with_teachers == mine.consolidation) == (
            row in ("mixed rl", "mixed rl, student's compute", "cascade rl", "sft on its own traces")
        )
        length = 3 if "trace" in row else 5 if row == "cascade rl" else 2  # with the traces; with every domain's RL
        assert len(mine.consolidation) == length, row
        assert len(mine.trials) == 2 * (4 if row == "cascade rl" else 1)


def test_a_run_in_progress_tells_what_is_missing(tmp_path):
    skip = (("fit-long", 0), ("best-sum", 1), ("mopd", 1), ("eval MOPD / a", 1), ("eval average / b", 0))
    found = data.collect(study.build(tmp_path / "s", skip=skip), "last")["methods"]
    assert units(found, "trace SFT", 0) == (9, 39, None)  # a loser is not made
    assert units(found, "trace SFT") == (14, 44, 6)
    assert units(found, "task arithmetic", 1) == (None, None, None)  # not picked yet
    assert units(found, "MOPD", 1) == (None, None, 0)
    assert [s["missing"] for s in found["rows"]["trace SFT"]["ledgers"]["seeds"]] == [["fit-long"], []]
    assert [s["seed"] for s in found["rows"]["MOPD"]["mean"]["seeds"]] == [0]
    assert [s["seed"] for s in found["rows"]["average"]["mean"]["seeds"]] == [1]
    assert found["rows"]["average"]["minus_reference"] is None  # no seed has both
    console = Console(file=io.StringIO(), width=80)
    methods_show.show(found, console)
    assert "not made yet: task arithmetic, seed 1: best-sum" in console.file.getvalue()
    assert "Not made yet: MOPD, seed 1: mopd." in html.methods_page(
        {"run": "r", "recipe": None, "seeds": [0, 1], "methods": found}
    )


# --- scores --------------------------------------------------------------------------------------------------------------


def test_scores_equal_the_files(store, found):
    methods = found["methods"]
    assert (list(methods["rows"]), methods["reference"]) == (list(METHODS), "MOPD")
    assert (methods["taught"], methods["elsewhere"]) == (["a", "b"], ["raw a"])
    for row in METHODS:
        m = methods["rows"][row]
        means = [np.mean([by_hand(store, row, d, s).mean() for d in "ab"]) for s in (0, 1)]
        assert [s["mean"] for s in m["mean"]["seeds"]] == pytest.approx(means, abs=1e-6)
        assert m["mean"]["mean"] == pytest.approx(np.mean(means), abs=1e-6)
        assert m["mean"]["interval"][0] < m["mean"]["mean"] < m["mean"]["interval"][1]
        lost = np.mean([(by_hand(store, row, "raw a", s) - by_hand(store, "sft", "raw a", s)).mean() for s in (0, 1)])
        assert m["elsewhere"]["raw a"]["difference"] == pytest.approx(lost, abs=1e-6)
    assert methods["rows"]["MOPD"]["recovery"]["mean"] == found["recovery"]["mean"]
    assert methods["rows"]["MOPD"]["minus_reference"] is None
    oracle = np.mean([by_hand(store, f"specialist {d}", d, s).mean() for d in "ab" for s in (0, 1)])
    assert methods["oracle"]["mean"] == pytest.approx(oracle, abs=1e-6)
    assert methods["before"]["mean"] == pytest.approx(
        np.mean([by_hand(store, "sft", d, s).mean() for d in "ab" for s in (0, 1)]), abs=1e-6
    )


def test_differences_are_tested_by_task_with_seeds_summed(store, found):
    rows = found["methods"]["rows"]
    tests, means = [], []
    for row in METHODS[1:]:
        gap = rows[row]["minus_reference"]
        by_domain = [sum(by_hand(store, row, d, s) - by_hand(store, "MOPD", d, s) for s in (0, 1)) for d in "ab"]
        assert gap["difference"] == pytest.approx(np.mean(by_domain) / 2, abs=1e-6)
        assert gap["p"] == pytest.approx(stats.sign_flip(np.concatenate(by_domain)), abs=1e-6)
        means.append(gap["p"])
        tests += [gap["domains"][d]["p"] for d in "ab"]
        assert [gap["domains"][d]["p"] for d in "ab"] == pytest.approx([stats.sign_flip(v) for v in by_domain], abs=1e-6)
    assert [rows[r]["minus_reference"]["p_holm"] for r in METHODS[1:]] == pytest.approx(stats.holm(means), abs=1e-5)
    adjusted = [rows[r]["minus_reference"]["domains"][d]["p_holm"] for r in METHODS[1:] for d in "ab"]
    assert adjusted == pytest.approx(stats.holm(tests), abs=1e-5)


def test_domains_of_unequal_size_count_alike(store):
    """With twice the tasks in one domain, the other's differences weigh twice: the test is of the mean that is shown."""
    from tutelage.report import methods
    from tutelage.report.measures import Measures

    measured = Measures(store, load(store, "last"))
    for (seed, row, domain), cell in list(measured.raw.items()):
        if domain == "b":
            more = {**cell.values, **{f"{t}'": v for t, v in cell.values.items()}}
            measured.raw[seed, row, domain] = type(cell)(more, 0)
    a, b = (methods.by_task(measured, "mixed RL", "MOPD", d, [0, 1]) for d in "ab")
    assert len(b) == 2 * len(a)
    found = methods.against(measured, "mixed RL", "MOPD", ["a", "b"])
    assert found["p"] == stats.sign_flip(np.concatenate([2 * a, b])) != stats.sign_flip(np.concatenate([a, b]))


def test_a_table_without_methods_has_none(tmp_path):
    bare = synthetic.build(tmp_path / "s", n=20, seeds=(0,))
    assert data.collect(bare, "last")["methods"] is None
    assert 'id="methods"' not in html.page(bare, "last")


# --- what is shown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_prints_every_method_and_seed(store, found, width):
    console = Console(file=io.StringIO(), width=width)
    terminal.show(store, "last", console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    table = text.partition("Methods: score against compute")[2]
    for row in METHODS:
        mean = found["methods"]["rows"][row]["mean"]["mean"]
        assert re.search(rf"{row.split()[0]}.* {terminal.percent(mean)} ", table)
    seeds = text.partition("Methods, every seed")[2]
    assert re.search(r"trace SFT +0 .*90 GFLOP +390 GFLOP +160 GFLOP +short", seeds)
    assert re.search(r"  +1 .*190 GFLOP +490 GFLOP +60 GFLOP +long", seeds)
    assert "routed oracle" in table


def test_the_page_has_the_table_and_the_picture(store, found):
    page = html.page(store, "last")
    assert '<section id="methods">' in page
    assert '<a href="#methods">Methods</a>' in page
    text = re.search(r'<figure class="picture">(<svg.*?</svg>)', page, re.DOTALL)[1]
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', text)) <= set(names)
    drawn = ET.fromstring(text)
    titles = [t.text for t in drawn.iter() if t.tag.endswith("title")]
    assert len(titles) == 2 * len(METHODS)
    mean = found["methods"]["rows"]["average"]["mean"]
    shown = f"average: {terminal.percent(mean['mean'])} ({' to '.join(map(terminal.percent, mean['interval']))})"
    assert [t for t in titles if t.startswith("average")] == [
        f"{shown} at 0 FLOP, consolidation alone",
        f"{shown} at 300 GFLOP, with the teachers",
    ]
    words = {t.text for t in drawn.iter() if t.tag.endswith("text")}
    assert {"≈ 0", "consolidation alone, GFLOP"} <= words
    assert sum(w.startswith("before: sft") or w.startswith("routed oracle") for w in words) == 2


def test_methods_of_equal_cost_stand_side_by_side_and_hostile_names_are_words(found):
    """Every marker is apart from the others of about its score; a lone one stands at its cost."""
    rows = found["methods"]["rows"]
    names = ["<img src=x>", "b $x$", "c", "d"]
    alike = dict.fromkeys(names[:3], rows["MOPD"]) | {"d": rows["mixed RL"]}
    methods = scatter.named({"rows": alike})
    axes = scatter.paint({**found["methods"], "rows": alike, "reference": "c"}, plots.light())[0].axes[1]
    span, width = axes.get_xlim(), axes.get_window_extent().width
    spots = scatter.side_by_side(axes, methods, "with_teachers", math.log10)
    at = [(spots[n] - span[0]) / (span[1] - span[0]) * width for n in names]
    assert all(b - a >= scatter.APART - 1e-6 for a, b in pairwise(at[:3]))
    assert np.mean([spots[n] for n in names[:3]]) == pytest.approx(math.log10(33.5 * UNIT))
    assert spots["d"] == pytest.approx(math.log10(40 * UNIT))
    drawn = ET.fromstring(scatter.draw({**found["methods"], "rows": alike, "reference": "c"}))
    assert sum(t.text.startswith("<img src=x>: ") for t in drawn.iter() if t.tag.endswith("title")) == 2


@pytest.mark.parametrize("seed", range(5))
def test_names_are_moved_apart_as_little_as_can_be(seed):
    """Feasible, and no random feasible move is nearer to what was wanted."""
    rng = np.random.default_rng(seed)
    wanted = sorted(rng.uniform(0, 100, 7))
    places = scatter.spread(wanted, 12.0, -200.0, 300.0)
    assert all(b - a >= 12 - 1e-9 for a, b in pairwise(places))
    cost = np.square(np.subtract(places, wanted)).sum()
    for _ in range(2000):
        other = np.array(places) + rng.normal(0, rng.choice([0.1, 1, 5]), 7)
        if np.diff(other).min() >= 12:
            assert np.square(other - wanted).sum() >= cost - 1e-9
    inside = scatter.spread(wanted, 12.0, 0.0, 100.0)
    assert min(inside) >= 0
    assert max(inside) <= 100
    assert all(b - a >= 12 - 1e-9 for a, b in pairwise(inside))


def test_ticks_are_few_and_inside():
    for low, high in ((0.0, 0.05), (-0.3, 0.4), (9.2, 9.9), (10.0, 11.7), (8.0, 12.5), (0.0, 14.0)):
        at = scatter.ticks(low, high)
        assert 1 <= len(at) <= 7
        assert all(low < t < high for t in at)


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def say(store, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["tutelage", "compare", *words, "--store", str(store.root)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return call


def test_compare_one_run_and_rows_of_it(say, store, found, tmp_path):
    code, out, err = say("consolidation")
    assert (code, err) == (0, "")
    assert "Methods: score against compute" in out
    assert "5 methods" in (store.root / "reports" / "consolidation-1-methods.html").read_text()
    body = json.loads(say("last", "--json")[1])
    assert body["methods"] == found["methods"]
    assert say("last", "--out", str(tmp_path / "m.svg"))[0] == 0
    assert ET.parse(tmp_path / "m.svg").getroot().tag.endswith("svg")
    three = json.loads(say("last:average", "last:MOPD", "last:sft", "--json")[1])["methods"]
    assert (list(three["rows"]), three["reference"]) == (["average", "MOPD", "sft"], "average")
    gap = found["methods"]["rows"]["average"]["minus_reference"]["difference"]
    assert three["rows"]["MOPD"]["minus_reference"]["difference"] == pytest.approx(-gap)
    two = json.loads(say("last:average", "last:MOPD", "--json")[1])
    assert two["methods"]["rows"]["MOPD"] == {
        **three["rows"]["MOPD"],
        "minus_reference": two["methods"]["rows"]["MOPD"]["minus_reference"],
    }
    assert "Methods: score against compute" in say("last:average", "last:MOPD", "--out", str(tmp_path / "two.html"))[1]
    assert '<section id="methods">' in (tmp_path / "two.html").read_text()
    assert json.loads(say("last:average", "last:sft", "--json")[1])["methods"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("consolidatoin",), "'consolidatoin' is no run, and one thing alone is compared by its methods; did you mean"),
        (("last:sft",), "'last:sft' is no run, and one thing alone is compared by its methods; name a second side"),
        (("last:sft", "last:MOPD", "last"), "each RUN:ROW; 'last' is no row of consolidation-1"),
        (("last:sft", "last:MOPD", "last:MOPD"), "'last:MOPD' is named twice; name it once"),
        (("last:sft", "last:MOPD", "last:avrage"), "has no row 'avrage'; did you mean 'average'?"),
        (("last", "--out", "m.txt"), "it ends in none of .html, .htm, .svg, .png, .pdf"),
        (("last:sft", "last:MOPD", "--out", "m.svg"), "it is an HTML page"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(say, words, said):
    code, out, err = say(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


# --- the tables of a study's page ----------------------------------------------------------------------------------------


def test_a_studys_page_is_filled_from_its_json(store, tmp_path):
    tables = runpy.run_path(str(ROOT / "docs" / "results" / "tables.py"))
    page = tmp_path / "study.md"
    page.with_suffix(".json").write_text(json.dumps(tables["collect"](store, "last", "MOPD")))
    page.write_text(
        "".join(f"<!-- {n} -->\n\nold\n\n<!-- end -->\n" for n in ("methods", "ledgers", "trials", "accuracy", "paired"))
    )
    text = tables["filled"](page)
    assert "old" not in text
    assert "| trace SFT | 0.14: 0.09, 0.19 | 0.44: 0.39, 0.49 | 0.11: 0.16, 0.06 |" in text
    assert "| average | 0.00: 0.00, 0.00 | 0.30: 0.30, 0.30 | 0.00: 0.00, 0.00 |" in text
    assert "| trace SFT | best-fit | 1 | long | short 50.0, long 60.0 |" in text
    assert "| routed oracle | " in text
    page.write_text("<!-- ledger -->\n\n<!-- end -->\n")
    with pytest.raises(Exception, match="wants a table 'ledger'; did you mean 'ledgers'"):
        tables["filled"](page)
