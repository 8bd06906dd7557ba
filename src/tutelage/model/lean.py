"""The body of a Llama-like decoder in few calls, for drawing: the model's own weights, without its modules.

A step of decoding does little arithmetic in many small calls, and at a small model the calls are what costs. This is the same
forward (embedding, then norm, attention with rotary positions, norm and gated MLP, each added to the stream, then a norm) with
rotations of queries and keys in one go, in-place sums and nothing that a layout makes superfluous. It reads the modules'
parameters at every call, so updates in place need no word.

Leaves out: gradients, adapters, experts and every architecture not in `LEAN`; these go through their own modules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

LEAN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
LINEAR = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


class LeanBody:
    """Tokens to last hidden states; see `of`."""

    def __init__(self, model: Any):
        self.body, self.config = model.get_decoder(), model.config.get_text_config()

    @classmethod
    def of(cls, model: Any) -> LeanBody | None:
        """None where the model's layers are not what this computes."""
        config = model.config.get_text_config()
        if config.model_type not in LEAN or config.hidden_act != "silu":
            return None
        layers = model.get_decoder().layers
        plain = all(type(layer.get_submodule(name)) is torch.nn.Linear for layer in layers for name in LINEAR)
        return cls(model) if plain else None

    def __call__(self, ids: torch.Tensor, pos: torch.Tensor, layout: Any) -> torch.Tensor:
        """ids and pos int [N] -> [N, D]. Only without gradients: sums are taken in place."""
        stream = self.body.embed_tokens(ids)
        cos, sin = (x[0, :, None] for x in self.body.rotary_emb(stream[None], pos[None]))  # [N, 1, Dh]
        half = sin.shape[-1] // 2
        turn = cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)
        for number, layer in enumerate(self.body.layers):
            _add(
                stream,
                self._attention(number, layer, _norm(layer.input_layernorm, stream), turn, layout),
                layer.self_attn.o_proj,
            )
            x, mlp = _norm(layer.post_attention_layernorm, stream), layer.mlp
            _add(stream, F.silu(_linear(mlp.gate_proj, x), inplace=True).mul_(_linear(mlp.up_proj, x)), mlp.down_proj)
        return _norm(self.body.norm, stream)

    def _attention(self, number: int, layer: Any, x: torch.Tensor, turn: Any, layout: Any) -> torch.Tensor:
        """[N, D] -> what the heads say [N, H·Dh]"""
        own, N = layer.self_attn, len(x)
        q, k, v = (_linear(p, x).view(N, -1, own.head_dim) for p in (own.q_proj, own.k_proj, own.v_proj))
        if self.config.model_type == "qwen3":
            q, k = _norm(own.q_norm, q), _norm(own.k_norm, k)
        H, (cos, sin) = q.shape[1], turn
        both = torch.cat((q, k), 1)
        turned = (both * cos).addcmul_(both.roll(both.shape[-1] // 2, -1), sin)
        return layout.attend(number, turned[:, :H], turned[:, H:], v, own.scaling, self._window(own), None).reshape(N, -1)

    def _window(self, attention: Any) -> int | None:
        """As the architecture's own module tells the attention."""
        of = {"mistral": self.config, "qwen2": attention, "qwen3": attention}.get(self.config.model_type)
        return getattr(of, "sliding_window", None)


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _norm(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, layer.weight.shape, layer.weight, layer.variance_epsilon)


def _add(stream: torch.Tensor, x: torch.Tensor, layer: Any) -> None:
    stream.addmm_(x, layer.weight.t())
    if layer.bias is not None:
        stream.add_(layer.bias)
