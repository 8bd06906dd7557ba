"""Generalised advantage estimation: each token is judged against what a value model expected (Schulman et al., 1506.02438).

    r_t = −β k_t, and at the last token the reward on top
    δ_t = r_t + γ V_{t+1} − V_t                           V = 0 after the last token
    Â_t = Σ_l (γλ)^l δ_{t+l}         R_t = Â_t + V_t

over the trained tokens of a sample, as if they stood one after another; k_t = log μ − log π_ref (credit/kl.py). λ = 1 is the
return minus the value, λ = 0 the error of one step. β in the reward is InstructGPT's (arXiv 2203.02155): the value model
learns to expect the penalty too, so a `TokenKL` beside it would count it twice.

A reply cut off at ``max_new_tokens`` is not bootstrapped: its end is an end, with the reward its verifier gave, since the limit
is part of the task. To keep such replies from teaching anything, put ``OverlongFilter`` before this rule.

Leaves out: whitening, which is `GlobalNormalization` after this rule (returns stay as they are); a λ of its own for returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from tutelage.credit.base import Credit, CreditContext
from tutelage.credit.group import failed, outcome
from tutelage.credit.kl import log_ratio
from tutelage.losses.base import Metrics
from tutelage.types import Sample, Signal

if TYPE_CHECKING:
    import numpy as np


class GAE(Credit):
    """Writes ``advantage`` and ``return`` [T_sel] from ``value`` [T_sel]. What the verifier failed on is dropped."""

    gamma: float = Field(1.0, gt=0, le=1)
    """γ a token"""
    lam: float = Field(0.95, ge=0, le=1)
    """λ: 1 trusts the rewards that came, 0 the value of the next token"""
    beta: float = Field(0.0, ge=0)
    """β: reward a nat of log-ratio to the stage's reference; 0 asks none"""

    def needs(self) -> frozenset[str]:
        return frozenset({"reward", "value"} | ({"behaviour_logp", "ref_logp"} if self.beta else set()))

    def gives(self) -> frozenset[str]:
        return frozenset({"advantage", "return"})

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        import numpy as np

        kept = [s for s in samples if not failed(s) and s.mask.any()]
        errors, spread, kl = [], [], []
        for sample in kept:
            values = sample.signals["value"].values.astype(np.float64)
            rewards = np.zeros(len(values))
            if self.beta:
                kl.append(log_ratio(sample))
                rewards -= self.beta * kl[-1]
            rewards[-1] += outcome(sample)
            advantages = gae(rewards, values, self.gamma, self.lam)
            for name, found in (("advantage", advantages), ("return", advantages + values)):
                facts = {"kind": "gae", "gamma": self.gamma, "lambda": self.lam}
                sample.signals[name] = Signal(found.astype(np.float32), sample.trained, facts)
            errors.append(advantages)
            spread.append(advantages + values)
        metrics = {"verifier_errors": (float(sum(map(failed, samples))), float(len(samples)))}
        if kept:
            metrics |= _fit(np.concatenate(errors), np.concatenate(spread))
        if kl:
            metrics["kl_ref"] = (float(sum(k.sum() for k in kl)), float(sum(map(len, kl))))
        return kept, metrics


def _fit(errors: np.ndarray, returns: np.ndarray) -> Metrics:
    """How well values foresee returns: 1 − Var(R − V) / Var(R), 0 where all returns are equal."""
    spread = float(returns.var())
    explained = 1 - float(errors.var()) / spread if spread else 0.0
    return {"explained_variance": (explained, 1.0), "return": (float(returns.sum()), float(len(returns)))}


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Advantages [n] from rewards [n] and values [n], float64; nothing comes after the last."""
    import numpy as np

    ahead = np.append(values[1:], 0.0)
    delta = (rewards + gamma * ahead - values).tolist()
    for t in range(len(delta) - 2, -1, -1):
        delta[t] += gamma * lam * delta[t + 1]
    return np.array(delta)
