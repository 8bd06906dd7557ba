"""The body of a Llama-like decoder for training and scoring in fp32: the model's own weights, without its modules.

The same forward as the modules' (model/lean.py says which), with the steps between its matmuls as functions whose gradient is
written by hand: autograd would take each apart into many passes over [N, D], and keep what lies between. Kept are the stream
where a norm reads it, queries, keys, values and the weights of attention, and gate and up; what is quickly made again is.
Gradients through layers that share their input are summed in one place. A rotation of two halves of a head is one product of
complex numbers once rows of the queries' and keys' weights are paired, which no inner product sees.

Leaves out: autocast, weights in other dtypes, active adapters, experts and every architecture not in `LEAN`; these go through
their own modules. Gradients of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tutelage.model.lean import Layer, layer_of, plain


def lean_states(model: Any, ids: torch.Tensor, pos: torch.Tensor, layout: Any) -> torch.Tensor | None:
    """ids and pos int [N] -> the last hidden states [N, D]; None where the model's layers are not what this computes."""
    if not plain(model, idle=True) or model.dtype != torch.float32 or torch.is_autocast_enabled(ids.device.type):
        return None
    body, config = model.get_decoder(), model.config.get_text_config()
    stream = body.embed_tokens(ids)
    cos, sin = (x[0, :, None, : x.shape[-1] // 2] for x in body.rotary_emb(stream[None], pos[None]))
    turn = torch.complex(cos, sin)  # [N, 1, Dh/2]
    for number, modules in enumerate(body.layers):
        layer = layer_of(number, modules, config)
        q, k, v = _heads(layer, stream, turn)
        mixed = layout.attend(number, q, k, v, layer.scale, layer.window, None).flatten(1)
        stream = torch.addmm(stream, mixed, layer.o.weight.t())
        if layer.o.bias is not None:
            stream = stream + layer.o.bias
        first = (p for linear in (layer.gate, layer.up) for p in (linear.weight, linear.bias))
        gate, up = _NormLinear.apply(layer.after.variance_epsilon, stream, layer.after.weight, *first)
        stream = _GatedDown.apply(stream, gate, up, layer.down.weight, layer.down.bias)
    return _Norm.apply(body.norm.variance_epsilon, stream, body.norm.weight)


def _heads(layer: Layer, stream: torch.Tensor, turn: torch.Tensor) -> Iterator[torch.Tensor]:
    """Queries [N, H, Dh], keys and values [N, Hk, Dh], the first two with paired halves, and turned."""
    norm, width = layer.before, layer.width
    pairs = [_paired(p, width) for linear in (layer.q, layer.k) for p in (linear.weight, linear.bias)]
    made = _NormLinear.apply(norm.variance_epsilon, stream, norm.weight, *pairs, layer.v.weight, layer.v.bias)
    q, k, v = (x.view(len(stream), -1, width) for x in made)
    for x, each in ((q, layer.q_norm), (k, layer.k_norm)):
        if each is not None:
            x = _Norm.apply(each.variance_epsilon, x, _paired(each.weight, width))
        yield torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    yield v


def _paired(x: torch.Tensor | None, width: int) -> torch.Tensor | None:
    """Rows [H·Dh, ...], of each head the first half's beside the second half's: 0, Dh/2, 1, Dh/2 + 1, ..."""
    return None if x is None else x.view(-1, 2, width // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _root(x: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., D] -> [..., 1], what RMSNorm multiplies by (arXiv 1910.07467, equation 4)"""
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


def _norm_back(grad: torch.Tensor, unit: torch.Tensor, root: torch.Tensor, weight: torch.Tensor) -> tuple[Any, Any]:
    """The gradients by x and by weight of unit · weight, with unit = x · root, from ``grad``, which it writes over."""
    both = grad * unit
    along = (both @ weight).div_(-weight.numel()).unsqueeze(-1)
    return grad.mul_(weight).addcmul_(unit, along).mul_(root), both.flatten(0, -2).sum(0)


class _Norm(torch.autograd.Function):
    """RMSNorm of x [..., D]."""

    @staticmethod
    def forward(ctx: Any, eps: float, x: Any, weight: Any) -> Any:
        root = _root(x, eps)
        ctx.save_for_backward(x, root, weight)
        return (x * root).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, root, weight = ctx.saved_tensors
        return None, *_norm_back(grad.clone(), x * root, root, weight)


class _NormLinear(torch.autograd.Function):
    """RMSNorm of x [N, D], then linear layers side by side, each a weight [D', D] and a bias or None -> [N, D'] each."""

    @staticmethod
    def forward(ctx: Any, eps: float, x: Any, norm: Any, *linear: Any) -> Any:
        root = _root(x, eps)
        ctx.save_for_backward(x, root, norm, *linear)
        h = (x * root).mul_(norm)
        return tuple(F.linear(h, w, b) for w, b in zip(linear[::2], linear[1::2], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, root, norm, *linear = ctx.saved_tensors
        unit, made = x * root, []
        h = unit * norm
        for grad, by_weight, by_bias in zip(grads, ctx.needs_input_grad[3::2], ctx.needs_input_grad[4::2], strict=True):
            made += [grad.t() @ h if by_weight else None, grad.sum(0) if by_bias else None]
        back = grads[0] @ linear[0]
        for grad, weight in zip(grads[1:], linear[2::2], strict=True):
            back.addmm_(grad, weight)
        return None, *_norm_back(back, unit, root, norm), *made


class _GatedDown(torch.autograd.Function):
    """SwiGLU (arXiv 2002.05202) after its two first layers, on top of the stream: stream [N, D], gate and up [N, I], the last
    layer's weight [D, I] and a bias or None -> [N, D]."""

    @staticmethod
    def forward(ctx: Any, stream: Any, gate: Any, up: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(gate, up, weight)
        out = torch.addmm(stream, F.silu(gate).mul_(up), weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        gate, up, weight = ctx.saved_tensors
        opened, (*_, by_weight, by_bias) = F.silu(gate), ctx.needs_input_grad
        made = grad.t() @ (opened * up) if by_weight else None
        inner = grad @ weight
        by_up = opened.mul_(inner)
        by_gate = torch.ops.aten.silu_backward(inner.mul_(up), gate)
        return grad, by_gate, by_up, made, grad.sum(0) if by_bias else None
