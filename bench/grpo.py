"""GRPO: one whole step on groups with replies of mixed lengths, against TRL's GRPOTrainer: the rollout and the update.

TRL's rollout is `generate` on the whole batch, as its trainer calls it; its update is the trainer's own loss. Its tokenising,
decoding and rewards are left out, on both sides. The record's ratio is of whole steps, its note has the update alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.harness import Record, Run, compared, prove, worst
from bench.models import Peer, arguments, learner, lengths, model, padded, proof, samples, sizes, stock, tokenizer
from bench.rollout import Load, draw, generate
from bench.work import drawing, learning
from tutelage.losses.policy import DAPO
from tutelage.rollout.local import LocalEngine
from tutelage.types import Sample, Signal

NAMES = ("grpo-mixed",)
TARGET = 3.5
LOSS = DAPO(clip_high=0.2)


def groups(shape: str, n: int, group: int = 8) -> list[Sample]:
    """With one advantage a reply."""
    rows = samples(shape, lengths(n), prompt=32, group=group)
    for sample, value in zip(rows, np.random.default_rng(1).normal(size=n), strict=True):
        sample.signals["advantage"] = Signal(np.full(len(sample.trained), value, np.float32), sample.trained)
    return rows


def peer(ours: Any, shape: str, rows: list[Sample], dtype: str, group: int = 8) -> Peer:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = arguments(
        GRPOConfig,
        dtype,
        ours,
        per_device_train_batch_size=len(rows),
        num_generations=group,
        loss_type="dapo",
        epsilon=LOSS.clip_low,
        epsilon_high=LOSS.clip_high,
        beta=0.0,
        temperature=1.0,
    )
    trainer = GRPOTrainer(
        stock(ours),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * len(rows)}),
        processing_class=tokenizer(shape),
    )
    inputs = padded(rows)
    inputs["advantages"] = torch.tensor([float(s.signals["advantage"].values[0]) for s in rows])
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return Peer(trainer, [inputs])


def pair(shape: str, rows: list[Sample], dtype: str, device: str = "cpu") -> tuple[Any, Peer]:
    """(our learner, TRL's), proven equal in fp32 on samples that are the policy's own."""
    ours = model(shape, device=device)
    exact = learner(ours)
    for sample, signal in zip(rows, exact.score(rows, 1.0, "logp"), strict=True):
        sample.signals["behaviour_logp"] = signal
    mine = proof(exact, lambda: exact.forward_backward(rows, LOSS)["loss"])
    prove("grpo", mine, peer(ours, shape, rows, "float32").proof())
    return learner(ours, dtype), peer(ours, shape, rows, dtype)


def bench(run: Run) -> list[Record]:
    found = []
    for shape, n in sizes(run, 128, 8, 8):
        rows = groups(shape, n)
        mine, other = pair(shape, rows, run.dtype, run.device)
        work = Load(shape, [tuple(s.tokens[~s.mask].tolist()) for s in rows], [int(s.mask.sum()) for s in rows], min(n, 64))
        engine = LocalEngine(mine.model, tokenizer(shape), work.slots, run.dtype)

        def update(mine: Any = mine, rows: list[Sample] = rows) -> None:
            mine.forward_backward(rows, LOSS)
            mine.step()

        def step(engine: Any = engine, work: Load = work, update: Any = update) -> None:
            engine.load(None, 0)
            draw(engine, work)
            update()

        def theirs(other: Peer = other, work: Load = work) -> None:
            with other.trainer.compute_loss_context_manager():
                generate(other.trainer.model.eval(), work, len(work.prompts))
            other.trainer.model.train()
            other.step()

        learnt = replace(learning(mine.model, rows), lengths=())
        alone = compared(run, f"grpo update alone, {shape}", TARGET, {"tutelage": update, "TRL": other.step}, learnt)
        whole = drawing(mine.model, work.prompts, work.replies) + learnt
        note = f"update alone {alone.ratio:.2f}"
        found.append(compared(run, f"grpo-mixed, {shape}", TARGET, {"tutelage": step, "TRL": theirs}, whole, note))
    return [worst("grpo-mixed", found)]
