"""Plain data that crosses every room: Task, Score, Signal, Sample, Batch.

Legend of shapes, used throughout the project:

    T  tokens of one sample          V  vocabulary
    N  packed tokens of one batch    D  hidden width
    M  *trained* tokens of a batch   R  rows (samples) of a batch

A per-token quantity at position ``t`` always speaks of token ``t`` itself, predicted from the tokens before it. The
next-token shift happens once, inside the learner. What is learned from lives at the M trained positions only, so that a
prompt, tool or environment token has no place where a loss could reach it.

Leaves out: anything that computes. Arrays are numpy outside the learner and torch tensors inside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Message = dict[str, str]
"""``{"role": "user" | "assistant" | "system" | "tool", "content": text}``, as chat templates take it."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to be done, before anybody has tried.

    Example: ``Task("sum-17", "sum", ({"role": "user", "content": "12+30"},), gold="42")``.
    """

    id: str
    """Unique in its dataset; part of the sampling seed."""
    domain: str
    """Routes the task to its teacher and names its line in every table."""
    messages: tuple[Message, ...]
    """The prompt, up to and including the last user turn."""
    gold: str | None = None
    """The reference final answer; None where only a verifier knows."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What the verifier needs beyond the gold answer (JSON values)."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a verifier says of one reply."""

    value: float
    """The reward; 1.0 is right and 0.0 wrong unless the verifier's docstring says otherwise."""
    parts: dict[str, float] = field(default_factory=dict)
    """Components, logged by name."""
    error: str | None = None
    """Set when the verifier itself failed: the sample then leaves its group's baseline and is counted."""


@dataclass(frozen=True, slots=True)
class Signal:
    """A per-token quantity of one sample, with where it came from."""

    values: np.ndarray
    """[T_sel, ...]"""
    index: np.ndarray
    """int [T_sel]: the positions in the sample that ``values`` speak of, ascending."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Which model, temperature and kind made it."""


@dataclass(slots=True)
class Sample:
    """One tokenised sequence, made by a dataset or by a policy."""

    tokens: np.ndarray
    """int [T]"""
    mask: np.ndarray
    """bool [T]: True where the policy is trained, so never on prompt, tool or environment tokens."""
    task: Task | None = None
    group: str = ""
    """Samples of one prompt that share a baseline."""
    pair: str = ""
    """Two samples side by side that share it are compared, the preferred one first; empty where nothing is."""
    signals: dict[str, Signal] = field(default_factory=dict)
    """``behaviour_logp``, ``teacher_logp``, ``advantage``, ..."""
    scalars: dict[str, float] = field(default_factory=dict)
    """``reward`` and other per-sample numbers."""
    score: Score | None = None
    text: str = ""
    """The reply as text."""
    stop: str = ""
    """Why sampling ended: ``stop`` (a stop token or string) or ``length``."""
    versions: np.ndarray | None = None
    """int [T]: the policy version that sampled each token; None for data."""
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def domain(self) -> str:
        return self.task.domain if self.task else ""

    @property
    def trained(self) -> np.ndarray:
        """int [T_sel]: the positions where the mask is true."""
        import numpy as np

        return np.flatnonzero(self.mask)


@dataclass(slots=True)
class Batch:
    """Packed samples: no padding; rows lie one after another."""

    tokens: Any
    """int [N]"""
    row: Any
    """int [N]: the row each token belongs to, ascending"""
    pos: Any
    """int [N]: position within its row, from 0"""
    index: Any
    """int [M]: where in [0, N) the trained tokens lie, ascending"""
    trow: Any
    """int [M]: the row of each trained token"""
    pair: Any = None
    """int [R]: rows of one number are a pair, the preferred one first; -1 where nothing is compared"""
    signals: dict[str, Any] = field(default_factory=dict)
    """name -> [M, ...]"""
    counts: dict[str, float] = field(default_factory=dict)
    """``tokens`` (M), ``rows`` (R) and ``pairs`` over the *global* batch: what losses are divided by."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Objects that a loss asked for by name, such as ``teacher_heads``."""
