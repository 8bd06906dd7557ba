"""Peak memory of SFT at the 135M shape on 4 rows of 512 tokens, against TRL's SFTTrainer as it comes (it checkpoints
activations).

Each side runs in a process of its own, `python -m bench.memory SIDE SHAPE DTYPE DEVICE`, which takes three steps and prints
what the resident memory (on a GPU, the allocator's) rose by over what stood after the imports, and the median time of its last
two steps.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from time import perf_counter
from typing import Any

from bench.harness import Record, Run
from bench.machine import most_memory, settle

NAMES = ("memory-135m",)
TARGET, FASTER = 0.75, 1.5


def most(device: str) -> float:
    """Largest memory so far: resident, or given out by the GPU's allocator [MiB]."""
    if device == "cuda":
        return most_memory(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def child(side: str, shape: str, dtype: str, device: str) -> dict[str, float]:
    """One side's memory [MiB], time [s], FLOPs and tokens of a step; to be called in a fresh process."""
    from bench.models import Peer, arguments, learner, model, samples, tokenizer
    from bench.work import learning
    from tutelage.losses.nll import NLL

    rows = samples(shape, [511] * 4, prompt=1)
    tokens = sum(int(s.mask.sum()) for s in rows)
    first = learner(model("mini", device=device))  # what libraries import at a first step is counted on neither side
    first.forward_backward(samples("mini", [4]), NLL())
    first.step()
    if side == "tutelage":
        base = most(device)
        mine = learner(whole := model(shape, device=device), dtype)

        def step() -> None:
            mine.forward_backward(rows, NLL())
            mine.step()
    else:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        base = most(device)
        labels = [[-100, *s.tokens[1:].tolist()] for s in rows]
        columns = {"input_ids": [s.tokens.tolist() for s in rows], "labels": labels}
        whole, data = model(shape, device=device), Dataset.from_dict(columns)
        args = arguments(SFTConfig, dtype, whole, gradient_checkpointing=True, per_device_train_batch_size=4, max_length=None)
        whole.set_attn_implementation("sdpa")  # in place: a copy would count
        trainer: Any = SFTTrainer(whole, args, train_dataset=data, processing_class=tokenizer(shape))
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        step = Peer(trainer, [DataCollatorForLanguageModeling(0)(data.to_list())], tokens).step
    times = []
    for _ in range(3):
        began = perf_counter()
        step()
        settle(device)
        times.append(perf_counter() - began)
    work = learning(whole, rows)
    memory = {"MiB": most(device) - base, "whole MiB": most(device), "s": statistics.median(times[1:])}
    return memory | {"flops": work.flops, "tokens": work.tokens}


def bench(run: Run) -> list[Record]:
    shape, sides = "mini" if run.quick else "135m", ("tutelage", "trl")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(min(run.rounds, 2)):
        for side in sides:
            words = [sys.executable, "-W", "ignore", "-m", "bench.memory", side, shape, run.dtype, run.device]
            out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            found[side].append(json.loads(out.splitlines()[-1]))
    middle = {s: {k: statistics.median(x[k] for x in f) for k in f[0]} for s, f in found.items()}
    run.details["memory-135m"] = [
        {"side": s, "wall s": m["s"], "tokens/s": m["tokens"] / m["s"], "of peak": m["flops"] / m["s"] / run.peak / 1e9}
        | {k: m[k] for k in ("MiB", "whole MiB")}
        for s, m in middle.items()
    ]
    ratios = [a["MiB"] / b["MiB"] for a, b in zip(*found.values(), strict=True)]
    mine, theirs = middle.values()
    speed = theirs["s"] / mine["s"]
    note = f"{mine['MiB']:.0f} against {theirs['MiB']:.0f} MiB over the imports; {speed:.2f}x as fast, to reach {FASTER}x"
    said = "; ".join(x for x in (note, run.why) if x)
    return [Record("memory-135m", mine["MiB"] / theirs["MiB"], min(ratios), max(ratios), TARGET, "of peer", said)]


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:])))
