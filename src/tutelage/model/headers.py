"""What a saved model folder says of itself without loading a tensor, so that planning needs no torch.

What can be known to be wrong without torch is refused here, at plan time: missing, cut or foreign files, a vocabulary that the
embedding has no rows for, a chat template that does not parse. What needs the tokenizer itself is checked by
text/template.py when the model is imported.

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


POINTER = b"version https://git-lfs"
"""How a Git LFS pointer begins: the small file that stands where a large one was not fetched."""
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that must hold an object. Raises `UserError` naming it."""
    try:
        raw = file.read_bytes()
        if raw.startswith(POINTER):
            raise UserError(f"{file} is a Git LFS pointer, not the file; run `git lfs pull` in {file.parent}")
        found = json.loads(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}; give a folder saved by transformers with its tokenizer") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object")
    return found


def need_folder(folder: Path) -> None:
    """Raises `UserError` for what is no folder with files in it."""
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give a folder saved by transformers with its tokenizer")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder that holds config.json, weights and tokenizer")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(f"{folder} is a PEFT adapter, not a whole model; merge it into its base with peft and give that folder")
    if not any(folder.iterdir()):
        raise UserError(f"{folder} is empty; give a folder saved by transformers with its tokenizer")


# --- weights -----------------------------------------------------------------------------------------------------------


def folder_params(folder: Path) -> int:
    """Matmul parameters with the output head, without the embedding look-up, from the safetensors headers.

    Raises `UserError` for a folder without readable, whole weights.
    """
    shapes = tensor_shapes(folder)
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) >= 2}
    embedding = sum(size for name, size in sizes.items() if _embeds(name))
    tied = read_object(folder / "config.json").get("tie_word_embeddings", "lm_head.weight" not in shapes)
    return sum(sizes.values()) - (0 if tied else embedding)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that transformers would load. Raises `UserError` for missing, cut or foreign files."""
    index = folder / "model.safetensors.index.json"
    listed: dict[str, str] = {}
    if index.exists():
        listed = read_object(index).get("weight_map") or {}
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise UserError(f"{index} has no weight_map of tensors and their files; save the model with safetensors")
    elif not (folder / "model.safetensors").exists():
        raise UserError(_no_weights(folder))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(listed.values())) or ["model.safetensors"]:
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}, which {index.name} names; copy all of the model's files")
        shapes |= _shapes(folder / name)
    lost = sorted(listed.keys() - shapes.keys())
    if lost:
        raise UserError(f"{folder / listed[lost[0]]} has no tensor {lost[0]!r}, which {index.name} says it has")
    return shapes


def _no_weights(folder: Path) -> str:
    others = sorted(f.name for e in ("safetensors", "bin", "pth", "gguf") for f in folder.glob(f"*.{e}"))
    if any(name.endswith(".safetensors") for name in others):
        return f"{folder} has {others[0]}, but neither model.safetensors nor model.safetensors.index.json to say what it is"
    has = f" (it has {', '.join(others[:3])})" if others else ""
    return f"{folder} has no *.safetensors weights{has}; save the model with safetensors"


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape from a safetensors header, held against the file's size."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = int.from_bytes(head, "little")
        if POINTER.startswith(head) and head:
            raise UserError(
                f"{file} is a Git LFS pointer, not the weights (a header is longer than the file); "
                f"run `git lfs pull` in {file.parent}"
            )
        if len(head) < 8 or length + 8 > size:
            raise UserError(f"{file} is no safetensors file, or cut short: its header is longer than the file; copy it again")
        try:
            entries = {n: e for n, e in json.loads(handle.read(length)).items() if n != "__metadata__"}
            end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{file} is no safetensors file: {type(error).__name__}: {error}") from None
    if end != size:
        how = "cut short" if size < end else "too long"
        raise UserError(f"{file} is {how}: its header speaks of {end} bytes, and it has {size}; copy it again")
    return shapes


def _embeds(name: str) -> bool:
    return "embed_tokens" in name or "wte" in name


# --- the tokenizer -----------------------------------------------------------------------------------------------------


def check_vocabulary(folder: Path, config: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises `UserError` where ``tokenizer.json`` gives an id that the embedding has no row for."""
    shapes = tensor_shapes(folder)
    rows = next((shape[0] for name, shape in shapes.items() if _embeds(name) and shape), None)
    if rows is None:
        raise UserError(f"{folder} has weights without an input embedding (embed_tokens); save the whole model")
    if config.get("vocab_size") != rows:
        said = config.get("vocab_size")
        raise UserError(f"{folder}: config.json has vocab_size {said}, the embedding {rows} rows; save both together")
    file = folder / "tokenizer.json"
    if not file.exists():
        return
    ids = _token_ids(file)
    last = max(ids, key=ids.__getitem__, default="")
    if ids and ids[last] >= rows:
        raise UserError(
            f"{folder}: token {last!r} has id {ids[last]}, but the embedding has {rows} rows; "
            "take the model's own tokenizer, or resize its embedding"
        )
    decoder = settings.get("added_tokens_decoder")
    known = ids.keys() | {token_text(t) for t in (decoder.values() if isinstance(decoder, dict) else ())}
    for name in SPECIAL:
        token = token_text(settings.get(name))
        if token and token not in known and max(ids.values(), default=-1) + 1 >= rows:
            raise UserError(
                f"{folder}: {name} {token!r} of tokenizer_config.json is not in tokenizer.json, and the embedding has no row "
                "left for it; name a token that is there"
            )


def token_text(value: Any) -> str:
    """A special token as tokenizer_config.json holds it: a text, or an object with ``content``."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _token_ids(file: Path) -> dict[str, int]:
    """Token -> id. Raises `UserError`."""
    body = read_object(file)
    try:
        vocab = body["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        return ids | {token["content"]: token["id"] for token in body.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no tokenizer of transformers ({type(error).__name__}: {error}); save it again") from None


def chat_template(folder: Path, settings: dict[str, Any]) -> str:
    """The folder's chat template. Raises `UserError` where it has none, or one that does not parse."""
    from tutelage.text.template import parse_template

    file = folder / "chat_template.jinja"
    try:
        found = file.read_text("utf-8") if file.exists() else settings.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8: {error}") from None
    if isinstance(found, list):  # several by name, as older folders have them
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(found, str) or not found.strip():
        raise UserError(
            f"{folder} has no chat template; save one with the tokenizer as chat_template.jinja "
            "(that of the model's chat version, where it has one)"
        )
    where = str(file) if file.exists() else f"{folder / 'tokenizer_config.json'}, chat_template"
    parse_template(found, where)
    return found
