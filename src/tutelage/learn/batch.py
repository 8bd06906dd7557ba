"""Samples to packed micro-batches. No padding: rows lie one after another, and signals exist at trained tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tutelage.types import Batch, Sample


def counts(samples: Sequence[Sample]) -> dict[str, float]:
    """Global counts that losses are divided by: ``tokens`` (trained) and ``rows``."""
    return {"tokens": float(sum(int(s.mask.sum()) for s in samples)), "rows": float(len(samples))}


def split(samples: Sequence[Sample], limit: int) -> list[list[Sample]]:
    """Micro-batches of at most ``limit`` tokens (or one sample), in order of length so that attention pads little."""
    parts: list[list[Sample]] = []
    size = limit + 1
    for sample in sorted(samples, key=lambda s: len(s.tokens)):
        if size + len(sample.tokens) > limit:
            parts.append([])
            size = 0
        parts[-1].append(sample)
        size += len(sample.tokens)
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
