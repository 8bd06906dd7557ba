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
from tutelage.report import data, html, ledgers, methods, methods_show, plots, scatter, stats, terminal
from tutelage.report.read import Replicate, load

ROOT = Path(__file__).parents[2]
NAMES = ("methods", "others", "ledgers", "trials")
"""Of the tables of a study's page."""
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


def in_all(of):
    """With the teachers and the trials, in units: by seed, and on average."""
    units = [None if s["with_trials"] is None else s["with_trials"] / UNIT for s in (*of["seeds"], of["mean"])]
    return units[:-1], units[-1]


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


def test_what_the_search_cost_is_added_to_what_the_method_and_its_teachers_cost(found):
    rows = found["methods"]["rows"]
    assert in_all(rows["MOPD"]["ledgers"]) == ([33, 34], 33.5)
    assert in_all(rows["task arithmetic"]["ledgers"]) == ([37, 37], 37)
    assert in_all(rows["trace SFT"]["ledgers"]) == ([39 + 16, 49 + 6], 55)  # all that was made, whichever was picked
    oracle = found["methods"]["oracle"]["ledgers"]
    assert [oracle["mean"][k] for k in ("consolidation", "with_teachers", "trials")] == [0, 30 * UNIT, 0]
    assert in_all(oracle) == ([30, 30], 30)


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
    mine = ledgers.parts(twins, ["trace SFT"], lambda name: {"selected": {"candidate": "again"}})
    assert mine.consolidation == {"best-fit", "fit-short", "traces"}
    assert mine.trials == set()


def test_a_teacher_that_is_continued_is_a_teachers_cost(store):
    each = load(store, "last").first
    stages = {**each.record["stages"], "mixed": {"kind": "stages.online.Online", "model": synthetic.ref("rl-a")}}
    mine = ledgers.parts(Replicate(0, {**each.record, "stages": stages}, each.keys), ["mixed RL"], lambda name: {})
    assert (mine.consolidation, mine.with_teachers) == ({"mixed"}, {"mixed", "rl-a"})


def test_what_the_recipe_is_charged_for():
    """The recipe itself, with made-up picks: no stage is made."""
    from tutelage.graph import record
    from tutelage.recipes.consolidation import consolidation

    rec = record(consolidation(0))
    each = Replicate(0, rec, {})
    first = {n: next(iter(s["candidates"])) for n, s in rec["stages"].items() if "candidates" in s}
    rl = {f"rl-{d}" for d in rec["table"]["teachers"]}
    alone = ("mixed rl", "mixed rl, student's compute", "cascade rl", "sft on its own traces")
    for row in rec["table"]["methods"]:
        mine = ledgers.parts(each, [row], lambda name: {"selected": {"candidate": first.get(name)}})
        best = each.source(row).ref
        assert mine.picks == {best: first[best]}
        assert len(ledgers.candidates(each, best)) == 3
        assert mine.with_teachers - mine.consolidation in (rl, set()), row
        assert (mine.with_teachers == mine.consolidation) == (row in alone)
        length = 5 if row == "cascade rl" else 3 if "sft" in row else 2  # with every domain's RL; with the traces
        assert len(mine.consolidation) == length, row
        assert len(mine.trials) == 2 * (4 if row == "cascade rl" else 1)


