"""What a plan will cost: rates from what was measured, the span over cores, numbers as text."""

from __future__ import annotations

import pytest

from tests import toy
from tutelage.estimate import DEFAULT_RATE, Estimator, human_time, priorities, si, span, summary
from tutelage.graph import Goals, Node, Plan, Stage, plan
from tutelage.run import run
from tutelage.store import Store

NOBODY = set().__contains__


def planned(*goals: Goals) -> Plan:
    return plan(list(goals), NOBODY)


def node(made: Plan, label: str) -> Node:
    return next(n for n in made.nodes.values() if n.label == label)


def test_without_measurements_the_default_rate_counts_threads():
    data = toy.Make(name="data")
    one = toy.Count(name="one", source=data.out(), steps=100)
    two = toy.Count(name="two", source=data.out(), steps=101, threads=2)
    made = planned(Goals(recipe="r", stages=(one.out(), two.out())))
    guess = Estimator()
    assert guess.seconds(node(made, "one")) == pytest.approx(6000 * 100 * 4 / DEFAULT_RATE)
    assert guess.seconds(node(made, "two")) == pytest.approx(6000 * 101 * 4 / DEFAULT_RATE / 2)
    assert guess.seconds(node(made, "data")) == 0
    assert not guess.measured(node(made, "one"))
    assert "no measurement here yet" in summary(made, guess, 2)


def test_rates_come_from_the_same_name_then_the_same_kind():
    made = planned(toy.small(steps=10))
    guess = Estimator()
    guess.observe("tests.toy.Count", "base", 1000.0, 1, 1.0)
    guess.observe("tests.toy.Count", "left", 9000.0, 1, 1.0)
    guess.observe("tests.toy.Count", "left", 7000.0, 2, 1.0)
    flops = node(made, "base").flops
    assert guess.seconds(node(made, "base")) == pytest.approx(flops / 1000)
    assert guess.seconds(node(made, "left")) == pytest.approx(node(made, "left").flops / 6250)  # median of 9000 and 3500
    assert guess.seconds(node(made, "right")) == pytest.approx(node(made, "right").flops / 3500)  # of 1000, 3500, 9000
    guess.observe("tests.toy.Make", "data", 0.0, 1, 3.0)
    assert guess.seconds(node(made, "more")) == 3.0
    assert "(measured here)" in summary(made, guess, 2)


def test_a_store_that_has_measured_says_so(tmp_path):
    store = Store(tmp_path / "s")
    run(plan([toy.small(steps=5)], store.has), store)
    again = plan([toy.small(steps=6)], store.has)
    assert "(measured here)" in summary(again, Estimator(store), 2)
    assert "nothing to run: 7 stages stored" in summary(plan([toy.small(steps=5)], store.has), Estimator(store), 2)


def chained(lengths: dict[str, int], after: dict[str, str]) -> Plan:
    """Stages by name that take so many steps, each after another one."""
    data = toy.Make(name="data").out()
    made: dict[str, Stage] = {}
    for name, steps in lengths.items():
        start = made[after[name]].out() if name in after else None
        made[name] = toy.Count(name=name, source=data, start=start, steps=steps)
    return planned(Goals(recipe="r", stages=tuple(s.out() for s in made.values())))


def test_the_span_is_that_of_the_schedule():
    made = chained({"a": 4, "b": 3, "c": 5, "d": 2}, {"c": "a"})  # a then c; b; d
    seconds = lambda n: float(getattr(n.stage, "steps", 0))  # noqa: E731
    assert span(made.todo, seconds, 1) == 14
    assert span(made.todo, seconds, 2) == 9  # a + c on one core, b + d on the other
    assert span(made.todo, seconds, 9) == 9
    assert span([], seconds, 2) == 0


def test_priorities_are_the_longest_way_to_an_end():
    made = chained({"a": 4, "b": 3, "c": 5}, {"c": "a"})
    found = priorities(made.todo, lambda n: float(getattr(n.stage, "steps", 0)))
    ways = {made.nodes[k].label: round(v) for k, v in found.items()}
    assert ways == {"data": 9, "a": 9, "b": 3, "c": 5}


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 "), (999, "999 "), (1234, "1.2 k"), (45e6, "45 M"), (3.2e12, "3.2 T"), (7e20, "700 E")]
)
def test_si(value, text):
    assert si(value) == text


def test_human_time():
    seconds = (0, 0.004, 2.34, 45.2, 200, 3000, 7600, 2e5)
    assert [human_time(s) for s in seconds] == ["0 s", "0.1 s", "2.3 s", "45 s", "3.3 min", "50 min", "2.1 h", "2.3 days"]
