"""Staged teachers: a domain's teachers one after another, such as a specialist's checkpoints in the order it reached them.

A student far from a converged teacher gets a signal of high variance on samples that the teacher would hardly draw. Staged, it
learns from a checkpoint nearby first and meets the last teacher from closer. When the next stage begins is said by a `Switch`:

    `AtSteps`   at given steps of the student
    `AtKL`      once the mean ``kl`` of ``window`` steps is below ``below``, or a stage has lasted ``longest`` steps

All domains change together; one with fewer stages stays with its last teacher, which is that of the stage's ``teachers``. No
published study of an ordered schedule for language models was found; nearest are co-distillation while the experts still train
(arXiv 2604.27083), traces pooled over several RL checkpoints (MAI-Thinking-1), and best intermediate checkpoints as teachers
(Nemotron-Cascade 2).

Leaves out: a switch for each domain by itself, and teachers that are trained meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from tutelage.graph import At
from tutelage.spec import Spec, SpecError, UserError, suggest

State = dict[str, Any]
"""What a switch must not forget, kept in the stage's checkpoints: ``stage``, ``since`` (a step) and what it watches."""


class Switch(Spec):
    """Base of all switches."""

    def check(self, stages: int, steps: int) -> None:
        """Raises `SpecError` where it cannot lead through so many stages in so many steps."""

    def after(self, state: State, step: int, metrics: Mapping[str, float]) -> State:
        """The state once ``step`` steps are done, given the last one's metrics."""
        raise TypeError(f"{type(self).__name__} is abstract")


class AtSteps(Switch):
    """The next stage begins after so many steps."""

    steps: tuple[int, ...] = Field(min_length=1)

    @field_validator("steps")
    @classmethod
    def _rise(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if steps[0] < 1 or list(steps) != sorted(set(steps)):
            raise ValueError(f"steps must rise from 1 on; got {', '.join(map(str, steps))}")
        return steps

    def check(self, stages: int, steps: int) -> None:
        if len(self.steps) != stages - 1:
            raise SpecError(f"staged.switch.steps has {len(self.steps)} steps for {stages} stages; give {stages - 1}")
        if self.steps[-1] >= steps:
            raise SpecError(
                f"staged.switch.steps names step {self.steps[-1]}, but the student has {steps}; the last never teaches"
            )

    def after(self, state: State, step: int, metrics: Mapping[str, float]) -> State:
        stage = sum(step >= s for s in self.steps)
        return {**state, "stage": stage, "since": step if stage != state["stage"] else state["since"]}


class AtKL(Switch):
    """The next stage begins when the student has come close to the teachers of this one."""

    below: float = Field(gt=0)
    """nats a token, of the loss's own ``kl``"""
    window: int = Field(5, ge=1)
    """steps that the mean is of"""
    longest: int = Field(0, ge=0)
    """steps after which a stage ends in any case; 0 waits for the KL"""

    def after(self, state: State, step: int, metrics: Mapping[str, float]) -> State:
        if "kl" not in metrics and step == 1:
            raise UserError("staged.switch watches kl, but the loss does not report it; use a distillation loss, or AtSteps")
        seen = [*state.get("kl", ()), *([metrics["kl"]] if "kl" in metrics else [])][-self.window :]
        close = len(seen) == self.window and sum(seen) / self.window < self.below
        if close or (self.longest and step - state["since"] >= self.longest):
            return {"stage": state["stage"] + 1, "since": step, "kl": []}
        return {**state, "kl": seen}


class Staged(Spec):
    """The teachers before the last, and when the next one's turn comes."""

    teachers: dict[str, tuple[At, ...]] = Field(min_length=1)
    """domain -> who teaches it before its teacher of the stage's ``teachers``, in order"""
    switch: Switch

    def check(self, last: Mapping[str, At], steps: int, same_ids: Callable[[str, At], Any]) -> None:
        """Raises `SpecError`; ``same_ids(who, at)`` is asked of every teacher."""
        for domain, models in self.teachers.items():
            if domain not in last:
                raise SpecError(f"staged.teachers names domain {domain!r}, which teachers lacks{suggest(domain, last)}")
            for i, at in enumerate(models):
                same_ids(f"teacher {i + 1} of {domain!r}", at)
        self.switch.check(1 + max(map(len, self.teachers.values())), steps)

    def begin(self) -> State:
        return {"stage": 0, "since": 0}

    def now(self, state: State, sequence: Sequence[Any]) -> Any:
        """Of a domain's teachers in order, the one whose turn it is."""
        return sequence[min(state["stage"], len(sequence) - 1)]
