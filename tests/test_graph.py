"""The graph: order, keys, types, plans, and chains that would break recursion. No time is asserted."""

from __future__ import annotations

import json
import random
import re

import pytest

from tests import toy
from tutelage import graph
from tutelage.graph import At, Goals, Stage, from_record, inputs, key, order, plan, record
from tutelage.spec import SpecError, override

NOTHING = lambda k: False  # noqa: E731
LONG = 1000


def chain(length: int = LONG) -> Goals:
    last: Stage = toy.Chain(name="link-0")
    for n in range(1, length):
        last = toy.Chain(name=f"link-{n}", before=last.out(), number=n)
    return Goals(recipe="chain", stages=(last.out(),))


# --- order and edges -----------------------------------------------------------------------------------------------------


def test_order_puts_inputs_first_and_each_stage_once():
    goals = toy.small()
    found = [s.name for s in order(at.of for at in goals.stages)]
    assert sorted(found) == ["base", "data", "left", "more", "right", "score-left", "score-right"]
    place = {name: n for n, name in enumerate(found)}
    for stage in toy.stages(goals).values():
        assert all(place[at.of.name] < place[stage.name] for _, at in inputs(stage))


def test_order_of_random_graphs():
    dice = random.Random(7)
    for _ in range(20):
        made: list[Stage] = []
        for n in range(30):
            first = dice.choice(made).out() if made and dice.random() < 0.9 else None
            made.append(toy.Chain(name=f"s{n}", before=first, number=n))
        found = order(made)
        assert len(found) == len(made)
        seen = set()
        for stage in found:
            assert all(id(at.of) in seen for _, at in inputs(stage))
            seen.add(id(stage))


def test_edges_know_the_path_of_their_field():
    data = toy.Make(name="data")
    base = toy.Count(name="base", source=data.out())
    table = graph.Table(rows={"x": {"a": toy.Judge(name="j", policy=base.out()).out()}}, before="x", after="x", teachers={})
    assert [p for p, _ in inputs(toy.Count(name="c", source=data.out(), start=base.out()))] == ["source", "start"]
    assert [p for p, _ in graph.edges(table)] == ["rows.x.a"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"before": "lft"}, "table.before names row 'lft', which the table does not have; did you mean 'left'?"),
        (
            {"methods": ("left", "rihgt")},
            "table.methods.1 names row 'rihgt', which the table does not have; did you mean 'right'?",
        ),
        ({"methods": ("left",)}, "table.methods does not name the table's after, 'right'"),
        ({"methods": ("right", "left", "right")}, "table.methods names row 'right' twice"),
        ({"taught_by": {"lfet": {}}}, "table.taught_by names 'lfet', which is no method; did you mean 'left'?"),
        ({"taught_by": {"left": {"d": "rigth"}}}, "table.taught_by.left.d names row 'rigth', which the table does not have"),
        ({"teachers": {"b": "left"}}, "table.teachers names domain 'b', which no row has"),
    ],
)
def test_a_table_that_names_what_it_does_not_have_is_refused(names, said):
    goals = toy.small()
    rows = {"left": {"a": goals.stages[0]}, "right": {"a": goals.stages[1]}}
    whole = {"rows": rows, "after": "right", "methods": ("left", "right")}
    assert plan([goals.model_copy(update={"table": graph.Table(**whole)})], NOTHING).todo
    with pytest.raises(SpecError, match=re.escape(said)):
        plan([goals.model_copy(update={"table": graph.Table(**{**whole, **names})})], NOTHING)


# --- keys ----------------------------------------------------------------------------------------------------------------


def test_names_and_threads_are_not_in_keys():
    one, other = toy.Make(name="a"), toy.Make(name="b", threads=2)
    assert key(one) == key(other)
    assert key(toy.Count(name="x", source=one.out())) == key(toy.Count(name="y", source=other.out()))


def test_everything_downstream_of_a_change_gets_another_key_and_nothing_else():
    before, after = toy.stages(toy.small()), toy.stages(toy.small())
    rec = record(toy.small())
    override(rec, "left.steps", 99)
    after = toy.stages(from_record(rec))
    assert {n for n in before if key(before[n]) != key(after[n])} == {"left", "score-left"}


def test_a_step_of_a_series_is_part_of_the_key():
    base = toy.Count(name="base", source=toy.Make(name="d").out(), keep=(2, 4))
    keys = {key(toy.Judge(name="j", policy=base.out(step=s))) for s in (None, 2, 4)}
    assert len(keys) == 3


def test_keys_stay_what_they_were():
    """A store made yesterday must be found today: keys of fixed specs, written down."""
    from tutelage.losses.policy import GRPO

    form = graph.digest(graph.canonical(GRPO(), lambda s: None))
    assert form == graph.digest({"kind": "losses.policy.GRPO", "version": GRPO.version})
    assert graph.digest({"b": [1, 2.5, "é"], "a": None}) == "f8df62ed4c32a3a1138f3eab72524768"


# --- long chains ---------------------------------------------------------------------------------------------------------


def test_a_chain_of_a_thousand_is_planned_without_recursion_and_each_stage_inferred_once():
    goals = chain()
    toy.Chain.inferred.clear()
    made = plan([goals], NOTHING)
    assert len(made.nodes) == LONG
    assert toy.Chain.inferred == [f"link-{n}" for n in range(LONG)]
    assert [n.stage.name for n in made.todo] == [f"link-{n}" for n in range(LONG)]


