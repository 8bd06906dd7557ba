"""SFT: one optimizer step on rows of mixed lengths, against TRL's SFTTrainer, the best of padded, sorted by length and
packed.
"""

from __future__ import annotations

from typing import Any

from bench.harness import Record, Run, compared, prove, worst
from bench.models import Peer, arguments, by_length, learner, lengths, model, proof, samples, sizes, stock, tokenizer
from bench.work import learning
from tutelage.losses.nll import NLL
from tutelage.types import Sample

NAMES = ("sft-mixed",)
TARGET = 2.0


def peers(ours: Any, shape: str, rows: list[Sample], dtype: str) -> dict[str, Peer]:
    """TRL's trainer in its configurations; packed needs no flash attention here: the mask keeps packed rows apart."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    count = sum(int(s.mask.sum()) for s in rows)

    def columns(parts: list[Sample]) -> dict[str, list[Any]]:
        labels = [[int(t) if m else -100 for t, m in zip(s.tokens, s.mask, strict=True)] for s in parts]
        return {"input_ids": [s.tokens.tolist() for s in parts], "labels": labels}

    def trainer() -> Any:
        args = arguments(SFTConfig, dtype, ours, per_device_train_batch_size=len(rows), max_length=None)
        return SFTTrainer(stock(ours), args, train_dataset=Dataset.from_dict(columns(rows)), processing_class=tokenizer(shape))

    def listed(parts: list[Sample]) -> list[dict[str, Any]]:
        return Dataset.from_dict(columns(parts)).to_list()

    plain, flat = DataCollatorForLanguageModeling(0), DataCollatorForLanguageModeling(0, padding_free=True)
    longest = max(len(s.tokens) for s in rows)
    packed = pack_dataset(Dataset.from_dict(columns(rows)), max(512, longest), "bfd").to_list()
    found = {
        "padded": Peer(trainer(), [plain(listed(rows))], count),
        "padded, four parts by length": Peer(trainer(), [plain(listed(p)) for p in by_length(rows, -(-len(rows) // 4))], count),
        "packed": Peer(trainer(), [flat([row]) for row in packed], count),
    }
    return {f"TRL {name}": peer for name, peer in found.items()}


def pair(shape: str, rows: list[Sample], dtype: str, device: str = "cpu") -> tuple[Any, dict[str, Peer]]:
    """(our learner, TRL's), proven equal in fp32."""
    ours = model(shape, device=device)
    exact = learner(ours)
    mine = proof(exact, lambda: exact.forward_backward(rows, NLL())["loss"])
    for name, peer in peers(ours, shape, rows, "float32").items():
        prove(f"sft, {name}", mine, peer.proof())
    return learner(ours, dtype), peers(ours, shape, rows, dtype)


def bench(run: Run) -> list[Record]:
    found = []
    for shape, n in sizes(run, 64, 8, 8):
        rows = samples(shape, lengths(n))
        mine, others = pair(shape, rows, run.dtype, run.device)

        def step(mine: Any = mine, rows: list[Sample] = rows) -> None:
            mine.forward_backward(rows, NLL())
            mine.step()

        sides = {"tutelage": step, **{name: peer.step for name, peer in others.items()}}
        found.append(compared(run, f"sft-mixed, {shape}", TARGET, sides, learning(mine.model, rows)))
    return [worst("sft-mixed", found)]
