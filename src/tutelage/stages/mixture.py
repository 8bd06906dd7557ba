"""Mixtures inside RL: losses on data beside the policy's own samples (`Replay`), and domains in unequal shares.

    g = ∇L_RL + Σ_i γ_i ∇L_i          in every update, each L_i a mean over its own tokens

With documents this is PPO-ptx (InstructGPT, arXiv 2203.02155, Eq. 2: its γ is 27.8), with worked answers SFT replay. Each part
is divided by its own count, so γ does not hang on how many tokens the policy happened to sample. The data are gone through
in a shuffled order, before any row comes again; places in it depend on the step alone.

Shares of domains are the largest-remainder method, with what earlier steps left over carried on: each prompt of a step goes to
the domain that is furthest behind its share. No domain is ever a whole prompt ahead of its share, and wherever all shares are
whole numbers they are met exactly.

Leaves out: mixtures of datasets in `Fit`, weights that move while a stage runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import Field

from tutelage.graph import At, Type
from tutelage.losses.nll import NLL
from tutelage.spec import Spec, SpecError, suggest
from tutelage.stages.fit import TOKENS_GUESS, batch_order, examples, need_examples
from tutelage.text.template import Chat, Template


class Replay(Spec):
    """Data that every update of an online stage learns from too."""

    data: At
    weight: float = Field(gt=0)
    """γ: of the data's mean loss beside the policy's"""
    rows: int = Field(16, ge=1)
    """in each update"""
    template: Template = Chat()
    """`Chat` trains the replies of ``prompt``/``completion`` rows, `Document` the whole ``text``."""
    loss: NLL = NLL()

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return f"{self.data.of.name}.{self.data.port}"


def need_replays(types: Callable[[At], Type], replays: Sequence[Replay]) -> None:
    """Raises `SpecError` for data without the columns, and for data named twice."""
    for replay in replays:
        need_examples(types, replay.data, replay.template, replay.loss)
    labels = [r.label for r in replays]
    twice = sorted({name for name in labels if labels.count(name) > 1})
    if twice:
        raise SpecError(f"replay names {twice[0]} twice; give it once, with the weights added up")


def replay_tokens(replays: Sequence[Replay], updates: int) -> float:
    """Tokens that so many updates replay, roughly."""
    return float(updates * sum(r.rows for r in replays) * TOKENS_GUESS)


class Replays:
    """The data of a running stage's replays."""

    def __init__(self, replays: Sequence[Replay], ctx: Any, tokenizer: Any, seed: int):
        self.seed = seed
        self.parts = [(r, examples(ctx, r.data, r.template, tokenizer)) for r in replays]

    def add(self, learner: Any, update: int) -> tuple[dict[str, float], int]:
        """Adds every part's gradient for update number ``update``: (metrics, tokens)."""
        metrics, tokens = {}, 0
        for i, (replay, data) in enumerate(self.parts):
            rows = [data[j] for j in batch_order(len(data), replay.rows, update, self.seed * 1009 + i)]
            found = learner.forward_backward(rows, replay.loss, weight=replay.weight)
            metrics[f"replay/{replay.label}/loss"] = found["loss"]
            tokens += sum(len(r.tokens) for r in rows)
        return metrics, tokens


def need_weights(weights: dict[str, float], domains: Sequence[str], prompts: int) -> None:
    """Raises `SpecError` where weights do not say the share of every domain."""
    if not weights:
        if prompts % len(domains):
            raise SpecError(
                f"prompts {prompts} cannot be shared equally by {len(domains)} domains; give a multiple, or weights for shares"
            )
        return
    for name, weight in weights.items():
        if name not in domains:
            raise SpecError(f"weights names {name!r}, which is none of the domains{suggest(name, domains)}")
        if weight <= 0:
            raise SpecError(f"the weight of {name!r} is {weight:g}; give a positive one, or leave the domain out")
    for name in domains:
        if name not in weights:
            raise SpecError(f"weights says nothing of domain {name!r}; give every domain its weight")


def shares(weights: Sequence[float], prompts: int) -> Iterator[list[int]]:
    """Prompts of each domain, step by step without end; each step's sum is ``prompts``."""
    from fractions import Fraction
    from math import lcm

    exact = [Fraction(repr(w)) for w in weights]  # as they are written, so that 0.1 + 0.2 is 0.3
    scale = lcm(*(w.denominator for w in exact))
    parts = [int(w * scale) for w in exact]
    one = sum(parts)  # a prompt, in the unit of ``behind``
    behind = [0] * len(parts)
    while True:
        behind = [b + prompts * part for b, part in zip(behind, parts, strict=True)]
        given = [0] * len(parts)
        for _ in range(prompts):
            most = max(range(len(parts)), key=behind.__getitem__)  # the first of equals
            behind[most] -= one
            given[most] += 1
        yield given
