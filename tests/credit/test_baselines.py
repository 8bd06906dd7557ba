"""RLOO, MaxRL and REINFORCE++: formulas on hand-made groups, and expected gradients by enumeration of every group."""

import asyncio
import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from tests.credit.test_group_credit import advantage, assign, sample
from tutelage.credit.group import GroupRelative
from tutelage.credit.maxrl import MaxRL
from tutelage.credit.reinforce_pp import GlobalNormalization, Reward
from tutelage.credit.rloo import RLOO
from tutelage.spec import UserError

REWARDS = [1.0, 0.0, 0.5, 0.25]


def test_rloo_leaves_the_reply_out_of_its_baseline():
    samples = [sample("a", r) for r in REWARDS]
    assign(RLOO(), samples)
    expected = [r - statistics.mean(REWARDS[:i] + REWARDS[i + 1 :]) for i, r in enumerate(REWARDS)]
    assert [advantage(s) for s in samples] == pytest.approx(expected)


def test_maxrl_divides_by_the_mean():
    for centred, expected in ((True, [3.0, -1.0, -1.0, -1.0]), (False, [4.0, 0.0, 0.0, 0.0])):
        samples = [sample("a", r) for r in (1.0, 0.0, 0.0, 0.0)]
        assign(MaxRL(centred=centred), samples)
        assert [advantage(s) for s in samples] == pytest.approx(expected)


def test_maxrl_of_all_wrong_is_nothing_and_of_all_right_depends_on_the_form():
    wrong, right = [sample("a", 0.0)] * 2, [sample("b", 1.0), sample("b", 1.0)]
    assert assign(MaxRL(), wrong + right)[0] == []
    kept = assign(MaxRL(centred=False), wrong + right)[0]
    assert [advantage(s) for s in kept] == [1.0, 1.0]


def test_maxrl_refuses_graded_rewards_in_one_line():
    with pytest.raises(UserError, match=r"MaxRL takes rewards of 0 or 1, but a reply got 0\.5;") as error:
        assign(MaxRL(), [sample("a", 1.0), sample("a", 0.5)])
    assert "\n" not in str(error.value)


# --- enumeration: a policy over four replies, of which the first and third are right ---

RIGHT = np.array([1.0, 0.0, 1.0, 0.0])


def policy():
    return torch.tensor([-0.7, 0.4, -1.1, 0.9], dtype=torch.float64, requires_grad=True)


def expected_gradient(rule, n):
    """E[1/n Σ Â_i ∇log π(y_i)] over every group of n replies."""
    logits = policy()
    logp = logits.log_softmax(-1)
    total = 0.0
    for replies in itertools.product(range(4), repeat=n):
        index = torch.tensor(replies)
        probability = logp[index].sum().exp().detach()
        advantages = torch.tensor(rule.advantages(RIGHT[list(replies)]))
        total = total + probability * (advantages * logp[index]).sum() / n
    return torch.autograd.grad(total, logits)[0]


def gradient_of(objective):
    logits = policy()
    p = (logits.softmax(-1) * torch.tensor(RIGHT)).sum()
    return torch.autograd.grad(objective(p), logits)[0]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rloo_is_unbiased_and_the_groups_own_mean_is_short(n):
    exact = gradient_of(lambda p: p)
    torch.testing.assert_close(expected_gradient(RLOO(), n), exact)
    torch.testing.assert_close(expected_gradient(GroupRelative(scale="none"), n), exact * (n - 1) / n)


def truncated_likelihood(order):
    return lambda p: -sum((1 - p) ** k / k for k in range(1, order + 1))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_maxrl_is_the_gradient_of_the_likelihood_cut_after_n_terms(n):
    torch.testing.assert_close(expected_gradient(MaxRL(centred=False), n), gradient_of(truncated_likelihood(n)))
    assert not torch.allclose(expected_gradient(MaxRL(centred=False), n), gradient_of(truncated_likelihood(n + 1)), atol=1e-3)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_maxrl_centred_is_that_of_one_term_less(n):
    """Algorithm 1 centres only where something was right, so the mean score it takes off is not of mean zero."""
    torch.testing.assert_close(expected_gradient(MaxRL(), n), gradient_of(truncated_likelihood(n - 1)))


