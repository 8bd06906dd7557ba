"""Optimizers and schedules as specs. The optimizers themselves are PyTorch's (Muon with fp32 arithmetic, learn/muon.py).

Muon (Jordan et al., 2024) takes the matrices inside the layers; embeddings, the output head, norms and biases go to AdamW,
as its authors advise.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from tutelage.spec import Spec

Share = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Spec):
    """`torch.optim.AdamW` (Loshchilov and Hutter, arXiv 1711.05101)."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)

    def build(self, model: Any) -> list[Any]:
        """Optimizers over the trainable parameters."""
        return [self.over([p for p in model.parameters() if p.requires_grad])]

    def over(self, params: list[Any]) -> Any:
        from torch.optim import AdamW as Torch

        return Torch(params, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True)


class Muon(Spec):
    """`tutelage.learn.muon.Muon` on the layers' matrices, `AdamW` on the rest."""

    lr: float = Field(2e-2, gt=0)
    momentum: Share = 0.95
    weight_decay: float = Field(0.0, ge=0)
    rest: AdamW = AdamW(lr=4e-3)

    def build(self, model: Any) -> list[Any]:
        from tutelage.learn.muon import Muon as Torch

        ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        params = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in params if p.ndim == 2 and id(p) not in ends]
        chosen = {id(p) for p in matrices}
        others = [p for p in params if id(p) not in chosen]
        return [
            Torch(matrices, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay),
            self.rest.over(others),
        ]


class Schedule(Spec):
    """Learning-rate factor over a stage's steps: linear warm-up, then constant, linear or cosine decay to ``floor``."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)
    """steps"""
    floor: float = Field(0.0, ge=0, le=1)
    """fraction of the peak at the last step"""

    def factor(self, step: int, total: int) -> float:
        """For the update after ``step`` finished ones, of ``total``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, total - self.warmup))
        fall = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.floor + (1 - self.floor) * fall
