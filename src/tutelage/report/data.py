"""What a run shows, gathered from the store: `collect` is the content of ``report --json`` and of every table and page.

Reads runs, artifacts, scores and metrics; knows no stage. It takes what is there: a run in progress, a recipe without a
table or a stage without metrics give what they have, and nothing else. Scores are fractions in [0, 1] (or what the
verifier gives); a task whose verifier failed keeps the value the evaluation wrote for it (0 where there is none) and is
counted under ``errors``. Costs are algorithmic FLOPs, tokens and seconds of one replicate (the mean over seeds), but for
``cost.run``, which adds each artifact of the run once.

Leaves out: reading files (read.py), what scores say (measures.py, methods.py), who is charged for what
(ledgers.py), arithmetic of intervals (stats.py), drawing (terminal.py, html.py).
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np

from tutelage.report import ledgers, measures, methods
from tutelage.report.measures import Measures, mean_gap, score_entry
from tutelage.report.read import JSON, Edge, Run, Table, load
from tutelage.store import Store

BINS = 100
"""Points kept of a curve: longer series become means of as many equal bins."""


# --- collect -------------------------------------------------------------------------------------------------------------


def collect(store: Store, run_name: str) -> JSON:
    """Everything a report says of a run, as JSON. Raises `UserError` for an unknown run.

    Keys: ``run``, ``recipe``, ``state``, ``arguments``, ``argv``, ``started``, ``finished``, ``seconds``, ``seeds``,
    ``warnings``, ``stages``, ``scores``, ``recovery``, ``gaps``, ``controls``, ``budgets``, ``lost_elsewhere``, ``methods``,
    ``cost``, ``curves``, ``record``.
    """
    run = load(store, run_name)
    measured = Measures(store, run)
    metas = {k: store.meta(k) for r in run.replicates for k in r.keys.values() if store.has(k)}
    body = run.body
    found = {
        "run": run.name,
        "recipe": body.get("recipe"),
        **{k: body.get(k) for k in ("state", "arguments", "argv", "started", "finished", "seconds")},
        "seeds": [r.seed for r in run.replicates],
        "warnings": warnings(run),
        "stages": stages(store, run, metas),
        "scores": scores(run, measured),
        "recovery": recovery(run, measured),
        "gaps": gaps(run, measured),
        "controls": controls(run, measured),
        "budgets": budgets(run, metas),
        "lost_elsewhere": lost_elsewhere(run, measured),
        "methods": methods.collect(run, measured, metas),
        "cost": cost(run, metas),
        "curves": curves(store, run),
        "record": run.first.record,
    }
    return plain(found)


def plain(value: Any) -> Any:
    """JSON values only: numpy scalars unwrapped, numbers that are not finite become None, six decimals kept."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return (round(value, 6) if abs(value) < 1e6 else value) if math.isfinite(value) else None
    return value


def stages(store: Store, run: Run, metas: dict[str, JSON]) -> list[JSON]:
    """Every stage of the run, one entry for each key: replicates that share an artifact share the entry."""
    found: dict[tuple[str, str], JSON] = {}
    for each in run.replicates:
        for name, spec in each.record.get("stages", {}).items():
            key = each.keys.get(name, "")
            if (name, key) in found:
                found[name, key]["seeds"].append(each.seed)
                continue
            meta = metas.get(key, {})
            working = bool(key) and (store.root / "work" / key).exists()
            spent = meta.get("cost") or {}
            found[name, key] = {
                "name": name,
                "seeds": [each.seed],
                "kind": meta.get("kind") or spec.get("kind"),
                "key": key,
                "status": "stored" if meta else "in progress" if working else "waiting",
                "reused": bool(meta) and (meta.get("finished") or 0) < (run.body.get("started") or 0),
                "evaluation": name in each.evaluations,
                "inputs": [inputs_entry(e, each.keys) for e in each.edges[name]],
                "cost": {"flops": spent.get("flops", 0.0), "tokens": spent.get("tokens") or {}},
                **{k: meta.get(k) for k in ("seconds", "started", "finished", "threads", "host", "facts")},
            }
    return list(found.values())


def inputs_entry(edge: Edge, keys: dict[str, str]) -> JSON:
    return {
        "path": edge.path,
        "role": edge.role,
        "name": edge.ref,
        "port": edge.port,
        "step": edge.step,
        "key": keys.get(edge.ref),
    }


def checkpoint(run: Run, row: str) -> JSON:
    """What a row or column of the tables is: its label, its stage and what that stage started from."""
    first = run.first
    source = first.source(row)
    if source and source.ref in first.evaluations:  # nothing was measured but an answer, such as the majority's
        source = None
    parents = [e.label for e in first.parents(source.ref)] if source else []
    trials = len(ledgers.candidates(first, source.ref)) if source else 0
    return {
        "row": row,
        "role": run.table.role(row),
        "stage": source.label if source else None,
        "parent": f"{trials} trials" if trials else " + ".join(parents) or None,
        "domains_taught": [d for d, r in run.table.teachers.items() if r == row],
        "keys": {str(r.seed): r.keys.get(source.ref) for r in run.replicates} if source else {},
    }


