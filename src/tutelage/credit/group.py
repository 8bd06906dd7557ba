"""Group-relative advantages: a reply is judged against the other replies to its prompt.

    Â = (r − mean(group)) / (std(group) + 1e-4)          GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2)
    Â =  r − mean(group)                                 Dr. GRPO (arXiv 2503.20783), ``scale="none"``

Groups whose rewards are all equal teach nothing and are dropped: the filter of DAPO's dynamic sampling (arXiv
2503.14476, Eq. 11), on the verifier's reward, whatever shaping has added to it. A sample whose verifier failed leaves the
baseline and the training set. The standard deviation is the unbiased one (n − 1), as in TRL and veRL; the paper does not say.

Leaves out: sampling again to refill a batch after the filter (``resample`` of the stage), other baselines (rloo.py,
maxrl.py), batch-wide scaling (reinforce_pp.py), overlong shaping (overlong.py) and KL in the reward (kl.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from tutelage.credit.base import Credit, CreditContext
from tutelage.losses.base import Metrics
from tutelage.types import Sample, Signal

if TYPE_CHECKING:
    import numpy as np

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""


class GroupBaseline(Credit):
    """Base of rules that judge a reply within its group: ``advantage`` [T_sel], one value a sample, from `outcome`."""

    drop_uniform: bool = True
    """drop groups that teach nothing; set False where another term, such as a teacher, can still learn from them"""

    def needs(self) -> frozenset[str]:
        return frozenset({"reward"})

    def gives(self) -> frozenset[str]:
        return frozenset({"advantage"})

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """[n] from one group's outcomes [n], exactly zero where they teach nothing."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def informative(self, rewards: np.ndarray) -> bool:
        """Whether a group with these rewards [n] of its verifier is worth training on."""
        return not uniform(rewards)

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        import numpy as np

        sound = [s for s in samples if not failed(s)]
        kept: list[Sample] = []
        found = 0
        for group in groups(sound):
            advantages = self.advantages(np.array([outcome(s) for s in group]))
            informative = bool(advantages.any()) and self.informative(np.array([s.scalars["reward"] for s in group]))
            found += informative
            if self.drop_uniform and not informative:
                continue
            for sample, advantage in zip(group, advantages, strict=True):
                write(sample, advantage)
            kept += [s for s in group if s.mask.any()]
        return kept, {
            "reward": (float(sum(s.scalars["reward"] for s in sound)), float(len(sound))),
            "verifier_errors": (float(len(samples) - len(sound)), float(len(samples))),
            "informative_groups": (float(found), float(len({s.group for s in samples}))),
        }


class GroupRelative(GroupBaseline):
    """The reward against the group's mean, in standard deviations or not."""

    scale: Literal["group", "none"] = "group"
    """divide by the group's standard deviation (GRPO) or not (Dr. GRPO)"""

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        return relative(rewards, self.scale)


def failed(sample: Sample) -> bool:
    """Whether the verifier itself failed on this sample."""
    return sample.score is not None and sample.score.error is not None


def outcome(sample: Sample) -> float:
    """What a reply is judged by: the verifier's reward, and what shaping rules before this one have added to it."""
    return sample.scalars["reward"] + sample.scalars.get("shaping", 0.0)


def shape(sample: Sample, amount: float) -> None:
    """Adds to what a reply is judged by; the reward that is logged stays the verifier's."""
    sample.scalars["shaping"] = sample.scalars.get("shaping", 0.0) + amount


def groups(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples by ``sample.group``, in order of first appearance."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.group, []).append(sample)
    return list(found.values())


def informative_groups(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The groups whose verified rewards differ: what DAPO's dynamic sampling fills a batch with."""
    import numpy as np

    return [
        group
        for group in groups(samples)
        if not uniform(np.array([s.scalars["reward"] for s in group if not failed(s)] or [0.0]))
    ]


def uniform(rewards: np.ndarray) -> bool:
    """Whether rewards [n] are all equal."""
    import numpy as np

    return bool(np.ptp(rewards) == 0)  # not std == 0: the std of three times 0.1 is 1e-17


def relative(rewards: np.ndarray, scale: Literal["group", "none"]) -> np.ndarray:
    """Advantages [n] of one group's rewards [n]; exactly zero where all are equal, a group of one included."""
    import numpy as np

    if uniform(rewards):
        return np.zeros(len(rewards))
    centred = rewards - rewards.mean()
    return centred if scale == "none" else centred / (rewards.std(ddof=1) + EPSILON)


def write(sample: Sample, advantage: float) -> None:
    """Puts one number on every trained position."""
    import numpy as np

    values = np.full(len(sample.trained), advantage, np.float32)
    sample.signals["advantage"] = Signal(values, sample.trained, {"kind": "group_relative"})
