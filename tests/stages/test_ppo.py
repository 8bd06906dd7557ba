"""PPO as a stage: it learns, resumes, publishes both models, pays for both, and refuses what does not fit."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.stages.test_loops import fit, refused, same
from tests.stages.test_methods import Even, Vowel, lines
from tests.stages.toy import DATA, INIT, Types, make, rl
from tutelage.context import Stopped
from tutelage.credit.gae import GAE
from tutelage.credit.group import GroupRelative
from tutelage.credit.overlong import SoftOverlong
from tutelage.envs.single import SingleTurn
from tutelage.graph import Goals, from_record, key, record
from tutelage.learn.learner import Learner
from tutelage.learn.optim import AdamW
from tutelage.losses.nll import NLL
from tutelage.losses.value import ClippedValue
from tutelage.model.folder import load_model, load_tokenizer
from tutelage.model.lora import LoRA
from tutelage.rollout.base import Sampling
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.mixture import Replay
from tutelage.stages.model import NewModel
from tutelage.stages.ppo import PPO
from tutelage.store import Store
from tutelage.text.rows import read_rows
from tutelage.text.template import Chat, Document


def ppo(**more):
    """The defaults, on the bandit of tests/stages/test_methods.py."""
    plain = rl()
    fields = {"name": "ppo", "model": plain.model, "tasks": plain.tasks, "domains": plain.domains, "steps": 14, "prompts": 4}
    fields |= {"group": 8, "minibatches": 2, "env": SingleTurn(verifier=Vowel()), "sampling": Sampling(max_new_tokens=2)}
    fields |= {"value": INIT.out(), "reference": INIT.out(), "optimizer": AdamW(lr=0.01), "value_optimizer": AdamW(lr=0.01)}
    return PPO(**{**fields, **more})


def weights(store, stage, port, step=None):
    return load_file(store.path(key(stage), port, step) / "model.safetensors")


def test_it_learns_and_its_values_foresee_the_return(tmp_path):
    store, stage = Store(tmp_path / "s"), ppo()
    make(stage, store)
    found = lines(store, stage)
    reward = [m["reward"] for m in found]
    assert np.mean(reward[:2]) < 0.3
    assert np.mean(reward[-3:]) > 0.55
    assert found[0]["explained_variance"] == pytest.approx(0, abs=1e-6)  # the new head expects nothing
    assert abs(found[0]["kl_ref"]) < 1e-6  # the policy is its reference
    assert found[-1]["kl_ref"] > 0.01
    assert np.mean([m["return"] for m in found[-3:]]) > 0.4
    values = np.mean([m["value/loss"] for m in found[-3:]])
    assert values < 0.2


def test_stopped_anywhere_it_resumes_to_the_same_bits_of_both_models(tmp_path):
    stage = ppo(steps=4, group=3, replay=(Replay(data=DATA.out(), weight=0.5, rows=3),))
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(stage, whole)
    for stop_after in (1, 2):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(stage, cut)
    for port in ("policy", "value"):
        assert same(weights(whole, stage, port), weights(cut, stage, port))
    assert lines(whole, stage) == lines(cut, stage)
    assert done.cost == resumed.cost


def test_both_ports_keep_their_series_and_a_later_stage_goes_on_from_the_value_model(tmp_path):
    from transformers import AutoModelForTokenClassification

    store, stage = Store(tmp_path / "s"), ppo(steps=2, group=2, checkpoints=(1, 2))
    types = stage.infer(Types())
    assert (types["policy"].head, types["value"].head) == ("causal", "value")
    make(stage, store)
    assert same(weights(store, stage, "value", 2), weights(store, stage, "value"))
    assert not same(weights(store, stage, "value", 1), weights(store, stage, "value"))
    head = AutoModelForTokenClassification.from_pretrained(store.path(key(stage), "value")).score
    assert head.weight.any()
    further = ppo(name="more", steps=1, group=1, model=stage.out("policy"), value=stage.out("value"))  # no group is needed
    make(further, store)
    assert lines(store, further)[0]["value/loss"] != pytest.approx(lines(store, stage)[0]["value/loss"])


def test_the_policy_may_be_an_adapter_beside_a_whole_value_model(tmp_path):
    store, stage = Store(tmp_path / "s"), ppo(steps=2, group=2, adapter=LoRA(rank=2, alpha=8))
    assert [t.adapter for t in stage.infer(Types()).values()] == [True, False]
    make(stage, store)
    assert (store.path(key(stage), "policy") / "adapter_model.safetensors").exists()
    assert "score.weight" in weights(store, stage, "value")
    refused(ppo(value=stage.out("policy")), "value ppo.policy is an adapter", "Merge")


def test_both_models_are_paid_for(tmp_path):
    store, stage = Store(tmp_path / "s"), ppo(steps=2, group=2)
    cost = make(stage, store).cost
    n = INIT.infer(Types())["policy"].params
    v = n - INIT.vocab * INIT.width + INIT.width
    tokens = cost.tokens["trained"] // 2
    drawn = cost.tokens["sampled"] + cost.tokens["prefilled"]
    assert tokens == drawn
    assert cost.tokens == {**cost.tokens, "trained": 2 * drawn, "scored": 2 * drawn}  # reference and value model
    assert cost.flops == drawn * (2 * n + 2 * n + 2 * v + 6 * n + 6 * v)


def likelihood(store, stage, template):
    """The mean loss of a stage's policy on the rows as a template has them."""
    folder = store.path(key(stage), "policy")
    tokenizer = load_tokenizer(folder)
    samples = []
    for row in read_rows(store.path(key(DATA), "rows")):
        chat = isinstance(template, Chat)
        made = template.example(tokenizer, row["prompt"], row["completion"]) if chat else None
        samples.append(made or template.document(tokenizer, row["text"]))
    return Learner(load_model(folder)).forward_backward(samples, NLL())["loss"]


