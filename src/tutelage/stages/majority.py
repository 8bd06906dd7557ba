"""Majority: the control that needs no model. One answer, the commonest of a training split, is given to every task.

A task set whose majority answer scores well measures guessing. Leaves out: the majority of a model's own samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from tutelage.graph import At, Kind, ScoresType, Stage, Type
from tutelage.spec import UserError
from tutelage.stages.evaluate import need_domain
from tutelage.stages.tasks import best_constant
from tutelage.types import Task
from tutelage.verify.base import Verifier, verify


class Majority(Stage):
    """Scores the best constant answer of ``train`` on ``heldout``, in one domain."""

    outputs: ClassVar[dict[str, Kind]] = {"scores": "scores"}
    verb: ClassVar[str] = "scores"

    train: At
    heldout: At
    domain: str
    verifier: Verifier

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        for edge in (self.train, self.heldout):
            need_domain(types, edge, self.domain)
        return {"scores": ScoresType(self.domain)}

    def run(self, ctx: Any) -> None:
        import asyncio

        from tutelage.text.scores import write_scores

        train, test = (self._tasks(ctx, edge) for edge in (self.train, self.heldout))
        answer, _ = best_constant(train, test)

        async def judge() -> list[dict[str, Any]]:
            rows = []
            for task in test:
                score = await verify(self.verifier, task, answer)
                facts = {"task": task.id, "value": score.value, "error": score.error, "reply": answer}
                rows.append({**facts, "tokens": 0, "level": task.meta.get("level", 0)})
            return rows

        ctx.facts["answer"] = answer
        write_scores(ctx.output("scores"), self.domain, asyncio.run(judge()))

    def _tasks(self, ctx: Any, edge: At) -> list[Task]:
        from tutelage.text.rows import read_tasks

        found = [t for t in read_tasks(ctx.input(edge)) if t.domain == self.domain]
        if not found:
            raise UserError(f"{edge.of.name}.{edge.port} holds no task of domain {self.domain!r}")
        return found
