"""Which of a teacher's numbers, measured before anything is spent, says how much of it a student will recover?

Teachers of four lineages, each brought as far by the quickstart's RL on its domain:

    same lineage    from the student's own SFT policy: the quickstart's specialists
    other data      from the same base, by SFT on other gold examples of the same format
    other format    from the same base, by SFT on the same examples in another layout (``<17|30|41>``)
    other base      from a base pretrained with another seed, of the same tokenizer and data

One student learns from each, by the sampled token and over the full vocabulary, as it is and after a warm-up on the teachers'
own verified replies, at equal compute: what the warm-up and its replies cost is taken from the distillation. A reply counts in
either layout. `Diagnose` measures every pair of student and teachers before its distillation; ``docs/results/predict.py`` sets
its numbers against the recovery. What the warm-up does alone has rows too.

The other base at one seed is the quickstart's at the next: with several seeds nothing is pretrained twice, and a base is a
student's at one seed and a teacher's at another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from tutelage.credit.teacher import Teacher
from tutelage.envs.single import SingleTurn
from tutelage.graph import At, Goals, Stage, Table
from tutelage.learn.optim import AdamW, Schedule
from tutelage.losses.distill import FullReverseKL, TokenReverseKL
from tutelage.recipes.quickstart import DOMAINS, LONGEST, SOLVED, distilled, measured, pretrained, specialist, started, tuned
from tutelage.rollout.base import Sampling
from tutelage.stages.budget import Budget
from tutelage.stages.diagnose import Diagnose
from tutelage.stages.fit import Fit
from tutelage.stages.online import Online
from tutelage.stages.relayout import Relayout
from tutelage.stages.tasks import TaskSplits
from tutelage.stages.traces import Traces
from tutelage.verify.layout import EitherLayout

TAUGHT = ("reverse", "sort")
EITHER = SingleTurn(verifier=EitherLayout(verifier=SOLVED.verifier))
SAME, FORMAT = "same lineage", "other format"
LINEAGES = (SAME, "other data", FORMAT, "other base")
FORMS: dict[str, dict[str, Any]] = {
    "full vocabulary": {"loss": FullReverseKL(), "credit": (Teacher(want="hidden"),), "optimizer": AdamW(lr=1e-3)},
    "sampled token": {"loss": TokenReverseKL(), "credit": (Teacher(),), "optimizer": AdamW(lr=5e-4)},
}
STEPS = 100
"""of a student that is not warmed up"""
WARM = 20
"""steps of the warm-up"""
MANY = 100_000
"""Steps where a budget decides."""
T = TypeVar("T", bound=Stage)


def diagnose(seed: int = 0) -> Goals:
    """Teachers of four lineages, sampled token or full vocabulary, with a warm-up or without: what foretells the recovery?"""
    arms = Arms(seed)
    methods: dict[str, tuple[str, Stage]] = {}
    for lineage in arms.teachers:
        for form in FORMS:
            methods[f"{lineage}, {form}"] = lineage, arms.student(lineage, form)
        for form in FORMS:
            methods[f"{lineage}, {form}, warmed up"] = lineage, arms.student(lineage, form, WARM)
        methods[f"{lineage}, warm-up alone"] = lineage, arms.warmed(lineage, WARM)
    diagnoses = [arms.diagnosis(lineage, steps) for lineage in arms.teachers for steps in (0, WARM)]
    return arms.goals("diagnose", methods, diagnoses)


class Arms:
    """Teachers by lineage, and what is made from them for one student. A stage that is asked for again is the same stage."""

    def __init__(self, seed: int, lineages: Iterable[str] = LINEAGES):
        self.seed = seed
        self.tasks, self.base, self.sft = started(seed)
        self.teachers: dict[str, dict[str, At]] = {}
        self._made: dict[str, Stage] = {}
        for lineage in lineages:
            start, fields = self._start(lineage)
            name = "" if lineage == SAME else f" {lineage}"
            climbs = {d: specialist(d, self.tasks, start, **{"name": f"rl-{d}{name}", **fields}) for d in TAUGHT}
            self.teachers[lineage] = {d: stage.out() for d, stage in climbs.items()}

    def _start(self, lineage: str) -> tuple[Stage, dict[str, Any]]:
        """What the specialists of a lineage start from, and their fields."""
        name, fields = f"sft {lineage}", {"seed": self.seed}
        if lineage == "other data":
            gold = TaskSplits(
                name="tasks other data", domains=DOMAINS, data_seed=1, pretrain=len(DOMAINS), rl=1, dev=1, heldout=1
            )
            return tuned(self.tasks, self.base, self.seed, name=name, data=gold.out("gold")), fields
        if lineage == FORMAT:
            gold_too = Relayout(name="gold other format", data=self.tasks.out("gold"))
            sft = tuned(self.tasks, self.base, self.seed, env=EITHER, name=name, data=gold_too.out())
            return sft, {**fields, "env": EITHER}
        if lineage == "other base":
            start = pretrained(self.tasks, self.seed + 1, " other base")
            return tuned(self.tasks, start, self.seed + 1, name=name), {"seed": self.seed + 1}
        return self.sft, fields

    def _once(self, name: str, make: Callable[[str], T]) -> T:
        if name not in self._made:
            self._made[name] = make(name)
        return cast(T, self._made[name])

    def traces(self, lineage: str) -> Traces:
        """The teachers' own replies that the verifier accepts."""
        return self._once(
            f"traces {lineage}",
            lambda name: Traces(
                name=name,
                policies=self.teachers[lineage],
                tasks=self.tasks.out("rl"),
                env=EITHER,
                prompts=500,
                sampling=Sampling(max_new_tokens=LONGEST),
                seed=self.seed,
            ),
        )

    def warmed(self, lineage: str, steps: int, **changes: Any) -> Fit:
        """The student after some steps of SFT on `traces`; with other fields."""
        fields: dict[str, Any] = {"steps": steps, "schedule": Schedule(warmup=2), "optimizer": AdamW(lr=1e-3), **changes}
        return self._once(
            changes.get("name", f"warm-up {steps} {lineage}"),
            lambda name: Fit(
                **{**fields, "name": name, "model": self.sft.out(), "data": self.traces(lineage).out(), "seed": self.seed}
            ),
        )

    def student(self, lineage: str, form: str, warm: int = 0, **changes: Any) -> Online:
        """MOPD by a lineage's teachers. After a warm-up of some steps, for what an unwarmed one spends in all."""
        start: Stage = self.sft
        fields: dict[str, Any] = {"domains": TAUGHT, "env": EITHER, "prompts": 32, "steps": STEPS, **FORMS[form]}
        name = f"mopd {lineage} {form}"
        if warm:
            start, whole = self.warmed(lineage, warm), self.student(lineage, form)
            spent = (self.traces(lineage).out(), start.out())
            fields |= {"steps": MANY, "budget": Budget(of=(whole.out(),), less=spent)}
            name += f" after {warm}"
        fields |= changes
        return self._once(
            fields.pop("name", name),
            lambda name: distilled(self.tasks, start, self.teachers[lineage], self.seed, **{**fields, "name": name}),
        )

    def diagnosis(self, lineage: str, warm: int = 0) -> Diagnose:
        """What the teachers say of the student's replies, before its distillation."""
        start = self.warmed(lineage, warm) if warm else self.sft
        return self._once(
            f"diagnosis {lineage}" + (f" after {warm}" if warm else ""),
            lambda name: Diagnose(
                name=name,
                model=start.out(),
                teachers=self.teachers[lineage],
                tasks=self.tasks.out("dev"),
                domains=TAUGHT,
                env=EITHER,
                prompts=125,
                sampling=Sampling(max_new_tokens=LONGEST),
                seed=self.seed,
            ),
        )

    def goals(self, recipe: str, methods: dict[str, tuple[str, Stage]], diagnoses: Iterable[Diagnose]) -> Goals:
        """A table of the SFT policy, the teachers and the methods (label -> lineage and stage), each held to its teachers. The
        first method is the reference."""
        sources: dict[str, At] = {"sft": self.sft.out()}
        rows_of = {lineage: {d: f"{lineage}, {d} specialist" for d in TAUGHT} for lineage in self.teachers}
        for lineage, of in rows_of.items():
            sources |= {row: self.teachers[lineage][d] for d, row in of.items()}
        sources |= {label: stage.out() for label, (_, stage) in methods.items()}
        first = next(iter(methods))
        reference = methods[first][0]
        table = Table(
            rows={row: {d: measured(row, at.of, self.tasks, d, env=EITHER) for d in TAUGHT} for row, at in sources.items()},
            before="sft",
            after=first,
            teachers=rows_of[reference],
            methods=tuple(methods),
            taught_by={label: rows_of[lineage] for label, (lineage, _) in methods.items() if lineage != reference},
            sources=sources,
        )
        stages = (*(stage.out() for _, stage in methods.values()), *(stage.out() for stage in diagnoses))
        return Goals(recipe=recipe, stages=stages, table=table, seed=self.seed)