@pytest.mark.parametrize("template", [Chat(), Document()], ids=["SFT replay", "PPO-ptx"])
def test_replay_keeps_what_plain_ppo_forgets(template, tmp_path):
    store = Store(tmp_path / "s")
    base = fit(name="base", template=template, steps=12, rows=24, optimizer=AdamW(lr=0.01))
    start = {"model": base.out(), "value": base.out(), "reference": base.out()}
    plain = ppo(**start, name="plain")
    mixed = ppo(**start, name="mixed", replay=(Replay(data=DATA.out(), weight=1.0, rows=16, template=template),))
    for stage in (plain, mixed):
        make(stage, store)
        reward = [m["reward"] for m in lines(store, stage)]
        assert np.mean(reward[-3:]) > np.mean(reward[:2]) + 0.2
    before, forgot, kept = (likelihood(store, s, template) for s in (base, plain, mixed))
    assert forgot > before + 0.5
    assert kept < before
    told = [m["replay/letters.rows/loss"] for m in lines(store, mixed)]
    assert told[0] == pytest.approx(before, abs=0.3)


def test_a_record_says_everything(tmp_path):
    stage = ppo(replay=(Replay(data=DATA.out(), weight=27.8, template=Document()),))
    again = from_record(json.loads(json.dumps(record(Goals(recipe="r", stages=(stage.out("value"),))))))
    assert [key(at.of) for at in again.stages] == [key(stage)]
    assert key(ppo(value_loss=ClippedValue(clip=0))) != key(ppo())


# --- what is refused before anything runs ---


def test_defaults_without_a_reference():
    refused(ppo(reference=None), "Reference asks a reference", "set reference")


def test_gae_without_a_value_model():
    refused(rl(credit=(GAE(),)), "needs value", "the stage PPO")


def test_a_value_model_that_gets_no_returns():
    refused(ppo(credit=(GroupRelative(),), reference=None), "no credit rule gives returns", "GAE")


def test_a_penalty_without_its_log_probs():
    refused(ppo(credit=(SoftOverlong(length=2, cache=1), GAE(beta=0.1)), reference=None), "ref_logp")


def test_the_value_loss_as_the_policys():
    refused(ppo(loss=ClippedValue()), "value_loss")


def test_a_value_model_with_another_tokenizer():
    other = NewModel(name="other", alphabet="abc", width=32, layers=1, mlp=48)
    refused(ppo(value=other.out()), "the value model", "'other'", "tokenizer")


def test_a_value_model_where_a_policy_is_wanted():
    value = ppo().out("value")
    refused(rl(model=value), "ppo.value", "value model", "give a policy")
    refused(Evaluate(name="e", model=value, tasks=DATA.out(), domain="low", env=rl().env), "give a policy")
    refused(fit(model=value), "give a policy")


def test_an_architecture_without_a_token_classifier():
    class Olmo(NewModel):
        def infer(self, types):
            from dataclasses import replace

            return {"policy": replace(super().infer(types)["policy"], architecture="olmo2")}

    olmo = Olmo(name="olmo", alphabet=INIT.alphabet, width=32, layers=1, mlp=48)
    refused(ppo(value=olmo.out()), "olmo.policy", "'olmo2'", "token classifier")


def test_values_are_read_before_the_first_update_of_a_step(tmp_path):
    """The clip is around what the model said when the samples were judged, also in the second minibatch."""
    store = Store(tmp_path / "s")
    small = {"steps": 1, "group": 2, "env": SingleTurn(verifier=Even()), "value_optimizer": AdamW(lr=0.05)}
    held, free = (ppo(**small, value_loss=ClippedValue(clip=c)) for c in (1e-9, 0.0))
    for stage in (held, free):
        make(stage, store)
    assert same(weights(store, held, "policy"), weights(store, free, "policy"))  # within a step it does not hear of them
    apart = [(weights(store, s, "value")["score.bias"]) for s in (held, free)]
    assert not torch.equal(*apart)
