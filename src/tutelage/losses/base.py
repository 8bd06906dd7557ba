"""What a loss is: a pure function of the model's output and a batch, returning sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

from tutelage.spec import Spec
from tutelage.types import Batch

Metrics = dict[str, tuple[float, float]]
"""name -> (sum, count): means are taken only once everything has been added up; names ending in ``max`` keep the largest."""


class Output(Protocol):
    """What the learner computed for a batch. Log-probs and entropies are at the batch's temperature, in fp32."""

    @property
    def logp(self) -> Any:
        """[M] log-prob of each trained token, with gradient"""
        ...

    @property
    def entropy(self) -> Any:
        """[M] entropy of the distribution each trained token was drawn from, in nats, without gradient"""
        ...

    def reduce_vocab(self, fn: Callable[..., Any], index: Any, *extras: Any) -> Any:
        """``fn(student_logprobs [m, V], *extras [m, ...]) -> [m]`` over the trained tokens ``index`` (int [K]), in chunks; each
        value may read its own token alone. Returns [K] with gradient. Where fn gives [m, c], only the first column has one."""
        ...


class Loss(Spec):
    """Base of all losses. The learner divides the sum by the *global* count named by ``per``."""

    per: ClassVar[Literal["tokens", "rows", "pairs"]] = "tokens"

    def needs(self) -> frozenset[str]:
        """Names of the signals that data, credit or a scorer must give."""
        return frozenset()

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        """(sum with gradient, metrics)"""
        raise TypeError(f"{type(self).__name__} is abstract")
