"""Pass rates of a pool, the filter by band, and its matched random control."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict

import pyarrow.parquet as pq
import pytest

from tests.stages.toy import DATA, ENV, INIT, SHORT, Types, make
from tutelage.context import Stopped
from tutelage.envs.single import SingleTurn
from tutelage.graph import key
from tutelage.learn.optim import AdamW
from tutelage.rollout.policy import Policy
from tutelage.spec import SpecError, UserError
from tutelage.stages.choose import Choose, matched
from tutelage.stages.fit import Fit
from tutelage.stages.passrate import PassRate
from tutelage.store import Store
from tutelage.text.rows import read_rows, read_tasks
from tutelage.text.template import Chat
from tutelage.types import Score
from tutelage.verify.base import Verifier


class Early(Verifier):
    """Right where the reply begins with a letter of the alphabet's first third; fails itself at task ``c``."""

    async def __call__(self, task, reply, ctx=None):
        if task.id == "c":
            raise RuntimeError("no scorer today")
        return Score(float("a" <= reply[:1] <= "i"))


def rate(**more):
    fields = {"name": "rate", "model": INIT.out(), "tasks": DATA.out(), "domains": ("low", "high"), "samples": 5}
    return PassRate(**{**fields, "env": SingleTurn(verifier=Early()), "sampling": SHORT, "seed": 3, **more})


def rows_of(store, stage, port=None):
    return read_rows(store.path(key(stage), port or stage.out().port))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = Store(tmp_path_factory.mktemp("difficulty"))
    make(rate(), made)
    return made


def test_rates_are_the_means_of_replies_drawn_one_task_at_a_time(store):
    rows = rows_of(store, rate())
    assert [r["id"] for r in rows] == [r["id"] for r in rows_of(store, DATA, "rows")]
    policy = Policy(store.path(key(INIT), "policy"), slots=1)
    driver = policy.driver(Chat(), ENV, SHORT)
    rates = []
    for row, task in zip(rows, read_tasks(store.path(key(DATA), "rows")), strict=True):
        right = ["a" <= s.text[:1] <= "i" for s in driver.collect([task], 5, 3)]
        expected = (None, 0) if row["id"] == "c" else (sum(right) / 5, 5)
        assert (row["meta"]["pass_rate"], row["meta"]["pass_count"]) == expected
        rates.append(expected[0])
    assert len(set(rates)) > 3
    assert rows[0]["meta"]["level"] == 1  # what was there stays
    assert {"completion", "gold", "text"} <= rows[0].keys()


def test_costs_and_facts_of_a_measurement(store):
    meta = store.meta(key(rate()))
    assert set(meta["cost"]["tokens"]) == {"sampled", "prefilled"}
    assert meta["cost"]["tokens"]["prefilled"] == 25 * 5 * 3
    found, known = meta["facts"]["pass_rate"], [r["meta"]["pass_rate"] for r in rows_of(store, rate()) if r["id"] > "m"]
    assert found["low"]["unmeasured"] == 1
    assert found["high"]["mean"] == pytest.approx(sum(known) / len(known))
    assert found["high"]["never"] == pytest.approx(known.count(0) / len(known))


def test_a_measurement_stopped_anywhere_resumes_to_the_same_rates_and_costs(store, tmp_path):
    cut, stage = Store(tmp_path / "cut"), rate(slots=5)  # 13 parts; the whole one was measured in a single part
    for stop_after in (1, 4):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(stage, cut)
    assert rows_of(cut, stage) == rows_of(store, rate())
    assert asdict(resumed.cost) == store.meta(key(rate()))["cost"]
    assert [m["step"] for m in cut.metrics(key(stage))] == [*range(2, 25, 2), 25]


def choose(**more):
    return Choose(**{"name": "choose", "tasks": rate().out(), "low": 0.2, "high": 0.6, **more})


