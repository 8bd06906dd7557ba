"""The learner: global normalisation, chunks, the shift, and teacher = student end to end."""

import asyncio

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tutelage.credit.base import CreditContext
from tutelage.credit.teacher import Teacher, distinct
from tutelage.learn import output as learning
from tutelage.learn.batch import collate, split
from tutelage.learn.learner import Learner, ModelScorer
from tutelage.learn.optim import AdamW, Muon, Schedule
from tutelage.losses.distill import FullReverseKL, SampledReverseKL
from tutelage.losses.nll import NLL
from tutelage.losses.top_k import TailReverseKL
from tutelage.spec import UserError
from tutelage.types import Signal

LENGTHS = [9, 3, 14, 5, 7]


def gradient(model, samples, loss, **how):
    learner = Learner(model, AdamW(), **how)
    model.zero_grad()
    metrics = learner.forward_backward(samples, loss)
    return metrics, {n: p.grad.clone() for n, p in model.named_parameters()}


def test_nll_equals_the_librarys_loss_and_gradient():
    model, samples = tiny.model(), tiny.samples(LENGTHS)
    metrics, grads = gradient(model, samples, NLL())
    model.zero_grad()
    total = 0
    for s in samples:
        logits = model(input_ids=torch.from_numpy(s.tokens)[None], layout=_alone(s)).logits[0]
        total = total + F.cross_entropy(logits[1:-1], torch.from_numpy(s.tokens[2:]), reduction="sum")
    loss = total / sum(n - 2 for n in LENGTHS)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for n, p in model.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, atol=1e-6, rtol=1e-4, msg=n)


def _alone(sample):
    from tutelage.model.attention import Rows

    return Rows(torch.tensor([len(sample.tokens)]))


def test_micro_batches_and_chunks_cannot_change_a_result(monkeypatch):
    model, samples = tiny.model(), tiny.samples(LENGTHS)
    want_metrics, want = gradient(model, samples, NLL())
    monkeypatch.setattr(learning, "CHUNK", tiny.VOCAB * 3)
    metrics, grads = gradient(model, samples, NLL(), micro_tokens=10)
    assert metrics == pytest.approx(want_metrics, rel=1e-5)
    for n, g in grads.items():
        torch.testing.assert_close(g, want[n], atol=1e-6, rtol=1e-4, msg=n)


def test_split_keeps_every_sample_once_and_bounds_tokens():
    samples = tiny.samples([5, 30, 2, 9, 9, 1, 14])
    parts = split(samples, 16)
    assert sorted(id(s) for p in parts for s in p) == sorted(id(s) for s in samples)
    assert all(sum(len(s.tokens) for s in p) <= 16 or len(p) == 1 for p in parts)


def test_a_trained_first_token_and_a_missing_signal_are_refused():
    sample = tiny.samples([4])[0]
    with pytest.raises(ValueError, match="no signal 'teacher_logp'"):
        collate([sample], ["teacher_logp"])
    sample.mask[0] = True
    with pytest.raises(ValueError, match="first token"):
        collate([sample])


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.1), Muon(lr=0.1)])
@pytest.mark.parametrize(
    ("loss", "want"), [(FullReverseKL(), "hidden"), (SampledReverseKL(), "logp"), (TailReverseKL(), "topk")]
)
def test_a_teacher_equal_to_the_student_moves_no_parameter(loss, want, optimizer):
    model = tiny.model()
    learner, samples = Learner(model, optimizer), tiny.samples(LENGTHS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    metrics = distil(learner, samples, loss, want, tiny.model())
    assert metrics["kl"] == 0.0
    assert learner.step()["grad_norm"] == 0.0
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]), n


@pytest.mark.parametrize(("loss", "want"), [(FullReverseKL(), "hidden"), (SampledReverseKL(), "logp")])
def test_another_teacher_does_move_them(loss, want):
    learner, samples = Learner(tiny.model(), AdamW()), tiny.samples(LENGTHS)
    distil(learner, samples, loss, want, tiny.model(seed=3))
    assert learner.step()["grad_norm"] > 1e-3


def distil(learner, samples, loss, want, teacher, temperature=0.8):
    """One step of distillation with one teacher for both domains."""
    scorer = ModelScorer("teacher", teacher)
    context = CreditContext(temperature, {"d0": scorer, "d1": scorer})
    for s, signal in zip(samples, learner.score(samples, temperature, "logp"), strict=True):
        s.signals["behaviour_logp"] = Signal(signal.values, s.trained, {"temperature": temperature})
    kept, _ = asyncio.run(Teacher(want=want, k=8).assign(samples, context))
    heads = tuple(s.head for s in distinct(context.teachers))
    return learner.forward_backward(kept, loss, temperature, {"teacher_heads": heads})