def warnings(run: Run) -> list[str]:
    """What failed, and what could mislead: a table that names a row it does not have, and a teacher's row that measures
    another checkpoint than the one that taught."""
    first = run.first
    found = [f"stage {name!r} failed: {why}" for name, why in (run.body.get("failed") or {}).items()]
    found += misnamed(run.table)
    student = first.source(run.table.after)
    for edge in first.edges.get(student.ref, []) if student else []:
        measured = first.source(run.table.teachers.get(edge.detail, "")) if edge.role == "teacher" else None
        if measured and measured.label != edge.label:
            found.append(f"the teacher of {edge.detail!r} was {edge.label}, but the table measures {measured.label}")
    return found


def misnamed(table: Table) -> list[str]:
    """A line for every row that the table names and does not have, with the nearest it has."""
    named = [("before", table.before), ("after", table.after), *((f"teacher of {d!r}", r) for d, r in table.teachers.items())]
    named += [(word, r) for word, rows in (("control", table.controls), ("method", table.methods)) for r in rows]
    found = []
    for what, row in named:
        if row and row not in table.rows and table.rows:
            near = difflib.get_close_matches(row, table.rows, n=1, cutoff=0.0)
            found.append(
                f"the table names {row!r} as its {what}, but has no such row (nearest: {near[0]!r}); nothing is shown of it"
            )
    return found


# --- scores --------------------------------------------------------------------------------------------------------------


def scores(run: Run, measured: Measures) -> JSON:
    """row -> its checkpoint, and by domain the mean over seeds, its interval and every seed."""
    found: JSON = {}
    for row in measured.rows:
        domains: JSON = {}
        for domain in measured.domains:
            raws = {s: measured.raw[s, row, domain] for s in measured.seeds if (s, row, domain) in measured.raw}
            if raws:
                domains[domain] = score_entry(raws)
        found[row] = {**checkpoint(run, row), "domains": domains}
    return found


# --- what the scores say ---------------------------------------------------------------------------------------------------


def recovery(run: Run, measured: Measures) -> JSON | None:
    """The primary figure (`measures.recovery`) and whom it compares; None without a table."""
    before, after, teachers = run.table.before, run.table.after, run.table.teachers
    if not (before and after and teachers):
        return None
    found = measures.recovery(measured, before, teachers, after)
    return {
        **found,
        "definition": "mean over seeds of sum(after - before) / sum(teacher - before) over all domains",
        "before": checkpoint(run, before),
        "after": checkpoint(run, after),
        "teachers": {d: checkpoint(run, t) for d, t in teachers.items()},
    }


def gaps(run: Run, measured: Measures) -> list[JSON]:
    """What the headline compares, in points averaged over domains with each domain beside: the teachers (each on its own
    domains) and the student, over the checkpoint before and over every control; without teachers, the checkpoint after."""
    before, after, teachers = run.table.before, run.table.after, run.table.teachers
    if not (before and after):
        return []
    sides = {"teachers": teachers, "student": dict.fromkeys(teachers, after)}
    found = []
    for than in (before, *run.table.controls):
        for who, row_of in (sides if teachers else {after: dict.fromkeys(run.table.rows.get(after, ()), after)}).items():
            entry = mean_gap(measured, row_of, than)
            if entry:
                found.append({"of": who, "than": than, **entry})
    return found


def controls(run: Run, measured: Measures) -> JSON:
    """control row -> domain -> its mean, and how far the domain's teacher and the student stand above it (paired)."""
    found: JSON = {}
    for row in run.table.controls:
        domains: JSON = {}
        for domain in measured.domains:
            seeds = measured.seeds_with((row, domain))
            if not seeds:
                continue
            raws = {s: measured.raw[s, row, domain] for s in seeds}
            teacher, after = run.table.teachers.get(domain), run.table.after
            domains[domain] = {
                **{k: v for k, v in score_entry(raws).items() if k != "seeds"},
                "teacher_minus": measured.difference(teacher, row, domain) if teacher else None,
                "student_minus": measured.difference(after, row, domain) if after else None,
            }
        found[row] = domains
    return found


def budgets(run: Run, metas: dict[str, JSON]) -> JSON:
    """control row -> by seed what a stage with a budget of compute spent of it, and the step chosen on development tasks.

    ``budget`` and ``spent`` are FLOPs; ``of`` names the stages whose compute the budget is, ``teachers`` whether those are
    exactly the table's teachers. Controls without a budget are left out.
    """
    found: JSON = {}
    taught = {s.ref for s in map(run.first.source, run.table.teachers.values()) if s}
    for row in run.table.controls:
        for each in run.replicates:
            source = each.source(row)
            meta = metas.get(each.keys.get(source.ref, ""), {}) if source else {}
            facts = meta.get("facts") or {}
            if source is None or not facts.get("budget"):
                continue
            of = [e.ref for e in each.edges.get(source.ref, []) if e.role == "budget"]
            entry = {"seed": each.seed, "spent": (meta.get("cost") or {}).get("flops", 0.0), "budget": facts["budget"]}
            entry |= {"selected": facts.get("selected"), "steps": facts.get("steps")}
            found.setdefault(row, []).append({**entry, "of": of, "teachers": bool(of) and set(of) == taught})
    return found


