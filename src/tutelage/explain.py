"""Why a stage of a plan will run: what differs from the nearest stored stage."""

from __future__ import annotations

import json
from typing import Any

from tutelage.graph import Node, Plan, all_goals, key, order, record
from tutelage.spec import flags
from tutelage.store import Store


def reasons(plan: Plan, store: Store) -> dict[str, str]:
    """Why each stage has its status; for one that will run, what differs from the nearest stored stage of its name."""
    stored: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for meta in store.metas():
        stored.setdefault((meta["name"], meta["kind"]), []).append(meta)
    records: dict[str, dict[str, Any]] = {}
    for one in plan.goals if plan.todo else ():
        stages = record(one)["stages"]
        records.update({key(s): stages[s.name] for s in order(at.of for at in all_goals(one))})
    why = {}
    for node in plan.nodes.values():
        why[node.key] = node.why
        near = stored.get((node.stage.name, node.stage.kind()))
        step = store.checkpoint(node.key) if node.status == "run" else None
        if step is not None:
            why[node.key] = f"goes on from step {step}"
        elif node.status == "run" and node.why == "not in the store":
            made = [_changes(node, records[node.key], meta) for meta in near or ()]
            why[node.key] = min(made, key=len) if made else "new"
    return why


def _changes(node: Node, rec: dict[str, Any], meta: dict[str, Any]) -> str:
    """What differs between a stage and a stored one, as text."""
    cls = type(node.stage)
    found = [] if meta["version"] == cls.version else [f"version {meta['version']} → {cls.version}"]
    fields = [n for n in cls.model_fields if not flags(cls, n).get("unkeyed")]
    for name in fields:
        old, new = meta["record"].get(name), json.loads(json.dumps(rec.get(name)))
        if old != new:
            short = isinstance(old, (str, int, float, bool)) and isinstance(new, (str, int, float, bool))
            found.append(f"{name} {old} → {new}" if short and len(f"{old}{new}") < 40 else f"{name} changed")
    keys = {i["path"]: i["key"] for i in meta["inputs"]}
    found += [f"input {path} changed" for path, k, _, _ in node.inputs if path in keys and keys[path] != k]
    return ", ".join(found) or "its code or an outside file changed"
