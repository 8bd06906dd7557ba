"""Methods in words: tables in the terminal, readable at 80 columns, and the rows of the page's table (methods.html).

Both say what `methods.collect` found and nothing else. A difference is bold or coloured only where it is `sure`.

Leaves out: the picture (scatter.py).
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
    "training seed: p speaks of these checkpoints, not of the methods over training seeds; compute: algorithmic FLOPs of one "
    "replicate, the mean over the seeds that are scored; trials: branches that were not picked, and the development split, on "
    "no budget; in all: with the teachers and the trials"
)
TWO_LINES = "; compute above is consolidation alone, below it with the teachers; trials above, in all below them"
STYLED = "p is below {p:g} by Holm's correction and all of several seeds lie on one side"
SEEDS = "picked on the development split, with every candidate's score there; beyond an end of the range a better may lie"
OTHER = (
    "% right in columns that no teacher teaches, such as the same tasks in another format{below}; not in the mean and not "
    "tested; intervals are over tasks only; rows in italics are no methods"
)


def show(found: JSON, console: Console) -> None:
    """Prints the methods of a run."""
    summary(found, console)
    differences(found, console)
    by_domain(found, console)
    others(found, console)
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
    """Whether a difference stands after Holm's correction, and lies on one side at every one of several seeds."""
    if not entry or entry.get("p_holm") is None or entry["p_holm"] >= SURE:
        return False
    signs = [s["difference"] for s in entry["seeds"]]
    return len(signs) > 1 and (min(signs) > 0 or max(signs) < 0)


def styled(found: JSON) -> str:
    """When a difference is bold."""
    compared = [m["minus_reference"] for m in found["rows"].values() if m["minus_reference"]]
    alone = bool(compared) and all(len(c["seeds"]) == 1 for c in compared)
    return STYLED.format(p=SURE) + ("; with one seed nothing is" if alone else "")


def sided(entry: JSON) -> str:
    """``3/3 above``: at how many seeds a difference lies on the side where its mean is."""
    below = entry["difference"] < 0
    count = sum(s["difference"] < 0 if below else s["difference"] > 0 for s in entry["seeds"])
    return f"{count}/{len(entry['seeds'])} {'below' if below else 'above'}"


def reach(entry: JSON) -> str:
    """``+1.0 to +2.1``: from the lowest seed's difference to the highest's; empty with one seed."""
    seeds = [s["difference"] for s in entry["seeds"]]
    return f"{points(min(seeds))} to {points(max(seeds))}" if len(seeds) > 1 else ""


def other_what(found: JSON) -> str:
    """What the numbers in the other columns are."""
    return OTHER.format(below=f", and below it points above {found['before']['row']}, paired" if found["before"] else "")


def baselines(found: JSON) -> list[tuple[str, JSON]]:
    """What the methods are set against, the higher first: (name, mean)."""
    before, oracle = found["before"], found["oracle"]
    made = [("routed oracle: each domain's teacher", oracle)] if oracle else []
    return made + ([(f"before: {before['row']}", before)] if before and before.get("seeds") else [])


def seed_lines(found: JSON) -> list[JSON]:
    """One entry for each method and seed: ``{method, seed, mean, minus, ledgers, picks}``; None where it is not known."""
    made = []
    for row, m in found["rows"].items():
        means = {s["seed"]: s["mean"] for s in m["mean"].get("seeds", ())}
        gaps = {s["seed"]: s["difference"] for s in (m["minus_reference"] or {"seeds": ()})["seeds"]}
        spent = {s["seed"]: s for s in m["ledgers"]["seeds"]} if m["ledgers"] else {}
        for seed in sorted({*means, *spent}):
            picked = [p for p in m["picks"] if p["seed"] == seed]
            made.append(
                {
                    "method": row,
                    "seed": seed,
                    "mean": means.get(seed),
                    "minus": gaps.get(seed),
                    "ledgers": spent.get(seed),
                    "picks": list(map(pick, picked)),
                }
            )
    return made


def pick(entry: JSON) -> str:
    """``0.5 (end of the range; of 0.5 61.0, 1.0 58.2)``: what was picked, and the development scores of all, in %."""
    trials = ", ".join(f"{label} {percent(dev)}" for label, dev in entry["trials"].items())
    said = "; ".join([*filter(None, [entry["end"]]), *([f"of {trials}"] if trials else [])])
    return f"{entry['candidate']}" + (f" ({said})" if said else "")


# --- terminal ------------------------------------------------------------------------------------------------------------


def summary(found: JSON, console: Console) -> None:
    """One row a method: score against compute."""
    made = terminal.table("Methods: score against compute", what(found) + TWO_LINES)
    made.add_column("method", overflow="fold")
    for name in ("mean", f"minus\n{short(found['reference'])}", "p", "recovery", "compute", "trials,\nin all"):
        made.add_column(escape(name), justify="right", no_wrap=True)
    for row, m in found["rows"].items():
        minus, rec = m["minus_reference"], m["recovery"]
        cells = [mean_cell(m["mean"])]
        cells.append(f"{marked(minus)}\n[dim]{within(minus['difference'], minus['interval'])}[/]" if minus else "–")
        cells.append(chance(minus["p_holm"]) if minus and "p_holm" in minus else "–")
        cells.append(
            terminal.ratio(rec["mean"], rec["interval"]).replace(" (", "\n[dim](") + "[/]" if rec and rec["mean"] else "–"
        )
        made.add_row(escape(row), *cells, *costs(m))
    for name, mean in baselines(found):
        made.add_row(escape(name), mean_cell(mean), "", "", "", *(costs(mean) if "ledgers" in mean else ()), style="italic")
    console.print(made)
    for line in unlike(found):
        console.print(f"  [yellow]note:[/] {escape(line)}")
    for line in missing(found):
        console.print(f"  [yellow]not made yet:[/] {escape(line)}")


