"""A comparison drawn: tables in the terminal, readable at 80 columns, and one self-contained HTML page with the curves.

Both say what `compare.collect` found and nothing else. Leaves out: what it means.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape

from tutelage.explain import word
from tutelage.report import methods_show, plots, terminal
from tutelage.report.html import compared, span, template
from tutelage.report.methods_show import chance

JSON = dict[str, Any]
MANY = 8
"""Names in one line; more are counted."""
PAIRED = (
    "Means over seeds, paired by task: B − A in points with a 95 % interval (bootstrap over tasks), on how many tasks B is "
    "better and worse, and the p-value of McNemar's exact test (right or wrong, one seed) or of random signs by task. Holm: "
    "corrected for all tests of this comparison. Neither covers the training seed."
)


# --- words ---------------------------------------------------------------------------------------------------------------


def names(found: list[str]) -> str:
    more = len(found) - MANY
    return ", ".join(found[:MANY]) + (f" and {more} more" if more > 0 else "")


def apart(found: JSON) -> list[tuple[str, str, str, str]]:
    """(where, what, A, B) of everything that differs, arguments and versions too; stages that differ alike in one."""
    rows = [("arguments", c["path"], shown(c["old"]), shown(c["new"])) for c in found["arguments"]]
    alike: dict[str, list[JSON]] = {}
    for stage in found["stages"]["changed"]:
        alike.setdefault(json.dumps(stage["changes"]), []).append(stage)
    for group in alike.values():
        label = group[0]["stage"] + (f" and {len(group) - 1} more" if group[1:] else "")
        for i, change in enumerate(group[0]["changes"]):
            what = {"version": "version", "code": "code"}.get(change["what"], "")
            said = " ".join(filter(None, (change["path"], what))) or "kind"
            rows.append(("" if i else label, said, shown(change["old"]), shown(change["new"])))
    rows += [("made by", v["what"], ", ".join(v["a"]), ", ".join(v["b"])) for v in found["versions"]]
    return rows


def shown(value: Any) -> str:
    text = word(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def lines(found: JSON) -> list[str]:
    """What is said of stages beside their fields."""
    stages = found["stages"]
    said = [f"only in {k.upper()}: {names(stages[f'only_{k}'])}" for k in "ab" if stages[f"only_{k}"]]
    if stages["inputs_only"]:
        said.append(f"the same but for what they were made from: {names(stages['inputs_only'])}")
    unchanged = stages["unchanged"]
    return [*said, f"{unchanged} stage{'' if unchanged == 1 else 's'} unchanged"]


def notes(found: JSON) -> list[str]:
    """What is said of scores beside those that were paired."""
    scores = found["scores"]
    said = [f"{where(r)} not paired: {r['why']}" for r in scores["refused"]]
    alike = [where(r) for r in scores["rows"] if not moved(r)]
    said += [f"the same score on every task: {names(alike)}"] if alike else []
    if scores["shared"]:
        said.append(
            f"{scores['shared']} evaluation{'s are' if scores['shared'] > 1 else ' is'} the same in both and not tested"
        )
    for k, mine in scores["unmatched"].items():
        said += [f"only {k.upper()} is measured in {names(mine)}"] if mine else []
    return said


def where(row: JSON) -> str:
    return " / ".join(filter(None, (row["row"], row["domain"])))


def moved(row: JSON) -> bool:
    """Whether any task is scored otherwise."""
    return bool(row["better"] or row["worse"])


def times(value: float | None) -> str:
    return "–" if value is None else f"×{value:.3g}"


# --- terminal ------------------------------------------------------------------------------------------------------------


def show(found: JSON, console: Console) -> None:
    """Prints a comparison."""
    for k in "ab":
        console.print(f"[bold]{k.upper()}[/] {escape(found[k]['name'])}", highlight=False)
    if found["same"]:
        shared = found["scores"]["shared"]
        console.print(f"nothing differs: {lines(found)[-1]}" + (f", {shared} shared evaluations" if shared else ""))
        return
    _specs(found, console)
    _scores(found, console)
    if found["methods"]:
        methods_show.show(found["methods"], console)
    _costs(found, console)


def _specs(found: JSON, console: Console) -> None:
    rows = apart(found)
    if rows:
        made = terminal.table("What differs")
        for head in ("stage", "field", "A", "B"):
            made.add_column(head, overflow="fold")
        for row in rows:
            made.add_row(*map(escape, row))
        console.print(made)
    for line in lines(found):
        console.print(f"  {escape(line)}", highlight=False)


def _scores(found: JSON, console: Console) -> None:
    rows = list(filter(moved, found["scores"]["rows"]))
    if rows:
        made = terminal.table("Scores, paired by task", PAIRED)
        labelled = any(r["row"] for r in rows)
        for head in ("row", "domain") if labelled else ("domain",):
            made.add_column(head, overflow="fold")
        for head in ("A", "B", "B − A", "better\nworse", "p", "Holm"):
            made.add_column(head, justify="right", no_wrap=True)
        last = None
        for r in rows:
            first = [escape("" if r["row"] == last else r["row"])] if labelled else []
            gap = f"{terminal.points(r['difference'])}\n[dim]{span(r['interval'], True)}[/]"
            style = "bold" if r["p_holm"] < 0.05 else ""
            numbers = (terminal.percent(r["a"]), terminal.percent(r["b"]), gap, f"{r['better']}\n{r['worse']}")
            made.add_row(*first, escape(r["domain"]), *numbers, chance(r["p"]), chance(r["p_holm"]), style=style)
            last = r["row"]
        console.print(made)
    for line in notes(found):
        console.print(f"  {escape(line)}", highlight=False)


def _costs(found: JSON, console: Console) -> None:
    if not found["cost"]:
        return
    made = terminal.table(
        "Cost",
        "of one replicate, the mean over seeds; algorithmic FLOPs; ratios are B / A; what is the same in both is left out",
    )
    made.add_column("what", overflow="fold")
    for head in ("", "A", "B", "ratio"):
        made.add_column(head, justify="left" if not head else "right", no_wrap=True)
    for each in found["cost"]:
        for i, (what, *cells) in enumerate(cost_lines(each)):
            made.add_row("" if i else escape(each["what"]), what, *cells)
    console.print(made)


def cost_lines(each: JSON) -> list[tuple[str, str, str, str]]:
    """(unit, A, B, ratio) of one entry of the cost."""
    a, b, ratio = each["a"], each["b"], each["ratio"]
    found = [
        ("compute", terminal.flops(a["flops"]), terminal.flops(b["flops"]), times(ratio["flops"])),
        ("time", terminal.duration(a["seconds"]), terminal.duration(b["seconds"]), times(ratio["seconds"])),
    ]
    for kind in {**a["tokens"], **b["tokens"]}:
        one, other = (terminal.amount(end["tokens"].get(kind, 0)) for end in (a, b))
        found.append((f"tokens {kind}", one, other, times(ratio["tokens"].get(kind))))
    return found


# --- page ----------------------------------------------------------------------------------------------------------------


def page(found: JSON) -> str:
    """The page as text."""
    made = template("compare.html")
    return made.render(
        **found,
        apart=apart(found),
        lines=lines(found),
        notes=notes(found),
        rows=list(filter(moved, found["scores"]["rows"])),
        paired=PAIRED,
        compared=compared(found["methods"]),
        pictures=pictures(found),
        costs=[(each["what"], cost_lines(each)) for each in found["cost"]],
    )


def pictures(found: JSON) -> list[JSON]:
    """``{stage, plots}``: one picture a metric, A pale and B dashed in the metric's colour; seeds thin, their mean thick."""
    from markupsafe import Markup

    metrics = sorted({m for each in found["curves"] for m in each["metrics"]})
    colour = {m: i % len(plots.SERIES) for i, m in enumerate(metrics)}
    made = []
    for each in found["curves"]:
        drawn = []
        for metric, ends in each["metrics"].items():
            curves = [line for k in "ab" for line in _curve(k.upper(), ends[k], colour[metric])]
            svg = Markup(plots.lines(f"{metric} of {each['stage']}", curves))
            drawn.append(
                {"title": metric, "svg": svg, "strokes": [plots.stroke(colour[metric], k == "b", k == "a") for k in "ab"]}
            )
        made.append({"stage": each["stage"], "plots": drawn})
    return made


