"""One prompt, one reply, one verifier."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.envs.base import Ask, Env
from tutelage.types import Score, Task
from tutelage.verify.base import Verifier, verify


class SingleTurn(Env):
    """Asks once and has the reply verified."""

    verifier: Verifier
    timeout_s: float = Field(300.0, gt=0)
    """After which a verifier that has not answered is an error of that sample."""

    async def __call__(self, task: Task, ask: Ask, ctx: Any = None) -> Score:
        return await verify(self.verifier, task, await ask(task.messages), ctx, self.timeout_s)
