"""What a comparison of consolidations is made of: budgets, balanced domains, traces, averages of weights, the best trial."""

import pytest
import torch

from tests.stages.test_loops import fit, mopd, refused, same, weights
from tests.stages.toy import DATA, ENV, INIT, SHORT, Types, make, rl
from tutelage.context import Stopped
from tutelage.envs.single import SingleTurn
from tutelage.graph import key
from tutelage.learn.optim import AdamW, Schedule
from tutelage.losses.distill import SampledReverseKL, TokenReverseKL
from tutelage.model.lora import LoRA
from tutelage.rollout.base import Sampling
from tutelage.spec import UserError
from tutelage.stages.average import Average, TaskArithmetic
from tutelage.stages.best import Best
from tutelage.stages.budget import Budget, foreseen
from tutelage.stages.merge import Merge
from tutelage.stages.model import NewModel
from tutelage.stages.ppo import PPO
from tutelage.stages.traces import Traces
from tutelage.store import Store
from tutelage.text.rows import read_rows
from tutelage.types import Score
from tutelage.verify.base import Verifier

OTHER = rl(name="other", optimizer=AdamW(lr=0.03), domains=("high",), seed=5)


# --- budgets ---


@pytest.mark.parametrize("build", [rl, fit])
def test_a_stage_ends_after_the_step_that_spends_its_budget(build, tmp_path):
    store = Store(tmp_path / "s")
    sampler, spender = rl(steps=1, name="sampler"), rl(steps=6, name="spender")
    for stage in (sampler, spender):
        make(stage, store)
    paid, spent = (store.meta(key(s))["cost"]["flops"] for s in (spender, sampler))
    ctx = make(build(steps=9999, budget=Budget(of=(spender.out(),), share=0.75, less=(sampler.out(),))), store)
    assert ctx.facts["budget"] == pytest.approx(0.75 * paid - spent)
    assert ctx.cost.flops >= ctx.facts["budget"] > ctx.cost.flops * (1 - 1.6 / ctx.facts["steps"])


