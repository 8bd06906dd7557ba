"""Are many narrow teachers better than few broad ones, and does it matter how the tokens are shared among them?

The quickstart's four domains are cut in two by level, short and long: eight domains that one base knows. As many prompts in RL
make eight specialists of one half each, four of two (the quickstart's), or two of four. From each set one student learns, on
the same prompts, all tokens alike or all domains alike; long domains take most tokens where all count alike (``token_share``
in the metrics tells).

Leaves out: eight domains that have nothing in common, which needs a base pretrained on more.
"""

from __future__ import annotations

from typing import Any

from tutelage.graph import At, Goals, Stage, Table
from tutelage.recipes.quickstart import CLIMB, DOMAINS, NAMES, distilled, measured, specialist, started
from tutelage.stages.tasks import TaskSplits
from tutelage.tasks.base import Domain

CUT = {"sum": 5, "reverse": 7, "sort": 6, "convert": 14}
"""domain -> the first level of its long half"""
PAIRS = (("sum", "sort"), ("reverse", "convert"))
"""What the two broad teachers know."""
SETS = (8, 4, 2)


def teachers(seed: int = 0) -> Goals:
    """Two, four or eight teachers of the same eight domains, with all tokens alike or all domains alike."""
    tasks, _, sft = started(seed)
    halves = TaskSplits(name="tasks halves", domains=halved(), pretrain=8, gold=1, rl=1500)
    sets = {count: _taught(count, tasks, halves, sft, seed) for count in SETS}
    methods: dict[str, tuple[int, Stage]] = {}
    for count, of in sets.items():
        for label, balance in (("", False), (", balanced", True)):
            fields: dict[str, Any] = {"name": f"mopd {count}{label}", "domains": tuple(of), "balance": balance}
            methods[f"{count} teachers{label}"] = count, distilled(halves, sft, of, seed, **fields)
    sources: dict[str, At] = {"sft": sft.out()}
    rows_of = {count: {d: f"specialist {at.of.name.removeprefix('rl-')}" for d, at in of.items()} for count, of in sets.items()}
    for count, rows in rows_of.items():
        sources |= {row: sets[count][d] for d, row in rows.items()}
    sources |= {label: stage.out() for label, (_, stage) in methods.items()}
    table = Table(
        rows={row: {d.name: measured(row, at.of, halves, d.name) for d in halved()} for row, at in sources.items()},
        before="sft",
        after=next(iter(methods)),
        teachers=rows_of[SETS[0]],
        methods=tuple(methods),
        taught_by={label: rows_of[count] for label, (count, _) in methods.items() if count != SETS[0]},
        sources=sources,
    )
    return Goals(recipe="teachers", stages=tuple(stage.out() for _, stage in methods.values()), table=table, seed=seed)


def halved() -> tuple[Domain, ...]:
    """Each of the quickstart's domains twice: what is asked below the cut, and from it on."""
    found: list[Domain] = []
    for domain in DOMAINS:
        (low, high), cut = domain.asked, CUT[domain.name]
        found += [
            domain.model_copy(update={"name": f"short {domain.name}", "asked": (low, cut - 1)}),
            domain.model_copy(update={"name": f"long {domain.name}", "asked": (cut, high)}),
        ]
    return tuple(found)


def _taught(count: int, tasks: TaskSplits, halves: TaskSplits, sft: Stage, seed: int) -> dict[str, At]:
    """domain -> its teacher, of so many; each set has been asked as many prompts."""
    names = {d: (f"short {d}", f"long {d}") for d in NAMES}
    if count == len(NAMES):
        broad = {d: specialist(d, tasks, sft, seed=seed) for d in NAMES}
        return {half: broad[d].out() for d in NAMES for half in names[d]}
    if count > len(NAMES):
        return {
            half: specialist(d, halves, sft, name=f"rl-{half}", domains=(half,), steps=CLIMB[d] // 2, seed=seed).out()
            for d in NAMES
            for half in names[d]
        }
    found: dict[str, At] = {}
    for pair in PAIRS:
        name, steps = f"rl-{' and '.join(pair)}", sum(CLIMB[d] for d in pair)
        stage = specialist(pair[0], tasks, sft, name=name, domains=pair, steps=steps, seed=seed)
        found |= {half: stage.out() for d in pair for half in names[d]}
    return found
