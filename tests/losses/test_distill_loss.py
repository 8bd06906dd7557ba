import math

import pytest
import torch
from pydantic import ValidationError

from tests.losses.plain import PlainOutput, case, length_weights, noise, probabilities, tokens
from tutelage.losses.distill import FullReverseKL, SampledReverseKL
from tutelage.types import Batch


class LinearHead:
    """``head(hidden [m, width]) -> logits [m, V]``"""

    def __init__(self, width, vocab, seed, dtype=torch.float64):
        rng = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(vocab, width, generator=rng, dtype=torch.float64).to(dtype)
        self.width = width

    def __call__(self, hidden):
        assert hidden.shape[1] == self.width
        return hidden @ self.weight.T


# --- sampled token ---------------------------------------------------------------------------------------------------


def sampled_case(seed=0, gap=1.0, off=0.4, **kwargs):
    c = case(seed=seed, **kwargs)
    c.batch.signals = {
        "teacher_logp": c.logp + noise(c, gap, seed),
        "behaviour_logp": c.logp + noise(c, off, seed + 50),
        "advantage": noise(c, 1.0, seed + 80),
    }
    return c


def oracle(c, clip, low, high, alpha):
    """MiMo Eq. 8-9 by loops: (sum, gradient, share discarded, share clipped)."""
    found, total, gradient, discarded, clipped = tokens(c), 0.0, [], 0, 0
    for t, share in zip(found, length_weights(found), strict=True):
        w = math.exp(t.logp - t.signals["behaviour_logp"])
        if not low <= w <= high:
            w, discarded = 0.0, discarded + 1
        gap = t.signals["teacher_logp"] - t.logp
        a = max(-clip, min(clip, gap))
        clipped += a != gap
        a += alpha * t.signals["advantage"]
        total -= share * w * a * t.logp
        gradient.append([-share * w * a * g for g in t.score_function(c.temperature)])
    return total, torch.tensor(gradient, dtype=torch.float64), discarded / len(found), clipped / len(found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("clip", "low", "high", "alpha"), [(5.0, 0.2, 5.0, 0.0), (0.5, 0.7, 1.4, 0.0), (1.0, 0.7, 1.4, 0.3)])
def test_sampled_value_and_gradient_are_the_naive_loop(clip, low, high, alpha, seed):
    c = sampled_case(seed, temperature=0.8)
    loss = SampledReverseKL(advantage_clip=clip, weight_low=low, weight_high=high, alpha=alpha)
    expected, expected_gradient, discarded, clipped = oracle(c, clip, low, high, alpha)
    value, gradient, metrics = c.run(loss)
    assert value == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(gradient, expected_gradient)
    assert metrics["discarded"] == pytest.approx(discarded)
    assert metrics["clip_fraction"] == pytest.approx(clipped)
    assert metrics["kl"] == pytest.approx(float((c.logp - c.batch.signals["teacher_logp"]).mean()), rel=1e-5)
    if low > 0.5:
        assert 0 < discarded < 1  # the bounds were at work
        assert 0 < clipped < 1


def test_published_defaults():
    loss = SampledReverseKL()
    assert (loss.per, loss.advantage_clip, loss.weight_low, loss.weight_high, loss.alpha) == ("rows", 5.0, 0.2, 5.0, 0.0)


def test_no_clip_where_none_is_asked():
    c = case(".x")
    c.batch.signals = {"behaviour_logp": c.logp, "teacher_logp": c.logp - 30}
    free, held = c.run(SampledReverseKL(advantage_clip=None))[1], c.run(SampledReverseKL())[1]
    torch.testing.assert_close(free, held * 6)


def test_needs_the_advantage_only_when_it_counts():
    assert SampledReverseKL().needs() == {"teacher_logp", "behaviour_logp"}
    assert SampledReverseKL(alpha=0.5).needs() == {"teacher_logp", "behaviour_logp", "advantage"}
    c = sampled_case(1)
    del c.batch.signals["advantage"]
    c.run(SampledReverseKL())
    with pytest.raises(KeyError):
        c.run(SampledReverseKL(alpha=0.5))


