"""``tutelage plan``: what would run, why, and what it will cost."""

from __future__ import annotations

import os
from string import ascii_letters, digits
from typing import TYPE_CHECKING, Any

from tutelage.commands.run import SkipBadRows
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
    from rich.table import Table
    from rich.text import Text

    from tutelage.catalog import Chosen
    from tutelage.explain import Reason
    from tutelage.graph import Node, Plan

SHOWN = 2
"""Changes, and inputs that will be remade, that the table prints of a stage; ``--json`` has them all."""
HEADS = ("stage", "kind", "status", "FLOP", "time")


def plan(
    recipe: Which,
    sets: Sets = None,
    seed: Seed = None,
    seeds: Seeds = None,
    store: Where = STORE,
    cores: Cores = None,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Show which stages are stored, which will run and why, and what that will cost. Runs nothing."""
    chosen = chosen_recipe(recipe, sets, seed, seeds)
    if skip_bad_rows:
        from tutelage.catalog import skipping

        chosen = skipping(chosen)
    made = planned(chosen, store)

    from tutelage.estimate import Estimator, summary
    from tutelage.explain import NEW, reasons
    from tutelage.run import core_count
    from tutelage.store import Store

    home = Store(store, create=False)
    estimator, cores = Estimator(home), cores or core_count()
    why = reasons(made, home)
    if as_json:
        return print_json(_plan_json(chosen, made, estimator, why, cores))
    out = console()
    _plan_table(made, estimator, why, out)
    if any(r.lead == NEW for r in why.values()):
        out.print(NEW, style="dim", highlight=False)
    for label, how in _attention(made).items():
        out.print(f"{label}: {how}", style="dim", highlight=False, markup=False)
    out.print(f"[bold]{chosen.name}[/]: {summary(made, estimator, cores)}", highlight=False)


def _attention(made: Plan) -> dict[str, str]:
    """Of every imported base that is not packed, how its rows share a forward."""
    from tutelage.graph import ModelType
    from tutelage.model.headers import PACKED, attention

    bases = ((n, t) for n in made.nodes.values() if not n.inputs for t in n.types.values() if isinstance(t, ModelType))
    return {n.label: attention(t.architecture) for n, t in bases if t.architecture not in PACKED}


def _plan_json(chosen: Chosen, made: Plan, estimator: Any, why: dict[str, Reason], cores: int) -> dict[str, Any]:
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
            "why": why[n.key].text(),
            "changes": [c.json for c in why[n.key].changes],
            "against": why[n.key].against,
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
    return {
        **arguments,
        "stages": stages,
        "attention": _attention(made),
        "totals": totals,
        "records": [record(g) for g in chosen.goals],
    }


MANY = 200
"""Rows above which a table is plain text."""


def _plan_table(made: Plan, estimator: Any, why: dict[str, Reason], out: Console) -> None:
    """One line for stages that differ in nothing shown but their names; where the terminal is narrow, why stands below it."""
    from rich.padding import Padding
    from rich.text import Text

    from tutelage.estimate import human_time, si

    words = {"stored": Text("stored", "green"), "run": Text("will run", "yellow"), "unneeded": Text("not needed", "dim")}
    rows: list[tuple[list[Text], Text, Text]] = []
    for nodes in _alike(made, why):
        n = nodes[0]
        flops, seconds = sum(m.flops for m in nodes), sum(estimator.seconds(m) for m in nodes)
        cost = (si(flops).strip() if flops else "", human_time(seconds) if seconds else "") if n.status == "run" else ("", "")
        cells = [Text(_braces([m.label for m in nodes])), Text(type(n.stage).__name__), words[n.status], *map(Text, cost)]
        rows.append((cells, Text(_short(why[n.key])), _sources(made, n)))
    wide = out.width >= 110
    widths = [max([len(head), *(row[0][i].cell_len for row in rows)]) for i, head in enumerate(HEADS)]
    widths[0] = min(widths[0], max(20, out.width // 4 if wide else out.width - sum(widths[1:]) - 2 * len(HEADS)))
    if len(rows) > MANY:
        return _plain(rows, widths, wide, out)
    table = _columns(widths, wide, header=True)
    for cells, because, sources in rows:
        table.add_row(*cells, *((because, sources) if wide else ()))
        if not wide:
            out.print(table, highlight=False)
            below = Text.assemble((because.plain, "dim"), " ← ", sources) if sources else Text(because.plain, "dim")
            out.print(Padding(below, (0, 0, 0, 2)), highlight=False)
            table = _columns(widths, wide, header=False)
    if wide:
        out.print(table, highlight=False)


def _plain(rows: list[tuple[list[Text], Text, Text]], widths: list[int], wide: bool, out: Console) -> None:
    """The same as aligned text: a table of many rows takes longer to draw than the plan to make."""
    for cells, because, sources in rows:
        line = "  ".join(c.plain.ljust(w) for c, w in zip(cells, widths, strict=True))
        rest = f"{because.plain} ← {sources.plain}" if sources.plain else because.plain
        print(f"{line}  {rest}" if wide else f"{line.rstrip()}\n  {rest}")


def _columns(widths: list[int], wide: bool, header: bool) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), show_header=header)
    for i, (head, width) in enumerate(zip(HEADS, widths, strict=True)):
        table.add_column(head, width=width, overflow="fold", justify="right" if i > 2 else "left")
    for head in ("why", "made from") if wide else ():
        table.add_column(head, overflow="fold")
    return table


def _alike(made: Plan, why: dict[str, Reason]) -> list[list[Node]]:
    groups: dict[Any, list[Node]] = {}
    for n in made.nodes.values():
        groups.setdefault((n.stage.kind(), n.status, _short(why[n.key]), tuple(n.inputs)), []).append(n)
    return list(groups.values())


def _short(reason: Reason) -> str:
    """Why, in a few words: what is new says so once, under the table."""
    from tutelage.explain import NEW

    return "new" if reason.lead == NEW else reason.text(SHOWN)


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
    shared = shared.rstrip(ascii_letters + digits)  # no word in two
    return f"{shared}{{{', '.join(label[len(shared) :] for label in labels)}}}{end}"
