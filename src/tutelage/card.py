"""The model card that every Model artifact carries: what made it, from what, all the way back.

Leaves out: lineage of data and scores, which `tutelage lineage` prints.
"""

from __future__ import annotations

from typing import Any

from tutelage.store import Store


def card(store: Store, meta: dict[str, Any], port: str) -> str:
    """A model card: what made this model, from what, all the way back."""
    ancestors: dict[str, dict[str, Any]] = {}
    for each in meta["inputs"]:
        ancestors.update({m["key"]: m for m in store.lineage(each["key"])})
    lines = [
        "---",
        "library_name: transformers",
        "---",
        f"# {meta['name']}",
        "",
        f"Port `{port}` of stage `{meta['name']}` (`{meta['kind']}`), made by Tutelage ({meta['code']}).",
        "",
        "| stage | kind | key | from |",
        "| --- | --- | --- | --- |",
    ]
    for one in [*ancestors.values(), meta]:
        parents = ", ".join(dict.fromkeys(f"{i['name']}:{i['port']}" for i in one["inputs"])) or "nothing"
        lines.append(f"| {one['name']} | `{one['kind']}` | `{one['key'][:12]}` | {parents} |")
    return "\n".join(lines) + "\n"
