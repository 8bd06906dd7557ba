"""Health: signs, verdicts and repetition, against hand-made histories and naive counts."""

import math

import numpy as np
import pytest

from tutelage.stages.health import Health, ngram_repetition, repetition
from tutelage.types import Sample

GOOD = {"reward": 0.4, "entropy": 1.0, "informative_groups": 0.7, "length": 100.0, "truncated": 0.05} | {
    "repeated": 0.0,
    "alike": 0.1,
}
RULE = Health(window=4)


def history(end, gain=0.0, steps=12):
    """A good start, then ``end`` in the last 4 steps, with ``gain`` more reward than before."""
    last = {**GOOD, **end}
    last["reward"] += gain
    return [{**GOOD, "reward": end.get("reward", GOOD["reward"])}] * (steps - 4) + [last] * 4


SIGNS = {
    "solved": {"informative_groups": 0.02, "reward": 0.99, "entropy": 0.01, "alike": 1.0},
    "stuck": {"informative_groups": 0.02},
    "entropy": {"entropy": 0.05},
    "longer": {"length": 500.0},
    "shorter": {"length": 20.0},
    "truncated": {"truncated": 0.6},
    "repeated": {"repeated": 0.5},
    "alike": {"alike": 0.95},
}


@pytest.mark.parametrize("sign", SIGNS)
def test_each_sign_stops_without_gain_and_warns_with_it(sign):
    stop, warn = RULE.judge(history(SIGNS[sign])), RULE.judge(history(SIGNS[sign], gain=0.005))
    assert (stop.level, stop.sign) == ("stop", sign)
    assert (warn.level, warn.sign) == ("warn", sign)
    assert "\n" not in stop.says
    assert len(stop.says.split("; ")) == 2  # a cause and a fix
    assert RULE.judge(history(SIGNS[sign])[:-4]).level == "ok"


def test_a_policy_that_is_right_may_be_sure_alike_and_short_of_room():
    right = {"reward": 0.97, "entropy": 0.2, "truncated": 1.0, "alike": 1.0, "informative_groups": 0.2}
    assert RULE.judge(history(right)).level == "ok"
    assert RULE.judge(history({**right, "entropy": 0.05})).sign == "solved"


def test_one_bad_step_is_no_sign():
    steps = [GOOD] * 11 + [{**GOOD, "truncated": 1.0, "entropy": 0.0, "repeated": 0.7}]
    assert RULE.judge(steps).level == "ok"


def test_nothing_is_said_before_two_windows_are_full():
    bad = {**GOOD, "informative_groups": 0.0}
    assert [RULE.judge([bad] * n).level for n in (1, 7, 8)] == ["ok", "ok", "stop"]


def test_what_a_stage_does_not_measure_is_no_sign():
    assert RULE.judge([{"reward": 0.2}] * 20).level == "ok"
    assert RULE.judge([{"reward": 0.2, "entropy": math.nan}] * 20).level == "ok"
    assert RULE.judge([]).level == "ok"


def test_long_replies_and_low_entropy_with_a_rising_reward_only_warn():
    """What a run that learns to reason looks like."""
    steps = [{**GOOD, "reward": 0.2 + 0.02 * i, "length": 100.0 + 60 * i, "entropy": 0.9**i} for i in range(30)]
    assert {RULE.judge(steps[:n]).level for n in range(31)} == {"ok", "warn"}


def naive_repetition(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@pytest.mark.parametrize("seed", range(30))
def test_ngram_repetition_is_the_naive_count(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 2 + seed % 4, size=seed)
    for n in (1, 2, 4):
        assert ngram_repetition(tokens, n) == pytest.approx(naive_repetition(tokens.tolist(), n))


def sample(group, reply):
    tokens = np.array([9, 9, *map(ord, reply)])
    return Sample(tokens, np.arange(len(tokens)) >= 2, group=group)


def test_repetition_counts_replies_within_their_group_and_within_themselves():
    drawn = [sample("a", "abcdefgh"), sample("a", "abcdefgh"), sample("a", "abcdefgx"), sample("b", "abcdefgh")]
    assert repetition(drawn) == {"repeated": 0.0, "alike": 0.5}
    loop = "ab" * 20
    assert repetition([*drawn, sample("b", loop)]) == {"repeated": 0.2, "alike": 0.4}
    assert repetition([]) == {"repeated": 0.0, "alike": 0.0}
