"""What ratios of probabilities are computed with: a bound before `exp`, means over rows, the log-prob inside a kept set.

Leaves out: what is done with a ratio (losses/policy.py and its variants, losses/correction.py, losses/kl.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from tutelage.losses.base import Output
from tutelage.types import Batch

LIMIT = 20.0
"""Log-ratios are held within ±LIMIT before `exp`: an overflow would turn a zero advantage into 0·inf = NaN."""


def row_mean(values: Any, batch: Batch) -> Any:
    """The mean of ``values`` [M] over each row's trained tokens, at every one of them [M]. With gradient."""
    lengths = batch.trow.bincount()  # [R]
    sums = values.new_zeros(len(lengths)).index_add(0, batch.trow, values)
    return (sums / lengths)[batch.trow]


class KeptOutput:
    """`Output` whose ``logp`` is renormalised over the set of tokens that could be drawn.

    DeepSeek-V3.2's "keep sampling mask" (arXiv 2512.02556, section 3.1): under top-p and top-k the sampler's probabilities
    are those of a cut vocabulary; the trainer's ratio is only one of like to like over the same cut. Reads signal ``kept``
    int [M, K], the tokens of the set, filled up with -1. Entropy and `reduce_vocab` stay those of the whole vocabulary.
    """

    def __init__(self, out: Output, batch: Batch):
        self.entropy, self.reduce_vocab = out.entropy, out.reduce_vocab
        self._out, self._kept = out, batch.signals["kept"]

    @cached_property
    def logp(self) -> Any:
        import torch

        everywhere = torch.arange(len(self._kept), device=self._kept.device)
        return self._out.logp - self._out.reduce_vocab(log_mass, everywhere, self._kept)


def log_mass(logprobs: Any, kept: Any) -> Any:
    """log Σ p over the set ``kept`` int [m, K] (-1: no token) of log-probs [m, V]. [m]"""
    inside = logprobs.gather(1, kept.clamp(min=0).long()).masked_fill(kept < 0, -float("inf"))
    return inside.logsumexp(-1)


def like_to_like(out: Output, batch: Batch) -> tuple[Output, Batch]:
    """Trainer and sampler both over the kept set: the sampler's log-prob becomes signal ``kept_logp`` [M]."""
    return KeptOutput(out, batch), replace(batch, signals={**batch.signals, "behaviour_logp": batch.signals["kept_logp"]})
