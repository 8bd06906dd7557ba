"""How well what `Diagnose` measured before a distillation foretold what the distillation recovered: rank correlations.

    python docs/results/predict.py STORE RUN

A point is a method of the run's table at one seed, in one domain: the numbers of the diagnosis that has the same student and
the same teachers as the method's distillation, and its recovery, (after − before) / (teacher − before), by its own teachers.
Points whose gap may be zero have no recovery and are left out, and counted. Spearman's ρ is given over all points of a domain,
and over those of each loss; intervals (95 %) are percentiles of 2000 bootstrap draws of *diagnoses* (a student, its teachers
and a seed), since what was made from one diagnosis shares its numbers. They cover the choice of arms and seeds.

Leaves out: several numbers together, and any correction for asking many: with so many rows some will look good by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from tutelage.report import stats
from tutelage.report.measures import Measures
from tutelage.report.read import Edge, Replicate, find_edges, load
from tutelage.spec import UserError
from tutelage.store import Store

DRAWS = 2000
ALL = "all"


def predictors(store: Store, run_name: str) -> dict[str, Any] | None:
    """``points`` and ``left_out`` by domain, and by number, domain and loss: ``rho``, ``interval``, ``points``; None for a run
    that measured no teachers of its methods."""
    run = load(store, run_name)
    measured = Measures(store, run)
    rows: list[dict[str, Any]] = []
    left: dict[str, int] = {}
    for each in run.replicates:
        for row, method, told, diagnosis in _pairs(store, each):
            loss = each.record["stages"][method]["loss"]["kind"].rpartition(".")[2]
            for domain, teacher in each.table.teachers_of(row).items():
                cells = [(each.seed, r, domain) for r in (each.table.before, teacher, row)]
                numbers = _numbers(told, domain)
                if not numbers or not all(cell in measured.figures for cell in cells):
                    continue
                ratio = stats.recovery(*([measured.figures[cell]] for cell in cells)).ratio
                left[domain] = left.get(domain, 0) + (ratio is None)
                if ratio:
                    at = {"row": row, "seed": each.seed, "domain": domain, "loss": loss, "diagnosis": diagnosis}
                    rows.append({**at, "recovery": ratio.point, "numbers": numbers})
    if not rows and not left:
        return None
    found: dict[str, Any] = {}
    for domain in left:
        mine = [r for r in rows if r["domain"] == domain]
        for name in dict.fromkeys(n for r in mine for n in r["numbers"]):
            for loss in (ALL, *sorted({r["loss"] for r in mine})):
                of = [r for r in mine if loss in (ALL, r["loss"]) and r["numbers"].get(name) is not None]
                found.setdefault(name, {}).setdefault(domain, {})[loss] = correlation(
                    np.array([r["numbers"][name] for r in of]),
                    np.array([r["recovery"] for r in of]),
                    [r["diagnosis"] for r in of],
                )
    return {"points": {d: sum(r["domain"] == d for r in rows) for d in left}, "left_out": left, "numbers": found}


def _pairs(store: Store, each: Replicate) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """(method, its distillation, what was measured before it, the measuring artifact's key) of one replicate."""

    def who(stage: str) -> frozenset[tuple[str, str, str, int | None]]:
        """The student and the teachers of a stage, as artifacts."""
        spec = each.record["stages"][stage]
        edges = find_edges({"model": spec.get("model"), "teachers": spec.get("teachers")})
        return frozenset((e.path, each.keys.get(e.ref, ""), e.port, e.step) for e in edges)

    known = {}
    for name, key in each.keys.items():
        facts = store.meta(key).get("facts") or {} if store.has(key) else {}
        if "diagnosis" in facts and name in each.record["stages"]:
            known[who(name)] = facts["diagnosis"], key
    for row in each.table.methods:
        stage = _distillation(each, each.source(row))
        if stage and who(stage) in known:
            yield row, stage, *known[who(stage)]


def _distillation(each: Replicate, source: Edge | None) -> str:
    """The stage with teachers that a row measures, or any trial of it where one is picked: they differ in settings alone."""
    stages = each.record.get("stages", {})
    name = source.ref if source else ""
    trials = list(find_edges(stages.get(name, {}).get("candidates") or {}))
    name = trials[0].ref if trials else name
    return name if stages.get(name, {}).get("teachers") and "loss" in stages[name] else ""


def _numbers(told: dict[str, Any], domain: str) -> dict[str, float | None]:
    """Every number of the domain's teacher, and how it drifts along a reply."""
    for one in told["teachers"]:
        if one["domain"] == domain:
            means = {name: at["mean"] for name, at in one["numbers"].items()}
            return means | {f"{name}, drift": at["mean"] for name, at in one["drift"].items()}
    return {}


def correlation(x: np.ndarray, y: np.ndarray, clusters: list[str]) -> dict[str, Any]:
    """Spearman's ρ of x and y [n] with its interval from draws of whole clusters; None where it is not defined."""
    names = list(dict.fromkeys(clusters))
    drawn = np.ones((1, len(x)))
    if len(names) > 2:
        rng = np.random.default_rng(zlib.crc32(b"predict"))
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), DRAWS)
        drawn = np.concatenate([drawn, counts[:, [names.index(c) for c in clusters]]])
    rho = spearman(x, y, drawn)
    known = rho[1:][np.isfinite(rho[1:])]
    interval = [float(v) for v in np.quantile(known, (0.025, 0.975))] if known.size else None
    return {"rho": float(rho[0]) if np.isfinite(rho[0]) else None, "interval": interval, "points": len(x)}


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[D]: Pearson's correlation of the ranks of x and y [n], equals sharing their mean rank, where each point stands
    ``weights`` [D, n] times; nan where one of the two never varies."""
    size = weights.sum(1, keepdims=True)
    one, other = (weights @ ((v[:, None] < v) + 0.5 * (v[:, None] == v)) for v in (x, y))  # [D, n]
    one, other = (r - (weights * r).sum(1, keepdims=True) / size for r in (one, other))
    both, var, var_other = ((weights * a * b).sum(1) for a, b in ((one, other), (one, one), (other, other)))
    sure = (var > 1e-9) & (var_other > 1e-9)
    return np.where(sure, both / np.sqrt(np.where(sure, var * var_other, 1.0)), np.nan)


def shown(found: dict[str, Any]) -> str:
    """A table of the correlations, a line for each number, the strongest first."""
    heads = list(dict.fromkeys((d, loss) for of in found["numbers"].values() for d, cells in of.items() for loss in cells))
    lines = [["number", *(f"{d}, {loss}: ρ (95 %), points" for d, loss in heads)], ["---"] * (1 + len(heads))]

    def strength(name: str) -> float:
        known = [abs(cells[ALL]["rho"] or 0.0) for cells in found["numbers"][name].values()]
        return sum(known) / len(known)

    for name in sorted(found["numbers"], key=strength, reverse=True):
        cells = (found["numbers"][name].get(d, {}).get(loss) for d, loss in heads)
        lines.append([name, *("–" if not c or c["rho"] is None else _cell(c) for c in cells)])
    left = ", ".join(f"{d} {n}" for d, n in found["left_out"].items())
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\nPoints left out, whose gap may be zero: {left}."


def _cell(of: dict[str, Any]) -> str:
    span = f" ({of['interval'][0]:+.2f} to {of['interval'][1]:+.2f})" if of["interval"] else ""
    return f"{of['rho']:+.2f}{span}, {of['points']}"


def main() -> None:
    asked = argparse.ArgumentParser(description="How well each diagnosed number foretold the recovery.")
    for word in ("store", "run"):
        asked.add_argument(word)
    asked.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = asked.parse_args()
    try:
        found = predictors(Store(given.store, create=False), given.run)
        if found is None:
            raise UserError(f"run {given.run!r} measured no teachers of its methods; give a finished run of studies/diagnose")
        if not any(found["points"].values()):
            raise UserError(
                f"run {given.run!r} has no teacher that is surely better than its student; give one with more seeds"
            )
    except (UserError, OSError) as error:
        asked.exit(2, f"error: {error}\n")
    sys.stdout.write(json.dumps(found, indent=1) if given.json else shown(found))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