def test_a_schedule_runs_over_the_steps_that_the_budget_pays_for(tmp_path, monkeypatch):
    from tutelage.learn.learner import Learner

    store, asked, step = Store(tmp_path / "s"), [], Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, factor=1.0: asked.append(factor) or step(self, factor))
    spender = fit(steps=20, name="spender")
    make(spender, store)
    asked.clear()
    make(fit(steps=9999, seed=3, schedule=Schedule(shape="linear"), budget=Budget(of=(spender.out(),))), store)
    assert asked[0] == 1
    assert asked[1:] == sorted(asked[1:], reverse=True)
    assert asked[len(asked) // 2] == pytest.approx(0.5, abs=0.12)
    assert asked[-1] < 0.12


def test_what_is_foreseen():
    assert foreseen(0, 50, 0.0, 10.0) == 50
    assert foreseen(3, 50, 6.0, 20.0) == 10
    assert foreseen(3, 50, 6.0, float("inf")) == foreseen(3, 50, 1.0, 1e30) == 50
    assert foreseen(1, 50, 30.0, 10.0) == 1


def test_a_budget_that_is_used_up(tmp_path):
    store, small, big = Store(tmp_path / "s"), rl(steps=1, name="small"), rl(steps=3, name="big")
    for stage in (small, big):
        make(stage, store)
    with pytest.raises(UserError, match=r"used up.*budget\.of"):
        make(fit(budget=Budget(of=(small.out(),), less=(big.out(),))), store)


def test_a_budget_leaves_other_keys_alone_and_is_the_estimate():
    assert key(rl(budget=None)) == key(rl())
    assert key(rl(budget=Budget(of=(OTHER.out(),)))) != key(rl())
    half = Budget(of=(OTHER.out(),), share=0.5)
    for stage in (rl(budget=half), fit(budget=half), PPO(**dict(rl(budget=half, steps=9999)), value=INIT.out())):
        assert stage.estimate(Types()) == pytest.approx(0.5 * OTHER.estimate(Types()))


# --- balanced domains ---


def test_balancing_weighs_every_domain_the_same_however_long_its_replies(tmp_path, monkeypatch):
    """The gradient is the mean of the domains' own gradients; without balancing it is another."""
    from tutelage.learn.learner import Learner
    from tutelage.stages.online import Loop

    found, step = {}, Learner.step

    def watch(self, factor=1.0):
        found.setdefault("grads", {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        return step(self, factor)

    def alone(self, part):
        found["parts"] = [[s for s in part if s.domain == d] for d in ("low", "high")]
        if "apart" not in found:
            found["apart"] = []
            for mine in found["parts"]:
                self.learner.forward_backward(mine, self.stage.loss, 1.0, self._extras())
                found["apart"].append({n: p.grad.clone() for n, p in self.learner.model.named_parameters()})
                self.learner.model.zero_grad(set_to_none=True)
        return backward(self, part)

    backward = Loop._backward
    monkeypatch.setattr(Learner, "step", watch)
    stage = mopd(TokenReverseKL(), "logp", balance=True, steps=1, prompts=16, sampling=Sampling(max_new_tokens=12))
    store = Store(tmp_path / "s")
    for at in stage.teachers.values():
        make(at.of, store)
    found.clear()
    monkeypatch.setattr(Loop, "_backward", alone)
    make(stage, store)
    lengths = [sum(int(s.mask.sum()) for s in mine) for mine in found["parts"]]
    assert lengths[0] != lengths[1]
    for name, grad in found["grads"].items():
        mean = (found["apart"][0][name] + found["apart"][1][name]) / 2
        assert torch.allclose(grad, mean, atol=1e-7), name
    shares = [n / sum(lengths) for n in lengths]
    name = "model.layers.0.mlp.up_proj.weight"
    naive = sum(f * a[name] for f, a in zip(shares, found["apart"], strict=True))
    assert not torch.allclose(found["grads"][name], naive, atol=1e-7)


def test_one_domain_has_nothing_to_balance(tmp_path):
    store = Store(tmp_path / "s")
    for balance in (False, True):
        make(rl(balance=balance, steps=2), store)
    assert same(weights(store, rl(steps=2)), weights(store, rl(balance=True, steps=2)))


def test_rows_count_alike_in_one_form_and_tokens_in_the_other():
    assert (SampledReverseKL().per, TokenReverseKL().per) == ("rows", "tokens")
    assert TokenReverseKL().needs() == SampledReverseKL().needs()


# --- traces ---


class Vowels(Verifier):
    """Accepts replies with a vowel; fails on those that begin with z."""

    async def __call__(self, task, reply, ctx=None):
        if reply.startswith("z"):
            raise RuntimeError("no z")
        return Score(float(any(c in "aeiou" for c in reply)))


def traces(**more):
    fields = {"name": "traces", "policies": {"low": INIT.out(), "high": OTHER.out()}, "tasks": DATA.out(), "samples": 40}
    return Traces(**{**fields, "env": SingleTurn(verifier=Vowels()), "sampling": Sampling(max_new_tokens=6), **more})


def test_traces_are_the_verified_replies_of_each_domains_own_policy(tmp_path):
    store, stage = Store(tmp_path / "s"), traces()
    ctx = make(stage, store)
    rows = read_rows(store.path(key(stage), "traces"))
    replies = [(r["domain"], r["prompt"][0]["content"], r["completion"][0]["content"]) for r in rows]
    assert all(set(reply) & set("aeiou") and not reply.startswith("z") for _, _, reply in replies)
    assert len(set(replies)) == len(replies)
    assert len({r["id"] for r in rows}) == len(rows)
    assert all((domain == "low") == (prompt < "n") for domain, prompt, _ in replies)
    told = ctx.facts["fates"]
    assert sum(told["low"].values()) == 13 * 40
    assert sum(told["high"].values()) == 12 * 40
    assert told["low"]["kept"] + told["high"]["kept"] == len(rows)
    assert all(told["low"][fate] for fate in ("wrong", "cut off", "verifier failed"))
    order = [d for d, _, _ in replies]
    assert order != sorted(order) != order[::-1]
    assert ctx.cost.tokens["sampled"] > len(rows)
    make(fit(data=stage.out(), steps=1), store)


def test_unverified_replies_are_kept_too_where_that_is_asked(tmp_path):
    store = Store(tmp_path / "s")
    kept = [make(traces(at_least=limit), store).facts["fates"]["low"] for limit in (1.0, None)]
    assert kept[1]["kept"] > kept[0]["kept"]
    assert kept[1]["wrong"] == 0
    assert kept[1]["cut off"] == kept[0]["cut off"]


def test_traces_stopped_anywhere_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.stages.traces.PART", 5)
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(traces(), whole)
    for stop_after in (2, 2):
        calls = []
        with pytest.raises(Stopped):
            make(traces(), cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(traces(), cut)
    rows = [read_rows(s.path(key(traces()), "traces")) for s in (whole, cut)]
    assert rows[0] == rows[1]
    assert (done.cost, done.facts) == (resumed.cost, resumed.facts)


def test_fewer_prompts_are_drawn_without_replacement(tmp_path):
    store, stage = Store(tmp_path / "s"), traces(prompts=4, samples=60, at_least=None, sampling=Sampling(max_new_tokens=30))
    make(stage, store)
    rows = read_rows(store.path(key(stage), "traces"))
    asked = {d: len({r["id"].partition("#")[0] for r in rows if r["domain"] == d}) for d in ("low", "high")}
    assert asked == {"low": 4, "high": 4}


def test_a_domain_without_a_verified_reply(tmp_path):
    with pytest.raises(UserError, match=r"domain 'low'.*wrong.*at_least"):
        make(traces(at_least=2.0), Store(tmp_path / "s"))
    refused(traces(policies={"middle": INIT.out()}), "'middle'", "low")


# --- averages ---


def test_an_average_and_task_arithmetic_by_hand(tmp_path):
    store, one, two = Store(tmp_path / "s"), rl(name="one", optimizer=AdamW(lr=0.03)), OTHER
    made = {
        "mean": Average(name="mean", models=(one.out(), two.out())),
        "tilted": Average(name="tilted", models=(one.out(), two.out()), weights=(1.0, 3.0)),
        "sum": TaskArithmetic(name="sum", base=INIT.out(), models=(one.out(), two.out()), scale=0.7),
        "half": TaskArithmetic(name="half", base=INIT.out(), models=(one.out(), two.out()), scale=0.5),
    }
    for stage in made.values():
        assert make(stage, store).cost.flops == 0
    a, b, base = (weights(store, s) for s in (one, two, INIT))
    got = {name: weights(store, stage) for name, stage in made.items()}
    for name in a:
        assert torch.allclose(got["mean"][name], (a[name] + b[name]) / 2, atol=1e-7)
        assert torch.allclose(got["tilted"][name], 0.25 * a[name] + 0.75 * b[name], atol=1e-7)
        expected = base[name] + 0.7 * (a[name] - base[name]) + 0.7 * (b[name] - base[name])
        assert torch.allclose(got["sum"][name], expected, atol=1e-6)
        assert torch.allclose(got["half"][name], got["mean"][name], atol=1e-7)
    assert not same(got["mean"], a)
    make(fit(model=made["sum"].out(), steps=1), store)


def test_a_model_averaged_with_itself_is_itself(tmp_path):
    store, stage = Store(tmp_path / "s"), Average(name="mean", models=(OTHER.out(), OTHER.out(), OTHER.out()))
    make(stage, store)
    assert same(weights(store, stage), weights(store, OTHER))


def test_what_cannot_be_averaged():
    wide = NewModel(name="wide", alphabet=INIT.alphabet, width=64, layers=1, mlp=48)
    refused(Average(name="m", models=(INIT.out(), wide.out())), "wide.policy", "init.policy", "architecture")
    refused(Average(name="m", models=(INIT.out(),), weights=(1.0, 2.0)), "2 numbers for 1 models")
    refused(Average(name="m", models=(INIT.out(), OTHER.out()), weights=(1.0, -1.0)), "positive")
    refused(Average(name="m", models=(rl(adapter=LoRA()).out(),)), "adapter", "Merge")


# --- the best trial ---


def best(**more):
    learnt = fit(name="learnt", steps=150, rows=25, optimizer=AdamW(lr=0.02), checkpoints=(2,))
    trials = {"untrained": INIT.out(), "on its way": learnt.out(step=2), "learnt": learnt.out(), "again": learnt.out()}
    fields = {"name": "best", "candidates": trials, "select_on": DATA.out(), "env": ENV}
    return Best(**{**fields, "sampling": SHORT.model_copy(update={"temperature": 0.0}), **more})


def test_the_best_trial_is_published_and_all_are_told(tmp_path):
    store, stage = Store(tmp_path / "s"), best()
    ctx = make(stage, store)
    trials, chosen = ctx.facts["trials"], ctx.facts["selected"]
    assert chosen == {"candidate": "learnt", "dev": trials["learnt"]["dev"]}
    assert trials["learnt"]["dev"] > 0.9 > 0.2 > trials["untrained"]["dev"]
    assert trials["on its way"]["dev"] < trials["learnt"]["dev"]
    assert trials["again"] == trials["learnt"]  # and the first of equals was taken
    for trial in trials.values():
        assert trial["dev"] == pytest.approx(sum(trial["domains"].values()) / 2)
    assert same(weights(store, stage), weights(store, stage.candidates["learnt"].of))
    assert ctx.cost.flops == 0 < ctx.facts["development_flops"]
    make(fit(model=stage.out(), steps=1), store)


def test_trials_are_measured_in_the_domains_that_count(tmp_path):
    store = Store(tmp_path / "s")
    whole, one = make(best(), store).facts["trials"], make(best(domains=("low",)), store).facts["trials"]
    assert {label: trial["domains"] for label, trial in one.items()} == {
        n: {"low": t["domains"]["low"]} for n, t in whole.items()
    }
    assert all(trial["dev"] == trial["domains"]["low"] for trial in one.values())
    refused(best(domains=("lwo",)), "no domain 'lwo'", "did you mean 'low'")


def test_trials_stopped_anywhere_are_the_same(tmp_path):
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(best(), whole)
    calls = []
    with pytest.raises(Stopped):
        make(best(), cut, stopping=lambda: calls.append(1) or len(calls) >= 2)
    assert make(best(), cut).facts == done.facts


def test_trials_of_adapters_open_on_their_base(tmp_path):
    store = Store(tmp_path / "s")
    trials = {f"{lr:g}": fit(name=f"lr {lr}", adapter=LoRA(), optimizer=AdamW(lr=lr), steps=2).out() for lr in (0.01, 0.1)}
    stage = best(candidates=trials)
    make(stage, store)
    assert stage.infer(Types())["policy"].adapter
    make(Merge(name="merged", model=stage.out()), store)


def test_a_development_split_without_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.text.rows.read_tasks", lambda folder: [])
    with pytest.raises(UserError, match=r"letters\.rows holds no task"):
        make(best(candidates={"untrained": INIT.out()}), Store(tmp_path / "s"))


def test_candidates_of_different_kinds():
    wide = NewModel(name="wide", alphabet=INIT.alphabet, width=64, layers=1, mlp=48)
    refused(best(candidates={"a": INIT.out(), "b": wide.out()}), "'a'", "'b'", "one model")
    refused(best(select_on=INIT.out()), "init.policy", "development")
