"""Packed attention for any transformers decoder that goes through the library's attention interface.

One forward, three layouts. The model sees one row of N packed tokens, whatever they belong to: linear layers, norms and
the output head never touch a padding token. Only attention needs to know whose token is whose, and a *layout* tells it:

- `Rows`     training and scoring: whole sequences side by side
- `Prefill`  the same, and the keys and values are written into cache slots, one prompt into the slots of its whole group
- `Decode`   one new token for each of the first S slots of the cache

Short rows use plain batched matmuls (on CPU their backward beats the fused kernel, more so in bf16); long rows use
PyTorch's scaled-dot-product attention, whose memory does not grow with the square of the length.

Leaves out: layers that carry state along the sequence without attention (linear attention, convolutions): packing would
let one row leak into the next, so all but the architectures declared in `PACKED` go the other way (padded.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F

from tutelage.model.headers import PACKED, stretches

NAME = "tutelage_packed"
PLAIN_UP_TO = 256
"""Longest row for which scores are held whole."""


class Layout(Protocol):
    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, cap: float | None
    ) -> torch.Tensor:
        """q [N, H, Dh], k and v [N, Hk, Dh] -> [N, H, Dh]"""
        ...


def register() -> str:
    """Makes the packed attention known to transformers; returns its name for ``attn_implementation``."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    return NAME


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, Dh]
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    out = layout.attend(module.layer_idx, q, k, v, scale, sliding_window, softcap)
    return out.unsqueeze(0), None


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, cap: float | None
) -> torch.Tensor:
    """q [B, H, Q, Dh], k, v [B, Hk, L, Dh], mask bool broadcastable to [B, 1, Q, L] (True = may look) -> [B, H, Q, Dh].

    Query heads that share a key head are folded into the query axis, so keys are never repeated.
    """
    B, H, Q, Dh = q.shape
    Hk = k.shape[1]
    folded = q.reshape(B, Hk, H // Hk * Q, Dh)
    scores = (folded @ k.transpose(-1, -2)).mul_(scale)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.view(B, Hk, H // Hk, Q, -1).masked_fill(~mask.unsqueeze(2), torch.finfo(q.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return (weights.view(B, Hk, H // Hk * Q, -1) @ v).view(B, H, Q, Dh)


class Rows:
    """Sequences of the given lengths, packed one after another."""

    def __init__(self, lengths: torch.Tensor):
        """lengths: int [R], summing to N"""
        R, L = len(lengths), int(lengths.max())
        starts = torch.cumsum(lengths, 0) - lengths
        column = torch.arange(L).to(lengths.device)
        inside = column < lengths[:, None]  # [R, L]
        self.shape = (R, L)
        self.pad = torch.where(inside, starts[:, None] + column, 0).flatten()  # padding borrows token 0: never looked at
        self.unpad = inside.flatten().nonzero()[:, 0]
        self.even = bool(inside.all())
        self.column = column

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H, Dh] -> [R, H, L, Dh]"""
        R, L = self.shape
        rows = x if self.even else x.index_select(0, self.pad)
        return rows.reshape(R, L, *x.shape[1:]).transpose(1, 2)

    def attend(self, layer, q, k, v, scale, window, cap):
        return self.mix(self.spread(q), self.spread(k), self.spread(v), scale, window, cap)

    def mix(self, q, k, v, scale, window, cap):
        """Causal attention within rows. Padding stands to the right, so causality alone hides it."""
        R, L = self.shape
        age = self.column[:, None] - self.column[None, :]
        mask = age >= 0 if window is None else (age >= 0) & (age < window)
        if L <= PLAIN_UP_TO or cap is not None:
            out = softmax_attention(q, k, v, mask[None, None], scale, cap)
        else:
            plain = window is None or window >= L
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None if plain else mask, is_causal=plain, scale=scale, enable_gqa=gqa
            )
        flat = out.transpose(1, 2).reshape(R * L, *out.shape[1:2], out.shape[3])
        return flat if self.even else flat.index_select(0, self.unpad)


@dataclass
class Cache:
    """Keys and values of S slots of up to L tokens: per layer [S, Hk, L, Dh], L a multiple of `STEP`."""

    STEP: ClassVar[int] = 32

    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @classmethod
    def empty(cls, config: Any, slots: int, length: int, dtype: torch.dtype, device: Any) -> Cache:
        config = config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, heads, -(-length // cls.STEP) * cls.STEP, width)
        make = lambda: [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]  # noqa: E731
        return cls(make(), make())

    @property
    def length(self) -> int:
        return self.k[0].shape[2]

    def grow(self, length: int) -> None:
        """Makes room for longer sequences."""
        if length > self.length:
            more = -(-(length - self.length) // self.STEP) * self.STEP
            self.k = [F.pad(x, (0, 0, 0, more)) for x in self.k]
            self.v = [F.pad(x, (0, 0, 0, more)) for x in self.v]

    def move(self, to: list[int], source: list[int]) -> None:
        """Copies slots ``source`` over slots ``to``."""
        for x in (*self.k, *self.v):
            x[to] = x[source]


class Prefill(Rows):
    """Prompts, written into cache slots on the way: ``slots`` int [K] each take the prompt ``source`` int [K]."""

    def __init__(self, lengths: torch.Tensor, cache: Cache, slots: torch.Tensor, source: torch.Tensor):
        super().__init__(lengths)
        self.cache, self.slots, self.source = cache, slots, source

    def attend(self, layer, q, k, v, scale, window, cap):
        q, k, v = (self.spread(x) for x in (q, k, v))
        L = self.shape[1]
        self.cache.k[layer][self.slots, :, :L] = k[self.source]
        self.cache.v[layer][self.slots, :, :L] = v[self.source]
        return self.mix(q, k, v, scale, window, cap)


class Decode:
    """One token for each of the slots 0..S-1, at positions ``pos`` int [S]."""

    def __init__(self, cache: Cache, pos: torch.Tensor):
        self.cache, self.pos = cache, pos
        self.slots = torch.arange(len(pos), device=pos.device)
        self.length = cache.length
        self.age = pos[:, None] - torch.arange(self.length, device=pos.device)  # [S, L]
        self.mask = (self.age >= 0)[:, None, None]

    def attend(self, layer, q, k, v, scale, window, cap):
        S = len(self.pos)
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[self.slots, :, self.pos] = k
        values[self.slots, :, self.pos] = v
        mask = self.mask if window is None else self.mask & (self.age < window)[:, None, None]
        keys, values = keys[:S, :, : self.length], values[:S, :, : self.length]
        return softmax_attention(q.unsqueeze(2), keys, values, mask, scale, cap)[:, :, 0]


def packs(config: Any) -> bool:
    """Whether an architecture is declared to be safe to pack, and its angles do not follow the longest row."""
    config = config.get_text_config()
    return config.model_type in PACKED and not stretches(getattr(config, "rope_parameters", None))
