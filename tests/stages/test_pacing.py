"""Curriculum, temperature and health inside the online stage: what is drawn, what is compared, what ends it, and resuming."""

import contextlib
import io
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from tests.stages.toy import DATA, ENV, INIT, Letters, Types, make, rl
from tutelage.context import Stopped
from tutelage.credit.group import GroupRelative
from tutelage.credit.teacher import Teacher
from tutelage.envs.single import SingleTurn
from tutelage.graph import DataType, key
from tutelage.learn.optim import AdamW
from tutelage.losses.distill import FullReverseKL
from tutelage.rollout.base import Sampling
from tutelage.rollout.driver import Driver
from tutelage.spec import SpecError, UserError
from tutelage.stages.curriculum import EasyToHard, MovingGaussian, UniformDraw
from tutelage.stages.health import Health
from tutelage.stages.temperature import Decay, RaiseOnPlateau
from tutelage.store import Store
from tutelage.text.rows import read_rows, write_tasks
from tutelage.types import Score
from tutelage.verify.base import Verifier

DEV = Letters(name="dev")


class Rated(Letters):
    """The letters with pass rates that fall with the alphabet."""

    version = 2

    def infer(self, types):
        return {"rows": DataType(("id", "domain", "prompt", "gold", "meta"), ("high", "low"), 24, signals=("pass_rate",))}

    def run(self, ctx):
        super().run(ctx)
        folder = ctx.work / "rows"
        rows = [{k: row[k] for k in ("id", "domain", "prompt", "gold")} for row in read_rows(folder)]
        write_tasks(folder, [{**row, "meta": {"pass_rate": 1 - i / 24}} for i, row in enumerate(rows)])


RATED = Rated(name="rated")


class Loop(Verifier):
    """Pays for a reply that says one letter again and again."""

    async def __call__(self, task, reply, ctx=None):
        return Score(max(Counter(reply).values(), default=0) / 12)


class Letter(Verifier):
    """Pays for an ``e``: something that a policy learns within a few steps."""

    async def __call__(self, task, reply, ctx=None):
        return Score(float(reply[:1] == "e"))


def plateau(**more):
    return RaiseOnPlateau(**{"select_on": DEV.out(), "tried": (1.2, 1.5), "window": 1, "gain": 9.0, "limit": 5, **more})


def lines(store, stage):
    return [{k: v for k, v in m.items() if k not in ("time", "tokens_per_s")} for m in store.metrics(key(stage))]


def weights(store, stage):
    return load_file(store.path(key(stage), "policy") / "model.safetensors")


# --- temperature ---


def test_what_is_compared_follows_the_temperature_of_the_draw(tmp_path):
    """Sampler and trainer agree to rounding at every step's own temperature; at any other they could not."""
    store, stage = Store(tmp_path / "s"), rl(temperature=Decay(last=0.4), sampling=Sampling(temperature=1.6, max_new_tokens=3))
    make(stage, store)
    found = store.metrics(key(stage))
    assert [m["temperature"] for m in found] == pytest.approx([1.6, 1.2, 0.8, 0.4])
    assert max(m["sampler_gap_max"] for m in found) < 1e-4


def test_teachers_are_asked_at_the_temperature_of_the_draw(tmp_path):
    """A teacher that equals the student has no KL to it, at whatever temperature both are asked."""
    teacher = {"low": INIT.out()}
    same = {"teachers": teacher, "credit": (Teacher(want="hidden"),), "loss": FullReverseKL(), "optimizer": AdamW(lr=1e-12)}
    store, stage = Store(tmp_path / "s"), rl(**same, temperature=Decay(last=0.5, shape="cosine"), steps=3)
    make(stage, store)
    assert max(abs(m["kl"]) for m in store.metrics(key(stage))) < 1e-6


