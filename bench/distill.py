"""On-policy distillation over the full vocabulary: one update on given samples of mixed lengths, the teachers' forward
included.

``opd`` is against TRL's DistillationTrainer with β = 1 (reverse KL), ``mopd-4`` against a loop by hand over it: one
micro-batch a domain, each under its own teacher, one optimizer step. The rollout is not part of it (rollout.py, grpo.py).
"""

from __future__ import annotations

import asyncio
from typing import Any

from bench.harness import Record, Run, compared, prove, worst
from bench.models import Peer, arguments, learner, lengths, model, padded, proof, samples, sizes, stock, tokenizer
from bench.work import learning
from tutelage.credit.base import CreditContext
from tutelage.credit.teacher import Teacher, distinct
from tutelage.learn.learner import Learner, ModelScorer
from tutelage.losses.distill import FullReverseKL
from tutelage.types import Sample

NAMES = ("opd", "mopd-4")
TARGET = 2.2


class Ours:
    """A learner, its teachers by domain, and one update under them."""

    def __init__(self, student: Learner, teachers: dict[str, ModelScorer], rows: list[Sample]):
        self.student, self.rows = student, rows
        self.context = CreditContext(1.0, teachers)  # type: ignore[arg-type]
        self.extras = {"teacher_heads": tuple(s.head for s in distinct(self.context.teachers))}

    def backward(self) -> float:
        rows, _ = asyncio.run(Teacher(want="hidden").assign(self.rows, self.context))
        return self.student.forward_backward(rows, FullReverseKL(), 1.0, self.extras)["loss"]

    def step(self) -> None:
        self.backward()
        self.student.step()


def peer(ours: Any, teachers: list[Any], shape: str, parts: list[list[Sample]], dtype: str) -> Peer:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    args = arguments(DistillationConfig, dtype, ours, per_device_train_batch_size=8, beta=1.0, temperature=1.0)
    trainer = DistillationTrainer(
        stock(ours),
        teacher_model=stock(teachers[0]),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer(shape),
    )
    return Peer(trainer, [padded(part) for part in parts], sum(int(s.mask.sum()) for part in parts for s in part))


def pair(shape: str, n: int, domains: tuple[str, ...], dtype: str, device: str = "cpu") -> tuple[Ours, Peer, list[Any]]:
    """(ours, TRL's, its teachers), proven equal in fp32."""
    rows = samples(shape, lengths(n), domains=domains)
    parts = [[s for s in rows if s.domain == d] for d in domains]
    ours, teachers = model(shape, device=device), [model(shape, i + 1, device) for i in range(len(domains))]
    named = {d: ModelScorer(d, t) for d, t in zip(domains, teachers, strict=True)}
    others = [stock(t) for t in teachers]
    exact = Ours(learner(ours), named, rows)
    prove("opd", proof(exact.student, exact.backward), peer(ours, teachers, shape, parts, "float32").proof(others))
    return Ours(learner(ours, dtype), named, rows), peer(ours, teachers, shape, parts, dtype), others


def bench(run: Run) -> list[Record]:
    found: dict[str, list[Record]] = {name: [] for name in NAMES}
    for name, domains in zip(NAMES, (("a",), ("a", "b", "c", "d")), strict=True):
        for shape, n in sizes(run, 64, 8, 8):
            if shape == "1b" and len(domains) > 1:
                continue  # ten whole models in fp32
            mine, other, teachers = pair(shape, n, domains, run.dtype, run.device)
            sides = {"tutelage": mine.step, "TRL": lambda other=other, teachers=teachers: other.step(teachers)}
            found[name].append(compared(run, f"{name}, {shape}", TARGET, sides, learning(mine.student.model, mine.rows, 1)))
    return [worst(name, records) for name, records in found.items()]
