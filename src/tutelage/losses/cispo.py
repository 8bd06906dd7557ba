"""CISPO: the weight is clipped, not the update (MiniMax-M1, arXiv 2506.13585, Eq. 4-5).

    L = - Σ_t sg[clip(r_t, 1 − ε_low, 1 + ε_high)] Â_t log π_θ(y_t)

Every token keeps a gradient, the rare ones that turn an argument included, which DAPO's clip would silence after the first
update. Summed over all tokens of the batch, as in DAPO. The paper clips above only and does not give ε_high; 4, a largest
weight of 5, is what TRL's documentation recommends from ScaleRL (arXiv 2510.13786).

Leaves out: the paper's optional token mask (its Eq. 6-7), which turns CISPO back into PPO's trust region.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.losses.policy import DAPO
from tutelage.losses.ratio import LIMIT
from tutelage.types import Batch


class CISPO(DAPO):
    """Policy gradient weighted by a clipped ratio without gradient."""

    clip_low: float = Field(1.0, ge=0, le=1)
    """ε_low: the weight is no smaller than 1 − ε_low; 1 leaves it free, as in the paper"""
    clip_high: float = Field(4.0, ge=0)
    """ε_high: the weight is no larger than 1 + ε_high"""

    def gain(self, log_ratio: Any, logp: Any, batch: Batch) -> tuple[Any, Any]:
        ratio = log_ratio.detach().clamp(-LIMIT, LIMIT).exp()
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return weight * batch.signals["advantage"] * logp, weight != ratio
