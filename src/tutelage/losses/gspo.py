"""GSPO: the ratio of whole replies (Group Sequence Policy Optimization, arXiv 2507.18071).

    s_i     = (π_θ(y_i) / μ(y_i))^(1/|y_i|) = exp( 1/|y_i| Σ_t log r_t )                    GSPO, Eq. 5-7
    s_i,t   = sg[s_i] · π_θ(y_t) / sg[π_θ(y_t)]                                            GSPO-token, Eq. 13-14

Both are clipped and averaged as in GRPO, with bounds some hundred times narrower since s is a geometric mean: ε = 3e-4 and 4e-4
(section 5.1). With one advantage a reply the two have equal values and gradients; GSPO-token exists for advantages that
differ by token.

Leaves out: the routing replay that the paper makes unnecessary.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.losses.policy import GRPO
from tutelage.losses.ratio import row_mean
from tutelage.types import Batch


class GSPO(GRPO):
    """GRPO with one length-normalised ratio a reply."""

    clip_low: float = Field(3e-4, ge=0, le=1)
    """ε_low, on the geometric mean of the token ratios"""
    clip_high: float = Field(4e-4, ge=0)
    """ε_high, on the geometric mean of the token ratios"""

    def gain(self, log_ratio: Any, logp: Any, batch: Batch) -> tuple[Any, Any]:
        return super().gain(row_mean(log_ratio, batch), logp, batch)


class GSPOToken(GSPO):
    """GSPO whose gradient goes through each token's own probability."""

    def gain(self, log_ratio: Any, logp: Any, batch: Batch) -> tuple[Any, Any]:
        return super(GSPO, self).gain(row_mean(log_ratio.detach(), batch) + logp - logp.detach(), logp, batch)
