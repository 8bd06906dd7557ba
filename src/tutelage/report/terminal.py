"""A run's tables in the terminal, readable at 100 columns: recovery, accuracy by domain, losses elsewhere, cost.

Every column and row names its stage and what that stage started from; every seed's figure is printed; wherever a mean
over domains is shown, the domains stand beside it. Leaves out: curves, transcripts and the graph (html.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tutelage.report.data import collect
from tutelage.store import Store

JSON = dict[str, Any]
WIDE = 4
"""Domains side by side; more go into further tables."""


def show(store: Store, run_name: str, console: Console) -> None:
    """Prints what is known of a run. Raises `UserError` for an unknown run."""
    found = collect(store, run_name)
    head(found, console)
    if found["scores"]:
        accuracy(found, console)
        recovery(found, console)
        comparisons(found, console)
        elsewhere(found, console)
    else:
        console.print("This recipe draws no table: no scores to show.")
    costs(found, console)


# --- words for numbers ---------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def within(value: float | None, interval: Sequence[float | None] | None) -> str:
    """``±4.2``: the farther end of the interval, in points."""
    if value is None or not interval or interval[0] is None or interval[1] is None:
        return ""
    return f"±{100 * max(interval[1] - value, value - interval[0]):.1f}"


def points(value: float | None, interval: Sequence[float | None] | None = None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} {within(value, interval)}".strip()


def ratio(value: float | None, interval: Sequence[float | None] | None = None) -> str:
    """``91.8 % (84–101)``"""
    if value is None:
        return "–"
    if not interval or interval[0] is None or interval[1] is None:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.1f} % ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def amount(value: float | None) -> str:
    """1,234,567 -> 1.23M"""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value and value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}" if value else "0"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def title(entry: JSON) -> str:
    """A checkpoint's label, with its stage and step where the label does not say them."""
    label, stage = str(entry["row"]), entry.get("stage")
    if not stage or _plain(stage) == _plain(label):
        return label
    return stage if stage.startswith(f"{label}@") else f"{label} ({stage})"


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum() or c == "@")


def origin(entry: JSON) -> str:
    """What the checkpoint started from."""
    return f"from {entry['parent']}" if entry.get("parent") else ""


def chunks(names: Sequence[str]) -> Iterator[list[str]]:
    for begin in range(0, len(names), WIDE):
        yield list(names[begin : begin + WIDE])


def domains_of(found: JSON) -> list[str]:
    return list(dict.fromkeys(d for row in found["scores"].values() for d in row["domains"]))


def table(heading: str, caption: str = "") -> Table:
    made = Table(
        title=heading, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", pad_edge=False
    )
    made.title_style, made.caption_style = "bold", "dim"
    return made


# --- the tables ----------------------------------------------------------------------------------------------------------


def head(found: JSON, console: Console) -> None:
    counts: dict[str, int] = {}
    for stage in found["stages"]:
        counts[stage["status"]] = counts.get(stage["status"], 0) + 1
    stages = ", ".join(f"{n} {status}" for status, n in counts.items())
    seeds = ", ".join(map(str, found["seeds"]))
    state = found["state"] or "unknown state"
    console.print(
        f"\n[bold]{escape(found['run'])}[/] · recipe {escape(str(found['recipe']))} · seeds {seeds} · {escape(state)}"
    )
    console.print(f"[dim]stages: {stages}[/]")
    for warning in found["warnings"]:
        console.print(f"[yellow]note:[/] {escape(warning)}")


def accuracy(found: JSON, console: Console) -> None:
    """One row a checkpoint, one column a domain."""
    many = "; means over seeds" if len(found["seeds"]) > 1 else ""
    caption = (
        f"% right on held-out tasks ± the farther end of the 95 % interval{many}; underlined: the domain it was trained for"
    )
    for part in chunks(domains_of(found)):
        made = table("Accuracy by domain", caption)
        made.add_column("checkpoint", overflow="fold")
        made.add_column("part", overflow="fold")
        made.add_column("parent", overflow="fold")
        for domain in part:
            made.add_column(escape(domain), justify="right", no_wrap=True)
        for row in found["scores"].values():
            cells = [accuracy_cell(row["domains"].get(d), d in row["domains_taught"]) for d in part]
            style = "bold" if row["role"] == "after" else "italic" if row["role"] == "control" else ""
            part_of = {"after": "student"}.get(row["role"], row["role"])
            made.add_row(escape(title(row)), part_of, escape(row["parent"] or ""), *cells, style=style)
        console.print(made)
    failed = {r: sum(d["errors"] for d in row["domains"].values()) for r, row in found["scores"].items()}
    if any(failed.values()):
        shown = ", ".join(f"{escape(r)} {n}" for r, n in failed.items() if n)
        console.print(f"[yellow]verifier errors[/] (counted as not right): {shown}")


def accuracy_cell(cell: JSON | None, own: bool) -> str:
    if not cell:
        return "–"
    mean = f"[underline]{percent(cell['mean'])}[/]" if own else percent(cell["mean"])
    return f"{mean} [dim]{within(cell['mean'], cell['interval'])}[/]"


