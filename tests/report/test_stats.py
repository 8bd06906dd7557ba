"""Intervals against closed forms, the bootstrap against a naive loop over the same draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tutelage.report import stats


def test_wilson_solves_its_equation():
    # the bounds are the p at which the observed mean lies z standard errors (of p) away
    for mean, n in ((0.3, 50), (0.91, 500), (0.0, 500), (1.0, 40)):
        for bound in stats.wilson(mean, n):
            if 0 < bound < 1:
                assert abs(mean - bound) == pytest.approx(stats.Z95 * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


def test_wilson_known_values_and_ends():
    assert stats.wilson(0.0, 500) == pytest.approx((0.0, 0.0076241), abs=1e-6)  # z²/(n + z²)
    low, high = stats.wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.403832, 0.596168), abs=1e-6)
    assert stats.wilson(0.4, 0) == (0.0, 1.0)


def test_mean_interval_of_scores_beyond_one_is_normal():
    low, high = stats.mean_interval(3.0, 4.0, 100)
    assert (low, high) == pytest.approx((3 - 1.96 * 0.2, 3 + 1.96 * 0.2), abs=1e-4)
    assert stats.mean_interval(0.5, 0.25, 100) == stats.wilson(0.5, 100)


def scores(rng, n, p, prefix="t"):
    return {f"{prefix}{i}": float(v) for i, v in enumerate(rng.random(n) < p)}


def test_resample_equals_a_naive_loop_over_the_same_draws():
    rng = np.random.default_rng(0)
    tables = {"a": scores(rng, 37, 0.4), "b": scores(rng, 37, 0.7)}
    figures = stats.resample("sum", tables, {"a": 0, "b": 0}, draws=300)
    again = np.random.default_rng([stats.SEED, stats.zlib.crc32(b"sum")])
    order = sorted(tables["a"])
    for begin in range(0, 300, stats.CHUNK):
        count = min(stats.CHUNK, 300 - begin)
        picks = again.integers(0, 37, (count, 37))
        for i in range(count):
            for name, table in tables.items():
                naive = sum(table[order[p]] for p in picks[i]) / 37
                assert figures[name].draws[begin + i] == pytest.approx(naive, abs=1e-12)
    assert figures["a"].point == pytest.approx(np.mean(list(tables["a"].values())))


def test_resample_keeps_every_seeds_number_of_tasks_and_joins_shared_ones():
    rng = np.random.default_rng(1)
    weights = stats.draw_weights(rng, [[0, 2, 4], [1, 3]], 5, 200)
    assert (weights[:, [0, 2, 4]].sum(1) == 3).all()
    assert (weights[:, [1, 3]].sum(1) == 2).all()
    same = scores(rng, 60, 0.5)
    figures = stats.resample("d", {(0, "x"): same, (1, "x"): same}, {(0, "x"): 0, (1, "x"): 1})
    assert np.array_equal(figures[0, "x"].draws, figures[1, "x"].draws)  # one task, not two
    other = {f"u{k}": v for k, v in same.items()}
    apart = stats.resample("d", {(0, "x"): same, (1, "x"): other}, {(0, "x"): 0, (1, "x"): 1})
    assert abs(np.corrcoef(apart[0, "x"].draws, apart[1, "x"].draws)[0, 1]) < 0.1


def test_bootstrap_interval_agrees_with_the_closed_form_of_a_mean_and_a_paired_difference():
    rng = np.random.default_rng(2)
    a = scores(rng, 400, 0.3)
    b = {t: 1.0 if v or rng.random() < 0.2 else 0.0 for t, v in a.items()}
    figures = stats.resample("d", {"a": a, "b": b}, {"a": 0, "b": 0})
    for values, figure in ((np.array(list(a.values())), figures["a"]),):
        low, high = figure.interval
        assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    change = np.array([b[t] - a[t] for t in a])
    low, high = (figures["b"] - figures["a"]).interval
    assert high - low == pytest.approx(2 * 1.96 * change.std() / 20, rel=0.08)
    assert low < change.mean() < high


def test_the_draw_does_not_depend_on_what_else_is_measured():
    rng = np.random.default_rng(3)
    a, b = scores(rng, 50, 0.5), scores(rng, 50, 0.5)
    alone = stats.resample("d", {"a": a}, {"a": 0})["a"]
    beside = stats.resample("d", {"b": b, "a": a}, {"a": 0, "b": 0})["a"]
    assert np.array_equal(alone.draws, beside.draws)


def figure(value, spread=0.001):
    return stats.Figure(value, value + np.random.default_rng(int(value * 1e6)).normal(size=500) * spread)


def test_recovery_is_a_ratio_of_sums_not_a_mean_of_ratios():
    before, teacher, after = [figure(0.2), figure(0.5)], [figure(0.6), figure(0.6)], [figure(0.5), figure(0.6)]
    found = stats.recovery(before, teacher, after)
    assert found.ratio is not None
    assert found.ratio.point == pytest.approx((0.3 + 0.1) / (0.4 + 0.1))
    assert found.ratio.point != pytest.approx((0.75 + 1.0) / 2)


def test_no_ratio_where_the_gap_may_be_nothing_or_is_a_loss():
    assert stats.recovery([figure(0.5, 0.05)], [figure(0.51, 0.05)], [figure(0.6)]).ratio is None
    assert stats.recovery([figure(0.5)], [figure(0.4)], [figure(0.45)]).ratio is None
    assert stats.Figure(0.1, np.array([math.nan])).interval != stats.Figure(0.1, np.array([0.1])).interval
