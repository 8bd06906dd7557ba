"""Negative log-likelihood of the trained tokens: supervised fine-tuning, trace distillation, PPO-ptx's pretraining term.

    L = - Σ_t log π_θ(y_t | y_<t)      over all trained tokens, divided by their global number

So a long reply weighs more than a short one; accumulation and packing cannot change that, unlike a mean of
micro-batch means.

Leaves out: label smoothing, z-loss, and the choice of which tokens are trained (the mask of the data says so).
"""

from __future__ import annotations

from typing import Any

from tutelage.losses.base import Loss, Metrics, Output
from tutelage.types import Batch


class NLL(Loss):
    """Next-token negative log-likelihood, per token. Reads ``out.logp`` [M] only."""

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        total = -out.logp.sum()
        return total, {"nll": (total.item(), float(len(out.logp)))}
