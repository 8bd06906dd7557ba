"""RLOO: a reply against the mean of the *other* replies to its prompt (Ahmadian et al., arXiv 2402.14740).

    Â_i = r_i − 1/(n−1) Σ_{j≠i} r_j = n/(n−1) · (r_i − mean(group))

The baseline does not hold the reply it judges, so the gradient stays unbiased; with the mean over all n it is short by
(n−1)/n, which a learning rate cannot tell apart as long as groups are equal in size.

Leaves out: what to do with a group of one (nobody to compare with: it is dropped).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.credit.group import GroupBaseline, uniform

if TYPE_CHECKING:
    import numpy as np


class RLOO(GroupBaseline):
    """The reward against the group's others."""

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        if uniform(rewards):
            return 0.0 * rewards
        return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