def test_a_run_in_progress_tells_what_is_missing(tmp_path):
    skip = (("fit-long", 0), ("best-sum", 1), ("mopd", 1), ("eval MOPD / a", 1), ("eval average / b", 0))
    found = data.collect(study.build(tmp_path / "s", skip=skip), "last")["methods"]
    assert units(found, "trace SFT", 0) == (9, 39, None)  # a loser is not made
    assert units(found, "trace SFT") == (14, 44, None)  # its mean score is of both seeds, and one's trials are not known
    assert in_all(found["rows"]["trace SFT"]["ledgers"]) == ([None, 55], None)
    assert units(found, "MOPD") == (3, 33, 0)
    assert units(found, "average") == (0, 30, 0)
    assert units(found, "task arithmetic", 1) == (None, None, None)  # not picked yet
    assert units(found, "MOPD", 1) == (None, None, 0)
    assert [s["missing"] for s in found["rows"]["trace SFT"]["ledgers"]["seeds"]] == [["fit-long"], []]
    assert [s["seed"] for s in found["rows"]["MOPD"]["mean"]["seeds"]] == [0]
    assert [s["seed"] for s in found["rows"]["average"]["mean"]["seeds"]] == [1]
    assert found["rows"]["average"]["minus_reference"] is None  # no seed has both
    console = Console(file=io.StringIO(), width=80)
    methods_show.show(found, console)
    assert "not made yet: task arithmetic, seed 1: best-sum" in console.file.getvalue()
    assert "note: average: the mean of seed 1 alone" in console.file.getvalue()
    assert "note: trace SFT" not in console.file.getvalue()
    assert "Not made yet: MOPD, seed 1: mopd." in html.methods_page(
        {"run": "r", "recipe": None, "seeds": [0, 1], "methods": found}
    )


# --- scores --------------------------------------------------------------------------------------------------------------


def test_scores_equal_the_files(store, found):
    methods = found["methods"]
    assert (list(methods["rows"]), methods["reference"]) == (list(METHODS), "MOPD")
    assert (methods["taught"], methods["others"]) == (["a", "b"], ["raw a"])
    for row in METHODS:
        m = methods["rows"][row]
        means = [np.mean([by_hand(store, row, d, s).mean() for d in "ab"]) for s in (0, 1)]
        assert [s["mean"] for s in m["mean"]["seeds"]] == pytest.approx(means, abs=1e-6)
        assert m["mean"]["mean"] == pytest.approx(np.mean(means), abs=1e-6)
        assert m["mean"]["interval"][0] < m["mean"]["mean"] < m["mean"]["interval"][1]
        lost = np.mean([(by_hand(store, row, "raw a", s) - by_hand(store, "sft", "raw a", s)).mean() for s in (0, 1)])
        assert m["others"]["raw a"]["difference"] == pytest.approx(lost, abs=1e-6)
        assert "p" not in m["others"]["raw a"]
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


