"""Records and ``--set`` expressions that are no good: one line that says so, or a recipe that keeps its keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import toy
from tests.fuzz.broken import as_text, broken, byte_edits, edited, edits, examples, numbers, texts, tried, values
from tests.kill.quick import short
from tutelage.catalog import choose
from tutelage.graph import all_goals, from_record, key, order, plan, record
from tutelage.spec import UserError, kinds

RECORDS = {
    "small": json.loads(json.dumps(record(toy.small()))),
    "short": json.loads(json.dumps(record(short()))),
    "quickstart": json.loads(json.dumps(record(choose("quickstart").goals[0]))),
}
WORDS = sorted(
    {*RECORDS["small"]["stages"], "sft", "mopd", "base", "tasks", "ref", "port", "step", "kind", "name", "policy", "table"}
)
KINDS = sorted({*kinds(), *list(kinds().values())[::3], "tests.toy.Rate", "tests.toy.Two", "tests.toy", "os", "graph.Table"})


def judged(text: str, sets: tuple[str, ...] = ()) -> Any:
    """The goals of a recipe that plans, proven to keep their keys; None for a refusal, which must be one short line."""
    try:
        chosen = choose(text, sets)
        plan(chosen.goals, lambda key: False)
    except UserError as error:
        said = str(error)
        assert said
        assert len(said.splitlines()) == 1, said
        assert len(said) < 1000, said
        return None
    for goals in chosen.goals:
        again = from_record(json.loads(json.dumps(record(goals))))
        assert keys(again) == keys(goals)
    return chosen.goals


def keys(goals: Any) -> dict[str, str]:
    return {s.name: key(s) for s in order(at.of for at in all_goals(goals))}


@examples(1000)
def test_a_changed_record_is_refused_in_a_line_or_keeps_its_keys(tmp_path, count):
    file = tmp_path / "r.json"

    @tried(count)
    @given(st.sampled_from(["small"] * 9 + ["short"]), edits([*WORDS, *KINDS]))
    def check(which, steps):
        file.write_text(as_text(edited(RECORDS[which], steps)), "utf-8", "surrogatepass")
        judged(str(file))

    check()


@examples(500)
def test_a_record_of_other_bytes_is_refused_in_a_line_or_keeps_its_keys(tmp_path, count):
    file, whole = tmp_path / "r.json", json.dumps(RECORDS["small"]).encode()

    @tried(count)
    @given(st.binary(max_size=60) | byte_edits)
    def check(how):
        file.write_bytes(how if isinstance(how, bytes) else broken(whole, how))
        judged(str(file))

    check()


# --- sets ----------------------------------------------------------------------------------------------------------------


def paths_of(document: Any) -> list[str]:
    found, spots = [], [("", document)]
    while spots:
        at, spot = spots.pop()
        inner = spot.items() if isinstance(spot, dict) else enumerate(spot) if isinstance(spot, list) else ()
        more = [(f"{at}.{k}" if at else str(k), v) for k, v in inner]
        found += [path for path, _ in more if "." in path]
        spots += more
    return found


def expressions(which: str) -> st.SearchStrategy[str]:
    """``path=value``: paths that are there, bent ones and nonsense; values as JSON and as text."""
    real = st.sampled_from(paths_of(RECORDS[which]["stages"]))
    bent = st.lists(st.sampled_from(WORDS) | texts | st.integers(-2, 3).map(str), max_size=4).map(".".join)
    path = real | st.tuples(real, st.sampled_from(WORDS) | texts).map(".".join) | bent
    if which == "quickstart":
        path |= st.sampled_from(["seed", "domains", "width", "steps"])
    value = numbers.map(json.dumps) | values([*WORDS, *KINDS]).map(as_text) | texts | st.sampled_from(KINDS)
    return st.tuples(path, value).map("=".join) | texts


def without(stages: Any, paths: list[str]) -> Any:
    """Stages with what the paths name left out: what a ``--set`` of them must not touch."""
    stages = json.loads(json.dumps(stages))
    for path in sorted(paths, key=len, reverse=True):
        name = max((n for n in stages if path.startswith(f"{n}.")), key=len)
        *way, last = path.removeprefix(f"{name}.").split(".")
        spot = stages[name]
        for part in way:
            spot = spot[int(part)] if isinstance(spot, list) else spot[part]
        spot[int(last) if isinstance(spot, list) else last] = None
    return stages


@pytest.mark.parametrize("which", ["small", "quickstart"])
@examples(500)
def test_a_set_is_refused_in_a_line_or_changes_what_it_names(tmp_path, which, count):
    whole = RECORDS[which]
    file = tmp_path / "r.json"
    file.write_text(json.dumps(whole))

    @tried(count if which == "small" else count // 2)
    @given(st.lists(expressions(which), min_size=1, max_size=2))
    def check(sets):
        goals = judged(str(file) if which == "small" else which, tuple(sets))
        paths = [s.partition("=")[0].strip() for s in sets]
        if goals and all("." in path for path in paths):
            made = json.loads(json.dumps(record(goals[0])))
            now, was = without(made["stages"], paths), without(whole["stages"], paths)
            assert now == {n: was[n] for n in now}  # a stage that is reached no more is gone
            assert {**made, "stages": {}} == {**whole, "stages": {}}

    check()