@pytest.mark.parametrize("bad", [{"advantage_clip": 0.0}, {"weight_low": -1.0}, {"weight_high": 0.0}, {"beta": 1.0}])
def test_nonsense_is_rejected(bad):
    with pytest.raises(ValidationError):
        SampledReverseKL(**bad)


def test_trap_weights_out_of_bounds_are_discarded_not_clamped():
    c = case(".xx", ".xx")
    log_ratio = torch.tensor([math.log(5.01), math.log(4.99), math.log(0.199), math.log(0.201)], dtype=torch.float64)
    c.batch.signals = {"behaviour_logp": c.logp - log_ratio, "teacher_logp": c.logp + 1}
    _, gradient, metrics = c.run(SampledReverseKL())
    assert gradient.any(1).tolist() == [False, True, False, True]
    assert metrics["discarded"] == 0.5


def test_trap_weight_carries_no_gradient():
    """With the gradient of w_t left in, d(w log π) = w (1 + log π) dlogπ instead of w dlogπ."""
    c = case(".x")
    c.batch.signals = {"behaviour_logp": c.logp - 0.5, "teacher_logp": c.logp + 2}
    expected = torch.tensor(tokens(c)[0].score_function(1.0), dtype=torch.float64) * -math.exp(0.5) * 2
    torch.testing.assert_close(c.run(SampledReverseKL())[1][0], expected)


def test_trap_discarded_overflow_is_zero_not_nan():
    c = case(".xx", dtype=torch.float32)
    c.batch.signals = {"behaviour_logp": c.logp - torch.tensor([200.0, 0.0]), "teacher_logp": c.logp.clone()}
    assert (c.logp - c.batch.signals["behaviour_logp"]).exp().mul(0).isnan().any()  # a mask times the ratio would be NaN
    value, gradient, metrics = c.run(SampledReverseKL())
    assert value == 0
    assert not gradient.any()
    assert all(math.isfinite(m) for m in metrics.values())


def test_trap_teacher_equal_to_student_moves_nothing():
    c = sampled_case(2, dtype=torch.float32)
    c.batch.signals["teacher_logp"] = c.logp
    weights = torch.nn.Parameter(c.logits.clone())
    optimizer = torch.optim.Adam([weights], lr=0.1)
    loss, metrics = SampledReverseKL()(PlainOutput(weights, c.batch.tokens[c.batch.index]), c.batch)
    loss.backward()
    optimizer.step()
    assert metrics["kl"][0] == 0
    assert not weights.grad.any()
    assert torch.equal(weights, c.logits)


def test_trap_teacher_term_is_not_batch_normalised():
    c = sampled_case(3)
    before = c.run(SampledReverseKL(advantage_clip=None))[1]
    gap = c.batch.signals["teacher_logp"] - c.logp
    shifted = c.rows(0, 1, 2, 3)
    shifted.batch.signals["teacher_logp"] = c.batch.signals["teacher_logp"] + 3.0 * c.trained(0)
    after = shifted.run(SampledReverseKL(advantage_clip=None))[1]
    assert torch.equal(after[c.trained(1, 2, 3)], before[c.trained(1, 2, 3)])  # no mean over the batch
    assert not torch.equal(after[c.trained(0)], before[c.trained(0)])
    doubled = c.rows(0, 1, 2, 3)
    doubled.batch.signals["teacher_logp"] = c.logp + 2 * gap
    torch.testing.assert_close(doubled.run(SampledReverseKL(advantage_clip=None))[1], 2 * before)  # no division by a std


def test_trap_students_own_logprob_is_in_the_advantage():
    """Both below 0: the bare teacher log-prob would push every token down; the difference lifts where the teacher is surer."""
    c = case(".xx")
    signs = torch.tensor([0.1, -0.1], dtype=torch.float64)
    c.batch.signals = {"behaviour_logp": c.logp, "teacher_logp": c.logp + signs}
    assert (c.batch.signals["teacher_logp"] < 0).all()
    gradient = c.run(SampledReverseKL())[1]
    chosen = gradient.gather(1, c.batch.tokens[c.batch.index][:, None]).squeeze(1)
    assert chosen[0] < 0 < chosen[1]  # descending raises the first logit and lowers the second


