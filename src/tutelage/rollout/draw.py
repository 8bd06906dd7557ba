"""Drawing tokens with a counter-based generator: a draw depends on (seed, position) alone, not on its neighbours.

The uniform number comes from SplitMix64 (Steele et al., 2014) applied to ``seed + position``; the token is the inverse of the
cumulative distribution, in vocabulary order.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 256
"""Tokens whose probabilities are summed before any is looked at."""
NO_FP64 = frozenset({"mps"})
"""Types of devices."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64 [S], int [S] -> float64 [S] in [0, 1)"""
    with np.errstate(over="ignore"):
        z = seeds.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def kept(logp: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """[S, V] log-probs, per-row top-p and top-k (0 = all) -> bool [S, V]: the tokens that may be drawn.

    top-k first, then the smallest set whose mass among what top-k left is at least top-p.
    """
    values, order = logp.sort(-1, descending=True)
    rank = torch.arange(logp.shape[1], device=logp.device)
    inside = (top_k[:, None] == 0) | (rank < top_k[:, None])
    probs = values.exp() * inside
    before = probs.cumsum(-1) - probs
    inside &= before < top_p[:, None] * probs.sum(-1, keepdim=True)
    inside[:, 0] = True
    return torch.zeros_like(inside).scatter(1, order, inside)


def draw(logp: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Log-probs [S, V] (-inf where not kept) and uniforms [S] of any device -> tokens int [S].

    Of more than `BLOCK` tokens first a block of so many by its probability, then the token in it, both in fp64: no
    large [S, V] of fp64 is made. Where the device knows no fp64, the CPU does this.
    """
    where = "cpu" if logp.device.type in NO_FP64 else logp.device
    p, u, V = logp.to(where).exp(), u.to(where), logp.shape[1]
    if V <= BLOCK:
        inside = p.cumsum(-1, dtype=torch.float64)
        return _inverse(inside, u[:, None] * inside[:, -1:])[:, 0].to(logp.device)
    size, whole = BLOCK, V // BLOCK * BLOCK
    parts = [p[:, :whole].unflatten(1, (-1, size)), p[:, None, whole:]]
    sums = torch.cat([x.sum(-1, dtype=torch.float64) for x in parts if x.numel()], 1)  # [S, blocks], the last may be short
    edges = sums.cumsum(-1)
    target = u[:, None] * edges[:, -1:]
    block = torch.searchsorted(edges, target, right=True).clamp_(max=sums.shape[1] - 1)
    index = block * size + torch.arange(size, device=where)
    inside = p.gather(1, index.clamp(max=V - 1)).double().masked_fill_(index >= V, 0.0).cumsum(-1)
    rest = (target - (edges - sums).gather(1, block)).clamp_(min=0.0)
    return (block * size + _inverse(inside, rest))[:, 0].to(logp.device)


def _inverse(edges: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cumulative sums [S, n] and targets [S, 1] -> the first place whose sum is beyond, [S, 1]; rounding never leaves them."""
    inside = torch.minimum(target, torch.nextafter(edges[:, -1:], torch.zeros_like(target)))
    return torch.searchsorted(edges, inside, right=True)
