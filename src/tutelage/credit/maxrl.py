"""MaxRL: the gradient of log p(right) instead of p(right), from right-or-wrong rewards (Tajwar et al., arXiv 2602.02710).

    Â = (r − r̄) / r̄,  0 where r̄ = 0        Algorithm 1, ``centred=True``
    Â =  r / r̄,       0 where r̄ = 0        the mean of the score over the successes, ``centred=False``

log p = − Σ_k (1−p)^k / k. With n replies a prompt, the second form is an unbiased gradient of that series cut after n terms
(RL is its first term). The first subtracts the mean score of all n to calm it; since it does so only where r̄ > 0, it is an
unbiased gradient of n − 1 terms. A prompt weighs by one over its success rate, down to about 1/n: the hard ones count.

Leaves out: graded rewards, for which there is no likelihood of success. Use it with a loss that sums a reply's tokens
(`REINFORCE`), or one that does not divide by the length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.credit.group import GroupBaseline
from tutelage.spec import UserError

if TYPE_CHECKING:
    import numpy as np


class MaxRL(GroupBaseline):
    """The reward against the group's mean, in units of that mean. Raises `UserError` for rewards other than 0 and 1."""

    centred: bool = True
    """subtract the mean (Algorithm 1), or average over the successes alone"""

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        graded = rewards[(rewards != 0) & (rewards != 1)]
        if len(graded):
            raise UserError(
                f"MaxRL takes rewards of 0 or 1, but a reply got {graded[0]:.4g}; use a verifier that says right or wrong "
                "and no shaping, or credit.group.GroupRelative"
            )
        mean = rewards.mean()
        if mean == 0:
            return 0.0 * rewards
        return rewards / mean - float(self.centred)

    def informative(self, rewards: np.ndarray) -> bool:
        """Without centring, a group of successes alone is part of the estimate."""
        return not self.centred or super().informative(rewards)
