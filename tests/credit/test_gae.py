"""GAE against its definition as a sum, closed forms at both ends of λ, and what the rule makes of samples."""

import asyncio

import numpy as np
import pytest

from tutelage.credit.base import CreditContext
from tutelage.credit.gae import GAE, gae
from tutelage.credit.overlong import SoftOverlong
from tutelage.credit.reinforce_pp import GlobalNormalization
from tutelage.types import Sample, Score, Signal


def case(n, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), rng.normal(size=n)


def plain(rewards, values, gamma, lam):
    """The definition, term by term: Σ_l (γλ)^l (r + γ V' − V)."""
    n, found = len(rewards), []
    for t in range(n):
        total = 0.0
        for i in range(t, n):
            after = values[i + 1] if i + 1 < n else 0.0
            total += (gamma * lam) ** (i - t) * (rewards[i] + gamma * after - values[i])
        found.append(total)
    return np.array(found)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_gae_is_its_definition(n, gamma, lam, seed):
    rewards, values = case(n, seed)
    np.testing.assert_allclose(gae(rewards, values, gamma, lam), plain(rewards, values, gamma, lam), atol=1e-12)


def test_at_lambda_1_it_is_the_return_minus_the_value_and_at_0_the_error_of_one_step():
    rewards, values = case(7, 3)
    discounted = [sum(0.9**i * r for i, r in enumerate(rewards[t:])) for t in range(7)]
    np.testing.assert_allclose(gae(rewards, values, 0.9, 1.0), discounted - values)
    np.testing.assert_allclose(gae(rewards, values, 0.9, 0.0), rewards + 0.9 * np.append(values[1:], 0) - values)


def sample(reward, values, mask=None, error=None, logp=None, ref=None, stop="stop"):
    mask = np.array([False] * 2 + [True] * len(values)) if mask is None else np.array(mask)
    made = Sample(np.arange(len(mask)), mask, scalars={"reward": reward}, score=Score(reward, error=error), stop=stop)
    made.signals["value"] = Signal(np.array(values, np.float32), made.trained)
    if logp:
        made.signals["behaviour_logp"] = Signal(np.array(logp, np.float32), made.trained)
        made.signals["ref_logp"] = Signal(np.array(ref, np.float32), made.trained)
    return made


def assign(rule, *samples):
    return asyncio.run(rule.assign(samples, CreditContext(1.0)))


def test_the_reward_comes_at_the_last_trained_token_wherever_that_stands():
    gap = sample(1.0, [0.25, 0.5], mask=[False, True, False, True, False])
    assign(GAE(gamma=1.0, lam=0.0), gap)
    np.testing.assert_allclose(gap.signals["advantage"].values, [0.25, 0.5])
    np.testing.assert_array_equal(gap.signals["return"].index, [1, 3])
    np.testing.assert_allclose(gap.signals["return"].values, [0.5, 1.0])


def test_each_token_pays_its_own_kl_and_shaping_counts_as_reward():
    one = sample(1.0, [0.0, 0.0, 0.0], logp=[-1.0, -2.0, -1.0], ref=[-2.0, -2.0, -0.5])
    assign(SoftOverlong(length=4, cache=4), one)  # −3/4 at three tokens
    _, metrics = assign(GAE(lam=0.0, beta=0.1), one)
    np.testing.assert_allclose(one.signals["advantage"].values, [-0.1, 0.0, 0.25 + 0.05], atol=1e-7)
    assert metrics["kl_ref"] == (pytest.approx(0.5), 3.0)
    assert one.scalars["reward"] == 1.0
    assert GAE().needs() == {"reward", "value"}
    assert GAE(beta=0.1).needs() == {"reward", "value", "behaviour_logp", "ref_logp"}


def test_a_failed_verifier_and_an_empty_reply_leave_and_a_cut_off_reply_ends_without_a_bootstrap():
    failed, empty = sample(0.0, [0.3], error="timeout"), sample(1.0, [], mask=[False, False])
    cut = sample(0.0, [0.4, 0.6], stop="length")
    kept, metrics = assign(GAE(lam=0.0), failed, empty, cut)
    assert kept == [cut]
    assert metrics["verifier_errors"] == (1.0, 3.0)
    np.testing.assert_allclose(cut.signals["advantage"].values, [0.2, -0.6], rtol=1e-6)


def test_whitening_afterwards_moves_advantages_and_leaves_returns():
    samples = [sample(float(i), [0.5, 0.25 * i]) for i in range(3)]
    assign(GAE(), *samples)
    before = [s.signals["return"].values.copy() for s in samples]
    assign(GlobalNormalization(), *samples)
    found = np.concatenate([s.signals["advantage"].values for s in samples])
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert found.std() == pytest.approx(1, rel=1e-6)
    for s, old in zip(samples, before, strict=True):
        np.testing.assert_array_equal(s.signals["return"].values, old)


def test_explained_variance_is_1_for_perfect_values_and_0_for_constant_ones():
    right = [sample(r, [r, r]) for r in (0.0, 1.0, 3.0)]
    blind = [sample(r, [0.5, 0.5]) for r in (0.0, 1.0, 3.0)]
    assert assign(GAE(lam=1.0), *right)[1]["explained_variance"][0] == pytest.approx(1)
    assert assign(GAE(lam=1.0), *blind)[1]["explained_variance"][0] == pytest.approx(0)
