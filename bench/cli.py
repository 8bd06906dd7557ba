"""Starting: how long the command line takes to answer, and how long a process takes to its first optimizer step.

``cli-plan`` is the slower of `tutelage --help` and `tutelage plan quickstart`, in seconds, and fails where torch was
imported. ``first-step`` is a whole `tutelage run` of a tiny model and one step of SFT, the model made and published on
the way, over a TRL script that loads such a model and takes one step of SFTTrainer on the same rows.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from time import perf_counter

from bench.harness import Record, Run, interleave

NAMES = ("cli-plan", "first-step")
ROOT = Path(__file__).parents[1]
ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789+="
RECIPE = f"""
from tutelage.graph import Goals
from tutelage.stages.files import Files
from tutelage.stages.fit import Fit
from tutelage.stages.model import NewModel


def recipe(seed: int = 0) -> Goals:
    init = NewModel(name="init", alphabet={ALPHABET!r})
    data = Files(name="data", path="rows.jsonl")
    sft = Fit(name="sft", model=init.out(), data=data.out(), steps=1, rows=8)
    return Goals(recipe="first", stages=(sft.out(),))
"""
SCRIPT = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Say(TrainerCallback):
    def on_step_end(self, *_, **__):
        print("sft done", flush=True)


tokenizer = AutoTokenizer.from_pretrained("model")
args = SFTConfig(
    "out", max_steps=1, per_device_train_batch_size=8, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
    save_strategy="no", disable_tqdm=True,
)
data = load_dataset("json", data_files="texts.jsonl", split="train")
SFTTrainer(AutoModelForCausalLM.from_pretrained("model"), args, train_dataset=data, processing_class=tokenizer,
           callbacks=[Say()]).train()
"""


def started(words: list[str], folder: str, *flags: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *flags, *words]
    return subprocess.run(words, cwd=folder, env=surroundings(folder), check=True, capture_output=True, text=True)


def surroundings(folder: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/cache"}


def until_done(words: list[str], folder: str) -> None:
    """Runs a process until it says that the step is done, and ends it there."""
    with Popen(
        [sys.executable, *words], cwd=folder, env=surroundings(folder), stdout=PIPE, stderr=DEVNULL, text=True
    ) as process:
        if not any("sft done" in line for line in process.stdout or ()):
            raise RuntimeError(f"{words} ended without its step")
        process.kill()


def answers(run: Run) -> Record:
    """cli-plan"""
    commands = {"tutelage --help": ["--help"], "tutelage plan quickstart": ["plan", "quickstart"]}
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands.items():
            imported = started(["-m", "tutelage", *words], folder, "-X", "importtime").stderr
            if re.search(r"\|\s+torch$", imported, re.MULTILINE):
                return Record("cli-plan", None, None, None, 1.0, "s", f"{name} imports torch")
        for _ in range(run.rounds):
            for name, words in commands.items():
                began = perf_counter()
                started(["-m", "tutelage", *words], folder)
                times.setdefault(name, []).append(perf_counter() - began)
    run.details["cli-plan"] = [
        {"side": n, "wall s": statistics.median(t), "min": min(t), "max": max(t)} for n, t in times.items()
    ]
    slowest = max(times.values(), key=statistics.median)
    return Record("cli-plan", statistics.median(slowest), min(slowest), max(slowest), 1.0, "s", "torch is not imported")


def first_step(run: Run) -> Record:
    from tutelage.model.folder import make_model, save_model
    from tutelage.text.tokenizer import character_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(16)]
        (place / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (place / "texts.jsonl").write_text("".join(json.dumps({"text": r["prompt"] + r["completion"]}) + "\n" for r in rows))
        (place / "recipe.py").write_text(RECIPE)
        (place / "script.py").write_text(SCRIPT)
        tokens = character_tokenizer(ALPHABET)
        config = {"model_type": "llama", "vocab_size": len(tokens), "hidden_size": 96, "intermediate_size": 256}
        config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "tie_word_embeddings": True}
        save_model(make_model(config, 0), tokens, place / "model")
        stores = iter(range(1_000_000))

        def ours() -> None:
            until_done(["-m", "tutelage", "run", "recipe.py", "--plain", "--store", f"store-{next(stores)}"], folder)

        timing = interleave({"tutelage run": ours, "TRL script": lambda: until_done(["script.py"], folder)}, run.rounds)
    run.details["first-step"] = [{k: v for k, v in row.items() if k not in ("cpu s", "MiB")} for row in timing.rows()]
    ratio, low, high = timing.ratio("tutelage run", "TRL script")
    note = "fp32; ours makes and publishes the model too"
    return Record("first-step", 1 / ratio, 1 / high, 1 / low, 0.7, "of peer", note)


def bench(run: Run) -> list[Record]:
    return [answers(run), first_step(run)]
