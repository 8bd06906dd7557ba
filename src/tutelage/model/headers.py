"""What a saved model folder says of itself without loading a tensor, so that planning needs no torch.

Leaves out: weights in formats other than safetensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tutelage.spec import UserError

PACKED = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
"""Architectures (``model_type``) declared safe to pack: attention through the library's interface is their only path between
positions, and their logits are the output head of the last hidden state (each is held to that by a test)."""


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that must hold an object. Raises `UserError` naming it."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}; give a folder saved by transformers with its tokenizer") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object")
    return found


def folder_params(folder: Path) -> int:
    """Matmul parameters with the output head, without the embedding look-up, from the safetensors headers.

    Raises `UserError` for a folder without readable weights.
    """
    total = embedding = 0
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors weights; save the model with safetensors")
    for file in files:
        for name, entry in _header(file).items():
            if name == "__metadata__" or len(entry["shape"]) < 2:
                continue
            size = math.prod(entry["shape"])
            if "embed_tokens" in name or "wte" in name:
                embedding += size
            else:
                total += size
    tied = read_object(folder / "config.json").get("tie_word_embeddings", False)
    return total + (embedding if tied else 0)


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        try:
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file (a pointer to a large file, perhaps, not the file)")
            return dict(json.loads(handle.read(length)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is no safetensors file: {error}") from None
