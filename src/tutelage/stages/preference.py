"""What `Fit` needs to learn from pairs: ``prompt``, ``chosen``, ``rejected`` rows as samples, and a reference's log-probs.

A pair is two samples that share `Sample.pair`, the chosen one first. The reference is asked for a sample when its turn first
comes, by the same rule that writes ``ref_logp`` in an online stage (credit/kl.py), and the answers stay in checkpoints: a
resumed stage must not score again in other company, where the last bits differ.

Leaves out: making pairs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from tutelage.credit.base import CreditContext
from tutelage.credit.kl import Reference
from tutelage.graph import At
from tutelage.spec import UserError
from tutelage.text.template import Chat
from tutelage.types import Sample, Signal


def pairs(ctx: Any, at: At, template: Chat, tokenizer: Any) -> list[Sample]:
    """The rows of a preference dataset: chosen, rejected, chosen, ... Raises `UserError` where there are none."""
    from tutelage.text.rows import read_rows

    made: list[Sample] = []
    for number, row in enumerate(read_rows(ctx.input(at))):
        for column in ("chosen", "rejected"):
            sample = template.example(tokenizer, row["prompt"], row[column])
            sample.pair = str(number)
            made.append(sample)
    if not made:
        raise UserError(f"{at.of.name}.{at.port} is empty; a model cannot be trained on it")
    return made


class References:
    """``ref_logp`` of a stage's samples, each scored once."""

    def __init__(self, scorer: Any, samples: Sequence[Sample]):
        self.samples, self._scorer = samples, scorer

    def annotate(self, rows: Sequence[Sample], cost: Any) -> None:
        """Writes the signal onto the rows that lack it, and books what that costs."""
        fresh = list({id(s): s for s in rows if "ref_logp" not in s.signals}.values())  # epochs may meet within a batch
        asyncio.run(Reference().assign(fresh, CreditContext(1.0, reference=self._scorer)))
        cost.spend("scored", sum(len(s.tokens) for s in fresh), self._scorer.params)

    def state(self) -> dict[int, Any]:
        """index of a sample -> its values as a tensor [T_sel]"""
        import torch

        known = {i: s.signals["ref_logp"].values for i, s in enumerate(self.samples) if "ref_logp" in s.signals}
        return {i: torch.from_numpy(values) for i, values in known.items()}

    def restore(self, state: dict[int, Any]) -> None:
        for i, values in state.items():
            sample, said = self.samples[i], {"temperature": 1.0, "kind": "logp", "model": self._scorer.name}
            sample.signals["ref_logp"] = Signal(values.numpy(), sample.trained, said)
