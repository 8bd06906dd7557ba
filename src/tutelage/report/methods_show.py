"""Methods in words: tables in the terminal, readable at 80 columns, and the rows of the page's table (methods.html).

Both say what `methods.collect` found and nothing else. Leaves out: the picture (scatter.py).
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from tutelage.report import terminal
from tutelage.report.read import JSON
from tutelage.report.terminal import abreast, percent, points, within

SURE = 0.05
WHAT = (
    "mean: over {domains}; minus {reference}: points, paired by task; p: random signs by task (McNemar's exact test for right "
    "and wrong at one seed), by Holm's correction over all methods; intervals are over tasks only and do not cover the "
    "training seed; compute: algorithmic FLOPs of one replicate, the mean over seeds; trials: branches that were not picked, "
    "and the development split, on no budget"
)
TWO_LINES = "; compute above is consolidation alone, below it with the teachers"


def show(found: JSON, console: Console) -> None:
    """Prints the methods of a run."""
    summary(found, console)
    by_domain(found, console)
    by_seed(found, console)


# --- words ---------------------------------------------------------------------------------------------------------------


def chance(p: float | None) -> str:
    """A p-value."""
    return "–" if p is None else "<0.001" if p < 0.0005 else f"{p:.3f}"


def what(found: JSON) -> str:
    """What the numbers are."""
    domains = ", ".join(found["taught"])
    return WHAT.format(domains=domains, reference=found["reference"])


def compute(value: float | None) -> str:
    """A cost; none spent is 0, none known a dash."""
    return "–" if value is None else terminal.flops(value) if value else "0"


def sure(entry: JSON | None) -> bool:
    """Whether a difference stands after Holm's correction."""
    return bool(entry and entry.get("p_holm") is not None and entry["p_holm"] < SURE)


def baselines(found: JSON) -> list[tuple[str, JSON]]:
    """What the methods are set against, the higher first: (name, mean)."""
    before, oracle = found["before"], found["oracle"]
    made = [("routed oracle: each domain's teacher", oracle)] if oracle else []
    return made + ([(f"before: {before['row']}", before)] if before and before.get("seeds") else [])


def seed_lines(found: JSON) -> list[JSON]:
    """One entry for each method and seed: ``{method, seed, mean, ledgers, picks}``, what is not known left out."""
    made = []
    for row, m in found["rows"].items():
        means = {s["seed"]: s["mean"] for s in m["mean"].get("seeds", ())}
        spent = {s["seed"]: s for s in m["ledgers"]["seeds"]} if m["ledgers"] else {}
        for seed in sorted({*means, *spent}):
            picked = [p for p in m["picks"] if p["seed"] == seed]
            made.append(
                {
                    "method": row,
                    "seed": seed,
                    "mean": means.get(seed),
                    "ledgers": spent.get(seed),
                    "picks": list(map(pick, picked)),
                }
            )
    return made


def pick(entry: JSON) -> str:
    """``0.5 (of 0.5 61.0, 1.0 58.2)``: what was picked, and the development scores of all, in %."""
    trials = ", ".join(f"{label} {percent(dev)}" for label, dev in entry["trials"].items())
    return f"{entry['candidate']}" + (f" (of {trials})" if trials else "")


# --- terminal ------------------------------------------------------------------------------------------------------------


