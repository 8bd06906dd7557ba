"""What a saved model folder says of itself without loading a tensor, so that planning needs no torch.

What can be known to be wrong without torch is refused here, at plan time: missing, cut or foreign files, a vocabulary that the
embedding has no rows for, a chat template that does not parse, a model that is no causal decoder. What needs the tokenizer
itself is checked by text/template.py when the model is imported.

Leaves out: weights in formats other than safetensors.
"""

from __future__ import annotations

import ast
import json
import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tutelage.spec import UserError, suggest

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

PADDED = frozenset(
    {
        "apertus",
        "arcee",
        "bamba",
        "bloom",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "falcon",
        "falcon_h1",
        "falcon_mamba",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "jamba",
        "lfm2",
        "lfm2_moe",
        "mamba",
        "mamba2",
        "ministral",
        "ministral3",
        "mpt",
        "nemotron",
        "olmo_hybrid",
        "opt",
        "phi",
        "phi3",
        "phimoe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "seed_oss",
        "stablelm",
        "starcoder2",
        "vaultgemma",
    }
)
"""Architectures declared exact with padding on the left under a mask (each is held to that by a test), as those in `PACKED`
are too. What is in neither draws in batches of prompts of one length."""


POINTER = b"version https://git-lfs"
"""How a Git LFS pointer begins: the small file that stands where a large one was not fetched."""
EMBEDDINGS = ("embed_in", "word_embeddings", "embeddings")
"""What some families call the look-up of tokens; most say ``embed_tokens`` or ``wte``."""
LOOKED_UP = ("wpe", "embed_positions")
"""Look-ups of positions: no matmul."""
HEADS = ("lm_head.weight", "embed_out.weight")
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


# --- the architecture --------------------------------------------------------------------------------------------------


def need_decoder(folder: Path, config: dict[str, Any]) -> None:
    """Raises `UserError` for what is no causal text decoder that transformers has code for."""
    kind, fix = str(config.get("model_type")), "give the folder of a causal language model, such as a Llama or a Qwen"
    listed = config.get("architectures")
    names = ", ".join(map(str, listed)) if isinstance(listed, list) and listed else kind
    if any(isinstance(config.get(part), dict) for part in ("vision_config", "audio_config", "text_config")):
        raise UserError(
            f"{folder}: {names} is a model of images or sound with a language model in it; save its text model alone"
        )
    if config.get("is_encoder_decoder"):
        raise UserError(f"{folder}: {names} is an encoder-decoder; {fix}")
    if config.get("use_bidirectional_attention") in (True, "all"):
        raise UserError(f"{folder}: {names} is an encoder, which reads both ways; {fix}")
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "dynamic":
        raise UserError(
            f"{folder}: config.json has rope type 'dynamic', whose angles in transformers follow the longest row seen so far, "
            "so no result could be made twice; set it to 'default' or 'yarn'"
        )
    if kind in PACKED or not (decoders := transformers_table("CAUSAL_LM")):
        return
    if kind in transformers_table("MASKED_LM") and not config.get("is_decoder"):
        raise UserError(f"{folder}: {names} is an encoder, which reads both ways; {fix}")
    if kind not in decoders:
        own = ", and code of the folder's own is not run" if config.get("auto_map") else ""
        raise UserError(f"{folder}: architecture {kind!r} is no causal decoder of transformers{own}{suggest(kind, decoders)}")


@cache
def transformers_table(task: str) -> frozenset[str]:
    """The ``model_type`` names that transformers has a model for a task for, read from its source: importing it takes seconds.
    Empty where another version keeps the table elsewhere; then loading decides."""
    found = find_spec("transformers")
    file = Path(found.origin or "").parent / "models" / "auto" / "modeling_auto.py" if found else None
    if file is None or not file.exists():
        return frozenset()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == f"MODEL_FOR_{task}_MAPPING_NAMES":
            lists = (n for n in ast.walk(node.value) if isinstance(n, ast.List))
            return frozenset(pair[0] for pair in ast.literal_eval(next(lists)))
    return frozenset()


def attention(architecture: str, rope: Any = None) -> str:
    """In words, how the rows of an architecture share a forward."""
    if architecture in PACKED and not stretches(rope):
        return "packed"
    if architecture in PACKED | PADDED and stretches(rope):
        return f"one length a batch (the rotary angles of this {architecture} follow the longest row)"
    why = f"architecture {architecture} is not declared safe to pack"
    if architecture in PADDED:
        return f"padded ({why})"
    return f"padded, and drawn in batches of prompts of one length ({why}, nor to pad on the left)"


def stretches(rope: Any) -> bool:
    """Whether ``rope_parameters`` of a config make angles depend on the longest row of a batch."""
    if not isinstance(rope, dict):
        return False
    kind = rope.get("rope_type", rope.get("type"))
    return kind in ("longrope", "su") or any(map(stretches, rope.values()))


# --- weights -----------------------------------------------------------------------------------------------------------


def folder_params(folder: Path) -> int:
    """Matmul parameters with the output head, without the embedding look-up, from the safetensors headers.

    Raises `UserError` for a folder without readable, whole weights.
    """
    shapes = tensor_shapes(folder)
    sizes = {n: math.prod(shape) for n, shape in shapes.items() if len(shape) >= 2 and not any(w in n for w in LOOKED_UP)}
    embedding = sum(size for name, size in sizes.items() if _embeds(name))
    tied = read_object(folder / "config.json").get("tie_word_embeddings", not any(head in shapes for head in HEADS))
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
    return "embed_tokens" in name or "wte" in name or name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS


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
