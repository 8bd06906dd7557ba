"""Past the teacher: what it learned since a reference counts λ times (G-OPD and ExOPD, arXiv 2602.12125, section 3).

    r = λ (log π_T − log π_ref) − (log π_θ − log π_ref) = log π_T − log π_θ + (λ − 1) (log π_T − log π_ref)

The optimum is π ∝ π_ref (π_T/π_ref)^λ: λ = 1 is plain distillation, λ > 1 goes past the teacher in its own direction, λ < 1
stops on the way. The reference is the model that the teacher's RL began from, given as the stage's ``reference`` and asked by
`credit.kl.Reference`. λ = 1.25 is ExOPD's.

Leaves out: the same over the full vocabulary.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.losses.distill import SampledReverseKL
from tutelage.types import Batch


class ExtrapolatedReverseKL(SampledReverseKL):
    """`SampledReverseKL` towards a point past the teacher. Reads signal ``ref_logp`` [M] too."""

    scale: float = Field(1.25, gt=0)
    """λ: how far to go from the reference, the teacher being at 1"""

    def needs(self) -> frozenset[str]:
        return super().needs() | {"ref_logp"}

    def reward(self, gap: Any, batch: Batch) -> Any:
        learned = batch.signals["teacher_logp"] - batch.signals["ref_logp"]
        return gap + (self.scale - 1) * learned
