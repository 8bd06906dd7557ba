"""Should a student wait for its teachers, or learn from them while they still train?

The quickstart's four specialists, twice from the same start: as stages of their own, of which a student learns by MOPD once all
have finished; and as branches of one stage, beside the student whom they teach (codistill.py). Branches end in the bits of the
stages, so they cost the same, and the student of the finished specialists may spend what the other student has spent: the
totals are equal up to a step. Both students start from SFT, with as many trials of the learning rate each.
"""

from __future__ import annotations

from tutelage.graph import At, Goals, Stage, Table
from tutelage.learn.optim import AdamW
from tutelage.recipes.quickstart import CLIMB, GREEDY, NAMES, SOLVED, distilled, measured, specialist, started
from tutelage.stages.best import Best
from tutelage.stages.budget import Budget
from tutelage.stages.codistill import Codistill
from tutelage.stages.tasks import TaskSplits

RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates of a student; the middle one is the quickstart's."""
STEPS = max(CLIMB.values())
"""Of the student beside the branches: one in every round."""
MANY = 100_000
"""Steps where a budget decides."""


def codistillation(seed: int = 0) -> Goals:
    """MOPD from finished specialists against co-distillation at equal total compute, on the quickstart's four domains."""
    tasks, _, sft = started(seed)
    climbs = {d: specialist(d, tasks, sft, seed=seed) for d in NAMES}
    last = {d: stage.out() for d, stage in climbs.items()}
    waiting: dict[str, At] = {}
    beside: dict[str, At] = {}
    for lr in RATES:
        label, rate = f"lr {lr:g}", AdamW(lr=lr)
        student = distilled(tasks, sft, {}, seed, name="student", steps=STEPS, optimizer=rate)
        both = Codistill(name=f"codistill {label}", student=student, branches=climbs)
        beside[label] = both.out("student")
        left = Budget(of=(both.out("student"),), less=tuple(last.values()))
        mopd = distilled(tasks, sft, last, seed, name=f"mopd {label}", steps=MANY, optimizer=rate, budget=left)
        waiting[label] = mopd.out()
    stages: dict[str, Stage] = {"sft": sft, **{f"specialist {d}": s for d, s in climbs.items()}}
    methods = {"finished teachers": _best("mopd", waiting, tasks), "co-distillation": _best("codistill", beside, tasks)}
    stages |= methods
    table = Table(
        rows={label: {d: measured(label, stage, tasks, d) for d in NAMES} for label, stage in stages.items()},
        before="sft",
        after="finished teachers",
        teachers={d: f"specialist {d}" for d in NAMES},
        methods=tuple(methods),
        sources={label: stage.out() for label, stage in stages.items()},
    )
    return Goals(recipe="codistillation", stages=tuple(m.out() for m in methods.values()), table=table, seed=seed)


def _best(name: str, trials: dict[str, At], tasks: TaskSplits) -> Best:
    """The trial that is best on the development split."""
    return Best(name=f"best {name}", candidates=trials, select_on=tasks.out("dev"), env=SOLVED, sampling=GREEDY)
