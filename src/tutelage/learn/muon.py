"""Muon with its orthogonalisation in fp32.

`torch.optim.Muon` runs Newton-Schulz in bf16, which a processor without bf16 arithmetic emulates some thirty times slower
than fp32, and which would make results depend on the processor. State, options, weight decay and step sizes are PyTorch's;
only the update's number format differs. Matrices of one shape are orthogonalised together.

Leaves out: everything that is not a matrix (learn/optim.py gives it to AdamW).
"""

from __future__ import annotations

from typing import Any

import torch


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` in fp32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[torch.Tensor] = []
            grads: list[torch.Tensor] = []
            buffers: list[torch.Tensor] = []
            self._init_group(group, params, grads, buffers)
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            by_shape: dict[torch.Size, list[int]] = {}
            for i, p in enumerate(params):
                by_shape.setdefault(p.shape, []).append(i)
            for shape, members in by_shape.items():
                whole = orthogonal(torch.stack([updates[i] for i in members]), group["ns_coefficients"], group["ns_steps"])
                size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_add_([params[i] for i in members], list(whole.to(params[0].dtype)), alpha=-size)


def orthogonal(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """[B, m, n] -> its near-orthogonal factor, by the quintic Newton-Schulz iteration (Jordan et al., 2024), in fp32."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).float()
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
