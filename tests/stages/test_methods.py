"""Published methods on a bandit: they plan, learn and resume; what the stage gives them; what it refuses."""

import inspect
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.stages.test_loops import refused, same, weights
from tests.stages.toy import INIT, Types, make, rl
from tutelage.context import Stopped
from tutelage.credit.group import GroupBaseline, GroupRelative
from tutelage.credit.kl import Reference, ReplyKL
from tutelage.credit.overlong import OverlongFilter, SoftOverlong
from tutelage.envs.single import SingleTurn
from tutelage.graph import Goals, from_record, key, record
from tutelage.learn.optim import AdamW
from tutelage.losses.correction import IcePop, SequenceMask, TruncatedIS
from tutelage.losses.kl import K3
from tutelage.losses.policy import DAPO
from tutelage.rollout.base import Sampling
from tutelage.spec import Spec
from tutelage.stages import methods
from tutelage.stages.model import NewModel
from tutelage.stages.online import _by_chance, _minibatches
from tutelage.store import Store
from tutelage.types import Score
from tutelage.verify.base import Verifier

METHODS = {
    "REINFORCE": methods.reinforce(),
    "REINFORCE++": methods.reinforce_pp(),
    "REINFORCE++ w/ baseline": methods.reinforce_pp_baseline(),
    "RLOO": methods.rloo(),
    "GRPO": methods.grpo(),
    "Dr. GRPO": methods.dr_grpo(length=2),
    "DAPO": methods.dapo(length=4, cache=2, resample=1),
    "GSPO": methods.gspo(),
    "GSPO-token": methods.gspo_token(),
    "CISPO": methods.cispo(),
    "MaxRL": methods.maxrl(),
    "Kimi K2.5": methods.kimi_k25(),
    "DeepSeek-V3.2": methods.deepseek_v32(),
    "OLMo 3": methods.olmo3(resample=1),
    "GLM-5": methods.glm5(),
}
QUICK = ("RLOO", "GRPO", "DAPO", "GSPO", "CISPO", "MaxRL", "Kimi K2.5", "OLMo 3")


class Vowel(Verifier):
    """Right where the reply begins with a vowel: five of the alphabet's signs, about one draw in eight untrained."""

    async def __call__(self, task, reply, ctx=None):
        return Score(float(reply[:1] in tuple("aeiou")))


class Picky(Vowel):
    """`Vowel` for tasks a to f; never right for the others, whose groups are uniform."""

    async def __call__(self, task, reply, ctx=None):
        return await super().__call__(task, reply) if task.id <= "f" else Score(0.0)


SEEN: list[str] = []


class Even(Verifier):
    """The same for every reply: nothing to learn from. Notes whom it judged."""

    async def __call__(self, task, reply, ctx=None):
        SEEN.append(task.id)
        return Score(0.5)


def bandit(fields, verifier=Vowel, **more):
    asks = any(isinstance(rule, Reference) for rule in fields["credit"])
    small = {"steps": 14, "group": 8, "minibatches": 2, "optimizer": AdamW(lr=0.01), "sampling": Sampling(max_new_tokens=2)}
    return rl(env=SingleTurn(verifier=verifier()), reference=INIT.out() if asks else None, **{**fields, **small, **more})


def lines(store, stage):
    return [{k: v for k, v in m.items() if k not in ("time", "tokens_per_s")} for m in store.metrics(key(stage))]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in METHODS])
def test_a_method_learns(name, tmp_path):
    store, stage = Store(tmp_path / "s"), bandit(METHODS[name])
    make(stage, store)
    reward = [m["reward"] for m in lines(store, stage)]
    assert np.mean(reward[:2]) < 0.3
    assert np.mean(reward[-3:]) > 0.55


@pytest.mark.parametrize("name", METHODS)
def test_a_method_plans_and_its_record_says_everything(name):
    stage = bandit(METHODS[name])
    stage.infer(Types())
    again = from_record(json.loads(json.dumps(record(Goals(recipe="r", stages=(stage.out(),))))))
    assert [key(at.of) for at in again.stages] == [key(stage)]


