"""Adapters as stages train, publish, merge, score and find them again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.stages.test_loops import fit, mopd, refused, same
from tests.stages.toy import DATA, ENV, INIT, SHORT, Types, make, rl
from tests.test_lineage import MODEL, front, key_of, put
from tutelage.card import card
from tutelage.context import Stopped
from tutelage.credit.kl import Reference
from tutelage.credit.teacher import Teacher
from tutelage.graph import Goals, from_record, key, record
from tutelage.learn.optim import AdamW, Muon
from tutelage.losses.distill import SampledReverseKL
from tutelage.model.folder import load_model
from tutelage.model.lora import Continue, LoRA, Stack
from tutelage.rollout.base import Sampling
from tutelage.spec import SpecError, UserError
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.fit import Selection
from tutelage.stages.merge import Merge
from tutelage.store import Store
from tutelage.text.scores import read_scores

SMALL = LoRA(rank=2, alpha=8)
FAST = AdamW(lr=0.02)


def sft(**more):
    return fit(**{"name": "sft", "adapter": SMALL, "optimizer": FAST, **more})


def specialist(name="special", **more):
    return rl(**{"name": name, "adapter": SMALL, "optimizer": FAST, **more})


def consolidated(**more):
    """Adapters as student and teachers, all of one base."""
    teachers = {"low": specialist("t1").out(), "high": specialist("t2", domains=("high",), adapter=LoRA(rank=3)).out()}
    return mopd(**{"teachers": teachers, "adapter": SMALL, "optimizer": FAST, **more})


def adapter(store, stage, step=None):
    return load_file(store.path(key(stage), "policy", step) / "adapter_model.safetensors")


def logits(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 31, 14, 7]])).logits


def moved_by(stage, store):
    """How far a stage's model is from the one it began from."""
    return (
        (logits(load_model(store.path(key(stage), "policy"))) - logits(load_model(store.path(key(INIT), "policy")))).abs().max()
    )


# --- training ---


BUILDS = [
    sft,
    specialist,
    consolidated,
    lambda **more: sft(name="more", model=sft().out(), adapter=Continue(), **more),
    lambda **more: specialist("over", model=sft().out(), adapter=Stack(rank=1), **more),
]


@pytest.mark.parametrize("build", BUILDS, ids=["sft", "rl", "mopd", "continue", "stack"])
def test_a_stage_stopped_anywhere_resumes_to_the_same_bits(build, tmp_path):
    stage, whole, cut = build(), Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(stage, whole)
    assert moved_by(stage, whole) > 1e-3
    for stop_after in (1, 3):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
        (saved,) = cut.work(key(stage)).glob("checkpoint-*/state.pt")
        state = torch.load(saved)
        learner = state.get("learner", state)
        assert learner["model"]
        assert all("lora_" in name for name in learner["model"])
        assert len(learner["optimizers"][0]["state"]) == len(learner["model"])
    resumed = make(stage, cut)
    assert same(adapter(whole, stage), adapter(cut, stage))
    assert done.cost == resumed.cost
    assert whole.meta(key(stage))["content"] == cut.meta(key(stage))["content"], "wherever the store lies"


def test_an_adapter_learns_and_selection_publishes_its_best_trial(tmp_path):
    store, begun = Store(tmp_path / "s"), fit(name="begun", steps=12, rows=25, optimizer=AdamW(lr=0.01))
    select = Selection(tasks=DATA.out(), env=ENV, every=10, patience=2, sampling=Sampling(temperature=0, max_new_tokens=3))
    stage = sft(model=begun.out(), steps=200, rows=25, adapter=LoRA(rank=8), select=select)
    ctx = make(stage, store)
    best, first = ctx.facts["selected"], store.metrics(key(stage))[0]["dev"]
    assert best["dev"] > first + 0.3
    assert best["step"] < ctx.facts["steps"]
    scores = []
    for domain in ("low", "high"):
        greedy = Sampling(temperature=0, max_new_tokens=3)
        of = Evaluate(name="e", model=stage.out(), tasks=DATA.out(), domain=domain, env=ENV, sampling=greedy)
        make(of, store)
        rows = read_scores(store.path(key(of), "scores"))[1]
        scores.append(sum(r["value"] for r in rows) / len(rows))
    assert sum(scores) / 2 == pytest.approx(best["dev"])


