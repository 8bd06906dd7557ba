"""ReasoningGym: stricter than the library's scorers, and an error only where the entry is at fault."""

from __future__ import annotations

import asyncio

import pytest
from corruptions import CORRUPTIONS, spoil

from tutelage.tasks.base import Item
from tutelage.tasks.gym import GymDomain
from tutelage.types import Score, Task
from tutelage.verify.base import verify
from tutelage.verify.gym import ReasoningGym


@pytest.fixture(scope="module", params=[kind() for kind in GymDomain.__subclasses__()], ids=lambda d: d.name)
def items(request) -> list[Item]:
    """200 items of a domain, easy and hard, none of whose answers reads the same backwards."""
    domain, found = request.param, []
    for index in range(10**6):
        for level in {domain.easy[1], domain.asked[1]}:
            item = domain.draw(level, index)
            if item and item.task.gold != item.task.gold[::-1]:
                found.append(item)
        if len(found) >= 200:
            return found[:200]


def scores(pairs: list[tuple[Task, str]], verifier: ReasoningGym) -> list[Score]:
    async def ask() -> list[Score]:
        return [await verify(verifier, task, reply) for task, reply in pairs]

    return asyncio.run(ask())


def test_accepts_its_golds(items):
    tasks = [i.task for i in items]
    for replies in (
        [i.worked for i in items],
        [t.gold for t in tasks],
        [f"1+1=2 = {t.gold}" for t in tasks],
        [t.meta["entry"]["answer"] for t in tasks],
    ):
        found = scores(list(zip(tasks, replies, strict=True)), ReasoningGym(answer_after="="))
        assert found == [Score(1.0, {"library": 1.0})] * 200


@pytest.mark.parametrize("how", CORRUPTIONS)
def test_rejects_corruptions(items, how):
    spoiled = spoil([i.task.gold for i in items], how)
    for before in ("", "= ", "12>03="):
        found = scores([(items[i].task, before + bad) for i, bad in spoiled], ReasoningGym(answer_after="="))
        assert [(s.value, s.error) for s in found] == [(0.0, None)] * 200


def entry(dataset: str, answer: str, **metadata) -> Task:
    return Task("t", "d", (), answer, {"dataset": dataset, "entry": {"question": "", "answer": answer, "metadata": metadata}})


def test_the_librarys_own_scorers_are_too_kind():
    """Why ``exact`` is the default and why nothing below the threshold counts."""
    near = entry("number_sorting", "['3.0', '14.0']", direction="ascending")
    assert scores([(near, "4 13")], ReasoningGym(exact=False)) == [Score(1.0, {"library": 1.0})]
    assert scores([(near, "4 13")], ReasoningGym()) == [Score(0.0, {"library": 1.0})]
    inside = entry("letter_counting", "3")
    assert scores([(inside, "2 or 3")], ReasoningGym(threshold=0.1, exact=False))[0].value == 1.0
    assert scores([(inside, "2 or 3")], ReasoningGym(exact=False))[0].value == 0.0


def test_a_scorer_that_raises_on_a_bad_reply_gives_zero_but_a_bad_entry_is_an_error(monkeypatch):
    from tutelage.verify import gym

    monkeypatch.setattr(gym, "_scorer", lambda dataset: lambda answer, entry: float(int(answer) == int(entry["answer"])))
    bad_reply, bad_entry = scores([(entry("x", "3"), "three"), (entry("x", "three"), "3")], ReasoningGym())
    assert bad_reply == Score(0.0, {"library": 0.0})
    assert bad_entry.error.startswith("ValueError")


def test_a_foreign_task_is_an_error_that_says_what_it_lacks():
    (foreign,) = scores([(Task("t-1", "d", (), "3"), "3")], ReasoningGym())
    assert "t-1" in foreign.error
    assert "dataset, entry" in foreign.error
    (unknown,) = scores([(entry("chain_sums", "3"), "3")], ReasoningGym())
    assert "chain_sums" in unknown.error
