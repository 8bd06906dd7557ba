"""What a diagnosis (diagnose.py) comes to in words, and the thresholds that decide it, each with the evidence it rests on.

A *sign* is a number whose whole interval lies on the wrong side of its threshold; where the threshold lies inside the
interval the number is *unsure*. Two signs make the verdict ``warm up first``. One does not: any of these numbers alone has
been wrong of a teacher that taught everything.

The evidence is thin: published runs of much larger models, and this project's studies of very small ones.
docs/methods/diagnose.md tells it. The teacher's NLL has no threshold: a prototype's teacher with an NLL as bad as that of
another lineage transferred fully, and the student's own entropy is a part of it.

Leaves out: whether the teacher knows anything that the student does not; only a verifier can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Interval = Mapping[str, float]
"""``{"mean", "low", "high"}``"""
Level = Literal["teaches", "warm up", "unclear", "agrees", "tokenizer differs", "template differs"]


@dataclass(frozen=True)
class Threshold:
    """A number is a sign where it lies ``side`` of ``bound``."""

    number: str
    says: str
    side: Literal["above", "below"]
    bound: float
    evidence: str

    def judge(self, found: Interval) -> Literal["sound", "unsure", "sign"]:
        low, high = found["low"], found["high"]
        if self.side == "above":
            return "sign" if low > self.bound else "unsure" if high > self.bound else "sound"
        return "sign" if high < self.bound else "unsure" if low < self.bound else "sound"

    def words(self, found: Interval) -> str:
        return f"{self.says} {found['mean']:.3g}, {self.side} {self.bound:g}"


THRESHOLDS = (
    Threshold(
        "kl",
        "KL",
        "above",
        0.1,
        "MOPD (arXiv 2606.30406) began at 0.04 nats a token with teachers of the student's origin, who recovered 94 % of the "
        "gain, and at 0.19 with one of another origin, who recovered 60 %; this project's quickstart begins at 0.5 to 0.9 a "
        "character, and recovers",
    ),
    Threshold(
        "top1",
        "top-1 agreement",
        "below",
        0.7,
        "a prototype: 0.86 and 0.79 with teachers of the student's format, 0.61 and 0.23 with teachers of another",
    ),
    Threshold(
        "overlap",
        "top-k overlap",
        "below",
        0.72,
        "arXiv 2604.13016: in runs that work it rises from 72 % to 91 %",
    ),
    Threshold(
        "mass",
        "mass on shared tokens",
        "below",
        0.92,
        "arXiv 2604.13016: the shared tokens hold 97 to 99 % of the probability in runs that work; in this project's studies "
        "0.94 to 0.96 recovered 72 to 98 %, and 0.91 and less a third or nothing by the sampled token",
    ),
)
SIGNS = 2
"""So many make the verdict."""
CHANCE = 0.1
"""Where two random sets of k tokens share more than this (k / V), the overlap is not judged: it is one of a few letters."""
SAME = 1e-3
"""Nats a token; a KL whose interval ends below leaves nothing to teach."""
CAVEAT = "a warning sign, not a proven predictor"


@dataclass(frozen=True)
class Verdict:
    """What is thought of a teacher: a word for programs, a line for people, and the names of the numbers behind it."""

    level: Level
    words: str
    signs: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "signs": list(self.signs), "unsure": list(self.unsure)}


def judge(numbers: Mapping[str, Interval], k: int, vocab: int) -> Verdict:
    """The verdict on one teacher in one domain, from its numbers with their intervals."""
    if numbers["kl"]["high"] < SAME:
        return Verdict("agrees", "nothing to teach: teacher and student agree on all that the student says")
    judged = [t for t in THRESHOLDS if t.number != "overlap" or k / vocab <= CHANCE]
    found = {t: t.judge(numbers[t.number]) for t in judged}
    signs, unsure = ([t for t in judged if found[t] == how] for how in ("sign", "unsure"))
    names = tuple(t.number for t in signs), tuple(t.number for t in unsure)
    said = "; ".join(t.words(numbers[t.number]) for t in signs)
    if len(signs) >= SIGNS:
        return Verdict("warm up", f"warm up first: {said} ({CAVEAT})", *names)
    if len(signs) + len(unsure) >= SIGNS:
        close = ", ".join(t.says for t in unsure)
        besides = f"{said}; " if signs else ""
        return Verdict("unclear", f"unclear: {besides}{close} too close to call, more prompts would tell ({CAVEAT})", *names)
    alone = f"one sign against it alone: {said}" if signs else "no sign against it"
    return Verdict("teaches", f"teaches as it is: {alone} ({CAVEAT})", *names)
