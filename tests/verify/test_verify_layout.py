"""EitherLayout: right answers in both layouts, and nothing else that the verifier within would refuse."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from corruptions import CORRUPTIONS, spoil
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.spec import SpecError, build
from tutelage.tasks.base import ALPHABET
from tutelage.tasks.gym import Base, Reverse, Sort, Sum
from tutelage.verify.base import verify
from tutelage.verify.gym import ReasoningGym
from tutelage.verify.layout import EitherLayout, ReplyLayout

PLAIN, LAYOUT = ReasoningGym(answer_after="="), ReplyLayout()
EITHER = EitherLayout(verifier=PLAIN)


@pytest.fixture(scope="module", params=[Sum, Reverse, Sort, Base], ids=lambda d: d.__name__)
def items(request):
    domain, rng = request.param(), Random(0)
    drawn = (domain.draw(rng.randint(*domain.asked), index) for index in range(400))
    return [i for i in drawn if i and i.task.gold != i.task.gold[::-1]][:60]


def values(verifier, pairs):
    async def ask():
        return [await verify(verifier, task, reply) for task, reply in pairs]

    found = asyncio.run(ask())
    assert not any(s.error for s in found)
    return {s.value for s in found}


def test_right_answers_count_in_both_layouts_and_in_one_of_them_without_it(items):
    plain, wrapped = ([(i.task, text(i.worked)) for i in items] for text in (str, LAYOUT.wrapped))
    assert values(EITHER, plain) == values(EITHER, wrapped) == values(PLAIN, plain) == {1.0}
    assert values(PLAIN, wrapped) == {0.0}


@pytest.mark.parametrize("how", CORRUPTIONS)
def test_wrong_answers_count_in_neither(items, how):
    spoiled = spoil([i.task.gold for i in items], how)
    for written in (str, LAYOUT.wrapped):
        assert values(EITHER, [(items[i].task, written(bad)) for i, bad in spoiled]) == {0.0}


@pytest.mark.parametrize("half", ["<{}", "{}>", ">{}<", "<<{}>>", "<{}>.", "|{}|"])
def test_a_layout_that_is_not_whole_is_no_layout(items, half):
    assert values(EITHER, [(i.task, half.format(i.task.gold)) for i in items]) == {0.0}


@settings(deadline=None)
@given(st.text(ALPHABET.replace("|", "")))
def test_what_is_wrapped_comes_back(text):
    assert LAYOUT.plain(LAYOUT.wrapped(text)) == text


def test_marks_are_no_spaces():
    with pytest.raises(SpecError, match="could not be told"):
        build(ReplyLayout, {"between": " "})
