"""Codistillation: held to separate stages bit for bit, resumed anywhere, its costs by learner, and what is refused."""

import json

import pytest

from tests.stages.test_loops import mopd, refused, same, weights
from tests.stages.toy import DATA, INIT, Types, make, rl
from tutelage.context import Stopped
from tutelage.credit.group import GroupRelative
from tutelage.credit.teacher import Teacher
from tutelage.graph import Goals, from_record, key, plan, record
from tutelage.learn.optim import AdamW, Schedule
from tutelage.losses.distill import FullReverseKL, SampledReverseKL
from tutelage.losses.policy import DAPO
from tutelage.losses.top_k import TailReverseKL
from tutelage.model.lora import LoRA
from tutelage.spec import SpecError
from tutelage.stages.budget import Budget
from tutelage.stages.codistill import Codistill
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.health import Health
from tutelage.stages.model import NewModel
from tutelage.stages.ppo import PPO
from tutelage.stages.staged import AtSteps, Staged
from tutelage.store import Store

FAST = AdamW(lr=0.03)
STILL = AdamW(lr=1e-30)
"""Moves no weight: fp32 rounds every step of it away."""


def branch(domain, **more):
    return rl(**{"name": f"rl-{domain}", "domains": (domain,), "optimizer": FAST, "seed": 3, **more})


def student(**more):
    fields = {"name": "student", "domains": ("low", "high"), "credit": (Teacher(want="hidden"),), "loss": FullReverseKL()}
    return rl(**{**fields, "optimizer": AdamW(lr=0.01), "seed": 5, **more})


def both(low=None, high=None, **more):
    branches = {"low": branch("low", **(low or {})), "high": branch("high", **(high or {}))}
    return Codistill(name="both", student=student(**more), branches=branches)


def stripped(store, stage, learner=""):
    """Its metrics by step, a learner's under their own names; times left out."""
    found = []
    for line in store.metrics(key(stage)):
        mine = {k.removeprefix(f"{learner}/"): v for k, v in line.items() if k.startswith(f"{learner}/")} if learner else line
        found += [{k: v for k, v in mine.items() if k != "time" and "tokens_per_s" not in k}] if mine else []
    return found


# --- equal to stages of their own ---


@pytest.mark.parametrize("more", [{}, {"steps": 2}, {"optimizer": STILL}], ids=["in step", "half as many", "still"])
def test_whatever_the_student_does_its_branches_are_stages_of_their_own(more, tmp_path):
    store, stage = Store(tmp_path / "s"), both(low={"schedule": Schedule(shape="linear", warmup=2)}, **more)
    ctx = make(stage, store)
    for name, alone in stage.branches.items():
        cost = make(alone, store).cost
        assert same(weights(store, stage, name), weights(store, alone))
        assert not same(weights(store, stage, name), weights(store, INIT))
        assert stripped(store, stage, name) == stripped(store, alone)
        told = ctx.facts["learners"][name]
        assert (told["flops"], told["tokens"], told["steps"]) == (cost.flops, cost.tokens, 4)
    assert ctx.facts["learners"]["student"]["steps"] == stage.student.steps


FORMS = [(FullReverseKL(), "hidden"), (SampledReverseKL(), "logp"), (TailReverseKL(), "topk")]


@pytest.mark.parametrize(("loss", "want"), FORMS, ids=["full", "sampled", "top-k"])
def test_a_student_of_branches_that_stand_still_is_taught_by_where_they_begin(loss, want, tmp_path):
    far = rl(name="far", optimizer=AdamW(lr=0.05)).out()
    rule = {"loss": loss, "credit": (Teacher(want=want, k=8),)}
    store, stage = Store(tmp_path / "s"), both(low={"optimizer": STILL, "model": far}, high={"optimizer": STILL}, **rule)
    alone = student(teachers={"low": far, "high": INIT.out()}, **rule)
    make(stage, store)
    make(alone, store)
    assert same(weights(store, stage, "student"), weights(store, alone))
    assert not same(weights(store, stage, "student"), weights(store, INIT))
    assert stripped(store, stage, "student") == stripped(store, alone)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, alpha=4)], ids=["whole", "adapters"])