def test_rows_that_are_no_methods_stand_beside_them_in_the_other_columns(store, found):
    beside = found["methods"]["references"]
    assert list(beside) == ["sft", "specialist a", "specialist b"]
    for row, entry in beside.items():
        assert list(entry["domains"]) == ["raw a"]
        mean = np.mean([by_hand(store, row, "raw a", s).mean() for s in (0, 1)])
        assert entry["domains"]["raw a"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert beside["sft"]["others"] == {}
    lost = np.mean([(by_hand(store, "specialist a", "raw a", s) - by_hand(store, "sft", "raw a", s)).mean() for s in (0, 1)])
    assert beside["specialist a"]["others"]["raw a"]["difference"] == pytest.approx(lost, abs=1e-6)


def test_a_difference_and_its_domains_and_their_p_are_of_the_same_seeds(tmp_path):
    """At seed 1 domain b is not measured: seed 1 of domain a is in no difference, as it is in no mean and no p."""
    made = study.build(tmp_path / "s", n=60, skip=(("eval average / b", 1),))
    gap = data.collect(made, "last")["methods"]["rows"]["average"]["minus_reference"]
    values = {d: by_hand(made, "average", d, 0) - by_hand(made, "MOPD", d, 0) for d in "ab"}
    for d in "ab":
        assert [s["seed"] for s in gap["domains"][d]["seeds"]] == [0]
        assert gap["domains"][d]["difference"] == pytest.approx(values[d].mean(), abs=1e-6)
        assert gap["domains"][d]["p"] == pytest.approx(stats.sign_flip(values[d]), abs=1e-6)
    both = (by_hand(made, "average", "a", 1) - by_hand(made, "MOPD", "a", 1)).mean()
    assert both != pytest.approx(values["a"].mean())
    assert gap["difference"] == pytest.approx(np.mean([v.mean() for v in values.values()]), abs=1e-6)


def test_compute_is_of_the_seeds_that_are_scored(tmp_path):
    found = data.collect(study.build(tmp_path / "s", skip=(("eval MOPD / a", 1),)), "last")["methods"]
    assert units(found, "MOPD", 1) == (4, 34, 0)
    assert units(found, "MOPD") == (3, 33, 0)
    none = study.build(tmp_path / "n", skip=(("eval specialist a / a", 0), ("eval specialist a / a", 1)))
    assert data.collect(none, "last")["methods"]["oracle"] == {}


@pytest.mark.parametrize(
    ("label", "trials", "said"),
    [
        ("lr 5e-05", ["lr 5e-05", "lr 0.0001", "lr 0.0002"], "end of the range"),
        ("lr 0.0001", ["lr 0.0001", "lr 5e-05", "lr 0.0002"], ""),  # in the order of the numbers
        ("lr 0.0002", ["lr 0.0001", "lr 5e-05", "lr 0.0002"], "end of the range"),
        ("scale 1", ["scale 0.4", "scale 0.7", "scale 1"], "end of the range"),
        ("1:1:1:1", ["1:1:1:1", "1:2:1:2", "2:1:2:1"], "first of its trials"),
        ("1:2:1:2", ["1:1:1:1", "1:2:1:2", "2:1:2:1"], ""),
        ("long", ["short", "long"], "last of its trials"),
        ("budget 1", ["0.5", "budget 1"], "last of its trials"),
        ("only", ["only"], ""),
        ("lr 1", [], ""),
    ],
)
def test_a_pick_at_an_end_of_its_trials(label, trials, said):
    assert methods.at_end(label, trials) == said


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


def gap(*seeds, p):
    """A difference, by seed."""
    return {
        "difference": sum(seeds) / len(seeds),
        "interval": (0.001, 0.2),
        "p_holm": p,
        "seeds": [{"seed": i, "difference": d} for i, d in enumerate(seeds)],
    }


@pytest.mark.parametrize(
    ("entry", "sure", "sided", "reach"),
    [
        (gap(0.01, 0.02, 0.03, p=0.04), True, "3/3 above", "+1.0 to +3.0"),
        (gap(-0.01, -0.02, p=0.001), True, "2/2 below", "−2.0 to −1.0"),
        (gap(0.01, 0.02, p=0.05), False, "2/2 above", "+1.0 to +2.0"),
        (gap(0.2, -0.01, p=0.001), False, "1/2 above", "−1.0 to +20.0"),
        (gap(-0.2, 0.0, p=0.001), False, "1/2 below", "−20.0 to +0.0"),
        (gap(0.2, p=0.001), False, "1/1 above", ""),  # one seed
        (gap(0.1, 0.1, p=None), False, "2/2 above", "+10.0 to +10.0"),
    ],
)
def test_a_difference_is_sure_where_every_one_of_several_seeds_agrees(entry, sure, sided, reach):
    assert (methods_show.sure(entry), methods_show.sided(entry), methods_show.reach(entry)) == (sure, sided, reach)


def test_only_sure_differences_are_bold_or_coloured(found):
    """Everywhere a difference stands, with one that is sure, one that is of two signs and one of a single seed."""
    shown = json.loads(json.dumps(found["methods"]))
    gaps = {"trace SFT": gap(-0.033, -0.053, p=0.01), "mixed RL": gap(0.111, -0.022, p=0.01), "average": gap(-0.077, p=0.01)}
    for row, made in gaps.items():
        shown["rows"][row]["minus_reference"] = {**made, "domains": {"a": made, "b": made}}
    shown["rows"]["task arithmetic"]["minus_reference"] = None
    page = html.methods_page({"run": "r", "recipe": None, "seeds": [0, 1], "methods": shown})
    table = page.partition("</figure>")[2].partition("<footer")[0]
    assert re.findall(r"<strong[^>]*>([^<]*)<", table) == ["−4.3"] * 3
    assert re.findall(r'class="(?:good|bad)">([^<]*)<', table) == ["−4.3"] * 3
    assert "1/2 above: −2.2 to +11.1" in table
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    methods_show.show(shown, console)
    bold = [re.sub(r"\x1b.*?m", "", b).strip() for b in re.findall(r"\x1b\[1m(.*?)\x1b\[0m", console.file.getvalue())]
    numbers = [b for b in bold if re.search(r"[+−]\d", b)]
    assert numbers
    assert all("−4.3" in b or b in ("−5.3 to −3.3", "−3.3", "−5.3") for b in numbers)
    text = re.sub(r"\x1b.*?m", "", console.file.getvalue())
    assert re.search(r"mixed RL +1/2 above +−2.2 to \+11.1 +\+11.1 +−2.2", text)
    assert "p speaks of these checkpoints" in re.sub(r"\s+", " ", text)


def test_with_one_seed_nothing_is_bold(tmp_path):
    alone = data.collect(study.build(tmp_path / "s", n=200, seeds=(0,)), "last")["methods"]
    assert min(m["minus_reference"]["p_holm"] for m in alone["rows"].values() if m["minus_reference"]) < 0.05
    page = html.methods_page({"run": "r", "recipe": None, "seeds": [0], "methods": alone})
    assert not re.search(r'<strong|class="(?:good|bad)"', page)
    assert "with one seed nothing is" in page


def test_other_columns_are_called_so_and_stand_apart(found):
    page = html.methods_page({"run": "r", "recipe": None, "seeds": [0, 1], "methods": found["methods"]})
    assert "not taught" not in page
    main, _, rest = page.partition('<th scope="col">other columns</th>')
    assert "raw a" not in main.partition("</figure>")[2]
    table = rest.partition("</table>")[0]
    heads = re.findall(r'<tr class="(control)?"><th scope="row">([^<]*)</th>', table)
    assert [row for _, row in heads] == ["sft", "specialist a", "specialist b", *METHODS]
    assert [row for control, row in heads if control] == ["sft", "specialist a", "specialist b"]
    console = Console(file=io.StringIO(), width=80)
    methods_show.show(found["methods"], console)
    words = console.file.getvalue().partition("Other columns")[2]
    assert re.search(r"^ *sft +\S+ *$", words, re.MULTILINE)


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


def test_a_studys_page_is_filled_from_its_json(store, found, tmp_path):
    tables = runpy.run_path(str(ROOT / "docs" / "results" / "tables.py"))
    page = tmp_path / "study.md"
    page.with_suffix(".json").write_text(json.dumps(tables["collect"](store, "last", "MOPD")))
    page.write_text("".join(f"<!-- {n} -->\n\nold\n\n<!-- end -->\n" for n in (*NAMES, "accuracy", "paired")))
    text = tables["filled"](page)
    assert "old" not in text
    assert "| trace SFT | 0.14: 0.09, 0.19 | 0.44: 0.39, 0.49 | 0.11: 0.16, 0.06 | 0.55: 0.55, 0.55 |" in text
    assert "| average | 0.00: 0.00, 0.00 | 0.30: 0.30, 0.30 | 0.00: 0.00, 0.00 | 0.30: 0.30, 0.30 |" in text
    assert "| routed oracle | 0.00: 0.00, 0.00 | 0.30: 0.30, 0.30 | 0.00: 0.00, 0.00 | 0.30: 0.30, 0.30 |" in text
    assert "| trace SFT | best-fit | 1 | long (last of its trials) | short 50.0, long 60.0 |" in text
    gap = found["methods"]["rows"]["average"]["minus_reference"]
    low, high = sorted(100 * s["difference"] for s in gap["seeds"])
    assert f"| 2/2 below: {low:+.1f} to {high:+.1f} |".replace("-", "−") in text
    base = found["methods"]["references"]["sft"]["domains"]["raw a"]["mean"]
    assert f"|  | raw a, minus sft (95 %) |\n| --- | --- |\n| sft | {100 * base:.1f} |\n| specialist a | " in text
    for name in ("methods", "others"):
        lines = text.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0].strip().splitlines()
        assert len({line.count("|") for line in lines}) == 1
    page.write_text("<!-- ledger -->\n\n<!-- end -->\n")
    with pytest.raises(Exception, match="wants a table 'ledger'; did you mean 'ledgers'"):
        tables["filled"](page)