def test_trap_advantage_is_of_the_present_student_not_of_the_sampler():
    c = case(".xx")
    c.batch.signals = {"behaviour_logp": c.logp - 0.3, "teacher_logp": c.logp.clone()}
    assert not c.run(SampledReverseKL())[1].any()  # teacher == present student, whatever the sampler was


def test_expected_sampled_gradient_is_that_of_the_full_reverse_kl():
    """One context, every token of the vocabulary sampled once from a uniform μ: the weights make the expectation exact."""
    vocab = 7
    logits = case(".x", vocab=vocab, seed=4).logits
    teacher = case(".x", vocab=vocab, seed=5).logits
    n = torch.arange(vocab)
    batch = Batch(tokens=n, row=n, pos=n * 0, index=n, trow=n, counts={"rows": vocab, "tokens": vocab})
    batch.signals = {
        "teacher_logp": teacher[0].log_softmax(-1),
        "behaviour_logp": torch.full((vocab,), -math.log(vocab), dtype=torch.float64),
    }
    leaf = logits.clone().requires_grad_()
    loss = SampledReverseKL(advantage_clip=None, weight_low=0.0, weight_high=1e9)
    total, _ = loss(PlainOutput(leaf.expand(vocab, -1), n), batch)
    (sampled,) = torch.autograd.grad(total / vocab, leaf)
    p, q = leaf.softmax(-1), teacher.softmax(-1)
    (full,) = torch.autograd.grad((p * (p / q).log()).sum(), leaf)
    torch.testing.assert_close(sampled, full)


# --- full vocabulary -------------------------------------------------------------------------------------------------


def full_case(seed=0, widths=(6, 4), vocab=11, temperature=1.0, dtype=torch.float64):
    """Rows alternate between teachers of different width; hidden states padded with zeros to the widest."""
    c = case(seed=seed, vocab=vocab, temperature=temperature, dtype=dtype)
    rng = torch.Generator().manual_seed(seed + 99)
    m = len(c.logits)
    hidden = torch.randn(m, max(widths), generator=rng, dtype=torch.float64).to(dtype)
    teacher = c.batch.trow % len(widths)
    for i, width in enumerate(widths):
        hidden[teacher == i, width:] = 0
    c.batch.signals = {"teacher_hidden": hidden, "teacher": teacher}
    heads = tuple(LinearHead(w, vocab, seed + i, dtype) for i, w in enumerate(widths))
    c.batch.extras = {"teacher_heads": heads, "temperature": temperature}
    return c


