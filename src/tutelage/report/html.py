"""One self-contained HTML page of a run: inline styles and drawings, no scripts, nothing from a network.

Everything the page says comes from `collect` and from the transcripts in the store; report.html arranges it in the frame of
base.html and report.css colours it, light and dark. Every text of the run is escaped. Sections that have nothing to show
say so; those of teachers and of methods are left out where the table names none.

Leaves out: several runs side by side (compare_show.py), and interaction beyond opening and closing.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tutelage.report import graph, methods_show, plots, scatter, terminal
from tutelage.report.data import collect
from tutelage.report.read import load, transcripts
from tutelage.store import Store

JSON = dict[str, Any]
TASKS_ONLY = "The intervals are over tasks only; they do not cover the training seed"
LONG = 1500
"""Characters shown of a prompt or reply."""
CURVES = (
    ("Reward", r"reward$"),
    ("KL to the teacher, per token", r"(reverse_)?kl$|kl_teacher$|teacher_kl$"),
    ("Entropy of the policy, nats per token", r"entropy$"),
    ("Length of replies, tokens", r"length$"),
    ("Informative groups, share", r"informative_groups$"),
    ("Negative log-likelihood, per token", r"nll$"),
    ("Accuracy on development tasks", r"dev$"),
    ("Replies cut off, share", r"truncated$"),
    ("Verifier errors", r"verifier_errors$"),
)
"""Title and the metric it shows, stages as colours."""
BY_DOMAIN = (("Token share by domain", "token_share/"), ("Reward by domain", "reward/"), ("Development accuracy", "dev/"))
"""Title and the prefix of the metrics it shows, domains as colours; one plot for each stage that has several."""


def write(store: Store, run_name: str, path: str | Path) -> Path:
    """Writes the page and returns its path. Raises `UserError` for an unknown run."""
    return save(page(store, run_name), Path(path))


def save(text: str, target: Path) -> Path:
    """Writes a page in one go and returns its path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        fresh.write_text(text, "utf-8")
        os.replace(fresh, target)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    return target


def template(name: str) -> Any:
    """A page's template, with the words for numbers as filters and the style sheet as ``css``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    env = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters.update(
        percent=terminal.percent,
        flops=terminal.flops,
        duration=terminal.duration,
        title=terminal.title,
        points=points,
        span=span,
        moment=moment,
        chance=methods_show.chance,
        compute=methods_show.compute,
    )
    env.filters.update(sided=methods_show.sided, reach=methods_show.reach)
    env.tests["sure"] = methods_show.sure
    env.globals["css"] = Markup((folder / "report.css").read_text("utf-8"))
    return env.get_template(name)


def page(store: Store, run_name: str) -> str:
    """The page as text."""
    from markupsafe import Markup

    found, run = collect(store, run_name), load(store, run_name)
    status = {s["name"]: s["status"] for s in found["stages"]}
    return template("report.html").render(
        **found,
        graph=Markup(graph.svg(run.first, status)),
        sentences=sentences(found),
        tasks_only=TASKS_ONLY,
        budget_lines=terminal.budget_lines(found),
        domains=terminal.domains_of(found),
        accuracy=[(d, Markup(svg)) for d, svg in accuracy_plots(found)],
        plots=[{**p, "svg": Markup(p["svg"])} for p in curve_plots(found)],
        bars=bars(found),
        compared=compared(found["methods"]),
        examples=[example(e) for e in transcripts(store, run)],
        lineup=[stage_row(s) for s in found["stages"] if not s["evaluation"]],
        evaluations=sum(s["evaluation"] for s in found["stages"]),
        resolved=json.dumps(found["record"], indent=1, ensure_ascii=False),
    )


def methods_page(found: JSON) -> str:
    """The page of a run's methods alone; ``found``: ``run``, ``recipe``, ``seeds`` and ``methods`` of `collect`."""
    return str(template("methods.html").render(**found, compared=compared(found["methods"])))


def compared(found: JSON | None) -> JSON | None:
    """What a page says of methods beside their numbers: picture, words, baselines, seeds."""
    from markupsafe import Markup

    if not found:
        return None
    words = {k: getattr(methods_show, k)(found) for k in ("what", "other_what", "styled", "baselines", "unlike", "missing")}
    return {"picture": Markup(scatter.draw(found)), **words, "seeds": methods_show.seed_lines(found)}


# --- words ---------------------------------------------------------------------------------------------------------------


def points(value: float | None) -> str:
    """A difference in points, with a true minus sign."""
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def span(interval: Sequence[float | None] | None, signed: bool = False) -> str:
    """``62 to 71``, in points."""
    if not interval or interval[0] is None or interval[1] is None:
        return ""
    shape = "{:+.1f}" if signed else "{:.1f}"
    return " to ".join(shape.format(100 * (end or 0)) for end in interval).replace("-", "−")


