"""Policy-gradient losses: what they share, the clipped ones (DAPO, and GRPO as a difference of it), and their measures.

    L = - Σ_t w_t gain(r_t, Â_t) + β Σ_t KL_t,     r_t = π_θ(y_t) / μ(y_t)
    gain = min(r_t Â_t, clip(r_t, 1 − ε_low, 1 + ε_high) Â_t)

DAPO (arXiv 2503.14476, Eq. 8 and 10-12) sums over all tokens of the global batch and clips asymmetrically; GRPO
(DeepSeekMath, arXiv 2402.03300, Eq. 3) averages over each reply first and clips symmetrically. μ is the policy that
sampled, as the sampler measured it: without a correction the clip covers staleness and the sampler-trainer gap at once.
w_t comes from losses/correction.py, KL_t from losses/kl.py; the other gains are in reinforce.py, gspo.py, cispo.py and kimi.py,
the other sum in dr_grpo.py.

Leaves out: dual clipping of negative advantages (Â < 0 is unbounded in r_t up to `LIMIT`), entropy bonuses, and where
advantages, dropped groups and overlong shaping come from (credit/).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from tutelage.losses.base import Loss, Metrics, Output
from tutelage.losses.correction import Correction
from tutelage.losses.kl import KL, k3
from tutelage.losses.ratio import LIMIT, like_to_like
from tutelage.types import Batch


def total(values: Any, batch: Batch, per: Literal["tokens", "rows", "pairs"]) -> Any:
    """Sum of ``values`` [M] over tokens, or else over rows of the mean over each row's trained tokens (1/|y|). Scalar."""
    if per == "tokens":
        return values.sum()
    lengths = batch.trow.bincount()  # [R]
    return (values / lengths[batch.trow]).sum()


def token_means(**streams: Any) -> Metrics:
    """(sum, count) of each [M] stream, with one transfer from the device."""
    import torch

    sums = torch.stack([s.detach().float().sum() for s in streams.values()]).tolist()
    return {name: (value, float(len(streams[name]))) for name, value in zip(streams, sums, strict=True)}


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


class PolicyLoss(Loss):
    """Base of policy-gradient losses: a gain for each trained token, off-policy correction, KL to a reference.

    Reads signals ``advantage`` and ``behaviour_logp``, and as the fields ask ``prox_logp`` and ``ref_logp``, each [M], or
    ``kept_logp`` [M] and ``kept`` int [M, K].
    """

    correction: Correction | None = None
    """weight for samples that are not quite the policy's own"""
    kl: KL | None = None
    """term that holds the policy near the stage's reference"""
    kept_mask: bool = False
    """take the ratio over the tokens that top-p and top-k had kept (DeepSeek-V3.2's keep sampling mask)"""

    @model_validator(mode="after")
    def _one_vocabulary(self) -> PolicyLoss:
        if self.kept_mask and self.correction and self.correction.decoupled:
            raise ValueError(
                f"kept_mask and {type(self.correction).__name__} exclude each other (the trainer's start is scored over the "
                "whole vocabulary); leave one out, or use SequenceMask"
            )
        return self

    def needs(self) -> frozenset[str]:
        more = {"prox_logp"} if self.correction and self.correction.decoupled else set()
        more |= {"ref_logp"} if self.kl else set()
        return frozenset({"advantage", "behaviour_logp"} | more | ({"kept", "kept_logp"} if self.kept_mask else set()))

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        whole = out.logp
        if self.kept_mask:
            out, batch = like_to_like(out, batch)
        advantage = batch.signals["advantage"]
        decoupled = self.correction is not None and self.correction.decoupled
        log_ratio = out.logp - batch.signals["prox_logp" if decoupled else "behaviour_logp"]
        gain, clipped = self.gain(log_ratio, out.logp, batch)
        metrics = token_means(clip_fraction=clipped, advantage=advantage)
        if self.correction:
            weight = self.correction.weight(out, batch)
            gain = weight * gain
            metrics |= token_means(correction=weight, discarded=weight == 0)
        loss = -self.sum(gain, batch)
        if self.kl:
            kl = self.kl.value(whole, batch.signals["ref_logp"], out.logp - batch.signals["behaviour_logp"])
            loss = loss + self.kl.beta * self.sum(kl, batch)
            metrics |= token_means(kl=kl)
        return loss, {**metrics, **drift(out, batch)}

    def gain(self, log_ratio: Any, logp: Any, batch: Batch) -> tuple[Any, Any]:
        """What is gained at each token [M], with gradient, and bool [M] where a bound stopped the gradient."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def sum(self, values: Any, batch: Batch) -> Any:
        """Over tokens or rows, as ``per`` says. Scalar."""
        return total(values, batch, self.per)


class DAPO(PolicyLoss):
    """Token-level clipped policy gradient. Reads what `PolicyLoss` does."""

    clip_low: float = Field(0.2, ge=0, le=1)
    """ε_low: the ratio counts no further than 1 − ε_low where the advantage is negative"""
    clip_high: float = Field(0.28, ge=0)
    """ε_high: the ratio counts no further than 1 + ε_high where the advantage is positive"""

    def gain(self, log_ratio: Any, logp: Any, batch: Batch) -> tuple[Any, Any]:
        ratio, advantage = log_ratio.clamp(-LIMIT, LIMIT).exp(), batch.signals["advantage"]
        free = ratio * advantage
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage
        return free.minimum(clipped), clipped < free


class GRPO(DAPO):
    """DAPO with one clip and each reply averaged over its own tokens."""

    per: ClassVar[Literal["tokens", "rows"]] = "rows"
    clip_high: float = Field(0.2, ge=0)
