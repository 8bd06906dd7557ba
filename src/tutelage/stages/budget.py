"""Budget: the compute that a stage may spend, as what other stages spent. Algorithmic FLOPs, never seconds.

    allowed = share · Σ_of FLOPs − Σ_less FLOPs

A stage under a budget ends after the step in which it has spent what it may; its learning rate's schedule runs over the
steps that the budget pays for, as they are foreseen from what has been spent so far. Development trials are on no budget.

Leaves out: budgets in tokens or steps of another stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from tutelage.graph import At, Type
from tutelage.spec import Spec, UserError


class Budget(Spec):
    """What a stage is allowed to spend; see the module's docstring."""

    of: tuple[At, ...] = Field(min_length=1)
    """Stages whose FLOPs are added up."""
    share: float = Field(1.0, gt=0)
    """this stage's part of that sum, where several stages share it"""
    less: tuple[At, ...] = ()
    """Stages that have spent of it already, such as the one that sampled the data."""

    def check(self, types: Callable[[At], Type]) -> None:
        """Raises `SpecError` where an edge leads nowhere."""
        for at in (*self.of, *self.less):
            types(at)

    def estimate(self, types: Callable[[At], Type]) -> float:
        """FLOPs, as far as the stages' own estimates tell."""
        spent = sum(at.of.estimate(types) for at in self.less)
        return max(0.0, self.share * sum(at.of.estimate(types) for at in self.of) - spent)

    def allowed(self, ctx: Any) -> float:
        """FLOPs. Raises `UserError` where nothing is left."""
        whole, spent = (sum(ctx.input_meta(at)["cost"]["flops"] for at in part) for part in (self.of, self.less))
        left = self.share * whole - spent
        if left <= 0:
            raise UserError(f"the budget of {ctx.stage.name} is used up before it starts; name more stages in budget.of")
        return left


def foreseen(step: int, steps: int, spent: float, allowed: float) -> int:
    """Steps in all that the budget pays for, at what a step has cost so far; at most ``steps``."""
    return max(1, round(min(steps, step * allowed / spent))) if spent else steps
