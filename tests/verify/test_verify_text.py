"""Exact and Format: what they accept, what they reject, where they find the answer."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from corruptions import CORRUPTIONS, spoil
from pydantic import ValidationError

from tutelage.types import Task
from tutelage.verify.base import Verifier, verify
from tutelage.verify.text import Exact, Format


def value(verifier: Verifier, reply: str, gold: str | None = "42") -> float:
    score = asyncio.run(verify(verifier, Task("t", "d", ({"role": "user", "content": "?"},), gold), reply))
    assert score.error is None
    return score.value


@pytest.fixture(scope="module")
def golds() -> list[str]:
    rng = Random(1)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(4, 9))) for _ in range(100)]
    return words + [str(rng.randint(10, 10**6)) for _ in range(100)]


@pytest.mark.parametrize("marker", [None, "="])
def test_exact_accepts_its_golds(golds, marker):
    verifier = Exact(answer_after=marker)
    work = "1+1=2 " if marker else ""
    assert all(value(verifier, f"{work}{marker or ''} {gold}\n", gold) == 1.0 for gold in golds)


@pytest.mark.parametrize("how", CORRUPTIONS)
def test_exact_rejects_corruptions(golds, how):
    loose = Exact(answer_after="=", casefold=True, collapse_spaces=True)
    assert [value(loose, f"so = {bad}", golds[i]) for i, bad in spoil(golds, how)] == [0.0] * 200


def test_exact_normalises_only_when_asked():
    assert value(Exact(), "Two  Words", "two words") == 0.0
    assert value(Exact(casefold=True), "Two Words", "two words") == 1.0
    assert value(Exact(collapse_spaces=True), " two \n words ", "two words") == 1.0
    assert value(Exact(collapse_spaces=True), "twowords", "two words") == 0.0


def test_the_answer_follows_the_last_marker():
    verifier = Exact(answer_after="####")
    assert value(verifier, "#### 41 no, #### 42") == 1.0
    assert value(verifier, "#### 42 no, #### 41") == 0.0
    assert value(verifier, "#### 42 is it") == 0.0
    assert value(verifier, " 42 ") == 1.0, "a reply without the marker is all answer"
    assert value(verifier, "it is 42") == 0.0


def test_a_task_without_gold_is_an_error_not_a_zero():
    score = asyncio.run(verify(Exact(), Task("t-9", "d", ()), "42"))
    assert "t-9" in score.error
    assert "no gold" in score.error


@pytest.mark.parametrize("how", ["sign changed", "said twice", "empty", "hedged", "trailing text"])
def test_format_rejects_corruptions(golds, how):
    whole = Format(pattern=r"[a-z]+|[0-9]+", answer_after="=")
    assert all(value(whole, f"a=b={gold}") == 1.0 for gold in golds)
    assert [value(whole, f"a=b={bad}") for _, bad in spoil(golds, how)] == [0.0] * 200


def test_format_needs_the_whole_answer_and_no_gold():
    assert value(Format(pattern="[0-9]+"), "12", None) == 1.0
    assert value(Format(pattern="[0-9]+"), "12 apples", None) == 0.0
    assert value(Format(pattern=".*"), "two\nlines", None) == 0.0


def test_bad_fields_are_refused_when_written():
    with pytest.raises(ValidationError, match="not a regular expression"):
        Format(pattern="(")
    with pytest.raises(ValidationError, match="empty marker"):
        Exact(answer_after="")


class Broken(Verifier):
    async def __call__(self, task, reply, ctx=None):
        raise RuntimeError("no such judge")


class Slow(Verifier):
    async def __call__(self, task, reply, ctx=None):
        await asyncio.wait_for(asyncio.sleep(9), 0.01)


def test_what_a_verifier_raises_is_an_error_of_that_sample():
    task = Task("t", "d", (), "42")
    broken, slow, fine = (asyncio.run(verify(v, task, "42")) for v in (Broken(), Slow(), Exact()))
    assert broken.error == "RuntimeError: no such judge"
    assert slow.error.startswith("TimeoutError")
    assert (fine.value, fine.error) == (1.0, None)
