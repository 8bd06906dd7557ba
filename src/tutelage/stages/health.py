"""Health: whether an online stage still learns from what it pays for, told from its metrics; one line names cause and fix.

A *sign* is something wrong in the mean of the last ``window`` steps:

    repeated    share of replies that repeat themselves > ``repeated``
    solved      reward ≥ ``solved``, and stuck or entropy              nothing is left to learn
    longer      length > ``length`` · length of the first window       replies run away
    shorter     length < length of the first window / ``length``       replies collapse
    entropy     entropy < ``entropy`` · entropy of the first window    the policy no longer explores
    stuck       share of groups that differ in reward < ``informative``
    truncated   share of replies that were cut at max_new_tokens > ``truncated``
    alike       share of replies that equal another reply to their prompt > ``alike``

The last four are none where the reward is ``solved``: right answers are alike, sure and as long as they need to be.

A sign warns: long replies and a low entropy come with learning too. A sign *while the reward of the last window is no higher
than that of the window before* is compute spent on nothing, and ends the stage. The thresholds are heuristics of
this project, chosen so that a run which learns passes them; their reasons stand in docs/methods/health.md.

The informative share (``informative_groups``) is that of all groups drawn in a step. A reply repeats itself
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
WATCHED = ("reward", "entropy", "informative_groups", "length", "truncated", "repeated", "alike")
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
        """(sign, cause, usual fix) of what is wrong, the gravest first."""
        now = {name: self._mean(steps, name, 0) for name in WATCHED}
        first = {name: mean([s[name] for s in steps[: self.window] if name in s]) for name in WATCHED}
        calm, stuck = now["entropy"] < self.entropy * first["entropy"], now["informative_groups"] < self.informative
        left, share = now["entropy"] / (first["entropy"] or 1.0), now["informative_groups"]
        solved = now["reward"] >= self.solved
        if now["repeated"] > self.repeated:
            cause = f"the policy degenerates, or is paid for it: {now['repeated']:.0%} of the replies repeat themselves"
            yield "repeated", cause, "lower the learning rate, or look at what the reward pays"
        if solved and (stuck or calm):
            yield "solved", f"the tasks are learned: the mean reward is {now['reward']:.2f}", "take fewer steps or harder tasks"
        tokens = f"from {first['length']:.0f} to {now['length']:.0f} tokens"
        if now["length"] > self.length * first["length"]:
            yield "longer", f"replies run away, {tokens}", "shape the reward of long replies, or lower the learning rate"
        if now["length"] < first["length"] / self.length:
            yield "shorter", f"replies collapse, {tokens}", "look at whether the reward pays for giving up"
        if calm and not solved:
            cause = f"the policy no longer explores: entropy is {now['entropy']:.2g} nats, {left:.0%} of its start"
            yield "entropy", cause, "lower the learning rate, or raise clip_high or the temperature"
        if stuck and not solved:
            cause = f"most sampling teaches nothing: {share:.0%} of the groups have replies that differ in reward"
            yield "stuck", cause, "choose tasks by pass rate, raise group, or start from a better policy"
        if now["truncated"] > self.truncated and not solved:
            cause = f"replies have no room: {now['truncated']:.0%} are cut at max_new_tokens"
            yield "truncated", cause, "raise it, or shape the reward of long replies (SoftOverlong)"
        if now["alike"] > self.alike and not solved:
            cause = f"groups have nothing to compare: {now['alike']:.0%} of the replies equal another one to their prompt"
            yield "alike", cause, "raise the temperature, or lower the learning rate"


def mean(values: Sequence[float]) -> float:
    """Of the finite ones; NaN of none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def watched(metrics: dict[str, float]) -> Step:
    """What of a step's metrics is remembered."""
    return {name: metrics[name] for name in WATCHED if name in metrics}


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
    count = len(tokens) - n + 1
    if count < 1:
        return 0.0
    listed = tokens.tolist()
    return 1 - len(set(zip(*(listed[i : count + i] for i in range(n)), strict=True))) / count
