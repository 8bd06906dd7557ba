"""REINFORCE: the score function times the advantage, nothing clipped (Williams, 1992).

    L = - 1/R Σ_rows Â Σ_t log π_θ(y_t)

The reply is one action, as in "Back to Basics" (Ahmadian et al., arXiv 2402.14740), whose RLOO is this loss with the
baseline of credit/rloo.py: its log-prob is a sum over tokens, not a mean, and its gradient is an unbiased one of the expected
reward as long as the samples are the policy's own.

Leaves out: any ratio. With several updates a step, or a sampler that differs, give it a ``correction``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from tutelage.losses.policy import PolicyLoss
from tutelage.types import Batch


class REINFORCE(PolicyLoss):
    """Plain policy gradient of whole replies."""

    per: ClassVar[Literal["tokens", "rows"]] = "rows"

    def gain(self, log_ratio: Any, logp: Any, batch: Batch) -> tuple[Any, Any]:
        return batch.signals["advantage"] * logp, logp.new_zeros(len(logp))

    def sum(self, values: Any, batch: Batch) -> Any:
        return values.sum()
