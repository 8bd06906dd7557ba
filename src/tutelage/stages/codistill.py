"""Codistill: several policies in one stage. Specialists climb, and a student learns from them while they do.

In a round every *branch*, an `Online` on domains of its own, takes one step. Then the student, an `Online` too, takes one, in
which each branch teaches its domains as it is at that moment: no copy, no folder between them. A learner with fewer steps than
the most takes them evenly spread, so that all end together:

    steps a learner has taken after round r of R  =  ⌊r · S / R⌋        S: its ``steps``, R: the largest S

Branches do not hear of the student, so each ends in the bits it ends in as a stage alone, and the student in those of a stage
that is taught by a series of every checkpoint in turn (staged.py), which this stage never has to write. The idea is that of
Co-Evolving Policy Distillation (CoPD, arXiv 2604.27083): a teacher is best learnt from while it is near. There the branches
are each other's teachers and there is no student beside them.

Ports are ``student`` and one for each branch, under its name. Metrics are ``LEARNER/METRIC``; the fact ``learners`` says what
each has cost. Of the learners' own ``name`` and ``threads`` only the first is read, in messages.

Leaves out: branches that teach each other, or learn from the student; teachers as they were some rounds ago (`Staged` on kept
checkpoints does that); value models; a budget.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from tutelage.context import Cost
from tutelage.graph import At, Kind, Stage, Type
from tutelage.spec import SpecError, suggest
from tutelage.stages.online import Loop, Online

STUDENT = "student"
"""Its port."""


class Codistill(Stage):
    """Trains ``branches`` and a ``student`` that they teach; see the module's docstring."""

    verb: ClassVar[str] = "trains specialists and their student"
    on_device: ClassVar[bool] = True
    version: ClassVar[int] = 5

    student: Online
    """Without teachers for the domains of the branches; others may have one that stays as it is."""
    branches: dict[str, Online] = Field(min_length=1)
    """name of its port -> a specialist; each domain has one"""

    @property
    def outputs(self) -> dict[str, Kind]:  # type: ignore[override]
        """``student``, and a port for each branch."""
        return dict.fromkeys((STUDENT, *self.branches), "model")

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        for name, each in self._learners().items():
            _check_learner(name, each)
        self._check_domains()
        made = {}
        for name, each in self._learners().items():
            try:
                made[name] = each.infer(types)["policy"]
            except SpecError as error:
                raise SpecError(f"{_called(name)}: {error}") from None
        return made

    def estimate(self, types: Callable[[At], Type]) -> float:
        return sum(each.estimate(types) for each in self._learners().values())

    def _learners(self) -> dict[str, Online]:
        """All by port, the student last, with what the branches begin from as their stand-ins among its teachers."""
        live = {d: each.model for each in self.branches.values() for d in each.domains if d in self.student.domains}
        taught = self.student.model_copy(update={"teachers": self.student.teachers | live})
        return {**self.branches, STUDENT: taught}

    def _check_domains(self) -> None:
        if STUDENT in self.branches:
            raise SpecError("a branch is named 'student', which is the student's port; give it another name")
        if self.student.staged:
            raise SpecError("student.staged gives its teachers an order, but branches teach as they are; leave it out")
        for domain, times in Counter(d for each in self.branches.values() for d in each.domains).items():
            if times > 1:
                raise SpecError(f"{times} branches train on domain {domain!r}; one is to teach it, so leave it to one")
            if domain in self.student.teachers:
                raise SpecError(
                    f"student.teachers names a teacher of {domain!r}, which a branch teaches; leave one of them out"
                )
        for name, each in self.branches.items():
            if not set(each.domains) & set(self.student.domains):
                known = suggest(each.domains[0], self.student.domains)
                raise SpecError(f"branch {name!r} teaches no domain of the student; name one of the student's{known}")

    def run(self, ctx: Any) -> None:
        _Rounds(self, ctx).run()


def _called(name: str) -> str:
    return "the student" if name == STUDENT else f"branch {name!r}"


def _check_learner(name: str, each: Online) -> None:
    """Raises `SpecError` for a learner that this stage cannot train."""
    if type(each) is not Online:
        raise SpecError(
            f"{_called(name)} is a {type(each).__name__}, but only the steps of Online can be taken in turn; give one"
        )
    if each.budget:
        raise SpecError(f"{_called(name)} has a budget, but learners keep pace by their steps; set steps and leave budget out")
    if not re.fullmatch(r"\w[\w-]*", name) or name.startswith("checkpoint"):
        raise SpecError(f"branch {name!r} names a folder; take letters, digits, - and _, and do not begin with checkpoint")