def summary(found: JSON, console: Console) -> None:
    """One row a method: score against compute."""
    made = terminal.table("Methods: score against compute", what(found) + TWO_LINES)
    made.add_column("method", overflow="fold")
    for name in ("mean", f"minus\n{short(found['reference'])}", "p", "recovery", "compute", "trials"):
        made.add_column(escape(name), justify="right", no_wrap=True)
    for row, m in found["rows"].items():
        minus, rec, spent = m["minus_reference"], m["recovery"], (m["ledgers"] or {}).get("mean", {})
        cells = [mean_cell(m["mean"])]
        cells.append(
            f"{points(minus['difference'])}\n[dim]{within(minus['difference'], minus['interval'])}[/]" if minus else "–"
        )
        cells.append(chance(minus["p_holm"]) if minus and "p_holm" in minus else "–")
        cells.append(
            terminal.ratio(rec["mean"], rec["interval"]).replace(" (", "\n[dim](") + "[/]" if rec and rec["mean"] else "–"
        )
        cells.append("\n".join(compute(spent.get(k)) for k in ("consolidation", "with_teachers")))
        cells.append(compute(spent.get("trials")))
        style = "bold" if row == found["reference"] or sure(minus) else ""
        made.add_row(escape(row), *cells, style=style)
    for name, mean in baselines(found):
        made.add_row(escape(name), mean_cell(mean), style="italic")
    console.print(made)
    for line in missing(found):
        console.print(f"  [yellow]not made yet:[/] {escape(line)}")


def short(name: str) -> str:
    return name if len(name) <= 9 else f"{name[:8]}…"


def mean_cell(mean: JSON) -> str:
    return f"{percent(mean['mean'])}\n[dim]{within(mean['mean'], mean['interval'])}[/]" if mean else "–"


def missing(found: JSON) -> list[str]:
    """The stages that a method still waits for, by seed."""
    lines = []
    for row, m in found["rows"].items():
        for s in m["ledgers"]["seeds"] if m["ledgers"] else ():
            if s["missing"]:
                lines.append(f"{row}, seed {s['seed']}: {', '.join(s['missing'])}")
    return lines


def by_domain(found: JSON, console: Console) -> None:
    """Scores by domain with the difference from the reference; elsewhere, from the checkpoint before."""
    domains = [*found["taught"], *found["elsewhere"]]
    caption = f"% right, and below it points above {found['reference']}"
    if found["elsewhere"] and found["before"]:
        caption += f"; in {', '.join(found['elsewhere'])} (not taught) points above {found['before']['row']}"
    caption += f"; paired, {terminal.TASKS_ONLY}; bold: p below {SURE:g} by Holm's correction over all methods and domains"
    for part in abreast(domains, console, ["method", *found["rows"]], 10):
        made = terminal.table("Methods by domain", caption)
        made.add_column("method", overflow="fold")
        for domain in part:
            made.add_column(escape(domain), justify="right", no_wrap=True)
        for row, m in found["rows"].items():
            made.add_row(escape(row), *(domain_cell(m, d) for d in part))
        console.print(made)


def domain_cell(m: JSON, domain: str) -> str:
    cell = m["domains"].get(domain)
    change = domain_change(m, domain)
    if not cell:
        return "–"
    if not change:
        return percent(cell["mean"])
    style = "bold" if sure(change) else "dim"
    return f"{percent(cell['mean'])}\n[{style}]{points(change['difference'], change['interval'])}[/]"


def domain_change(m: JSON, domain: str) -> JSON | None:
    """What a domain is told of beside its score: the difference from the reference, elsewhere from the checkpoint before."""
    found: JSON | None = m["elsewhere"].get(domain) or (m["minus_reference"] or {"domains": {}})["domains"].get(domain)
    return found


def by_seed(found: JSON, console: Console) -> None:
    """Every seed's mean, ledgers and picks."""
    made = terminal.table("Methods, every seed", "picked on the development split, with every candidate's score there")
    made.add_column("method", overflow="fold")
    for name in ("seed", "mean", "alone", "with\nteachers", "trials"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("picked", overflow="fold")
    last = None
    for line in seed_lines(found):
        spent: dict[str, Any] = line["ledgers"] or {}
        costs = [compute(spent.get(k)) for k in ("consolidation", "with_teachers", "trials")]
        first = "" if line["method"] == last else escape(line["method"])
        made.add_row(first, str(line["seed"]), percent(line["mean"]), *costs, escape("; ".join(line["picks"])))
        last = line["method"]
    console.print(made)
