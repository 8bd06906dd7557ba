"""Fit, Online and Evaluate: exact resume, budgets, selection, series, and the checks made before any weight loads."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.stages.toy import DATA, ENV, INIT, SHORT, Types, make, rl
from tutelage.context import Stopped
from tutelage.credit.group import GroupRelative
from tutelage.credit.teacher import Teacher
from tutelage.credit.weighted import WeightedTeachers
from tutelage.envs.single import SingleTurn
from tutelage.graph import key
from tutelage.learn.optim import AdamW, Muon
from tutelage.losses.distill import FullReverseKL, SampledReverseKL
from tutelage.losses.top_k import TailReverseKL
from tutelage.losses.weighted import WeightedReverseKL
from tutelage.rollout.base import Sampling
from tutelage.spec import SpecError
from tutelage.stages.budget import Budget
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.fit import Fit, Selection, batch_order
from tutelage.stages.majority import Majority
from tutelage.stages.model import NewModel
from tutelage.store import Store
from tutelage.text.scores import read_scores
from tutelage.text.template import Document
from tutelage.text.tokenizer import character_tokenizer
from tutelage.verify.base import Verifier


def fit(**more):
    return Fit(**{"name": "fit", "model": INIT.out(), "data": DATA.out(), "steps": 5, "rows": 6, **more})


def mopd(loss=None, want="hidden", **more):
    """Two different teachers of the two domains."""
    teachers = {"low": rl(name="t1", optimizer=AdamW(lr=0.05)).out(), "high": rl(name="t2", domains=("high",)).out()}
    rule, loss = (Teacher(want=want),), loss or FullReverseKL()
    return rl(**{"name": "mopd", "domains": ("low", "high"), "teachers": teachers, "credit": rule, "loss": loss, **more})


def weights(store, stage, port="policy", step=None):
    return load_file(store.path(key(stage), port, step) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the loops ---


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.01), Muon()])
@pytest.mark.parametrize("build", [fit, rl, mopd], ids=["fit", "rl", "mopd"])
def test_a_stage_stopped_anywhere_resumes_to_the_same_bits(build, optimizer, tmp_path):
    stage = build(optimizer=optimizer)
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(stage, whole)
    for stop_after in (1, 3):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(stage, cut)
    assert same(weights(whole, stage), weights(cut, stage))
    assert not same(weights(whole, stage), weights(whole, INIT))
    strip = lambda lines: [{k: v for k, v in m.items() if k not in ("time", "tokens_per_s")} for m in lines]  # noqa: E731
    assert strip(whole.metrics(key(stage))) == strip(cut.metrics(key(stage)))
    assert done.cost == resumed.cost


def test_pretraining_on_documents_learns_them(tmp_path):
    store = Store(tmp_path / "s")
    stage = fit(template=Document(), steps=60, rows=24, optimizer=AdamW(lr=0.01))
    make(stage, store)
    loss = [m["nll"] for m in store.metrics(key(stage))]
    assert loss[-1] < 0.6 * loss[0]


def test_selection_keeps_the_best_trial_and_stops_when_stale(tmp_path):
    store = Store(tmp_path / "s")
    select = Selection(tasks=DATA.out(), env=ENV, every=10, patience=2, sampling=Sampling(temperature=0, max_new_tokens=3))
    stage = fit(steps=400, rows=25, optimizer=AdamW(lr=0.02), select=select)
    ctx = make(stage, store)
    trials = {m["step"]: m["dev"] for m in store.metrics(key(stage)) if "dev" in m}
    best = max(trials, key=lambda s: (trials[s], -s))
    assert ctx.facts["selected"] == {"step": best, "dev": trials[best]}
    assert trials[best] > 0.9
    assert ctx.facts["steps"] == best + 20 < 400
    scores = {}
    for domain in ("low", "high"):
        greedy = Sampling(temperature=0, max_new_tokens=3)
        of = Evaluate(name="e", model=stage.out(), tasks=DATA.out(), domain=domain, env=ENV, sampling=greedy)
        make(of, store)
        _, rows = read_scores(store.path(key(of), "scores"))
        scores[domain] = sum(r["value"] for r in rows) / len(rows)
    assert sum(scores.values()) / 2 == pytest.approx(trials[best])  # what was published is the checkpoint that was chosen


def test_a_budget_is_what_the_named_stages_spent(tmp_path):
    store, spender = Store(tmp_path / "s"), rl(steps=3)
    control = fit(steps=10_000, budget=Budget(of=(spender.out(),)))
    make(spender, store)
    allowed = store.meta(key(spender))["cost"]["flops"]
    ctx = make(control, store)
    step = ctx.cost.flops / ctx.facts["steps"]
    assert allowed <= ctx.cost.flops < allowed + 1.5 * step


def test_costs_are_the_tokens_times_the_parameters(tmp_path):
    store, stage = Store(tmp_path / "s"), mopd(steps=2)
    ctx = make(stage, store)
    n, tokens = INIT.infer(Types())["policy"].params, ctx.cost.tokens
    assert tokens["scored"] == tokens["trained"] == tokens["sampled"] + tokens["prefilled"]
    per = {"sampled": 2, "prefilled": 2, "scored": 2, "trained": 6}
    assert ctx.cost.flops == sum(per[k] * n * v for k, v in tokens.items())


def test_series_hold_the_checkpoints_asked_for(tmp_path):
    store, stage = Store(tmp_path / "s"), rl(checkpoints=(2, 4))
    make(stage, store)
    assert same(weights(store, stage, step=4), weights(store, stage))
    assert not same(weights(store, stage, step=2), weights(store, stage))
    later = fit(model=stage.out(step=2))
    make(later, store)


def test_bf16_rollouts_report_their_gap_and_train_in_fp32(tmp_path):
    store, stage = Store(tmp_path / "s"), rl(rollout_dtype="bfloat16", steps=1)
    exact = rl(steps=1)
    make(stage, store)
    make(exact, store)
    gaps = [store.metrics(key(s))[0]["sampler_gap"] for s in (stage, exact)]
    assert gaps[0] > 1e-4
    assert gaps[1] < 1e-5
    assert weights(store, stage)["model.embed_tokens.weight"].dtype == torch.float32


def test_minibatches_are_whole_groups_and_several_updates(tmp_path):
    store = Store(tmp_path / "s")
    one, two = rl(steps=1), rl(steps=1, minibatches=2)
    make(one, store)
    make(two, store)
    assert not same(weights(store, one), weights(store, two))


def test_token_share_by_domain_is_logged_and_sums_to_one(tmp_path):
    store, stage = Store(tmp_path / "s"), mopd(SampledReverseKL(), "logp", steps=1)
    make(stage, store)
    line = store.metrics(key(stage))[0]
    assert line["token_share/low"] + line["token_share/high"] == pytest.approx(1)
    assert {"kl", "entropy", "reward/low", "reward/high"} <= set(line)


@pytest.mark.parametrize(
    ("loss", "want"), [(FullReverseKL(), "hidden"), (SampledReverseKL(), "logp"), (TailReverseKL(), "topk")]
)
def test_the_students_own_start_may_teach_a_domain_and_holds_it_there(loss, want, tmp_path):
    """MiMo's "self": it alone moves nothing; beside another teacher it holds its domain."""
    store, stage = (
        Store(tmp_path / "s"),
        rl(teachers={"low": INIT.out()}, credit=(Teacher(want=want, k=8),), loss=loss, steps=2),
    )
    make(stage, store)
    assert same(weights(store, stage), weights(store, INIT))


