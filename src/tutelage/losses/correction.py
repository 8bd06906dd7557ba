"""Off-policy corrections: a weight without gradient on each trained token's term, whatever the policy loss.

Two of them *decouple* the sampler's gap from the update (Nemotron 3 Ultra, arXiv 2606.15007, Eq. 1-3): with π_prox, the
trainer's own policy before the step's first update, the loss takes r = π_θ/π_prox and is weighted by a function of
c = sg[π_prox/μ]:

    TruncatedIS   clip(c, low, high)                  "truncated importance sampling" (Yao et al., 2025), OLMo 3's cap of 2
    IcePop        c where low ≤ c ≤ high, else 0      Ring-1T (arXiv 2510.18855); ``low=0`` is the one-sided mask
    SequenceMask  0 on whole rows with Â < 0 whose mean log(μ/π_θ) exceeds δ, else 1
                                                      DeepSeek-V3.2 (arXiv 2512.02556, Eq. 9); r stays π_θ/μ

Defaults: a cap of 2 is OLMo 3's (arXiv 2512.13961); [0.5, 5] is IcePop's first publication (GLM-5 uses [1/2, 2]); δ is not
published, 0.5 is the value that TRL's documentation shows.

Leaves out: sequence-level products of ratios, keeping the sampling mask (losses/ratio.py) and expert routes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from tutelage.losses.base import Output
from tutelage.losses.ratio import LIMIT, row_mean
from tutelage.spec import Spec
from tutelage.types import Batch


class Correction(Spec):
    """Base of off-policy corrections."""

    decoupled: ClassVar[bool] = True
    """Whether the loss takes its ratio against ``prox_logp``, the trainer's own start, instead of the sampler's."""

    def weight(self, out: Output, batch: Batch) -> Any:
        """[M] without gradient."""
        raise TypeError(f"{type(self).__name__} is abstract")


class TruncatedIS(Correction):
    """Importance weight from the sampler to the trainer, held within bounds."""

    low: float = Field(0.0, ge=0)
    """the least weight"""
    high: float = Field(2.0, gt=0)
    """the cap"""

    @model_validator(mode="after")
    def _ordered(self) -> TruncatedIS:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} lies above high {self.high:g}; give low ≤ high")
        return self

    def weight(self, out: Output, batch: Batch) -> Any:
        log_ratio = batch.signals["prox_logp"] - batch.signals["behaviour_logp"]
        return self._bounded(log_ratio.clamp(-LIMIT, LIMIT).exp())

    def _bounded(self, ratio: Any) -> Any:
        return ratio.clamp(self.low, self.high)


class IcePop(TruncatedIS):
    """`TruncatedIS` that drops what lies outside the bounds instead of clamping it."""

    low: float = Field(0.5, ge=0)
    """tokens with π_prox/μ below this are dropped; 0 drops none of them (one-sided)"""
    high: float = Field(5.0, gt=0)
    """tokens with π_prox/μ above this are dropped"""

    def _bounded(self, ratio: Any) -> Any:
        return ratio.where((ratio >= self.low) & (ratio <= self.high), 0.0)


class SequenceMask(Correction):
    """Bad replies that have become unlikely teach nothing more: they are dropped whole."""

    decoupled: ClassVar[bool] = False
    delta: float = Field(0.5, gt=0)
    """δ: bound on a row's mean of log μ − log π_θ, in nats a token"""

    def weight(self, out: Output, batch: Batch) -> Any:
        gap = row_mean(batch.signals["behaviour_logp"] - out.logp.detach(), batch)
        return 1.0 - ((batch.signals["advantage"] < 0) & (gap > self.delta)).to(gap.dtype)
