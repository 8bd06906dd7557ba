"""What a loss reads of a forward pass: log-probs, entropies and the whole vocabulary's distributions, in chunks of tokens.

A function of a token's logits has a gradient that reads nothing but this token. So it is taken along in the forward pass, as
numbers [M, V], and the backward pass is two matmuls: nothing is recomputed. Where [M, V] is more than `KEEP`, only values are
kept and a chunk's gradient is made again when it is needed; memory then does not grow with M.

Leaves out: gradients of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tutelage.losses.divergence import entropy
from tutelage.losses.top_k import outcomes
from tutelage.model.head import Head

CHUNK = 1 << 22
"""Elements of logits held at once: [m, V] chunks of at most this size. Some twenty such buffers of 4 bytes may be alive in a
backward pass, however many tokens there are (tests/learn/test_memory.py)."""
KEEP = 1 << 25
"""Elements of gradients by logits kept between the passes; above it none are."""

Row = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""(logits [m, V], whether the gradient is wanted, extras [m, ...]...) -> values [m, c], and the gradient [m, V] of the first"""


class PackedOutput:
    """`tutelage.losses.base.Output` over the hidden states that predict the trained tokens."""

    def __init__(self, hidden: torch.Tensor, head: Head, targets: torch.Tensor, temperature: float):
        """hidden [M, D], targets int [M]"""
        self.hidden, self.head, self.targets, self.temperature = hidden, head, targets, temperature

    @cached_property
    def _both(self) -> torch.Tensor:
        return self._rows(_picked, self.hidden, self.targets)

    @property
    def logp(self) -> torch.Tensor:
        return self._both[:, 0]

    @property
    def entropy(self) -> torch.Tensor:
        return self._both[:, 1].detach()

    def topk(self, k: int) -> torch.Tensor:
        """[M, 2k + 1]: the k likeliest tokens (floats: exact below 2^24), their log-probs, the log of the mass outside. Without
        gradient."""

        def likeliest(logits: torch.Tensor, _: bool) -> tuple[torch.Tensor, None]:
            logprobs = torch.log_softmax(logits, -1)
            ids = logprobs.topk(k).indices
            return torch.cat([ids.float(), outcomes(logprobs, ids)], 1), None

        return self._rows(likeliest, self.hidden.detach())

    def reduce_vocab(self, fn: Callable[..., Any], index: torch.Tensor, *extras: torch.Tensor) -> torch.Tensor:
        def reduced(logits: torch.Tensor, wanted: bool, *more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            with torch.set_grad_enabled(wanted):
                leaf = logits.detach().requires_grad_(wanted)
                values = fn(torch.log_softmax(leaf, -1), *more)
                first = values if values.dim() == 1 else values[:, 0]
                gradient = torch.autograd.grad(first.sum(), leaf)[0] if wanted and first.requires_grad else None
            return values.detach(), torch.zeros_like(logits) if wanted and gradient is None else gradient

        return self._rows(reduced, self.hidden[index], *extras)

    def _rows(self, fn: Row, hidden: torch.Tensor, *extras: torch.Tensor) -> torch.Tensor:
        pieces = _Pieces(fn, self.head, self.temperature)
        return _ByRow.apply(pieces, hidden, self.head.weight, self.head.bias, *extras)


def _picked(logits: torch.Tensor, wanted: bool, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[m, 2]: the log-prob of each target, and the entropy; ∂ log p(target) / ∂ logits = onehot − p."""
    logprobs, at = torch.log_softmax(logits, -1), targets[:, None]
    p = logprobs.exp()
    values = torch.stack((logprobs.gather(1, at)[:, 0], entropy(logprobs, p)), 1)
    return values, p.neg_().scatter_add_(1, at, torch.ones_like(values[:, :1])) if wanted else None


class _Pieces:
    """A function of rows after the head, at a temperature: values and the gradient by what the head's matmul gives."""

    def __init__(self, fn: Row, head: Head, temperature: float):
        self.fn, self.head, self.temperature = fn, head, temperature
        self.rows = max(1, CHUNK // head.vocab)
        self.kept: list[torch.Tensor] = []

    def __call__(self, wanted: bool, hidden: torch.Tensor, *extras: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.head(hidden)
        scaled = logits if self.temperature == 1 else logits / self.temperature
        values, gradient = self.fn(scaled, wanted, *extras)
        if gradient is None:
            return values, None
        return values, self.head.back(gradient if self.temperature == 1 else gradient.div_(self.temperature), logits)


class _ByRow(torch.autograd.Function):
    """[M, c] from hidden [M, D], the head's weight [V, D] and bias [V] or None, extras [M, ...]."""

    @staticmethod
    def forward(ctx: Any, pieces: _Pieces, hidden: Any, weight: Any, bias: Any, *extras: Any) -> Any:
        keeps = any(ctx.needs_input_grad[1:4]) and len(hidden) * len(weight) <= KEEP
        ctx.pieces = pieces
        ctx.save_for_backward(hidden, weight, bias, *extras)
        values = []
        for piece in zip(*(x.split(pieces.rows) for x in (hidden, *extras)), strict=True):
            value, gradient = pieces(keeps, *piece)
            values.append(value)
            if gradient is not None:
                pieces.kept.append(gradient)
        return torch.cat(values) if len(values) != 1 else values[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        hidden, weight, _, *extras = ctx.saved_tensors
        pieces, (_, to_hidden, to_weight, to_bias, *_) = ctx.pieces, ctx.needs_input_grad
        kept, pieces.kept = pieces.kept, []
        states, by_weight, by_bias = [], None, None
        first = grad.reshape(len(hidden), -1)[:, :1]  # values are [M] or [M, c]
        for upstream, h, *more in zip(*(x.split(pieces.rows) for x in (first, hidden, *extras)), strict=True):
            made = kept.pop(0) if kept else pieces(True, h, *more)[1]
            d = made.mul_(upstream).to(weight.dtype)
            if to_hidden:
                states.append((d @ weight).to(hidden.dtype))
            if to_weight:
                h = h.to(weight.dtype)
                by_weight = d.t() @ h if by_weight is None else by_weight.addmm_(d.t(), h)
            if to_bias:
                by_bias = d.sum(0) if by_bias is None else by_bias.add_(d.sum(0))
        return None, torch.cat(states) if to_hidden else None, by_weight, by_bias, *(None for _ in extras)
