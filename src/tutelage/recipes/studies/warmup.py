"""How short a warm-up repairs teachers of another lineage?

The teachers write in another format than their student (studies/diagnose). The student is warmed up on their own verified
replies for 0, 5, 10, 20 or 40 steps and then learns from them, by the sampled token and over the full vocabulary; what the
warm-up and its replies cost is taken from the distillation, so that all spend the same. Controls: each warm-up alone, a
warm-up that spends everything, and teachers of the student's own lineage.
"""

from __future__ import annotations

from tutelage.graph import Goals, Stage
from tutelage.recipes.studies.diagnose import FORMAT, FORMS, MANY, SAME, Arms
from tutelage.stages.budget import Budget

LENGTHS = (0, 5, 10, 20, 40)
"""steps of the warm-up"""


def warmup(seed: int = 0) -> Goals:
    """The least warm-up on the teachers' replies that repairs teachers of another format, at equal compute."""
    arms = Arms(seed, (SAME, FORMAT))
    methods: dict[str, tuple[str, Stage]] = {}
    for form in FORMS:
        for steps in LENGTHS:
            methods[f"{steps} steps, {form}"] = FORMAT, arms.student(FORMAT, form, steps)
    for steps in LENGTHS[1:]:
        methods[f"{steps} steps, nothing else"] = FORMAT, arms.warmed(FORMAT, steps)
    full = arms.student(FORMAT, next(iter(FORMS)))
    everything = Budget(of=(full.out(),), less=(arms.traces(FORMAT).out(),))
    methods["warm-up for everything"] = FORMAT, arms.warmed(FORMAT, MANY, name="warm-up for everything", budget=everything)
    for form in FORMS:
        methods[f"{SAME}, {form}"] = SAME, arms.student(SAME, form)
    return arms.goals("warmup", methods, [arms.diagnosis(SAME), *(arms.diagnosis(FORMAT, steps) for steps in LENGTHS)])
