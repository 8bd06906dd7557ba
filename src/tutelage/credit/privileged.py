"""Self-distillation with privileged context: the teacher is the policy itself, which is told more than the student.

    sample    prompt x,              reply y ~ π_θ(· | x)
    teacher   prompt x and hint h,   the same reply:  log π(y_t | x, h, y_<t)

Both are asked about the same reply tokens; no gradient flows through the teacher. What it is told is either

    HintedTeacher    of the task: its gold answer, or what its ``meta`` holds under a key       OPSD, arXiv 2601.18734
    SiblingTeacher   another reply of the group, which the verifier accepted                    SDPO, arXiv 2601.20802

and every loss to a teacher can be used (losses/distill.py and those beside it). The teacher's weights are the policy's before
the step's first update, or those of the stage's ``teachers``, such as the student's own start.

Leaves out: a moving average of the policy as the teacher and what a verifier says of a failed reply (both SDPO's); clipping the
divergence entry by entry of the vocabulary; environments of several turns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from string import Formatter
from typing import Literal

from pydantic import Field, model_validator

from tutelage.credit.base import CreditContext, Scorer
from tutelage.credit.group import failed, groups
from tutelage.credit.teacher import GIVES, Teacher, check, distinct
from tutelage.losses.base import Metrics
from tutelage.spec import SpecError, UserError, suggest
from tutelage.types import Sample, Signal, Task


class Privileged(Teacher):
    """Base of rules whose teacher sees a longer prompt: `hints` says what else it is told.

    Writes what `Teacher` writes, at the sample's own trained tokens. ``untaught`` is the share of samples whose teacher
    there was nothing to tell. Raises `UserError` where a sample's prompt is not what the template writes of its task.
    """

    who: Literal["policy", "teachers"] = "policy"
    """``policy``: the policy as it is before the step's first update; ``teachers``: that of the domain among the stage's"""
    text: str = "{prompt}\n\n{hint}"
    """The last user message of the teacher's prompt, from the student's and what there is to tell"""
    drop: bool = True
    """Whether samples without a hint are dropped. Set False where another term of the loss, an outcome reward, learns from
    them: their ``teacher_logp`` is then NaN, and the losses of the sampled token leave the teacher's term out."""

    @model_validator(mode="after")
    def _sound(self) -> Privileged:
        try:
            parts = [tuple(part[1:]) for part in Formatter().parse(self.text) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"text {self.text!r} does not parse ({error}); write a brace of its own twice") from None
        if set(parts) != {("prompt", "", None), ("hint", "", None)}:
            raise ValueError(f"text must hold {{prompt}} and {{hint}}, and nothing else in braces; got {self.text!r}")
        if not self.drop and self.want != "logp":
            raise ValueError(f"drop is False, but only losses of the sampled token have another term; want is {self.want!r}")
        return self

    def asks(self) -> frozenset[str]:
        return frozenset({self.who})

    def hints(self, samples: Sequence[Sample], ctx: CreditContext) -> list[str | None]:
        """For each sample what its teacher is told; None where there is nothing."""
        raise TypeError(f"{type(self).__name__} is abstract")

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        hinted = [(s, h) for s, h in zip(samples, self.hints(samples, ctx), strict=True) if s.mask.any()]
        taught = [(s, self.told(s, h, ctx)) for s, h in hinted if h is not None]
        asked, first = ctx, 0
        if self.who == "policy":
            everywhere: dict[str, Scorer] = {s.domain: ctx.itself() for s, _ in hinted}
            asked, first = replace(ctx, teachers=everywhere), len(distinct(ctx.teachers))
        _, metrics = await super().assign([shown for _, shown in taught], asked)
        for sample, shown in taught:
            for name in GIVES[self.want]:
                values = shown.signals[name].values + (first if name == "teacher" else 0)
                about = {**shown.signals[name].provenance, "privileged": self.kind()}
                sample.signals[name] = Signal(values, sample.trained, about)
                check(sample, sample.signals[name], asked.teachers[sample.domain])
        untaught = [s for s, h in hinted if h is None]
        metrics["untaught"] = (float(len(untaught)), float(len(hinted)))
        if self.drop:
            return [s for s, _ in taught], metrics
        _leave_out(untaught)
        return [s for s, _ in hinted], metrics

    def told(self, sample: Sample, hint: str, ctx: CreditContext) -> Sample:
        """The sample as its teacher sees it: a longer prompt, and the same reply."""
        import numpy as np

        task = _task(sample)
        *before, last = task.messages
        start = int(sample.trained[0])
        if ctx.prompt(task.messages) != sample.tokens[:start].tolist():
            raise UserError(
                f"task {task.id!r} was not asked as its messages stand, so {self.kind()} cannot put a hint into its prompt; "
                "use an environment that asks task.messages, such as SingleTurn"
            )
        prompt = ctx.prompt((*before, {**last, "content": self.text.format(prompt=last["content"], hint=hint)}))
        tokens = np.concatenate([np.array(prompt, sample.tokens.dtype), sample.tokens[start:]])
        mask = np.concatenate([np.zeros(len(prompt), bool), sample.mask[start:]])
        return Sample(tokens, mask, task=task, group=sample.group)


