"""DPO: of two replies to one prompt the better one is to gain more on a reference (arXiv 2305.18290, Eq. 7).

    L = − Σ_pairs log σ(β [h(y_w) − h(y_l)]) + α Σ_pairs −log π_θ(y_w) / |y_w|
    h(y) = Σ_t log π_θ(y_t) − log π_ref(y_t),     divided by |y| where ``normalise`` is set

The length-normalised form is Tülu 3's (arXiv 2411.15124, section 5.1.2: β = 5), the second term that of iterative reasoning
preference optimisation (arXiv 2404.19733, Eq. 1), which Llama 3 takes with α = 0.2 (arXiv 2407.21783).

Leaves out: the other forms of the loss (IPO, KTO, label smoothing, weights), and where pairs come from.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from tutelage.losses.base import Loss, Metrics, Output
from tutelage.losses.policy import token_means
from tutelage.types import Batch


class DPO(Loss):
    """Direct preference optimisation. Reads signal ``ref_logp`` [M] and ``batch.pair``."""

    per: ClassVar[Literal["tokens", "rows", "pairs"]] = "pairs"
    beta: float = Field(0.1, gt=0)
    """β: how far the policy may leave the reference; the paper's 0.1 is for sums, Tülu 3's 5 for means"""
    normalise: bool = False
    """compare log-ratios a token instead of whole replies, so that a longer reply does not count more"""
    nll: float = Field(0.0, ge=0)
    """α: weight of the chosen reply's mean negative log-likelihood"""

    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logp"})

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        import torch

        chosen, rejected = rows_of_pairs(batch)
        lengths = batch.trow.bincount(minlength=len(batch.pair)).clamp(min=1)  # [R]
        summed = lambda x: x.new_zeros(len(lengths)).index_add(0, batch.trow, x)  # noqa: E731
        gain = summed(out.logp - batch.signals["ref_logp"])  # [R]
        if self.normalise:
            gain = gain / lengths
        margin = self.beta * (gain[chosen] - gain[rejected])
        nll = (-summed(out.logp) / lengths)[chosen]
        loss = -torch.nn.functional.logsigmoid(margin).sum()
        if self.nll:
            loss = loss + self.nll * nll.sum()
        rewards = {"reward_chosen": self.beta * gain[chosen], "reward_rejected": self.beta * gain[rejected]}
        return loss, token_means(margin=margin, accuracy=margin > 0, nll=nll, **rewards)


def rows_of_pairs(batch: Batch) -> tuple[Any, Any]:
    """Rows of the chosen and of the rejected replies, int [P] each. Raises `ValueError` where a pair is not whole."""
    order = batch.pair.argsort(stable=True)
    pairs = batch.pair[order]
    if len(pairs) % 2 or (pairs[::2] != pairs[1::2]).any() or (pairs[2::2] == pairs[:-2:2]).any() or (pairs < 0).any():
        raise ValueError("every pair needs exactly two rows in its micro-batch, the chosen reply first")
    return order[::2], order[1::2]
