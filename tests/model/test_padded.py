"""The generic path against transformers' own forward of one row at a time, and against the packed path."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny
from tutelage.learn.batch import split
from tutelage.learn.learner import Learner
from tutelage.losses.nll import NLL
from tutelage.model import padded
from tutelage.model.attention import NAME, Rows, register
from tutelage.model.folder import load_model, load_tokenizer, make_model, save_model
from tutelage.model.headers import PACKED, PADDED
from tutelage.model.lora import LoRA
from tutelage.model.padded import Decoding, is_packed, lines_up, prove, row_states
from tutelage.spec import UserError

LENGTHS = [9, 3, 14, 5]
EVERY = ["llama", "qwen3", "gemma2", "mistral-window", "mixtral", "hybrid", "undeclared", "longrope"]
PACKS = ["llama", "qwen3", "gemma2", "mistral-window", "mixtral"]


def generic(name, **more):
    """A model on the generic path; one that packs is put there by taking our attention away."""
    model = tiny.model(name, **more)
    if is_packed(model):
        model.set_attn_implementation("eager")
    return model


def stock(model, sample, temperature=1.0):
    """Log-probs of the trained tokens by the library's forward of the row alone."""
    ids = torch.from_numpy(sample.tokens)
    logp = (model(input_ids=ids[None], use_cache=False).logits[0].float() / temperature).log_softmax(-1)
    return logp[:-1].gather(1, ids[1:, None])[sample.trained - 1, 0]


def close(mine, theirs, atol=1e-5):
    torch.testing.assert_close(mine, theirs, atol=atol, rtol=1e-5)


# --- training and scoring ---


@pytest.mark.parametrize("micro", [10_000, 15])
@pytest.mark.parametrize("name", EVERY)
def test_padded_log_probs_equal_each_row_alone(name, micro):
    model, samples = generic(name), tiny.samples(LENGTHS)
    scored = Learner(model, micro_tokens=micro).score(samples, 0.8, "logp")
    with torch.no_grad():
        for sample, signal in zip(samples, scored, strict=True):
            close(torch.from_numpy(signal.values), stock(model, sample, 0.8))


@pytest.mark.parametrize("name", ["hybrid", "undeclared", "longrope"])
def test_padded_gradients_equal_each_row_alone(name):
    model, samples = generic(name), tiny.samples(LENGTHS)
    loss = Learner(model).forward_backward(samples, NLL())["loss"]
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    naive = -sum(stock(model, s).sum() for s in samples) / sum(len(s.trained) for s in samples)
    naive.backward()
    assert loss == pytest.approx(float(naive.detach()), abs=1e-5)
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(mine[n], p.grad, atol=1e-4, rtol=1e-3, msg=n)


