"""Consolidation: everything that MOPD is said to replace, from the same specialists, at the same compute.

The SFT policy, the specialists and the tasks are the quickstart's, and so is the distillation whose cost is the measure: its
FLOPs are the budget of whatever consolidates specialists, and with the specialists' FLOPs added that of whatever needs none.
Each method gets three trials of its one most important setting, chosen on the development split, seed by seed (best.py):

    MOPD             sampled token or full vocabulary, tokens alike or domains balanced: learning rate
    trace SFT        SFT on the specialists' verified replies, their sampling paid for: learning rate
    mixed RL         one RL on all domains, at the student's compute and at everything's: learning rate
    cascade RL       one domain after another, at everything's compute: learning rate
    average          of the specialists' weights: their proportions
    task arithmetic  λ

Where the development splits of the first two seeds chose the end of a range, it was moved, as the results page tells.
Trace SFT has two controls: the traces unverified, and verified traces of the SFT policy itself, which needs no specialist.

The routed oracle answers each domain with its specialist. Columns named "raw" ask the same tasks in the base's own raw format,
which nothing after pretraining has trained: what a method lost elsewhere. What was seen: docs/results/consolidation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.credit.teacher import Teacher
from tutelage.graph import At, Goals, Stage
from tutelage.learn.optim import AdamW
from tutelage.losses.distill import FullReverseKL, TokenReverseKL
from tutelage.recipes.quickstart import GREEDY, NAMES, SOLVED, measured, quickstart
from tutelage.stages.average import Average, TaskArithmetic
from tutelage.stages.best import Best
from tutelage.stages.budget import Budget
from tutelage.stages.fit import Fit
from tutelage.stages.online import Online
from tutelage.stages.tasks import TaskSplits
from tutelage.stages.traces import Traces
from tutelage.tasks.base import LAYOUT
from tutelage.text.template import Document

RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates tried in SFT and full-vocabulary distillation; the middle one is the quickstart's."""
SAMPLED_RATES = (2.5e-4, 5e-4, 1e-3)
LONG_RL_RATES = (5e-5, 1e-4, 2e-4)
SHORT_RL_RATES = (1e-4, 2e-4, 4e-4)
PROPORTIONS = ((1, 1, 1, 1), (1, 2, 1, 2), (2, 1, 2, 1))
"""Of the specialists in the average, in the order of the domains."""
SCALES = (0.4, 0.7, 1.0)
"""λ of task arithmetic."""
RAW = Document(format=LAYOUT, stop=("\n",))
"""How the base is asked: the quickstart's row ``base``."""
MANY = 100_000
"""Steps where a budget decides."""


def consolidation(seed: int = 0, base: str | None = None) -> Goals:
    """MOPD against trace SFT, mixed RL, cascade RL and averages of weights, at equal compute, from the quickstart's teachers.

    ``seed`` decides every training stage, never the tasks. ``base``: a Hugging Face folder to start from instead of the
    small decoder pretrained here.
    """
    made = _Made(quickstart(seed, base))
    methods = {
        "mopd": made.full("mopd"),
        "mopd, balanced": made.full("mopd-balanced", balance=True),
        "mopd, sampled token": made.sampled("mopd-sampled"),
        "mopd, sampled, balanced": made.sampled("mopd-sampled-balanced", balance=True),
        "trace sft": made.trace_sft("trace-sft", made.specialists),
        "trace sft, unverified": made.trace_sft("trace-sft-unverified", made.specialists, at_least=None),
        "sft on its own traces": made.trace_sft("own-trace-sft", dict.fromkeys(NAMES, made.sft)),
        "mixed rl, student's compute": made.mixed("mixed-rl-short", SHORT_RL_RATES, (made.student.out(),)),
        "average": made.averages(),
        "task arithmetic": made.arithmetic(),
        "mixed rl": made.mixed("mixed-rl", LONG_RL_RATES, made.everything),
        "cascade rl": made.cascade(),
    }
    return made.goals(methods)


