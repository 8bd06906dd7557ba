"""Divergences of two distributions from their log-probs [m, n], n outcomes each: reverse and forward KL, Jensen-Shannon.

    reverse_kl      Σ p_s (log p_s − log p_t)
    forward_kl      Σ p_t (log p_t − log p_s)
    jensen_shannon  β KL(p_t ‖ p_m) + (1 − β) KL(p_s ‖ p_m),  p_m = β p_t + (1 − β) p_s        GKD, arXiv 2306.13649, Eq. 1

The gradient goes to the student alone and is exactly zero where the two are equal: rounding leaves p − p·Σp in autograd's
form, and Adam makes whole steps of that. Since Σ p_s = 1, a gradient G with respect to log p_s may be any G + c·p_s; each
form is written with the one that vanishes at equality.

Leaves out: where the log-probs come from (losses/distill.py, losses/top_k.py).
"""

from __future__ import annotations

import math
from typing import Any

APART = 30.0
"""Log-ratios beyond this are taken to their limit: exp(-30) is below fp32's and near fp64's rounding of 1."""


def reverse_kl(student: Any, teacher: Any) -> Any:
    """KL(student ‖ teacher) [m], in nats, with gradient to ``student`` [m, n]."""
    return (student.exp() * (student - teacher).detach()).sum(-1)


def forward_kl(student: Any, teacher: Any) -> Any:
    """KL(teacher ‖ student) [m], in nats, with gradient to ``student`` [m, n]."""
    p, s = teacher.exp(), student.detach()
    return _with_gradient((p * (teacher - s)).sum(-1), student, s.exp() - p)


def jensen_shannon(student: Any, teacher: Any, beta: float) -> Any:
    """Generalised Jensen-Shannon divergence [m], in nats, of 0 < ``beta`` < 1, with gradient to ``student`` [m, n]."""
    s = student.detach()
    step = log_mixture(teacher - s, beta)  # log p_m − log p_s
    below, p = -step * s.exp(), teacher.exp()
    value = beta * (p * (teacher - s - step)).sum(-1) + (1 - beta) * below.sum(-1)
    return _with_gradient(value, student, (1 - beta) * below)


def log_mixture(log_ratio: Any, share: float) -> Any:
    """log(share·ρ + 1 − share) of log ρ, of 0 < ``share`` < 1: exactly 0 at ρ = 1, no overflow, never below log(1 − share)."""
    near = (share * log_ratio.clamp(max=APART).expm1()).log1p()
    return near.where(log_ratio < APART, log_ratio + math.log(share))


def entropy(logprobs: Any, p: Any | None = None) -> Any:
    """−Σ p log p [m], in nats, without gradient, from log-probs [m, n] (and from p, where it is there already)."""
    import torch

    logprobs = logprobs.detach()
    return -torch.linalg.vecdot(logprobs.exp() if p is None else p, logprobs)


def with_entropy(value: Any, logprobs: Any) -> Any:
    """[m, 2]: ``value`` [m] beside the entropy of log-probs [m, n], so that one pass over them gives both."""
    import torch

    return torch.stack((value, entropy(logprobs)), 1)


def _with_gradient(value: Any, student: Any, gradient: Any) -> Any:
    """``value`` [m] without gradient, given the ``gradient`` [m, n] with respect to ``student``."""
    carrier = (student * gradient).sum(-1)
    return value + (carrier - carrier.detach())