class HintedTeacher(Privileged):
    """The teacher is told something of the task. A task where it is null goes untaught."""

    key: str = ""
    """Of ``meta``, whose value it is told (as JSON, where it is no text); empty tells it the gold answer"""
    text: str = "{prompt}\n\nThe correct answer is: {hint}"

    def check(self, domains: Sequence[str], columns: Sequence[str], group: int) -> None:
        column = "meta" if self.key else "gold"
        if column not in columns:
            other = "set key to one of meta" if "meta" in columns and not self.key else "give tasks that have it"
            raise SpecError(f"{self.kind()} tells the teacher what {column} holds, but the tasks have no such column; {other}")

    def hints(self, samples: Sequence[Sample], ctx: CreditContext) -> list[str | None]:
        return [self._of(_task(s)) for s in samples]

    def _of(self, task: Task) -> str | None:
        if not self.key:
            return task.gold
        if self.key not in task.meta:
            raise UserError(
                f"task {task.id!r} has no {self.key!r} in its meta{suggest(self.key, task.meta)}; set key to one of all"
            )
        value = task.meta[self.key]
        return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)


class SiblingTeacher(Privileged):
    """The teacher is told another reply of the group that was accepted, drawn anew for each sample. A sample of whose siblings
    none was accepted goes untaught, be it right or wrong itself."""

    text: str = "{prompt}\n\nA correct reply to this is:\n\n{hint}\n\nNow reply yourself."
    accepted: float = Field(1.0, gt=0)
    """The least reward of an accepted reply"""

    def needs(self) -> frozenset[str]:
        return frozenset({"reward"})

    def check(self, domains: Sequence[str], columns: Sequence[str], group: int) -> None:
        if group == 1:
            raise SpecError(
                f"{self.kind()} shows the teacher another reply of the group, but group is 1; set group to 2 or more"
            )

    def hints(self, samples: Sequence[Sample], ctx: CreditContext) -> list[str | None]:
        found = {}
        for group in groups(samples):
            good = [s for s in group if not failed(s) and s.scalars["reward"] >= self.accepted]
            for place, sample in enumerate(group):
                found[id(sample)] = _draw(sample, place, [s for s in good if s is not sample], ctx.seed)
        return [found[id(s)] for s in samples]


def _draw(sample: Sample, place: int, siblings: Sequence[Sample], seed: int) -> str | None:
    """The text of one of the siblings, decided by what names the sample: the policy's version, its group and place there."""
    from random import Random

    if not siblings:
        return None
    version = int(sample.versions.max()) if sample.versions is not None else 0
    return Random(f"sibling {seed} {version} {sample.group} {place}").choice(siblings).text


def _leave_out(samples: Sequence[Sample]) -> None:
    import numpy as np

    for sample in samples:
        nobody = np.full(len(sample.trained), np.nan, np.float32)
        sample.signals["teacher_logp"] = Signal(nobody, sample.trained, {"model": None})


def _task(sample: Sample) -> Task:
    if sample.task is None:
        raise ValueError("a sample without a task has no prompt to put a hint into")
    return sample.task
