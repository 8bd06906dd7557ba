"""GGUF, the one-file format of llama.cpp: what a file says of itself, read without numpy; and a Llama out of it.

A file is a header of typed metadata, a list of tensors and their data
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). `read_header` reads the first two, so that planning knows
tokenizer, template and sizes at once; what cannot be turned into a model here is refused then. Weights are dequantised to
fp32 by the library `gguf`: what quantisation has rounded away does not come back. llama.cpp stores the rows of the query
and key projections in the order of its own rotary embedding; `unpermuted` puts them back.

transformers reads GGUF files too, but splits text before numbers in another way than the tokenizer that such a file names.

Leaves out: architectures other than Llama, scaled rotary embeddings, SentencePiece vocabularies, byte orders other than
little-endian, files split in parts.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.spec import UserError, suggest

BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""Tensor types by number: name, values in a block, bytes of a block."""
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata types by number, as `struct` calls them; 8 is a text, 9 an array."""
TEXT, ARRAY = 8, 9
SPLITTERS = ("gpt-2", "smollm")
"""How text is cut before byte-pair merges (``tokenizer.ggml.pre``): as GPT-2 does, or so after each digit is set apart."""
CONTROL, USER_DEFINED = 3, 4
"""Token types: control tokens have no text of their own, user-defined ones are never split."""
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
"""transformers' name of a special token -> that of the metadata."""

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's name of a weight, without its block -> transformers'."""


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """rows first, as PyTorch has it"""
    type: int
    """of `BLOCKS`"""
    offset: int
    """from the beginning of the file"""

    @property
    def bytes(self) -> int:
        _, values, size = BLOCKS[self.type]
        return math.prod(self.shape) // values * size


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    file: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def need(self, name: str, kind: type = int) -> Any:
        """A value of the metadata. Raises `UserError` where it is missing or of another type."""
        found = self.meta.get(name)
        if not isinstance(found, kind):
            lacks = "has no" if found is None else f"has {type(found).__name__} for"
            raise UserError(f"{self.file} {lacks} {name}; convert the model again with llama.cpp's convert_hf_to_gguf.py")
        return found

    @property
    def tokens(self) -> list[str]:
        return list(self.need("tokenizer.ggml.tokens", list))

    @property
    def vocabulary(self) -> dict[str, Any]:
        """Everything that decides token ids."""
        prefix = "tokenizer.ggml."
        return {k.removeprefix(prefix): v for k, v in sorted(self.meta.items()) if k.startswith(prefix)}

    @property
    def template(self) -> str:
        return str(self.need("tokenizer.chat_template", str))

    @property
    def params(self) -> int:
        """N: matmul parameters with the output head, without the embedding look-up."""
        sizes = {t.name: math.prod(t.shape) for t in self.tensors.values() if len(t.shape) > 1}
        return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in self.tensors else 0)

    @property
    def types(self) -> dict[str, int]:
        """Tensors by the name of their type."""
        names = [BLOCKS[t.type][0] for t in self.tensors.values()]
        return {name: names.count(name) for name in sorted(set(names))}


# --- the file ----------------------------------------------------------------------------------------------------------


class _Reader:
    """Values of a header in turn."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def many(self, form: str, n: int) -> list[Any]:
        size = struct.calcsize(f"<{form}") * n
        if self.at + size > len(self.data):
            raise EOFError
        found = struct.unpack_from(f"<{n}{form}", self.data, self.at)
        self.at += size
        return list(found)

    def one(self, form: str) -> Any:
        return self.many(form, 1)[0]

    def text(self) -> str:
        length = self.one("Q")
        if self.at + length > len(self.data):
            raise EOFError
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.one(SCALARS[kind])
        inner, n = self.one("I"), self.one("Q")
        return self.many(SCALARS[inner], n) if inner in SCALARS else [self.value(inner) for _ in range(n)]


def read_header(file: Path) -> Header:
    """Metadata and tensors of a GGUF file. Raises `UserError` for what is none, is cut short or is of a foreign type."""
    try:
        with file.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise UserError(f"{file} is no GGUF file; give one that llama.cpp's convert_hf_to_gguf.py wrote")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(file, data)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except (EOFError, OverflowError, MemoryError, RecursionError):
        raise UserError(f"{file} is cut short: its header is longer than the file; copy it again") from None
    except (KeyError, struct.error) as error:
        raise UserError(f"{file} has a header that cannot be read: {type(error).__name__} {error}; copy it again") from None


