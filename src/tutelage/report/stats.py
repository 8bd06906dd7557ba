"""Statistics of a report: intervals for accuracies, and figures with paired bootstrap replicates.

A `Figure` is a number with its replicates; sums, differences and ratios of figures from one `resample` stay *paired*,
because every checkpoint and every seed sees the same draw of tasks. Intervals are two-sided 95 %.

What the intervals cover, exactly: the choice of held-out tasks, given the models that were trained. They do not cover
the training seed. With several seeds the primary figure is the mean over seeds, its interval the percentiles of that
mean over task draws, and every seed is shown beside it, so that the spread over seeds is seen rather than assumed.
Tests of a difference are paired by task and cover the same.

Leaves out: tests over training seeds, BCa or studentised intervals.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

DRAWS = 2000
SEED = 20260
Z95 = 1.959963984540054
CHUNK = 250
"""Draws made at once: bounds memory at CHUNK × tasks."""

Interval = tuple[float, float]
M = TypeVar("M", bound=Hashable)
"""What names a measurement."""


def wilson(mean: float, n: float, z: float = Z95) -> Interval:
    """Wilson's score interval of a proportion seen as ``mean`` over ``n`` tasks; (0, 1) where ``n`` is 0."""
    if n <= 0:
        return 0.0, 1.0
    shrink = 1 / (1 + z * z / n)
    centre = shrink * (mean + z * z / (2 * n))
    half = shrink * z * math.sqrt(max(mean * (1 - mean), 0.0) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(mean: float, variance: float, n: int) -> Interval:
    """Interval of a mean score over ``n`` distinct tasks.

    Wilson's where scores lie in [0, 1] (exact in spirit for right/wrong, conservative for partial credit), else normal.
    Over several seeds ``n`` is the number of *distinct* tasks: the same task answered by three replicates counts once,
    which is conservative.
    """
    if 0.0 <= mean <= 1.0 and variance <= mean * (1 - mean) + 1e-9:
        return wilson(mean, n)
    half = Z95 * math.sqrt(variance / n) if n else math.inf
    return mean - half, mean + half


@dataclass(frozen=True)
class Figure:
    """A number and its bootstrap replicates, ``draws`` [DRAWS]."""

    point: float
    draws: np.ndarray

    @property
    def interval(self) -> Interval:
        """The 2.5th and 97.5th percentile of the replicates; (nan, nan) where none is finite."""
        finite = self.draws[np.isfinite(self.draws)]
        if not finite.size:
            return math.nan, math.nan
        low, high = np.quantile(finite, (0.025, 0.975))
        return float(low), float(high)

    def __add__(self, other: Figure) -> Figure:
        return Figure(self.point + other.point, self.draws + other.draws)

    def __sub__(self, other: Figure) -> Figure:
        return Figure(self.point - other.point, self.draws - other.draws)

    def __truediv__(self, other: Figure) -> Figure:
        with np.errstate(divide="ignore", invalid="ignore"):
            return Figure(self.point / other.point if other.point else math.nan, self.draws / other.draws)


def total(figures: Iterable[Figure]) -> Figure:
    """The sum of at least one figure."""
    first, *rest = figures
    for each in rest:
        first = first + each
    return first


def mean(figures: Iterable[Figure]) -> Figure:
    """The mean of at least one figure."""
    all_of_them = list(figures)
    summed = total(all_of_them)
    return Figure(summed.point / len(all_of_them), summed.draws / len(all_of_them))


def resample(
    domain: str, scores: Mapping[M, Mapping[str, float]], seed_of: Mapping[M, int], draws: int = DRAWS
) -> dict[M, Figure]:
    """The mean score of every measurement in one domain, with replicates over tasks.

    ``scores`` maps a measurement (a checkpoint at a seed) to ``{task: score}``, ``seed_of`` a measurement to its seed.
    Each replicate draws tasks with replacement and every measurement is averaged over the same draw. Tasks are drawn
    within strata of equal membership over seeds: a seed's own tasks keep their number in each draw, and a task that
    several seeds share is drawn for all of them together (it is one task, not several). The draw depends on the domain's
    name and a fixed constant only.
    """
    names = list(scores)
    tasks = sorted({t for s in scores.values() for t in s})
    spot = {t: i for i, t in enumerate(tasks)}
    values, present = np.zeros((len(tasks), len(names))), np.zeros((len(tasks), len(names)))
    member: dict[str, set[int]] = {t: set() for t in tasks}
    for column, name in enumerate(names):
        for task, value in scores[name].items():
            values[spot[task], column], present[spot[task], column] = value, 1.0
            member[task].add(seed_of[name])
    strata: dict[tuple[int, ...], list[int]] = {}
    for task in tasks:
        strata.setdefault(tuple(sorted(member[task])), []).append(spot[task])
    rng = np.random.default_rng([SEED, zlib.crc32(domain.encode())])
    parts = []
    for begin in range(0, draws, CHUNK):
        weights = draw_weights(rng, list(strata.values()), len(tasks), min(CHUNK, draws - begin))
        with np.errstate(invalid="ignore"):
            parts.append((weights @ values) / (weights @ present))
    replicates = np.concatenate(parts) if parts else np.zeros((0, len(names)))
    with np.errstate(invalid="ignore"):
        points = values.sum(0) / present.sum(0)
    return {name: Figure(float(points[i]), replicates[:, i]) for i, name in enumerate(names)}


def draw_weights(rng: np.random.Generator, strata: list[list[int]], tasks: int, draws: int) -> np.ndarray:
    """[draws, tasks]: how often each task is in each draw; within a stratum of m tasks, m are drawn with replacement."""
    weights = np.zeros((draws, tasks))
    for stratum in strata:
        size = len(stratum)
        picks = rng.integers(0, size, (draws, size)) + np.arange(draws)[:, None] * size
        weights[:, stratum] = np.bincount(picks.ravel(), minlength=draws * size).reshape(draws, size)
    return weights


@dataclass(frozen=True)
class Ratio:
    """``gain / gap``; ``ratio`` is None where the gap's interval does not lie above 0."""

    gain: Figure
    gap: Figure
    ratio: Figure | None


def recovery(before: list[Figure], teacher: list[Figure], after: list[Figure]) -> Ratio:
    """Σ(after − before) / Σ(teacher − before) over paired lists: domains of one seed, or seeds of one domain.

    There is no ratio where the interval of the gap includes 0 (or lies below it: a teacher worse than where its student
    began has nothing to recover).
    """
    gain = total(a - b for a, b in zip(after, before, strict=True))
    gap = total(t - b for t, b in zip(teacher, before, strict=True))
    return Ratio(gain, gap, gain / gap if gap.interval[0] > 0 else None)


# --- tests ---------------------------------------------------------------------------------------------------------------

EXACT = 50_000
"""Up to this sum of absolute differences the sign-flip test counts every flip instead of drawing some."""


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p-value of paired ``differences`` [n], one a task, under random signs (Fisher's paired permutation test).

    Exact for whole numbers, by the distribution of the sum over all 2ⁿ flips: for differences in {−1, 0, 1} that is the exact
    McNemar test. Else `DRAWS` random flips and the observed one (Phipson and Smyth 2010, (1 + hits) / (1 + draws)).
    """
    sizes = np.abs(differences[differences != 0])
    seen = abs(float(differences.sum()))
    if not sizes.size:
        return 1.0
    whole = sizes.astype(np.int64)
    if (whole == sizes).all() and whole.sum() <= EXACT:
        total = int(whole.sum())
        chance = np.zeros(total + 1)  # of the sum of those that keep their sign
        chance[0], reached = 1.0, 0
        for size in whole:
            moved = chance[: reached + 1] / 2
            chance[: reached + 1] = moved
            chance[size : size + reached + 1] += moved
            reached += size
        far = np.abs(2 * np.arange(total + 1) - total) >= round(seen)
        return min(1.0, float(chance[far].sum()))
    rng = np.random.default_rng([SEED, sizes.size])
    hits = 0
    for begin in range(0, DRAWS, CHUNK):
        signs = rng.integers(0, 2, (min(CHUNK, DRAWS - begin), sizes.size)) * 2 - 1
        hits += int((np.abs(signs @ sizes) >= seen - 1e-9 * float(sizes.sum())).sum())
    return (1 + hits) / (1 + DRAWS)


def holm(chances: list[float]) -> list[float]:
    """p-values adjusted for all being asked at once (Holm 1979): the family-wise error rate is kept."""
    adjusted, most = [0.0] * len(chances), 0.0
    for rank, i in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        most = max(most, min(1.0, (len(chances) - rank) * chances[i]))
        adjusted[i] = most
    return adjusted
