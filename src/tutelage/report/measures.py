"""Every score of a run with paired bootstrap figures, and what is made of them: means, differences, recovery.

Cells are (seed, row, domain). Leaves out: which rows are compared with which (data.py, methods.py), and the arithmetic of
intervals and tests (stats.py).
"""

from __future__ import annotations

import numpy as np

from tutelage.report import stats
from tutelage.report.read import JSON, Measured, Run, read_scores
from tutelage.report.stats import Figure
from tutelage.store import Store

Cell = tuple[int, str, str]
"""seed, row, domain"""


class Measures:
    """Every score of a run, with paired bootstrap figures by (seed, row, domain)."""

    def __init__(self, store: Store, run: Run):
        table = run.table
        self.rows = list(table.rows)
        self.seeds = [r.seed for r in run.replicates]
        self.raw: dict[Cell, Measured] = {}
        read: dict[tuple[str, str, int | None], Measured | None] = {}
        for each in run.replicates:
            for row, by_domain in each.table.rows.items():
                for domain, edge in by_domain.items():
                    where = (each.keys.get(edge.ref, ""), edge.port, edge.step)
                    if where not in read:
                        read[where] = read_scores(store, *where)
                    found = read[where]
                    if found is not None and found.values:
                        self.raw[each.seed, row, domain] = found
        self.domains = list(dict.fromkeys([*table.teachers, *(d for row in table.rows.values() for d in row)]))
        self.figures: dict[Cell, Figure] = {}
        for domain in self.domains:
            mine = {k: m.values for k, m in self.raw.items() if k[2] == domain}
            drawn = stats.resample(domain, mine, {k: k[0] for k in mine})
            self.figures.update({k: drawn[k] for k in mine})

    def seeds_with(self, *cells: tuple[str, str]) -> list[int]:
        """The seeds at which every (row, domain) has been measured."""
        return [s for s in self.seeds if all((s, row, domain) in self.figures for row, domain in cells)]

    def mean(self, row: str, domain: str, seeds: list[int]) -> Figure:
        return stats.mean(self.figures[s, row, domain] for s in seeds)

    def difference(self, row: str, than: str, domain: str, seeds: list[int] | None = None) -> JSON | None:
        """Paired ``row − than`` over ``seeds``, by default those that have both; None where there are none."""
        seeds = self.seeds_with((row, domain), (than, domain)) if seeds is None else seeds
        if not seeds:
            return None
        parts = {s: self.figures[s, row, domain] - self.figures[s, than, domain] for s in seeds}
        both = stats.mean(parts.values())
        shown = [{"seed": s, "difference": f.point, "interval": f.interval} for s, f in parts.items()]
        return {"difference": both.point, "interval": both.interval, "seeds": shown}

    def change(self, row: str, before: str, domain: str) -> JSON | None:
        """`difference` with both means, ``before`` and ``after``."""
        found = self.difference(row, before, domain)
        if not found:
            return None
        seeds = self.seeds_with((row, domain), (before, domain))
        return {**{k: self.mean(r, domain, seeds).point for k, r in (("before", before), ("after", row))}, **found}


def score_entry(raws: dict[int, Measured]) -> JSON:
    """Mean over seeds; interval by Wilson at the number of distinct tasks."""
    shown: list[JSON] = []
    tasks: set[str] = set()
    for seed, raw in raws.items():
        values = np.fromiter(raw.values.values(), float)
        tasks.update(raw.values)
        interval = stats.mean_interval(float(values.mean()), float(values.var()), len(values))
        shown.append({"seed": seed, "n": len(values), "mean": values.mean(), "interval": interval, "errors": raw.errors})
    every = np.concatenate([np.fromiter(r.values.values(), float) for r in raws.values()])
    middle = float(np.mean([s["mean"] for s in shown]))
    return {
        "n": len(tasks),
        "mean": middle,
        "interval": stats.mean_interval(middle, float(every.var()), len(tasks)),
        "errors": sum(r.errors for r in raws.values()),
        "seeds": shown,
    }


def mean_gap(measured: Measures, row_of: dict[str, str], than: str) -> JSON | None:
    """The mean over domains of ``row_of[domain] − than``, and each domain, over the seeds at which every domain has both;
    None where no seed has."""
    seeds = measured.seeds_with(*((r, d) for d, r in row_of.items()), *((than, d) for d in row_of))
    if not seeds:
        return None
    figures = measured.figures
    by_seed = {s: stats.mean(figures[s, r, d] - figures[s, than, d] for d, r in row_of.items()) for s in seeds}
    both = stats.mean(by_seed.values())
    return {
        "difference": both.point,
        "interval": both.interval,
        "seeds": [{"seed": s, "difference": f.point, "interval": f.interval} for s, f in by_seed.items()],
        "domains": {d: measured.difference(r, than, d, seeds) for d, r in row_of.items()},
    }


def recovery(measured: Measures, before: str, teachers: dict[str, str], after: str) -> JSON:
    """The primary figure, its interval, every seed and every domain.

    ``mean``: over seeds, of Σ_d(after − before) / Σ_d(teacher − before) with no domain dropped; None while no seed is
    measured whole, or where the summed gap of any seed has an interval that includes 0. ``domains``: accuracies are means
    over seeds; the ratio is that of the sums over seeds, None where its gap's interval includes 0.
    """
    cells = {d: ((before, d), (t, d), (after, d)) for d, t in teachers.items()}
    whole = measured.seeds_with(*(c for three in cells.values() for c in three))
    figures, seeds = [], []
    for seed in whole:
        three = [[measured.figures[seed, *cells[d][i]] for d in cells] for i in range(3)]
        primary = stats.recovery(*three)
        figures.append(primary.ratio)
        own = {d: ratio_entry(*([column[i]] for column in three)) for i, d in enumerate(cells)}
        seeds.append({"seed": seed, **ratio_numbers(primary), "domains": own})
    domains: JSON = {}
    for domain, three_cells in cells.items():
        at = measured.seeds_with(*three_cells)
        if at:
            domains[domain] = ratio_entry(*([measured.figures[s, *cell] for s in at] for cell in three_cells))
    sure = [f for f in figures if f is not None]
    both = stats.mean(sure) if sure and len(sure) == len(figures) else None
    return {
        "mean": both.point if both else None,
        "interval": both.interval if both else None,
        "seeds": seeds,
        "seeds_missing": [s for s in measured.seeds if s not in whole],
        "domains": domains,
    }


def ratio_numbers(ratio: stats.Ratio) -> JSON:
    return {
        "recovery": ratio.ratio.point if ratio.ratio else None,
        "interval": ratio.ratio.interval if ratio.ratio else None,
        "gain": ratio.gain.point,
        "gap": ratio.gap.point,
        "gap_interval": ratio.gap.interval,
    }


def ratio_entry(before: list[Figure], teacher: list[Figure], after: list[Figure]) -> JSON:
    """One domain over seeds: mean accuracies, and the ratio of sums (gain and gap as means over seeds)."""
    means = [stats.mean(column) for column in (before, teacher, after)]
    numbers = ratio_numbers(stats.recovery(*([m] for m in means)))
    return {"before": means[0].point, "teacher": means[1].point, "after": means[2].point, **numbers}