class _Made:
    """What the quickstart has made, and how each method goes on from there."""

    def __init__(self, quickstart: Goals):
        assert quickstart.table
        self.seed, self.table = quickstart.seed, quickstart.table
        self.sft = self.table.sources["sft"]
        self.specialists = {d: self.table.sources[row] for d, row in self.table.teachers.items()}
        self.student = self._online(self.table.sources["student"].of)
        tasks = self.student.tasks.of
        assert isinstance(tasks, TaskSplits)
        self.tasks = tasks
        self.everything = (*self.specialists.values(), self.student.out())

    @staticmethod
    def _online(stage: Stage) -> Online:
        assert isinstance(stage, Online)
        return stage

    def best(self, name: str, trials: dict[str, Stage]) -> Best:
        """The trial that is best on the development split."""
        edges = {label: stage.out() for label, stage in trials.items()}
        return Best(name=f"best {name}", candidates=edges, select_on=self.tasks.out("dev"), env=SOLVED, sampling=GREEDY)

    def full(self, name: str, **changes: Any) -> Best:
        """The quickstart's distillation: full-vocabulary reverse KL."""
        return self.distilled(name, RATES, loss=FullReverseKL(), credit=(Teacher(want="hidden"),), **changes)

    def sampled(self, name: str, **changes: Any) -> Best:
        """The same by the sampled token alone."""
        return self.distilled(name, SAMPLED_RATES, loss=TokenReverseKL(), credit=(Teacher(),), **changes)

    def distilled(self, name: str, rates: Sequence[float], **changes: Any) -> Best:
        trials: dict[str, Stage] = {}
        for lr in rates:
            fields = {"name": f"{name} lr {lr:g}", "optimizer": AdamW(lr=lr), **changes}
            trials[f"lr {lr:g}"] = self.student.model_copy(update=fields)
        return self.best(name, trials)

    def trace_sft(self, name: str, policies: dict[str, At], **changes: Any) -> Best:
        """SFT on what the policies answer and the verifier accepts, for what the student may spend in all."""
        traces = Traces(
            name=f"traces of {name}",
            policies=policies,
            tasks=self.tasks.out("rl"),
            env=SOLVED,
            prompts=1000,
            sampling=self.student.sampling,
            seed=self.seed,
            **changes,
        )
        trials: dict[str, Stage] = {}
        for lr in RATES:
            trials[f"lr {lr:g}"] = Fit(
                name=f"{name} lr {lr:g}",
                model=self.sft,
                data=traces.out(),
                optimizer=AdamW(lr=lr),
                schedule=self.student.schedule,
                steps=MANY,
                budget=Budget(of=(self.student.out(),), less=(traces.out(),)),
                seed=self.seed,
            )
        return self.best(name, trials)

    def mixed(self, name: str, rates: Sequence[float], compute: tuple[At, ...]) -> Best:
        """One RL on all domains at once."""
        trials: dict[str, Stage] = {}
        for lr in rates:
            trials[f"lr {lr:g}"] = self.rl(f"{name} lr {lr:g}", self.sft, NAMES, lr, Budget(of=compute))
        return self.best(name, trials)

    def cascade(self) -> Best:
        """RL on one domain after another, each with an equal part of the compute."""
        trials: dict[str, Stage] = {}
        for lr in LONG_RL_RATES:
            start, budget = self.sft, Budget(of=self.everything, share=1 / len(NAMES))
            for name in NAMES:
                last = self.rl(f"cascade-{name} lr {lr:g}", start, (name,), lr, budget)
                start = last.out()
            trials[f"lr {lr:g}"] = last
        return self.best("cascade-rl", trials)

    def rl(self, name: str, start: At, domains: Sequence[str], lr: float, budget: Budget) -> Online:
        """RL as the specialists', from another start or on more domains."""
        like = self._online(self.specialists[domains[0]].of)
        fields = {"name": name, "model": start, "domains": tuple(domains), "optimizer": AdamW(lr=lr)}
        return like.model_copy(update={**fields, "steps": MANY, "budget": budget, "seed": self.seed})

    def averages(self) -> Best:
        trials: dict[str, Stage] = {}
        for weights in PROPORTIONS:
            label = ":".join(map(str, weights))
            models = tuple(self.specialists.values())
            trials[label] = Average(name=f"average {label}", models=models, weights=tuple(map(float, weights)))
        return self.best("average", trials)

    def arithmetic(self) -> Best:
        models = tuple(self.specialists.values())
        trials: dict[str, Stage] = {}
        for scale in SCALES:
            name = f"arithmetic scale {scale:g}"
            trials[f"scale {scale:g}"] = TaskArithmetic(name=name, base=self.sft, models=models, scale=scale)
        return self.best("task-arithmetic", trials)

    def goals(self, methods: dict[str, Best]) -> Goals:
        """The quickstart's table with a row for each method in place of the student's, and a routed oracle."""
        old = self.table
        rows = {label: dict(cells) for label, cells in old.rows.items() if label != "student"}
        sources = {label: at for label, at in old.sources.items() if label != "student"}
        rows["routed oracle"] = {d: old.rows[row][d] for d, row in old.teachers.items()}
        for label, stage in methods.items():
            rows[label] = {d: measured(label, stage, self.tasks, d) for d in NAMES}
            sources[label] = stage.out()
        rows["base"] |= {f"raw {d}": rows["base"][d] for d in NAMES}
        for label in ("sft", *old.teachers.values(), *methods):
            for d in NAMES:
                rows[label][f"raw {d}"] = measured(f"{label}, raw", sources[label].of, self.tasks, d, RAW)
        table = old.model_copy(update={"rows": rows, "after": "mopd", "sources": sources, "methods": tuple(methods)})
        return Goals(recipe="consolidation", stages=tuple(sources[m] for m in methods), table=table, seed=self.seed)
