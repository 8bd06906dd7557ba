"""Several teachers a prompt, each with its weight: DeepSeek V4's full form (arXiv 2606.19348, Eq. 29).

    L = Σ_t Σ_i w_i KL(π_θ ‖ π_Ei)

Where the weights sum to 1 its gradient is that of the KL to one teacher, the normalised geometric mean Π π_Ei^w_i: no average
of probabilities. Who they are and what they weigh is declared, credit/weighted.py.

Leaves out: other divergences, weights that move.
"""

from __future__ import annotations

from typing import Any

from tutelage.losses.base import Metrics, Output
from tutelage.losses.distill import FullReverseKL
from tutelage.losses.policy import token_means, total
from tutelage.types import Batch


class WeightedReverseKL(FullReverseKL):
    """`FullReverseKL` to n teachers at every trained token.

    Reads ``teacher_hidden`` [M, n, Dmax], ``teacher`` int [M, n] (-1: no further one) and ``teacher_weight`` [M, n].
    """

    def needs(self) -> frozenset[str]:
        return super().needs() | {"teacher_weight"}

    def __call__(self, out: Output, batch: Batch) -> tuple[Any, Metrics]:
        hidden, teacher, weight = (batch.signals[name] for name in ("teacher_hidden", "teacher", "teacher_weight"))
        found = [self.at_tokens(out, batch, hidden[:, i], teacher[:, i]) for i in range(teacher.shape[1])]
        kl = sum(weight[:, i] * each for i, (each, _) in enumerate(found))
        return total(kl, batch, self.per), token_means(kl=kl, entropy=found[0][1])
