"""A teacher that stays near the student: the reward of a sampled token is bounded below without a clip (TOP-D).

    r = log(κ ρ + 1 − κ),     ρ = π_T / π_θ

is log π_P − log π_θ for the mixture π_P = κ π_T + (1 − κ) π_θ, a teacher within reach whatever π_T is. A token the teacher
would never write costs log(1 − κ) at most, where log ρ has no bound; near ρ = 1 it is κ log ρ; far above it is log ρ + log κ.
κ (the form's α; here α is the outcome reward's) has no published default that we know of; 0.5 bounds r at −log 2.

Leaves out: a κ that moves, and the mixture over the full vocabulary.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.losses.distill import SampledReverseKL
from tutelage.losses.divergence import log_mixture
from tutelage.types import Batch


class ProximalReverseKL(SampledReverseKL):
    """`SampledReverseKL` towards a mixture of teacher and student."""

    share: float = Field(0.5, gt=0, lt=1)
    """κ: the teacher's share in the mixture"""

    def reward(self, gap: Any, batch: Batch) -> Any:
        return log_mixture(gap, self.share)
