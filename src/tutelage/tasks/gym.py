"""Domains on reasoning-gym (https://github.com/open-thought/reasoning-gym): sums, reversed words, sorting, bases.

The library draws the entry and scores the reply; here its question is put tersely, since a tiny model reads characters,
and the worked answer is written. Each level is a dataset of its own, so that any level can be drawn as often as needed.
Item *i* of a dataset comes from ``Random(seed + i)``: two seeds share nearly everything. Hence one seed for everything,
and no split by index or seed (stages/tasks.py splits by question).

No answer can be guessed: the best constant answer is right in under 3 % of the tasks of every domain (a test).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, ClassVar

from tutelage.tasks.base import Domain, Item
from tutelage.types import Task


class GymDomain(Domain):
    """A dataset of the library; a subclass says what a level is and how an entry is put."""

    library: ClassVar[str] = "reasoning-gym"
    dataset: ClassVar[str]

    def config(self, level: int) -> dict[str, Any]:
        """The library's configuration for one level."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def put(self, entry: dict[str, Any]) -> tuple[str, str, str] | None:
        """(question, worked answer, final answer) of an entry; None where it is not wanted."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def draw(self, level: int, index: int) -> Item | None:
        entry = _level(self, level)[index]
        found = self.put(entry)
        if found is None:
            return None
        question, worked, gold = found
        meta = {"dataset": self.dataset, "entry": entry, "level": level}
        task = Task(f"{self.name}-{level}-{index}", self.name, ({"role": "user", "content": question},), gold, meta)
        return Item(task, worked, level)


@lru_cache(64)
def _level(domain: GymDomain, level: int) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(domain.dataset, seed=0, **domain.config(level))


class Sum(GymDomain):
    """``add 47+85`` -> ``75>12 48>13=132``: columns from the right with the carry, then the sum. Levels: digits."""

    dataset: ClassVar[str] = "chain_sum"
    name: str = "sum"
    levels: tuple[int, int] = (1, 7)
    easy: tuple[int, int] = (1, 3)
    asked: tuple[int, int] = (2, 7)
    weights: tuple[float, ...] = (0.2, 15.0, 37.0, 22.0, 13.0, 8.0, 5.0)

    def config(self, level: int) -> dict[str, Any]:
        return {"min_terms": 2, "max_terms": 2, "min_digits": level, "max_digits": level}

    def put(self, entry: dict[str, Any]) -> tuple[str, str, str] | None:
        first, sign, second = entry["metadata"]["expression"].split()
        if sign != "+":
            return None
        carry, steps = 0, []
        for a, b in zip(reversed(first), reversed(second), strict=True):
            column = int(a) + int(b) + carry
            carry = column // 10
            steps.append(f"{a}{b}>{column:02d}")
        return f"add {first}+{second}", f"{' '.join(steps)}={entry['answer']}", entry["answer"]

    def same(self, question: str) -> str:
        return "add " + "+".join(sorted(question.removeprefix("add ").split("+")))


class Reverse(GymDomain):
    """``rev stone`` -> ``enots``. Levels: letters."""

    dataset: ClassVar[str] = "spell_backward"
    name: str = "rev"
    levels: tuple[int, int] = (3, 9)
    easy: tuple[int, int] = (3, 5)
    asked: tuple[int, int] = (4, 9)
    weights: tuple[float, ...] = (3.0, 11.0, 22.0, 24.0, 18.0, 13.0, 10.0)

    def config(self, level: int) -> dict[str, Any]:
        return {"min_word_len": level, "max_word_len": level}

    def put(self, entry: dict[str, Any]) -> tuple[str, str, str] | None:
        word = entry["metadata"]["word"].lower()
        return (f"rev {word}", word[::-1], word[::-1]) if re.fullmatch("[a-z]+", word) else None

    def same(self, question: str) -> str:
        word = question.removeprefix("rev ")
        return f"rev {min(word, word[::-1])}"


class Sort(GymDomain):
    """``sort 41 17 30`` -> ``17 30 41``. Levels: numbers, all different, 10 to 99."""

    dataset: ClassVar[str] = "number_sorting"
    name: str = "sort"
    levels: tuple[int, int] = (2, 8)
    easy: tuple[int, int] = (2, 4)
    asked: tuple[int, int] = (3, 8)
    weights: tuple[float, ...] = (7.0, 17.0, 17.0, 16.0, 16.0, 14.0, 13.0)

    def config(self, level: int) -> dict[str, Any]:
        span = {"min_decimals": 0, "max_decimals": 0, "min_value": 10, "max_value": 99}
        return {"min_numbers": level, "max_numbers": level, **span}

    def put(self, entry: dict[str, Any]) -> tuple[str, str, str] | None:
        facts = entry["metadata"]
        if facts["direction"] != "ascending":
            return None
        given, wanted = ([w.removesuffix(".0") for w in facts[k]] for k in ("original_numbers", "sorted_numbers"))
        if len(set(given)) < len(given):
            return None
        return f"sort {' '.join(given)}", " ".join(wanted), " ".join(wanted)

    def same(self, question: str) -> str:
        return "sort " + " ".join(sorted(question.split()[1:]))


class Base(GymDomain):
    """``b2to4 110110`` -> ``312``, and back. Levels: binary digits of the number."""

    dataset: ClassVar[str] = "base_conversion"
    name: str = "base"
    levels: tuple[int, int] = (5, 18)
    easy: tuple[int, int] = (5, 10)
    asked: tuple[int, int] = (8, 18)
    weights: tuple[float, ...] = (0.3, 0.6, 0.8, 2.0, 3.0, 7.0, 13.0, 18.0, 15.0, 12.0, 10.0, 8.0, 6.0, 5.0)

    def config(self, level: int) -> dict[str, Any]:
        return {"min_base": 2, "max_base": 4, "min_value": 2 ** (level - 1), "max_value": 2**level - 1}

    def put(self, entry: dict[str, Any]) -> tuple[str, str, str] | None:
        source, target = entry["metadata"]["source_base"], entry["metadata"]["target_base"]
        if {source, target} != {2, 4}:
            return None
        return f"b{source}to{target} {entry['metadata']['source_repr']}", entry["answer"], entry["answer"]

    def same(self, question: str) -> str:
        verb, number = question.split()
        return f"base {int(number, int(verb[1]))}"
