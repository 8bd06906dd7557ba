"""The terminal's tables and the page: every section, nothing from a network, nothing unescaped."""

from __future__ import annotations

import io
import re
import time
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from tests.report import synthetic
from tutelage.report import graph, html, plots, terminal
from tutelage.report.data import collect, thin
from tutelage.report.read import Replicate, load

SECTIONS = ("graph", "recovery", "accuracy", "controls", "elsewhere", "curves", "cost", "transcripts", "stages", "recipe")


@pytest.fixture(scope="module")
def page(made):
    return html.page(made, "last")


def printed(store, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    terminal.show(store, "last", console)
    return console.file.getvalue()


# --- terminal ------------------------------------------------------------------------------------------------------------


def test_terminal_fits_100_columns_and_names_checkpoints_and_seeds(made):
    text = printed(made)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text  # nothing cut off
    for words in ("student (mopd)", "rl-sort@200", "pretrain", "seed 0:", "seed 1:", "mean over seeds", "no gap (+3.0)"):
        assert words in text
    assert re.search(r"verifier errors.*student 4", text)
    assert "teachers − sft continued" in text
    assert "What each specialist lost elsewhere" in text


@pytest.mark.parametrize("width", [80, 99, 120])
def test_terminal_breaks_no_word(made, width):
    text = printed(made, width)
    assert max(len(line) for line in text.splitlines()) <= width
    whole = ("checkpoint", "reverse", "(rl-reverse)", "specialist", "continued", "consolidation")
    for word in whole:
        assert word in text
    lone = re.compile(r"^ ?[a-z)]{1,2} *$", re.M)  # what is left of a word that was cut
    assert not lone.search(text)


def test_every_seed_is_printed_and_said_not_to_be_in_the_interval(made, found, page):
    text = printed(made, 80)
    assert "Every seed" in text
    for seed in found["recovery"]["seeds"]:
        row = seed["domains"]["sum"]
        numbers = r"\s+".join(terminal.percent(row[k]) for k in ("before", "teacher", "after"))
        assert re.search(rf"\b{seed['seed']}\s+{numbers}", text)
        assert f"seed {seed['seed']}: all domains" in text
    assert "no gap in base" in text
    assert re.sub(r"\s+", " ", text).count("it does not cover the training seed") >= 3
    assert html.TASKS_ONLY in page
    assert "it says nothing of the controls" in page
    assert '<th scope="row">all seeds</th>' in page
    assert "ratio of sums" not in page


def test_budgets_of_controls_are_told(made, found, page):
    seeds = found["budgets"]["sft continued"]
    assert [s["seed"] for s in seeds] == [0, 1]
    assert seeds[0]["selected"]["step"] == 200
    assert seeds[0]["teachers"]
    line = "sft continued: spent 2.5, 2.5 of its 2.6, 2.6 TFLOP budget (the specialists'; seeds 0, 1); "
    line += "chosen on development tasks: steps 200, 200 of 300, 300"
    assert line in re.sub(r"\s+", " ", printed(made))
    assert line.replace("'", "&#39;") in page
    alone = {"c": [{**seeds[0], "teachers": False, "of": ["a"], "selected": None, "spent": 5e9, "budget": 2e12}]}
    assert terminal.budget_lines({"budgets": alone}) == ["c: spent 5.0 GFLOP of its 2.0 TFLOP budget (of a)"]


def test_a_table_that_names_no_row_is_told(tmp_path, monkeypatch):
    drawn = synthetic.record
    monkeypatch.setattr(synthetic, "record", lambda *a: (r := drawn(*a)) | {"table": r["table"] | {"before": "sfft"}})
    store = synthetic.build(tmp_path / "s", n=20)
    said = "the table names 'sfft' as its before, but has no such row (nearest: 'sft')"
    assert said in re.sub(r"\s+", " ", printed(store))
    assert said.replace("'", "&#39;") in html.page(store, "last")


def test_terminal_of_partial_runs(tmp_path):
    assert "no table" in printed(synthetic.build(tmp_path / "a", table=False, n=20))
    text = printed(synthetic.build(tmp_path / "b", n=20, skip=("mopd", "eval student")))
    assert "interrupted" in text
    assert "Recovery" not in text


def test_terminal_prints_more_domains_in_further_tables():
    assert list(terminal.chunks("abcdefghij")) == [list("abcd"), list("efgh"), list("ij")]


def test_words_for_numbers():
    assert terminal.amount(1_234_567) == "1.23M"
    assert terminal.amount(0) == "0"
    assert terminal.within(0.0, (0.0, 0.008)) == "±0.8"  # the farther side
    assert terminal.points(-0.12, (-0.15, -0.1)) == "−12.0 ±3.0"
    assert terminal.flops(3.68e12) == "3.7 TFLOP"
    assert terminal.flops(44e12, 3.6e12) == "44, 4 TFLOP"
    assert terminal.flops(3.6e12, 0.7e12) == "3.6, 0.7 TFLOP"
    assert terminal.flops(0.0) == "–"
    assert terminal.duration(3725) == "1 h 02 min"
    assert terminal.duration(62) == "1 min 02 s"
    assert html.points(-0.12) == "−12.0"
    assert html.span((-0.1, 0.2), True) == "−10.0 to +20.0"


# --- page ----------------------------------------------------------------------------------------------------------------


def test_every_section_is_there_and_the_size_is_small(page):
    for name in SECTIONS:
        assert f'<section id="{name}">' in page
    assert len(page.encode()) < 2_000_000


def test_nothing_comes_from_a_network(page):
    assert not re.search(r"""(?:https?:)?//[a-z]""", page)
    assert "<script" not in page
    assert "url(" not in re.sub(r"url\(#", "", page)
    assert not re.search(r"<(?:link|img|iframe|object)[^>]*(?:href|src)=\"(?!data:,)", page)


def test_hostile_transcripts_and_names_are_escaped(page, tmp_path, monkeypatch):
    assert synthetic.HOSTILE not in page
    assert "&lt;script&gt;alert(&#39;reply&#39;)&lt;/script&gt;" in page
    monkeypatch.setitem(synthetic.ACCURACY, "<img src=x onerror=1>", synthetic.ACCURACY["sft"])
    monkeypatch.setitem(synthetic.STAGES, "<img src=x onerror=1>", "sft")
    hostile = html.page(synthetic.build(tmp_path / "s", n=20, seeds=(0,)), "last")
    assert "<img" not in hostile
    assert "&lt;img" in hostile


def test_headline_says_what_the_specialists_and_the_student_are_worth(page, found):
    said = html.sentences(found)
    assert "above the sft they began from" in said[0]["text"]
    assert "the control sft continued" in said[1]["text"]
    assert "student: sum +" in said[1]["by"]
    assert "91.8 %" in page
    assert page.count("seed 0:") >= 1


@pytest.mark.parametrize(
    ("interval", "words"),
    [((0.01, 0.05), "stands 3.0 points above"), ((-0.05, -0.01), "stands 3.0 points below"), ((-0.01, 0.05), "cannot be told")],
)
def test_the_sentence_follows_the_interval(interval, words):
    value = -0.03 if interval[1] < 0 else 0.03
    gap = {"than": "c", "difference": value, "interval": interval, "domains": {}}
    said = html.compare([{**gap, "of": "teachers"}, {**gap, "of": "student"}], "c", "the control")["text"]
    assert f"the student {words}" in said


def test_a_domain_without_a_gap_prints_raw_numbers(page):
    row = next(r for r in re.findall(r"<tr><th scope=\"row\">base</th>.*?</tr>", page, re.S) if "no gap" in r)
    assert "gained +3.0 of +1.0" in row
    assert "41.0" in row
    assert "44.0" in row


def test_no_ratio_at_all_prints_numbers(tmp_path, monkeypatch):
    for domain in synthetic.DOMAINS:
        monkeypatch.setitem(synthetic.ACCURACY, f"specialist {domain}", synthetic.ACCURACY["sft"])
    store = synthetic.build(tmp_path / "s", n=60)
    page = html.page(store, "last")
    assert "summed gain cannot be told from 0" in page
    assert "cannot be told from the sft they began from" in page
    text = printed(store)
    assert "no gap to recover: gained" in text
    assert "mean over seeds: –" in text


def test_columns_name_their_checkpoint_and_parent(page):
    assert re.search(r"before: sft<small>started from pretrain</small>", page)
    assert re.search(r"after: student \(mopd\)<small>started from sft</small>", page)
    assert "rl-sort@200, from sft" in page
    assert "Fit, kept step 200 of 300" in page


def test_drawings_are_well_formed_and_told_to_readers(page):
    drawn = re.findall(r"<svg class=\"(?:plot|graph)\".*?</svg>", page, re.S)
    assert len(drawn) > 10
    for each in drawn:
        tree = ET.fromstring(each)
        assert tree.get("role") == "img"
        assert tree.get("aria-label")
        assert not re.search(r"#[0-9a-f]{6}|rgb\(|nan", each)  # colours are the page's, numbers are numbers
    assert all("<caption>" in t for t in re.findall(r"<table>.*?</table>", page, re.S))
    assert page.count("<h1>") == 1


def test_a_table_without_teachers_is_told_by_what_was_gained(tmp_path, monkeypatch):
    drawn = synthetic.record
    plain = {"teachers": {}, "after": "specialist sum", "controls": ["base"]}
    monkeypatch.setattr(synthetic, "record", lambda *a: (r := drawn(*a)) | {"table": r["table"] | plain})
    store = synthetic.build(tmp_path, n=40)
    found = collect(store, "last")
    assert [(g["of"], g["than"]) for g in found["gaps"]] == [("specialist sum", "sft"), ("specialist sum", "base")]
    own = {row: found["scores"][row]["domains"]["sum"]["mean"] for row in ("specialist sum", "sft")}
    assert found["gaps"][0]["domains"]["sum"]["difference"] == pytest.approx(own["specialist sum"] - own["sft"])
    assert found["cost"]["ledgers"] == {}
    text, page = printed(store), html.page(store, "last")
    assert "specialist sum − sft" in text
    assert terminal.role_word(found["scores"]["specialist sum"], found) == "after"
    assert "ledger" not in text
    assert "teachers: each" not in text
    assert "specialist sum − sft" in page
    assert "On average over the domains, specialist sum stands" in page
    assert "the first specialist sum got right" in page
    assert page.count('class="replies"') > 1
    for name in ("recovery", "elsewhere", "methods"):  # nothing to say of teachers and of methods
        assert f'id="{name}"' not in page
        assert f'href="#{name}"' not in page


def test_pages_of_partial_runs(tmp_path):
    bare = html.page(synthetic.build(tmp_path / "a", table=False, n=20), "last")
    assert "draws no recovery table" in bare
    store = synthetic.build(tmp_path / "b", n=20, skip=("mopd", "eval student", "rl-sum", "eval specialist sum"))
    for file in (store.root / "artifacts").glob("*/metrics.jsonl"):
        file.unlink()
    part = html.page(store, "last")
    for name in SECTIONS:
        assert f'<section id="{name}">' in part
    assert "No metrics were logged" in part
    assert "not done" in part
    empty = synthetic.build(tmp_path / "c", n=20, skip=("",))
    assert "Nothing has been spent" in html.page(empty, "last")
    printed(empty)


def test_write_leaves_one_file(made, tmp_path):
    path = html.write(made, "last", tmp_path / "deep" / "report.html")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


# --- drawings ------------------------------------------------------------------------------------------------------------


def test_graph_draws_who_trains_from_whom(made):
    first = load(made, "last").first
    drawing = graph.build(first, {})
    names = {n for n in drawing.nodes if n in first.record["stages"]}
    assert names == {n for n in first.record["stages"] if not n.startswith("eval ")}
    shown = {(link.source, link.target, link.role): link.label for link in drawing.links}
    assert shown["rl-sort", "mopd", "teacher"] == "teaches sort @200"
    assert shown["sft", "mopd", "start"] == "starts"
    assert shown["tasks", "sft", "data"] == "gold, dev"
    assert shown["rl-sum", "sft-continued", "budget"] == "budget"


def test_graph_layers_run_forward_and_nodes_do_not_overlap(made):
    drawing = graph.build(load(made, "last").first, {})
    graph.arrange(drawing)
    for link in drawing.links:
        assert drawing.nodes[link.source].layer < drawing.nodes[link.target].layer
    for layer in {n.layer for n in drawing.nodes.values()}:
        column = sorted((n for n in drawing.nodes.values() if n.layer == layer), key=lambda n: n.y)
        for above, below in pairwise(column):
            assert above.y + above.height <= below.y + 1e-6
    assert min(n.y for n in drawing.nodes.values()) >= 0


def test_graphs_of_many_stages_are_drawn_quickly_or_left_to_the_table():
    def chain(length):
        stages = {"data": {"kind": "stages.tasks.TaskSplits"}}
        for i in range(length):
            model = {"model": synthetic.ref(f"s{i - 1}")} if i else {}
            stages[f"s{i}"] = {"kind": "stages.fit.Fit", "data": synthetic.ref("data", "gold"), **model}
        return Replicate(0, {"stages": stages}, {})

    began = time.monotonic()
    assert graph.svg(chain(120), {}).count('<g class="node') == 121
    assert graph.svg(chain(1000), {}) == ""
    assert time.monotonic() - began < 10


def test_isotonic_against_brute_force():
    values = [3.0, 1.0, 2.0, 5.0, 4.0]
    fitted = graph.isotonic(values)
    assert fitted == [2.0, 2.0, 2.0, 4.5, 4.5]
    rng = np.random.default_rng(0)
    best = sum((a - b) ** 2 for a, b in zip(values, fitted, strict=True))
    for _ in range(500):
        other = np.sort(rng.normal(3, 1.5, 5))
        assert np.sum((other - values) ** 2) >= best - 1e-9


# --- plots ---------------------------------------------------------------------------------------------------------------


def curve(points=9, **style):
    return plots.lines("Reward", [plots.Line("rl-sum", 0, [(i, i % 7 / 3) for i in range(points)], **style)])


def test_plots_are_the_same_text_each_time_and_know_no_urls():
    dots = [plots.Dot("sft", "before", 0.3, 0.2, 0.4, [0.25, 0.35]), plots.Dot("student", "after", 0.6, 0.5, 0.7)]
    for draw in (curve, lambda: curve(1), lambda: plots.dots("Accuracy in sum", dots)):
        svg = draw()
        assert svg == draw()
        assert "//" not in svg  # no namespace either: the page is HTML
        assert not re.search(r"<style|font-family|<!|<\?|\b(?:rgb|black)\b|#[0-9a-f]{6}", svg)
    assert plots.lines("t", []) == plots.lines("t", [plots.Line("a", 0, [])]) == ""


def test_plots_use_only_variables_that_both_themes_set(page):
    light, dark = re.findall(r":root \{(.*?)\}", page, re.S)
    shared = set(re.findall(r"--(\w+):", light)) & set(re.findall(r"--(\w+):", dark))
    assert set(plots.VARIABLES) <= shared
    drawn = "".join(re.findall(r'<svg class="plot".*?</svg>', page, re.S))
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert {"blue", "orange", "ink", "soft", "rule", "card"} <= used <= set(plots.VARIABLES)


def test_names_in_drawings_are_unique_and_every_reference_is_met(page):
    drawn = re.findall(r'<svg class="plot".*?</svg>', page, re.S)
    names = [name for svg in drawn for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(names) == len(set(names)) > 10
    for svg in drawn:
        assert set(re.findall(r'(?:href="|url\()#([\w-]+)', svg)) == set(re.findall(r'\bid="([^"]+)"', svg))


def test_plots_tell_names_and_values_whatever_they_are_called():
    name = """<a "b' $x$ & 数学>"""
    tree = ET.fromstring(plots.dots("Accuracy", [plots.Dot(name, "control", 0.3, 0.2, 0.4)]))
    assert f"{name}: 30.0 (20.0 to 40.0)" in [t.text for t in tree.iter("title")]
    assert name[:17] in "".join(t.text for t in tree.iter("text"))
    tree = ET.fromstring(plots.lines(name, [plots.Line(name, 9, [(1.0, 2.0), (20_000.0, 3.0)])]))
    assert tree.get("aria-label") == f"{name} over step: {name}"
    assert [t.text for t in tree.iter("title")] == [name]
    assert "20k" in [t.text for t in tree.iter("text")]


def test_lines_lie_within_the_drawing():
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", curve())]
    assert all(44 <= x <= 310 and 8 <= y <= 158 for x, y in points)
    assert len(points) >= 9


def test_a_page_of_long_runs_stays_small():
    rng = np.random.default_rng(0)
    names = ("reward", "kl", "entropy", "length", "informative_groups", "nll", "dev", "truncated", "reward/a", "reward/b")
    curves: dict = {}
    for stage in map(str, range(6)):
        for metric in names:
            for seed in range(3):
                step, value = thin(np.arange(1400.0), rng.normal(size=1400).cumsum())
                entry = {"seed": seed, "step": step.tolist(), "value": value.tolist()}
                curves.setdefault(stage, {}).setdefault(metric, []).append(entry)
    made = html.curve_plots({"curves": curves, "scores": {}, "recovery": None})
    assert len(made) == 8 + 6
    assert sum(len(m["svg"]) for m in made) < 1_000_000
