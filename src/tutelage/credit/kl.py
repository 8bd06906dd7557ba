"""KL to a reference in the reward: the reference's log-probs, and two places where the penalty can stand.

    ReplyKL   r ← r − β Σ_t k_t            one number a reply, before the baseline: RLOO (arXiv 2402.14740)
    TokenKL   Â_t ← Â_t − β Σ_{i≥t} k_i    each token pays for what follows it, after the baseline: PPO in InstructGPT
                                           (arXiv 2203.02155), REINFORCE++ (arXiv 2501.03262, Eq. 8-9)

with k_t = k1 = log μ(y_t) − log π_ref(y_t) of the policy that sampled. Its sum over a reply is an unbiased estimate of the KL
of whole replies, and as part of a reward so is its gradient (arXiv 2510.01555); both places have the same expected gradient,
the second less variance. `Reference` writes ``ref_logp`` as credit/teacher.py writes a teacher's: one annotation step for both,
and for KL in the loss (losses/kl.py).

Leaves out: k2 and k3 in the reward (biased there), adaptive β, a reference that moves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from tutelage.credit.base import Credit, CreditContext
from tutelage.credit.group import shape
from tutelage.credit.teacher import check
from tutelage.losses.base import Metrics
from tutelage.spec import SpecError
from tutelage.types import Sample, Signal

if TYPE_CHECKING:
    import numpy as np


class Reference(Credit):
    """Writes ``ref_logp`` [T_sel] under the stage's ``reference``, at the temperature of the sampling."""

    def gives(self) -> frozenset[str]:
        return frozenset({"ref_logp"})

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        if ctx.reference is None:
            raise SpecError("credit.kl.Reference asks a reference, but none is given; set reference to a stage's policy")
        kept = [s for s in samples if s.mask.any()]
        # in a thread: the event loop never runs torch
        signals = await asyncio.to_thread(ctx.reference.score, kept, ctx.temperature, "logp") if kept else []
        for sample, signal in zip(kept, signals, strict=True):
            check(sample, signal, ctx.reference)
            sample.signals["ref_logp"] = signal
        return kept, {}


class ReplyKL(Credit):
    """Takes β·KL of the whole reply off what later rules judge by; the reward that is logged stays the verifier's."""

    shapes: ClassVar[bool] = True
    beta: float = Field(gt=0)
    """β: reward a nat of log-ratio"""

    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logp", "behaviour_logp"})

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        for sample in samples:
            self._charge(sample, log_ratio(sample))
        ratios = [log_ratio(s) for s in samples]
        return list(samples), {"kl_ref": (float(sum(r.sum() for r in ratios)), float(sum(map(len, ratios))))}

    def _charge(self, sample: Sample, kl: np.ndarray) -> None:
        shape(sample, -self.beta * float(kl.sum()))


class TokenKL(ReplyKL):
    """Takes β·KL of the rest of the reply off each token's ``advantage``."""

    shapes: ClassVar[bool] = False

    def needs(self) -> frozenset[str]:
        return super().needs() | {"advantage"}

    def _charge(self, sample: Sample, kl: np.ndarray) -> None:
        import numpy as np

        old = sample.signals["advantage"]
        rest = np.cumsum(kl[::-1])[::-1]
        values = (old.values - self.beta * rest).astype(np.float32)
        sample.signals["advantage"] = Signal(values, old.index, {**old.provenance, "kl": self.beta})


def log_ratio(sample: Sample) -> np.ndarray:
    """log μ − log π_ref [T_sel], float64."""
    import numpy as np

    signals = sample.signals
    return signals["behaviour_logp"].values.astype(np.float64) - signals["ref_logp"].values
