"""Other divergences over the full vocabulary, each `FullReverseKL` with one line changed.

    FullForwardKL   Σ_v p_t (log p_t − log p_s)                    covers all the teacher does; Hinton et al., arXiv 1503.02531
    FullJSD         generalised Jensen-Shannon, 0 < β < 1          between the two; GKD, arXiv 2306.13649, Eq. 1

FullJSD / β tends to the forward KL for β → 0, and FullJSD / (1 − β) to the reverse one for β → 1. GKD's β = 0.5 is the default.

Leaves out: a temperature of distillation beside that of the sampling.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tutelage.losses.distill import FullReverseKL
from tutelage.losses.divergence import forward_kl, jensen_shannon


class FullForwardKL(FullReverseKL):
    """KL(teacher ‖ student) at every trained token."""

    measure: ClassVar[str] = "forward_kl"

    def divergence(self, student: Any, teacher: Any) -> Any:
        return forward_kl(student, teacher)


class FullJSD(FullReverseKL):
    """Generalised Jensen-Shannon divergence at every trained token."""

    measure: ClassVar[str] = "jsd"
    beta: float = Field(0.5, gt=0, lt=1)
    """β: the teacher's share in the mixture that both are compared with"""

    def divergence(self, student: Any, teacher: Any) -> Any:
        return jensen_shannon(student, teacher, self.beta)
