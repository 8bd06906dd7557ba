"""Models as ordinary Hugging Face folders: make, load, save, count.

A folder that holds an adapter is loaded onto its base (adapter.py).

Leaves out: sharding. Loading from a hub name is transformers' own; stages hand over local folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutelage.model.padded import implementation
from tutelage.spec import UserError


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """A causal model in eval mode; of an adapter, its base with the adapter in it, all frozen. Its attention is the packed one
    where the architecture is declared safe to pack.

    Raises `UserError` for a folder that holds none.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from tutelage.model.adapter import FIRST, Base, is_adapter, load_adapter

    if is_adapter(folder):
        model = load_model(Base.of(folder).folder, dtype, device)
        load_adapter(model, folder, FIRST)
        return model
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is none that transformers can read: {one_line(error)}") from None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=implementation(config),
            ignore_mismatched_sizes=True,  # so that they are named below, in one line
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} has weights that transformers cannot load: {one_line(error)}") from None
    model, found = loaded
    for what, wrong in (("lacks", "missing_keys"), ("has another shape for", "mismatched_keys")):
        names = sorted(k if isinstance(k, str) else k[0] for k in found[wrong])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder} {what} tensor {names[0]!r}{more} of its config.json; copy the whole model again")
    return moved(model, device)


def moved(model: Any, device: str) -> Any:
    """A loaded model on a device, in eval mode; tied weights stay tied."""
    return model.to(device).eval()


def on_cpu(values: Any, made: dict[int, torch.Tensor] | None = None) -> Any:
    """Tensors, also in dicts, lists and tuples, on the CPU and without gradients; those that are there are not copied, and
    what is one tensor stays one."""
    made = {} if made is None else made
    if isinstance(values, torch.Tensor):
        return made.setdefault(id(values), values.detach().cpu())
    if isinstance(values, dict):
        return {name: on_cpu(each, made) for name, each in values.items()}
    return type(values)(on_cpu(each, made) for each in values) if isinstance(values, (list, tuple)) else values


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises `UserError` where there is none or it has no end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{folder} has no tokenizer that transformers can read: {one_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-sequence token; set eos_token in tokenizer_config.json")
    return tokenizer


def one_line(error: BaseException) -> str:
    """What a library says, on one line, cut."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes safetensors, config, tokenizer, chat template and generation config; stock transformers loads the folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=on_cpu(model.state_dict(keep_vars=True)))
    tokenizer.save_pretrained(folder)


def make_model(config: dict[str, Any], seed: int) -> Any:
    """A randomly initialised stock causal model. ``config`` holds ``model_type`` and that architecture's fields."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(made, attn_implementation=implementation(made), dtype=torch.float32)


def matmul_params(model: Any) -> int:
    """N of the FLOP counts: weights that take part in matmuls, with the output head, without the embedding look-up
    and without adapters."""
    head = model.get_output_embeddings()
    named = ((n, m) for n, m in model.named_modules() if not isinstance(m, torch.nn.Embedding) and m is not head)
    modules = [m for n, m in named if "lora_" not in n]
    body = sum(p.numel() for m in modules for p in m.parameters(recurse=False) if p.ndim >= 2)
    return body + head.weight.numel()
