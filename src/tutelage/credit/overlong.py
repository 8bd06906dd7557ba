"""Overlong replies: DAPO's soft punishment, and the filter it is compared with (arXiv 2503.14476, section 3.4, Eq. 13).

    R(y) = 0                                   |y| ≤ L_max − L_cache
           ((L_max − L_cache) − |y|) / L_cache  up to L_max
           −1                                  above

A reply that was cut off says nothing about its reasoning. ``OverlongFilter`` takes it out of the loss ("overlong filtering");
``SoftOverlong`` lets the reward fall before the end is reached ("soft overlong punishment"). The paper uses L_max 20,480 and
L_cache 4,096.

Leaves out: length penalties among right answers (Kimi k1.5), budgets given in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from tutelage.credit.base import Credit, CreditContext
from tutelage.credit.group import shape
from tutelage.losses.base import Metrics
from tutelage.types import Sample


class SoftOverlong(Credit):
    """Adds the punishment to what later rules judge by; the reward that is logged stays the verifier's."""

    shapes: ClassVar[bool] = True
    length: int = Field(ge=1)
    """L_max: the sampling's ``max_new_tokens``, usually"""
    cache: int = Field(ge=1)
    """L_cache: tokens before L_max over which the reward falls by 1"""

    @model_validator(mode="after")
    def _fits(self) -> SoftOverlong:
        if self.cache > self.length:
            raise ValueError(f"cache {self.cache} is longer than length {self.length}; give cache ≤ length")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"reward"})

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        punished = [self.punishment(int(s.mask.sum())) for s in samples]
        for sample, amount in zip(samples, punished, strict=True):
            shape(sample, amount)
        return list(samples), {"overlong": (sum(punished), float(len(samples)))}

    def punishment(self, length: int) -> float:
        """In [−1, 0], for a reply of so many tokens."""
        return max(-1.0, min(0.0, (self.length - self.cache - length) / self.cache))


class OverlongFilter(Credit):
    """Drops samples that were cut off. After a baseline they still count in it, before it they do not."""

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        kept = [s for s in samples if s.stop != "length"]
        return kept, {"overlong": (float(len(samples) - len(kept)), float(len(samples)))}