def test_a_schedule_begins_with_the_sampling_it_is_given(tmp_path):
    store = Store(tmp_path / "s")
    plain, paced = rl(steps=1), rl(steps=1, temperature=Decay(last=0.5))
    make(plain, store)
    make(paced, store)
    ours, theirs = weights(store, plain), weights(store, paced)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_trials_raise_the_temperature_and_are_on_no_budget(tmp_path):
    """With every step a plateau and every loss allowed, the first trial goes to the top; then nothing is left to try."""
    store, stage = Store(tmp_path / "s"), rl(temperature=plateau(loss=1.0), steps=4)
    ctx = make(stage, store)
    found = lines(store, stage)
    assert [m["temperature"] for m in found] == [1.0, 1.0, 1.5, 1.5]
    assert [sorted(k for k in m if k.startswith("dev/")) for m in found] == [[], ["dev/T=1", "dev/T=1.2", "dev/T=1.5"], [], []]
    tokens = ctx.facts["development_tokens"]
    assert 3 * 5 * (3 + 1) <= tokens <= 3 * 5 * (3 + 3)  # three temperatures, five tasks, prompts of 3 tokens
    assert ctx.cost.tokens["prefilled"] == 4 * 4 * 3 * 3


def test_no_trial_follows_the_last_step(tmp_path):
    store, stage = Store(tmp_path / "s"), rl(temperature=plateau(loss=1.0), steps=2)
    assert "development_tokens" not in make(stage, store).facts
    assert not [k for m in lines(store, stage) for k in m if k.startswith("dev/")]


# --- curriculum ---


def asked(monkeypatch, stage, store):
    """The ids that each call of the driver asked for."""
    seen, collect = [], Driver.collect

    def spy(self, tasks, replicas, seed):
        seen.append([t.id for t in tasks])
        return collect(self, tasks, replicas, seed)

    monkeypatch.setattr(Driver, "collect", spy)
    make(stage, store)
    return seen


def test_easy_to_hard_goes_through_each_domain_from_its_easiest_to_its_hardest(monkeypatch, tmp_path):
    stage = rl(tasks=RATED.out(), curriculum=EasyToHard(), domains=("low", "high"), steps=4, prompts=6)
    seen = asked(monkeypatch, stage, Store(tmp_path / "s"))
    assert [sorted(ids[:3]) for ids in seen] == [["a", "b", "c"], ["d", "e", "f"], ["h", "i", "j"], ["k", "l", "m"]]
    assert [sorted(ids[3:]) for ids in (seen[0], seen[-1])] == [["n", "o", "p"], ["w", "x", "y"]]


def test_a_draw_again_asks_other_tasks_of_like_difficulty(monkeypatch, tmp_path):
    """No reply earns anything, so no group is informative and all draws are used."""
    more = {"credit": (GroupRelative(),), "env": ENV, "sampling": Sampling(max_new_tokens=1), "resample": 2, "seed": 4}
    stage = rl(tasks=RATED.out(), curriculum=EasyToHard(), steps=1, prompts=3, optimizer=AdamW(lr=1e-9), **more)
    seen = asked(monkeypatch, stage, Store(tmp_path / "s"))
    assert len(seen) == 3
    assert sorted(i for ids in seen for i in ids) == list("abcdefghi")


def test_tasks_without_rates_are_refused():
    with pytest.raises(SpecError, match=r"letters\.rows holds no pass rates"):
        rl(curriculum=UniformDraw()).infer(Types())


def test_a_task_that_could_not_be_measured_is_named(tmp_path):
    class Holes(Rated):
        def run(self, ctx):
            super().run(ctx)
            rows = read_rows(ctx.work / "rows")
            rows[3]["meta"]["pass_rate"] = None
            write_tasks(ctx.work / "rows", rows)

    with pytest.raises(UserError, match="task 'd' has no pass rate"):
        make(rl(tasks=Holes(name="holes").out(), curriculum=MovingGaussian()), Store(tmp_path / "s"))


# --- health ---

COLLAPSE = {"steps": 60, "prompts": 4, "group": 8, "optimizer": AdamW(lr=0.05), "sampling": Sampling(max_new_tokens=12)}


def test_health_catches_a_run_that_is_paid_for_repetition(tmp_path):
    """The reward rises as the replies loop: first a warning, and the end once there is nothing more to gain."""
    store, said = Store(tmp_path / "s"), io.StringIO()
    stage = rl(**COLLAPSE, env=SingleTurn(verifier=Loop()), health=Health(window=3))
    with contextlib.redirect_stdout(said):
        ctx = make(stage, store)
    found, told = lines(store, stage), ctx.facts["health"]
    assert {t["level"] for t in told[:-1]} == {"warn"}
    assert (told[-1]["level"], told[-1]["sign"], told[-1]["step"]) == ("stop", "repeated", len(found))
    assert len(found) < 60
    assert found[-1]["repeated"] > 0.5 > found[0]["repeated"]
    assert [m["health"] for m in found][-2:] == [1, 2]
    assert said.getvalue().count("\n") == len(told)
    assert weights(store, stage)  # the policy stands as it is


