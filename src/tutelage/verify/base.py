"""What a verifier is: it says how good a reply to a task is."""

from __future__ import annotations

import asyncio
from typing import Any

from tutelage.spec import Spec
from tutelage.types import Score, Task


class Verifier(Spec):
    """Base of all verifiers. A verifier never raises for a bad reply; a failure of its own is ``Score.error``."""

    async def __call__(self, task: Task, reply: str, ctx: Any = None) -> Score:
        """``ctx`` reaches engines, for judges and reward models; None where there are none."""
        raise TypeError(f"{type(self).__name__} is abstract")


async def verify(verifier: Verifier, task: Task, reply: str, ctx: Any = None, timeout_s: float | None = None) -> Score:
    """The only way samples are scored: whatever a verifier raises, or not answering in time, is an error of that sample
    alone. A verifier that blocks its thread cannot be cut short here; one that may must limit itself (`MathVerify`)."""
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await verifier(task, reply, ctx)
    except Exception as error:  # a user's verifier may raise anything
        if limit.expired():
            return Score(0.0, error=f"late: {verifier.kind()} gave no answer within {timeout_s} s")
        return Score(0.0, error=f"{type(error).__name__}: {error}")
