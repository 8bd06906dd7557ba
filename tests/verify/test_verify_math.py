"""MathVerify: equal forms pass, spoiled answers do not, and its worker processes can be lost."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from random import Random

import pytest
from corruptions import CORRUPTIONS, spoil

from tutelage.types import Score, Task
from tutelage.verify.base import verify
from tutelage.verify.math import MathVerify


def judge(pairs: list[tuple[str | None, str]], verifier: MathVerify | None = None) -> list[Score]:
    """Scores of (gold, reply) pairs, all asked at once."""

    async def ask() -> list[Score]:
        return await asyncio.gather(*(verify(verifier or MathVerify(), Task("t", "d", (), g), r) for g, r in pairs))

    return asyncio.run(ask())


def values(pairs: list[tuple[str | None, str]], verifier: MathVerify | None = None) -> list[float]:
    scores = judge(pairs, verifier)
    assert [s.error for s in scores] == [None] * len(pairs)
    return [s.value for s in scores]


@pytest.fixture(scope="module")
def golds() -> list[str]:
    """Integers, decimals, fractions and linear expressions."""
    rng = Random(3)
    primes = (7, 11, 13, 17, 19, 23)
    found: list[str] = []
    while len(found) < 200:
        a, b = rng.randint(12, 98), rng.choice(primes)
        form = (str(a * b), f"{a}.{b}", f"-{a}/{b}", f"\\frac{{{a}}}{{{b}}}", f"-{a * b}", f"{a}x+{b}")[len(found) % 6]
        if a % b and a % 11 and form not in found:
            found.append(form)
    return found


def test_accepts_its_golds(golds):
    assert values([(g, g) for g in golds]) == [1.0] * 200
    assert values([(g, f"Let y=3. So y={g}.") for g in golds[:50]], MathVerify(answer_after="=")) == [1.0] * 50
    assert values([(g, f"It is 3, hence \\boxed{{{g}}}.") for g in golds[:50]]) == [1.0] * 50


@pytest.mark.parametrize("how", CORRUPTIONS)
def test_rejects_corruptions(golds, how):
    # a cut fraction loses its brace first, which the parser forgives: cut the number inside
    if how == "cut short":
        pairs = [(g, g.rstrip("}")[:-1] + "}" * g.endswith("}")) for g in golds]
    else:
        pairs = [(golds[i], bad) for i, bad in spoil(golds, how)]
    assert values(pairs) == [0.0] * 200


@pytest.mark.parametrize(
    ("gold", "reply"),
    [
        ("1/2", "0.5"),
        ("0.5", "\\frac{2}{4}"),
        ("1000", "1,000"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("x^2-1", "(x-1)(x+1)"),
        ("\\{1,2\\}", "$\\{2,1\\}$"),
        ("3x+2", "2+3x"),
        ("50\\%", "0.5"),
        ("7", "x=7"),
    ],
)
def test_equal_forms_pass(gold, reply):
    assert values([(gold, reply)]) == [1.0]


@pytest.mark.parametrize(
    "reply", ["43, 42", "42 or 43", "40 2", "The answer is 42 or 43", "4 2", "42 43", "\\boxed{43} \\boxed{42}"]
)
def test_hedging_does_not_pass(reply):
    assert values([("42", reply)]) == [0.0]


def test_what_cannot_be_judged_is_an_error():
    none, words = judge([(None, "1"), ("", "1")])
    assert "no gold answer" in none.error
    assert "no mathematics" in words.error


def test_a_late_worker_is_killed_and_replaced():
    values([("7", "7")])
    before = {p.pid for p in multiprocessing.active_children()}
    (late,) = judge([("7", "9^{9^{9^{9}}}")], MathVerify(timeout_s=0.5))
    assert late == Score(0.0, error="late: no verdict after 0.5 s on '9^{9^{9^{9}}}'")
    for _ in range(100):  # a killed process may take a moment to go
        gone = before - {p.pid for p in multiprocessing.active_children()}
        if gone:
            break
        time.sleep(0.1)
    assert len(gone) == 1
    assert values([("7", "7"), ("7", "8")] * 4) == [1.0, 0.0] * 4


def test_a_killed_worker_costs_one_sample():
    values([("7", "7")] * 4)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    scores = [judge([("7", "7")])[0] for _ in range(8)]
    lost = [s for s in scores if s.error]
    assert 1 <= len(lost) <= 4
    assert all("died" in s.error for s in lost)
    assert [s for s in scores if not s.error] == [Score(1.0)] * (8 - len(lost))
