"""``tutelage lineage``: the whole ancestry of an artifact."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from tutelage.commands.shared import STORE, AsJson, Where, console, edge, find, near, newest_of, open_store, print_json


def lineage(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A stage's name or the start of a key; or NAME:PORT.")],
    store: Where = STORE,
    as_json: AsJson = False,
) -> None:
    """Print everything an artifact was made from, back to the first stage."""
    home = open_store(store)
    key, port = find(home, artifact)
    metas = home.lineage(key)
    if as_json:
        return print_json({"key": key, "port": port, "stages": metas})
    out = console()
    if several := newest_of(home, artifact.partition(":")[0], key):
        out.print(several, highlight=False, soft_wrap=True)
    out.print(_tree(key, port, {m["key"]: m for m in metas}), highlight=False)
    total = sum(m["cost"]["flops"] for m in metas), sum(m["seconds"] for m in metas)
    from tutelage.estimate import count, human_time, si

    out.print(f"{count(len(metas), 'stage')}, {si(total[0])}FLOP, {human_time(total[1])} in all", highlight=False)
    if port:
        out.print(f"files: {near(home.path(key, port))}", highlight=False, soft_wrap=True)


def _tree(key: str, port: str, metas: dict[str, dict[str, Any]]) -> Any:
    from rich.text import Text
    from rich.tree import Tree

    from tutelage.estimate import human_time, si

    def label(meta: dict[str, Any], through: str) -> Text:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(meta["finished"]))
        spent = f"{si(meta['cost']['flops'])}FLOP, " if meta["cost"]["flops"] else ""
        facts = (meta["kind"].rpartition(".")[2], meta["key"][:8], made, spent + human_time(meta["seconds"]), meta["host"])
        return Text.assemble((meta["name"], "bold"), (f":{through}" if through else ""), ("  " + "  ".join(facts), "dim"))

    root = Tree(label(metas[key], port), guide_style="dim")
    shown = {key}
    stack = [(root, one) for one in reversed(metas[key]["inputs"])]
    while stack:  # in the order of the lines
        branch, one = stack.pop()
        through = edge("", one["port"], one["step"])[1:]
        if one["key"] in shown:
            branch.add(Text.assemble((one["name"], "bold"), f":{through}", ("  (shown above)", "dim")))
            continue
        shown.add(one["key"])
        below = branch.add(label(metas[one["key"]], through))
        stack.extend((below, each) for each in reversed(metas[one["key"]]["inputs"]))
    return root
