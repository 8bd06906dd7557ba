"""The domains that are put in English: right, unguessable, and in splits that do not leak."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.verify.corruptions import CORRUPTIONS, spoil
from tutelage.context import Context
from tutelage.stages.tasks import TaskSplits, best_constant
from tutelage.store import Store
from tutelage.tasks.plain import SYSTEM, PlainSort, PlainSum
from tutelage.text.rows import read_rows, read_tasks
from tutelage.verify.base import verify
from tutelage.verify.gym import ReasoningGym

DOMAINS = {d.name: d for d in (PlainSum(name="sum"), PlainSort(name="sort"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    stage = TaskSplits(name="tasks", domains=tuple(DOMAINS.values()), pretrain=2, gold=60, rl=300, dev=30, heldout=150)
    ctx = Context(stage, Store(tmp_path_factory.mktemp("plain")))
    stage.run(ctx)
    return {port: ctx.work / port for port in stage.outputs}


def test_questions_are_put_in_english_and_their_answers_are_pythons(made):
    for task in read_tasks(made["heldout"]):
        system, user = task.messages
        assert system == SYSTEM
        if task.domain == "sum":
            a, plus, b, *rest = user["content"].split(" ")
            assert (plus, rest) == ("+", ["=", "?"])
            assert int(task.gold) == int(a) + int(b)
            assert len(a) == len(b) == task.meta["level"]
        else:
            said, _, numbers = user["content"].partition(": ")
            assert said == "Sort from small to large"
            assert task.gold.split() == sorted(numbers.split(), key=int)
            assert len(numbers.split()) == task.meta["level"]


def test_gold_replies_are_right_and_spoiled_ones_wrong(made):
    tasks, verifier = read_tasks(made["heldout"])[:60], ReasoningGym()

    def judged(replies: list[tuple[int, str]]) -> list[float]:
        async def judge() -> list[float]:
            return [(await verify(verifier, tasks[i], reply)).value for i, reply in replies]

        return asyncio.run(judge())

    assert judged([(i, f" {t.gold}\n") for i, t in enumerate(tasks)]) == [1.0] * len(tasks)
    for row in read_rows(made["gold"]):
        assert row["completion"] == [{"role": "assistant", "content": row["gold"]}]
    for how in CORRUPTIONS:
        assert judged(spoil([t.gold for t in tasks], how)) == [0.0] * len(tasks), how


def test_no_question_stands_in_two_splits_in_any_order(made):
    seen: dict[str, set[str]] = {}
    for port in ("gold", "rl", "dev", "heldout"):
        asked = [(t.domain, t.messages[-1]["content"]) for t in read_tasks(made[port])]
        seen[port] = {DOMAINS[domain].same(question) for domain, question in asked}
    for one in seen:
        assert not any(seen[one] & seen[other] for other in seen if other != one)
    assert DOMAINS["sum"].same("47 + 85 = ?") == DOMAINS["sum"].same("85 + 47 = ?")
    assert DOMAINS["sort"].same("Sort from small to large: 3 1") == DOMAINS["sort"].same("Sort from small to large: 1 3")


def test_no_answer_can_be_guessed_and_rl_reaches_beyond_gold(made):
    splits = {port: read_tasks(made[port]) for port in ("gold", "rl", "heldout")}
    for name, domain in DOMAINS.items():
        gold, rl, heldout = ([t for t in found if t.domain == name] for found in splits.values())
        assert best_constant(rl, heldout)[1] < 0.03
        assert max(t.meta["level"] for t in gold) == domain.easy[1]
        assert set(Counter(t.meta["level"] for t in heldout)) == set(range(domain.asked[0], domain.asked[1] + 1))