def teacher_logits(c):
    """[M, V] by a loop over tokens."""
    heads, s = c.batch.extras["teacher_heads"], c.batch.signals
    picked = [heads[int(t)] for t in s["teacher"]]
    return torch.stack([h.weight @ x[: h.width] for h, x in zip(picked, s["teacher_hidden"], strict=True)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_full_value_and_gradient_are_the_naive_loop(seed, temperature):
    c = full_case(seed, temperature=temperature)
    total, expected_gradient = 0.0, []
    for token, logits in zip(tokens(c), teacher_logits(c).tolist(), strict=True):
        q = probabilities(logits, temperature)
        logs = [math.log(a / b) for a, b in zip(token.p, q, strict=True)]
        kl = sum(a * log for a, log in zip(token.p, logs, strict=True))
        total += kl
        expected_gradient.append([a * (log - kl) / temperature for a, log in zip(token.p, logs, strict=True)])
    value, gradient, metrics = c.run(FullReverseKL())
    assert value == pytest.approx(total, rel=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(expected_gradient, dtype=torch.float64))
    assert metrics["kl"] == pytest.approx(total / len(c.logits), rel=1e-5)
    entropies = [-sum(p * math.log(p) for p in t.p) for t in tokens(c)]
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_chunks_do_not_change_it(chunk):
    c = full_case(1)
    value, gradient, _ = c.run(FullReverseKL())
    c.chunk = chunk
    assert c.run(FullReverseKL())[0] == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(c.run(FullReverseKL())[1], gradient)


def test_teacher_absent_from_a_micro_batch_is_not_asked():
    c = full_case(2)
    c.batch.extras["teacher_heads"] = (c.batch.extras["teacher_heads"][0], None)
    c.rows(0, 2).run(FullReverseKL())


def test_trap_full_kl_is_never_negative_and_zero_only_at_the_teacher():
    c = full_case(3)
    c.logits = teacher_logits(c)
    value, gradient, _ = c.run(FullReverseKL())
    assert value == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-14
    for seed in range(20):
        moved = full_case(3)
        moved.logits = c.logits + 10.0 ** -(seed % 4) * case(seed=seed).logits
        assert moved.run(FullReverseKL())[0] > 1e-8


def test_trap_full_kl_gradient_is_exactly_zero_at_equality():
    """In fp32 the naive form leaves p − p·Σp, which rounds to something else than zero; Adam would make a step of it."""
    c = full_case(4, vocab=501, widths=(6,), dtype=torch.float32)
    c.chunk = 100  # another chunk is another matmul, which may round otherwise
    c.logits = c.batch.extras["teacher_heads"][0](c.batch.signals["teacher_hidden"])
    assert not c.run(FullReverseKL())[1].any()
    leaf = c.logits.clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    naive = (logp.exp() * (logp - c.logits.log_softmax(-1))).sum()
    assert torch.autograd.grad(naive, leaf)[0].any()


def test_trap_full_kl_of_another_temperature_is_not_zero():
    c = full_case(5, temperature=0.7)
    c.logits = teacher_logits(c)
    assert c.run(FullReverseKL())[0] == pytest.approx(0, abs=1e-12)
    c.batch.extras["temperature"] = 1.0
    assert c.run(FullReverseKL())[0] > 0.1


def test_trap_padded_vocabulary_is_an_error_and_cutting_it_the_cure():
    c = full_case(6, widths=(6,))
    true = c.batch.extras["teacher_heads"][0]
    c.logits = teacher_logits(c)
    padded = LinearHead(6, 13, seed=6)
    padded.weight[:11] = true.weight
    c.batch.extras["teacher_heads"] = (padded,)
    with pytest.raises(ValueError, match=r"11 entries and the teacher's 13.*true vocabulary"):
        c.run(FullReverseKL())
    uncut = padded(c.batch.signals["teacher_hidden"]).log_softmax(-1)[:, :11]
    assert (uncut - c.logits.log_softmax(-1)).abs().max() > 0.01  # normalising before the cut is wrong
    padded.weight = padded.weight[:11]
    assert c.run(FullReverseKL())[0] == pytest.approx(0, abs=1e-12)


def test_teacher_receives_no_gradient():
    c = full_case(7, widths=(6,))
    head = c.batch.extras["teacher_heads"][0]
    head.weight.requires_grad_()
    total, _ = FullReverseKL()(PlainOutput(c.logits.clone().requires_grad_(), c.batch.tokens[c.batch.index]), c.batch)
    total.backward()
    assert head.weight.grad is None


def test_bf16_softmax_loses_a_small_kl_that_this_form_keeps():
    """A KL of about 4e-5 per token: the naive bf16 form is off by more than its value, ours by less than 1 %."""
    c = full_case(8, vocab=501, widths=(16,), dtype=torch.float32)
    teacher = teacher_logits(c)
    c.logits = teacher + 0.01 * case(vocab=501, seed=9).logits.float()
    exact = teacher.double().log_softmax(-1)
    student = c.logits.double().log_softmax(-1)
    kl = (student.exp() * (student - exact)).sum().item()
    s, t = c.logits.bfloat16().log_softmax(-1), teacher.bfloat16().log_softmax(-1)
    assert abs((s.exp() * (s - t)).sum().item() - kl) > kl
    assert c.run(FullReverseKL())[0] == pytest.approx(kl, rel=0.01)


def test_full_needs_hidden_states_and_the_teachers_index():
    assert FullReverseKL().needs() == {"teacher_hidden", "teacher"}
    assert FullReverseKL().per == "tokens"
