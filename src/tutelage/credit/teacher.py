"""Teachers: each sample is shown to the one teacher of its domain, under the temperature it was sampled at.

The routing of multi-teacher on-policy distillation (MiMo-V2-Flash, arXiv 2601.02780, section on MOPD): one teacher per
prompt, by domain, never an average. Samples are sorted by teacher, so that one teacher is resident at a time
(DeepSeek V4, arXiv 2606.19348). The teacher's log-probs are written as they are: the advantage is formed in the loss
(losses/distill.py), where the student's present log-probs are.

Leaves out: balancing response tokens between domains (only their share is logged), schedules over a teacher's
checkpoints (the stage hands over other teachers), and top-k signals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from tutelage.credit.base import Credit, CreditContext, Scorer
from tutelage.losses.base import Metrics
from tutelage.spec import SpecError
from tutelage.types import Sample, Signal


class Teacher(Credit):
    """Writes ``teacher_logp`` [T_sel], or ``teacher_hidden`` [T_sel, Dmax] and ``teacher`` int [T_sel].

    ``teacher`` indexes `distinct`; hidden states of narrower teachers are zero-padded on the right to the widest of the
    step. Samples without trained tokens are dropped. Raises `SpecError` for a domain that has no teacher.
    """

    want: Literal["logp", "hidden"] = "logp"
    """``logp`` for the sampled-token loss, ``hidden`` for the full-vocabulary one"""

    def gives(self) -> frozenset[str]:
        return frozenset({"teacher_logp"} if self.want == "logp" else {"teacher_hidden", "teacher"})

    async def assign(self, samples: Sequence[Sample], ctx: CreditContext) -> tuple[list[Sample], Metrics]:
        route(samples, ctx.teachers)
        kept = [s for s in samples if s.mask.any()]
        for i, teacher in enumerate(distinct(ctx.teachers)):
            mine = [s for s in kept if ctx.teachers[s.domain] is teacher]
            if not mine:
                continue
            # in a thread: the event loop never runs torch
            signals = await asyncio.to_thread(teacher.score, mine, ctx.temperature, self.want)
            for sample, signal in zip(mine, signals, strict=True):
                check(sample, signal, teacher)
                self._write(sample, signal, i, teacher)
        if self.want == "hidden":
            widen(kept)
        return kept, token_share(kept, ctx.teachers)

    def _write(self, sample: Sample, signal: Signal, i: int, teacher: Scorer) -> None:
        sample.signals[f"teacher_{self.want}"] = signal
        if self.want == "hidden":
            import numpy as np

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
