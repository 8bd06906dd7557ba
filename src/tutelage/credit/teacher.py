"""Teachers: each sample is shown to the one teacher of its domain, under the temperature it was sampled at.

The routing of multi-teacher on-policy distillation (MiMo-V2-Flash, arXiv 2601.02780, section on MOPD): one teacher per
prompt, by domain, never an average. Samples are sorted by teacher, so that one teacher is resident at a time
(DeepSeek V4, arXiv 2606.19348). The teacher's log-probs are written as they are: the advantage is formed in the loss
(losses/distill.py), where the student's present log-probs are.

Leaves out: balancing response tokens between domains (only their share is logged), and schedules over a teacher's
checkpoints (the stage hands over other teachers).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import Field

from tutelage.credit.base import Credit, CreditContext, Scorer
from tutelage.losses.base import Metrics
from tutelage.spec import SpecError
from tutelage.types import Sample, Signal

GIVES = {
    "logp": frozenset({"teacher_logp"}),
    "hidden": frozenset({"teacher_hidden", "teacher"}),
    "topk": frozenset({"teacher_topk", "teacher_topk_logp"}),
}


class Teacher(Credit):
    """Writes ``teacher_logp`` [T_sel], or ``teacher_hidden`` [T_sel, Dmax] and ``teacher`` int [T_sel], or ``teacher_topk`` int
    [T_sel, k] and ``teacher_topk_logp`` [T_sel, k + 1], whose last column is the log of the mass outside.

    ``teacher`` indexes `distinct`; hidden states of narrower teachers are zero-padded on the right to the widest of the
    step. Samples without trained tokens are dropped. Raises `SpecError` for a domain that has no teacher.
    """

    want: Literal["logp", "hidden", "topk"] = "logp"
    """``logp`` for losses of the sampled token, ``hidden`` for those over the vocabulary, ``topk`` for the top-k forms"""
    k: int = Field(64, ge=1)
    """how many tokens ``topk`` keeps (MOPD: 64)"""

    def gives(self) -> frozenset[str]:
        return GIVES[self.want]

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        route(samples, ctx.teachers)
        kept = [s for s in samples if s.mask.any()]
        for i, teacher in enumerate(distinct(ctx.teachers)):
            mine = [s for s in kept if ctx.teachers[s.domain] is teacher]
            if not mine:
                continue
            # in a thread: the event loop never runs torch
            await asyncio.to_thread(self._ask, teacher, i, mine, ctx.temperature)
        if self.want == "hidden":
            widen(kept)
        return kept, token_share(kept, ctx.teachers)

    def _ask(self, teacher: Scorer, i: int, mine: Sequence[Sample], temperature: float) -> None:
        """Writes the signals of one teacher, number ``i``, onto its samples."""
        import numpy as np

        if self.want == "topk":
            for sample, (ids, logps) in zip(mine, teacher.topk(mine, temperature, self.k), strict=True):
                check(sample, ids, teacher)
                check(sample, logps, teacher)
                sample.signals |= {"teacher_topk": ids, "teacher_topk_logp": logps}
            return
        for sample, signal in zip(mine, teacher.score(mine, temperature, self.want), strict=True):
            check(sample, signal, teacher)
            sample.signals[f"teacher_{self.want}"] = signal
            if self.want == "hidden":
                which = np.full(len(signal.index), i, np.int64)
                sample.signals["teacher"] = Signal(which, signal.index, {"model": teacher.name})


def distinct(teachers: Mapping[str, Scorer]) -> list[Scorer]:
    """Each teacher once, in the order of its first domain by name: what the signal ``teacher`` indexes, and so the order
    of ``batch.extras["teacher_heads"]``."""
    return list({id(teachers[domain]): teachers[domain] for domain in sorted(teachers)}.values())


def route(samples: Iterable[Sample], teachers: Mapping[str, Scorer]) -> None:
    """Raises `SpecError` naming every domain that has no teacher, and the teachers there are."""
    orphans = sorted({s.domain for s in samples} - set(teachers))
    if orphans:
        names = ", ".join(repr(d) for d in orphans)
        there = ", ".join(f"{d} ({teachers[d].name})" for d in sorted(teachers)) or "none"
        raise SpecError(f"no teacher for domain {names}; teachers: {there}. Name one, or leave the domain out of the tasks")


def check(sample: Sample, signal: Signal, teacher: Scorer) -> None:
    """Raises `ValueError` where a signal is not at the trained positions, or not at the temperature of the sampling."""
    import numpy as np

    if not np.array_equal(signal.index, sample.trained) or len(signal.values) != len(signal.index):
        raise ValueError(f"teacher {teacher.name!r} did not score exactly the trained tokens of a sample")
    sampled = sample.signals.get("behaviour_logp")
    pair = (signal.provenance.get("temperature"), sampled.provenance.get("temperature") if sampled else None)
    if None not in pair and pair[0] != pair[1]:
        raise ValueError(f"teacher {teacher.name!r} scored at temperature {pair[0]}, but the sample was drawn at {pair[1]}")


def widen(samples: Sequence[Sample]) -> None:
    """Zero-pads ``teacher_hidden`` on the right to the widest, so that samples of several teachers pack together."""
    import numpy as np

    widest = max((s.signals["teacher_hidden"].values.shape[1] for s in samples), default=0)
    for sample in samples:
        old = sample.signals["teacher_hidden"]
        if missing := widest - old.values.shape[1]:
            sample.signals["teacher_hidden"] = Signal(np.pad(old.values, ((0, 0), (0, missing))), old.index, old.provenance)


def token_share(samples: Sequence[Sample], domains: Iterable[str]) -> Metrics:
    """``token_share/<domain>``: trained tokens of the domain, over all trained tokens."""
    tokens = {domain: sum(int(s.mask.sum()) for s in samples if s.domain == domain) for domain in sorted(domains)}
    everything = float(sum(tokens.values()))
    return {f"token_share/{domain}": (float(n), everything) for domain, n in tokens.items()}
