"""One round of specialists and MOPD, or two at the same total compute?

One round is the quickstart. Two rounds give each specialist half its steps, distil for half the steps, train new specialists
from that student for the other half, and distil again, as Nemotron 3 Ultra does twice (arXiv 2606.15007) and MOPD tried
(arXiv 2606.30406: .937 to .986, with compute added). The second round's stages are bounded by what the one round has left,
in FLOPs, so that both cost the same.
"""

from __future__ import annotations

from tutelage.graph import At, Goals, Table
from tutelage.recipes.quickstart import CLIMB, NAMES, distilled, measured, specialist, started
from tutelage.stages.budget import Budget

STEPS = 100
"""of the one round's student"""
MANY = 100_000
"""Steps where a budget decides."""


def rounds(seed: int = 0) -> Goals:
    """One round of specialists and MOPD against two at equal total compute, on the quickstart's four domains."""
    tasks, _, sft = started(seed)
    once = {d: specialist(d, tasks, sft, seed=seed) for d in NAMES}
    one = distilled(tasks, sft, {d: s.out() for d, s in once.items()}, seed, name="mopd", steps=STEPS)
    halves = {d: specialist(d, tasks, sft, name=f"rl-{d} half", seed=seed, steps=CLIMB[d] // 2) for d in NAMES}
    middle = distilled(tasks, sft, {d: s.out() for d, s in halves.items()}, seed, name="mopd half", steps=STEPS // 2)
    again = {
        d: specialist(
            d,
            tasks,
            middle,
            name=f"rl-{d} again",
            seed=seed,
            steps=MANY,
            budget=Budget(of=(once[d].out(),), less=(halves[d].out(),)),
        )
        for d in NAMES
    }
    left = Budget(of=(one.out(),), less=(middle.out(),))
    two = distilled(tasks, middle, {d: s.out() for d, s in again.items()}, seed, name="mopd again", steps=MANY, budget=left)
    stages = {"sft": sft, **{f"specialist {d}": s for d, s in once.items()}, "one round": one}
    stages |= {"two rounds, after the first": middle, **{f"second {d}": s for d, s in again.items()}, "two rounds": two}
    sources: dict[str, At] = {label: stage.out() for label, stage in stages.items()}
    rows = {label: {d: measured(label, stage, tasks, d) for d in NAMES} for label, stage in stages.items()}
    taught = {d: f"specialist {d}" for d in NAMES}
    methods = ("one round", "two rounds, after the first", "two rounds")
    table = Table(rows=rows, before="sft", after="one round", teachers=taught, methods=methods, sources=sources)
    return Goals(recipe="rounds", stages=(one.out(), two.out()), table=table, seed=seed)
