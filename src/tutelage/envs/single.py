"""One prompt, one reply, one verifier."""

from __future__ import annotations

from typing import Any

from tutelage.envs.base import Ask, Env
from tutelage.types import Score, Task
from tutelage.verify.base import Verifier, verify


class SingleTurn(Env):
    """Asks once and has the reply verified."""

    verifier: Verifier

    async def __call__(self, task: Task, ask: Ask, ctx: Any = None) -> Score:
        return await verify(self.verifier, task, await ask(task.messages), ctx)
