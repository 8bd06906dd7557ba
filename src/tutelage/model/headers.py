"""What a saved model folder says of itself without loading a tensor, so that planning needs no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path


def folder_params(folder: Path) -> int:
    """Matmul parameters with the output head, without the embedding look-up, from the safetensors headers."""
    total = embedding = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name, entry in header.items():
            if name == "__metadata__" or len(entry["shape"]) < 2:
                continue
            size = math.prod(entry["shape"])
            if "embed_tokens" in name or "wte" in name:
                embedding += size
            else:
                total += size
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)
    return total + (embedding if tied else 0)
