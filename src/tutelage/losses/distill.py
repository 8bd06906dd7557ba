"""On-policy distillation: reverse KL to a teacher on the student's own samples, by sampled token or full vocabulary.

`SampledReverseKL` is MiMo-V2-Flash's (arXiv 2601.02780, Eq. 8-9) with the advantage clip of MOPD (arXiv 2606.30406):

    L = - Σ_rows 1/|y| Σ_t w_t Â_t log π_θ(y_t)
    w_t = sg[π_θ/μ_θ] if within [weight_low, weight_high], else 0          (discarded, not clamped)
    Â_t = sg[clip(log π_T − log π_θ, ±advantage_clip)] + α Â_ORM            α may move over the stage's steps

Â_t is formed inside the loss from the student's present log-probs: it cannot be stale, cannot lose the student's term,
and nothing normalises it over a batch. MiMo does not disclose its bounds on w or α; the defaults are those of
Nemotron 3 Ultra's released configuration, [0.2, 5], and α = 0. A fixed α > 0 draws the optimum to π_T exp(α Â_ORM), which has
less entropy than the teacher; one that ends at 0 does not.

`FullReverseKL` is DeepSeek V4's (arXiv 2606.19348, Eq. 29), on the student's samples:

    L = Σ_t Σ_v p_s(v) [log p_s(v) − log p_t(v)]

The teacher's log-probs are rebuilt from its last hidden states through its head, a chunk of tokens at a time.

Leaves out: other divergences (losses/full.py), top-k forms (losses/top_k.py), other rewards of the sampled token
(losses/proximal.py, losses/extrapolated.py), Nemotron's clipped surrogate (losses/surrogate.py), V4's weights w_i
(losses/weighted.py), any correction for samples that are not quite the policy's own in `FullReverseKL`, and who the teacher of
a token is (credit/teacher.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from tutelage.losses.base import Loss, Metrics, Output
from tutelage.losses.divergence import reverse_kl, with_entropy
from tutelage.losses.policy import drift, token_means, total
from tutelage.types import Batch


class SampledReverseKL(Loss):
    """Policy gradient towards the teacher. Reads signals ``teacher_logp``, ``behaviour_logp`` and, where α is not 0,
    ``advantage``, each [M]; all log-probs must be under the sampling temperature, and ``teacher_logp`` is NaN where nobody
    teaches: Â is α Â_ORM alone there. Where α moves, also
    ``batch.extras["progress"]``, the share of the stage's steps that is over: 0 at its first and 1 at its last."""

    per: ClassVar[Literal["tokens", "rows"]] = "rows"
    advantage_clip: float | None = Field(5.0, gt=0)
    """A: bound on |log π_T − log π_θ| (MOPD: 5, Nemotron 3 Ultra: 20); None leaves it free, as in MiMo's Eq. 8"""
    weight_low: float = Field(0.2, ge=0)
    """tokens with π_θ/μ_θ below this are discarded"""
    weight_high: float = Field(5.0, gt=0)
    """tokens with π_θ/μ_θ above this are discarded"""
    alpha: float = 0.0
    """α: weight of the outcome-reward advantage, added after the clip"""
    alpha_end: float | None = None
    """α at the last step, where it moves; None keeps it where it is"""
    alpha_shape: Literal["linear", "cosine"] = "linear"
    """how α goes to ``alpha_end``"""

    def needs(self) -> frozenset[str]:
        return frozenset({"teacher_logp", "behaviour_logp"} | ({"advantage"} if self.alpha or self.alpha_end else set()))

    def alpha_at(self, batch: Batch) -> float:
        if self.alpha_end is None:
            return self.alpha
        progress = batch.extras["progress"]
        gone = progress if self.alpha_shape == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
        return self.alpha + (self.alpha_end - self.alpha) * gone

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        weight, kept = self._weight(out, batch)
        gap = batch.signals["teacher_logp"] - out.logp.detach()
        taught = ~gap.isnan()
        reward = self.reward(gap, batch).where(taught, 0.0)
        advantage = reward if self.advantage_clip is None else reward.clamp(-self.advantage_clip, self.advantage_clip)
        metrics = token_means(kl=-gap[taught], clip_fraction=advantage != reward, discarded=~kept)
        alpha = self.alpha_at(batch)
        if alpha:
            advantage = advantage + alpha * batch.signals["advantage"]
        if self.alpha_end is not None:
            metrics["alpha"] = (alpha, 1.0)
        loss = -total(weight * advantage * out.logp, batch, self.per)
        return loss, {**metrics, **drift(out, batch)}

    def reward(self, gap: Any, batch: Batch) -> Any:
        """What a token earns [M], before the clip, from log π_T − log π_θ [M]. Without gradient."""
        return gap

    def _weight(self, out: Output, batch: Batch) -> tuple[Any, Any]:
        """w [M] without gradient, and bool [M] where it was kept."""
        ratio = (out.logp.detach() - batch.signals["behaviour_logp"]).exp()
        kept = (ratio >= self.weight_low) & (ratio <= self.weight_high)
        return ratio.where(kept, 0.0), kept


