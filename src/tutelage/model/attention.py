"""Packed attention for any transformers decoder that goes through the library's attention interface.

One forward, three layouts. The model sees one row of N packed tokens, whatever they belong to: linear layers, norms and
the output head never touch a padding token. Only attention needs to know whose token is whose, and a *layout* tells it:

- `Rows`     training and scoring: sequences side by side, a prompt once for all replies that go on after it
- `Prefill`  the same, and the keys and values are written into cache slots, one prompt into the slots of its whole group
- `Decode`   one new token for each of the first S slots of the cache

Rows of like lengths form a class, so that none is padded far. Short rows, cut into pieces, use plain batched matmuls with a
backward of their own (on CPU that beats the fused kernel, more so in bf16); long rows use PyTorch's scaled-dot-product
attention, whose memory does not grow with the square of the length.

Leaves out: layers that carry state along the sequence without attention (linear attention, convolutions): packing would
let one row leak into the next, so all but the architectures declared in `PACKED` go the other way (padded.py).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tutelage.model.headers import PACKED, stretches

NAME = "tutelage_packed"
PLAIN_UP_TO = 256
"""Longest row for which scores are held whole."""
CUT = 96
"""Most queries of a piece of such a row on a processor: what only its later pieces see is not computed for the earlier."""
CLASS = 1 << 12
"""Scores of padding (of one head) that cost about as much as computing a class of rows apart."""


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


def capped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, cap: float) -> torch.Tensor:
    """q [B, H, Q, Dh], already scaled, k, v [B, Hk, L, Dh], bias broadcastable to [B, 1, Q, L] (`hidden_from`)
    -> [B, H, Q, Dh].

    Query heads that share a key head are folded into the query axis, so keys are never repeated.
    """
    B, H, Q, Dh = q.shape
    Hk = k.shape[1]
    scores = torch.tanh(q.reshape(B, Hk, H // Hk * Q, Dh) @ k.transpose(-1, -2) / cap) * cap
    scores.view(B, Hk, H // Hk, Q, -1).add_(bias.unsqueeze(2))
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).view(B, H, Q, Dh)


def hidden_from(age: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """How long before each query its keys stand, int -> what is added to the scores: 0 where it may look."""
    seen = age >= 0 if window is None else (age >= 0) & (age < window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


class Grid:
    """Packed rows of the given lengths as a rectangle [R, L], padded on the right."""

    def __init__(self, lengths: torch.Tensor):
        """lengths: int [R], summing to N"""
        R, L = len(lengths), int(lengths.max())
        starts = torch.cumsum(lengths, 0) - lengths
        self.column = torch.arange(L, device=lengths.device)
        inside = self.column < lengths[:, None]  # [R, L]
        self.shape = (R, L)
        self.pad = torch.where(inside, starts[:, None] + self.column, 0).flatten()  # padding borrows token 0: never looked at
        self.unpad = inside.flatten().nonzero()[:, 0]
        self.even = bool(inside.all())

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H, Dh] -> [R, H, L, Dh]"""
        rows = x if self.even else x.index_select(0, self.pad)
        return rows.reshape(*self.shape, *x.shape[1:]).transpose(1, 2)


