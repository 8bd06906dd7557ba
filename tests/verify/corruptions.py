"""Ways to spoil a right answer. Each takes (answer, another item's answer, rng) and returns text that is not the answer."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

DIGITS, LETTERS = "0123456789", "abcdefghijklmnopqrstuvwxyz"


def one_off(answer: str, other: str, rng: Random) -> str:
    """One digit or letter replaced by its successor."""
    spots = [i for i, c in enumerate(answer) if c in DIGITS + LETTERS]
    at = rng.choice(spots)
    ring = DIGITS if answer[at] in DIGITS else LETTERS
    return answer[:at] + ring[(ring.index(answer[at]) + 1) % len(ring)] + answer[at + 1 :]


def swapped(answer: str, other: str, rng: Random) -> str:
    """The first two neighbours that differ, exchanged."""
    for i in range(len(answer) - 1):
        if answer[i] != answer[i + 1] and " " not in answer[i : i + 2]:
            return answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]
    return answer + answer[-1]


def negated(answer: str, other: str, rng: Random) -> str:
    return answer[1:] if answer.startswith("-") else "-" + answer


CORRUPTIONS: dict[str, Callable[[str, str, Random], str]] = {
    "one off": one_off,
    "swapped": swapped,
    "sign changed": negated,
    "cut short": lambda answer, other, rng: answer[:-1],
    "doubled": lambda answer, other, rng: answer + answer,
    "said twice": lambda answer, other, rng: f"{answer} {answer}",
    "empty": lambda answer, other, rng: "",
    "another item's": lambda answer, other, rng: other,
    "hedged": lambda answer, other, rng: f"{other} or {answer}",
    "trailing text": lambda answer, other, rng: answer + " ?",
}


def spoil(answers: list[str], how: str, seed: int = 0) -> list[tuple[int, str]]:
    """(index, spoiled answer) of every answer."""
    rng = Random(seed)
    spoiled = []
    for i, answer in enumerate(answers):
        other = next(a for a in answers[i + 1 :] + answers if a != answer)
        spoiled.append((i, CORRUPTIONS[how](answer, other, rng)))
    return spoiled