def marked(entry: JSON, interval: Any = None) -> str:
    """A difference in points, bold where it is sure."""
    said = points(entry["difference"], interval)
    return f"[bold]{said}[/]" if sure(entry) else said


def costs(of: JSON) -> tuple[str, str]:
    """The cells of compute and trials, two lines each."""
    spent = (of["ledgers"] or {}).get("mean", {})
    pairs = (("consolidation", "with_teachers"), ("trials", "with_trials"))
    one, two = ("\n".join(compute(spent.get(k)) for k in pair) for pair in pairs)
    return one, two


def short(name: str) -> str:
    return name if len(name) <= 9 else f"{name[:8]}…"


def mean_cell(mean: JSON) -> str:
    return f"{percent(mean['mean'])}\n[dim]{within(mean['mean'], mean['interval'])}[/]" if mean else "–"


def unlike(found: JSON) -> list[str]:
    """The methods whose mean is over fewer seeds than another's."""
    seeds = {row: [s["seed"] for s in m["mean"].get("seeds", ())] for row, m in found["rows"].items()}
    most = set().union(*seeds.values())
    few = {row: mine for row, mine in seeds.items() if mine and set(mine) != most}
    return [f"{row}: the mean of seed{'s'[: len(mine) > 1]} {', '.join(map(str, mine))} alone" for row, mine in few.items()]


def missing(found: JSON) -> list[str]:
    """The stages that a method still waits for, by seed."""
    lines = []
    for row, m in found["rows"].items():
        for s in m["ledgers"]["seeds"] if m["ledgers"] else ():
            if s["missing"]:
                lines.append(f"{row}, seed {s['seed']}: {', '.join(s['missing'])}")
    return lines


def differences(found: JSON, console: Console) -> None:
    """The difference from the reference at every seed, where there are several."""
    gaps = {row: m["minus_reference"] for row, m in found["rows"].items() if m["minus_reference"]}
    seeds = sorted({s["seed"] for gap in gaps.values() for s in gap["seeds"]})
    if len(seeds) < 2:
        return
    for part in abreast([f"seed {s}" for s in seeds], console, ["method", *gaps], 5, 32):
        made = terminal.table(f"Methods minus {found['reference']}, seed by seed", f"points; bold: {styled(found)}")
        made.add_column("method", overflow="fold")
        for name in ("seeds", "lowest to highest", *part):
            made.add_column(name, justify="right", no_wrap=True)
        for row, gap in gaps.items():
            by = {f"seed {s['seed']}": points(s["difference"]) for s in gap["seeds"]}
            cells = [sided(gap), reach(gap) or "–", *(by.get(s, "–") for s in part)]
            made.add_row(escape(row), *cells, style="bold" if sure(gap) else "")
        console.print(made)


def by_domain(found: JSON, console: Console) -> None:
    """Scores by domain with the difference from the reference."""
    several = any(len(m["minus_reference"]["seeds"]) > 1 for m in found["rows"].values() if m["minus_reference"])
    caption = f"% right, and below it points above {found['reference']}, paired, {terminal.TASKS_ONLY}"
    caption += "; 3/3: seeds on that side, of all" if several else ""
    caption += f"; bold: {styled(found)}; the correction is over all methods and domains"
    for part in abreast(found["taught"], console, ["method", *found["rows"]], 15 if several else 10):
        made = grid("Methods by domain", caption, part)
        for row, m in found["rows"].items():
            changes = (m["minus_reference"] or {"domains": {}})["domains"]
            made.add_row(escape(row), *(domain_cell(m, d, changes, several) for d in part))
        console.print(made)


def others(found: JSON, console: Console) -> None:
    """The columns that no teacher teaches: other rows of the table that have them, then the methods."""
    rows = {**found["references"], **found["rows"]}
    for part in abreast(found["others"], console, ["method", *rows], 10):
        made = grid("Other columns", other_what(found), part)
        for row, m in rows.items():
            style = "italic" if row in found["references"] else ""
            made.add_row(escape(row), *(domain_cell(m, d, m["others"]) for d in part), style=style)
        console.print(made)


def grid(heading: str, caption: str, columns: list[str]) -> Any:
    made = terminal.table(heading, caption)
    made.add_column("method", overflow="fold")
    for column in columns:
        made.add_column(escape(column), justify="right", no_wrap=True)
    return made


def domain_cell(m: JSON, domain: str, changes: JSON, several: bool = False) -> str:
    cell, change = m["domains"].get(domain), changes.get(domain)
    if not cell:
        return "–"
    if not change:
        return percent(cell["mean"])
    said = marked(change, change["interval"]) + (f" {sided(change).split()[0]}" if several else "")
    return f"{percent(cell['mean'])}\n{said if sure(change) else f'[dim]{said}[/]'}"


def by_seed(found: JSON, console: Console) -> None:
    """Every seed's mean, ledgers and picks."""
    made = terminal.table("Methods, every seed", SEEDS)
    made.add_column("method", overflow="fold")
    for name in ("seed", "mean", "alone", "with\nteachers", "trials,\nin all"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("picked", overflow="fold")
    last = None
    for line in seed_lines(found):
        spent: dict[str, Any] = line["ledgers"] or {}
        shown = [compute(spent.get(k)) for k in ("consolidation", "with_teachers", "trials")]
        shown[-1] += f"\n[dim]{compute(spent.get('with_trials'))}[/]"
        first = "" if line["method"] == last else escape(line["method"])
        made.add_row(first, str(line["seed"]), percent(line["mean"]), *shown, escape("; ".join(line["picks"])))
        last = line["method"]
    console.print(made)
