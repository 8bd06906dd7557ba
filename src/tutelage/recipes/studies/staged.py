"""Should a student learn from a converged teacher, or from its checkpoints in turn?

The quickstart's specialists keep checkpoints at a quarter, a half and three quarters of their climb. Four students, on as many
prompts each: one learns from the last checkpoint alone, one from half-way first, one from all four in order, one from all four
as the measured KL allows; and one from all four in reverse, the control: if turns help because teachers vary, their order
is no matter.
"""

from __future__ import annotations

from typing import Any

from tutelage.graph import At, Goals, Table
from tutelage.recipes.quickstart import CLIMB, NAMES, distilled, measured, specialist, started
from tutelage.stages.staged import AtKL, AtSteps, Staged, Switch

QUARTERS = (0.25, 0.5, 0.75)
STEPS = 100
"""of each student"""
CLOSE = 0.15
"""nats a token at which the KL hands over; a stage begins at 0.2 to 0.5"""


def staged(seed: int = 0) -> Goals:
    """A converged teacher against its own checkpoints in turn, on the quickstart's four domains."""
    tasks, _, sft = started(seed)
    kept = {d: tuple(round(q * CLIMB[d]) for q in QUARTERS) for d in NAMES}
    climbs = {d: specialist(d, tasks, sft, seed=seed, checkpoints=kept[d]) for d in NAMES}
    last = {d: stage.out() for d, stage in climbs.items()}
    early = {d: tuple(climbs[d].out(step=s) for s in kept[d]) for d in NAMES}
    turns = AtSteps(steps=tuple(round(q * STEPS) for q in QUARTERS))
    arms: dict[str, dict[str, Any]] = {
        "converged": {},
        "half-way, then converged": {"staged": _before({d: early[d][1:2] for d in NAMES}, AtSteps(steps=(STEPS // 2,)))},
        "four in turn": {"staged": _before(early, turns)},
        "four by KL": {"staged": _before(early, AtKL(below=CLOSE, longest=STEPS // 4))},
        "four in reverse": {
            "staged": _before({d: (last[d], *early[d][:0:-1]) for d in NAMES}, turns),
            "teachers": {d: early[d][0] for d in NAMES},
        },
    }
    checkpoints: dict[str, At] = {"sft": sft.out()} | {f"specialist {d}": at for d, at in last.items()}
    for arm, changes in arms.items():
        fields = {"name": f"mopd {arm}", "teachers": last, "steps": STEPS, **changes}
        checkpoints[arm] = distilled(tasks, sft, fields.pop("teachers"), seed, **fields).out()
    rows = {label: {d: measured(label, at.of, tasks, d) for d in NAMES} for label, at in checkpoints.items()}
    taught = {d: f"specialist {d}" for d in NAMES}
    table = Table(rows=rows, before="sft", after="converged", teachers=taught, methods=tuple(arms), sources=checkpoints)
    return Goals(recipe="staged", stages=tuple(checkpoints[a] for a in arms), table=table, seed=seed)


def _before(teachers: dict[str, tuple[At, ...]], switch: Switch) -> Staged:
    return Staged(teachers=teachers, switch=switch)
