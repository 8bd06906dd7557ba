"""The engine for models that cannot be packed, against `generate`, a full forward, the packed engine, and itself."""

import numpy as np
import pytest
import torch

from tests import tiny
from tests.model.test_padded import EVERY, PACKS, generic, stock
from tests.rollout.test_engine import PROMPTS, TASK, drain, requests
from tutelage.rollout.base import Sampling
from tutelage.rollout.local import LocalEngine, PaddedEngine, local_engine
from tutelage.text.template import reply_sample

DRAWN = [n for n in EVERY if n != "longrope"]


def run(model, slots=64, wanted=None, **how):
    engine = local_engine(model, tiny.tokenizer(), slots)
    assert isinstance(engine, PaddedEngine)
    return drain(engine, wanted or requests(Sampling(**{"max_new_tokens": 20, **how})))


def tokens(drawn):
    return [d.tokens.tolist() for d in drawn]


@pytest.mark.parametrize("name", EVERY)
def test_greedy_equals_generate(name):
    """Within the length at which angles change, where there is one: ``generate`` too keeps the old keys beyond it."""
    model, longest = generic(name), 2 if name == "longrope" else 20
    prompts = [p for p in PROMPTS if len(p) + longest <= 6 or name != "longrope"]
    wanted = [r for r in requests(Sampling(max_new_tokens=longest, temperature=0), 1) if r.tokens in prompts]
    for prompt, done in zip(prompts, run(model, wanted=wanted), strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=longest, do_sample=False, eos_token_id=1, pad_token_id=0, use_cache=True
        )
        assert done.tokens.tolist() == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", DRAWN)
def test_log_probs_equal_a_full_forward(name):
    model, wanted = generic(name), requests(Sampling(max_new_tokens=20, temperature=0.7))
    for r, done in zip(wanted, run(model, wanted=wanted), strict=True):
        sample = reply_sample(r.tokens, done.tokens.tolist(), TASK)
        with torch.no_grad():
            np.testing.assert_allclose(done.logp, stock(model, sample, 0.7).numpy(), atol=2e-5)


@pytest.mark.parametrize("how", [{}, {"top_p": 0.6, "top_k": 5}, {"stop": ("e",)}], ids=str)
@pytest.mark.parametrize("name", PACKS)
def test_both_engines_draw_the_same(name, how):
    model = tiny.model(name)
    wanted = requests(Sampling(max_new_tokens=12, **how))
    packed = drain(LocalEngine(model, tiny.tokenizer(), 8), wanted)
    padded = run(generic(name), slots=8, wanted=wanted)
    assert tokens(packed) == tokens(padded)
    for a, b in zip(packed, padded, strict=True):
        assert (a.stop, a.version) == (b.stop, b.version)
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
        np.testing.assert_allclose(a.kept_logp, b.kept_logp, atol=1e-5)


@pytest.mark.parametrize("name", ["hybrid", "undeclared"])
def test_a_sample_does_not_depend_on_slots_neighbours_or_order(name):
    model, wanted = generic(name), requests(Sampling(max_new_tokens=20))
    want = tokens(run(model, wanted=wanted))
    assert tokens(run(model, slots=3, wanted=wanted)) == want
    assert tokens(run(model, slots=5, wanted=wanted[::-1])) == want[::-1]
    assert tokens(run(model, slots=1, wanted=wanted[4:5])) == want[4:5]
    assert len({tuple(t) for t in want}) > len(PROMPTS)


@pytest.mark.parametrize(("name", "mixed"), [("hybrid", True), ("undeclared", False), ("longrope", False)])
def test_lengths_share_a_batch_only_where_that_is_declared_exact(name, mixed, monkeypatch):
    batches = []
    prefill = PaddedEngine._prefill
    monkeypatch.setattr(PaddedEngine, "_prefill", lambda self, p, s: batches.append(p) or prefill(self, p, s))
    drawn = run(generic(name), max_new_tokens=3)
    assert len(drawn) == 3 * len(PROMPTS)
    assert all(len(set(map(len, b))) == 1 for b in batches) != mixed
    assert len(batches) == (1 if mixed else len(set(map(len, PROMPTS))))


def test_requests_of_one_prompt_share_its_prefill_and_costs_do_not_know():
    engine = local_engine(generic("hybrid"), tiny.tokenizer(), 64)
    drawn = drain(engine, requests(Sampling(max_new_tokens=4), replicas=5))
    assert engine.prefilled == 5 * sum(map(len, PROMPTS))
    assert engine.sampled == sum(len(d.tokens) for d in drawn)


def test_finished_rows_leave_the_batch(monkeypatch):
    rows = []
    step = PaddedEngine._step
    monkeypatch.setattr(PaddedEngine, "_step", lambda self, t: rows.append(len(t)) or step(self, t))
    drawn = run(generic("hybrid"), stop=("e",))
    assert rows == [sum(len(d.tokens) > n for d in drawn) for n in range(1, max(len(d.tokens) for d in drawn))]
    assert rows[-1] < len(drawn)


def test_new_weights_reach_a_copy_in_another_precision():
    model = generic("hybrid").double()
    engine = local_engine(model, tiny.tokenizer(), 8, dtype="float32")
    assert isinstance(engine, PaddedEngine)
    greedy = requests(Sampling(max_new_tokens=8, temperature=0), 1)
    before = tokens(drain(engine, greedy))
    model.load_state_dict(tiny.model("hybrid", seed=1).double().state_dict())
    engine.load(None, 7)
    after = drain(engine, greedy)
    assert tokens(after) != before
    assert {d.version for d in after} == {7}