def test_a_student_is_taught_as_by_every_checkpoint_of_its_branches_in_turn(adapter, tmp_path):
    """The branches' present weights, after their own step of the round, and no others."""
    store, more = Store(tmp_path / "s"), {"adapter": adapter, "checkpoints": (1, 2, 3)}
    stage = both(low=more, high=more)
    series = {d: tuple(each.out(step=s) for s in (1, 2, 3)) for d, each in stage.branches.items()}
    last = {d: each.out() for d, each in stage.branches.items()}
    alone = student(teachers=last, staged=Staged(teachers=series, switch=AtSteps(steps=(1, 2, 3))))
    frozen = student(teachers=last, name="frozen")
    for each in (stage, alone, frozen):
        make(each, store)
    assert same(weights(store, stage, "student"), weights(store, alone))
    assert not same(weights(store, stage, "student"), weights(store, frozen))
    spent = store.meta(key(alone))["cost"]
    assert store.meta(key(stage))["facts"]["learners"]["student"]["flops"] == spent["flops"]


def test_learners_of_several_lengths_end_together(tmp_path):
    store, stage = Store(tmp_path / "s"), both(low={"steps": 6}, high={"steps": 2}, steps=3)
    make(stage, store)
    took = {name: [m["step"] for m in store.metrics(key(stage)) if f"{name}/reward" in m] for name in stage.outputs}
    assert took == {"low": [1, 2, 3, 4, 5, 6], "high": [3, 6], "student": [2, 4, 6]}


# --- stopped, ended, paid ---


def test_stopped_anywhere_it_resumes_to_the_same_bits(tmp_path):
    stage = both(low={"steps": 5, "checkpoints": (2,)}, high={"adapter": LoRA(rank=2, alpha=4)}, checkpoints=(1, 3))
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(stage, whole)
    for stop_after in (1, 2, 1):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(stage, cut)
    for port, step in [("student", None), ("student", 1), ("student", 3), ("low", None), ("low", 2)]:
        assert same(weights(whole, stage, port, step), weights(cut, stage, port, step))
    files = [(s.path(key(stage), "high") / "adapter_model.safetensors").read_bytes() for s in (whole, cut)]
    assert files[0] == files[1]
    assert stripped(whole, stage) == stripped(cut, stage)
    assert (done.cost, done.facts) == (resumed.cost, resumed.facts)


def test_the_stage_costs_what_its_learners_do(tmp_path):
    store, stage = Store(tmp_path / "s"), both(steps=2)
    ctx = make(stage, store)
    learners, n = ctx.facts["learners"], INIT.infer(Types())["policy"].params
    assert ctx.cost.flops == sum(each["flops"] for each in learners.values())
    per = {"sampled": 2, "prefilled": 2, "scored": 2, "trained": 6}
    assert ctx.cost.flops == sum(per[k] * n * v for k, v in ctx.cost.tokens.items())
    assert learners["student"]["tokens"]["scored"] == learners["student"]["tokens"]["trained"]
    assert "scored" not in learners["low"]["tokens"]


def test_a_branch_that_health_ends_goes_on_teaching_as_it_is(tmp_path):
    """Also after a resume."""
    ends = Health(action="end", window=1, truncated=0.01)
    store, cut, stage = Store(tmp_path / "s"), Store(tmp_path / "cut"), both(low={"health": ends, "steps": 8}, steps=8)
    ctx = make(stage, store)
    told = ctx.facts["learners"]
    alone = make(stage.branches["low"], store)
    assert told["low"]["steps"] == len(store.metrics(key(stage.branches["low"]))) < 8 == told["student"]["steps"]
    assert told["low"]["health"] == alone.facts["health"]
    assert same(weights(store, stage, "low"), weights(store, stage.branches["low"]))
    calls = []
    with pytest.raises(Stopped):
        make(stage, cut, stopping=lambda: calls.append(1) or len(calls) == 6)
    assert make(stage, cut).facts == ctx.facts
    assert same(weights(store, stage, "student"), weights(cut, stage, "student"))


