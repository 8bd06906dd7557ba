"""`ReasoningGym`: a reply is judged by the task library's own scorer (reasoning-gym, https://github.com/open-thought/reasoning-gym).

The library's scorers were made for partial credit: many give a fraction for an answer that merely contains the right one,
``number_sorting`` forgives an error of 1 in each number, ``spell_backward`` pays letter by letter. As a reward that is a
hole, so the score here is 0 or 1: the library's own must reach ``threshold``, and with ``exact`` the answer must also be
the entry's, word for word. The raw score is kept in ``parts``.

Leaves out: partial credit as a reward, and a time limit on the library's scorers (they run in this thread).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

from pydantic import Field

from tutelage.types import Score, Task
from tutelage.verify.text import Marked


class ReasoningGym(Marked):
    """Needs ``task.meta``: ``dataset``, the library's name of the dataset, and ``entry``, its question, answer and metadata.

    Where the entry's answer is a list, the reply may write it bare: ``3 14 15`` for ``['3', '14', '15']``.
    """

    library: ClassVar[str] = "reasoning-gym"
    threshold: float = Field(1.0, gt=0.0, le=1.0)
    """The library's score from which an answer is right."""
    exact: bool = True
    """The answer must also be the entry's, up to case, list punctuation and ``.0``; False where several answers are right."""

    async def __call__(self, task: Task, reply: str, ctx: Any = None) -> Score:
        missing = {"dataset", "entry"} - set(task.meta)
        if missing:
            return Score(0.0, error=f"task {task.id!r} is not reasoning-gym's: its meta lacks {', '.join(sorted(missing))}")
        entry, answer = task.meta["entry"], self.answer(reply)
        score = _scorer(task.meta["dataset"])
        if entry["answer"].startswith("[") and not answer.startswith("["):
            answer = str(answer.replace(",", " ").split())
        try:
            raw = float(score(answer, entry))
        except Exception:  # some scorers raise on a malformed answer; the failure is theirs only if the right one fails too
            score(entry["answer"], entry)
            raw = 0.0
        right = raw >= self.threshold and (not self.exact or _words(answer) == _words(entry["answer"]))
        return Score(float(right), parts={"library": raw})


@cache
def _scorer(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(dataset)


def _words(answer: str) -> list[str]:
    """An answer without case, list punctuation and the ``.0`` of whole numbers."""
    return re.sub(r"(?<=[0-9])\.0+\b", "", re.sub(r"[\[\],'\"]", " ", answer.casefold())).split()
