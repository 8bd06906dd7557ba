"""What breaks things: JSON values of all kinds, edits of a document, edits of bytes, and how many examples are tried.

Every test runs as many examples as a slow machine has time for, the same each time; under ``make test-long`` three thousand
that differ (hypothesis prints how to see a failing one again). Leaves out: what must hold then (the tests beside).
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = 3_000
"""Under ``make test-long``."""
DEEP = 1_000
"""Levels of nesting, which no parser that recurses survives."""


def examples(usual: int) -> Any:
    """Parametrizes a test by ``count``: some examples in every run, many more in the long one."""
    return pytest.mark.parametrize("count", [usual, pytest.param(LONG, marks=pytest.mark.long)])


def tried(count: int) -> settings:
    return settings(
        max_examples=count,
        derandomize=count != LONG,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# --- values --------------------------------------------------------------------------------------------------------------

STANDS_FOR = {
    '"@deep[]"': "[" * DEEP + "0" + "]" * DEEP,
    '"@deep{}"': '{"a":' * DEEP + "0" + "}" * DEEP,
    '"@huge"': "9" * 400,
    '"@long"': '"' + "x" * 5000 + '"',
}
"""Values, as they stand in JSON text, that are too large to be shown or that `json.dumps` cannot write."""
texts = st.text(st.characters(exclude_categories=[]), max_size=6) | st.sampled_from(
    [
        "\ud800",
        "a\0b",
        "two\nlines",
        "",
        "..",
        "/",
        "é" * 50,
        "1e999",
        "[red]",
        "[/]",
        "{}",
        "%s",
        *(s[1:-1] for s in STANDS_FOR),
    ]
)
numbers = (
    st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**62, 2**63, -(2**64), 10**30, 1e308, -1e308, 5e-324, -0.0])
)


def values(words: list[str]) -> st.SearchStrategy[Any]:
    """Any JSON value, among them NaN, infinities, halves of surrogate pairs and `DEEP` nesting; ``words`` mean something."""
    leaf = st.none() | st.booleans() | numbers | texts | st.sampled_from(words)
    return st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(words) | texts, inner, max_size=3)
    )


def as_text(document: Any) -> str:
    """JSON with what `STANDS_FOR` names, and with a key that stands twice in its object."""
    text = json.dumps(document).replace("@twice", "")
    for name, value in STANDS_FOR.items():
        text = re.sub(f"{re.escape(name)}(?!:)", lambda _, value=value: value, text)  # type: ignore[misc]
    return text


# --- edits ---------------------------------------------------------------------------------------------------------------

OPS = ("put", "drop", "rename", "swap", "wrap", "copy", "twice", "add")


def edits(words: list[str], most: int = 3) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    """(what to do, where, where else, with what)"""
    spot = st.integers(0, 2**16)
    return st.lists(st.tuples(st.sampled_from(OPS), spot, spot, values(words)), min_size=1, max_size=most)


def _spots(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a document."""
    found: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        spot = stack.pop()
        inner = list(spot) if isinstance(spot, dict) else list(range(len(spot))) if isinstance(spot, list) else []
        found += [(spot, k) for k in inner]
        stack += [spot[k] for k in inner]
    return found


def edited(document: Any, steps: list[tuple[Any, ...]]) -> Any:
    """A copy of a JSON document with edits made one after another."""
    document = [copy.deepcopy(document)]
    for op, n, m, value in steps:
        spots = _spots(document)
        if not spots:
            break
        (box, at), (other, there) = spots[n % len(spots)], spots[m % len(spots)]
        if op == "put":
            box[at] = value
        elif op == "drop":
            del box[at]
        elif op == "wrap":
            box[at] = [box[at]] if n % 2 else {"kind": box[at]}
        elif op == "copy":
            box[at] = copy.deepcopy(other[there])
        elif op == "swap":
            box[at], other[there] = copy.deepcopy((other[there], box[at]))
        elif isinstance(box, dict):
            name = {"rename": value if isinstance(value, str) else str(at)[1:], "twice": f"{at}@twice", "add": str(there)}[op]
            box[name] = copy.deepcopy(other[there]) if op == "add" else box.pop(at) if op == "rename" else value
    return document[0] if document else None


byte_edits = st.lists(
    st.tuples(
        st.integers(0, 2**20),
        st.integers(0, 40),
        st.binary(max_size=8) | st.sampled_from([b"\xff", b"\0", b"\n", b'"', b"{", b"\xed\xa0\x80", b"[" * 3000]),
    ),
    min_size=1,
    max_size=4,
)
"""(where, how many bytes go, what comes)"""


def broken(raw: bytes, steps: list[tuple[int, int, bytes]]) -> bytes:
    for at, gone, new in steps:
        at %= len(raw) + 1
        raw = raw[:at] + new + raw[at + gone :]
    return raw
