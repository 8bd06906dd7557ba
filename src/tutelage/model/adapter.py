"""LoRA adapters through peft: put into a model, switched, saved as PEFT folders, found again with their base.

The model stays the stock transformers module; peft's LoRA layers stand where its linear layers stood, so packed attention,
the local engine and the learner need not know. A saved adapter is an ordinary PEFT folder (``adapter_config.json``,
``adapter_model.safetensors``) with tokenizer, chat template and generation config. Its base is named twice: for peft, by a
hub's name or an absolute path in ``adapter_config.json``; for us, in ``base_model.json``, by a path relative to the folder,
which holds when the whole store moves, and by its content hash, which tells what to look for when the folder is alone.

Leaves out: adapters made elsewhere (their ``base_model.json`` is missing), and methods of peft other than LoRA.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage.model.headers import read_object
from tutelage.spec import UserError

CONFIG, WEIGHTS, REFERENCE = "adapter_config.json", "adapter_model.safetensors", "base_model.json"
HASHED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
FIRST, SECOND = "default", "stacked"
"""Names of adapters in a model that trains one."""
PREFIX = "base_model.model."
"""What peft puts before the module names of a saved adapter."""


# --- the base ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """The whole model that an adapter stands on."""

    folder: Path
    content: str = ""
    """the content hash of the folder, as the store publishes it"""
    hub: str = ""
    """the hub's name of what was imported, where the folder came from the hub's cache"""
    revision: str = ""

    @classmethod
    def of(cls, folder: Path) -> Base:
        """The base of an adapter's folder; a whole model is its own. Raises `UserError` where it is not there."""
        if not is_adapter(folder):
            return cls._imported(folder)
        said = read_object(folder / REFERENCE)
        base = (folder / str(said.get("path"))).resolve()
        if not (base / "config.json").exists():
            raise UserError(
                f"{folder} is an adapter of {base}, which is not there (content {said.get('content')}); copy the whole "
                "store, or open the adapter with peft and give it the base"
            )
        return cls(base, *(str(said.get(name, "")) for name in ("content", "hub", "revision")))

    @classmethod
    def _imported(cls, folder: Path) -> Base:
        """By the ``artifact.json`` beside the folder."""
        made = folder.parent / "artifact.json"
        meta = read_object(made) if made.exists() else {}
        path = str(meta.get("record", {}).get("path", ""))
        cached = re.search(r"models--([^/]+)/snapshots/([^/]+)", path)
        hub = (cached[1].replace("--", "/", 1), cached[2]) if cached else ("", "")
        return cls(folder, meta.get("content", {}).get(folder.name, ""), *hub)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


# --- in the model ------------------------------------------------------------------------------------------------------


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer with adapters, by its name."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def new_adapter(model: Any, name: str, rank: int, alpha: int, targets: Sequence[str], seed: int) -> None:
    """Adds an adapter with random A, drawn from ``seed`` alone, and B zero. Raises `UserError` for targets not there."""
    from peft import LoraConfig

    has = _linear(model)
    lost = sorted(set(targets) - has)
    if lost:
        kind = model.config.model_type
        raise UserError(f"adapter.targets: {lost[0]!r} is no linear layer of a {kind} model; it has {', '.join(sorted(has))}")
    asked = sorted(targets or has)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=asked, task_type="CAUSAL_LM")
    _inject(model, name, config, seed)
    if taken := sorted(set(asked) - set(config.target_modules or ())):  # by peft, for the experts of a mixture
        raise UserError(
            f"peft takes {', '.join(taken)} of a {model.config.model_type} model for its experts too, which have no adapters "
            f"here; set adapter.targets to others: {', '.join(sorted(has - set(taken)))}"
        )


def _linear(model: Any) -> set[str]:
    """The last part of the name of every linear layer, the output head left out."""
    head = model.get_output_embeddings()
    adapted = dict(lora_layers(model))
    plain = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    inside = {n for n in plain if any(n.startswith(f"{a}.") for a in adapted)}
    return {n.rpartition(".")[2] for n in (plain - inside) | adapted.keys()}


