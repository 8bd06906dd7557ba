"""What a credit rule is: it writes per-token signals onto samples, and may ask other models for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from tutelage.losses.base import Metrics
from tutelage.spec import Spec
from tutelage.types import Message, Sample, Signal


class Scorer(Protocol):
    """A model that is only asked, never trained here."""

    name: str

    def score(self, samples: Sequence[Sample], temperature: float, want: Literal["logp", "hidden"]) -> list[Signal]:
        """One signal a sample at its trained positions: ``logp`` [T_sel] of the sampled tokens under ``temperature``,
        or ``hidden`` [T_sel, D], the final hidden states before the output head."""
        ...

    def topk(self, samples: Sequence[Sample], temperature: float, k: int) -> list[tuple[Signal, Signal]]:
        """Of each sample at its trained positions the k likeliest tokens int [T_sel, k], and their log-probs with that of
        the mass outside last [T_sel, k + 1]."""
        ...

    @property
    def head(self) -> Any:
        """The output head: ``head(hidden [m, D]) -> logits [m, V]`` in fp32, cut to the true vocabulary, with ``width`` D."""
        ...


@dataclass
class CreditContext:
    """What a credit rule may ask."""

    temperature: float
    """of the sampling: whoever is compared is scored under the same."""
    teachers: dict[str, Scorer] = field(default_factory=dict)
    """domain -> its teacher"""
    reference: Scorer | None = None
    """the policy that KL is measured to"""
    policy: Scorer | None = None
    """the policy itself, as it is before the step's first update"""
    template: Callable[[Sequence[Message]], list[int]] | None = None
    """messages -> the tokens of a prompt, as they were written for the policy"""
    seed: int = 0
    """of what a rule draws by chance"""

    def itself(self) -> Scorer:
        if self.policy is None:
            raise ValueError("a credit rule asks the policy itself, but nothing here is trained")
        return self.policy

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        if self.template is None:
            raise ValueError("a credit rule writes prompts, but there is no template here")
        return self.template(messages)


class Credit(Spec):
    """Base of all credit rules."""

    shapes: ClassVar[bool] = False
    """Whether it adds to what a later rule judges replies by, and so must stand before one."""

    def needs(self) -> frozenset[str]:
        """``reward`` and signals that must be there before."""
        return frozenset()

    def gives(self) -> frozenset[str]:
        """Names of the signals it writes."""
        return frozenset()

    def asks(self) -> frozenset[str]:
        """Whom it asks of ``teachers`` and ``policy``, the policy itself."""
        return frozenset({"teachers"} if any(name.startswith("teacher") for name in self.gives()) else ())

    def check(self, domains: Sequence[str], columns: Sequence[str], group: int) -> None:
        """Raises `SpecError` where the fields do not fit the stage: its domains, its tasks' columns, its samples a prompt."""

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        """Writes signals in place and returns the samples worth training on, with metrics."""
        raise TypeError(f"{type(self).__name__} is abstract")
