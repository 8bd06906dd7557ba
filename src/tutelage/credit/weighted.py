"""Several teachers a prompt by declared weights, for `WeightedReverseKL` (DeepSeek V4, arXiv 2606.19348, Eq. 29).

Every domain of the stage says what each teacher weighs in it, by the teachers' own domains: ``{"math": {"math": 0.8, "code":
0.2}, "code": {"code": 1.0}}``. One teacher works at a time, on all samples that it has a weight in.

Leaves out: weights that a single prompt states, and the sampled token's log-probs (their mix would be one more average).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pydantic import Field

from tutelage.credit.base import Credit, CreditContext, Scorer
from tutelage.credit.teacher import check, distinct, token_share
from tutelage.losses.base import Metrics
from tutelage.spec import SpecError, suggest
from tutelage.types import Sample, Signal


class WeightedTeachers(Credit):
    """Writes ``teacher_hidden`` [T_sel, n, Dmax], ``teacher`` int [T_sel, n] and ``teacher_weight`` [T_sel, n], with n the most
    teachers that a sample of the step has; places that a sample has no teacher for are -1 with weight 0."""

    weights: dict[str, dict[str, float]] = Field(min_length=1)
    """domain -> the domain of a teacher -> w_i"""

    def gives(self) -> frozenset[str]:
        return frozenset({"teacher_hidden", "teacher", "teacher_weight"})

    def check(self, domains: Sequence[str], columns: Sequence[str], group: int) -> None:
        for domain in domains:
            if domain not in self.weights:
                raise SpecError(f"weights says nothing of domain {domain!r}; say who teaches it, such as {{{domain!r}: 1}}")
        for domain, row in self.weights.items():
            for name in (domain, *row):
                if name not in domains:
                    raise SpecError(f"weights names {name!r}, which is none of the stage's domains{suggest(name, domains)}")
            if not row or min(row.values()) <= 0:
                raise SpecError(f"the weights of {domain!r} must be positive; leave out a teacher that has none")

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        kept = [s for s in samples if s.mask.any()]
        found: dict[int, list[tuple[int, float, Signal]]] = {id(s): [] for s in kept}
        for i, teacher in enumerate(distinct(ctx.teachers)):
            mine = {id(s): w for s in kept if (w := self._weight(s.domain, teacher, ctx))}
            asked = [s for s in kept if id(s) in mine]
            # in a thread: the event loop never runs torch
            signals = await asyncio.to_thread(teacher.score, asked, ctx.temperature, "hidden") if asked else []
            for sample, signal in zip(asked, signals, strict=True):
                check(sample, signal, teacher)
                found[id(sample)].append((i, mine[id(sample)], signal))
        _write(kept, found)
        return kept, token_share(kept, ctx.teachers)

    def _weight(self, domain: str, teacher: Scorer, ctx: CreditContext) -> float:
        """What a teacher weighs in a domain: the sum over the domains that it is the teacher of."""
        return sum(w for name, w in self.weights[domain].items() if ctx.teachers[name] is teacher)


def _write(samples: Sequence[Sample], found: dict[int, list[tuple[int, float, Signal]]]) -> None:
    import numpy as np

    count = max(map(len, found.values()), default=0)
    widest = max((signal.values.shape[1] for each in found.values() for _, _, signal in each), default=0)
    for sample in samples:
        index = sample.trained
        hidden = np.zeros((len(index), count, widest), np.float32)
        which, weight = np.full((len(index), count), -1, np.int64), np.zeros((len(index), count), np.float32)
        about: dict[str, dict[str, float]] = {"models": {}}
        for place, (i, w, signal) in enumerate(found[id(sample)]):
            hidden[:, place, : signal.values.shape[1]] = signal.values
            which[:, place], weight[:, place] = i, w
            about["models"][str(signal.provenance.get("model", i))] = w
        signals = {"teacher_hidden": hidden, "teacher": which, "teacher_weight": weight}
        sample.signals |= {name: Signal(values, index, {**about}) for name, values in signals.items()}