def test_an_update_of_an_adapter_costs_four_flops_a_parameter_and_token(tmp_path):
    store, stage = Store(tmp_path / "s"), specialist(steps=1)
    ctx = make(stage, store)
    n, tokens = INIT.infer(Types())["policy"].params, ctx.cost.tokens
    assert "trained" not in tokens
    assert ctx.cost.flops == n * (4 * tokens["adapted"] + 2 * (tokens["sampled"] + tokens["prefilled"]))
    assert specialist().estimate(Types()) == pytest.approx(rl().estimate(Types()) * 6 / 8)
    assert sft().estimate(Types()) == pytest.approx(fit().estimate(Types()) * 4 / 6)


def test_the_seed_decides_where_an_adapter_begins(tmp_path):
    store = Store(tmp_path / "s")
    still = [sft(steps=1, seed=s, optimizer=AdamW(lr=1e-12)) for s in (0, 1)]
    for each in still:
        make(each, store)
    a, b = (adapter(store, each) for each in still)
    assert not any(torch.allclose(a[n], b[n], atol=1e-3) for n in a if "lora_A" in n)


# --- what is published ---


def test_checkpoints_of_a_series_open_on_the_base_and_are_trained_further(tmp_path):
    store, stage = Store(tmp_path / "s"), specialist(checkpoints=(2, 4))
    make(stage, store)
    assert same(adapter(store, stage, 4), adapter(store, stage))
    assert not same(adapter(store, stage, 2), adapter(store, stage))
    later = sft(model=stage.out(step=2), adapter=Continue(), steps=1)
    make(later, store)
    assert moved_by(later, store) > 1e-3


def test_a_store_that_has_moved_still_evaluates_and_trains_its_adapters(tmp_path):
    old = Store(tmp_path / "old")
    make(specialist("over", model=sft().out(), adapter=Stack(rank=1)), old)
    before = moved_by(sft(), old)
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move(old.root, tmp_path / "far" / "away" / "store")
    new = Store(tmp_path / "far" / "away" / "store")
    assert moved_by(sft(), new) == before
    over = specialist("over", model=sft().out(), adapter=Stack(rank=1))
    of = Evaluate(name="e", model=over.out(), tasks=DATA.out(), domain="low", env=ENV, sampling=SHORT)
    make(of, new)
    further = sft(name="further", model=over.out(), adapter=Continue(), steps=1)
    make(further, new)
    assert not old.root.exists()
    from peft import AutoPeftModelForCausalLM

    opened = AutoPeftModelForCausalLM.from_pretrained(new.path(key(further), "policy"))  # names the place where it was made
    torch.testing.assert_close(logits(opened.base_model.model), logits(load_model(new.path(key(further), "policy"))))


def test_a_base_that_is_gone_is_named(tmp_path):
    store = Store(tmp_path / "s")
    make(sft(steps=1), store)
    content = store.meta(key(INIT))["content"]["policy"]
    shutil.rmtree(store.folder(key(INIT)))
    with pytest.raises(UserError, match=f"is an adapter of .*{key(INIT)}.*is not there.*{content}"):
        load_model(store.path(key(sft(steps=1)), "policy"))


def test_a_merge_is_a_whole_model_that_adapters_begin_anew_from(tmp_path):
    store, merge = Store(tmp_path / "s"), Merge(name="merge", model=sft().out())
    again = specialist("again", model=merge.out())
    make(again, store)
    folder = store.path(key(merge), "policy")
    assert (folder / "config.json").exists()
    assert not (folder / "adapter_config.json").exists()
    torch.testing.assert_close(
        logits(load_model(folder)), logits(load_model(store.path(key(sft()), "policy"))), atol=2e-6, rtol=0
    )
    assert again.infer(Types())["policy"].base_key == f"{key(merge)}/policy"
    assert json.loads((store.path(key(again), "policy") / "base_model.json").read_text())["path"].endswith(
        f"{key(merge)}/policy"
    )