def _curve(name: str, series: list[JSON], colour: int) -> list[plots.Line]:
    dashed = name == "B"
    alone = len(series) == 1
    said = [name if alone else f"{name} seed {s['seed']}" for s in series]
    found = [
        plots.Line(what, colour, _points(s["step"], s["value"]), bold=alone, faint=not alone, dashed=dashed, pale=not dashed)
        for what, s in zip(said, series, strict=True)
    ]
    if not alone:
        steps, means = mean_curve(series)
        found.append(
            plots.Line(f"{name}, mean over seeds", colour, _points(steps, means), bold=True, dashed=dashed, pale=not dashed)
        )
    return found


def _points(steps: Any, values: Any) -> list[tuple[float, float]]:
    return [(float(s), float(v)) for s, v in zip(steps, values, strict=True)]


def mean_curve(series: list[JSON]) -> tuple[Any, Any]:
    """The mean over seeds where all were running: at their own steps where those are equal, else interpolated between."""
    import numpy as np

    steps = np.unique(np.concatenate([s["step"] for s in series]))
    first, last = max(min(s["step"]) for s in series), min(max(s["step"]) for s in series)
    steps = steps[(steps >= first) & (steps <= last)]
    return steps, np.mean([np.interp(steps, s["step"], s["value"]) for s in series], axis=0)
