"""Distillation from the teacher's k likeliest tokens and the mass outside them.

    TopKReverseKL   Σ_{v∈TopK(teacher)} [p_s log(p_s/p_t) − p_s + p_t]           MOPD, arXiv 2606.30406, raw probabilities
    TailReverseKL   KL(student ‖ teacher) over k + 1 outcomes                     the rest of the vocabulary is one outcome
    TailForwardKL   KL(teacher ‖ student) over the same

A reverse KL that is merely cut off, Σ_{TopK} p_s log(p_s/p_t), falls below zero when the student moves mass out of the set;
the correction makes every term ≥ 0 with its minimum at p_s = p_t. The tail forms are true divergences, and lower bounds of
those over the whole vocabulary. All read signals ``teacher_topk`` int [M, k] and ``teacher_topk_logp`` [M, k + 1]: the
log-probs of these tokens and, last, the log of the mass outside, at the temperature of the output (``Teacher(want="topk")``).

Leaves out: the student's own top-k, and probabilities renormalised over the set (they hide what was drained).
"""

from __future__ import annotations

from typing import Any, ClassVar

from tutelage.losses.base import Loss, Metrics, Output
from tutelage.losses.divergence import forward_kl, reverse_kl, with_entropy
from tutelage.losses.policy import token_means, total
from tutelage.types import Batch


class TopKReverseKL(Loss):
    """The corrected reverse KL on the teacher's top-k."""

    measure: ClassVar[str] = "topk_kl"
    """The name of its metric."""

    def needs(self) -> frozenset[str]:
        return frozenset({"teacher_topk", "teacher_topk_logp"})

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        import torch

        ids, teacher = batch.signals["teacher_topk"].long(), batch.signals["teacher_topk_logp"]
        everywhere = torch.arange(len(ids), device=ids.device)
        kl, own = out.reduce_vocab(self._both, everywhere, ids, teacher).unbind(1)
        metrics = token_means(**{self.measure: kl}, teacher_mass=-teacher[:, -1].expm1(), entropy=own.detach())
        return total(kl, batch, self.per), metrics

    def _both(self, student: Any, ids: Any, teacher: Any) -> Any:
        return with_entropy(self.at_tokens(student, ids, teacher), student)

    def at_tokens(self, student: Any, ids: Any, teacher: Any) -> Any:
        """[m] from the student's log-probs [m, V], at ``ids`` [m, k] and the teacher's log-probs [m, k + 1]."""
        need_tokens(student, ids)
        s, t = student.gather(1, ids), teacher[:, :-1]
        p = s.exp()
        return (p * (s - t).detach() + (t.exp() - p).detach()).sum(-1)  # the gradient of −p cancels that of log p inside


class TailReverseKL(TopKReverseKL):
    """Reverse KL over the teacher's top-k and one outcome for all other tokens."""

    measure: ClassVar[str] = "kl"

    def at_tokens(self, student: Any, ids: Any, teacher: Any) -> Any:
        return reverse_kl(outcomes(student, ids), teacher)


class TailForwardKL(TopKReverseKL):
    """Forward KL over the teacher's top-k and one outcome for all other tokens: what to learn from stored logits with."""

    measure: ClassVar[str] = "forward_kl"

    def at_tokens(self, student: Any, ids: Any, teacher: Any) -> Any:
        return forward_kl(outcomes(student, ids), teacher)


def outcomes(logprobs: Any, ids: Any) -> Any:
    """Log-probs [m, k + 1] of the tokens ``ids`` int [m, k], k < V, and last of everything else, from those of all [m, V].

    Raises `ValueError` as `need_tokens`.
    """
    import torch

    need_tokens(logprobs, ids)
    rest = logprobs.scatter(1, ids, -float("inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(1, ids), rest], 1)


def need_tokens(logprobs: Any, ids: Any) -> None:
    """Raises `ValueError` where ``ids`` name tokens that log-probs [m, V] do not have: a padded vocabulary."""
    if len(ids) and int(ids.max()) >= logprobs.shape[-1]:
        raise ValueError(
            f"the student's vocabulary has {logprobs.shape[-1]} entries and the teacher's top-k names token {int(ids.max())}; "
            "cut both to the tokenizer's true vocabulary before comparing (padded rows would take part in the softmax)"
        )