def test_the_settings_that_papers_give():
    loss = methods.olmo3()["loss"]
    assert (loss.per, loss.clip_low, loss.clip_high, loss.kl) == ("tokens", 0.2, 0.272, None)
    assert (type(loss.correction), loss.correction.low, loss.correction.high) == (TruncatedIS, 0.0, 2.0)
    assert methods.olmo3()["credit"][0].scale == "none"
    loss = methods.glm5()["loss"]
    assert (loss.per, loss.clip_low, loss.clip_high, loss.kl) == ("rows", 0.2, 0.28, None)
    assert (type(loss.correction), loss.correction.low, loss.correction.high) == (IcePop, 0.5, 2.0)
    loss = methods.dapo(length=8, cache=2)["loss"]
    assert (loss.per, loss.clip_low, loss.clip_high, loss.kl, loss.correction) == ("tokens", 0.2, 0.28, None, None)
    loss = methods.grpo()["loss"]
    assert (loss.clip_low, loss.clip_high, type(loss.kl), loss.kl.beta) == (0.2, 0.2, K3, 0.04)


def test_groups_are_dropped_only_where_the_paper_drops_them():
    rules = {name: [r for r in fields["credit"] if isinstance(r, GroupBaseline)] for name, fields in METHODS.items()}
    assert {name for name, found in rules.items() if any(r.drop_uniform for r in found)} == {"DAPO", "OLMo 3"}


# --- what the stage gives ---


@pytest.mark.parametrize("which", ["resample and start", "reference and kept sets"])
def test_methods_stopped_anywhere_resume_to_the_same_bits(which, tmp_path):
    if which == "resample and start":
        stage = bandit(methods.olmo3(resample=2), Picky, steps=4)
    else:
        top_p = Sampling(max_new_tokens=3, top_p=0.8)
        stage = bandit(methods.deepseek_v32(kept_mask=True), steps=4, sampling=top_p)
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(stage, whole)
    for stop_after in (1, 3):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(stage, cut)
    assert same(weights(whole, stage), weights(cut, stage))
    assert lines(whole, stage) == lines(cut, stage)
    assert done.cost == resumed.cost


def test_resampling_fills_the_batch_within_its_bound_and_pays_for_every_token(tmp_path):
    store, one = Store(tmp_path / "s"), Sampling(max_new_tokens=1)
    stage = bandit({"credit": (GroupRelative(),), "loss": DAPO(), "resample": 3}, Picky, steps=5, sampling=one, group=16)
    ctx = make(stage, store)
    found = lines(store, stage)
    assert {m["draws"] for m in found} & {2.0, 3.0}
    assert max(m["draws"] for m in found) <= 4
    drawn = sum(m["draws"] for m in found) * stage.prompts * stage.group
    assert ctx.cost.tokens["sampled"] == drawn  # one token a reply
    chosen = sum((1 - m["drawn_in_vain"]) * m["draws"] * stage.prompts * stage.group for m in found)
    assert ctx.cost.tokens["trained"] == pytest.approx(chosen * 4)  # three tokens of prompt and template, one of reply
    full = [m for m in found if m["draws"] < 4]
    assert full
    for m in full:  # exactly the batch asked for, whatever was over
        assert (1 - m["drawn_in_vain"]) * m["draws"] == pytest.approx(1)
    assert all(0 < m["informative_groups"] < 1 for m in found)


def test_the_control_of_resampling_draws_the_same_and_keeps_as_many(tmp_path):
    """One step: the same samples are drawn, as many are trained on, and some of those come from groups of equal rewards."""
    store, one = Store(tmp_path / "s"), Sampling(max_new_tokens=1)
    fields = {"credit": (GroupRelative(drop_uniform=False),), "loss": DAPO(), "resample": 3}
    more = {"steps": 1, "sampling": one, "group": 16, "minibatches": 1}
    mine, control = (bandit({**fields, "keep": keep}, Picky, **more) for keep in ("informative", "random"))
    costs = [make(stage, store).cost.tokens for stage in (mine, control)]
    assert costs[0] == costs[1]
    a, b = (lines(store, stage)[0] for stage in (mine, control))
    same_draws = ("draws", "drawn_in_vain", "informative_groups", "reward", "length")
    assert [a[k] for k in same_draws] == [b[k] for k in same_draws]
    assert a["draws"] > 1
    assert not same(weights(store, mine), weights(store, control))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("counts", [{"low": 12}, {"low": 8, "high": 4}, {"low": 1, "high": 1}, {"low": 3, "high": 7}])
