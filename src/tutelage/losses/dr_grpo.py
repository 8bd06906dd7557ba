"""Dr. GRPO: GRPO without its two biases (arXiv 2503.20783, section 3.2).

    L = - 1/(R·L_max) Σ_rows Σ_t min(r_t Â_t, clip(r_t) Â_t)

The paper takes 1/|y| out of the sum and std out of the advantage. 1/|y| makes long wrong replies cheap; what stands for it is
the budget of tokens, a constant. The other half is ``GroupRelative(scale="none")`` (credit/group.py).

Leaves out: DAPO's answer to the same bias (one mean over all tokens), which weighs a batch of long replies less.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.losses.policy import GRPO
from tutelage.types import Batch


class DrGRPO(GRPO):
    """GRPO with every reply divided by the same length."""

    length: int = Field(ge=1)
    """L_max: the sampling's ``max_new_tokens``, in the paper's code and in TRL"""

    def sum(self, values: Any, batch: Batch) -> Any:
        return values.sum() / self.length
