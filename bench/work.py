"""The useful work of a bench, the same for all its sides: algorithmic FLOPs and real tokens.

A forward of a row of T tokens is 2·N FLOPs a token (N: the decoder's matmul parameters without the head), 2·V·D for each
position whose logits are needed, and 4·H·d·T(T + 1)/2 a layer for causal attention (H heads of width d: scores and sums).
Learning is three forwards, a teacher's scores one more. Padding and recomputation are no work. A prompt that replies share
counts once for each of them, as in the library's own costs: a side that computes it once may come out above the peak.

Leaves out: norms, activations, softmax and the optimizer, which take time but no matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.model.folder import matmul_params
from tutelage.types import Sample


@dataclass(frozen=True)
class Work:
    """What one call of a side gets done. ``lengths`` are those of the replies."""

    flops: float
    tokens: int
    lengths: tuple[int, ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.tokens + other.tokens, self.lengths)


def forward(model: Any, rows: Sequence[tuple[int, int]]) -> float:
    """FLOPs of a forward over rows of (tokens, positions whose logits are needed)."""
    config, head = model.config, model.get_output_embeddings().weight.numel()
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    body = matmul_params(model) - head
    attention = sum(4 * width * config.num_hidden_layers * t * (t + 1) / 2 for t, _ in rows)
    return sum(2.0 * body * t + 2.0 * head * m for t, m in rows) + attention


def learning(model: Any, rows: Sequence[Sample], teachers: int = 0) -> Work:
    """One update on rows, each of which ``teachers`` models of the same size score."""
    sizes = [(len(s.tokens), int(s.mask.sum())) for s in rows]
    return Work((3 + teachers) * forward(model, sizes), sum(t for t, _ in sizes), tuple(m for _, m in sizes))


def drawing(model: Any, prompts: Sequence[Sequence[int]], replies: Sequence[int]) -> Work:
    """Replies of known lengths; the tokens are those drawn. The last token of a reply is never read again."""
    rows = [(len(p) + n - 1, n) for p, n in zip(prompts, replies, strict=True)]
    return Work(forward(model, rows), sum(replies), tuple(replies))