def moment(value: Any) -> str:
    """A time stamp (seconds, or text) as text."""
    if isinstance(value, (int, float)):
        return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return str(value or "–")


def sentences(found: JSON) -> list[dict[str, str]]:
    """What the run shows, in words: specialists and student (or the checkpoint after) against where they began, then against
    the two strongest controls. ``{text, by}``: a sentence, and the domains behind its means."""
    gaps = found["gaps"]
    if not gaps:
        return []
    if not found["recovery"]:
        return [compare([g], g["than"], str(g["than"]), {g["of"]: str(g["of"])}) for g in gaps]
    before, controls = found["recovery"]["before"]["row"], strongest_controls(found)
    said = [compare(gaps, before, f"the {before} they began from")]
    said += [compare(gaps, name, f"the control {name}") for name in controls[:2]]
    if not controls:
        said.append({"text": "No control is measured in every domain: what more of the old training would do is not known."})
    return [{"by": "", **s} for s in said if s]


def strongest_controls(found: JSON) -> list[str]:
    """Controls by their mean over the domains taught, the highest first."""
    before = (found["recovery"] or {}).get("before", {}).get("row")
    over = [g for g in found["gaps"] if g["of"] == "teachers" and g["than"] != before]
    return [g["than"] for g in sorted(over, key=lambda g: g["difference"])]


NAMES = {"teachers": "the specialists, each on its own,", "student": "the student"}


def compare(gaps: Iterable[JSON], than: str, words: str, names: dict[str, str] = NAMES) -> dict[str, str]:
    """Where those of ``names`` stand against one row; empty where any of them is not measured."""
    clauses, by = [], []
    for who, name in names.items():
        gap = next((g for g in gaps if g["of"] == who and g["than"] == than), None)
        if gap is None:
            return {}
        low, high = gap["interval"]
        apart = "above" if low is not None and low > 0 else "below" if high is not None and high < 0 else ""
        verb = "stand" if who == "teachers" else "stands"
        size, bounds = f"{abs(100 * gap['difference']):.1f} points", f"95 % interval {span((low, high), signed=True)}"
        unsure = f"{name} cannot be told from {words}: {points(gap['difference'])} points ({bounds})"
        clauses.append(f"{name} {verb} {size} {apart} {words} ({bounds})" if apart else unsure)
        shown = ", ".join(f"{d} {points(g['difference'])}" for d, g in gap["domains"].items() if g)
        by.append(f"{'specialists' if who == 'teachers' else who}: {shown}")
        words = "it"
    return {"text": f"On average over the domains, {'; '.join(clauses)}.", "by": f"By domain, {'; '.join(by)}."}


# --- drawings ------------------------------------------------------------------------------------------------------------


def accuracy_plots(found: JSON) -> list[tuple[str, str]]:
    """One dot plot a domain; the domain's own teacher stands out from the other specialists."""
    cells = [c for row in found["scores"].values() for c in row["domains"].values()]
    top = min(1.0, max((c["interval"][1] for c in cells), default=1.0)) if all(c["mean"] <= 1 for c in cells) else None
    made = []
    for domain in terminal.domains_of(found):
        rows = []
        for label, row in found["scores"].items():
            cell = row["domains"].get(domain)
            if cell:
                other = row["role"] == "teacher" and domain not in row["domains_taught"]
                seeds = [s["mean"] for s in cell["seeds"]]
                rows.append(
                    plots.Dot(
                        label, "other" if other else row["role"], cell["mean"], cell["interval"][0], cell["interval"][1], seeds
                    )
                )
        highest = top if top is not None else max(r.high for r in rows)
        made.append((domain, plots.dots(f"Accuracy in {domain}", rows, highest)))
    return made


def curve_plots(found: JSON) -> list[JSON]:
    """``{title, svg, legend}`` for every metric of `CURVES` and `BY_DOMAIN` that was logged."""
    curves, stage_colours, domain_colours = found["curves"], *colours(found)
    made = []
    for title, pattern in CURVES:
        shown: dict[str, list[JSON]] = {}
        for stage, metrics in curves.items():
            for metric in (m for m in metrics if re.match(pattern, m)):
                if metric != "verifier_errors" or any(any(s["value"]) for s in metrics[metric]):
                    shown[stage] = metrics[metric]
        made.append(plot(title, shown, stage_colours))
    for title, prefix in BY_DOMAIN:
        for stage, metrics in curves.items():
            shown = {m.removeprefix(prefix): series for m, series in metrics.items() if m.startswith(prefix)}
            if len(shown) > 1:
                made.append(plot(f"{title}: {stage}", shown, domain_colours))
    return [m for m in made if m["svg"]]


