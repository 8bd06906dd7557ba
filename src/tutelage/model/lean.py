"""The body of a Llama-like decoder in few calls, for drawing: the model's own weights, without its modules.

A step of decoding does little arithmetic in many small calls, and at a small model the calls are what costs. This is the same
forward (embedding, then norm, attention with rotary positions, norm and gated MLP, each added to the stream, then a norm) with
rotations of queries and keys in one go by angles looked up, in-place sums and nothing that a layout makes superfluous. It reads
the modules' parameters at every call, so updates in place need no word.

Leaves out: gradients (model/body.py has them); adapters, experts and every architecture not in `LEAN`, which go through their
own modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tutelage.model.headers import stretches

LEAN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
LINEAR = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's parts, found once: asking for them by name at every step would cost as much as some of them do."""

    number: int
    before: Any
    q: Any
    k: Any
    v: Any
    q_norm: Any
    """None where heads are not normed"""
    k_norm: Any
    o: Any
    after: Any
    gate: Any
    up: Any
    down: Any
    width: int
    """of a head"""
    scale: float
    window: int | None


def plain(model: Any, idle: bool = False) -> bool:
    """Whether the model's layers are what this computes; ``idle``: they are where no adapter is active just now."""
    config = model.config.get_text_config()
    if config.model_type not in LEAN or config.hidden_act != "silu" or stretches(getattr(config, "rope_parameters", None)):
        return False
    linear = (layer.get_submodule(name) for layer in model.get_decoder().layers for name in LINEAR)
    return all(type(_base(x) if idle else x) is torch.nn.Linear for x in linear)


def _base(layer: Any) -> Any:
    """What a layer is while no adapter of it takes part, whose weight and bias it has as its own; else itself."""
    return layer if getattr(layer, "active_adapters", True) else layer.base_layer


class LeanBody:
    """Tokens to last hidden states; see `of`."""

    def __init__(self, model: Any):
        self.body = model.get_decoder()
        self.layers = [layer_of(i, layer, model.config.get_text_config()) for i, layer in enumerate(self.body.layers)]
        self.turns = self._turns(0)

    @classmethod
    def of(cls, model: Any) -> LeanBody | None:
        """None where the model's layers are not what this computes."""
        return cls(model) if plain(model) else None

    def __call__(self, ids: torch.Tensor, pos: torch.Tensor, layout: Any, longest: int) -> torch.Tensor:
        """ids and pos int [N], positions below ``longest`` -> [N, D]. Only without gradients: sums are taken in place."""
        stream = self.body.embed_tokens.weight.index_select(0, ids)
        cos, sin = self.angles(longest).index_select(1, pos).unsqueeze(2)  # [N, 1, Dh]
        for layer in self.layers:
            _add(stream, self._attention(layer, _norm(layer.before, stream), cos, sin, layout), layer.o)
            x = _norm(layer.after, stream)
            _add(stream, F.silu(_linear(layer.gate, x), inplace=True).mul_(_linear(layer.up, x)), layer.down)
        return _norm(self.body.norm, stream)

    def angles(self, longest: int) -> torch.Tensor:
        """Of at least so many positions; see `_turns`."""
        if longest > self.turns.shape[1]:
            self.turns = self._turns(2 * longest)
        return self.turns

    def _turns(self, length: int) -> torch.Tensor:
        """Cosines and signed sines of so many positions [2, length, Dh]: what a head and the same head with its halves
        swapped are multiplied by."""
        weight = self.body.embed_tokens.weight.detach()  # tells dtype and device
        like, pos = weight[:1, None], torch.arange(length, device=weight.device)
        cos, sin = (x[0] for x in self.body.rotary_emb(like, pos[None]))
        half = sin.shape[-1] // 2
        return torch.stack((cos, torch.cat((-sin[:, :half], sin[:, half:]), -1))).detach()

    def _attention(self, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: Any) -> torch.Tensor:
        """[N, D] -> what the heads say [N, H·Dh]"""
        N = len(x)
        q, k, v = (_linear(p, x).view(N, -1, layer.width) for p in (layer.q, layer.k, layer.v))
        if layer.q_norm is not None:
            q, k = _norm(layer.q_norm, q), _norm(layer.k_norm, k)
        H, both = q.shape[1], torch.cat((q, k), 1)
        turned = (both * cos).addcmul_(both.roll(layer.width // 2, -1), sin)
        return layout.attend(layer.number, turned[:, :H], turned[:, H:], v, layer.scale, layer.window, None).reshape(N, -1)


def layer_of(number: int, layer: Any, config: Any) -> Layer:
    own, mlp = layer.self_attn, layer.mlp
    of = {"mistral": config, "qwen2": own, "qwen3": own}.get(config.model_type)  # as the architecture's own module tells it
    normed = config.model_type == "qwen3"
    return Layer(
        number,
        before=layer.input_layernorm,
        **{x: getattr(own, f"{x}_proj") for x in "qkvo"},
        q_norm=own.q_norm if normed else None,
        k_norm=own.k_norm if normed else None,
        after=layer.post_attention_layernorm,
        **{x: getattr(mlp, f"{x}_proj") for x in ("gate", "up", "down")},
        width=own.head_dim,
        scale=own.scaling,
        window=getattr(of, "sliding_window", None),
    )


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _norm(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight
    return F.rms_norm(x, weight.shape, weight, layer.variance_epsilon)


def _add(stream: torch.Tensor, x: torch.Tensor, layer: Any) -> None:
    stream.addmm_(x, layer.weight.t())
    if layer.bias is not None:
        stream.add_(layer.bias)
