"""Models as ordinary Hugging Face folders: make, load, save, count.

Leaves out: adapters and sharding. Loading from a hub name is transformers' own; stages hand over local folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutelage.model.attention import packs, register
from tutelage.model.headers import PACKED
from tutelage.spec import UserError


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """A causal model with packed attention, in eval mode. Raises `UserError` for a folder that holds none."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder)
    if not packs(config):
        valid = ", ".join(sorted(PACKED))
        raise UserError(f"{folder}: architecture {config.model_type!r} is not declared safe to pack; declared: {valid}")
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=getattr(torch, dtype), attn_implementation=register()
    )
    return _moved(model, device)


def _moved(model: Any, device: str) -> Any:
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises `UserError` where there is none or it has no end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no tokenizer that transformers can read: {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-sequence token; set eos_token in tokenizer_config.json")
    return tokenizer


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes safetensors, config, tokenizer, chat template and generation config; stock transformers loads the folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_model(config: dict[str, Any], seed: int) -> Any:
    """A randomly initialised stock causal model. ``config`` holds ``model_type`` and that architecture's fields."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(made, attn_implementation=register(), dtype=torch.float32)


def matmul_params(model: Any) -> int:
    """N of the FLOP counts: weights that take part in matmuls, with the output head, without the embedding look-up."""
    head = model.get_output_embeddings()
    modules = (m for m in model.modules() if not isinstance(m, torch.nn.Embedding) and m is not head)
    body = sum(p.numel() for m in modules for p in m.parameters(recurse=False) if p.ndim >= 2)
    return body + head.weight.numel()