def test_a_domain_without_a_branch_may_have_a_teacher_that_stays(tmp_path):
    store = Store(tmp_path / "s")
    kept = mopd().teachers["high"]
    stage = Codistill(name="one", student=student(teachers={"high": kept}), branches={"low": branch("low", optimizer=STILL)})
    alone = student(teachers={"low": INIT.out(), "high": kept})
    make(stage, store)
    make(alone, store)
    assert same(weights(store, stage, "student"), weights(store, alone))


# --- in the graph ---


def test_ports_are_the_learners_and_edges_may_name_their_checkpoints():
    stage = both(low={"checkpoints": (2,)})
    assert dict(stage.outputs) == {"student": "model", "low": "model", "high": "model"}
    ends = [stage.out("student"), stage.out("low", step=2)]
    scores = [
        Evaluate(name=f"e{i}", model=at, tasks=DATA.out(), domain="low", env=stage.student.env) for i, at in enumerate(ends)
    ]
    goals = Goals(recipe="r", stages=tuple(s.out() for s in scores))
    again = from_record(json.loads(json.dumps(record(goals))))
    assert plan([again], lambda key: False).nodes.keys() == plan([goals], lambda key: False).nodes.keys()
    with pytest.raises(SpecError, match="name one"):
        stage.out()
    with pytest.raises(SpecError, match=r"no port 'policy'.*student"):
        plan([Goals(recipe="r", stages=(stage.out("policy"),))], lambda key: False)


def test_its_key_follows_every_learner_and_no_name():
    assert key(both()) == key(both(name="other", low={"name": "x", "slots": 3}))
    assert len({key(s) for s in (both(), both(seed=1), both(low={"seed": 1}), both(high={"steps": 9}))}) == 4


def test_what_is_refused_before_anything_runs():
    def of(**branches):
        return Codistill(name="both", student=student(), branches=branches)

    low, high = branch("low"), branch("high")
    refused(of(low=low), "student", "'high'", "no teacher")
    refused(of(low=low, twin=branch("low"), high=high), "2 branches", "'low'")
    refused(of(low=low, student=high), "'student'", "another name")
    refused(of(low=low, **{"a/b": high}), "'a/b'", "letters")
    refused(of(low=low, **{"high@2": high}), "'high@2'")
    refused(of(low=low, **{"checkpoint-2": high}), "'checkpoint-2'")
    refused(both(low={"budget": Budget(of=(INIT.out(),))}), "branch 'low'", "budget", "set steps")
    refused(both(budget=Budget(of=(INIT.out(),))), "the student", "budget")
    refused(both(low={"checkpoints": (9,)}), "branch 'low'", "step 9")
    refused(both(low={"credit": (GroupRelative(), Teacher())}), "branch 'low'", "none are given")
    refused(both(credit=(GroupRelative(),), loss=DAPO()), "the student", "no credit rule asks")
    refused(both(teachers={"low": INIT.out()}), "student.teachers", "'low'", "a branch teaches")
    refused(both(staged=Staged(teachers={"low": (INIT.out(),)}, switch=AtSteps(steps=(1,)))), "student.staged")
    other = NewModel(name="other", alphabet="abc", width=32, layers=1, mlp=48)
    refused(both(low={"model": other.out()}), "the student", "tokenizer", "'other'")
    ppo = PPO(
        **{f: getattr(low, f) for f in ("name", "model", "tasks", "domains", "env")}, value=INIT.out(), reference=INIT.out()
    )
    refused(of(low=ppo, high=high), "branch 'low' is a PPO", "Online")
    lone = Codistill(name="both", student=student(domains=("low",)), branches={"low": low, "high": high})
    refused(lone, "branch 'high'", "no domain of the student")
    with pytest.raises(ValueError, match="at least 1"):
        of()
