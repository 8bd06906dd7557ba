"""Published methods as the fields of an `Online` stage that make them: ``Online(name="rl", ..., **methods.glm5())``.

Each function returns what its paper fixes of ``credit``, ``loss`` and ``resample``, and takes what depends on the model or
what a paper leaves open. Batch sizes, learning rates and steps are the recipe's. Those with a KL need the stage's
``reference``. Groups of equal rewards are dropped where the paper drops them (DAPO, OLMo 3); elsewhere they count in the
divisor, and in KL. A field that a recipe wants otherwise is written over it: ``{**methods.glm5(), "resample": 3}``. Formulas,
sources and where each number is from: docs/methods/.

Leaves out: PPO (ppo.py), distillation (losses/distill.py), and what a method does to its data before a step (OLMo 3 and GLM-5
filter problems by difficulty: choose.py).
"""

from __future__ import annotations

from typing import Any

from tutelage.credit.group import GroupRelative
from tutelage.credit.kl import Reference, ReplyKL, TokenKL
from tutelage.credit.maxrl import MaxRL
from tutelage.credit.overlong import SoftOverlong
from tutelage.credit.reinforce_pp import GlobalNormalization, Reward
from tutelage.credit.rloo import RLOO
from tutelage.losses.cispo import CISPO
from tutelage.losses.correction import IcePop, SequenceMask, TruncatedIS
from tutelage.losses.dr_grpo import DrGRPO
from tutelage.losses.gspo import GSPO, GSPOToken
from tutelage.losses.kimi import Kimi
from tutelage.losses.kl import K2, K3, UnbiasedKL
from tutelage.losses.policy import DAPO, GRPO
from tutelage.losses.reinforce import REINFORCE

Fields = dict[str, Any]

AGAIN = 9
"""Further draws a step: ten in all, the bound in DAPO's released configuration."""


def reinforce() -> Fields:
    """Williams (1992): the reward itself, no baseline."""
    return {"credit": (Reward(),), "loss": REINFORCE()}


def reinforce_pp(beta: float = 0.01) -> Fields:
    """REINFORCE++ (arXiv 2501.03262): k1 by token in the reward, advantages normalised over the batch, PPO's clip.
    ``beta``: OpenRLHF's default."""
    return {"credit": (Reference(), Reward(), TokenKL(beta=beta), GlobalNormalization()), "loss": GRPO()}


def reinforce_pp_baseline(beta: float = 0.01) -> Fields:
    """REINFORCE++ w/ baseline (arXiv 2501.03262): the group's mean as baseline, k2 in the loss."""
    credit = (GroupRelative(scale="none", drop_uniform=False), GlobalNormalization(), Reference())
    return {"credit": credit, "loss": GRPO(kl=K2(beta=beta))}


def rloo(beta: float = 0.05) -> Fields:
    """RLOO (arXiv 2402.14740): REINFORCE with the mean of the others as baseline, KL of the reply in the reward.
    ``beta``: TRL's default."""
    return {"credit": (Reference(), ReplyKL(beta=beta), RLOO(drop_uniform=False)), "loss": REINFORCE()}


def grpo(beta: float = 0.04) -> Fields:
    """GRPO as in DeepSeekMath (arXiv 2402.03300): standardised in the group, k3 in the loss."""
    return {"credit": (GroupRelative(drop_uniform=False), Reference()), "loss": GRPO(kl=K3(beta=beta))}


def dr_grpo(length: int) -> Fields:
    """Dr. GRPO (arXiv 2503.20783): no std, no 1/|y|, no KL. ``length``: most tokens of a reply."""
    return {"credit": (GroupRelative(scale="none", drop_uniform=False),), "loss": DrGRPO(length=length)}


def dapo(length: int, cache: int, resample: int = AGAIN) -> Fields:
    """DAPO (arXiv 2503.14476): all four of its changes. ``length``: most tokens of a reply, over the last ``cache`` of which
    the reward falls."""
    credit = (SoftOverlong(length=length, cache=cache), GroupRelative())
    return {"credit": credit, "loss": DAPO(), "resample": resample}


def gspo() -> Fields:
    """GSPO (arXiv 2507.18071): one ratio a reply."""
    return {"credit": (GroupRelative(drop_uniform=False),), "loss": GSPO()}


def gspo_token() -> Fields:
    """GSPO-token (arXiv 2507.18071): one ratio a reply, for advantages that differ by token."""
    return {"credit": (GroupRelative(drop_uniform=False),), "loss": GSPOToken()}


def cispo() -> Fields:
    """CISPO (MiniMax-M1, arXiv 2506.13585): the clipped weight keeps its gradient."""
    return {"credit": (GroupRelative(drop_uniform=False),), "loss": CISPO()}


def maxrl() -> Fields:
    """MaxRL (arXiv 2602.02710), Algorithm 1, for right-or-wrong rewards."""
    return {"credit": (MaxRL(drop_uniform=False),), "loss": REINFORCE()}


def kimi_k25(tau: float = 0.0) -> Fields:
    """Kimi K2.5 (arXiv 2602.02276, Eq. 1). ``tau`` and the band are not published."""
    return {"credit": (GroupRelative(scale="none", drop_uniform=False),), "loss": Kimi(tau=tau)}


def deepseek_v32(beta: float = 0.001, kept_mask: bool = False) -> Fields:
    """DeepSeek-V3.2 (arXiv 2512.02556): no std, unbiased KL, off-policy sequence mask; with top-p sampling the kept mask too.
    ``beta`` and δ are not published; ``beta`` is R1's."""
    loss = GRPO(kl=UnbiasedKL(beta=beta), correction=SequenceMask(), kept_mask=kept_mask)
    return {"credit": (GroupRelative(scale="none", drop_uniform=False), Reference()), "loss": loss}


def olmo3(resample: int = AGAIN) -> Fields:
    """OLMo 3 (arXiv 2512.13961): token-level loss, clip 0.2/0.272, no std, no KL, truncated IS at 2, active sampling."""
    loss = DAPO(clip_high=0.272, correction=TruncatedIS(high=2.0))
    return {"credit": (GroupRelative(scale="none"),), "loss": loss, "resample": resample}


def glm5() -> Fields:
    """GLM-5 (arXiv 2602.15763), reasoning RL: GRPO without KL, clip 0.2/0.28, IcePop with β = 2, so [1/2, 2]."""
    loss = GRPO(clip_high=0.28, correction=IcePop(low=0.5, high=2.0))
    return {"credit": (GroupRelative(drop_uniform=False),), "loss": loss}
