"""Methods side by side: alternative ways to consolidate the same teachers, their scores against their compute.

`collect` reads one run. Every method is measured by its mean score over the domains that are taught, and against one
reference, paired by task: the interval is `stats.resample`'s, the test random signs by task with seeds summed (McNemar's
exact test for right and wrong at one seed), on the mean over domains and on each domain. Holm's correction is over all
methods for the means, and over all methods and domains for the domains. Neither covers the training seed: p speaks of these
checkpoints. Every seed's difference is given. A difference, its p and its domains are of the same seeds.

Leaves out: tests of the columns that no teacher teaches, methods of several runs, and drawing (methods_show.py, scatter.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from tutelage.report import ledgers, measures, stats
from tutelage.report.measures import Measures, mean_gap, score_entry
from tutelage.report.read import JSON, Replicate, Run
from tutelage.report.stats import Figure

PARTS = ("consolidation", "with_teachers", "trials")
LEDGERS = (*PARTS, "with_trials")
"""The last: with the teachers and the trials."""
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def collect(
    run: Run, measured: Measures, metas: dict[str, JSON], rows: tuple[str, ...] = (), reference: str = ""
) -> JSON | None:
    """Rows of a run's table as methods: by default those that the table names, against its ``after``; None without any.

    ``taught``: the domains of the mean (those of the teachers; without teachers, the reference's); ``others``: the
    table's other columns, such as the same tasks in another format. ``before`` and ``oracle`` (each domain's teacher, with
    their ``ledgers``): rows to set the methods against. ``rows``: by method ``stage``, ``domains`` (scores), ``mean``,
    ``recovery``, ``minus_reference``, ``ledgers`` (FLOPs of one replicate by seed, and on average over the seeds that are
    scored; None where a stage is missing), ``picks`` and ``others`` (against ``before``). ``references``: ``domains`` and
    ``others`` of the rows that are no methods, in the other columns.
    """
    table = run.table
    chosen, reference = rows or table.methods, reference or table.after
    if not chosen:
        return None
    taught = list(table.teachers) or list(table.rows.get(reference, ()))
    others = [d for d in measured.domains if d not in taught]
    oracle = {d: table.teachers[d] for d in taught} if table.teachers else {}
    found = {row: method(run, measured, metas, row, reference, taught, others) for row in chosen if row in table.rows}
    correct([m["minus_reference"] for m in found.values() if m["minus_reference"]])
    beside = {row: beyond(measured, table.before, row, others) for row in table.rows if row not in {*table.methods, *chosen}}
    return {
        "reference": reference,
        "taught": taught,
        "others": others,
        "before": {"row": table.before, **whole(measured, dict.fromkeys(taught, table.before))} if table.before else None,
        "oracle": routed(run, measured, metas, oracle) if oracle else None,
        "rows": found,
        "references": {row: entry for row, entry in beside.items() if entry["domains"]},
    }


def method(
    run: Run, measured: Measures, metas: dict[str, JSON], row: str, reference: str, taught: list[str], others: list[str]
) -> JSON:
    """One method."""
    table, source = run.table, run.first.source(row)
    teachers = table.teachers_of(row)
    mean, apart = whole(measured, dict.fromkeys(taught, row)), beyond(measured, table.before, row, others)
    recovered = measures.recovery(measured, table.before, teachers, row) if table.before and teachers else None
    return {
        "stage": source.label if source else None,
        "domains": {**domain_scores(measured, row, taught), **apart["domains"]},
        "mean": mean,
        "recovery": {k: recovered[k] for k in ("mean", "interval", "seeds")} if recovered and recovered["seeds"] else None,
        "minus_reference": None if row == reference else against(measured, row, reference, taught),
        "ledgers": charged(run, metas, (row,), mean),
        "picks": [pick for each in run.replicates for pick in picks(each, metas, row)],
        "others": apart["others"],
    }


def beyond(measured: Measures, before: str, row: str, others: list[str]) -> JSON:
    """A row in the columns that no teacher teaches: ``domains`` (scores), ``others`` (against ``before``, untested)."""
    changes = {d: measured.change(row, before, d) for d in others} if before not in ("", row) else {}
    return {"domains": domain_scores(measured, row, others), "others": {d: c for d, c in changes.items() if c}}


def routed(run: Run, measured: Measures, metas: dict[str, JSON], oracle: dict[str, str]) -> JSON:
    """Each domain answered by its teacher: the mean, and what the teachers cost together; empty where not measured."""
    mean = whole(measured, oracle)
    return {**mean, "ledgers": charged(run, metas, oracle.values(), mean)} if mean else {}


# --- scores --------------------------------------------------------------------------------------------------------------


def domain_scores(measured: Measures, row: str, domains: list[str]) -> JSON:
    """domain -> mean and every seed, where it is measured"""
    raws = {d: {s: measured.raw[s, row, d] for s in measured.seeds_with((row, d))} for d in domains}
    return {d: score_entry(by_seed) for d, by_seed in raws.items() if by_seed}


def whole(measured: Measures, row_of: dict[str, str]) -> JSON:
    """The mean over domains of ``row_of[domain]``, over the seeds that have every domain; empty where none has."""
    seeds = measured.seeds_with(*((r, d) for d, r in row_of.items()))
    if not seeds or not row_of:
        return {}
    by_seed: dict[int, Figure] = {s: stats.mean(measured.figures[s, r, d] for d, r in row_of.items()) for s in seeds}
    both = stats.mean(by_seed.values())
    shown = [{"seed": s, "mean": f.point, "interval": f.interval} for s, f in by_seed.items()]
    return {"mean": both.point, "interval": both.interval, "seeds": shown}


def against(measured: Measures, row: str, reference: str, taught: list[str]) -> JSON | None:
    """``row − reference``: the mean over domains and each domain, with p-values; None where no seed has both whole."""
    found = mean_gap(measured, dict.fromkeys(taught, row), reference)
    if not found:
        return None
    by_domain = {d: by_task(measured, row, reference, d, [s["seed"] for s in found["seeds"]]) for d in taught}
    known = {d: v for d, v in by_domain.items() if v is not None}
    # weights that make each domain count alike, whole so that right and wrong stay whole
    size = math.lcm(*(len(v) for v in known.values()))
    every = np.concatenate([v * (size // len(v)) for v in known.values()]) if len(known) == len(taught) else None
    found["p"] = None if every is None else stats.sign_flip(every)
    for domain, values in by_domain.items():
        found["domains"][domain]["p"] = None if values is None else stats.sign_flip(values)
    return found


def by_task(measured: Measures, row: str, reference: str, domain: str, seeds: list[int]) -> np.ndarray | None:
    """One difference a task, seeds summed; None where the two were not asked the same tasks."""
    summed: dict[str, float] = {}
    for seed in seeds:
        one, other = (measured.raw[seed, r, domain].values for r in (row, reference))
        if one.keys() != other.keys():
            return None
        for task, value in one.items():
            summed[task] = summed.get(task, 0.0) + value - other[task]
    return np.array(list(summed.values()))


def correct(differences: list[JSON]) -> None:
    """Adds ``p_holm`` beside every p: one family for the means over domains, one for all methods and domains."""
    for family in (differences, [cell for each in differences for cell in each["domains"].values()]):
        tested = [cell for cell in family if cell.get("p") is not None]
        for cell, adjusted in zip(tested, stats.holm([cell["p"] for cell in tested]), strict=True):
            cell["p_holm"] = adjusted


# --- compute -------------------------------------------------------------------------------------------------------------


def charged(run: Run, metas: dict[str, JSON], rows: Iterable[str], mean: JSON) -> JSON | None:
    """The ledgers of rows by seed, and their means over the seeds of ``mean``; None where one of those is not known."""
    seeds = [s for s in (charge(each, metas, tuple(rows)) for each in run.replicates) if s]
    scored = {s["seed"] for s in mean.get("seeds", ())}
    means: JSON = {}
    for name in LEDGERS:
        known = [s[name] for s in seeds if s["seed"] in scored]
        means[name] = sum(known) / len(known) if known and None not in known else None
    return {"seeds": seeds, "mean": means} if seeds else None


def charge(each: Replicate, metas: dict[str, JSON], rows: tuple[str, ...]) -> JSON | None:
    """The ledgers of rows at one seed, FLOPs; a ledger is None while a stage of it is missing, or not picked yet."""
    facts = ledgers.facts_of(each, metas)
    mine = ledgers.parts(each, rows, facts)
    if mine is None:
        return None
    missing = {name: {n for n in getattr(mine, name) if facts(n) is None or n in mine.undecided} for name in PARTS}
    missing["trials"] |= mine.undecided
    spent: JSON = {}
    for name in PARTS:
        of = [flops(metas[each.keys[n]]) for n in sorted(getattr(mine, name)) if n not in missing[name]]
        spent[name] = None if missing[name] else sum(of)
    if spent["trials"] is not None:
        spent["trials"] += sum((facts(n) or {}).get("development_flops") or 0.0 for n in sorted(mine.pickers))
    both = [spent["with_teachers"], spent["trials"]]
    spent["with_trials"] = None if None in both else sum(both)
    return {"seed": each.seed, **spent, "missing": sorted(set().union(*missing.values()))}


def flops(meta: JSON) -> float:
    """What an artifact cost."""
    return float((meta.get("cost") or {}).get("flops", 0.0))


def picks(each: Replicate, metas: dict[str, JSON], row: str) -> list[JSON]:
    """What was picked on the way to a row at one seed, and how every candidate did on the development split."""
    facts = ledgers.facts_of(each, metas)
    mine = ledgers.parts(each, (row,), facts)
    found = []
    for stage, label in sorted(mine.picks.items()) if mine else ():
        told = facts(stage) or {}
        trials = {name: trial.get("dev") for name, trial in (told.get("trials") or {}).items()}
        entry = {"seed": each.seed, "stage": stage, "candidate": label, "dev": told["selected"].get("dev"), "trials": trials}
        found.append({**entry, "end": at_end(label, list(trials))})
    return found


def at_end(label: str, trials: list[str]) -> str:
    """Words for a pick at an end of its trials, where more might lie beyond; empty for one between others, and without others.

    Labels that are alike but for one number are a range, in the order of the numbers; others are as the recipe lists them.
    """
    if label not in trials or len(trials) < 2:
        return ""
    numbers = {t: [float(n) for n in NUMBER.findall(t)] for t in trials}
    if len({NUMBER.sub("", t) for t in trials}) == 1 and all(len(n) == 1 for n in numbers.values()):
        order = sorted(trials, key=lambda t: numbers[t])
        return "end of the range" if label in (order[0], order[-1]) else ""
    return "first of its trials" if label == trials[0] else "last of its trials" if label == trials[-1] else ""
