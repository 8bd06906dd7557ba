"""TaskSplits: pretraining documents, gold examples, RL prompts, development and held-out tasks, and no question in two.

A question's split is decided by a hash of what it asks (`Domain.same`), never by an index or a seed. So splits cannot
leak into each other, whatever is drawn, and splits of two data seeds cannot either: generators that draw item *i* from
``Random(seed + i)`` give nearly the same items for neighbouring seeds. Within all splits a question stands once, except
that pretraining comes back to its questions, in other layouts, where a domain has too few of them.

Gold examples are few, fixed and easy; what is asked reaches beyond them, at equal shares of the levels.

Leaves out: mixtures with other data, and any use of a training seed.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from random import Random
from typing import Any, ClassVar

from pydantic import Field, field_validator

from tutelage.graph import At, DataType, Kind, Stage, Type
from tutelage.spec import UserError
from tutelage.tasks.base import Domain, Item, document
from tutelage.types import Task

SHARES = {"heldout": 8, "dev": 4, "gold": 12, "rl": 16, "pretrain": 60}
"""Percent of the question space that belongs to each split."""
PATIENCE = 2000
"""A level is exhausted after so many draws in a row that brought no new question."""
STRIDE = 10**9
"""Indices that a data seed has to itself."""


class TaskSplits(Stage):
    """Draws tasks from ``domains``; sizes are per domain, but for the pretraining documents."""

    outputs: ClassVar[dict[str, Kind]] = dict.fromkeys(("pretrain", "gold", "rl", "dev", "heldout"), "data")
    verb: ClassVar[str] = "draws"

    domains: tuple[Domain, ...] = Field(min_length=1)
    pretrain: int = Field(48000, ge=1)
    """raw documents, of all domains together"""
    gold: int = Field(200, ge=1)
    rl: int = Field(3000, ge=1)
    dev: int = Field(250, ge=1)
    heldout: int = Field(500, ge=1)
    noise: float = Field(0.15, ge=0, le=1)
    """Share of the pretraining documents whose answer has a wrong character."""
    data_seed: int = Field(0, ge=0)

    @field_validator("domains")
    @classmethod
    def _names_differ(cls, domains: tuple[Domain, ...]) -> tuple[Domain, ...]:
        twice = [n for n, count in Counter(d.name for d in domains).items() if count > 1]
        if twice:
            raise ValueError(f"two domains are named {twice[0]!r}; give one another name")
        return domains

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        names, found = tuple(d.name for d in self.domains), {}
        for split in self.outputs:
            extra = {"pretrain": ("text",), "gold": ("completion",)}.get(split, ())
            size = getattr(self, split) * (1 if split == "pretrain" else len(names))
            found[split] = DataType(("id", "domain", "prompt", *extra, "gold", "meta"), names, size)
        return dict(found)

    def run(self, ctx: Any) -> None:
        from tutelage.text.rows import write_tasks

        rows: dict[str, list[dict[str, Any]]] = {split: [] for split in self.outputs}
        seen: set[str] = set()
        ctx.facts.update(rows={}, constant={})
        for number, domain in enumerate(self.domains):
            items = self._draw(domain, seen)
            rows["pretrain"] += self._documents(domain, items.pop("pretrain"))
            for split, drawn in items.items():
                rows[split] += [_row(item, worked=split == "gold") for item in drawn]
            rl, heldout = ([i.task for i in items[s]] for s in ("rl", "heldout"))
            answer, accuracy = best_constant(rl, heldout)
            ctx.facts["constant"][domain.name] = {"answer": answer, "heldout": accuracy}
            ctx.progress(number + 1, len(self.domains), domain=domain.name)
        for split, found in rows.items():
            found.sort(key=lambda row: _hash(f"order {row['id']}"))  # mixed, so that any first rows are a fair sample
            ctx.facts["rows"][split] = dict(Counter(row["domain"] for row in found))
            write_tasks(ctx.output(split), found)

    def _draw(self, domain: Domain, seen: set[str]) -> dict[str, list[Item]]:
        """The domain's items by split. Raises `UserError` where it has too few questions."""
        found: dict[str, list[Item]] = {split: [] for split in SHARES}
        for level in range(domain.levels[0], domain.levels[1] + 1):
            want = {split: self._quota(domain, split, level, len(found[split])) for split in SHARES}
            stale, index = 0, self.data_seed * STRIDE
            while stale < PATIENCE and any(want.values()):
                item = domain.draw(level, index)
                stale, index = stale + 1, index + 1
                if item and item.question not in seen:
                    seen.add(item.question)
                    split, stale = split_of(domain.same(item.question)), 0
                    if want[split]:
                        want[split] -= 1
                        found[split].append(item)
        for split, items in found.items():
            size = getattr(self, split) if split != "pretrain" else 1
            if len(items) < size:
                reach = domain.easy if split == "gold" else domain.asked
                raise UserError(
                    f"domain {domain.name!r} has only {len(items)} of {size} {split} questions at levels {reach[0]} to "
                    f"{reach[1]}; lower {self.name}.{split} or widen the domain's levels"
                )
        return found

    def _quota(self, domain: Domain, split: str, level: int, have: int) -> int:
        """How many questions of a level a split wants, knowing what the levels below gave."""
        if split == "pretrain":
            weight = domain.weights[level - domain.levels[0]] / sum(domain.weights)
            return math.ceil(self._documents_of(domain) * weight)
        first, last = domain.easy if split == "gold" else domain.asked
        return math.ceil((getattr(self, split) - have) / (last - level + 1)) if first <= level <= last else 0

    def _documents_of(self, domain: Domain) -> int:
        return round(self.pretrain * domain.share / sum(d.share for d in self.domains))

    def _documents(self, domain: Domain, items: list[Item]) -> list[dict[str, Any]]:
        """Documents at the domain's weights; a level with too few questions comes back to them."""
        rng = Random(f"documents {self.data_seed} {domain.name}")
        rows = []
        for level, of in groupby(items, lambda item: item.level):
            pool = list(of)
            for number in range(self._quota(domain, "pretrain", level, 0)):
                item = pool[number % len(pool)]
                row = _row(item, text=document(item, rng, self.noise))
                rows.append({**row, "id": f"{row['id']}-{number // len(pool)}", "meta": {"level": level}})
        rng.shuffle(rows)
        return rows[: self._documents_of(domain)]


def split_of(same: str) -> str:
    """The split that a question belongs to, for all times and seeds."""
    point = _hash(f"split {same}") % 100
    for split, share in SHARES.items():
        point -= share
        if point < 0:
            return split
    raise AssertionError("the shares do not sum to 100")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _row(item: Item, worked: bool = False, text: str | None = None) -> dict[str, Any]:
    task = item.task
    row: dict[str, Any] = {"id": task.id, "domain": task.domain, "prompt": list(task.messages)}
    if worked:
        row["completion"] = [{"role": "assistant", "content": item.worked}]
    if text is not None:
        row["text"] = text
    return {**row, "gold": task.gold, "meta": task.meta}


def best_constant(train: Sequence[Task], test: Sequence[Task]) -> tuple[str, float]:
    """The commonest gold answer of ``train`` (of equals the first in the alphabet), and its share of ``test``'s."""
    counts = Counter(task.gold for task in train if task.gold is not None)
    if not counts or not test:
        raise UserError("the best constant answer needs tasks with gold answers to choose from, and tasks to try it on")
    answer = min(counts, key=lambda a: (-counts[a], a))
    return answer, sum(task.gold == answer for task in test) / len(test)
