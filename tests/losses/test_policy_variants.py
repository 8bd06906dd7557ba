"""GSPO, CISPO, Kimi, Dr. GRPO and REINFORCE against loops, values and gradients; and what sets each apart."""

import math

import pytest
import torch
from pydantic import ValidationError

from tests.losses.plain import case, length_weights, noise, tokens
from tests.losses.test_policy_loss import policy_case
from tutelage.losses.cispo import CISPO
from tutelage.losses.dr_grpo import DrGRPO
from tutelage.losses.gspo import GSPO, GSPOToken
from tutelage.losses.kimi import Kimi
from tutelage.losses.policy import DAPO, GRPO
from tutelage.losses.reinforce import REINFORCE


def log_ratios(found):
    return [t.logp - t.signals["behaviour_logp"] for t in found]


def by_row(found, values):
    """The mean over each token's row."""
    rows = [t.row for t in found]
    means = {r: sum(v for v, q in zip(values, rows, strict=True) if q == r) / rows.count(r) for r in set(rows)}
    return [means[r] for r in rows]


def compare(c, loss, value, coefficients):
    """``coefficients``: of each token's score function in the gradient of the sum."""
    expected = [[k * g for g in t.score_function(c.temperature)] for t, k in zip(tokens(c), coefficients, strict=True)]
    found, gradient, metrics = c.run(loss)
    assert found == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))
    return metrics


def clipped(ratio, a, low, high):
    """(value, whether the bound stops the gradient) of PPO's min."""
    cut = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
    return a * ((1 + high if a > 0 else 1 - low) if cut else ratio), cut


# --- GSPO ------------------------------------------------------------------------------------------------------------


