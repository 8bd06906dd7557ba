"""Samples to packed micro-batches: rows lie one after another (the forward pads them, where it must), and signals exist at
trained tokens only."""

from __future__ import annotations

from collections.abc import Sequence
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


def _signal(sample: Sample, name: str) -> np.ndarray:
    signal = sample.signals.get(name)
    if signal is None or not np.array_equal(signal.index, sample.trained):
        task = sample.task.id if sample.task else "?"
        raise ValueError(f"sample of task {task} has no signal {name!r} at its trained tokens; signals: {list(sample.signals)}")
    return signal.values