def test_health_catches_a_learning_rate_that_breaks_the_policy(tmp_path):
    store = Store(tmp_path / "s")
    stage = rl(**{**COLLAPSE, "optimizer": AdamW(lr=1.0)}, env=SingleTurn(verifier=Letter()), health=Health(window=3))
    ctx = make(stage, store)
    assert ctx.facts["health"][-1]["level"] == "stop"
    assert len(lines(store, stage)) < 20


def test_health_lets_a_run_that_learns_go_on_until_it_has_learned(tmp_path):
    store = Store(tmp_path / "s")
    learner = {"optimizer": AdamW(lr=0.01), "sampling": Sampling(max_new_tokens=1), "group": 8, "steps": 60, "seed": 1}
    stage = rl(**learner, env=SingleTurn(verifier=Letter()), health=Health(window=3))
    ctx = make(stage, store)
    last = ctx.facts["health"][-1]
    assert (last["level"], last["sign"]) == ("stop", "solved")
    assert sum(m["reward"] for m in lines(store, stage)[-3:]) / 3 > 0.95


def test_health_may_fail_the_stage_or_only_warn(tmp_path):
    bad = {**COLLAPSE, "steps": 8, "env": SingleTurn(verifier=Letter()), "optimizer": AdamW(lr=1.0)}
    store = Store(tmp_path / "s")
    with pytest.raises(UserError, match=r"^health stopped rl after step \d: .*; ") as error:
        make(rl(**bad, health=Health(window=2, action="fail")), store)
    assert "\n" not in str(error.value)
    warned = rl(**bad, health=Health(window=2, action="warn"))
    ctx = make(warned, store)
    assert len(lines(store, warned)) == 8
    assert ctx.facts["health"][-1]["level"] == "stop"
    with pytest.raises(SpecError, match=r"health\.action"):
        rl(health=Health(), checkpoints=(2,)).infer(Types())


def test_watching_changes_nothing(tmp_path):
    store = Store(tmp_path / "s")
    plain, watched = rl(), rl(health=Health(action="warn"))
    make(plain, store)
    make(watched, store)
    ours, theirs = weights(store, plain), weights(store, watched)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- all three, stopped and resumed ---


@pytest.mark.parametrize("temperature", [plateau(loss=0.3, trials=2), Decay(last=0.5)], ids=repr)
def test_stopped_anywhere_everything_goes_on_where_it_was(temperature, tmp_path):
    stage = rl(
        tasks=RATED.out(),
        steps=9,
        curriculum=MovingGaussian(),
        temperature=temperature,
        health=Health(window=3, truncated=0.0),
        optimizer=AdamW(lr=0.02),
    )
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(stage, whole)
    for stop_after in (1, 2, 2):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(stage, cut)
    ours, theirs = weights(whole, stage), weights(cut, stage)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert lines(whole, stage) == lines(cut, stage)
    assert done.facts == resumed.facts
    assert done.cost == resumed.cost
    assert done.facts["health"]
    assert len({m["temperature"] for m in lines(whole, stage)}) > 1


# --- what is refused before anything runs ---


def test_schedules_that_do_not_fit_their_stage():
    for stage, word in (
        (rl(temperature=Decay(last=2.0)), "temperature.last"),
        (rl(temperature=plateau(select_on=DATA.out())), "development tasks"),
        (rl(temperature=plateau(select_on=INIT.out())), "no prompts"),
        (rl(temperature=Decay(last=0.5), sampling=Sampling(temperature=0.0)), "greedy"),
    ):
        with pytest.raises(SpecError, match=word) as error:
            stage.infer(Types())
        assert "\n" not in str(error.value)


def test_keys_see_all_three_and_only_where_they_are_given():
    plain = key(rl())
    assert plain == key(rl(temperature=None, curriculum=None, health=None))
    others = [rl(temperature=Decay(last=0.5)), rl(curriculum=UniformDraw()), rl(curriculum=EasyToHard()), rl(health=Health())]
    assert len({plain, *map(key, others)}) == 5
