"""Kimi K2.5's loss: outside a band of log-ratios no gradient, whatever the advantage's sign (arXiv 2602.02276, Eq. 1).

    L = - Σ_t [ clip(r_t, e^α, e^β) Â_t − τ (log r_t)² ],     Â = r − mean(group)

PPO's min keeps the gradient of a token that has become rarer under a good advantage, or likelier under a bad one; here both
are silent, so that the drift between sampler and trainer is bounded on both sides. The squared log-ratio goes back to Kimi
k1.5 (arXiv 2501.12599) and acts outside the band too. α, β and τ are not published: the defaults are a factor of 2 either
way, and no τ.

Leaves out: the "toggle" of budgeted and unlimited phases (a matter of the reward).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.losses.policy import PolicyLoss
from tutelage.types import Batch


class Kimi(PolicyLoss):
    """Token-level policy gradient masked by the log-ratio alone."""

    low: float = Field(-0.7, ge=-20, le=0)
    """α: least log-ratio that still moves"""
    high: float = Field(0.7, ge=0, le=20)
    """β: largest log-ratio that still moves"""
    tau: float = Field(0.0, ge=0)
    """τ: weight of the squared log-ratio"""

    def gain(self, log_ratio: Any, logp: Any, batch: Batch) -> tuple[Any, Any]:
        held = log_ratio.clamp(self.low, self.high)
        gain = held.exp() * batch.signals["advantage"] - self.tau * log_ratio.square()
        return gain, held != log_ratio
