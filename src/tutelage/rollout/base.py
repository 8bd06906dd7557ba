"""What an engine is: it answers requests for samples, and takes new weights."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from tutelage.spec import Spec

if TYPE_CHECKING:
    import numpy as np


class Sampling(Spec):
    """How tokens are drawn."""

    temperature: float = Field(1.0, ge=0)
    """0 is greedy; log-probs are then those at temperature 1."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    max_new_tokens: int = Field(64, ge=1)
    stop: tuple[str, ...] = ()
    """Strings that end a reply; they stay in the tokens."""

    @property
    def scored_at(self) -> float:
        """The temperature that log-probs are reported under."""
        return self.temperature or 1.0


@dataclass(frozen=True)
class Request:
    """One sample to be drawn."""

    tokens: tuple[int, ...]
    """The prompt. Requests with equal prompts submitted side by side share one prefill."""
    sampling: Sampling
    seed: int
    """A 63-bit number from (seed, task, replica): with the position it decides every draw, whatever the neighbours do."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the reply (the end-of-sequence token, usually)."""
    sets: bool = False
    """Whether to tell which tokens top-p and top-k had kept at each draw: ``extras["kept"]``, an int array a token."""


@dataclass
class Completion:
    """A sample, drawn."""

    tokens: np.ndarray
    """int [G], the stop token included"""
    logp: np.ndarray
    """float32 [G]: full softmax at the sampling temperature"""
    kept_logp: np.ndarray
    """float32 [G]: under top-p and top-k, renormalised over the kept set; equal to ``logp`` where nothing was cut"""
    stop: str
    """``stop`` or ``length``"""
    version: int
    """The weights' version that drew it"""
    extras: dict[str, Any] = field(default_factory=dict)


class Sampler(Protocol):
    """Draws samples. `pump` does one round of work and may be called from one thread only; `submit` from any."""

    def submit(self, request: Request) -> Future[Completion]: ...

    def pump(self) -> bool:
        """One round; False when nothing is left to do."""
        ...

    def load(self, weights: Any, version: int) -> None:
        """Takes new weights; only when drained."""
        ...
