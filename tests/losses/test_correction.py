"""Off-policy corrections against loops, and what each drops."""

import math

import pytest
import torch
from pydantic import ValidationError

from tests.losses.plain import case, noise, tokens
from tests.losses.test_policy_loss import policy_case
from tutelage.losses.cispo import CISPO
from tutelage.losses.correction import IcePop, SequenceMask, TruncatedIS
from tutelage.losses.gspo import GSPO
from tutelage.losses.kimi import Kimi
from tutelage.losses.policy import DAPO, GRPO
from tutelage.losses.reinforce import REINFORCE


def corrected_case(seed=0, **kwargs):
    """Sampler, trainer's start and present policy all differ."""
    c = policy_case(seed, **kwargs)
    c.batch.signals["prox_logp"] = c.logp + noise(c, 0.3, seed + 20)
    return c


def weight_loop(correction, found):
    ratios = [math.exp(t.signals["prox_logp"] - t.signals["behaviour_logp"]) for t in found]
    if type(correction) is TruncatedIS:
        return [max(correction.low, min(correction.high, r)) for r in ratios]
    return [r if correction.low <= r <= correction.high else 0.0 for r in ratios]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("correction", [TruncatedIS(high=1.2), IcePop(low=0.7, high=1.4), IcePop(low=0.0, high=1.4)])
