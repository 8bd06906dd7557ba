"""A tiny Llama as a GGUF file, written by the library `gguf` in the way of llama.cpp's converter; stands in for a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["sort the numbers 12 and 345 from small to large", "the answer is the sum of the numbers", "don't  we'll  ünïcode"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary(pre: str = "smollm") -> Any:
    """A byte-pair tokenizer that was trained here, cut as SmolLM's (or GPT-2's) is: what the file has to give back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS * 5, trainer)
    return core


def model(vocab: int, tied: bool = True, seed: int = 0) -> Any:
    """Fewer heads for keys than for queries, so that both permutations show."""
    from tests import tiny

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
    return tiny.model(seed=seed, vocab_size=vocab, **sizes, tie_word_embeddings=tied, rms_norm_eps=1e-5)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of a query or key projection, row by row: first half and second half take turns."""
    size = len(weight) // heads
    order = [h * size + i + half for h in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return weight[order]


def write(
    file: Path, model: Any, core: Any, pre: str = "smollm", quantised: str = "F32", change: dict[str, Any] | None = None
) -> Path:
    """Writes ``model`` and its vocabulary; matrices as ``quantised``. ``change`` sets or (None) leaves out metadata."""
    import json

    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config, kind = model.config, GGMLQuantizationType[quantised]
    tokens = sorted(core.get_vocab(), key=core.get_vocab().__getitem__)
    merges = json.loads(core.to_str())["model"]["merges"]
    said: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
        **(change or {}),
    }
    writer = GGUFWriter(str(file), said.pop("general.architecture", "llama"))
    for name, value in said.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](name, value)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer, short = "", name.removesuffix(".weight")
        if short.startswith("model.layers."):
            number, short = short.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        short, values = NAMES[short], tensor.numpy()
        values = permuted(values, heads[short]) if short in heads else values
        own = GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(f"{layer}{short}.weight", quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
