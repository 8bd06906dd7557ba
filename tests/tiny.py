"""Tiny models of several stock architectures, and a character tokenizer, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from tutelage.types import Sample, Task

ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789+=:,"
VOCAB = 5 + len(ALPHABET)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "mistral-window": {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
    "gemma2": {
        "model_type": "gemma2",
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 3.0,
    },
}

HYBRID = {
    "model_type": "qwen3_next",
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "initializer_range": 0.1,  # at 0.25 keys of small norm amplify rounding to 1e-4
}
"""Gated delta rule and convolution in one layer, softmax attention in the other, experts in both."""
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
LONG |= {"original_max_position_embeddings": 6}
OTHERS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "hybrid": HYBRID,
    "undeclared": {"model_type": "bitnet", "num_key_value_heads": 2, "head_dim": 8},
    "longrope": {"rope_parameters": LONG},
}
"""Those that the packed path does not take, or not at every size; ``longrope`` changes its angles from the seventh token on."""


def config(name: str = "llama", **more: Any) -> dict[str, Any]:
    base = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.25,  # sharp enough that a wrong position shows
    }
    return {**base, "model_type": "llama", **(CONFIGS | OTHERS)[name], **more}


def model(name: str = "llama", seed: int = 0, **more: Any) -> Any:
    from tutelage.model.folder import make_model

    return make_model(config(name, **more), seed).eval()


def tokenizer() -> Any:
    from tutelage.text.tokenizer import character_tokenizer

    return character_tokenizer(ALPHABET)


def samples(lengths: list[int], seed: int = 0, prompt: int = 2) -> list[Sample]:
    """Random tokens; everything after the first ``prompt`` is trained."""
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(lengths):
        task = Task(f"t{i}", f"d{i % 2}", ({"role": "user", "content": "x"},))
        made.append(Sample(rng.integers(5, VOCAB, n), np.arange(n) >= prompt, task=task, group=task.id))
    return made