def test_the_top_k_is_that_of_the_whole_distribution(monkeypatch):
    model, samples = tiny.model(), tiny.samples(LENGTHS)
    monkeypatch.setattr(learning, "CHUNK", tiny.VOCAB * 3)
    pairs = Learner(model).topk(samples, 0.8, 5)
    for s, (ids, logps) in zip(samples, pairs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(s.tokens)[None], layout=_alone(s)).logits[0, s.trained - 1]
        p = (logits / 0.8).softmax(-1)
        best = p.sort(descending=True)
        assert np.array_equal(ids.values, best.indices[:, :5])
        np.testing.assert_allclose(np.exp(logps.values[:, :5]), best.values[:, :5], rtol=1e-4)
        np.testing.assert_allclose(np.exp(logps.values[:, 5]), 1 - best.values[:, :5].sum(-1), rtol=1e-3, atol=1e-6)
        assert ids.provenance["temperature"] == logps.provenance["temperature"] == 0.8
    with pytest.raises(UserError, match="smaller k"):
        Learner(model).topk(samples, 0.8, tiny.VOCAB)


def test_full_vocabulary_kl_equals_a_naive_loop():
    student, teacher, samples = tiny.model(), tiny.model(seed=3), tiny.samples(LENGTHS)
    metrics = distil(Learner(student), samples, FullReverseKL(), "hidden", teacher)
    total = n = 0
    with torch.no_grad():
        for s in samples:
            ids, layout = torch.from_numpy(s.tokens)[None], _alone(s)
            p, q = ((m(input_ids=ids, layout=layout).logits[0] / 0.8).log_softmax(-1) for m in (student, teacher))
            for t in s.trained:
                total += float((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum())
                n += 1
    assert metrics["kl"] == pytest.approx(total / n, rel=1e-4)


def test_muon_takes_only_the_matrices_inside_the_layers():
    model = tiny.model()
    muon, adam = Muon().build(model)
    inside = {id(p) for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n}
    assert {id(p) for g in muon.param_groups for p in g["params"]} == inside
    count = sum(len(g["params"]) for o in (muon, adam) for g in o.param_groups)
    assert count == len(list(model.parameters()))


def test_state_resumes_to_the_same_bits():
    def trained(stop_at):
        learner, samples = Learner(tiny.model(), Muon()), tiny.samples(LENGTHS)
        for step in range(4):
            if step == stop_at:
                state = learner.state()
                learner = Learner(tiny.model(seed=5), Muon())
                learner.restore(state)
            learner.forward_backward(samples, NLL())
            learner.step()
        return learner.model.state_dict()

    want = trained(None)
    for n, p in trained(2).items():
        assert torch.equal(p, want[n]), n


def test_schedules_are_their_closed_forms():
    assert [Schedule(warmup=4).factor(s, 10) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = Schedule(shape="linear", floor=0.1)
    assert linear.factor(0, 10) == 1.0
    assert linear.factor(5, 10) == pytest.approx(0.55)
    cosine = [Schedule(shape="cosine").factor(s, 8) for s in range(9)]
    assert cosine == pytest.approx([0.5 * (1 + np.cos(np.pi * s / 8)) for s in range(9)])


def test_a_step_with_an_infinite_gradient_changes_nothing_is_told_and_does_not_go_on_for_ever():
    learner = Learner(tiny.model(), AdamW())
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}

    def step():
        for p in learner.model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        return learner.step()

    assert [step()["skipped"] for _ in range(9)] == [1.0] * 9
    with pytest.raises(UserError, match="10 times in a row"):
        step()
    assert all(torch.equal(p, before[n]) for n, p in learner.model.named_parameters())


def test_a_padded_vocabulary_is_cut_before_the_softmax():
    """The trap of 151,936 against 152,064: rows past the tokenizer's size take no part."""
    samples, narrow = tiny.samples(LENGTHS), tiny.model()
    padded = tiny.model(vocab_size=tiny.VOCAB + 9)
    state = padded.state_dict()
    for name, value in narrow.state_dict().items():
        state[name][: len(value)] = value
    state["lm_head.weight"][tiny.VOCAB :] = 3.0  # heavy padding would show
    padded.load_state_dict(state)
    want = Learner(narrow).score(samples, 1.0, "logp")
    for cut, same in ((tiny.VOCAB, True), (None, False)):
        mine = Learner(padded, vocab=cut).score(samples, 1.0, "logp")
        close = all(np.allclose(a.values, b.values, atol=1e-5) for a, b in zip(mine, want, strict=True))
        assert close is same
