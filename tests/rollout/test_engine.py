"""The local engine against transformers' `generate`, a full forward, and itself under other schedules."""

import numpy as np
import pytest
import torch

from tests import tiny
from tutelage.learn.learner import Learner
from tutelage.model.attention import register
from tutelage.rollout.base import Request, Sampling
from tutelage.rollout.local import LocalEngine
from tutelage.rollout.slots import order_after
from tutelage.text.template import reply_sample
from tutelage.types import Task

TASK = Task("t", "d", ())
PROMPTS = [(2, *range(6, 6 + n), 3) for n in (1, 4, 9, 2, 6)]


def requests(sampling, replicas=3):
    return [Request(p, sampling, 1000 * i + r, frozenset([1])) for i, p in enumerate(PROMPTS) for r in range(replicas)]


def drain(engine, wanted):
    futures = [engine.submit(r) for r in wanted]
    while engine.pump():
        pass
    return [f.result() for f in futures]


def run(name="llama", slots=8, wanted=None, model=None, **how):
    model = model or tiny.model(name)
    return drain(LocalEngine(model, tiny.tokenizer(), slots), wanted or requests(Sampling(max_new_tokens=20, **how)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_greedy_equals_generate(name):
    model = tiny.model(name)
    drawn = run(model=model, wanted=requests(Sampling(max_new_tokens=20, temperature=0), 1), slots=2)
    model.set_attn_implementation("eager")
    for prompt, done in zip(PROMPTS, drawn, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=1, pad_token_id=0)
        assert done.tokens.tolist() == out[0, len(prompt) :].tolist()
    model.set_attn_implementation(register())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_a_full_forward(name, temperature):
    """DESIGN's bound for a tiny model at fp32: 1e-5."""
    model = tiny.model(name)
    wanted = requests(Sampling(max_new_tokens=20, temperature=temperature))
    drawn = run(model=model, wanted=wanted)
    samples = [reply_sample(r.tokens, d.tokens.tolist(), TASK) for r, d in zip(wanted, drawn, strict=True)]
    scored = Learner(model).score(samples, temperature, "logp")
    assert max(np.abs(s.values - d.logp).max() for s, d in zip(scored, drawn, strict=True)) < 1e-5
    wrong = Learner(model).score(samples, temperature + 0.1, "logp")  # the trap: another temperature
    assert max(np.abs(s.values - d.logp).max() for s, d in zip(wrong, drawn, strict=True)) > 1e-3


def test_a_sample_does_not_depend_on_slots_neighbours_or_order():
    wanted = requests(Sampling(max_new_tokens=20))
    want = [d.tokens.tolist() for d in run(wanted=wanted, slots=64)]
    assert [d.tokens.tolist() for d in run(wanted=wanted, slots=3)] == want
    assert [d.tokens.tolist() for d in run(wanted=wanted[::-1], slots=5)] == want[::-1]
    assert [d.tokens.tolist() for d in run(wanted=wanted[4:5], slots=1)] == want[4:5]
    assert len({tuple(t) for t in want}) > len(PROMPTS)  # replicas differ


def test_groups_share_one_prefill_and_costs_do_not_know(monkeypatch):
    """Compute is algorithmic: neither the sharing nor the number of slots may change what is booked."""
    for slots in (64, 3):
        engine, lengths = LocalEngine(tiny.model(), tiny.tokenizer(), slots), []
        forward = engine._forward
        monkeypatch.setattr(engine, "_forward", lambda ids, *how, f=forward, n=lengths: n.append(len(ids)) or f(ids, *how))
        drain(engine, requests(Sampling(max_new_tokens=4), replicas=5))
        assert engine.prefilled == 5 * sum(map(len, PROMPTS))
        if slots == 64:
            assert lengths[0] == sum(map(len, PROMPTS))


def test_truncated_sampling_keeps_both_log_probs():
    done = run(top_p=0.6, top_k=5)
    assert all((d.kept_logp >= d.logp - 1e-6).all() for d in done)
    assert any((d.kept_logp > d.logp + 1e-3).any() for d in done)
    whole = run()
    assert all(np.array_equal(d.kept_logp, d.logp) for d in whole)


def test_stop_strings_and_lengths():
    drawn = run(stop=("e",))
    texts = [tiny.tokenizer().decode(d.tokens, skip_special_tokens=True) for d in drawn]
    for d, text in zip(drawn, texts, strict=True):
        assert ("e" in text[-1:] or d.tokens[-1] == 1) == (d.stop == "stop")
        assert "e" not in text[:-1]
        assert len(d.tokens) == 20 or (d.stop == "stop" and len(d.tokens) < 20)
    assert {d.stop for d in drawn} == {"stop", "length"}


def test_weights_change_only_when_drained():
    engine = LocalEngine(tiny.model(), tiny.tokenizer(), 4)
    engine.submit(requests(Sampling())[0])
    with pytest.raises(RuntimeError, match="drained"):
        engine.load(None, 1)


def test_new_weights_reach_a_copy_in_another_precision():
    model, other = tiny.model(seed=0), tiny.model(seed=1)
    engine = LocalEngine(model, tiny.tokenizer(), 8, dtype="bfloat16")
    assert engine.model is not model
    assert engine.model.dtype == torch.bfloat16
    greedy = requests(Sampling(max_new_tokens=8, temperature=0), 1)
    before = [d.tokens.tolist() for d in drain(engine, greedy)]
    model.load_state_dict(other.state_dict())
    engine.load(None, 7)
    after = drain(engine, greedy)
    assert [d.tokens.tolist() for d in after] != before
    assert {d.version for d in after} == {7}


def test_compaction_fills_holes_from_behind():
    assert order_after([0, 2, 3]) == [0, 3, 2]
    assert order_after([1, 2]) == [2, 1]
    assert order_after([]) == []
