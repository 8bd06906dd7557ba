import math

import pytest
import torch
from pydantic import ValidationError

from tests.losses.plain import PlainOutput, case, length_weights, noise, tokens
from tutelage.losses.policy import DAPO, GRPO, drift, k3


def policy_case(seed=0, spread=0.3, **kwargs):
    c = case(seed=seed, **kwargs)
    c.batch.signals = {"behaviour_logp": c.logp + noise(c, spread, seed), "advantage": noise(c, 1.0, seed + 50)}
    return c


def oracle(c, low, high, per):
    """(sum, gradient, fraction clipped) by loops, the gradient by hand."""
    found = tokens(c)
    weights = length_weights(found) if per == "rows" else [1.0] * len(found)
    total, gradient, clipped = 0.0, [], 0
    for t, weight in zip(found, weights, strict=True):
        ratio, a = math.exp(t.logp - t.signals["behaviour_logp"]), t.signals["advantage"]
        cut = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
        bound = 1 + high if a > 0 else 1 - low
        total -= weight * a * (bound if cut else ratio)
        gradient.append([0.0 if cut else -weight * a * ratio * g for g in t.score_function(c.temperature)])
        clipped += cut
    return total, torch.tensor(gradient, dtype=torch.float64), clipped / len(found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("loss", "low", "high"), [(DAPO(), 0.2, 0.28), (GRPO(), 0.2, 0.2), (DAPO(clip_low=0.1), 0.1, 0.28)])
def test_value_and_gradient_are_the_naive_loop(loss, low, high, seed):
    c = policy_case(seed, temperature=1.3)
    expected, expected_gradient, clipped = oracle(c, low, high, loss.per)
    value, gradient, metrics = c.run(loss)
    assert value == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(gradient, expected_gradient)
    assert metrics["clip_fraction"] == pytest.approx(clipped)
    assert 0 < clipped < 1  # else this compares nothing about the clip


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [(0.26, 1, False), (0.24, 1, True), (0.26, -1, True), (-0.23, -1, False), (-0.22, -1, True), (-0.23, 1, True)],
)
def test_asymmetric_bounds_stop_the_gradient_on_the_right_side_only(log_ratio, advantage, moves):
    """exp(0.26) > 1.28 > exp(0.24) and exp(-0.23) < 0.8 < exp(-0.22)."""
    c = case(".x")
    c.batch.signals = {"behaviour_logp": c.logp - log_ratio, "advantage": torch.tensor([float(advantage)]).double()}
    assert bool(c.run(DAPO())[1].any()) == moves


def test_grpo_is_dapo_but_for_the_upper_clip_and_the_row_mean():
    one_row = policy_case(3).rows(1)
    value, gradient, _ = one_row.run(GRPO())
    dapo, dapo_gradient, _ = one_row.run(DAPO(clip_high=0.2))
    assert value == pytest.approx(dapo / 5)
    torch.testing.assert_close(gradient, dapo_gradient / 5)
    assert (GRPO().per, DAPO().per) == ("rows", "tokens")


def test_on_policy_gradient_is_reinforce():
    c = policy_case(5, spread=0.0)
    expected = [[-t.signals["advantage"] * g for g in t.score_function(1.0)] for t in tokens(c)]
    torch.testing.assert_close(c.run(DAPO())[1], torch.tensor(expected, dtype=torch.float64))


def test_drift_metrics_are_the_naive_means():
    c = policy_case(6)
    found = tokens(c)
    gaps = [t.logp - t.signals["behaviour_logp"] for t in found]
    metrics = c.run(DAPO())[2]
    mean = lambda xs: sum(xs) / len(xs)  # noqa: E731
    assert metrics["ratio"] == pytest.approx(mean([math.exp(g) for g in gaps]), rel=1e-5)
    assert metrics["kl_behaviour"] == pytest.approx(mean([math.exp(g) - 1 - g for g in gaps]), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(mean([-sum(p * math.log(p) for p in t.p) for t in found]), rel=1e-5)
    assert metrics["sampler_gap"] == pytest.approx(mean([abs(g) for g in gaps]), rel=1e-5)
    assert metrics["sampler_gap_max"] == pytest.approx(max(abs(g) for g in gaps), rel=1e-5)
    assert metrics["advantage"] == pytest.approx(mean([t.signals["advantage"] for t in found]), rel=1e-5)


def test_metrics_are_floats_without_gradient():
    c = policy_case(7)
    leaf = c.logits.clone().requires_grad_()
    _, metrics = DAPO()(PlainOutput(leaf, c.batch.tokens[c.batch.index]), c.batch)
    assert {type(x) for pair in metrics.values() for x in pair} == {float}


# --- numerics --------------------------------------------------------------------------------------------------------


def test_k3_is_exact_where_the_naive_form_cancels_or_overflows():
    x = torch.tensor([1e-4, -1e-4, 3e-4, -3e-4], dtype=torch.float32)
    exact = x.double().expm1() - x.double()
    naive = x.exp() - 1 - x
    assert ((naive - exact).abs() / exact).max() > 0.5  # the naive form is wrong by more than half
    torch.testing.assert_close(k3(x).double(), exact, rtol=5e-3, atol=0)
    far = torch.tensor([200.0, -200.0])
    assert (far.exp() - 1 - far).isinf().any()
    assert k3(far).isfinite().all()


def test_overflowing_ratio_of_a_zero_advantage_stays_zero():
    c = case(".xx", dtype=torch.float32)
    c.batch.signals = {"behaviour_logp": c.logp - 100, "advantage": torch.zeros(2)}
    naive = (c.logp - c.batch.signals["behaviour_logp"]).exp() * c.batch.signals["advantage"]
    assert naive.isnan().all()
    value, gradient, metrics = c.run(DAPO())
    assert value == 0
    assert not gradient.any()
    assert all(math.isfinite(m) for m in metrics.values())


def test_drift_needs_no_advantage():
    c = policy_case(8)
    del c.batch.signals["advantage"]
    assert drift(PlainOutput(c.logits, c.batch.tokens[c.batch.index]), c.batch)["sampler_gap"][1] == 16


def test_declares_its_signals_and_rejects_nonsense():
    assert DAPO().needs() == GRPO().needs() == {"advantage", "behaviour_logp"}
    with pytest.raises(ValidationError):
        DAPO(clip_low=-0.1)
    with pytest.raises(ValidationError):
        GRPO(clip=0.2)
