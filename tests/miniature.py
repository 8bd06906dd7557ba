"""Recipes with little of everything: fields of a record's stages set by the stages' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def put(stage: dict[str, Any], changes: Mapping[str, Any], name: str) -> None:
    """Sets fields by dotted path; every one must be there already."""
    for path, value in changes.items():
        *way, last = path.split(".")
        spot = stage
        for step in way:
            spot = spot[step]
        assert last in spot, f"{name}.{path}"
        spot[last] = value


def shrunk(rec: dict[str, Any], sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The record, with the changes of every pattern that a stage's name begins with, in order."""
    for name, stage in rec["stages"].items():
        for pattern, changes in sets.items():
            if re.match(pattern, name):
                put(stage, changes, name)
    return rec
