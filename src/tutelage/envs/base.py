"""What an environment is: a coroutine that asks the policy and ends with a score. One turn, or many, is plain Python."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tutelage.spec import Spec
from tutelage.types import Message, Score, Task

Ask = Callable[[Sequence[Message]], Awaitable[str]]
"""Messages so far -> the policy's reply, whose tokens become a sample."""


class Env(Spec):
    """Base of all environments."""

    async def __call__(self, task: Task, ask: Ask, ctx: Any = None) -> Score:
        raise TypeError(f"{type(self).__name__} is abstract")