def test_the_card_of_an_adapter_names_its_base_and_content_through_other_adapters(tmp_path):
    store = Store(tmp_path / "s")
    put(store, "base", {"policy": MODEL})
    fits = {**MODEL, "adapter": True, "base_key": f"{key_of('base')}/policy"}
    put(store, "sft", {"policy": fits}, {"model": ("base", "policy")})
    put(store, "rl", {"policy": fits}, {"model": ("sft", "policy")})
    folder = store.work(key_of("rl")) / "policy"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    text = card(store, store.meta(key_of("rl")), "policy")
    assert front(text)["base_model"] == "base"
    assert f"`base:policy` (key `{key_of('base')}`, content `hash-of-base-policy`)" in text


# --- teachers ---


def test_teachers_on_one_base_are_one_model_in_memory(tmp_path, monkeypatch):
    """A reference that is the base itself takes part too."""
    from tutelage.learn import learner

    store, loaded = Store(tmp_path / "s"), []
    rules = (Reference(), Teacher(want="logp"))
    stage = consolidated(loss=SampledReverseKL(), credit=rules, reference=INIT.out())
    make(consolidated(), store)
    real = learner.load_model
    monkeypatch.setattr(learner, "load_model", lambda folder, **how: loaded.append(folder) or real(folder, **how))
    make(stage, store)
    assert loaded == [store.path(key(INIT), "policy")]


# --- types, keys, refusals ---


def test_an_adapters_type_names_its_base_and_no_adapter_leaves_the_key():
    base = f"{key(INIT)}/policy"
    for stage in (sft(), sft(model=sft().out(), adapter=Continue()), specialist(model=sft().out(), adapter=Stack())):
        found = stage.infer(Types())["policy"]
        assert (found.adapter, found.base_key) == (True, base)
        assert found.params == INIT.infer(Types())["policy"].params
    assert sft(model=rl(checkpoints=(2,)).out(step=2)).infer(Types())["policy"].base_key.endswith("/policy@2")
    assert not Merge(name="m", model=sft().out()).infer(Types())["policy"].adapter
    assert key(fit(adapter=None)) == key(fit())
    keys = [key(specialist(model=sft().out(), adapter=a)) for a in (Continue(), Stack(), Stack(rank=2))]
    assert len({*keys, key(fit())}) == 4


def test_a_record_brings_adapters_back():
    goals = Goals(recipe="r", stages=(specialist(model=sft().out(), adapter=Stack(targets=("q_proj",))).out(),))
    assert key(from_record(record(goals)).stages[0].of) == key(goals.stages[0].of)


def test_what_does_not_fit_is_refused_before_anything_runs():
    for build in (fit, rl):
        refused(build(model=sft().out()), "sft.policy is an adapter", "Continue", "Stack", "Merge")
        refused(build(model=sft().out(), adapter=LoRA()), "sft.policy is an adapter", "Continue", "Stack")
        refused(build(adapter=Stack()), "Stack", "init.policy is whole weights", "LoRA")
        refused(build(adapter=Continue()), "Continue", "init.policy is whole weights", "LoRA")
        refused(build(adapter=SMALL, optimizer=Muon()), "Muon", "AdamW")
    refused(Merge(name="m", model=INIT.out()), "init.policy is whole weights already")


def test_words_that_are_no_target_are_refused():
    rec = record(Goals(recipe="r", stages=(sft().out(),)))
    rec["stages"]["sft"]["adapter"]["targets"] = ["q_prj"]
    with pytest.raises(SpecError, match="q_prj") as error:
        from_record(rec)
    assert "o_proj" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_how_to_plans(tmp_path):
    from tests import tiny
    from tutelage.graph import plan
    from tutelage.model.folder import save_model

    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "base")
    rows = [{"prompt": f"{d} {i}?", "completion": "7", "gold": "7", "domain": d} for d in ("pears", "plums") for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "lora.md").read_text("utf-8")
    names = {"__name__": "my_lora"}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    made = plan([names["my_lora"](str(tmp_path / "base"), str(tmp_path / "rows.jsonl"))], lambda key: False)
    types = {n.label: n.types["policy"] for n in made.nodes.values() if "policy" in n.types}
    assert {name for name, t in types.items() if t.adapter} == {"sft", "rl-pears", "rl-plums", "mopd"}
    assert {t.base_key for t in types.values() if t.adapter} == {
        next(k for k, n in made.nodes.items() if n.label == "base") + "/policy"
    }
