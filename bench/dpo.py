"""DPO: one optimizer step on pairs of mixed lengths, against TRL's DPOTrainer, the reference's log-probs known beforehand."""

from __future__ import annotations

from typing import Any

from bench.harness import Record, Run, compared, prove, worst
from bench.models import Peer, arguments, learner, lengths, model, proof, samples, sizes, stock, tokenizer
from bench.work import learning
from tutelage.learn.learner import ModelScorer
from tutelage.losses.preference import DPO
from tutelage.types import Sample

NAMES = ("dpo",)
TARGET = 1.8
LOSS = DPO(beta=0.1)


def pairs(shape: str, n: int, device: str = "cpu") -> list[Sample]:
    """Chosen and rejected side by side, with the log-probs of another model as their reference's."""
    rows = samples(shape, lengths(2 * n), group=2)
    for i, sample in enumerate(rows):
        sample.pair = str(i // 2)
    signals = ModelScorer("reference", model(shape, 1, device)).score(rows, 1.0, "logp")
    for sample, signal in zip(rows, signals, strict=True):
        sample.signals["ref_logp"] = signal
    return rows


def peer(ours: Any, shape: str, rows: list[Sample], dtype: str, parts: int) -> Peer:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    args = arguments(DPOConfig, dtype, ours, precompute_ref_log_probs=True, beta=LOSS.beta, max_length=None)
    text = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    trainer = DPOTrainer(stock(ours), args=args, train_dataset=text, processing_class=tokenizer(shape))
    listed = []
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        row = {"prompt_ids": chosen.tokens[~chosen.mask].tolist()}
        for name, sample in (("chosen", chosen), ("rejected", rejected)):
            row[f"{name}_ids"] = sample.tokens[sample.mask].tolist()
            row[f"ref_{name}_logps"] = float(sample.signals["ref_logp"].values.sum())
        listed.append(row)
    listed.sort(key=lambda r: max(len(r["chosen_ids"]), len(r["rejected_ids"])))
    size = len(listed) // parts
    collate = DataCollatorForPreference(0)
    return Peer(trainer, [collate(listed[i : i + size]) for i in range(0, len(listed), size)])


def pair(shape: str, n: int, dtype: str, device: str = "cpu") -> tuple[Any, list[Sample], dict[str, Peer]]:
    """(our learner, rows, TRL's), proven equal in fp32."""
    rows, ours = pairs(shape, n, device), model(shape, device=device)
    ways = {"TRL padded": 1, "TRL padded, four parts by length": 4}
    exact = learner(ours)
    mine = proof(exact, lambda: exact.forward_backward(rows, LOSS)["loss"])
    for name, parts in ways.items():
        prove(f"dpo, {name}", mine, peer(ours, shape, rows, "float32", parts).proof())
    return learner(ours, dtype), rows, {name: peer(ours, shape, rows, dtype, parts) for name, parts in ways.items()}


def bench(run: Run) -> list[Record]:
    found = []
    for shape, n in sizes(run, 32, 4, 4):
        mine, rows, others = pair(shape, n, run.dtype, run.device)

        def step(mine: Any = mine, rows: list[Sample] = rows) -> None:
            mine.forward_backward(rows, LOSS)
            mine.step()

        sides = {"tutelage": step, **{name: other.step for name, other in others.items()}}
        note = "reference log-probs precomputed on both sides"
        found.append(compared(run, f"dpo, {shape}", TARGET, sides, learning(mine.model, rows), note))
    return [worst("dpo", found)]