def lost_elsewhere(run: Run, measured: Measures) -> JSON:
    """teacher row -> domain that is not its own -> accuracy before and after it was trained, and the paired difference."""
    before, teachers = run.table.before, run.table.teachers
    found: JSON = {}
    for row in dict.fromkeys(teachers.values()):
        domains: JSON = {}
        for domain in measured.domains:
            change = measured.change(row, before, domain) if before and teachers.get(domain) != row else None
            if change:
                domains[domain] = change
        if domains:
            found[row] = domains
    return found


# --- cost ----------------------------------------------------------------------------------------------------------------


def cost(run: Run, metas: dict[str, JSON]) -> JSON:
    """Cost by stage, the student's two ledgers (ledgers.py), and what the whole run spent."""
    first = run.first
    by_stage: JSON = {}
    for name in first.record.get("stages", {}):
        keys = [r.keys.get(name, "") for r in run.replicates if r.keys.get(name) in metas]
        if keys:
            by_stage[name] = {**mean_cost([metas[k] for k in keys]), "evaluation": name in first.evaluations}
    sums = {n: ledger(by_stage, names) for n, names in ledger_stages(run, metas).items()}
    used = [m for k, m in metas.items() if any(k in r.keys.values() for r in run.replicates)]
    spent = {k: sum(m.get(k) or 0 for m in used) for k in ("seconds",)}
    flops = sum((m.get("cost") or {}).get("flops", 0.0) for m in used)
    return {"by_stage": by_stage, "ledgers": sums, "run": {"flops": flops, **spent, "artifacts": len(used)}}


def mean_cost(metas: list[JSON]) -> JSON:
    """The mean over replicates of what one stage spent."""
    tokens: dict[str, float] = {}
    for meta in metas:
        for what, count in ((meta.get("cost") or {}).get("tokens") or {}).items():
            tokens[what] = tokens.get(what, 0) + count / len(metas)
    flops = sum((m.get("cost") or {}).get("flops", 0.0) for m in metas) / len(metas)
    return {"flops": flops, "seconds": sum(m.get("seconds") or 0.0 for m in metas) / len(metas), "tokens": tokens}


def ledger(by_stage: JSON, names: JSON) -> JSON:
    """The sum over ``names``: stage -> the share of replicates that are charged for it."""
    have = {n: by_stage[n] for n in names if n in by_stage}
    kinds = sorted({k for c in have.values() for k in c["tokens"]})
    return {
        "stages": sorted(names),
        "missing": sorted(n for n in names if n not in by_stage),
        "flops": sum(names[n] * c["flops"] for n, c in have.items()),
        "seconds": sum(names[n] * c["seconds"] for n, c in have.items()),
        "tokens": {k: sum(names[n] * c["tokens"].get(k, 0) for n, c in have.items()) for k in kinds},
    }


def ledger_stages(run: Run, metas: dict[str, JSON]) -> dict[str, dict[str, float]]:
    """Ledger -> stage -> the share of replicates that are charged for it; empty without a table, and without teachers."""
    if not run.table.teachers:
        return {}
    found: dict[str, dict[str, float]] = {}
    for each in run.replicates:
        mine = ledgers.parts(each, (run.table.after,), ledgers.facts_of(each, metas))
        for name in ("consolidation", "with_teachers") if mine else ():
            for stage in getattr(mine, name):
                shares = found.setdefault(name, {})
                shares[stage] = shares.get(stage, 0.0) + 1 / len(run.replicates)
    return found


# --- curves --------------------------------------------------------------------------------------------------------------


def curves(store: Store, run: Run) -> JSON:
    """stage -> metric -> one series a seed ``{seed, step, value}``, long ones as means of bins."""
    found: JSON = {}
    seen: set[str] = set()
    for each in run.replicates:
        for name in each.record.get("stages", {}):
            key = each.keys.get(name, "")
            if name in each.evaluations or not key or key in seen:
                continue
            seen.add(key)
            for metric, (steps, values) in series(store.metrics(key)).items():
                step, value = thin(np.array(steps, float), np.array(values, float))
                entry = {"seed": each.seed, "step": step.tolist(), "value": [float(f"{v:.5g}") for v in value]}
                found.setdefault(name, {}).setdefault(metric, []).append(entry)
    return found


def series(lines: list[JSON]) -> dict[str, tuple[list[float], list[float]]]:
    """The finite numbers of every metric, with their steps."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "time") and _finite(value) and _finite(line.get("step")):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def _finite(value: Any) -> bool:
    """Whether it is a number, and one that sums of may be taken."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def thin(steps: np.ndarray, values: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``bins`` points: means of consecutive, equally long runs of the series."""
    if len(steps) <= bins:
        return steps, values
    edges = np.linspace(0, len(steps), bins + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps, edges) / sizes, np.add.reduceat(values, edges) / sizes
