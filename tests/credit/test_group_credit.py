import asyncio
import statistics

import numpy as np
import pytest

from tutelage.credit.base import CreditContext
from tutelage.credit.group import GroupRelative, relative
from tutelage.types import Sample, Score


def sample(group, reward, error=None, mask="..xx.x"):
    trained = np.array([c == "x" for c in mask])
    return Sample(np.arange(len(mask)), trained, group=group, scalars={"reward": reward}, score=Score(reward, error=error))


def assign(credit, samples):
    return asyncio.run(credit.assign(samples, CreditContext(temperature=1.0)))


def advantage(s):
    values = s.signals["advantage"].values
    assert len(set(values.tolist())) == 1
    return float(values[0])


def test_advantage_is_the_reward_against_its_own_group():
    samples = [sample("a", 1.0), sample("b", 5.0), sample("a", 0.0), sample("b", 9.0), sample("a", 0.5)]
    kept, _ = assign(GroupRelative(), samples)
    assert set(map(id, kept)) == set(map(id, samples))
    for group, rewards in {"a": [1.0, 0.0, 0.5], "b": [5.0, 9.0]}.items():
        mean, std = statistics.mean(rewards), statistics.stdev(rewards)
        found = [advantage(s) for s in samples if s.group == group]
        assert found == pytest.approx([(r - mean) / (std + 1e-4) for r in rewards], rel=1e-6)


def test_without_scale_it_is_the_plain_difference():
    samples = [sample("a", 1.0), sample("a", 0.0), sample("a", 0.5)]
    assign(GroupRelative(scale="none"), samples)
    assert [advantage(s) for s in samples] == pytest.approx([0.5, -0.5, 0.0])


def test_trap_written_at_trained_positions_only():
    samples = [sample("a", 1.0), sample("a", 0.0, mask=".x...")]
    assign(GroupRelative(), samples)
    for s, index in zip(samples, ([2, 3, 5], [1]), strict=True):
        signal = s.signals["advantage"]
        assert signal.index.tolist() == index
        assert signal.values.shape == (len(index),)
        assert signal.values.dtype == np.float32


def test_trap_verifier_error_leaves_the_baseline_and_the_training_set():
    broken = sample("a", -100.0, error="timed out")
    samples = [sample("a", 1.0), broken, sample("a", 0.0)]
    kept, metrics = assign(GroupRelative(scale="none"), samples)
    assert [advantage(s) for s in kept] == [0.5, -0.5]  # with the broken one in the mean they would be above 33
    assert "advantage" not in broken.signals
    assert metrics["verifier_errors"] == (1.0, 3.0)
    assert metrics["reward"] == (1.0, 2.0)


def test_samples_that_no_verifier_judged_count():
    samples = [sample("a", 1.0), sample("a", 0.0)]
    samples[0].score = None
    assert len(assign(GroupRelative(), samples)[0]) == 2


def test_uniform_groups_are_dropped_and_counted():
    samples = [sample("a", 1.0), sample("a", 1.0), sample("b", 1.0), sample("b", 0.0), sample("alone", 1.0)]
    kept, metrics = assign(GroupRelative(), samples)
    assert [s.group for s in kept] == ["b", "b"]
    assert metrics["informative_groups"] == (1.0, 3.0)


def test_uniform_groups_stay_with_advantage_zero_where_asked():
    samples = [sample("a", 0.3), sample("a", 0.3), sample("alone", 1.0)]
    kept, metrics = assign(GroupRelative(drop_uniform=False), samples)
    assert [advantage(s) for s in kept] == [0, 0, 0]
    assert metrics["informative_groups"] == (0.0, 2.0)


def test_group_of_errors_only_is_not_informative():
    kept, metrics = assign(GroupRelative(), [sample("a", 0.0, error="x"), sample("a", 1.0, error="x")])
    assert kept == []
    assert metrics["informative_groups"] == (0.0, 1.0)


def test_numerics_equal_rewards_are_uniform_where_their_std_is_not_zero():
    rewards = np.array([0.1, 0.1, 0.1])
    assert rewards.std() > 0  # the naive test for zero variance fails
    assert not relative(rewards, "group").any()


def test_sample_without_trained_tokens_is_in_the_baseline_but_not_trained():
    samples = [sample("a", 1.0), sample("a", 0.0, mask="....")]
    kept, _ = assign(GroupRelative(scale="none"), samples)
    assert kept == samples[:1]
    assert advantage(samples[0]) == 0.5


def test_declares_what_it_reads_and_writes():
    assert GroupRelative().needs() == {"reward"}
    assert GroupRelative().gives() == {"advantage"}