def test_the_band_keeps_exactly_the_tasks_within_it_and_says_why_of_all(store):
    stage = choose()
    make(stage, store)
    pool = {r["id"]: r for r in rows_of(store, rate())}
    inside = [i for i, r in pool.items() if r["meta"]["pass_rate"] is not None and 0.2 <= r["meta"]["pass_rate"] <= 0.6]
    assert [r["id"] for r in rows_of(store, stage, "chosen")] == inside
    assert 5 < len(inside) < 20
    why = pq.read_table(store.path(key(stage), "why") / "data.parquet").to_pylist()
    assert [w["id"] for w in why] == list(pool)
    for w in why:
        r = pool[w["id"]]["meta"]["pass_rate"]
        reason = "not measured" if r is None else "too hard" if r < 0.2 else "too easy" if r > 0.6 else "in the band"
        assert (w["rate"], w["why"], w["kept"], w["count"]) == (r, reason, w["id"] in inside, 0 if r is None else 5)
    counted = Counter((w["domain"], w["why"]) for w in why)
    for domain, found in store.meta(key(stage))["facts"]["chosen"].items():
        assert {reason: found[reason] for reason in ("in the band", "too hard", "too easy", "not measured")} == {
            reason: counted[domain, reason] for reason in ("in the band", "too hard", "too easy", "not measured")
        }


def test_the_control_matches_in_size_by_domain_and_is_blind_to_rates(store):
    """Over many seeds each task of a domain is drawn equally often, whatever its rate."""
    stage = choose(name="again", high=0.61)
    make(stage, store)
    chosen, control = (Counter(r["domain"] for r in rows_of(store, stage, port)) for port in ("chosen", "control"))
    assert chosen == control
    pool, kept = rows_of(store, rate()), rows_of(store, stage, "chosen")
    drawn = Counter(r["id"] for seed in range(2000) for r in matched(pool, kept, seed))
    shares = defaultdict(list)
    for row in pool:
        shares[row["domain"]].append(drawn[row["id"]] / 2000)
    for domain, seen in shares.items():
        assert seen == pytest.approx([chosen[domain] / len(seen)] * len(seen), abs=0.05)
    assert key(choose(seed=1)) != key(choose())


def test_a_domain_may_have_its_own_band(store):
    stage = choose(bands={"high": (0.0, 1.0)})
    make(stage, store)
    kept = Counter(r["domain"] for r in rows_of(store, stage, "chosen"))
    pool = Counter(r["domain"] for r in rows_of(store, rate()))
    assert kept["high"] == pool["high"]
    assert kept["low"] < pool["low"]


def test_a_band_that_leaves_a_domain_empty_says_where_its_tasks_lie(store):
    with pytest.raises(UserError) as error:
        make(choose(low=0.99, high=1.0), store)
    assert "no task of domain 'high' has a pass rate in [0.99, 1.0]" in str(error.value)
    assert "12 too hard" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_better_policy_has_higher_rates(tmp_path):
    """What the rate is for: it tells what a policy can already do."""
    made = Store(tmp_path / "s")
    gold = Fit(name="sft", model=INIT.out(), data=DATA.out(), steps=40, rows=25, optimizer=AdamW(lr=0.02))
    means = []
    for model in (INIT, gold):
        stage = rate(model=model.out(), env=ENV)
        means.append(make(stage, made).facts["pass_rate"]["low"]["mean"])
    assert means[0] < 0.2 < 0.7 < means[1]


def refused(stage, *words):
    with pytest.raises(SpecError) as error:
        stage.infer(Types())
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_what_is_refused_before_anything_runs():
    refused(choose(tasks=DATA.out()), "letters.rows", "no pass rates", "PassRate")
    refused(choose(low=0.7), "low 0.7", "high 0.6")
    refused(choose(bands={"lwo": (0.1, 0.2)}), "'lwo'", "low, high")
    refused(rate(domains=("lwo",)), "'lwo'")
    refused(rate(model=DATA.out()), "no model")


def test_types_of_what_is_made(store):
    types = choose().infer(Types())
    assert types["chosen"].signals == ("pass_rate",)
    assert types["chosen"].domains == ("low", "high")
    assert "prompt" not in types["why"].columns
    assert json.dumps(store.meta(key(rate()))["facts"])
