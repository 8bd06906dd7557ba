"""Health: whether an online stage still learns from what it pays for, told from its metrics; one line names cause and fix.

A *sign* is something wrong in the mean of the last ``window`` steps:

    solved      reward ≥ ``solved`` and informative share < ``informative``      the tasks teach no more
    stuck       informative share < ``informative``, reward below that           no group has replies that differ in reward
    entropy     entropy < ``entropy`` · entropy of the first window              the policy no longer explores
    longer      length > ``length`` · length of the first window                 replies run away
    shorter     length < length of the first window / ``length``                 replies collapse
    truncated   share of replies that were cut at max_new_tokens > ``truncated``
    repeated    share of replies that repeat themselves > ``repeated``
    alike       share of replies that equal another reply to their prompt > ``alike``, and a sign of their own only where the
                reward is below ``solved``: many right answers are alike

A sign warns: long replies and a low entropy come with learning too. A sign *while the reward of the last window is no higher
than that of the window before* is compute spent on nothing, and ends the stage. The thresholds are heuristics of
this project, chosen so that a run which learns passes them; their reasons stand in docs/methods/health.md.

The informative share is that of all groups drawn: with dynamic sampling, what was not drawn in vain. A reply repeats itself
when more than half of its token 4-grams came before in it (seq-rep-4 > 1/2; Welleck et al., arXiv 1908.04319); that a half
is too much is ours, as is the share of equal replies.

Leaves out: judging single domains, and mending anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from tutelage.spec import Spec
from tutelage.types import Sample

if TYPE_CHECKING:
    import numpy as np

NGRAM = 4
"""tokens"""
WATCHED = ("reward", "entropy", "informative", "length", "truncated", "repeated", "alike")
"""What a step is remembered by."""
Step = dict[str, float]
"""The watched metrics of one step; those that a stage does not have are missing."""


class Verdict(NamedTuple):
    """What is to be thought of a run."""

    level: Literal["ok", "warn", "stop"]
    sign: str = ""
    says: str = ""
    """one line: cause and usual fix"""


class Health(Spec):
    """Watches an online stage; see the module's docstring."""

    action: Literal["warn", "end", "fail"] = "end"
    """What a stop does: only say it; end the stage with the policy as it is; or fail, so that nothing is built on it."""
    window: int = Field(10, ge=1)
    """steps"""
    informative: float = Field(0.1, ge=0, le=1)
    solved: float = Field(0.95, ge=0)
    """mean reward from which a domain counts as learned; 1.0 is right"""
    entropy: float = Field(0.1, ge=0, lt=1)
    length: float = Field(4.0, gt=1)
    truncated: float = Field(0.5, ge=0, le=1)
    repeated: float = Field(0.2, ge=0, le=1)
    alike: float = Field(0.9, ge=0, le=1)

    def judge(self, steps: Sequence[Step]) -> Verdict:
        """The verdict on a history, the latest step last; "ok" before two windows are full."""
        if len(steps) < 2 * self.window:
            return Verdict("ok")
        for sign, cause, fix in self._signs(steps):
            return Verdict("warn" if self._gains(steps) else "stop", sign, f"{cause}; {fix}")
        return Verdict("ok")

    def _gains(self, steps: Sequence[Step]) -> bool:
        now, before = self._mean(steps, "reward", 0), self._mean(steps, "reward", 1)
        return now > before

    def _mean(self, steps: Sequence[Step], name: str, back: int) -> float:
        """Of the window that ends ``back`` windows before the end; NaN, which no comparison holds for, where it is missing."""
        end = len(steps) - back * self.window
        return mean([s[name] for s in steps[end - self.window : end] if name in s])

    def _signs(self, steps: Sequence[Step]) -> Iterator[tuple[str, str, str]]:
        """(sign, cause, usual fix) of what is wrong, the likeliest cause first."""
        now = {name: self._mean(steps, name, 0) for name in WATCHED}
        first = {name: mean([s[name] for s in steps[: self.window] if name in s]) for name in WATCHED}
        share, reward = now["informative"], now["reward"]
        if share < self.informative and reward >= self.solved:
            cause = f"the tasks are learned: {share:.0%} of the groups differ in reward, which is {reward:.2f} in the mean"
            yield "solved", cause, "take fewer steps or harder tasks"
        if now["repeated"] > self.repeated:
            cause = f"the policy degenerates, or is paid for it: {now['repeated']:.0%} of the replies repeat themselves"
            yield "repeated", cause, "lower the learning rate, or look at what the reward pays"
        if now["entropy"] < self.entropy * first["entropy"]:
            left = now["entropy"] / first["entropy"]
            cause = f"the policy no longer explores: entropy is {now['entropy']:.2g} nats, {left:.0%} of its start"
            yield "entropy", cause, "lower the learning rate, or raise clip_high or the temperature"
        if share < self.informative:
            cause = f"most sampling teaches nothing: {share:.0%} of the groups have replies that differ in reward"
            yield "stuck", cause, "choose tasks by pass rate, raise group, or start from a better policy"
        yield from self._shapes(now, first)

    def _shapes(self, now: Step, first: Step) -> Iterator[tuple[str, str, str]]:
        """The signs that the replies' form gives."""
        tokens = f"from {first['length']:.0f} to {now['length']:.0f} tokens"
        if now["truncated"] > self.truncated:
            cause = f"replies have no room: {now['truncated']:.0%} are cut at max_new_tokens"
            yield "truncated", cause, "raise it, or shape the reward of long replies (SoftOverlong)"
        if now["length"] > self.length * first["length"]:
            yield "longer", f"replies run away, {tokens}", "shape the reward of long replies, or lower the learning rate"
        if now["length"] < first["length"] / self.length:
            yield "shorter", f"replies collapse, {tokens}", "look at whether the reward pays for giving up"
        if now["alike"] > self.alike and now["reward"] < self.solved:
            cause = f"groups have nothing to compare: {now['alike']:.0%} of the replies equal another one to their prompt"
            yield "alike", cause, "raise the temperature, or lower the learning rate"


def mean(values: Sequence[float]) -> float:
    """Of the finite ones; NaN of none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def watched(metrics: dict[str, float]) -> Step:
    """What of a step's metrics is remembered; the informative share is taken of everything that was drawn."""
    found = dict(metrics)
    if "informative_groups" in metrics:
        found["informative"] = metrics["informative_groups"] * (1 - metrics.get("drawn_in_vain", 0.0))
    return {name: found[name] for name in WATCHED if name in found}


def repetition(samples: Sequence[Sample]) -> dict[str, float]:
    """``repeated``: share of replies that repeat themselves; ``alike``: share that equal another reply to their prompt."""
    from collections import Counter

    own = [s.tokens[s.mask].tobytes() for s in samples]
    seen = Counter(zip((s.group for s in samples), own, strict=True))
    twice = sum(count for count in seen.values() if count > 1)
    loops = sum(ngram_repetition(s.tokens[s.mask]) > 0.5 for s in samples)
    n = max(1, len(samples))
    return {"repeated": loops / n, "alike": twice / n}


def ngram_repetition(tokens: np.ndarray, n: int = NGRAM) -> float:
    """seq-rep-n of tokens int [T]: 1 − distinct n-grams / n-grams; 0 where there is no n-gram."""
    import numpy as np

    if len(tokens) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)