@pytest.mark.parametrize("name", PACKS)
def test_the_packed_path_equals_the_generic_one(name):
    model, samples, found = tiny.model(name), tiny.samples(LENGTHS), []
    for attention in (NAME, "eager"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        assert is_packed(model) == (attention == NAME)
        metrics = Learner(model).forward_backward(samples, NLL())
        found.append((metrics, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for n, g in found[0][1].items():
        torch.testing.assert_close(g, found[1][1][n], atol=1e-4, rtol=1e-3, msg=n)


def test_the_trap_packing_a_hybrid_lets_a_row_leak_into_the_next():
    """With correct masks for attention in either model: what leaks is the state."""
    shift = {}
    for name in ("llama", "hybrid"):
        model, rows = tiny.model(name), [torch.from_numpy(s.tokens) for s in tiny.samples([9, 7])]
        model.set_attn_implementation(register())
        pos = torch.cat([torch.arange(len(r)) for r in rows])
        layout = Rows(torch.tensor([9, 7]))
        with torch.no_grad():
            out = model.get_decoder()(input_ids=torch.cat(rows)[None], position_ids=pos[None], use_cache=False, layout=layout)
            model.set_attn_implementation("eager")
            alone = model.get_decoder()(input_ids=rows[1][None], use_cache=False).last_hidden_state[0]
        shift[name] = float((out.last_hidden_state[0, 9:] - alone).abs().max() / alone.abs().max())
    assert shift["llama"] < 1e-5
    assert shift["hybrid"] > 1e-2


def test_the_trap_a_longer_neighbour_changes_the_angles(monkeypatch):
    model, samples = generic("longrope"), tiny.samples([14, 5])
    assert not is_packed(tiny.model("longrope"))
    apart = Learner(model).score(samples, 1.0, "logp")[1].values
    monkeypatch.setattr(padded, "stretches", lambda rope: False)
    together = Learner(model).score(samples, 1.0, "logp")[1].values
    assert abs(apart - together).max() > 1e-2


def test_micro_batches_count_their_padding():
    samples = tiny.samples([3, 3, 4, 4, 9, 10, 17, 40, 5])
    for limit in (1, 12, 20, 33, 10_000):
        parts = split(samples, limit, padded=True)
        assert sorted(id(s) for p in parts for s in p) == sorted(map(id, samples))
        for part in parts:
            assert len(part) == 1 or len(part) * max(len(s.tokens) for s in part) <= limit
    assert max(sum(len(s.tokens) for s in p) for p in split(samples, 20)) <= 40


# --- drawing ---

FIELDS = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "alibi": False,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "state_size": 8,
    "num_heads": 8,
    "n_groups": 1,
    "chunk_size": 4,
    "shared_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_period": 2,
    "block_auto_adjust_ff_dim": False,
}
"""Sizes under the names that some families have for them; the others ignore what they do not know."""
TYPES = {"lfm2": "conv", "lfm2_moe": "conv", "granitemoehybrid": "mamba"}


def sized(name):
    heads = {} if name.startswith(("falcon", "deepseek")) and name != "falcon_h1" else {"head_dim": 8}
    fields = {**tiny.config("hybrid"), "model_type": name, **FIELDS, **heads, "num_local_experts": 4}
    linear = name.startswith(("qwen3_", "olmo_hybrid"))
    fields["layer_types"] = ["linear_attention", "full_attention"] if linear else None
    if name.startswith("deepseek"):
        fields["num_key_value_heads"] = 4
    if name in TYPES:
        fields["layer_types"] = [TYPES[name], "attention" if name == "granitemoehybrid" else "full_attention"]
    if name == "bamba":
        fields["attn_layer_indices"] = [1]
    if name in ("falcon", "deepseek_v2", "deepseek_v3"):
        fields.pop("head_dim")
    return {k: v for k, v in fields.items() if v is not None}


@pytest.mark.parametrize("name", sorted(PADDED))
def test_declared_architectures_draw_beside_longer_prompts_as_alone(name):
    torch.manual_seed(0)
    model = make_model(sized(name), seed=0).eval()
    assert not is_packed(model)
    assert lines_up(model)
    with torch.no_grad():
        for p in model.parameters():  # some families draw matrices too small for a leak to show
            if p.ndim >= 2:
                p.normal_(0, 0.2)
    check_drawing(model)
    prove(model, "base")


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("undeclared", "longrope")])
def test_tiny_models_draw_beside_longer_prompts_as_alone(name):
    check_drawing(generic(name))


def check_drawing(model):
    """Prompts of 6 and 3 tokens, the second copied, ten tokens on: past the windows of the windowed models."""
    a, b = (torch.from_numpy(s.tokens) for s in tiny.samples([16, 13]))
    with torch.no_grad():
        whole = [row_states(model, r, torch.arange(len(r)), torch.tensor([len(r)])) for r in (a, b)]
        decoding = Decoding(model)
        states = decoding.begin([a[:6].tolist(), b[:3].tolist()])
        decoding.take([1, 0, 1])
        states = states[[1, 0, 1]]
        for i in range(10):
            wanted = torch.stack([whole[1][2 + i], whole[0][5 + i], whole[1][2 + i]])
            assert (states - wanted).abs().max() < 1e-4 * wanted.abs().max()
            states = decoding.step(torch.stack([b[3 + i], a[6 + i], b[3 + i]]))