class _Seat:
    """What one learner sees of the stage's context: a cost, facts and metrics of its own, and its port."""

    def __init__(self, ctx: Any, port: str, stage: Online):
        self._ctx, self._port, self.stage = ctx, port, stage
        self.input, self.input_meta, self.device = ctx.input, ctx.input_meta, ctx.device
        self.cost = Cost()
        self.facts: dict[str, Any] = {}
        self.said: dict[str, Any] = {}
        """the metrics of its last step, until they are taken"""

    def output(self, port: str, step: int | None = None) -> Path:
        return self._ctx.output(self._port, step)

    def log(self, step: int, **metrics: Any) -> None:
        self.said = {"step": step, **metrics}

    def progress(self, step: int, total: int, **shown: Any) -> None:
        """Told by the stage, in rounds."""


class _Learner(Loop):
    """An `Online` that is taken on step by step."""

    ctx: _Seat

    def __init__(self, stage: Online, seat: _Seat):
        super().__init__(stage, seat)
        self.done = 0
        self.over = False
        """whether its health has ended it"""

    def reach(self, steps: int) -> None:
        """Takes steps until it has taken so many, or is over."""
        while self.done < steps and not self.over:
            self.over = not self._take(self.done)
            self.done += 1

    def hears(self, name: str, branch: _Learner) -> None:
        """From now on a branch teaches its domains, with whatever weights it has when it is asked."""
        from tutelage.learn.learner import ModelScorer

        scorer = ModelScorer(name, branch.policy.model, len(self.policy.tokenizer), adapters=None)
        self.scorers.made[Path(name)] = scorer  # whose tokens this learner pays for
        self.credit_context.teachers |= {d: scorer for d in branch.stage.domains if d in self.stage.domains}

    def publish(self) -> None:
        self._finish(self.done)

    def told(self) -> dict[str, Any]:
        """Its part of the facts."""
        return {"steps": self.done, **asdict(self.ctx.cost), **self.ctx.facts}

    def state(self) -> dict[str, Any]:
        seat = {"cost": asdict(self.ctx.cost), "facts": self.ctx.facts}
        return {"loop": self._state(), "done": self.done, "over": self.over, **seat}

    def go_on(self, state: dict[str, Any]) -> None:
        self._restore(state["loop"])
        self.done, self.over = state["done"], state["over"]
        self.ctx.cost, self.ctx.facts = Cost(**state["cost"]), state["facts"]


class _Rounds:
    """The state of one running `Codistill`."""

    def __init__(self, stage: Codistill, ctx: Any):
        self.ctx = ctx
        every = {**stage.branches, STUDENT: stage.student}
        self.learners = {name: _Learner(each, _Seat(ctx, name, each)) for name, each in every.items()}
        for name in stage.branches:
            self.learners[STUDENT].hears(name, self.learners[name])
        self.rounds = max(each.steps for each in every.values())

    def run(self) -> None:
        import torch

        ctx = self.ctx
        done, folder = ctx.resume()
        if folder:
            for name, state in torch.load(folder / "state.pt").items():
                self.learners[name].go_on(state)
        for number in range(done + 1, self.rounds + 1):
            self._round(number)
            ctx.boundary(number, self._save)
        for each in self.learners.values():
            each.publish()

    def _round(self, number: int) -> None:
        """Round ``number``, counted from 1: the branches first, so that the student hears what they have just learnt."""
        said: dict[str, Any] = {}
        for name, each in self.learners.items():
            each.reach(number * each.stage.steps // self.rounds)
            said |= {f"{name}/{metric}": x for metric, x in each.ctx.said.items()}
            each.ctx.said = {}
        self._book()
        self.ctx.log(number, **said)
        shown = {metric: said[f"{STUDENT}/{metric}"] for metric in ("reward", "kl") if f"{STUDENT}/{metric}" in said}
        self.ctx.progress(number, self.rounds, **shown)

    def _book(self) -> None:
        """The stage has cost what its learners have."""
        costs = [each.ctx.cost for each in self.learners.values()]
        tokens: Counter[str] = Counter()
        for cost in costs:
            tokens.update(cost.tokens)
        self.ctx.cost.flops, self.ctx.cost.tokens = sum(c.flops for c in costs), dict(tokens)
        self.ctx.facts["learners"] = {name: each.told() for name, each in self.learners.items()}

    def _save(self, folder: Path) -> None:
        import torch

        torch.save({name: each.state() for name, each in self.learners.items()}, folder / "state.pt")
