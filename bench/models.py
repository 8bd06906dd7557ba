"""What the two sides of a bench share: models of some shapes with one set of weights, samples of mixed lengths, TRL's
trainers.

The peers are TRL 1.16's own trainers, built once and stepped by hand: their collator, `compute_loss` under their
autocast, their backward, clipping and fused AdamW, without data loading, logging and callbacks. What is left out is to
their favour.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from bench.harness import Run
from tutelage.learn.learner import Learner
from tutelage.learn.optim import AdamW
from tutelage.model.folder import make_model
from tutelage.text.tokenizer import character_tokenizer
from tutelage.types import Sample, Task

ADAMW = AdamW(lr=1e-4)
LLAMA = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "mini": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "tiny": {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
"""``tiny`` is the quickstart's 337k parameters, ``135m`` SmolLM2-135M's shape, ``1b`` TinyLlama's (for GPUs), ``mini`` for
tests."""


def sizes(run: Run, tiny: int, large: int, few: int) -> list[tuple[str, int]]:
    """(shape, rows) to measure: ``tiny`` and ``large`` rows on a processor, ``few`` of the smallest shape to see that it runs;
    more of them on a GPU, which has room for larger shapes."""
    if run.quick:
        return [("mini", few)]
    return [("135m", 8 * large), ("1b", 2 * large)] if run.device == "cuda" else [("tiny", tiny), ("135m", large)]


def model(shape: str, seed: int = 0, device: str = "cpu") -> Any:
    """With the library's packed attention."""
    config = {**LLAMA, "tie_word_embeddings": True, "initializer_range": 0.05, **SHAPES[shape]}
    return make_model(config, seed).eval().to(device)


def stock(ours: Any) -> Any:
    """The same weights, on the same device, under transformers' own fastest attention."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(ours.config)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    made.load_state_dict(ours.state_dict())
    return made.eval().to(ours.device)


@cache
def tokenizer(shape: str) -> Any:
    """One character a token, as many as the shape's vocabulary has."""
    size = SHAPES[shape]["vocab_size"] - 5
    made = character_tokenizer("".join(chr(0x4E00 + i if i < 20000 else 0x10000 + i) for i in range(size)))
    made.padding_side = "left"
    return made


def lengths(n: int, mean: float = 64, longest: int = 256, seed: int = 0) -> list[int]:
    """Mixed lengths as replies have them: geometric, at least 4 and at most ``longest``, the mean held."""
    rng = np.random.default_rng(seed)
    found = np.clip(4 + rng.exponential(mean - 4, n), 4, longest)
    for _ in range(20):
        found = np.clip(4 + (found - 4) * (mean - 4) / max(1e-9, found.mean() - 4), 4, longest)
    return [int(x) for x in found.round()]


def samples(
    shape: str, replies: Sequence[int], prompt: int = 16, group: int = 1, domains: Sequence[str] = ("a",), seed: int = 0
) -> list[Sample]:
    """Random tokens; ``group`` samples in a row share their prompt, and their domain."""
    rng = np.random.default_rng(seed)
    vocab = SHAPES[shape]["vocab_size"]
    made: list[Sample] = []
    for i, n in enumerate(replies):
        if i % group == 0:
            asked = rng.integers(5, vocab, prompt)
            name = f"t{i // group}"
            task = Task(name, domains[(i // group) % len(domains)], ({"role": "user", "content": "x"},))
        tokens = np.concatenate([asked, rng.integers(5, vocab, n)])
        made.append(Sample(tokens, np.arange(len(tokens)) >= prompt, task=task, group=name))
    return made


def learner(ours: Any, dtype: str = "float32") -> Learner:
    return Learner(ours, ADAMW, clip=1.0, micro_tokens=8192, dtype=dtype)


# --- TRL -------------------------------------------------------------------------------------------------------------------


def arguments(kind: Any, dtype: str, ours: Any, **more: Any) -> Any:
    """A TRL config for one step by hand on our model's device: the library's optimizer settings, no checkpointing, nothing
    reported."""
    fields: dict[str, Any] = {"output_dir": tempfile.mkdtemp(prefix="bench-"), "report_to": [], "save_strategy": "no"}
    fields |= {
        "use_cpu": ours.device.type == "cpu",
        "bf16": dtype == "bfloat16",
        "gradient_checkpointing": False,
        "max_grad_norm": 1.0,
    }
    fields |= {"optim": "adamw_torch_fused", "learning_rate": ADAMW.lr, "weight_decay": 0.0, "disable_tqdm": True}
    fields |= {"adam_beta1": ADAMW.betas[0], "adam_beta2": ADAMW.betas[1], "adam_epsilon": ADAMW.eps}
    return kind(**{**fields, **more})


class Peer:
    """One TRL trainer and the micro-batches of one global batch."""

    def __init__(self, trainer: Any, parts: Sequence[dict[str, Any]], count: int | None = None):
        on = lambda x: x.to(trainer.accelerator.device) if isinstance(x, torch.Tensor) else x  # noqa: E731
        self.trainer, self.parts = trainer, [{k: on(v) for k, v in part.items()} for part in parts]
        self.count = None if count is None else on(torch.tensor(count))
        trainer.current_gradient_accumulation_steps = len(parts)
        trainer.model.train()
        trainer.create_optimizer()

    def backward(self, teachers: Sequence[Any] = ()) -> float:
        """Adds the batch's gradient; part i under ``teachers[i]``, where there are several. The loss."""
        total = 0.0
        for i, part in enumerate(self.parts):
            if teachers:
                self.trainer.teacher_model = teachers[i]
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.trainer.model, dict(part), num_items_in_batch=self.count)
            if self.count is None:  # the loss is a mean over its part
                loss = loss / len(self.parts)
            self.trainer.accelerator.backward(loss)
            total += float(loss.detach())
        return total

    def step(self, teachers: Sequence[Any] = ()) -> None:
        """One optimizer step."""
        self.backward(teachers)
        self.trainer.accelerator.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad(set_to_none=True)

    def proof(self, teachers: Sequence[Any] = ()) -> tuple[float, dict[str, Any]]:
        """(loss, gradients), which are cleared again."""
        from bench.harness import gradients

        loss = self.backward(teachers)
        found = gradients(self.trainer.model)
        self.trainer.optimizer.zero_grad(set_to_none=True)
        return loss, found


def proof(learner: Learner, forward_backward: Callable[[], float]) -> tuple[float, dict[str, Any]]:
    """Our (loss, gradients), which are cleared again."""
    from bench.harness import gradients

    loss = forward_backward()
    found = gradients(learner.model)
    for p in learner.model.parameters():
        p.grad = None
    return loss, found


def padded(parts: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """What GRPO's and the distillation trainer's own preparation makes: prompts padded left, replies right."""
    from trl.trainer.utils import pad

    both = [(torch.tensor(s.tokens[~s.mask]), torch.tensor(s.tokens[s.mask])) for s in parts]
    sides = {"prompt": ([p for p, _ in both], "left"), "completion": ([c for _, c in both], "right")}
    made = {}
    for which, (rows, side) in sides.items():
        made[f"{which}_ids"] = pad(rows, padding_value=0, padding_side=side)
        made[f"{which}_mask"] = pad([torch.ones_like(r) for r in rows], padding_value=0, padding_side=side)
    return made


def by_length(parts: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Micro-batches of like lengths, as TRL's ``group_by_length`` sampling makes them."""
    ordered = sorted(parts, key=lambda s: len(s.tokens))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
