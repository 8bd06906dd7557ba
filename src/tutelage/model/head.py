"""The output head on its own: hidden states to logits, cut to the true vocabulary.

Kept apart so that a teacher's logits can be rebuilt from its cached hidden states (DeepSeek V4, arXiv 2606.19348), and so
that log-probs are computed only where the mask is true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Fields by which architectures scale their logits (Cohere's, Falcon H1's, Granite's), and the power they stand in."""


@dataclass
class Head:
    """``head(hidden [m, >= width]) -> logits [m, V]`` in fp32; picklable."""

    weight: torch.Tensor
    """[V, width]"""
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    """What the logits are multiplied by, before the cap."""

    @classmethod
    def of(cls, model: Any, vocab: int | None = None) -> Head:
        """The head of a causal transformers model; ``vocab`` cuts padded rows off (151,936 against 152,064)."""
        layer = model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        config = model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        scale = 1.0
        for name, power in SCALES.items():
            scale *= (getattr(config, name, None) or 1.0) ** power
        return cls(layer.weight[:vocab], bias[:vocab] if bias is not None else None, cap, scale)

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def __call__(self, hidden: torch.Tensor, linear: Callable[..., torch.Tensor] = F.linear) -> torch.Tensor:
        """``linear``: what multiplies."""
        narrow = hidden if hidden.shape[1] == self.width else hidden[:, : self.width]
        logits = linear(narrow.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def back(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient by logits [m, V] -> by what the matmul gave, before scale and cap. Writes into its argument."""
        if self.softcap is not None:
            gradient = gradient.mul_(1 - (logits / self.softcap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)
