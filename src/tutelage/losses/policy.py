"""Clipped policy-gradient losses: DAPO, and GRPO as a difference of it.

    L = - Σ_t min(r_t Â_t, clip(r_t, 1 − ε_low, 1 + ε_high) Â_t),     r_t = π_θ(y_t) / μ(y_t)

DAPO (arXiv 2503.14476, Eq. 8 and 10-12) sums over all tokens of the global batch and clips asymmetrically; GRPO
(DeepSeekMath, arXiv 2402.03300, Eq. 3) averages over each reply first and clips symmetrically. μ is the policy that
sampled, as the sampler measured it: the clip therefore covers staleness and the sampler-trainer gap at once.

Leaves out: KL to a reference (DAPO has none; GRPO's published β is left out), dual clipping of negative advantages
(Â < 0 is unbounded in r_t up to `LIMIT`), sequence-level ratios (GSPO), separate correction of the sampler gap
(TIS, IcePop), and where advantages and dropped groups come from (credit/group.py) or overlong shaping (the reward).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from tutelage.losses.base import Loss, Metrics, Output
from tutelage.types import Batch

LIMIT = 20.0
"""Log-ratios are held within ±LIMIT before `exp`: an overflow would turn a zero advantage into 0·inf = NaN."""


def total(values: Any, batch: Batch, per: Literal["tokens", "rows"]) -> Any:
    """Sum of ``values`` [M] over tokens, or over rows of the mean over each row's trained tokens (1/|y|). Scalar."""
    if per == "tokens":
        return values.sum()
    lengths = batch.trow.bincount()  # [R]
    return (values / lengths[batch.trow]).sum()


def token_means(**streams: Any) -> Metrics:
    """(sum, count) of each [M] stream, with one transfer from the device."""
    import torch

    sums = torch.stack([s.detach().float().sum() for s in streams.values()]).tolist()
    return {name: (value, float(len(streams[name]))) for name, value in zip(streams, sums, strict=True)}


def k3(log_ratio: Any) -> Any:
    """Per-token estimate of KL(μ ‖ π) from samples of μ, ``r − 1 − log r`` with ``log_ratio = log π − log μ`` [M].

    ``expm1`` keeps it ≥ 0 near 0, where ``exp(x) − 1 − x`` cancels; see Schulman, "Approximating KL divergence".
    """
    held = log_ratio.clamp(-LIMIT, LIMIT)
    return held.expm1() - held


def drift(out: Output, batch: Batch) -> Metrics:
    """How far the policy [M] is from the one that sampled, as the sampler measured it (``behaviour_logp`` [M]).

    ``sampler_gap`` is the mean |Δ log-prob| and ``sampler_gap_max`` the largest: a metric named ``..._max`` is joined by
    its maximum, not its sum. On policy both are pure disagreement between sampler and trainer.
    """
    log_ratio = out.logp.detach() - batch.signals["behaviour_logp"]
    gap = log_ratio.abs()
    metrics = token_means(
        ratio=log_ratio.clamp(-LIMIT, LIMIT).exp(), kl_behaviour=k3(log_ratio), entropy=out.entropy, sampler_gap=gap
    )
    return {**metrics, "sampler_gap_max": (gap.max().item(), 1.0)}


class DAPO(Loss):
    """Token-level clipped policy gradient. Reads signals ``advantage`` [M] and ``behaviour_logp`` [M]."""

    clip_low: float = Field(0.2, ge=0, le=1)
    """ε_low: the ratio counts no further than 1 − ε_low where the advantage is negative"""
    clip_high: float = Field(0.28, ge=0)
    """ε_high: the ratio counts no further than 1 + ε_high where the advantage is positive"""

    def needs(self) -> frozenset[str]:
        return frozenset({"advantage", "behaviour_logp"})

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        advantage = batch.signals["advantage"]
        ratio = (out.logp - batch.signals["behaviour_logp"]).clamp(-LIMIT, LIMIT).exp()
        free = ratio * advantage
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage
        metrics = token_means(clip_fraction=clipped < free, advantage=advantage)
        return -total(free.minimum(clipped), batch, self.per), {**metrics, **drift(out, batch)}


class GRPO(DAPO):
    """DAPO with one clip and each reply averaged over its own tokens."""

    per: ClassVar[Literal["tokens", "rows"]] = "rows"
    clip_high: float = Field(0.2, ge=0)