def test_minibatches_are_whole_groups_and_mix_the_domains(counts, parts):
    """Each holds its share of every domain, to within a group: else a later one, off policy, would be one domain's alone."""
    drawn = [SimpleNamespace(group=f"{d}{i}", domain=d) for d, n in counts.items() for i in range(n) for _ in "ab"]
    dealt = _minibatches(drawn, parts)
    assert len(dealt) == min(parts, sum(counts.values()))
    assert sorted(map(id, drawn)) == sorted(id(s) for part in dealt for s in part)
    names = [[s.group for s in part] for part in dealt]
    assert all(Counter(part)[name] == 2 for part in names for name in part)
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 2
    for domain, n in counts.items():
        have = [sum(s.domain == domain for s in part) / 2 for part in dealt]
        share = n / sum(counts.values())
        assert all(abs(x - share * size / 2) <= 1 for x, size in zip(have, sizes, strict=True))
    if len(counts) == 1 or parts == 1:
        assert [s for part in dealt for s in part] == drawn


def test_the_controls_choice_is_blind_and_even_within_each_domain():
    drawn = [SimpleNamespace(group=f"{d}{i}", domain=d) for d, n in (("low", 6), ("high", 3)) for i in range(n) for _ in "ab"]
    seen: Counter[str] = Counter()
    for seed in range(600):
        chosen = _by_chance(drawn, {"low": 2, "high": 0}, seed)
        names = [group[0].group for group in chosen["low"]]
        assert (names, chosen["high"]) == (sorted(set(names)), [])
        assert [len(group) for group in chosen["low"]] == [2, 2]
        seen.update(names)
    assert all(abs(n - 200) < 4 * 11.6 for n in seen.values())  # √(600 · 1/3 · 2/3) = 11.5
    assert len(seen) == 6


def test_the_logged_reward_is_of_everything_drawn_whatever_credit_leaves_out(tmp_path):
    store = Store(tmp_path / "s")
    plain, left_out = (rl(credit=(*more, GroupRelative(drop_uniform=False)), steps=1) for more in ((), (OverlongFilter(),)))
    make(plain, store)
    make(left_out, store)
    assert lines(store, left_out)[0]["overlong"] > 0
    assert lines(store, left_out)[0]["reward"] == lines(store, plain)[0]["reward"]


def test_a_step_in_vain_stops_at_the_bound_and_still_says_what_was_drawn(tmp_path):
    store = Store(tmp_path / "s")
    SEEN.clear()
    fields = {"credit": (GroupRelative(),), "loss": DAPO(), "resample": 3}
    stage = bandit(fields, Even, steps=2, group=2)
    make(stage, store)
    for m in lines(store, stage):
        assert (m["draws"], m["drawn_in_vain"], m["informative_groups"], m["reward"]) == (4, 1, 0, 0.5)
    assert same(weights(store, stage), weights(store, INIT))
    again = SEEN[4 * 2 : 16 * 2]  # the further draws of the first step: all twelve tasks of the domain, none twice
    assert len(set(again)) == 12


def test_resampling_changes_nothing_where_the_first_draw_is_full(tmp_path):
    store = Store(tmp_path / "s")
    once, more = rl(steps=3), rl(steps=3, resample=2)
    make(once, store)
    make(more, store)
    assert {m["draws"] for m in lines(store, more)} == {1.0}
    assert same(weights(store, once), weights(store, more))


def test_each_domain_is_refilled_by_itself(tmp_path):
    store = Store(tmp_path / "s")
    fields = {"credit": (GroupRelative(),), "loss": DAPO(), "resample": 1}
    stage = bandit(fields, Picky, domains=("low", "high"), steps=1, sampling=Sampling(max_new_tokens=1), group=16)
    ctx = make(stage, store)
    assert lines(store, stage)[0]["draws"] == 2
    low, high = 2 * 16, 4 * 16  # domain "high" is never right and draws its share of two prompts again
    assert ctx.cost.tokens["sampled"] in (low + high, 2 * low + high)