def _inject(model: Any, name: str, config: Any, seed: int) -> None:
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters in one model are meant here
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, name)
    model.eval()


def activate(model: Any, names: Sequence[str], train: str = "") -> None:
    """Lets exactly these adapters take part (none: the base alone), and only ``train`` have gradients."""
    for _, layer in lora_layers(model):
        layer.set_adapter(list(names), inference_mode=True)
    if train:
        model.requires_grad_(False)
        for _, layer in lora_layers(model):
            for part in (layer.lora_A, layer.lora_B):
                if train in part:
                    part[train].requires_grad_(True)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """What training changes, by name, on the CPU: the whole state, or of a model with an adapter that is trained the adapter
    alone."""
    from tutelage.model.folder import on_cpu

    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return on_cpu({n: t for n, t in model.state_dict(keep_vars=True).items() if n not in frozen})


def load_weights(model: Any, saved: dict[str, torch.Tensor]) -> None:
    """Takes `weights` back."""
    model.load_state_dict({**model.state_dict(), **saved})


# --- on disk -----------------------------------------------------------------------------------------------------------


def load_adapter(model: Any, folder: Path, name: str) -> None:
    """Adds a folder's adapter to its base, frozen, and makes it the active one. Raises `UserError` for what is damaged."""
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        config, found = LoraConfig.from_pretrained(str(folder)), load_file(file)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} has no adapter that peft can read: {said}; copy the whole folder again") from None
    config.inference_mode = True
    _inject(model, name, config, seed=0)
    into = {
        f"{PREFIX}{where}.{part}.weight": getattr(layer, part)[name].weight
        for where, layer in lora_layers(model)
        for part in ("lora_A", "lora_B")
        if name in getattr(layer, part)
    }
    for tensor in sorted(into.keys() | found.keys()):
        if tensor not in into or tensor not in found or into[tensor].shape != found[tensor].shape:
            raise UserError(f"{file} and {CONFIG} do not agree on tensor {tensor!r}; copy the whole adapter again")
        into[tensor].data.copy_(found[tensor])
    model.requires_grad_(False)
    activate(model, [name])


def save_adapter(model: Any, tokenizer: Any, folder: Path, base: Base) -> None:
    """Writes the active adapters as one PEFT folder; of several, A and B stand one behind the other, so ranks add up."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    for where, layer in lora_layers(model):
        names = [a for a in layer.active_adapters if a in layer.lora_A]
        a = torch.cat([layer.lora_A[n].weight for n in names])
        last, rank = where.rpartition(".")[2], len(a)
        ranks[last], alphas[last] = rank, max(1, round(layer.scaling[names[0]] * rank))
        scale = alphas[last] / rank  # the first adapter's own, wherever that leaves alpha whole: peft's is an integer
        b = torch.cat([layer.lora_B[n].weight * (layer.scaling[n] / scale) for n in names], 1)
        tensors |= {
            f"{PREFIX}{where}.{part}.weight": t.detach().cpu().contiguous() for part, t in (("lora_A", a), ("lora_B", b))
        }
    targets = sorted(ranks)
    rank, alpha = ranks[targets[0]], alphas[targets[0]]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={t: ranks[t] for t in targets if ranks[t] != rank},
        alpha_pattern={t: alphas[t] for t in targets if alphas[t] != alpha},
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.hub or str(base.folder),
        revision=base.revision or None,
        inference_mode=True,
    )
    config.target_modules = targets  # a list: peft writes a set in no fixed order
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    there: dict[str, Any] = {
        "path": os.path.relpath(base.folder, folder),
        "content": base.content,
        "hub": base.hub,
        "revision": base.revision,
    }
    there["adapter"] = {
        name: getattr(config, name) for name in HASHED
    }  # CONFIG holds a place, and stays out of the content hash
    (folder / REFERENCE).write_text(json.dumps(there, indent=1) + "\n", "utf-8")


def merged(folder: Path) -> Any:
    """The whole model of an adapter's folder: its product added to the weights of its base."""
    from peft import PeftModel

    from tutelage.model.folder import load_model

    return PeftModel.from_pretrained(load_model(Base.of(folder).folder), folder).merge_and_unload()
