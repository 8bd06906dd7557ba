"""What the loss tests stand on: an `Output` over whole logits, batches written as pictures, and oracles in plain Python.

The oracles use `math` and loops only, gradients included (derived by hand), so that they share nothing with the losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from tutelage.types import Batch


class PlainOutput:
    """`tutelage.losses.base.Output` over logits [M, V] held whole."""

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, chunk: int = 3):
        self.logprobs = (logits / temperature).log_softmax(-1)
        self.targets, self.chunk = targets, chunk

    @property
    def logp(self) -> torch.Tensor:
        return self.logprobs.gather(1, self.targets[:, None]).squeeze(1)

    @property
    def entropy(self) -> torch.Tensor:
        return -(self.logprobs.exp() * self.logprobs).sum(-1).detach()

    def reduce_vocab(self, fn: Any, index: torch.Tensor, *extras: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.split(self.chunk) for x in (self.logprobs[index], *extras)), strict=True)
        return torch.cat([fn(*part) for part in parts])


@dataclass
class Case:
    """A batch and the logits [M, V] a model gave for its trained tokens."""

    batch: Batch
    logits: torch.Tensor
    temperature: float = 1.0
    chunk: int = 3

    def run(self, loss: Any) -> tuple[float, torch.Tensor, dict[str, float]]:
        """(sum, its gradient [M, V], means of the metrics)"""
        leaf = self.logits.detach().clone().requires_grad_()
        out = PlainOutput(leaf, self.batch.tokens[self.batch.index], self.temperature, self.chunk)
        total, metrics = loss(out, self.batch)
        (gradient,) = torch.autograd.grad(total, leaf)
        return total.item(), gradient, {name: s / n for name, (s, n) in metrics.items()}

    @property
    def logp(self) -> torch.Tensor:
        return PlainOutput(self.logits, self.batch.tokens[self.batch.index], self.temperature).logp

    def rows(self, *rows: int) -> Case:
        """The same numbers with only some rows, as a micro-batch; the counts stay global."""
        old = self.batch
        tokens = torch.isin(old.row, torch.tensor(rows))
        trained = torch.isin(old.trow, torch.tensor(rows))
        renumber = torch.full((int(old.row.max()) + 1,), -1)
        renumber[list(rows)] = torch.arange(len(rows))
        place = tokens.cumsum(0) - 1
        batch = Batch(
            tokens=old.tokens[tokens],
            row=renumber[old.row[tokens]],
            pos=old.pos[tokens],
            index=place[old.index[trained]],
            trow=renumber[old.trow[trained]],
            signals={name: s[trained] for name, s in old.signals.items()},
            counts=old.counts,
            extras=old.extras,
        )
        return Case(batch, self.logits[trained], self.temperature, self.chunk)

    def trained(self, *rows: int) -> torch.Tensor:
        """bool [M]: the trained tokens of some rows"""
        return torch.isin(self.batch.trow, torch.tensor(rows))


PICTURES = ("..xxx", ".xx..xxx", "...x", ".xxxxxxx")
"""One row each: ``.`` a prompt or tool token, ``x`` a trained one. 3 + 5 + 1 + 7 trained tokens of 25."""


def case(*pictures: str, vocab: int = 11, seed: int = 0, temperature: float = 1.0, dtype: Any = torch.float64) -> Case:
    """Random tokens and logits for rows drawn as in `PICTURES` (the default)."""
    pictures = pictures or PICTURES
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(p) for p in pictures])
    row = torch.arange(len(pictures)).repeat_interleave(lengths)
    index = torch.tensor([i for i, c in enumerate("".join(pictures)) if c == "x"])
    batch = Batch(
        tokens=torch.randint(vocab, (len(row),), generator=rng),
        row=row,
        pos=torch.cat([torch.arange(n) for n in lengths]),
        index=index,
        trow=row[index],
        counts={"tokens": float(len(index)), "rows": float(len(pictures))},
    )
    return Case(batch, 2 * torch.randn(len(index), vocab, generator=rng, dtype=torch.float64).to(dtype), temperature)


def noise(case: Case, scale: float, seed: int) -> torch.Tensor:
    """[M] normal numbers"""
    rng = torch.Generator().manual_seed(1000 + seed)
    return scale * torch.randn(len(case.logits), generator=rng, dtype=torch.float64).to(case.logits.dtype)


# --- oracles ---------------------------------------------------------------------------------------------------------


@dataclass
class Token:
    """One trained token, in Python floats."""

    p: list[float]
    """the student's probabilities at the temperature"""
    target: int
    row: int
    signals: dict[str, float] = field(default_factory=dict)

    @property
    def logp(self) -> float:
        return math.log(self.p[self.target])

    def score_function(self, temperature: float) -> list[float]:
        """∂ log p(target) / ∂ logits"""
        return [((v == self.target) - p) / temperature for v, p in enumerate(self.p)]


def probabilities(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def tokens(case: Case) -> list[Token]:
    batch, found = case.batch, []
    for i in range(len(case.logits)):
        signals = {name: float(s[i]) for name, s in batch.signals.items() if s.dim() == 1}
        p = probabilities(case.logits[i].tolist(), case.temperature)
        found.append(Token(p, int(batch.tokens[batch.index[i]]), int(batch.trow[i]), signals))
    return found


def length_weights(found: list[Token]) -> list[float]:
    """1/|y| of each token's row"""
    rows = [t.row for t in found]
    return [1 / rows.count(r) for r in rows]