def _header(file: Path, data: mmap.mmap) -> Header:
    reader = _Reader(data)
    reader.at = 4
    version = reader.one("I")
    if version not in (2, 3):
        raise UserError(f"{file} is GGUF of version {version} or of big-endian order; convert the model again, to version 3")
    n_tensors, n_meta = reader.many("Q", 2)
    meta = {}
    for _ in range(n_meta):
        name = reader.text()
        meta[name] = reader.value(reader.one("I"))
    listed = [
        (reader.text(), tuple(reversed(reader.many("Q", reader.one("I")))), *reader.many("IQ", 1)) for _ in range(n_tensors)
    ]
    align = meta.get("general.alignment", 32)
    start = -(-reader.at // align) * align
    tensors = {}
    for name, shape, kind, offset in listed:
        if kind not in BLOCKS:
            known = ", ".join(name for name, _, _ in BLOCKS.values())
            raise UserError(f"{file}: tensor {name!r} is of type {kind}, which is not read here; valid: {known}")
        tensors[name] = Tensor(name, shape, kind, start + offset)
        if tensors[name].offset + tensors[name].bytes > len(data):
            raise UserError(f"{file} is cut short: tensor {name!r} lies beyond its end; copy it again")
    return Header(file, meta, tensors)


# --- the model ---------------------------------------------------------------------------------------------------------


def llama_config(header: Header) -> dict[str, Any]:
    """The fields of transformers' ``LlamaConfig``. Raises `UserError` for what no plain Llama is made of."""
    file = header.file
    architecture = header.need("general.architecture", str)
    if architecture != "llama":
        raise UserError(f"{file} holds a {architecture!r} model; only 'llama' is read here: import its Hugging Face folder")
    said = {k.removeprefix("llama."): v for k, v in header.meta.items() if k.startswith("llama.")}
    if said.get("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in header.tensors:
        raise UserError(f"{file} scales its rotary embedding, which is not read here; import the model's Hugging Face folder")
    width, heads = (header.need(f"llama.{name}") for name in ("embedding_length", "attention.head_count"))
    rows = len(header.tokens)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or embedding.shape != (rows, width):
        has = embedding.shape if embedding else "none"
        raise UserError(f"{file}: {rows} tokens of width {width} need an embedding [{rows}, {width}], but it has {has}")
    each = said.get("attention.key_length", width // heads)
    if said.get("rope.dimension_count", each) != each:
        raise UserError(f"{file} rotates only part of each head, which no Llama of transformers does; import its folder")
    ids = {name: header.meta.get(f"tokenizer.ggml.{short}_token_id") for name, short in SPECIAL.items()}
    return {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": header.need("llama.feed_forward_length"),
        "num_hidden_layers": header.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": said.get("attention.head_count_kv", heads),
        "head_dim": each,
        "max_position_embeddings": header.need("llama.context_length"),
        "rms_norm_eps": said.get("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": said.get("rope.freq_base", 10000.0)},
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token")},
    }


def state_of(header: Header) -> dict[str, Any]:
    """Name -> fp32 tensor, as transformers' Llama has them. Raises `UserError` for a tensor that it has no place for."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    data, found = np.memmap(header.file, np.uint8, "r"), {}
    for tensor in header.tensors.values():
        raw = np.asarray(data[tensor.offset : tensor.offset + tensor.bytes])
        values = dequantize(raw.reshape(*tensor.shape[:-1], -1), GGMLQuantizationType(tensor.type))
        values = np.array(values, np.float32).reshape(tensor.shape)
        kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if kind in heads:
            n = header.meta.get(f"llama.{heads[kind]}", header.need("llama.attention.head_count"))
            values = unpermuted(values, n)
        found[_renamed(header.file, tensor.name)] = torch.from_numpy(np.ascontiguousarray(values))
    return found


def _renamed(file: Path, name: str) -> str:
    block, _, kind = name.removesuffix(".weight").rpartition(".")
    if kind not in TENSORS or not name.endswith(".weight"):
        raise UserError(f"{file}: tensor {name!r} has no place in a Llama of transformers{suggest(kind, TENSORS)}")
    where = f"model.layers.{block.removeprefix('blk.')}." if block else ""
    return f"{where}{TENSORS[kind]}.weight"


def unpermuted(weight: Any, heads: int) -> Any:
    """The rows [heads · D, width] of a query or key projection in transformers' order.

    transformers rotates each head's first half against its second. llama.cpp rotates neighbours, so that the rows of a head
    lie there as [D/2, 2], here as [2, D/2].
    """
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


# --- the tokenizer -----------------------------------------------------------------------------------------------------


def check_vocabulary(header: Header) -> None:
    """Raises `UserError` where the tokenizer cannot be rebuilt from the metadata."""
    said = header.vocabulary
    kind, splitter = said.get("model"), said.get("pre")
    if kind != "gpt2" or splitter not in SPLITTERS:
        known = " or ".join(map(repr, SPLITTERS))
        raise UserError(
            f"{header.file}: its tokenizer is {kind!r}, split as {splitter!r}; only byte-pair vocabularies ('gpt2') split as "
            f"{known} are read here: import the model's Hugging Face folder"
        )
    n, types = len(header.tokens), header.need("tokenizer.ggml.token_type", list)
    if len(types) != n:
        raise UserError(f"{header.file} has {n} tokens, but {len(types)} token types; convert the model again")
    header.need("tokenizer.ggml.merges", list)
    header.need("tokenizer.ggml.eos_token_id")
    for short in SPECIAL.values():
        if (said.get(f"{short}_token_id") or 0) >= n:
            has = said[f"{short}_token_id"]
            raise UserError(f"{header.file}: {short}_token_id is {has}, but there are {n} tokens; convert the model again")


def tokenizer_of(header: Header) -> Any:
    """The `PreTrainedTokenizerFast` that the metadata describes, with its chat template. Raises `UserError`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    said, tokens = header.vocabulary, header.tokens
    merges = [tuple(m.split(" ", 1)) for m in said["merges"]]
    try:
        core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{header.file}: its merges do not fit its tokens: {error}; convert the model again") from None
    cut = pre_tokenizers.ByteLevel(add_prefix_space=bool(said.get("add_space_prefix", False)), use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if said["pre"] == "smollm" else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*digits, cut])
    core.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, said["token_type"], strict=True))
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in kinds if kind == CONTROL])
    core.add_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == USER_DEFINED])
    ids = {name: said.get(f"{short}_token_id") for name, short in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{name: tokens[i] for name, i in ids.items() if i is not None},
        chat_template=header.template,
        model_max_length=header.need("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