class TokenReverseKL(SampledReverseKL):
    """The same, every token of the batch counting alike, as `FullReverseKL` counts them: long replies weigh more."""

    per: ClassVar[Literal["tokens", "rows"]] = "tokens"


class FullReverseKL(Loss):
    """Exact reverse KL at every trained token.

    Reads signals ``teacher_hidden`` [M, Dmax] (narrower teachers are zero-padded on the right) and ``teacher`` int [M];
    ``batch.extras["teacher_heads"]``, a sequence indexed by ``teacher`` of ``head(hidden [m, head.width]) -> logits
    [m, V]`` in fp32 over the true vocabulary; and ``batch.extras["temperature"]``, that of ``out``.
    """

    measure: ClassVar[str] = "kl"
    """The name of its metric."""

    def needs(self) -> frozenset[str]:
        return frozenset({"teacher_hidden", "teacher"})

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        hidden, teacher = batch.signals["teacher_hidden"], batch.signals["teacher"]
        kl, own = self.at_tokens(out, batch, hidden, teacher)
        return total(kl, batch, self.per), token_means(**{self.measure: kl}, entropy=own)

    def at_tokens(self, out: Output, batch: Batch, hidden: Any, teacher: Any) -> tuple[Any, Any]:
        """The divergence [M] with gradient, from hidden states [M, Dmax] of teachers int [M], 0 where there is none (-1); and
        the student's entropy [M]."""
        import torch

        parts, places = [], []
        for i in teacher.unique().tolist():  # one head at a time
            mine = (teacher == i).nonzero().squeeze(1)
            if i < 0:
                parts.append(out.reduce_vocab(untaught, mine))
            else:
                head = batch.extras["teacher_heads"][i]
                fn = partial(self._rebuilt, head=head, temperature=batch.extras["temperature"])
                parts.append(out.reduce_vocab(fn, mine, hidden[mine, : head.width]))
            places.append(mine)
        both = torch.cat(parts)[torch.cat(places).argsort()]
        return both[:, 0], both[:, 1].detach()

    def divergence(self, student: Any, teacher: Any) -> Any:
        """[m] with gradient, from log-probs [m, V] each."""
        return reverse_kl(student, teacher)

    def _rebuilt(self, student: Any, hidden: Any, head: Callable[[Any], Any], temperature: float) -> Any:
        """[m, 2]: `divergence` and entropy, from the student's log-probs [m, V] and the teacher's hidden states [m, D].

        Raises `ValueError` where the vocabularies differ.
        """
        import torch

        with torch.no_grad():
            logits = head(hidden)
            if logits.shape[-1] != student.shape[-1]:
                raise ValueError(
                    f"the student's vocabulary has {student.shape[-1]} entries and the teacher's {logits.shape[-1]}; "
                    "cut both to the tokenizer's true vocabulary before comparing (padded rows would take part in the softmax)"
                )
            teacher = (logits / temperature).log_softmax(-1)
        return with_entropy(self.divergence(student, teacher), student)


def untaught(student: Any) -> Any:
    """`with_entropy` of no divergence."""
    return with_entropy(0.0 * student[:, 0], student)