def test_the_reference_is_scored_and_paid_for(tmp_path):
    store = Store(tmp_path / "s")
    stage = bandit(methods.grpo(), steps=3, minibatches=1)
    ctx = make(stage, store)
    kl = [m["kl"] for m in lines(store, stage)]
    assert abs(kl[0]) < 1e-6  # the policy is its reference
    assert kl[2] > 1e-4
    assert ctx.cost.tokens["scored"] == ctx.cost.tokens["trained"]


def test_the_trainers_start_is_scored_only_where_the_loss_needs_it(tmp_path):
    store = Store(tmp_path / "s")
    plain, coupled, decoupled = (
        bandit({"credit": (GroupRelative(drop_uniform=False),), "loss": DAPO(correction=c)}, steps=3)
        for c in (None, SequenceMask(delta=9.0), TruncatedIS())
    )
    costs = [make(s, store).cost.tokens for s in (plain, coupled, decoupled)]
    assert [c.get("scored", 0) for c in costs] == [0, 0, costs[2]["trained"]]
    assert [m["discarded"] for m in lines(store, decoupled)] == [0.0] * 3
    assert all(abs(m["correction"] - 1) < 1e-5 for m in lines(store, decoupled))  # the sampler is exact here
    before = weights(store, INIT)
    after = [weights(store, s) for s in (plain, coupled, decoupled)]
    assert same(after[0], after[1])  # a mask that drops nothing is no change at all
    moved = max(float((after[0][n] - before[n]).abs().max()) for n in before)
    apart = max(float((after[0][n] - after[2][n]).abs().max()) for n in before)
    assert apart < 0.05 * moved


def test_kept_sets_make_trainer_and_sampler_agree_under_top_p(tmp_path):
    store, top_p = Store(tmp_path / "s"), Sampling(max_new_tokens=3, top_p=0.6, top_k=12)
    stage = bandit({"credit": (GroupRelative(drop_uniform=False),), "loss": DAPO(kept_mask=True)}, steps=2, sampling=top_p)
    make(stage, store)
    for m in lines(store, stage):
        assert m["sampler_gap"] < 1e-5
        assert m["ratio"] == pytest.approx(1, abs=1e-5)


# --- what is refused before anything runs ---


def test_a_kl_without_a_reference():
    fields = methods.grpo()
    refused(rl(**fields), "Reference asks a reference", "set reference")
    refused(rl(credit=(GroupRelative(),), loss=DAPO(kl=K3())), "ref_logp", "credit rule")
    refused(rl(credit=(ReplyKL(beta=0.1), GroupRelative())), "ref_logp")


def test_a_reference_that_nobody_asks():
    refused(rl(reference=INIT.out()), "no credit rule asks it", "credit.kl.Reference")


def test_a_reference_with_another_tokenizer():
    other = NewModel(name="other", alphabet="abc", width=32, layers=1, mlp=48)
    refused(rl(**methods.grpo(), reference=other.out()), "the reference", "'other'", "tokenizer")


def test_resampling_of_single_samples():
    refused(rl(resample=2, group=1), "resample", "group to 2")


def test_trap_shaping_after_the_baseline_would_do_nothing():
    judged = "no rule after it judges them"
    refused(rl(credit=(GroupRelative(), SoftOverlong(length=3, cache=1))), "SoftOverlong changes", judged)
    late = (Reference(), GroupRelative(), ReplyKL(beta=0.1), SoftOverlong(length=3, cache=1))
    refused(rl(credit=late, reference=INIT.out()), "ReplyKL changes", judged)


def test_a_control_of_resampling_without_resampling():
    refused(rl(keep="random"), "keep is random, the control of resample, but resample is 0;")


def test_a_kept_mask_without_top_p():
    refused(rl(loss=DAPO(kept_mask=True)), "kept")


# --- the pages ---


def test_every_method_loss_rule_and_correction_is_on_its_page():
    pages = "".join(p.read_text("utf-8") for p in sorted((Path(__file__).parents[2] / "docs" / "methods").glob("*.md")))
    said = set(re.findall(r"\w+", pages))
    classes = [getattr(methods, n) for n in vars(methods) if isinstance(getattr(methods, n), type)]
    assert {c.__name__ for c in classes if issubclass(c, Spec)} | {"K1", "OverlongFilter"} <= said
    named = {n for n, f in vars(methods).items() if inspect.isfunction(f) and f.__module__ == methods.__name__}
    assert named <= said
    assert len(named) == len(METHODS)
