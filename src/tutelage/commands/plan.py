"""``tutelage plan``: what would run, why, and what it will cost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tutelage.commands.shared import (
    STORE,
    AsJson,
    Cores,
    Seed,
    Seeds,
    Sets,
    Where,
    Which,
    chosen_recipe,
    console,
    edge,
    planned,
    print_json,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from tutelage.catalog import Chosen
    from tutelage.graph import Node, Plan


def plan(
    recipe: Which,
    sets: Sets = None,
    seed: Seed = None,
    seeds: Seeds = None,
    store: Where = STORE,
    cores: Cores = None,
    as_json: AsJson = False,
) -> None:
    """Show which stages are stored, which will run and why, and what that will cost. Runs nothing."""
    chosen = chosen_recipe(recipe, sets, seed, seeds)
    made = planned(chosen, store)

    from tutelage.estimate import Estimator, summary
    from tutelage.explain import reasons
    from tutelage.run import core_count
    from tutelage.store import Store

    home = Store(store, create=False)
    estimator, cores = Estimator(home), cores or core_count()
    why = reasons(made, home)
    if as_json:
        return print_json(_plan_json(chosen, made, estimator, why, cores))
    out = console()
    _plan_table(made, estimator, why, out)
    out.print(f"[bold]{chosen.name}[/]: {summary(made, estimator, cores)}", highlight=False)


def _plan_json(chosen: Chosen, made: Plan, estimator: Any, why: dict[str, str], cores: int) -> dict[str, Any]:
    from dataclasses import asdict

    from tutelage.estimate import span
    from tutelage.graph import record

    stages = [
        {
            "label": n.label,
            "name": n.stage.name,
            "kind": n.stage.kind(),
            "key": n.key,
            "status": n.status,
            "why": why[n.key],
            "inputs": [{"path": f, "key": k, "port": p, "step": s, "label": made.nodes[k].label} for f, k, p, s in n.inputs],
            "outputs": {port: {"kind": n.stage.outputs[port], **asdict(t)} for port, t in n.types.items()},
            "threads": n.stage.threads,
            "flops": n.flops,
            "seconds": estimator.seconds(n),
            "measured": estimator.measured(n),
        }
        for n in made.nodes.values()
    ]
    totals = {
        "stored": sum(n.status == "stored" for n in made.nodes.values()),
        "run": len(made.todo),
        "flops": sum(n.flops for n in made.todo),
        "seconds": span(made.todo, estimator.seconds, cores),
        "cores": cores,
    }
    arguments = {"recipe": chosen.name, "arguments": chosen.arguments}
    return {**arguments, "stages": stages, "totals": totals, "records": [record(g) for g in chosen.goals]}


def _plan_table(made: Plan, estimator: Any, why: dict[str, str], out: Console) -> None:
    """One line for stages that differ in nothing shown but their names; two where the terminal is narrow."""
    from rich.table import Table
    from rich.text import Text

    from tutelage.estimate import human_time, si

    wide = out.width >= 110
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("stage", overflow="fold", max_width=44)
    table.add_column("kind", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for head in ("FLOP", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("why", "made from") if wide else ():
        table.add_column(head, overflow="fold")
    words = {"stored": Text("stored", "green"), "run": Text("will run", "yellow"), "unneeded": Text("not needed", "dim")}
    for nodes in _alike(made, why):
        n, first = nodes[0], _reason(made, nodes[0], why)
        flops, seconds = sum(m.flops for m in nodes), sum(estimator.seconds(m) for m in nodes)
        cost = (si(flops).strip() if flops else "", human_time(seconds) if seconds else "") if n.status == "run" else ("", "")
        row = (Text(_braces([m.label for m in nodes])), type(n.stage).__name__, words[n.status], *cost)
        if wide:
            table.add_row(*row, first, _sources(made, n))
        else:
            table.add_row(*row)
            table.add_row(Text.assemble("  ", (first, "dim"), (" ← " if n.inputs else ""), _sources(made, n)))
    out.print(table, highlight=False)


def _alike(made: Plan, why: dict[str, str]) -> list[list[Node]]:
    groups: dict[Any, list[Node]] = {}
    for n in made.nodes.values():
        groups.setdefault((n.stage.kind(), n.status, why[n.key], tuple(n.inputs)), []).append(n)
    return list(groups.values())


def _reason(made: Plan, node: Node, why: dict[str, str]) -> str:
    """Why, short: which inputs a stage waits for is seen in their colour."""
    waits = any(made.nodes[k].status == "run" for _, k, _, _ in node.inputs)
    return "waits" if waits and why[node.key] == node.why else why[node.key]


def _sources(made: Plan, node: Node) -> Text:
    """Inputs; those that must run first in yellow. A port is named where there are several."""
    from rich.text import Text

    parts: dict[str, str] = {}
    for _, k, port, step in node.inputs:
        other = made.nodes[k]
        name = edge(other.label, port, step) if len(other.stage.outputs) > 1 or step is not None else other.label
        parts[name] = "yellow" if other.status == "run" else ""
    return Text(", ").join(Text(name, style) for name, style in parts.items())


def _braces(labels: list[str]) -> str:
    """``eval student / {sum, sort}@0`` for labels that share their beginning, and their seed."""
    if len(labels) == 1:
        return labels[0]
    seeds = {label.rpartition("@")[2] if "@" in label else "" for label in labels}
    end = f"@{seeds.pop()}" if len(seeds) == 1 and "" not in seeds else ""
    labels = [label.removesuffix(end) for label in labels]
    shared = os.path.commonprefix(labels)  # noqa: RUF071 (characters are what is wanted)
    return f"{shared}{{{', '.join(label[len(shared) :] for label in labels)}}}{end}"