def test_teachers_taught_one_at_a_time_make_the_same_student(tmp_path):
    stage, store, alone = mopd(steps=2), Store(tmp_path / "a"), Store(tmp_path / "b")
    weighted = mopd(WeightedReverseKL(), steps=2, credit=(WeightedTeachers(weights={"low": {"low": 1}, "high": {"high": 1}}),))
    make(stage, store)
    make(weighted, store)
    make(mopd(steps=2, resident=1), alone)
    assert same(weights(store, stage), weights(alone, stage))
    assert same(weights(store, stage), weights(store, weighted))
    assert store.meta(key(stage))["cost"] == alone.meta(key(stage))["cost"]


def test_outcome_rewards_fade_over_the_stages_steps_and_entropy_is_logged(tmp_path):
    loss = SampledReverseKL(alpha=0.4, alpha_end=0.0)
    stage, store = mopd(loss, credit=(GroupRelative(drop_uniform=False), Teacher()), steps=3), Store(tmp_path / "s")
    make(stage, store)
    assert [m["alpha"] for m in store.metrics(key(stage))] == pytest.approx([0.4, 0.2, 0.0])
    assert all(m["entropy"] > 0 for m in store.metrics(key(stage)))


def test_a_saved_policy_opens_in_stock_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = Store(tmp_path / "s")
    make(rl(steps=1), store)
    folder = store.path(key(rl(steps=1)), "policy")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"] if hasattr(ids, "keys") else ids
    assert tokenizer.decode(ids[0]) == "<|user|>a<|assistant|>"
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_the_majority_answer_is_scored_by_the_verifier(tmp_path):
    store = Store(tmp_path / "s")
    stage = Majority(name="m", train=DATA.out(), heldout=DATA.out(), domain="low", verifier=ENV.verifier)
    make(stage, store)
    _, rows = read_scores(store.path(key(stage), "scores"))
    assert sum(r["value"] for r in rows) == 1  # every gold answer differs