def test_what_carries_the_padding_along_is_not_declared():
    """The trap: without a mask, tokens on the left of a prompt are part of it."""
    model, prompt = generic("hybrid"), tiny.samples([4])[0].tokens.tolist()
    with torch.no_grad():
        alone, filled = Decoding(model).begin([prompt]), Decoding(model).begin([[0, 0, *prompt]])
    assert (alone - filled).abs().max() > 1e-2
    assert not lines_up(generic("undeclared"))
    assert not lines_up(generic("longrope"))


# --- what is imported is held to this ---


@pytest.mark.parametrize("name", ["hybrid", "undeclared", "gemma2"])
def test_decoders_are_proven(name):
    prove(generic(name), "base")


def refused(model, *words):
    with pytest.raises(UserError) as error:
        prove(model, "base")
    assert "\n" not in str(error.value)
    for word in ("base: ", "give another base", *words):
        assert word in str(error.value)


def of(kind, **fields):
    config = AutoConfig.for_model(**{**tiny.config(), "model_type": kind, **fields})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_what_is_no_decoder_is_refused_by_proof():
    refused(of("bert", is_decoder=False), "'bert'", "is not causal")
    refused(of("rwkv", attention_hidden_size=32), "'rwkv'", "decoder of transformers")


def test_a_head_that_is_not_all_and_a_cache_that_forgets_are_refused(monkeypatch):
    model = generic("undeclared")
    model.lm_head.register_forward_hook(lambda module, args, out: out.tanh())
    refused(model, "logits that are not its output head's")
    monkeypatch.setattr(Decoding, "take", lambda self, rows: None)
    refused(generic("undeclared"), "decoder of transformers")
    monkeypatch.undo()
    step = Decoding.step
    monkeypatch.setattr(Decoding, "step", lambda self, ids: step(self, ids.roll(1)))
    refused(generic("undeclared"), "draws otherwise with its cache")


# --- adapters ---


DENSE = {**tiny.HYBRID, "model_type": "olmo_hybrid"}


def test_an_adapter_on_a_hybrid(tmp_path):
    """Its log-probs are peft's own on the stock forward, it learns, and only it; saved, it loads onto its base."""
    from tutelage.learn.optim import AdamW
    from tutelage.model.adapter import Base, lora_layers, save_adapter

    save_model(tiny.model("hybrid", **DENSE), tiny.tokenizer(), tmp_path / "base")
    model, samples = load_model(tmp_path / "base"), tiny.samples(LENGTHS)
    LoRA(rank=2, alpha=8).attach(model, seed=0)
    assert any("linear_attn" in n for n, _ in lora_layers(model))
    learner = Learner(model, AdamW(lr=0.05))
    before = {n: p.clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(4):
        losses.append(learner.forward_backward(samples, NLL())["loss"])
        learner.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(("lora_" in n) or torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        for sample, signal in zip(samples, learner.score(samples, 1.0, "logp"), strict=True):
            close(torch.from_numpy(signal.values), stock(model, sample))
    save_adapter(model, load_tokenizer(tmp_path / "base"), tmp_path / "adapter", Base.of(tmp_path / "base"))
    again = Learner(load_model(tmp_path / "adapter")).score(samples, 1.0, "logp")
    for a, b in zip(again, learner.score(samples, 1.0, "logp"), strict=True):
        assert abs(a.values - b.values).max() < 1e-5


def test_experts_that_peft_would_adapt_unasked_are_one_line():
    with pytest.raises(UserError, match=r"takes down_proj, gate_proj, up_proj of a qwen3_next.*set adapter.targets") as error:
        LoRA(rank=2).attach(tiny.model("hybrid"), seed=0)
    assert "\n" not in str(error.value)
    LoRA(rank=2, targets=("q_proj", "v_proj")).attach(tiny.model("hybrid"), seed=0)


def test_packed_and_padded_are_apart():
    assert not PACKED & PADDED
