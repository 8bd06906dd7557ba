"""What the store's JSON files hold: whether an ``artifact.json`` or a run is what this package writes.

Files are written by this package and read by it, but disks, editors and older versions come between. Whoever reads one can
rely on the fields below being absent or of the type they have here. Leaves out: fields that nothing reads, and whether what
they say is true (upkeep.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Fits = Callable[[Any], bool]
Form = tuple[Fits, str] | list[Any] | dict[Any, Any]
"""(test, what is needed) | [form of each item] | {str: form of each value} | {field: form}, where ``field?`` may be absent and
``field??`` null too"""

MOST = 1e30
"""Numbers are smaller, so that sums and ratios of them stay finite."""
LAST = 1e11
"""Unix times are smaller (s); calendars end soon after."""


def _number(most: float) -> Fits:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and -most < v < most


TEXT: Form = (lambda v: isinstance(v, str), "a text")
NAME: Form = (lambda v: isinstance(v, str) and bool(re.fullmatch(r"(?!\.)[^/\0]{1,200}", v)), "a name")
NUMBER: Form = (_number(MOST), "a number")
TIME: Form = (lambda v: _number(LAST)(v) and v >= 0, "a time")
WHOLE: Form = (lambda v: isinstance(v, int) and _number(2**63)(v), "a whole number")
OBJECT: Form = {str: (lambda v: True, "")}

EDGE: Form = {"ref": TEXT, "port??": NAME, "step??": WHOLE}


def _stage(value: Any) -> bool:
    """Whether it is a stage of a record: an object whose edges, however deep, are edges."""
    spots = [value]
    while spots:
        spot = spots.pop()
        if isinstance(spot, dict):
            if isinstance(spot.get("ref"), str) and unfit(spot, EDGE):
                return False
            spots.extend(spot.values())
        elif isinstance(spot, list):
            spots.extend(spot)
    return isinstance(value, dict)


TABLE: Form = {
    "rows??": {str: {str: EDGE}},
    "before??": TEXT,
    "after??": TEXT,
    "teachers??": {str: TEXT},
    "controls??": [TEXT],
    "sources??": {str: EDGE},
}
RECORD: Form = {"stages?": {str: (_stage, "a stage's record")}, "table??": TABLE}
RUN: Form = {
    "recipe??": TEXT,
    "state??": TEXT,
    "arguments??": OBJECT,
    "argv??": [TEXT],
    "started??": TIME,
    "finished??": TIME,
    "seconds??": TIME,
    "failed??": {str: TEXT},
    "goals??": [{"seed?": WHOLE, "record??": RECORD, "keys??": {str: NAME}}],
}
ARTIFACT: Form = {
    "key": NAME,
    "name": TEXT,
    "kind?": TEXT,
    "version?": WHOLE,
    "seed??": WHOLE,
    "record?": OBJECT,
    "inputs": [{"path": TEXT, "key": NAME, "port": NAME, "name": TEXT, "step??": WHOLE}],
    "outputs?": {str: {"kind?": TEXT}},
    "facts?": OBJECT,
    "cost?": {"flops?": NUMBER, "tokens?": {str: NUMBER}},
    "estimate?": NUMBER,
    "seconds?": TIME,
    "started?": TIME,
    "finished?": TIME,
    "host?": TEXT,
    "versions?": OBJECT,
    "marks?": {str: OBJECT},
    "code?": TEXT,
    "threads?": WHOLE,
    "content?": {str: TEXT},
}


def unfit(value: Any, form: Form, at: str = "") -> str:
    """Where a value is not of a form, and what is needed there; nothing where it is."""
    if isinstance(form, tuple):
        return "" if form[0](value) else f"{at} is not {form[1]}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{at} is not a list"
        return next(filter(None, (unfit(v, form[0], f"{at}.{i}") for i, v in enumerate(value))), "")
    if not isinstance(value, Mapping):
        return f"{at or 'it'} is not an object"
    if str in form:
        return next(filter(None, (unfit(v, form[str], f"{at}.{k}") for k, v in value.items())), "")
    for field, inner in form.items():
        name = field.rstrip("?")
        if (field.endswith("?") and name not in value) or (field.endswith("??") and value[name] is None):
            continue
        where = f"{at}.{name}" if at else name
        if name not in value:
            return f"{where} is missing"
        if wrong := unfit(value[name], inner, where):
            return wrong
    return ""
