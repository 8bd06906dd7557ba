"""A domain: tasks of one kind, drawn by level and index, each with its worked answer; and how both look in a raw document.

Levels say how hard a task is. The easy ones have gold answers, the asked ones go beyond them, and pretraining sees all:
so that a base model can do something everywhere, gold examples end early, and further on only a verifier can teach.

Raw documents come in many layouts. A base model that has seen one only does not survive fine-tuning into another: in a
prototype SFT on chat turns took word reversal from 98 % to 6 %. Some documents are wrong on purpose, as real ones are.

Leaves out: where questions come from (gym.py) and which split they fall into (stages/tasks.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase, digits

from pydantic import Field, model_validator

from tutelage.spec import Spec
from tutelage.types import Task

LAYOUT = "Q: {prompt}\nA: "
"""The commonest raw layout: how to ask a base model in its own format. Its answer ends with the line."""
LAYOUT_SHARE = 0.4
MARKS = ":=>|/,;?"
"""What may stand right after a question without seeming a part of it."""
CLUTTER = MARKS + " +-<." + digits + ascii_lowercase + "QA"
ALPHABET = "\n" + CLUTTER
"""Every character of the documents and tasks of this room."""


@dataclass(frozen=True, slots=True)
class Item:
    """One drawn task with what only some splits may show."""

    task: Task
    worked: str
    """The assistant's gold reply, steps and all."""
    level: int

    @property
    def question(self) -> str:
        return self.task.messages[-1]["content"]


class Domain(Spec):
    """Base of all domains."""

    name: str
    levels: tuple[int, int]
    """first and last that pretraining documents hold"""
    easy: tuple[int, int]
    """first and last of the gold examples"""
    asked: tuple[int, int]
    """first and last of the RL, development and held-out tasks"""
    weights: tuple[float, ...]
    """How many of the pretraining documents each level has, from the first on, relative to each other."""
    share: float = Field(1.0, gt=0)
    """Weight among the domains in pretraining."""

    @model_validator(mode="after")
    def _ordered(self) -> Domain:
        first, last = self.levels
        for name in ("levels", "easy", "asked"):
            low, high = getattr(self, name)
            if not first <= low <= high <= last:
                raise ValueError(f"{name}={low, high} must ascend within levels={first, last}")
        if len(self.weights) != last - first + 1 or min(self.weights) < 0 or max(self.weights) <= 0:
            raise ValueError(f"weights={self.weights} must name a weight >= 0 for each of the levels {first} to {last}")
        if self.asked[1] <= self.easy[1]:
            raise ValueError(f"asked={self.asked} must reach beyond easy={self.easy}, or RL has nothing to add to gold answers")
        return self

    def draw(self, level: int, index: int) -> Item | None:
        """The task of an index, always the same; None where this index has none. Two indices may give one question."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def same(self, question: str) -> str:
        """What a question is about: questions of one ``same`` tell each other's answers, and so lie in one split."""
        raise TypeError(f"{type(self).__name__} is abstract")


def document(item: Item, rng: Random, noise: float) -> str:
    """A raw document in a random layout; with probability ``noise`` one character of its answer is wrong."""
    question, answer = item.question, spoiled(item.worked, rng) if rng.random() < noise else item.worked
    if rng.random() < LAYOUT_SHARE:
        return LAYOUT.format(prompt=question) + answer + "\n"

    def clutter(low: int, high: int) -> str:
        return "".join(rng.choices(CLUTTER, k=rng.randint(low, high)))

    before = clutter(0, 5) + rng.choice(["", " ", ": ", "\n"])
    between = rng.choice([rng.choice(MARKS), "\n", ": ", " -> "]) + clutter(0, 3)
    return before + question + between + answer + "\n"


def spoiled(answer: str, rng: Random) -> str:
    """One character replaced by another of its kind, or dropped where it is no digit or letter."""
    at = rng.randrange(len(answer))
    kind = next((k for k in (digits, ascii_lowercase) if answer[at] in k), "")
    return answer[:at] + (rng.choice(kind.replace(answer[at], "")) if kind else "") + answer[at + 1 :]