def test_keys_of_a_chain_are_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(graph, "canonical", lambda s, e: calls.append(s) or graph.dump(s, e))
    goals = chain(300)
    last = goals.stages[0].of
    key(last)
    key(last)
    plan([goals], NOTHING)
    assert len(calls) == 300


def test_a_chain_of_a_thousand_goes_through_a_record_in_any_order():
    goals = chain()
    rec = json.loads(json.dumps(record(goals)))
    rec["stages"] = dict(reversed(rec["stages"].items()))
    again = from_record(rec)
    assert key(again.stages[0].of) == key(goals.stages[0].of)
    assert "link-999" in repr(again.stages[0].of)


def test_shared_teachers_do_not_blow_up():
    """Every layer uses the one before twice: 2**60 paths, 61 stages."""
    last: Stage = toy.Make(name="layer-0")
    model: Stage = toy.Count(name="first", source=last.out())
    for n in range(60):
        model = toy.Count(name=f"layer-{n + 1}", source=last.out(), start=model.out(), steps=n + 1)
    goals = Goals(recipe="r", stages=(model.out(), toy.Judge(name="j", policy=model.out()).out()))
    assert len(plan([goals], NOTHING).nodes) == 63
    assert len(from_record(record(goals)).stages) == 2


# --- records -------------------------------------------------------------------------------------------------------------


def test_two_stages_of_one_name_are_refused():
    twice = Goals(recipe="r", stages=(toy.Make(name="a").out(), toy.Make(name="a", seed=1).out()))
    with pytest.raises(SpecError, match="two stages of recipe 'r' are named 'a'"):
        record(twice)
    with pytest.raises(SpecError, match="two stages of recipe 'r' are named 'a'"):
        plan([twice], NOTHING)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("base.source.ref", "dta", "unknown stage 'dta'; did you mean 'data'"),
        ("base.source.ref", "left", "needs itself"),
        ("base.source.prt", "x", "unknown field"),
        ("base.kind", "tests.toy.Rate", "'base' is not a stage"),
        ("base.kind", "tests.toy.Cont", "unknown kind 'tests.toy.Cont'"),
    ],
)
def test_bad_references_are_named(path, value, says):
    def build() -> None:
        rec = record(toy.small())
        override(rec, path, value)
        from_record(rec)

    with pytest.raises(SpecError, match=says):
        build()


def test_a_record_without_its_parts_says_so():
    with pytest.raises(SpecError, match="no 'goals'"):
        from_record({"recipe": "r", "stages": {}})


# --- types ---------------------------------------------------------------------------------------------------------------


def planned(stage: Stage) -> None:
    plan([Goals(recipe="r", stages=(stage.out(),))], NOTHING)


def test_a_missing_port_is_named():
    data = toy.Make(name="data")
    with pytest.raises(SpecError, match=r"stage 'c': stage 'data' has no port 'dat'; did you mean 'data'"):
        planned(toy.Count(name="c", source=At(of=data, port="dat")))
    with pytest.raises(SpecError, match="has no port 'nothing'"):
        plan([Goals(recipe="r", stages=(At(of=data, port="nothing"),))], NOTHING)
    with pytest.raises(SpecError, match="has ports left, right: name one"):
        toy.Two(name="two").out()


def test_a_step_must_be_kept():
    base = toy.Count(name="base", source=toy.Make(name="d").out(), keep=(2, 4))
    planned(toy.Judge(name="j", policy=base.out(step=4)))
    with pytest.raises(SpecError, match="keeps no checkpoint of step 3; kept steps: 2, 4"):
        planned(toy.Judge(name="j", policy=base.out(step=3)))
    with pytest.raises(SpecError, match="kept steps: none"):
        planned(toy.Judge(name="j", policy=toy.Make(name="d").out(step=1)))


def test_a_wrong_type_names_the_stage_that_got_it():
    base = toy.Count(name="base", source=toy.Make(name="d").out())
    with pytest.raises(SpecError, match="stage 'c': source is ModelType, not data"):
        planned(toy.Count(name="c", source=base.out()))


# --- plans ---------------------------------------------------------------------------------------------------------------


def test_equal_stages_of_two_seeds_are_one_node_and_others_carry_their_seed():
    made = plan([toy.small(0), toy.small(1)], NOTHING)
    labels = {n.label for n in made.nodes.values()}
    assert labels == {
        *("data", "base", "right", "score-right"),
        *("more@0", "more@1", "left@0", "left@1", "score-left@0", "score-left@1"),
    }


def test_statuses_follow_what_is_stored():
    goals = toy.small()
    keys = {n: key(s) for n, s in toy.stages(goals).items()}
    status = lambda has: {n.label: n.status for n in plan([goals], has.__contains__).nodes.values()}  # noqa: E731
    assert set(status(set()).values()) == {"run"}
    assert set(status(set(keys.values())).values()) == {"stored"}
    some = status({keys["base"], keys["score-right"]})
    assert some == {
        "data": "unneeded",  # base and right want it, and neither will run
        "more": "run",
        "base": "stored",
        "left": "run",
        "right": "unneeded",
        "score-left": "run",
        "score-right": "stored",
    }


def test_the_plan_says_why():
    made = plan([toy.small()], NOTHING)
    why = {n.label: n.why for n in made.nodes.values()}
    assert why["data"] == "not in the store"
    assert why["left"] == "waits for more, base"


def test_flops_come_from_the_stages():
    flops = {n.label: n.flops for n in plan([toy.small(steps=5)], NOTHING).nodes.values()}
    assert flops["base"] == 6000.0 * 5 * 4
    assert flops["data"] == 0