def recovery(found: JSON, console: Console) -> None:
    rec = found["recovery"]
    if not rec or not rec["domains"]:
        return
    made = table("Recovery: (after − before) / (teacher − before)")
    made.add_column("domain", overflow="fold")
    made.add_column(escape(f"before:\n{title(rec['before'])}\n{origin(rec['before'])}"), justify="right", overflow="fold")
    made.add_column("\n\nteacher", justify="right")
    made.add_column("\n\nthe domain's own", style="dim", overflow="fold")
    made.add_column(escape(f"after:\n{title(rec['after'])}\n{origin(rec['after'])}"), justify="right", overflow="fold")
    made.add_column("gap\n(points)", justify="right", no_wrap=True)
    made.add_column("recovery", justify="right", no_wrap=True)
    for domain, row in rec["domains"].items():
        teacher = rec["teachers"][domain]
        shown = ratio(row["recovery"], row["interval"]) if row["recovery"] is not None else f"no gap ({points(row['gain'])})"
        numbers = [percent(row[k]) for k in ("before", "teacher", "after")]
        who = escape(f"{teacher['stage'] or teacher['row']}\n{origin(teacher)}".strip())
        made.add_row(escape(domain), *numbers[:2], who, numbers[2], points(row["gap"], row["gap_interval"]), shown)
    console.print(made)
    for seed in rec["seeds"]:
        console.print(f"  seed {seed['seed']}: all domains {whole(seed)}")
    if rec["seeds_missing"]:
        console.print(f"  [yellow]not measured whole yet:[/] seed {', '.join(map(str, rec['seeds_missing']))}")
    if len(rec["seeds"]) > 1:
        console.print(f"  [bold]mean over seeds: {ratio(rec['mean'], rec['interval'])}[/] [dim](interval: over tasks)[/]")


def whole(seed: JSON) -> str:
    """A seed's primary figure, or its numbers where there is no ratio."""
    if seed["recovery"] is not None:
        return f"[bold]{ratio(seed['recovery'], seed['interval'])}[/]"
    return f"no gap to recover: gained {points(seed['gain'])} of {points(seed['gap'], seed['gap_interval'])}, summed"


def comparisons(found: JSON, console: Console) -> None:
    """Teachers and student over the checkpoint before and over each control, domain by domain."""
    domains = list((found["recovery"] or {}).get("domains") or {})
    for part in chunks(domains) if found["gaps"] else ():
        made = table(
            "Points above", "paired differences ± the farther end of the 95 % interval; teachers: each on its own domain"
        )
        made.add_column("who − than what", overflow="fold")
        for domain in part:
            made.add_column(escape(domain), justify="right", no_wrap=True)
        made.add_column("mean", justify="right", no_wrap=True)
        for gap in found["gaps"]:
            cells = [gap["domains"].get(d) for d in part]
            shown = [points(c["difference"], c["interval"]) if c else "–" for c in cells]
            whole_gap = points(gap["difference"], gap["interval"])
            made.add_row(escape(f"{gap['of']} − {gap['than']}"), *shown, whole_gap)
        console.print(made)


def elsewhere(found: JSON, console: Console) -> None:
    lost = found["lost_elsewhere"]
    domains = [d for d in domains_of(found) if any(d in row for row in lost.values())]
    for part in chunks(domains):
        made = table("What each specialist lost elsewhere", "points against the checkpoint before, paired, ± as above")
        made.add_column("specialist", overflow="fold")
        for domain in part:
            made.add_column(escape(domain), justify="right", no_wrap=True)
        for row, by in lost.items():
            shown = [points(by[d]["difference"], by[d]["interval"]) if d in by else "own" for d in part]
            made.add_row(escape(row), *shown)
        console.print(made)


def costs(found: JSON, console: Console) -> None:
    cost = found["cost"]
    if not cost["by_stage"]:
        return
    made = table("Cost", "algorithmic FLOPs and seconds of one replicate (mean over seeds)")
    for name in ("what", "FLOPs", "time", "tokens"):
        made.add_column(name, justify="left" if name in ("what", "tokens") else "right", overflow="fold")
    trained = {n: c for n, c in cost["by_stage"].items() if not c["evaluation"] and c["flops"]}
    for name, entry in trained.items():
        made.add_row(escape(name), amount(entry["flops"]), duration(entry["seconds"]), tokens(entry))
    for name, entry in cost["ledgers"].items():
        label = {"consolidation": "ledger: consolidation alone", "with_teachers": "ledger: with the teachers"}[name]
        made.add_row(f"[bold]{label}[/]", amount(entry["flops"]), duration(entry["seconds"]), tokens(entry))
    whole_run = cost["run"]
    made.add_row("[bold]the whole run[/], all seeds", amount(whole_run["flops"]), duration(whole_run["seconds"]), "")
    console.print(made)


def tokens(entry: JSON) -> str:
    return ", ".join(f"{amount(n)} {what}" for what, n in entry["tokens"].items() if n)
