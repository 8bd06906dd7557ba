"""A run's tables in the terminal, readable at 80 columns: accuracy by domain, recovery, methods, losses elsewhere, cost.

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
ROOMY = 100
"""Columns of a terminal below which parents are left to the captions and no column stands that can be told in another."""
TASKS_ONLY = "± over tasks only; it does not cover the training seed"


def show(store: Store, run_name: str, console: Console) -> None:
    """Prints what is known of a run. Raises `UserError` for an unknown run."""
    from tutelage.report import methods_show  # which prints with the words of this file

    found = collect(store, run_name)
    head(found, console)
    if found["scores"]:
        accuracy(found, console)
        recovery(found, console)
        if found["methods"]:
            methods_show.show(found["methods"], console)
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
    return "–" if value is None else f"{100 * value:+.1f} {within(value, interval)}".strip().replace("-", "−")


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


FLOPS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def flops(*values: float | None) -> str:
    """``3.7 TFLOP``, as plans print it; several in the unit of the largest: ``3.6, 4.7 TFLOP``."""
    most = max((v or 0.0 for v in values), default=0.0)
    if not most:
        return "–"
    scale, letter = next((s for s in FLOPS if most >= s[0]), FLOPS[-1])
    places = 0 if most / scale >= 10 else 1
    return f"{', '.join(f'{(v or 0.0) / scale:.{places}f}' for v in values)} {letter}FLOP"


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


def chunks(names: Sequence[str], wide: int = WIDE) -> Iterator[list[str]]:
    for begin in range(0, len(names), wide):
        yield list(names[begin : begin + wide])


def abreast(names: Sequence[str], console: Console, labels: Sequence[str], cell: int, others: int = 0) -> Iterator[list[str]]:
    """As many domains side by side, up to `WIDE`, as leave the longest word of ``labels`` whole; ``others``: columns taken."""
    first = max((len(word) for label in labels for word in label.split()), default=0) + 3
    each = max([cell, *map(len, names)]) + 3
    return chunks(names, min(WIDE, max(1, (console.width - first - others) // each)))


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
    caption = f"% right on held-out tasks ± the farther end of the 95 % interval{many}; {TASKS_ONLY}; underlined: the domain "
    caption += "it was trained for"
    roomy, rows = console.width >= ROOMY, found["scores"].values()
    parents = [len(r["parent"] or "") for r in rows] if roomy else []
    taken = 10 + max([3, *parents]) + 3 if roomy else 10
    for part in abreast(domains_of(found), console, ["checkpoint", *map(title, rows)], 9, taken):
        made = table("Accuracy by domain", caption)
        made.add_column("checkpoint", overflow="fold")
        made.add_column("part", no_wrap=True)
        if roomy:
            made.add_column("parent", overflow="fold")
        for domain in part:
            made.add_column(escape(domain), justify="right", no_wrap=True)
        for row in rows:
            cells = [accuracy_cell(row["domains"].get(d), d in row["domains_taught"]) for d in part]
            style = "bold" if row["role"] == "after" else "italic" if row["role"] == "control" else ""
            words = [title(row), role_word(row, found), row["parent"] or ""]
            made.add_row(*map(escape, words if roomy else words[:2]), *cells, style=style)
        console.print(made)
    failed = {r: sum(d["errors"] for d in row["domains"].values()) for r, row in found["scores"].items()}
    if any(failed.values()):
        shown = ", ".join(f"{escape(r)} {n}" for r, n in failed.items() if n)
        console.print(f"[yellow]verifier errors[/] (counted as not right): {shown}")


def role_word(row: JSON, found: JSON) -> str:
    """A row's part in the table, in a word: who comes after teachers is their student."""
    return "student" if row["role"] == "after" and found["recovery"] else str(row["role"])


def accuracy_cell(cell: JSON | None, own: bool) -> str:
    if not cell:
        return "–"
    mean = f"[underline]{percent(cell['mean'])}[/]" if own else percent(cell["mean"])
    return f"{mean} [dim]{within(cell['mean'], cell['interval'])}[/]"


