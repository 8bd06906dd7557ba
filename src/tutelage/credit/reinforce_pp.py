"""REINFORCE++: advantages in units of the whole batch instead of each prompt's group (arXiv 2501.03262).

    Â ← (Â − mean) / std     over every trained token of the step                          Eq. 10

REINFORCE++ is `Reward`, `TokenKL` (credit/kl.py), then `GlobalNormalization`; REINFORCE++ w/ baseline is
``GroupRelative(scale="none", drop_uniform=False)``, then `GlobalNormalization`. A group's own std comes from the few rewards
it divides, and makes easy and hard prompts weigh more; the batch's is nearly a constant. The std is that of the population
and at least 1e-4, as in OpenRLHF.

Leaves out: clipping of rewards and running statistics over steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.credit.base import Credit, CreditContext
from tutelage.credit.group import failed, outcome, write
from tutelage.losses.base import Metrics
from tutelage.types import Sample, Signal

LEAST = 1e-4
"""Bound below on the standard deviation."""


class Reward(Credit):
    """``advantage`` [T_sel] is the reward itself: no baseline, no group. What the verifier failed on is dropped."""

    def needs(self) -> frozenset[str]:
        return frozenset({"reward"})

    def gives(self) -> frozenset[str]:
        return frozenset({"advantage"})

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        kept = [s for s in samples if not failed(s) and s.mask.any()]
        for sample in kept:
            write(sample, outcome(sample))
        return kept, {"verifier_errors": (float(sum(map(failed, samples))), float(len(samples)))}


class GlobalNormalization(Credit):
    """Rewrites ``advantage`` [T_sel] to mean 0 and standard deviation 1 over the tokens of all samples."""

    def needs(self) -> frozenset[str]:
        return frozenset({"advantage"})

    def gives(self) -> frozenset[str]:
        return frozenset({"advantage"})

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        import numpy as np

        if not samples:
            return [], {}
        values = np.concatenate([s.signals["advantage"].values for s in samples]).astype(np.float64)
        mean, std = values.mean(), values.std()
        for sample in samples:
            old = sample.signals["advantage"]
            new = (old.values - mean) / max(std, LEAST)
            sample.signals["advantage"] = Signal(new.astype(np.float32), old.index, {**old.provenance, "scale": "batch"})
        return list(samples), {"advantage_std": (float(std), 1.0)}