@pytest.mark.parametrize("drop", [False, True])
def test_trap_dropped_groups_bias_the_weights_of_prompts(drop):
    """E[1/R Σ Â ∇log π] over two prompts that are right with p and q, two replies each; R counts the replies that are kept.

    With all of them it is the mean of ∇p and ∇q (MaxRL at n = 2 is RL), without it depends on the other prompt.
    """
    right = np.array([0.1, 0.8])
    found = np.zeros(2)
    for outcome in itertools.product((0.0, 1.0), repeat=4):
        prompt = np.array([0, 0, 1, 1])
        samples = [sample(str(k), r) for k, r in zip(prompt, outcome, strict=True)]
        chance = math.prod(right[k] if r else 1 - right[k] for k, r in zip(prompt, outcome, strict=True))
        kept = assign(MaxRL(drop_uniform=drop), samples)[0]
        for s in kept:
            k = int(s.group)
            found[k] += chance * advantage(s) * (s.scalars["reward"] - right[k]) / len(kept)
    assert np.allclose(found, right * (1 - right) / 2) != drop


def test_the_series_goes_to_the_likelihood():
    exact = gradient_of(torch.log)
    apart = [(gradient_of(truncated_likelihood(n)) - exact).abs().max().item() for n in (1, 4, 16, 64)]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 1e-5 < 0.1 < apart[0]


# --- REINFORCE++ ---


def test_reward_is_the_advantage_of_every_sound_sample():
    samples = [sample("a", 1.0), sample("b", 1.0), sample("b", 0.5, error="late"), sample("c", 0.0, mask="....")]
    kept, metrics = assign(Reward(), samples)
    assert kept == samples[:2]
    assert [advantage(s) for s in kept] == [1.0, 1.0]
    assert metrics["verifier_errors"] == (1.0, 4.0)


def test_global_normalization_is_over_the_tokens_of_the_whole_step():
    samples = [sample("a", 1.0), sample("a", 0.0, mask=".x"), sample("b", 5.0, mask=".xxxxx"), sample("b", 4.0)]
    kept, _ = assign(GroupRelative(scale="none"), samples)
    kept, metrics = assign(GlobalNormalization(), kept)
    before = [0.5] * 3 + [-0.5] + [0.5] * 5 + [-0.5] * 3  # each reply's advantage as often as it has tokens
    mean, std = statistics.mean(before), statistics.pstdev(before)
    after = np.concatenate([s.signals["advantage"].values for s in kept])
    np.testing.assert_allclose(after, [(x - mean) / std for x in before], rtol=1e-6)
    assert metrics["advantage_std"][0] == pytest.approx(std)
    assert after.dtype == np.float32


def test_global_normalization_of_equal_advantages_is_zero_not_nan():
    kept, _ = assign(Reward(), [sample("a", 0.3), sample("b", 0.3)])
    kept, _ = assign(GlobalNormalization(), kept)
    assert all(np.abs(s.signals["advantage"].values).max() < 1e-3 for s in kept)
    assert assign(GlobalNormalization(), []) == ([], {})


def test_trap_a_groups_own_std_makes_hard_and_easy_prompts_weigh_more():
    """Two prompts, one solved 1 in 8 times, one 4 in 8: by group the lone success gets 2.6 times the other's advantage."""
    rows = lambda: [sample("hard", float(i == 0)) for i in range(8)] + [sample("even", float(i < 4)) for i in range(8)]  # noqa: E731
    own, batch = rows(), rows()
    assign(GroupRelative(), own)
    asyncio.run(GroupRelative(scale="none").assign(batch, None))
    assign(GlobalNormalization(), batch)
    ratio = lambda rs: advantage(rs[0]) / advantage(rs[8])  # noqa: E731
    assert ratio(own) == pytest.approx(math.sqrt(7), rel=1e-3)
    assert ratio(batch) == pytest.approx(1.75, rel=1e-3)  # the plain differences, 7/8 and 1/2, over one number


@pytest.mark.parametrize("rule", [RLOO(), MaxRL(), GroupRelative(), GlobalNormalization(), Reward()], ids=repr)
def test_every_baseline_gives_the_advantage(rule):
    assert rule.gives() == {"advantage"}
