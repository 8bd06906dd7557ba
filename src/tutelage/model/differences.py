"""What differs between the tokenizers and chat templates of two model folders, in words.

For people who are told that two models cannot be compared token by token. Leaves out: whether the difference matters.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

PROBES = ("The answer is 12 + 30 = 42.\n", "naïve\u00a0café — 東京\t{'x': [1, 2]}")
"""Texts that tokenizers with equal tokens may still split differently."""


def tokenizer_difference(ours: Any, theirs: Any) -> str:
    """How the teacher's tokenizer is another than the student's; empty where they give the same ids."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    for ids, rest, who in ((mine, other, "the student"), (other, mine, "the teacher")):
        own = sorted(ids.keys() - rest.keys(), key=ids.__getitem__)
        if own:
            return f"{who} alone has {len(own)} of its {len(ids)} tokens, such as {own[0]!r}"
    moved = sorted((t for t in mine if mine[t] != other[t]), key=mine.__getitem__)
    if moved:
        token = moved[0]
        return f"{len(moved)} of {len(mine)} tokens have other ids, such as {token!r}: {mine[token]} and {other[token]}"
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        pair = getattr(ours, name), getattr(theirs, name)
        if pair[0] != pair[1]:
            return f"{name} is {pair[0]!r} for the student and {pair[1]!r} for the teacher"
    for text in PROBES:
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            return f"the tokens are the same, but {text.strip()!r} is split into others"
    return ""


def template_difference(ours: str, theirs: str) -> str:
    """Where a chat template first says something else; empty where they are the same text."""
    if ours == theirs:
        return ""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    begin = max(0, same - 15)
    at = [f"{text[begin : same + 25]!r}" for text in (ours, theirs)]
    return f"from character {same + 1} on: {at[0]} for the student, {at[1]} for the teacher"


def difference(student: Path, teacher: Path) -> tuple[str, str]:
    """(how the tokenizers differ, how the chat templates do), each empty where they do not. Raises `UserError`."""
    from tutelage.model.folder import load_tokenizer

    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    return tokenizer_difference(ours, theirs), template_difference(*(str(t.chat_template or "") for t in (ours, theirs)))