def recovery(found: JSON, console: Console) -> None:
    rec = found["recovery"]
    if not rec or not rec["domains"]:
        return
    ends = {k: f"{title(rec[k])} {origin(rec[k])}".strip() for k in ("before", "after")}
    many = "means over seeds; " if len(rec["seeds"]) > 1 else ""
    caption = f"before: {ends['before']}; after: {ends['after']}; teacher: the domain's own; {many}{TASKS_ONLY}"
    made = table("Recovery: (after − before) / (teacher − before)", caption)
    roomy = console.width >= ROOMY
    made.add_column("domain", overflow="fold")
    for name in ("before", "teacher"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("", style="dim", overflow="fold")
    made.add_column("after", justify="right", no_wrap=True)
    for name in ("gap\n(points)", "recovery"):
        made.add_column(name, justify="right", no_wrap=True)
    for domain, row in rec["domains"].items():
        teacher = rec["teachers"][domain]
        numbers = [percent(row[k]) for k in ("before", "teacher", "after")]
        who = escape(f"{teacher['stage'] or teacher['row']}{' ' if roomy else chr(10)}{origin(teacher)}".strip())
        gap = points(row["gap"], row["gap_interval"])
        made.add_row(escape(domain), *numbers[:2], who, numbers[2], gap, recovered(row, "" if roomy else "\n"))
    console.print(made)
    if len(rec["seeds"]) > 1:
        every_seed(rec, console, roomy)
    for seed in rec["seeds"]:
        without = [d for d, row in seed["domains"].items() if row["recovery"] is None]
        none = f"; [yellow]no gap in {escape(', '.join(without))}[/]" if without else ""
        console.print(f"  seed {seed['seed']}: all domains {whole(seed)}{none}")
    if rec["seeds_missing"]:
        console.print(f"  [yellow]not measured whole yet:[/] seed {', '.join(map(str, rec['seeds_missing']))}")
    if len(rec["seeds"]) > 1:
        mean = ratio(rec["mean"], rec["interval"])
        console.print(f"  [bold]mean over seeds: {mean}[/] [dim](interval: over tasks only)[/]")


def recovered(row: JSON, between: str = "") -> str:
    """A domain's ratio, or what was gained where there is none; ``between`` replaces the space before the interval."""
    if row["recovery"] is None:
        return f"no gap{between or ' '}({points(row['gain'])})"
    return ratio(row["recovery"], row["interval"]).replace(" (", f"{between or ' '}(")


def every_seed(rec: JSON, console: Console, roomy: bool) -> None:
    """The accuracies behind the means, domain by domain and seed by seed."""
    made = table("Every seed", f"% right: before, the domain's own teacher, after; {TASKS_ONLY}: compare the seeds")
    made.add_column("domain", overflow="fold")
    for name in ("seed", "before", "teacher", "after", "gap", "recovery"):
        made.add_column(name, justify="right", no_wrap=True)
    for domain in rec["domains"]:
        mine = [(s["seed"], s["domains"][domain]) for s in rec["seeds"] if domain in s["domains"]]
        for i, (seed, row) in enumerate(mine):
            numbers = [percent(row[k]) for k in ("before", "teacher", "after")]
            gap = points(row["gap"], row["gap_interval"] if roomy else None)
            made.add_row("" if i else escape(domain), str(seed), *numbers, gap, recovered(row))
    console.print(made)


def whole(seed: JSON) -> str:
    """A seed's primary figure, or its numbers where there is no ratio."""
    if seed["recovery"] is not None:
        return f"[bold]{ratio(seed['recovery'], seed['interval'])}[/]"
    return f"no gap to recover: gained {points(seed['gain'])} of {points(seed['gap'], seed['gap_interval'])}, summed"


def comparisons(found: JSON, console: Console) -> None:
    """Teachers and student (or the checkpoint after) over the checkpoint before and over each control, domain by domain."""
    domains = list(dict.fromkeys(d for gap in found["gaps"] for d in gap["domains"]))
    whose = "teachers: each on its own domain; " if found["recovery"] else ""
    caption = f"paired differences ± the farther end of the 95 % interval; {whose}{TASKS_ONLY}"
    labels = [f"{gap['of']} − {gap['than']}" for gap in found["gaps"]]
    for part in abreast(domains, console, labels, 10, 13) if found["gaps"] else ():
        made = table("Points above", caption)
        made.add_column("who − than what", overflow="fold")
        for domain in part:
            made.add_column(escape(domain), justify="right", no_wrap=True)
        made.add_column("mean", justify="right", no_wrap=True)
        for label, gap in zip(labels, found["gaps"], strict=True):
            cells = [gap["domains"].get(d) for d in part]
            shown = [points(c["difference"], c["interval"]) if c else "–" for c in cells]
            made.add_row(escape(label), *shown, points(gap["difference"], gap["interval"]))
        console.print(made)
    for line in budget_lines(found):
        console.print(f"  {escape(line)}")


def budget_lines(found: JSON) -> list[str]:
    """For every control with a budget of compute: what it spent of it, and which step was chosen; seed by seed."""
    lines = []
    for row, seeds in found["budgets"].items():
        spent, budget = flops(*(s["spent"] for s in seeds)), flops(*(s["budget"] for s in seeds))
        same_unit = spent.rpartition(" ")[2] == budget.rpartition(" ")[2]
        whose = "the specialists'" if seeds[0]["teachers"] else f"of {', '.join(seeds[0]['of'])}" if seeds[0]["of"] else ""
        notes = [f"seeds {', '.join(str(s['seed']) for s in seeds)}"] if len(seeds) > 1 else []
        inside = "; ".join([*([whose] if whose else []), *notes])
        said = f"{row}: spent {spent.rpartition(' ')[0] if same_unit else spent} of its {budget} budget"
        said += f" ({inside})" if inside else ""
        chosen = [s["selected"]["step"] for s in seeds if isinstance(s["selected"], dict) and "step" in s["selected"]]
        if len(chosen) == len(seeds):
            plural = "s" if len(chosen) > 1 else ""
            said += f"; chosen on development tasks: step{plural} {', '.join(map(str, chosen))}"
            if all(s["steps"] is not None for s in seeds):
                said += f" of {', '.join(str(s['steps']) for s in seeds)}"
        lines.append(said)
    return lines


def elsewhere(found: JSON, console: Console) -> None:
    lost = found["lost_elsewhere"]
    domains = [d for d in domains_of(found) if any(d in row for row in lost.values())]
    for part in abreast(domains, console, ["specialist", *lost], 10):
        caption = "points against the checkpoint before, paired, ± as above"
        made = table("What each specialist lost elsewhere", caption)
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
    many = len(found["seeds"]) > 1
    made = table("Cost", f"algorithmic FLOPs and seconds of one replicate{' (mean over seeds)' if many else ''}")
    made.add_column("what", overflow="fold")
    for name in ("compute", "time"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("tokens", overflow="fold")
    trained = {n: c for n, c in cost["by_stage"].items() if not c["evaluation"] and c["flops"]}
    for name, entry in trained.items():
        made.add_row(escape(name), flops(entry["flops"]), duration(entry["seconds"]), tokens(entry))
    for name, entry in cost["ledgers"].items():
        label = {"consolidation": "ledger: consolidation alone", "with_teachers": "ledger: with the teachers"}[name]
        made.add_row(f"[bold]{label}[/]", flops(entry["flops"]), duration(entry["seconds"]), tokens(entry))
    over = "all seeds" if many else "all stages"
    label = f"[bold]the whole run[/]: compute and stage time, summed over {over}"
    made.add_row(label, flops(cost["run"]["flops"]), duration(cost["run"]["seconds"]), "")
    console.print(made)


def tokens(entry: JSON) -> str:
    return ", ".join(f"{amount(n)} {what}" for what, n in entry["tokens"].items() if n)
