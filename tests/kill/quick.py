"""The quickstart in seconds: two of its domains, a smaller model, few steps and tasks, every kind of stage.

Accuracy pays nothing to a model that has hardly been trained, and where nobody is paid nothing is learnt; so the stages
that learn from scores are paid by the characters they write.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tutelage.graph import Goals, from_record, record
from tutelage.recipes.quickstart import quickstart

GONE = re.compile(r"\b(reverse|convert)\b")
PAID = {"kind": "tests.stages.toy.Taste"}
SAMPLED = {"sampling.max_new_tokens": 12}
LEARNS = {"env.verifier": PAID, **SAMPLED, "prompts": 8, "group": 4, "steps": 5}
SELECTS = {"select.env.verifier": PAID, "select.sampling.max_new_tokens": 8, "select.every": 2, "select.limit": 8, "rows": 24}
SETS: dict[str, dict[str, Any]] = {
    "tasks": {"pretrain": 600, "gold": 20, "rl": 40, "dev": 10, "heldout": 20},
    "init": {"width": 32, "layers": 2, "mlp": 64},
    "pretrain": {"steps": 40, "rows": 24},
    "sft": {**SELECTS, "steps": 8},
    "sft-continued": {**SELECTS, "select.every": 4, "optimizer.lr": 0.003},
    "rl-sum": {**LEARNS, "optimizer.lr": 0.003},
    "rl-sort": {**LEARNS, "optimizer.lr": 0.003},
    "mopd": {**LEARNS, "group": 1, "prompts": 16},
    "eval": {**SAMPLED, "limit": 12, "slots": 4},
}


def short() -> Goals:
    """Its goals."""
    rec = _without(record(quickstart()))
    for name, stage in rec["stages"].items():
        for path, value in SETS.get("eval" if name.startswith("eval ") else name, {}).items():
            *way, last = path.split(".")
            spot = stage
            for step in way:
                spot = spot[step]
            assert last in spot, f"{name}.{path}"
            spot[last] = json.loads(json.dumps(value))
    return from_record(rec)


def _gone(value: Any) -> bool:
    name = value.get("ref") or value.get("name") if isinstance(value, dict) else value
    return isinstance(name, str) and bool(GONE.search(name))


def _without(value: Any) -> Any:
    """A record without whatever is named after, or refers to, a domain that is left out."""
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if not _gone(k) and not _gone(v)}
    if isinstance(value, list):
        return [_without(v) for v in value if not _gone(v)]
    return value
