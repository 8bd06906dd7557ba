"""KL to a reference policy in the loss: Schulman's k1, k2 and k3, and DeepSeek-V3.2's unbiased form.

With x = log π_θ − log π_ref of the sampled token and s = log π_θ − log μ (μ: the policy that sampled):

    K1          x                        its mean is KL(π_θ ‖ π_ref); its gradient's mean is zero: it regularises nothing
    K2          x² / 2                   gradient x·∇log π_θ: on policy the mean is exactly ∇KL(π_θ ‖ π_ref)
    K3          e^−x − 1 + x             gradient (1 − e^−x)·∇log π_θ: on policy the mean is ∇KL(π_ref ‖ π_θ)
    UnbiasedKL  e^s (e^−x − 1 + x)       gradient through both factors: the mean is ∇KL(π_θ ‖ π_ref), also off policy

Sources: J. Schulman, "Approximating KL divergence" (2020) for k1, k2, k3 as estimates; GRPO (DeepSeekMath, arXiv 2402.03300,
Eq. 4) for k3 in a loss; arXiv 2510.01555 for what their gradients are; DeepSeek-V3.2 (arXiv 2512.02556, section 3.1).

Leaves out: KL in the reward (credit/kl.py), KL over the whole vocabulary (losses/distill.py), schedules of β.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.losses.ratio import LIMIT
from tutelage.spec import Spec


def k3(log_ratio: Any) -> Any:
    """Per-token estimate of KL(μ ‖ π) from samples of μ, ``r − 1 − log r`` with ``log_ratio = log π − log μ`` [M].

    ``expm1`` keeps it ≥ 0 near 0, where ``exp(x) − 1 − x`` cancels; see Schulman, "Approximating KL divergence".
    """
    held = log_ratio.clamp(-LIMIT, LIMIT)
    return held.expm1() - held


class KL(Spec):
    """Base of estimators of KL(π_θ ‖ π_ref) as a term of the loss, weighted by ``beta``."""

    beta: float = Field(gt=0)
    """β: weight of the term, beside advantages of order 1"""

    def value(self, logp: Any, ref: Any, log_ratio: Any) -> Any:
        """[M] with gradient, from log π_θ, log π_ref and log π_θ − log μ, each [M]."""
        raise TypeError(f"{type(self).__name__} is abstract")


class K1(KL):
    """The log-ratio itself. A measurement: as a loss its gradient is noise of mean zero (tests show it)."""

    def value(self, logp: Any, ref: Any, log_ratio: Any) -> Any:
        return logp - ref


class K2(KL):
    """Half the squared log-ratio. On policy its gradient is that of k1 in the reward."""

    def value(self, logp: Any, ref: Any, log_ratio: Any) -> Any:
        return (logp - ref).square() / 2


class K3(KL):
    """GRPO's: never negative, of low variance as an estimate; as a loss it pulls along the other KL's gradient."""

    beta: float = Field(0.04, gt=0)
    """β: DeepSeekMath's"""

    def value(self, logp: Any, ref: Any, log_ratio: Any) -> Any:
        return k3(ref - logp)


class UnbiasedKL(KL):
    """DeepSeek-V3.2's: `K3` weighted by π_θ/μ, whose gradient counts too."""

    def value(self, logp: Any, ref: Any, log_ratio: Any) -> Any:
        return log_ratio.clamp(-LIMIT, LIMIT).exp() * k3(ref - logp)