def test_batches_go_through_everything_before_anything_comes_again():
    seen = [i for step in range(5) for i in batch_order(10, 4, step, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert len(batch_order(3, 8, 0, seed=0)) == 8


# --- what is refused before anything runs ---


def refused(stage, *words):
    with pytest.raises(SpecError) as error:
        stage.infer(Types())
    for word in words:
        assert word in str(error.value)


def test_a_domain_without_a_teacher():
    lonely = mopd(teachers={"low": rl(name="t1").out()})
    refused(lonely, "'high'", "no teacher", "low")


def test_a_teacher_with_another_tokenizer_or_template(monkeypatch):
    other = NewModel(name="other", alphabet="abc", width=32, layers=1, mlp=48)
    refused(mopd(teachers={"low": INIT.out(), "high": other.out()}), "tokenizer", "'other'", "'high'")


def test_credit_that_asks_teachers_without_teachers():
    refused(mopd(teachers={}), "teachers", "none are given")


def test_a_loss_without_its_signals():
    refused(mopd(credit=(GroupRelative(),)), "teacher_hidden", "credit")


def test_an_unknown_domain_names_those_there_are():
    refused(rl(domains=("lwo",)), "'lwo'", "low")


def test_prompts_that_cannot_be_shared_equally():
    refused(mopd(prompts=5), "5", "2 domains")


def test_a_checkpoint_that_will_never_be_written():
    refused(rl(checkpoints=(2, 9)), "step 9", "1 to 4")
    refused(fit(checkpoints=(2,), budget=Budget(of=(rl().out(),))), "budget or patience")


def test_development_tasks_that_are_no_tasks():
    refused(fit(select=Selection(tasks=INIT.out(), env=ENV)), "init.policy", "no prompts")


def test_teachers_that_nobody_asks():
    refused(rl(teachers={"low": INIT.out()}), "no credit rule asks them")


def test_data_without_the_columns():
    class Bare(type(DATA)):
        def infer(self, types):
            from dataclasses import replace

            return {"rows": replace(super().infer(types)["rows"], columns=("id", "text"))}

    refused(fit(data=Bare(name="bare").out()), "prompt, completion", "id, text")


def test_an_edge_to_data_where_a_model_is_wanted():
    refused(fit(model=DATA.out()), "letters.rows", "no model")


def test_keys_ignore_where_and_how_fast():
    assert key(rl(slots=3, micro_tokens=100, threads=2, name="x")) == key(rl())
    assert key(rl(seed=1)) != key(rl())
    assert key(rl(sampling=SHORT.model_copy(update={"temperature": 0.5}))) != key(rl())


def test_a_plan_knows_tokens_and_template_without_making_them(tmp_path):
    """What `NewModel` promises at plan time is what it writes."""
    store = Store(tmp_path / "s")
    make(INIT, store)
    folder = store.path(key(INIT), "policy")
    config = json.loads((folder / "config.json").read_text())
    promised = INIT.infer(Types())["policy"]
    assert config["vocab_size"] == promised.vocab == len(character_tokenizer(INIT.alphabet))
    from tutelage.model.folder import load_model, matmul_params
    from tutelage.model.headers import folder_params

    assert promised.params == matmul_params(load_model(folder)) == folder_params(folder)


class Broken(Verifier):
    """Fails on every reply."""

    async def __call__(self, task, reply, ctx=None):
        raise RuntimeError("no scorer today")


def test_a_step_whose_verifier_fails_on_every_reply_has_no_reward(tmp_path):
    stage, store = rl(env=SingleTurn(verifier=Broken()), steps=2), Store(tmp_path / "s")
    make(stage, store)
    lines = store.metrics(key(stage))
    assert [(line["reward"], line["verifier_errors"]) for line in lines] == [(None, 1.0)] * 2