def test_decoupled_value_and_gradient_are_the_naive_loop(correction, seed):
    """Nemotron 3 Ultra, Eq. 1-3: c_t min(r_t Â_t, clip(r_t) Â_t) with r_t = π_θ/π_prox."""
    c = corrected_case(seed, temperature=1.1)
    found, value, gradient = tokens(c), 0.0, []
    for t, w in zip(found, weight_loop(correction, found), strict=True):
        ratio, a = math.exp(t.logp - t.signals["prox_logp"]), t.signals["advantage"]
        cut = (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)
        value -= w * a * ((1.28 if a > 0 else 0.8) if cut else ratio)
        gradient.append([0.0 if cut else -w * a * ratio * g for g in t.score_function(c.temperature)])
    got, got_gradient, metrics = c.run(DAPO(correction=correction))
    assert got == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(got_gradient, torch.tensor(gradient, dtype=torch.float64))
    weights = weight_loop(correction, found)
    assert metrics["correction"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    assert metrics["discarded"] == pytest.approx(weights.count(0.0) / len(weights))


def test_bounds_drop_on_one_side_or_two_and_clamp_where_truncated():
    c = case(".xxxx")
    log_ratio = torch.tensor([math.log(x) for x in (0.49, 0.51, 4.9, 5.1)], dtype=torch.float64)
    c.batch.signals = {"behaviour_logp": c.logp, "prox_logp": c.logp + log_ratio, "advantage": torch.ones(4).double()}
    moves = lambda correction: c.run(REINFORCE(correction=correction))[1].any(1).tolist()  # noqa: E731
    assert moves(IcePop()) == [False, True, True, False]
    assert moves(IcePop(low=0.0)) == [True, True, True, False]
    assert moves(TruncatedIS()) == [True] * 4
    weight = TruncatedIS().weight(None, c.batch)
    torch.testing.assert_close(weight, torch.tensor([0.49, 0.51, 2.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_sequence_mask_drops_bad_replies_that_drifted_away(seed):
    c = policy_case(seed)
    c.batch.signals["advantage"] = torch.tensor([-1.0, 1.0, -1.0, -1.0]).double()[c.batch.trow]
    # rows 0 and 1 have become unlikelier by 0.6 a token on average, row 2 likelier, row 3 unlikelier by 0.4
    shift = torch.tensor([0.6, 0.6, -0.6, 0.4]).double()[c.batch.trow]
    wiggle = noise(c, 1.0, seed)
    means = torch.stack([wiggle[c.trained(r)].mean() for r in range(4)])[c.batch.trow]
    c.batch.signals["behaviour_logp"] = c.logp + shift + wiggle - means
    masked, free = c.run(GRPO(correction=SequenceMask(delta=0.5))), c.run(GRPO())
    assert not masked[1][c.trained(0)].any()
    torch.testing.assert_close(masked[1][c.trained(1, 2, 3)], free[1][c.trained(1, 2, 3)])  # the ratio is the plain one
    assert free[1][c.trained(0)].any()
    assert masked[2]["discarded"] == pytest.approx(3 / 16)


@pytest.mark.parametrize("loss", [DAPO, GRPO, GSPO, CISPO, Kimi, REINFORCE])
def test_a_correction_is_one_where_sampler_and_trainer_agree(loss):
    c = policy_case(1)
    c.batch.signals["prox_logp"] = c.batch.signals["behaviour_logp"]
    plain = c.run(loss())
    for correction in (TruncatedIS(), IcePop(), SequenceMask(delta=5.0)):
        value, gradient, metrics = c.run(loss(correction=correction))
        assert value == pytest.approx(plain[0], rel=1e-12)
        torch.testing.assert_close(gradient, plain[1])
        assert (metrics["correction"], metrics["discarded"]) == (1, 0)


@pytest.mark.parametrize("loss", [DAPO, GSPO, CISPO, Kimi, REINFORCE])
def test_a_correction_weighs_any_loss(loss):
    """A constant gap between sampler and trainer weighs every token by the same number."""
    c = policy_case(2)
    c.batch.signals["prox_logp"] = c.batch.signals["behaviour_logp"]
    plain = c.run(loss())[1]
    c.batch.signals["behaviour_logp"] = c.batch.signals["prox_logp"] - math.log(1.5)
    torch.testing.assert_close(c.run(loss(correction=TruncatedIS()))[1], 1.5 * plain)


def test_trap_clip_and_gap_are_told_apart_only_by_the_trainers_own_start():
    """The sampler is off by a factor of 2 and nothing has been learned yet: the coupled clip silences the token."""
    c = case(".x")
    c.batch.signals = {"behaviour_logp": c.logp - math.log(2), "prox_logp": c.logp, "advantage": torch.ones(1).double()}
    assert not c.run(DAPO())[1].any()
    expected = torch.tensor(tokens(c)[0].score_function(1.0), dtype=torch.float64) * -2
    torch.testing.assert_close(c.run(DAPO(correction=TruncatedIS()))[1][0], expected)


def test_trap_a_dropped_overflow_is_zero_not_nan():
    c = case(".xx", dtype=torch.float32)
    c.batch.signals = {"behaviour_logp": c.logp - 300, "prox_logp": c.logp, "advantage": torch.ones(2)}
    for correction in (IcePop(), TruncatedIS()):
        value, gradient, metrics = c.run(DAPO(correction=correction))
        assert math.isfinite(value)
        assert gradient.isfinite().all()
        assert all(math.isfinite(m) for m in metrics.values())


def test_expected_gradient_under_the_sampler_is_the_policys_own():
    """Every token of one context once, weighted by the sampler's probability: importance weights make it exact."""
    vocab = 7
    logits, sampler = case(".x", vocab=vocab, seed=4).logits, case(".x", vocab=vocab, seed=5).logits.log_softmax(-1)[0]
    reward = torch.linspace(-1, 1, vocab, dtype=torch.float64)
    c = case(*[".x"] * vocab, vocab=vocab)
    c.batch.tokens[c.batch.index] = torch.arange(vocab)
    c.logits = logits.expand(vocab, -1)
    c.batch.signals = {"behaviour_logp": sampler, "prox_logp": c.logp, "advantage": reward}
    gradients = c.run(REINFORCE(correction=TruncatedIS(high=1e6)))[1]
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-(leaf.softmax(-1) @ reward).sum(), leaf)
    torch.testing.assert_close((sampler.exp()[:, None] * gradients).sum(0, keepdim=True), expected)
    uncorrected = (sampler.exp()[:, None] * c.run(REINFORCE())[1]).sum(0, keepdim=True)
    assert not torch.allclose(uncorrected, expected, atol=1e-2)


def test_needs_the_trainers_start_only_where_it_counts():
    assert "prox_logp" not in DAPO().needs()
    assert "prox_logp" not in DAPO(correction=SequenceMask()).needs()
    assert "prox_logp" in DAPO(correction=TruncatedIS()).needs()
    assert "prox_logp" in GSPO(correction=IcePop()).needs()


def test_published_defaults_and_nonsense():
    assert (TruncatedIS().low, TruncatedIS().high) == (0.0, 2.0)
    assert (IcePop().low, IcePop().high) == (0.5, 5.0)
    for bad in (lambda: TruncatedIS(low=3.0), lambda: IcePop(high=0.0), lambda: SequenceMask(delta=0.0)):
        with pytest.raises(ValidationError):
            bad()
    with pytest.raises(ValidationError, match="kept_mask and IcePop exclude each other"):
        DAPO(kept_mask=True, correction=IcePop())
