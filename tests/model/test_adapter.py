"""Adapters in a model and on disk, against peft and torch used by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tutelage.learn.learner import Learner, Scorers
from tutelage.learn.optim import AdamW
from tutelage.losses.nll import NLL
from tutelage.model.adapter import FIRST, SECOND, Base, lora_layers, merged, save_adapter, weights
from tutelage.model.attention import NAME
from tutelage.model.folder import load_model, load_tokenizer, matmul_params, save_model
from tutelage.model.lora import Continue, LoRA, Stack
from tutelage.spec import UserError

IDS = torch.tensor([[5, 9, 31, 14, 7, 22]])


@pytest.fixture
def base(tmp_path):
    """A base's folder; adapters are saved beside it."""
    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def shaken(model, seed, only=FIRST):
    """The model with random numbers in B too, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        if only in layer.lora_B:
            weight = layer.lora_B[only].weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def saved(folder, adapter, name, seed=0, only=FIRST):
    """A folder's model with an adapter that does something, and the adapter's folder."""
    model = load_model(folder)
    adapter.attach(model, seed)
    shaken(model, seed, only)
    save_adapter(model, load_tokenizer(folder), folder.parent / name, Base.of(folder))
    return model, folder.parent / name


def logits(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    model.set_attn_implementation(NAME)
    return found


# --- against peft and torch by hand ---


def test_three_updates_equal_a_naive_loop_with_peft():
    """Losses, gradients of A and B, and what they become, within 1e-6."""
    from peft import LoraConfig, get_peft_model

    model, samples = tiny.model(), tiny.samples([9, 4, 12, 7])
    LoRA(rank=3, alpha=12).attach(model, seed=5)
    stock = tiny.model()
    stock.set_attn_implementation("eager")
    naive = get_peft_model(stock, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs = {n.removeprefix("base_model.model."): p for n, p in naive.named_parameters() if p.requires_grad}
    mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    for name, p in theirs.items():
        p.data.copy_(mine[name].data)
    learner = Learner(model, AdamW(lr=0.01, weight_decay=0.1), clip=0, micro_tokens=16)
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(3):
        loss = torch.zeros(())
        for s in samples:
            ids = torch.from_numpy(s.tokens)
            logp = naive(input_ids=ids[None]).logits[0].log_softmax(-1)
            loss = loss - sum(logp[t - 1, ids[t]] for t in s.trained)
        loss = loss / sum(len(s.trained) for s in samples)
        loss.backward()
        assert learner.forward_backward(samples, NLL())["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
        for name, p in theirs.items():
            torch.testing.assert_close(mine[name].grad, p.grad, atol=1e-6, rtol=1e-5)
        learner.step()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in theirs.items():
        torch.testing.assert_close(mine[name].data, p.data, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_packed_log_probs_with_an_adapter_equal_the_stock_forward(name):
    model, samples = tiny.model(name), tiny.samples([9, 4, 12])
    plain = Learner(model).score(samples, 1.0, "logp")
    LoRA(rank=4).attach(model, seed=0)
    for was, signal in zip(plain, Learner(model).score(samples, 1.0, "logp"), strict=True):
        np.testing.assert_allclose(was.values, signal.values, rtol=1e-5, atol=1e-6)  # B is zero
    mine = Learner(shaken(model, 1)).score(samples, 1.0, "logp")
    model.set_attn_implementation("eager")
    for sample, was, signal in zip(samples, plain, mine, strict=True):
        ids = torch.from_numpy(sample.tokens)
        with torch.no_grad():
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        want = logp[:-1].gather(1, ids[1:, None])[sample.trained - 1, 0]
        torch.testing.assert_close(torch.from_numpy(signal.values), want, atol=2e-5, rtol=1e-5)
        assert abs(was.values - signal.values).max() > 1e-3


@pytest.mark.parametrize("second", [Stack(rank=2, alpha=5, targets=("q_proj", "down_proj")), Stack(rank=4, alpha=8)])
def test_peft_opens_what_is_saved_of_one_and_of_several(base, second):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    one, first = saved(base, LoRA(rank=4, alpha=8), "first")
    two, both = saved(first, second, "both", seed=3, only=SECOND)
    assert (logits(one) - logits(two)).abs().max() > 1e-2
    for model, folder in ((one, first), (two, both)):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["target_modules"] == sorted(config["target_modules"])
        for opened in (
            AutoPeftModelForCausalLM.from_pretrained(folder),
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
        ):
            torch.testing.assert_close(logits(opened.base_model.model), logits(model), atol=2e-6, rtol=1e-5)
        assert torch.allclose(logits(load_model(folder)), logits(model), atol=2e-6)
        assert torch.allclose(logits(merged(folder)), logits(model), atol=5e-6)
        assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()


def test_a_stack_keeps_the_frozen_adapter_as_it_was(base):
    """A and B of the old one are the first rows and columns of what is published, bit for bit, though the new one moved."""
    _, first = saved(base, LoRA(rank=4, alpha=8), "first")
    _, both = saved(first, Stack(rank=2, alpha=4), "both", only=SECOND)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (first, both))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        part = new[name][:4] if "lora_A" in name else new[name][:, :4]
        assert torch.equal(part, tensor)
    assert json.loads((both / "adapter_config.json").read_text())["r"] == 6


# --- what is trained ---


def test_only_the_adapter_has_gradients_and_is_kept():
    for tied in (True, False):
        model = tiny.model(tie_word_embeddings=tied)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        LoRA(rank=2, targets=("v_proj",)).attach(model, seed=0)
        learner = Learner(model, AdamW(lr=0.1, weight_decay=0.5))
        learner.forward_backward(tiny.samples([9, 4]), NLL())
        learner.step()
        kept = learner.state()["model"]
        assert len(kept) == 2 * 2
        assert all(".v_proj.lora_" in name for name in kept)
        now = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items() if "lora_" not in n}
        assert now.keys() == before.keys()
        assert all(torch.equal(now[n], before[n]) for n in before)


def test_a_model_without_adapters_keeps_everything():
    model = tiny.model()
    assert weights(model).keys() == model.state_dict().keys()


def test_adapters_are_drawn_from_their_seed_alone():
    def drawn(seed):
        model = tiny.model()
        LoRA(rank=2).attach(model, seed)
        return weights(model)

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = drawn(7)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert all(torch.equal(one[n], t) for n, t in drawn(7).items())
    assert not any(torch.equal(one[n], t) for n, t in drawn(8).items() if "lora_A" in n)
    assert not any(t.any() for n, t in one.items() if "lora_B" in n)


def test_head_and_embeddings_are_left_alone_and_n_is_the_bases():
    for tied in (True, False):
        model = tiny.model(tie_word_embeddings=tied)
        n = matmul_params(model)
        LoRA(rank=2).attach(model, seed=0)
        names = [name for name, _ in lora_layers(model)]
        assert len(names) == 2 * 7
        assert not [name for name in names if "lm_head" in name or "embed" in name]
        assert matmul_params(model) == n


def test_a_stack_trains_the_new_adapter_and_continue_the_old_one(base):
    _, first = saved(base, LoRA(rank=4), "first")
    for how, part in ((Stack(rank=2), f".{SECOND}."), (Continue(), f".{FIRST}.")):
        model = load_model(first)
        assert not [n for n, p in model.named_parameters() if p.requires_grad]
        how.attach(model, 0)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 14
        assert all(part in n for n in trained)


# --- teachers ---


def test_scorers_on_one_base_share_it_and_score_as_when_alone(base):
    folders = [saved(base, LoRA(rank=2 + i, targets=t), f"t{i}", seed=i)[1] for i, t in enumerate(((), ("q_proj",)))]
    samples, scorers = tiny.samples([9, 4, 12]), Scorers(tiny.VOCAB)
    made = [scorers.of(folder, folder.name) for folder in (*folders, base)]
    held = {id(p): p.numel() for s in made for p in s._learner.model.parameters()}
    alone = sum(p.numel() for p in load_model(base).parameters())
    adapters = sum(t.numel() for f in folders for t in load_file(f / "adapter_model.safetensors").values())
    assert sum(held.values()) == alone + adapters
    assert scorers.of(folders[0], "again") is made[0]
    for want in ("logp", "hidden"):
        for folder, scorer in reversed(list(zip((*folders, base), made, strict=True))):  # not in the order of loading
            mine = scorer.score(samples, 0.7, want)
            for a, b in zip(mine, Scorers(tiny.VOCAB).of(folder, "alone").score(samples, 0.7, want), strict=True):
                assert (a.values == b.values).all()
    assert [s.params for s in made] == [matmul_params(load_model(base))] * 3


def test_a_limit_of_residents_changes_no_score_and_holds_no_more_models(base, tmp_path):
    import weakref

    from tutelage.model.folder import save_model

    folders = [saved(base, LoRA(rank=2), "t")[1], base]
    for seed in (5, 6):
        save_model(tiny.model(seed=seed), tiny.tokenizer(), tmp_path / f"whole{seed}")
        folders.append(tmp_path / f"whole{seed}")
    samples, everyone = tiny.samples([9, 4, 12]), Scorers(tiny.VOCAB)
    for resident in (1, 2):
        few, seen = Scorers(tiny.VOCAB, resident), []
        for _ in range(2):
            for folder in folders:
                guest, free = few.of(folder, folder.name), everyone.of(folder, folder.name)
                for want in ("logp", "hidden"):
                    for a, b in zip(guest.score(samples, 0.7, want), free.score(samples, 0.7, want), strict=True):
                        assert (a.values == b.values).all()
                        assert a.provenance == b.provenance
                assert torch.equal(guest.head.weight, free.head.weight)
                assert (guest.scored, guest.params) == (free.scored, free.params)
                free.scored = guest.scored = 0
                seen += [weakref.ref(model) for model in few._bases.values()]
                assert len({id(r()) for r in seen if r()}) <= resident


# --- where the base is ---


def test_the_base_is_found_when_both_have_moved(base, tmp_path):
    model, folder = saved(base, LoRA(rank=2), "adapter")
    inner = tmp_path / "moved" / "elsewhere"
    inner.mkdir(parents=True)
    for each in (base, folder):
        shutil.move(each, inner / each.name)
    assert torch.equal(logits(load_model(inner / "adapter")), logits(model))


def test_an_import_from_the_hubs_cache_is_named_as_the_hub_does(base):
    path = "/home/me/hub/models--Org--Some-7B/snapshots/0123abc"
    body = {"record": {"path": path}, "content": {"base": "c0ffee"}}
    (base.parent / "artifact.json").write_text(json.dumps(body))
    _, first = saved(base, LoRA(rank=2), "first")
    (base.parent / "artifact.json").unlink()
    _, both = saved(first, Stack(rank=2), "both", only=SECOND)  # what it stands on is what the first one said
    for folder in (first, both):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("Org/Some-7B", "0123abc")
        assert json.loads((folder / "base_model.json").read_text())["content"] == "c0ffee"
        assert Base.of(folder).folder == base


# --- what is refused ---


def test_targets_that_the_model_does_not_have():
    fields = {**tiny.config(), "model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 2}
    from tutelage.model.folder import make_model

    with pytest.raises(UserError, match=r"'gate_proj' is no linear layer of a mixtral model; it has .*q_proj") as error:
        LoRA(targets=("q_proj", "gate_proj")).attach(make_model(fields, 0), 0)
    assert "\n" not in str(error.value)


def test_damaged_adapters_are_one_line(base):
    def refused(*words):
        with pytest.raises(UserError) as error:
            load_model(folder)
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)

    _, folder = saved(base, LoRA(rank=2), "adapter")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    refused("no adapter that peft can read")
    file.unlink()
    refused("no adapter that peft can read")
    file.write_bytes(whole)
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"r": 2', '"r": 3'))
    refused("do not agree on tensor", "lora_A")
    config.write_text("{")
    refused(str(folder), "copy the whole folder again")
    config.write_text(text)
    shutil.move(base, base.parent / "gone")
    refused("is an adapter of", str(base), "is not there")