def gspo_loop(c, low, high):
    found = tokens(c)
    ratios = [math.exp(m) for m in by_row(found, log_ratios(found))]
    gains = [clipped(s, t.signals["advantage"], low, high) for s, t in zip(ratios, found, strict=True)]
    weights = length_weights(found)
    value = -sum(w * v for w, (v, _) in zip(weights, gains, strict=True))
    # how much the sum falls with each token's own gain, where that is not clipped
    through = [0.0 if cut else -w * v for w, (v, cut) in zip(weights, gains, strict=True)]
    return found, value, through, sum(cut for _, cut in gains) / len(found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bounds", [(3e-4, 4e-4), (0.05, 0.1)])
def test_gspo_is_the_naive_loop_also_where_advantages_differ_by_token(bounds, seed):
    c = policy_case(seed, temperature=0.8)
    found, value, through, cut = gspo_loop(c, *bounds)
    shared = by_row(found, through)  # log s_i is the mean of the row's log-ratios, so every token gets the row's mean
    metrics = compare(c, GSPO(clip_low=bounds[0], clip_high=bounds[1]), value, shared)
    assert metrics["clip_fraction"] == pytest.approx(cut)
    assert 0 < cut < 1
    compare(c, GSPOToken(clip_low=bounds[0], clip_high=bounds[1]), value, through)  # through the token's own probability
    assert shared != pytest.approx(through)


def test_gspo_and_gspo_token_are_one_where_a_reply_has_one_advantage():
    c = policy_case(1)
    c.batch.signals["advantage"] = noise(c, 1.0, 3)[c.batch.trow]
    one, other = c.run(GSPO(clip_low=0.2, clip_high=0.2)), c.run(GSPOToken(clip_low=0.2, clip_high=0.2))
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    torch.testing.assert_close(one[1], other[1])
    assert one[1].any()


def test_gspo_does_not_see_a_drift_that_cancels_within_the_reply():
    c = case(".xx")
    advantage = torch.ones(2, dtype=torch.float64)
    c.batch.signals = {"behaviour_logp": c.logp - torch.tensor([1.0, -1.0]), "advantage": advantage}
    assert c.run(GSPO())[2]["clip_fraction"] == 0
    assert c.run(GRPO())[2]["clip_fraction"] == 0.5


# --- CISPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bounds", [(1.0, 0.2), (0.1, 0.2)])
def test_cispo_is_the_naive_loop(bounds, seed):
    c = policy_case(seed, temperature=1.2)
    found = tokens(c)
    free = [math.exp(x) for x in log_ratios(found)]
    weights = [max(1 - bounds[0], min(1 + bounds[1], r)) for r in free]
    coefficients = [-w * t.signals["advantage"] for w, t in zip(weights, found, strict=True)]
    value = sum(k * t.logp for k, t in zip(coefficients, found, strict=True))
    metrics = compare(c, CISPO(clip_low=bounds[0], clip_high=bounds[1]), value, coefficients)
    assert metrics["clip_fraction"] == pytest.approx(sum(a != b for a, b in zip(free, weights, strict=True)) / len(free))
    assert 0 < metrics["clip_fraction"] < 1


def test_cispo_keeps_the_gradient_that_dapo_clips_away():
    c = case(".x")
    c.batch.signals = {"behaviour_logp": c.logp - 3.0, "advantage": torch.ones(1, dtype=torch.float64)}
    assert not c.run(DAPO())[1].any()
    expected = torch.tensor(tokens(c)[0].score_function(1.0), dtype=torch.float64) * -5.0  # the cap
    torch.testing.assert_close(c.run(CISPO())[1][0], expected)


# --- Kimi ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_kimi_is_the_naive_loop(tau, seed):
    c = policy_case(seed, temperature=0.9)
    low, high = -0.2, 0.3
    found, value, coefficients, outside = tokens(c), 0.0, [], 0
    for t, x in zip(found, log_ratios(found), strict=True):
        a, inside = t.signals["advantage"], low <= x <= high
        outside += not inside
        value -= a * math.exp(max(low, min(high, x))) - tau * x * x
        coefficients.append(-(a * math.exp(x) if inside else 0.0) + 2 * tau * x)
    metrics = compare(c, Kimi(low=low, high=high, tau=tau), value, coefficients)
    assert metrics["clip_fraction"] == pytest.approx(outside / len(found))
    assert 0 < outside < len(found)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("log_ratio", [-0.8, 0.8])
def test_kimis_mask_is_blind_to_the_sign_where_ppos_is_not(log_ratio, sign):
    c = case(".x")
    c.batch.signals = {"behaviour_logp": c.logp - log_ratio, "advantage": torch.tensor([sign]).double()}
    assert not c.run(Kimi())[1].any()
    assert bool(c.run(DAPO())[1].any()) == (sign * log_ratio < 0)
    c.batch.signals["behaviour_logp"] = c.logp - log_ratio / 2
    assert c.run(Kimi())[1].any()


def test_intellect_3s_icepop_has_kimis_gradient():
    """Σ r_t Â_t where the ratio lies within the bounds, else nothing: another value, the same gradient."""
    c = policy_case(5)
    coefficients = []
    for t, x in zip(tokens(c), log_ratios(tokens(c)), strict=True):
        coefficients.append(-math.exp(x) * t.signals["advantage"] if 0.9 <= math.exp(x) <= 1.3 else 0.0)
    expected = [[k * g for g in t.score_function(1.0)] for t, k in zip(tokens(c), coefficients, strict=True)]
    assert 0 < coefficients.count(0.0) < len(coefficients)
    gradient = c.run(Kimi(low=math.log(0.9), high=math.log(1.3)))[1]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


# --- sums ------------------------------------------------------------------------------------------------------------


def test_dr_grpo_divides_every_reply_by_the_same_length():
    c = policy_case(2)
    value, gradient, _ = c.run(DrGRPO(length=50))
    tokenwise, tokenwise_gradient, _ = c.run(DAPO(clip_high=0.2))
    assert value == pytest.approx(tokenwise / 50)
    torch.testing.assert_close(gradient, tokenwise_gradient / 50)
    assert DrGRPO(length=50).per == "rows"


def test_trap_one_over_the_length_makes_long_wrong_replies_cheap():
    """GRPO's gradient on each token of a wrong reply falls with its length; Dr. GRPO's does not."""
    sizes = {}
    for loss in (GRPO(), DrGRPO(length=8)):
        for picture in (".xx", ".xxxxxxxx"):
            c = case(picture)
            c.logits = case(".x").logits.expand(len(c.logits), -1)
            c.batch.tokens = torch.zeros_like(c.batch.tokens)
            c.batch.signals = {"behaviour_logp": c.logp, "advantage": -torch.ones(len(c.logits)).double()}
            sizes[type(loss).__name__, len(picture) - 1] = c.run(loss)[1][0].abs().max().item()
    assert sizes["GRPO", 2] == pytest.approx(4 * sizes["GRPO", 8])
    assert sizes["DrGRPO", 2] == pytest.approx(sizes["DrGRPO", 8])


def test_reinforce_is_the_advantage_times_the_replys_log_prob():
    c = policy_case(3)
    c.batch.signals["advantage"] = noise(c, 1.0, 3)[c.batch.trow]
    coefficients = [-t.signals["advantage"] for t in tokens(c)]
    value = sum(k * t.logp for k, t in zip(coefficients, tokens(c), strict=True))
    metrics = compare(c, REINFORCE(), value, coefficients)
    assert metrics["clip_fraction"] == 0
    assert REINFORCE().per == "rows"


@pytest.mark.parametrize("loss", [GSPO(), GSPOToken(), CISPO(), Kimi(), DrGRPO(length=9), REINFORCE()], ids=repr)
def test_trap_overflowing_ratios_stay_finite(loss):
    c = case(".xx", dtype=torch.float32)
    c.batch.signals = {"behaviour_logp": c.logp - 300, "advantage": torch.zeros(2)}
    value, gradient, metrics = c.run(loss)
    assert value == 0
    assert not gradient.any()
    assert all(math.isfinite(m) for m in metrics.values())
    assert metrics["sampler_gap"] == pytest.approx(300)  # the gap is logged whatever the loss


def test_published_defaults():
    bounds = lambda loss: (loss.per, loss.clip_low, loss.clip_high)  # noqa: E731
    assert bounds(GSPO()) == bounds(GSPOToken()) == ("rows", 3e-4, 4e-4)
    assert bounds(CISPO()) == ("tokens", 1.0, 4.0)
    assert bounds(DrGRPO(length=1)) == ("rows", 0.2, 0.2)
    assert Kimi().per == "tokens"


@pytest.mark.parametrize(
    ("loss", "fields"), [(DrGRPO, {}), (DrGRPO, {"length": 0}), (Kimi, {"low": 0.1}), (REINFORCE, {"clip_low": 0.1})]
)
def test_nonsense_is_rejected(loss, fields):
    with pytest.raises(ValidationError):
        loss(**fields)