class Rows:
    """Sequences of the given lengths, packed one after another. A row may go on where another ends: a prompt then lies in
    the pack once, however many replies it has.

    Attention is computed in classes of pieces of rows with like numbers of queries and keys, padded to the most of their class.
    """

    def __init__(self, lengths: torch.Tensor, after: torch.Tensor | None = None):
        """lengths: int [R] > 0, summing to N; after: int [R], the row whose tokens come before, itself after none, or -1"""
        self.device = lengths.device
        own = lengths.cpu().numpy()
        stem = np.full(len(own), -1) if after is None else after.cpu().numpy()
        starts, before = own.cumsum() - own, np.where(stem >= 0, own[stem], 0)
        cut = CUT if self.device.type == "cpu" else PLAIN_UP_TO  # elsewhere calls cost more than scores
        many = np.where(own + before > PLAIN_UP_TO, 1, -(-own // cut))
        row = np.repeat(np.arange(len(own)), many)
        most = -(-own // many)[row]
        begin = (np.arange(len(row)) - np.repeat(many.cumsum() - many, many)) * most  # of a piece in its row
        size = np.minimum(most, own[row] - begin)
        gone = before[row] + begin
        self.classes: list[_Class] = []
        queries, keys = [], []
        for some in _alike(size, gone):
            made = _Class(size[some], gone[some], self.device)
            r, i, j = row[some, None], np.arange(made.shape[1]), np.arange(made.shape[2])
            queries.append(np.where(i < size[some, None], (starts[row] + begin)[some, None] + i, -1))
            k = np.where(j < before[r], starts[stem[r]], starts[r] - before[r]) + j
            keys.append(np.where(j < (gone + size)[some, None], k, -1))
            self.classes.append(made)
        self._tokens = queries, keys
        self._places: dict[tuple[int, int], tuple[_Places, _Places]] = {}

    def places(self, heads: int, shared: int) -> tuple[_Places, _Places]:
        """Of the queries and of the keys, for so many heads that share so many key heads."""
        if (heads, shared) not in self._places:
            queries = _Places(self._tokens[0], shared, heads // shared, self.device)
            self._places[heads, shared] = queries, _Places(self._tokens[1], shared, 1, self.device)
        return self._places[heads, shared]

    def attend(self, layer, q, k, v, scale, window, cap):
        kind = q.device.type
        if torch.is_autocast_enabled(kind):
            q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
        return _Mix.apply(self, (scale, window, cap), q, k, v)


class _Places:
    """Where packed tokens lie for batched matmuls, class by class: [N, Hk·G, Dh] as [B, Hk, L·G, Dh] of each class in turn. A
    token may lie in several places; padding (-1) borrows token 0: nothing looks at it."""

    def __init__(self, tokens: list[np.ndarray], shared: int, group: int, device: Any):
        """tokens: int [B, L] of each class"""
        head = np.arange(shared)[:, None, None] * group + np.arange(group)  # [Hk, 1, G]
        index = np.concatenate(
            [np.where(t < 0, -1, t * (shared * group) + head).ravel() for t in (t[:, None, :, None] for t in tokens)]
        )
        there = np.flatnonzero(index >= 0)
        back = np.empty(index.max() + 1, np.int64)
        back[index[there]] = there
        self.heads, self.sizes = shared * group, [t.size * shared * group for t in tokens]
        self.index, self.back = (torch.from_numpy(x).to(device) for x in (index.clip(0), back))
        self.once = len(back) == len(there)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[N, Hk·G, Dh] -> [Σ B·Hk·L·G, Dh]"""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.index)

    def spread_once(self, x: torch.Tensor) -> torch.Tensor:
        """The same where each token lies in one place, with zeros for padding."""
        return x.new_zeros(len(self.index), x.shape[-1]).index_copy_(0, self.back, x.reshape(-1, x.shape[-1]))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[Σ B·Hk·L·G, Dh] -> the sums [N, Hk·G, Dh]"""
        if self.once:
            rows = x.index_select(0, self.back)
        else:
            rows = x.new_zeros(len(self.back), x.shape[-1]).index_add_(0, self.index, x)
        return rows.view(-1, self.heads, x.shape[-1])


class _Mix(torch.autograd.Function):
    """Attention in classes: q [N, H, Dh], k and v [N, Hk, Dh] -> [N, H, Dh]. Back by hand: what autograd keeps and copies
    between the classes costs as much as their matmuls."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, how: Any, q: Any, k: Any, v: Any) -> Any:
        (scale, window, cap), (of_q, of_k) = how, rows.places(q.shape[1], k.shape[1])
        q, k, v = of_q.spread(q).mul_(scale), of_k.spread(k), of_k.spread(v)
        out, wanted = torch.empty_like(q), any(ctx.needs_input_grad)
        parts = zip(*(x.split(p.sizes) for x, p in ((q, of_q), (k, of_k), (v, of_k), (out, of_q))), strict=True)
        kept = [c.mix(x, window, cap, wanted) for c, x in zip(rows.classes, parts, strict=True)]
        if wanted:
            ctx.rows, ctx.scale, ctx.places = rows, scale, (of_q, of_k)
            ctx.graphs = [None if isinstance(x, torch.Tensor) else x for x in kept]
            ctx.save_for_backward(q, k, v, *(x if isinstance(x, torch.Tensor) else None for x in kept))
        return of_q.gather(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (q, k, v, *kept), (of_q, of_k) = ctx.saved_tensors, ctx.places
        grads = [torch.empty_like(x) for x in (q, k, v)]
        whole = zip((q, k, v, of_q.spread_once(grad), *grads), (of_q, of_k, of_k, of_q, of_q, of_k, of_k), strict=True)
        parts = zip(*(x.split(p.sizes) for x, p in whole), strict=True)
        for c, weights, graph, x in zip(ctx.rows.classes, kept, ctx.graphs, parts, strict=True):
            c.back(weights, graph, *x)
        (dq, dk, dv), ctx.graphs = grads, []
        return None, None, of_q.gather(dq).mul_(ctx.scale), of_k.gather(dk), of_k.gather(dv)


def _alike(own: np.ndarray, before: np.ndarray) -> list[np.ndarray]:
    """Classes of rows: from the longest on, until padding costs more scores than a class of its own is worth."""
    whole = own + before
    found: list[list[int]] = []
    longest = widest = waste = 0
    for r in np.lexsort((-own, -whole)).tolist():
        widest = max(widest, own[r])
        waste += widest * longest - own[r] * whole[r]
        if not found or waste > CLASS:
            found.append([])
            longest, widest, waste = whole[r], own[r], 0
        found[-1].append(r)
    return [np.array(rows) for rows in found]


class _Class:
    """B rows of up to Q queries, the first of them after ``before`` keys, and up to L keys."""

    def __init__(self, own: np.ndarray, before: np.ndarray, device: Any):
        self.shape = len(own), int(own.max()), int((own + before).max())
        self.causal = not before.any()
        gone = before[:1] if (before == before[0]).all() else before
        self.gone = torch.from_numpy(gone).to(device)  # [1] or [B]
        self.biases: dict[int | None, torch.Tensor] = {}

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[1 or B, 1, Q, L]. Padding stands to the right, so causality alone hides it."""
        if window not in self.biases:
            _, Q, L = self.shape
            i, j = (torch.arange(n, device=self.gone.device) for n in (Q, L))
            self.biases[window] = hidden_from(self.gone[:, None, None, None] + i[:, None] - j, window, dtype)
        return self.biases[window]

    def mix(self, tensors, window, cap, wanted):
        """Causal attention within rows: q [B·Hk·Q·G, Dh], already scaled, k and v [B·Hk·L, Dh], into out. Gives what `back`
        takes: the weights [B·Hk, Q·G, L], or of what is left to autograd the output and the inputs."""
        B, Q, L = self.shape
        q, k, v, out = tensors
        if L > PLAIN_UP_TO or cap is not None:
            with torch.set_grad_enabled(wanted):
                leaves = q, k, v = [x.detach().requires_grad_(wanted) for x in (q, k, v)]
                mixed = self._fused(q, k, v, window, cap)
            out.view(mixed.shape).copy_(mixed.detach())
            return mixed, leaves
        q, k, v, out = (x.view(len(k) // L, -1, x.shape[-1]) for x in (q, k, v, out))
        scores = q @ k.transpose(1, 2)
        scores.view(B, -1, Q, scores.shape[1] // Q, L).add_(self.bias(window, q.dtype).unsqueeze(3))
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        torch.bmm(weights, v, out=out)
        return weights

    def _fused(self, q, k, v, window, cap):
        """[B, Hk, Q, G, Dh]"""
        B, Q, L = self.shape
        k, v = (x.view(B, -1, L, x.shape[-1]) for x in (k, v))
        shape = *k.shape[:2], Q, -1, q.shape[-1]
        q = q.view(shape).transpose(2, 3).flatten(1, 2)
        if cap is not None:
            out = capped_attention(q, k, v, self.bias(window, q.dtype), cap)
        else:
            plain = self.causal and (window is None or window >= L)
            gqa, mask = q.shape[1] != k.shape[1], None if plain else self.bias(window, q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, scale=1.0, enable_gqa=gqa)
        return out.view(*shape[:2], -1, Q, shape[-1]).transpose(2, 3)

    def back(self, weights, graph, q, k, v, grad, dq, dk, dv):
        """Writes the gradients; that of q is by what was scaled."""
        if graph is not None:
            mixed, leaves = graph
            for d, made in zip((dq, dk, dv), torch.autograd.grad(mixed, leaves, grad.view(mixed.shape)), strict=True):
                d.copy_(made)
            return
        q, k, v, grad, dq, dk, dv = (x.view(len(weights), -1, x.shape[-1]) for x in (q, k, v, grad, dq, dk, dv))
        torch.bmm(weights.transpose(1, 2), grad, out=dv)
        inner = (grad @ v.transpose(1, 2)).float()
        inner = torch._softmax_backward_data(inner, weights.float(), -1, torch.float32).to(q.dtype)
        torch.bmm(inner, k, out=dq)
        torch.bmm(inner.transpose(1, 2), q, out=dk)


class Cache:
    """Keys and values of S slots of up to L tokens, of all layers: [layers, 2, S, Hk, L, Dh], L a multiple of `STEP`.

    Its memory is used again from one batch to the next: fresh pages cost more than zeros.
    """

    STEP: ClassVar[int] = 32

    def __init__(self, config: Any, slots: int, dtype: torch.dtype, device: Any):
        config = config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.memory = torch.empty(0, dtype=dtype, device=device)
        self.both = self.memory.view(config.num_hidden_layers, 2, slots, heads, 0, width)

    def restart(self, length: int) -> None:
        """Nothing but zeros, for sequences of ``length``."""
        shape = list(self.both.shape)
        shape[4] = -(-length // self.STEP) * self.STEP
        if math.prod(shape) > len(self.memory):
            self.memory = self.memory.new_empty(math.prod(shape))
        self.both = self.memory[: math.prod(shape)].zero_().view(shape)

    @property
    def length(self) -> int:
        return self.both.shape[4]

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Its keys and values, each [S, Hk, L, Dh]."""
        keys, values = self.both[number].unbind()
        return keys, values

    def grow(self, length: int, used: int) -> None:
        """Makes room for longer sequences; the first ``used`` slots keep what they hold."""
        if length > self.length:
            old = self.both[:, :, :used].clone()
            self.restart(length)
            self.both[:, :, :used, :, : old.shape[4]] = old

    def move(self, to: list[int], source: list[int]) -> None:
        """Copies slots ``source`` over slots ``to``."""
        a, b = torch.tensor([to, source], device=self.both.device)
        self.both.index_copy_(2, a, self.both.index_select(2, b))


class Prefill(Rows):
    """Prompts, written into cache slots on the way: ``slots`` int [K] each take the prompt ``source`` int [K]."""

    def __init__(self, lengths: torch.Tensor, cache: Cache, slots: torch.Tensor, source: torch.Tensor):
        super().__init__(lengths)
        self.grid = Grid(lengths)
        self.cache, self.slots, self.source = cache, slots, source

    def attend(self, layer, q, k, v, scale, window, cap):
        L = self.grid.shape[1]
        for cached, new in zip(self.cache.layer(layer), (k, v), strict=True):
            cached[self.slots, :, :L] = self.grid.spread(new)[self.source]
        return super().attend(layer, q, k, v, scale, window, cap)


class Decode:
    """One token for each of the slots 0..S-1, at positions ``pos`` int [S], all of them below ``longest``."""

    def __init__(self, cache: Cache, pos: torch.Tensor, longest: int):
        Hk, L, _ = cache.both.shape[3:]
        rows = torch.arange(len(pos) * Hk, device=pos.device).view(-1, Hk) * L
        self.places = (rows + pos[:, None]).flatten()  # of the new token, in a layer's keys as [slots·Hk·L, Dh]
        self.all = cache.both.flatten(2, 4).unbind()
        self.seen = cache.both[:, :, : len(pos), :, :longest].flatten(2, 3).unbind()  # each [2, S·Hk, longest, Dh]
        self.age = pos[:, None] - torch.arange(longest, device=pos.device)  # [S, longest]
        self.biases: dict[int | None, torch.Tensor] = {}

    def bias(self, window: int | None, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """[S·heads, 1, longest]"""
        if window not in self.biases:
            made = hidden_from(self.age[:, None, None], window, dtype)
            self.biases[window] = made.expand(-1, heads, -1, -1).flatten(0, 1)
        return self.biases[window]

    def attend(self, layer, q, k, v, scale, window, cap):
        _, Hk, Dh = k.shape
        for cached, new in zip(self.all[layer].unbind(), (k, v), strict=True):
            cached.index_copy_(0, self.places, new.reshape(-1, Dh))
        keys, values = self.seen[layer].unbind()
        folded, keys, bias = q.reshape(len(keys), -1, Dh), keys.transpose(1, 2), self.bias(window, Hk, q.dtype)
        if cap is None:
            scores = torch.baddbmm(bias, folded, keys, alpha=scale)
        else:
            scores = torch.tanh((folded @ keys).mul_(scale / cap)).mul_(cap).add_(bias)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights, values).view(q.shape)


def packs(config: Any) -> bool:
    """Whether an architecture is declared to be safe to pack, and its angles do not follow the longest row."""
    config = config.get_text_config()
    return config.model_type in PACKED and not stretches(getattr(config, "rope_parameters", None))
