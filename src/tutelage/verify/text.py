"""Verifiers that compare text: `Exact` equality with the gold answer, and `Format`, a pattern the answer must fill.

`Marked` is the one place that says where the answer stands in a reply; the verifiers of gym.py and math.py build on it.

Leaves out: partial credit, several gold answers, and any guess at an answer hidden in prose.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import field_validator

from tutelage.types import Score, Task
from tutelage.verify.base import Verifier


class Marked(Verifier):
    """Base of the verifiers that judge a final answer only, not what was written on the way to it."""

    answer_after: str | None = None
    """The answer is what follows the last occurrence of this text; None, or a reply without it: the whole reply."""

    @field_validator("answer_after")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value == "":
            raise ValueError("an empty marker stands everywhere; write None to judge the whole reply")
        return value

    def answer(self, reply: str) -> str:
        """The final answer of a reply, stripped."""
        return (reply.rpartition(self.answer_after)[2] if self.answer_after else reply).strip()


def no_gold(task: Task) -> Score:
    """The error of a task that cannot be judged because nobody wrote down its answer."""
    return Score(0.0, error=f"task {task.id!r} has no gold answer, which its verifier compares with")


class Exact(Marked):
    """1.0 where the answer is the gold answer, after stripping both."""

    casefold: bool = False
    """Whether capitals are forgiven."""
    collapse_spaces: bool = False
    """Whether any run of white space counts as one space."""

    async def __call__(self, task: Task, reply: str, ctx: Any = None) -> Score:
        if task.gold is None:
            return no_gold(task)
        return Score(float(self._normal(self.answer(reply)) == self._normal(task.gold)))

    def _normal(self, text: str) -> str:
        text = text.casefold() if self.casefold else text
        return " ".join(text.split()) if self.collapse_spaces else text.strip()


class Format(Marked):
    """1.0 where the whole answer matches ``pattern``; it reads no gold answer."""

    pattern: str
    """A Python regular expression, matched against the whole answer (``.`` does not match line ends)."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    async def __call__(self, task: Task, reply: str, ctx: Any = None) -> Score:
        return Score(float(re.fullmatch(self.pattern, self.answer(reply)) is not None))
