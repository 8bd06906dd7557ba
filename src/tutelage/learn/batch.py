"""Samples to packed micro-batches: rows lie one after another (the forward pads them, where it must), and signals exist at
trained tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.types import Batch, Sample


def counts(samples: Sequence[Sample]) -> dict[str, float]:
    """Global counts that losses are divided by: ``tokens`` (trained), ``rows`` and ``pairs``."""
    tokens = sum(int(s.mask.sum()) for s in samples)
    return {"tokens": float(tokens), "rows": float(len(samples)), "pairs": sum(bool(s.pair) for s in samples) / 2}


def atoms(samples: Sequence[Sample]) -> list[list[Sample]]:
    """What must stay in one micro-batch: a pair's two samples, which lie side by side, or a sample alone."""
    found: list[list[Sample]] = []
    for sample in samples:
        if sample.pair and found and len(found[-1]) == 1 and found[-1][0].pair == sample.pair:
            found[-1].append(sample)
        else:
            found.append([sample])
    return found


def split(samples: Sequence[Sample], limit: int, padded: bool = False) -> list[list[Sample]]:
    """Micro-batches of at most ``limit`` tokens (or one of `atoms`), in order of length so that attention pads little. With
    ``padded``, padding counts: each row is then as long as the longest of its micro-batch."""
    parts: list[list[Sample]] = []
    size = 0
    for atom in sorted(atoms(samples), key=lambda atom: max(len(s.tokens) for s in atom)):
        tokens, longest = sum(len(s.tokens) for s in atom), max(len(s.tokens) for s in atom)
        size = longest * (len(parts[-1]) + len(atom)) if padded and parts else size + tokens
        if not parts or size > limit:
            parts.append([])
            size = tokens
        parts[-1] += atom
    return parts


def collate(samples: Sequence[Sample], needs: Sequence[str] = (), extras: dict[str, Any] | None = None) -> Batch:
    """Packs samples into one batch of numpy arrays. The first token of a row is never trained: nothing predicts it.

    Raises ValueError where a needed signal is missing or does not cover the trained tokens.
    """
    for s in samples:
        if s.mask[0]:
            raise ValueError("the first token of a sample cannot be trained: no token stands before it")
    lengths = [len(s.tokens) for s in samples]
    starts = np.cumsum([0, *lengths[:-1]])
    signals = {name: np.concatenate([_signal(s, name) for s in samples]) for name in sorted(needs)}
    return Batch(
        tokens=np.concatenate([s.tokens for s in samples]).astype(np.int64),
        row=np.repeat(np.arange(len(samples)), lengths),
        pos=np.concatenate([np.arange(n) for n in lengths]),
        index=np.concatenate([s.trained + a for s, a in zip(samples, starts, strict=True)]),
        trow=np.repeat(np.arange(len(samples)), [int(s.mask.sum()) for s in samples]),
        pair=np.array([i if s.pair else -1 for i, atom in enumerate(atoms(samples)) for s in atom]),
        signals=signals,
        counts=counts(samples),
        extras=dict(extras or {}),
    )


@dataclass
class Pack:
    """What a forward has to see of a batch: rows, or prompts that several rows share, then what goes on after them."""

    tokens: Any
    """int [N']"""
    pos: Any
    """int [N']"""
    lengths: Any
    """int [R'] of the pieces"""
    after: Any
    """int [R']: the piece that comes before, or -1; None where none does"""
    index: Any
    """int [M]: the token that each trained token is predicted from"""


def pack(batch: Batch, share: bool = True) -> Pack:
    """With ``share``, rows with equal tokens before their first trained one share them, and what stands behind all that
    predicts is left out: no result of a causal model changes but by rounding. Takes and gives tensors."""
    import torch

    if not share:
        return Pack(batch.tokens, batch.pos, torch.bincount(batch.row), None, batch.index - 1)
    tokens, row, index, trow = (x.cpu().numpy() for x in (batch.tokens, batch.row, batch.index, batch.trow))
    lengths = np.bincount(row)
    starts = np.cumsum(lengths) - lengths
    many = np.bincount(trow, minlength=len(lengths))
    ends = np.cumsum(many)
    head = np.ones(len(lengths), int)  # of a row without trained tokens one token stays
    head[many > 0] = index[(ends - many)[many > 0]] - starts[many > 0]
    stop = head.copy()
    stop[many > 0] = index[ends[many > 0] - 1] - starts[many > 0]
    found: dict[bytes, int] = {}
    heads = [tokens[a : a + n].tobytes() for a, n in zip(starts, head, strict=True)]
    prompt = np.array([found.setdefault(h, len(found)) for h in heads])
    firsts, alike = np.unique(prompt, return_index=True, return_counts=True)[1:]
    head = np.where(alike[prompt] == 1, stop, head)  # a row with its prompt to itself stays whole
    rest = np.flatnonzero(stop > head)
    rows = np.concatenate([firsts, rest])
    begin = np.concatenate([np.zeros(len(firsts), int), head[rest]])
    size = np.concatenate([head[firsts], (stop - head)[rest]])
    offset = np.cumsum(size) - size
    source = np.repeat(starts[rows] + begin - offset, size) + np.arange(size.sum())
    own = np.zeros(len(lengths), int)  # where a row's token 0 would lie, were its rest not apart
    own[rest] = offset[len(firsts) :] - head[rest]
    at = index - 1 - starts[trow]
    shared = at < head[trow]
    place = np.where(shared, offset[prompt[trow]], own[trow]) + at
    after = np.concatenate([np.full(len(firsts), -1), prompt[rest]])
    pos = np.arange(size.sum()) - np.repeat(offset - begin, size)
    to = lambda x: torch.from_numpy(x).to(batch.tokens.device)  # noqa: E731
    return Pack(to(tokens[source]), to(pos), to(size), to(after), to(place))


def _signal(sample: Sample, name: str) -> np.ndarray:
    signal = sample.signals.get(name)
    if signal is None or not np.array_equal(signal.index, sample.trained):
        task = sample.task.id if sample.task else "?"
        raise ValueError(f"sample of task {task} has no signal {name!r} at its trained tokens; signals: {list(sample.signals)}")
    return signal.values
