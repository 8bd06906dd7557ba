"""Domains put as one asks a chat model, for models that were taught to chat: gym.py's entries in other words, answered at once.

A system's turn asks for the result alone, in place of the longer one that a chat template may put there by itself: prompts are
most of what a step costs where replies are short.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tutelage.tasks.base import Item
from tutelage.tasks.gym import Sort, Sum
from tutelage.types import Message

SYSTEM: Message = {"role": "system", "content": "Answer with the result alone."}


def _instructed(item: Item | None) -> Item | None:
    return item and replace(item, task=replace(item.task, messages=(SYSTEM, *item.task.messages)))


class PlainSum(Sum):
    """``47 + 85 = ?`` -> ``132``. Levels: digits."""

    levels: tuple[int, int] = (1, 3)
    easy: tuple[int, int] = (1, 2)
    asked: tuple[int, int] = (2, 3)
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)

    def put(self, entry: dict[str, Any]) -> tuple[str, str, str] | None:
        found = super().put(entry)
        return found and (f"{entry['metadata']['expression']} = ?", entry["answer"], entry["answer"])

    def same(self, question: str) -> str:
        return "sum " + "+".join(sorted(question.removesuffix(" = ?").split(" + ")))

    def draw(self, level: int, index: int) -> Item | None:
        return _instructed(super().draw(level, index))


class PlainSort(Sort):
    """``Sort from small to large: 41 17 30`` -> ``17 30 41``. Levels: numbers, all different, 10 to 99."""

    levels: tuple[int, int] = (2, 6)
    easy: tuple[int, int] = (2, 4)
    asked: tuple[int, int] = (3, 6)
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)

    def put(self, entry: dict[str, Any]) -> tuple[str, str, str] | None:
        found = super().put(entry)
        return found and (found[0].replace("sort", "Sort from small to large:", 1), *found[1:])

    def same(self, question: str) -> str:
        return "sort " + " ".join(sorted(question.partition(": ")[2].split()))

    def draw(self, level: int, index: int) -> Item | None:
        return _instructed(super().draw(level, index))
