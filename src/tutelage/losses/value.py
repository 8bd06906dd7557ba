"""The clipped value loss of PPO: what a value model predicts at each trained token against the return it got there.

    L = ½ Σ_t max((V_t − R_t)², (clip(V_t, V_old,t − ε, V_old,t + ε) − R_t)²)      divided by the global number of tokens

V_old is what the model said before the step's first update. Beyond ε of it a value that moves towards its return is pushed no
further; the maximum lets one that moves away come back. PPO's paper (arXiv 1707.06347) has the squared error alone; the clip
is of its authors' released code, and with ε = 0.2 of Ziegler et al. (arXiv 1909.08593).

Leaves out: a weight beside the policy's loss, since the value model is a model of its own with an optimizer of its own.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.losses.base import Loss, Metrics
from tutelage.types import Batch


class ClippedValue(Loss):
    """Half the squared error, clipped, per token. Reads ``out.values`` [M] and signals ``value`` and ``return``, each [M]."""

    clip: float = Field(0.2, ge=0)
    """ε, in units of the reward; 0 does not clip"""

    def needs(self) -> frozenset[str]:
        return frozenset({"value", "return"})

    def __call__(self, out: Any, batch: Batch) -> tuple[Any, Metrics]:
        values, old, target = out.values, batch.signals["value"], batch.signals["return"]
        error = (values - target).square()
        if self.clip:
            held = values.clamp(old - self.clip, old + self.clip)
            free, error = error, error.maximum((held - target).square())
            clipped = float((error > free).sum())
        else:
            clipped = 0.0
        return error.sum() / 2, {"clip_fraction": (clipped, float(len(values)))}