def colours(found: JSON) -> tuple[dict[str, int], dict[str, int]]:
    """(stage -> colour, domain -> colour), the same in every plot; a specialist has its domain's, the student its own."""
    domains = {d: i + 1 for i, d in enumerate(terminal.domains_of(found))}
    taught = found["recovery"] or {"after": {}, "teachers": {}}
    stages = {str(t["stage"]).partition("@")[0]: domains[d] for d, t in taught["teachers"].items() if d in domains}
    stages[str(taught["after"].get("stage"))] = 0
    fresh = len(domains) + 1
    for stage in found["curves"]:
        if stage not in stages:
            stages[stage], fresh = fresh, fresh + 1
    for metrics in found["curves"].values():
        for domain in (m.rpartition("/")[2] for m in metrics if "/" in m):
            domains.setdefault(domain, len(domains) + 1)
    return stages, domains


def plot(title: str, shown: dict[str, list[JSON]], colour: dict[str, int]) -> JSON:
    """Every seed as a thin line; a bold one for their mean where they were logged at the same steps."""
    lines = []
    for name, series in shown.items():
        alike = len(series) > 1 and all(s["step"] == series[0]["step"] for s in series)
        for one in series:
            points = list(zip(one["step"], one["value"], strict=True))
            lines.append(plots.Line(name, colour[name], points, bold=len(series) == 1, faint=alike))
        if alike:
            means = [sum(v) / len(v) for v in zip(*(s["value"] for s in series), strict=True)]
            lines.append(plots.Line(name, colour[name], list(zip(series[0]["step"], means, strict=True)), bold=True))
    legend = [(plots.stroke(colour[name]), name) for name in shown]
    return {"title": title, "svg": plots.lines(title, lines), "legend": legend}


def bars(found: JSON) -> list[JSON]:
    """Cost of every stage that computed anything, evaluations together, with its share of the largest."""
    stages = found["cost"]["by_stage"]
    rows = [{"name": n, **c} for n, c in stages.items() if not c["evaluation"] and (c["flops"] or c["seconds"] >= 0.05)]
    measured = [c for c in stages.values() if c["evaluation"]]
    if measured:
        tokens: dict[str, float] = {}
        for entry in measured:
            for kind, count in entry["tokens"].items():
                tokens[kind] = tokens.get(kind, 0) + count
        sums = {k: sum(c[k] for c in measured) for k in ("flops", "seconds")}
        rows.append({"name": f"{len(measured)} evaluations", "tokens": tokens, **sums})
    most = max((r["flops"] for r in rows), default=0) or 1
    return [{**r, "share": 100 * r["flops"] / most, "tokens": terminal.tokens(r)} for r in rows]


# --- transcripts and stages ----------------------------------------------------------------------------------------------


def example(found: JSON) -> JSON:
    """A transcript ready to print: prompt turns, gold, and the two replies."""
    prompt = found.get("prompt") or []
    turns = [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt
    return {
        **{k: found[k] for k in ("domain", "task", "right")},
        "turns": [{"role": t.get("role") or "", "content": cut(t.get("content"))} for t in turns],
        "gold": cut(found.get("gold")) if found.get("gold") is not None else None,
        "replies": [reply(role, found[role]) for role in ("after", "before") if found.get(role)],
    }


def reply(role: str, entry: JSON) -> JSON:
    facts = {"role": role, "text": cut(entry.get("reply")), "value": entry["value"]}
    return {**facts, "right": entry["value"] >= 1, "error": entry.get("error"), "tokens": entry.get("tokens")}


def cut(text: Any) -> str:
    words = "" if text is None else str(text)
    return words if len(words) <= LONG else f"{words[:LONG]} … ({len(words) - LONG} more characters)"


def stage_row(stage: JSON) -> JSON:
    """A line of the table of stages: what it started from, its teachers and its data, in words."""
    by_role: dict[str, list[str]] = {}
    for edge in stage["inputs"]:
        name = edge["name"] if edge["step"] is None else f"{edge['name']}@{edge['step']}"
        shown = f"{name}.{edge['port']}" if edge["role"] == "data" else name
        if shown not in by_role.setdefault(edge["role"], []):
            by_role[edge["role"]].append(shown)
    roles = {role.replace(" ", "_"): ", ".join(names) for role, names in by_role.items()}
    kind, facts = str(stage["kind"] or "").rpartition(".")[2], stage["facts"] or {}
    chosen = facts.get("selected")
    kept = f"kept step {chosen['step']}" if isinstance(chosen, dict) and "step" in chosen else ""
    kept += f" of {facts['steps']}" if kept and "steps" in facts else ""
    return {**stage, "kind": kind, "kept": kept, "roles": {k: roles.get(k, "") for k in ("start", "teacher", "data", "budget")}}
