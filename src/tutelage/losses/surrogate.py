"""Nemotron 3 Ultra's distillation: PPO's clipped surrogate around the trainer's start (arXiv 2606.15007, Eq. 1-3).

    J = Σ_t m_t c_t min(r_t Â_t, clip(r_t, 1 − ε, 1 + ε) Â_t)
    Â_t = sg[clip(log π_T − log π_prox, ±A)],  c_t = sg[π_prox/μ],  r_t = π_θ/π_prox,  m_t = 1 where c_t is within bounds

`DAPO` with another advantage: `IcePop` is m_t c_t. Unlike in `SampledReverseKL`, Â_t is that of the step's start, so that
several updates a step cannot chase a student that moves. A = 20 and the bounds [0.2, 5] are of the released configuration
(where c_t is truncated); ε is not told there, 0.2 is PPO's.

Leaves out: outcome rewards in Â_t.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from tutelage.losses.base import Metrics, Output
from tutelage.losses.correction import Correction, IcePop
from tutelage.losses.policy import DAPO, token_means
from tutelage.types import Batch


class ClippedReverseKL(DAPO):
    """Clipped surrogate towards the teacher. Reads ``teacher_logp``, ``prox_logp`` and ``behaviour_logp``, each [M];
    ``teacher_logp`` is NaN where nobody teaches."""

    clip_high: float = Field(0.2, ge=0)
    correction: Correction | None = IcePop(low=0.2)
    advantage_clip: float = Field(20.0, gt=0)
    """A: bound on |log π_T − log π_prox|"""

    @model_validator(mode="after")
    def _around_the_start(self) -> ClippedReverseKL:
        if not (self.correction and self.correction.decoupled):
            raise ValueError("correction must be IcePop or TruncatedIS: the ratio of this loss is taken to the step's start")
        return self

    def needs(self) -> frozenset[str]:
        return (super().needs() - {"advantage"}) | {"teacher_logp"}

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        gap = batch.signals["teacher_logp"] - batch.signals["prox_logp"]
        advantage = gap.clamp(-self.advantage_clip, self.advantage_clip).nan_to_num(0.0)
        loss, metrics = super().__call__(out, replace(batch, signals={**batch.signals, "advantage": advantage}))
        return loss, {**metrics, **token_means(teacher_kl=-gap[~gap.isnan()])}
