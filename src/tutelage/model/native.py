"""The compiled step of decoding (decode.c): found, told the model's shape, and called.

It is built with the package where there is a C compiler, and used for fp32 on a processor. Everywhere else lean.py does the
same. Reads the parameters it found at first at every call, so updates in place need no word; others in their stead do.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from tutelage.model.lean import LeanBody

PARTS = (
    *("before", "q", "k", "v", "q.bias", "k.bias", "v.bias", "q_norm", "k_norm", "o", "o.bias", "after"),
    *("gate", "up", "gate.bias", "up.bias", "down", "down.bias"),
)
"""A layer's parameters in the order of decode.c."""
FEW = 256
"""Most rows for which its products are the faster ones."""


class Shape(ctypes.Structure):
    """As in decode.c."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("layers", "width", "heads", "shared", "head", "inner")),
        *((name, ctypes.c_long) for name in ("slots", "length", "rows", "turns", "threads")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """None where the package was built without it, for another machine, or of another version."""
    found = find_spec("tutelage.model._decode")
    if found is None or found.origin is None:
        return None
    try:
        made = ctypes.CDLL(found.origin)
        sizes = (ctypes.c_long * 2).in_dll(made, "tutelage_sizes")
    except (OSError, ValueError):
        return None
    if list(sizes) != [ctypes.sizeof(Shape), len(PARTS)]:
        return None
    many = ctypes.c_long
    made.tutelage_step.argtypes = [ctypes.POINTER(Shape), *[ctypes.c_void_p] * 9]
    made.tutelage_linear.argtypes, made.tutelage_linear.restype = [*[ctypes.c_void_p] * 4, *[many] * 4], None
    return made


class NativeBody:
    """The last tokens of some slots to last hidden states; see `of`."""

    def __init__(self, lean: LeanBody, step: Any):
        self.lean, self.step = lean, step
        layers, body = lean.layers, lean.body
        self.parameters = [_part(layer, name) for layer in layers for name in PARTS]
        self.windows = np.array([layer.window or 0 for layer in layers], np.int64)
        one, width = layers[0], body.embed_tokens.weight.shape[1]
        self.shape = Shape(
            layers=len(layers),
            width=width,
            heads=len(one.q.weight) // one.width,
            shared=len(one.k.weight) // one.width,
            head=one.width,
            inner=len(one.gate.weight),
            eps=one.before.variance_epsilon,
            scale=one.scale,
        )

    @classmethod
    def of(cls, lean: LeanBody | None) -> NativeBody | None:
        """None where there is no compiled step, or the model is not what it computes."""
        found = library()
        if lean is None or found is None or lean.layers[0].width % 8:
            return None
        made = cls(lean, found.tutelage_step)
        fixed = (lean.body.embed_tokens.weight, lean.body.norm.weight)
        return made if _fit(*fixed, *made.parameters) else None

    def __call__(self, ids: torch.Tensor, pos: torch.Tensor, cache: Any, longest: int) -> torch.Tensor:
        """ids and pos int [S] of the slots 0..S-1, positions below ``longest`` -> [S, D]. Writes the cache."""
        turns, shape = self.lean.angles(longest), self.shape
        shape.slots, _, shape.length, _ = cache.both.shape[2:]
        shape.rows, shape.turns, shape.threads = len(ids), turns.shape[1], torch.get_num_threads()
        weights = np.array([0 if x is None else x.data_ptr() for x in self.parameters], np.uintp)
        stream = turns.new_empty(len(ids), shape.width)
        inputs = [cache.both, ids.long().contiguous(), pos.long().contiguous()]
        inputs += [self.lean.body.embed_tokens.weight, turns, self.lean.body.norm.weight, stream]
        pointers = [weights.ctypes.data, self.windows.ctypes.data, *(x.data_ptr() for x in inputs)]
        if self.step(shape, *pointers):
            raise MemoryError("no memory for a step of decoding")
        return stream


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` of few rows, for generation: [m, n] -> [m, N], without gradients."""
    found = library()
    if found is None or len(x) > FEW or x.shape[1:] != weight.shape[1:] or not _fit(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    y = x.new_empty(len(x), len(weight))
    inputs = [weight.data_ptr(), 0 if bias is None else bias.data_ptr(), x.data_ptr(), y.data_ptr()]
    found.tutelage_linear(*inputs, len(x), x.shape[1], len(weight), torch.get_num_threads())
    return y


def _part(layer: Any, name: str) -> torch.Tensor | None:
    module = getattr(layer, name.removesuffix(".bias"))
    return None if module is None else module.bias if name.endswith(".bias") else module.weight


def _fit(*tensors: torch.Tensor | None) -> bool:
    return all(x is None or (x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous()) for x in tensors)
