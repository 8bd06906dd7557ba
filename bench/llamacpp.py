"""llama.cpp as a peer of rollouts: the same weights as a GGUF file, drawn from in batches, through llama-cpp-python.

Prompts are prefilled together, then every sequence gets a token a step (`llama_batch`), drawn at temperature 1 by llama.cpp's
own ``dist`` sampler; ours draws at temperature 1 too and reports log-probs besides. Replies have one length: no slot waits.
Both sides have PyTorch's number of threads. Proven first, with weights, keys and values in F32: logits within 1e-4 of a full
forward's, greedy tokens the likeliest of it but for ties. The ratio is to the file of our precision, with keys and values in
F32 or as llama.cpp has them by default (F16 and flash attention), whichever is faster; F16 and Q8_0 files, whose weights are
other weights, stand aside, and the note has their ratios where they are faster.

Leaves out: refilling slots (llama.cpp's server does it), speculative decoding, GPUs.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Record, Run, Unequal, compared, worst

NAMES = ("llama-cpp",)
SAME = {"float32": "F32", "bfloat16": "BF16"}
"""The type of a GGUF file's matrices that is our precision."""
OTHERS = ("F16", "Q8_0")
BOUND = 1e-4
"""Most that logits may differ in F32."""


# --- the file --------------------------------------------------------------------------------------------------------------


def permuted(weight: Any, heads: int) -> Any:
    """The rows [heads · D, width] of a query or key projection in llama.cpp's order: the inverse of `model.gguf.unpermuted`."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(model: Any, kind: str, file: Path) -> None:
    """A transformers Llama as GGUF, its matrices as ``kind``, its norms in F32; token ids have no texts."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    from tutelage.model.gguf import TENSORS

    config, names = model.config, {theirs: ours for ours, theirs in TENSORS.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        block, part = "", name.removesuffix(".weight")
        if part.startswith("model.layers."):
            number, part = part.removeprefix("model.layers.").split(".", 1)
            block = f"blk.{number}."
        values = tensor.float().numpy()
        values = permuted(values, heads[names[part]]) if names[part] in heads else values
        type = GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(f"{block}{names[part]}.weight", quantize(np.ascontiguousarray(values), type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- the engine ------------------------------------------------------------------------------------------------------------


class LlamaCpp:
    """A GGUF file and a context of some sequences; to be closed."""

    def __init__(self, file: Path, vocab: int, sequences: int, length: int, threads: int, exact: bool = False):
        """``length`` bounds prompt and reply; where ``exact``, keys and values are F32 and attention is plain, else both
        are llama.cpp's default: F16 and flash attention, which rounds to F16 too."""
        import llama_cpp

        self.api, self.vocab, self.room = llama_cpp, vocab, sequences * length
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        how = llama_cpp.llama_context_default_params()
        how.n_ctx, how.n_seq_max = sequences * (-(-length // 256) * 256), sequences
        how.n_batch = how.n_ubatch = self.room
        how.n_threads = how.n_threads_batch = threads
        if exact:
            how.type_k = how.type_v = llama_cpp.GGML_TYPE_F32
            how.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, how) if self.model else None
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {file.name}")
        self.batch = llama_cpp.llama_batch_init(self.room, 0, 1)
        self.sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(self.sampler, llama_cpp.llama_sampler_init_dist(1))

    def close(self) -> None:
        self.api.llama_sampler_free(self.sampler)
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)

    def forward(self, rows: Sequence[Sequence[int]], at: int, every: bool = False) -> list[int]:
        """Reads tokens [S][t] that stand at places ``at``... of the sequences; the places in the batch whose logits there are:
        each row's last, or ``every`` one."""
        batch, asked, n = self.batch, [], 0
        for sequence, row in enumerate(rows):
            for i, token in enumerate(row):
                wanted = every or i == len(row) - 1
                batch.token[n], batch.pos[n], batch.logits[n] = token, at + i, wanted
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                asked += [n] if wanted else []
                n += 1
        batch.n_tokens = n
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode: {code}")
        return asked

    def logits(self, asked: int) -> np.ndarray:
        """[asked, V], a copy"""
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (asked, self.vocab)).copy()

    def draw(self, prompts: Sequence[Sequence[int]], n: int, greedy: bool = False) -> list[list[int]]:
        """n tokens for each prompt; prompts are of one length."""
        self.clear()
        replies: list[list[int]] = [[] for _ in prompts]
        rows, at = prompts, 0
        for _ in range(n):
            asked, at = self.forward(rows, at), at + len(rows[0])
            if greedy:
                tokens = self.logits(len(asked)).argmax(-1).tolist()
            else:
                tokens = [self.api.llama_sampler_sample(self.sampler, self.context, i) for i in asked]
            for reply, token in zip(replies, tokens, strict=True):
                reply.append(token)
            rows = [[t] for t in tokens]
        return replies


def _silent(level: int, text: bytes, data: Any) -> None: ...


SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_silent)


# --- the bench -------------------------------------------------------------------------------------------------------------


def equal(peer: Any, prompts: Sequence[tuple[int, ...]], file: Path, n: int = 16) -> float:
    """The largest distance of logits from a full forward's; raises `Unequal` above `BOUND` or for other greedy tokens."""
    import torch

    from bench.rollout import behind

    engine = LlamaCpp(file, peer.config.vocab_size, len(prompts), len(prompts[0]) + n, torch.get_num_threads(), exact=True)
    try:
        asked = engine.forward(prompts, 0, every=True)
        theirs = engine.logits(len(asked)).reshape(len(prompts), len(prompts[0]), -1)
        with torch.inference_mode():
            gap = float(np.abs(peer(torch.tensor(prompts)).logits.numpy() - theirs).max())
        below = behind(peer, prompts, engine.draw(prompts, n, greedy=True))
    finally:
        engine.close()
    if not (gap <= BOUND and below <= 2 * BOUND):
        raise Unequal(f"llama.cpp: logits {gap:.2g} apart, greedy tokens {below:.2g} below the likeliest; nothing was timed")
    return gap


def pair(run: Run, shape: str, rows: int, n: int, folder: Path) -> Record:
    import torch

    from bench.models import model, stock, tokenizer
    from bench.rollout import draw, load
    from bench.work import drawing
    from tutelage.rollout.local import LocalEngine

    ours, work = model(shape), load(shape, [n] * rows, rows)
    kinds, length, threads = (SAME[run.dtype], *OTHERS), len(work.prompts[0]) + n, torch.get_num_threads()
    files = {kind: folder / f"{shape}-{kind}.gguf" for kind in ("F32", *kinds)}
    for kind, file in files.items():
        write(ours, kind, file)
    gap = equal(stock(ours), work.prompts[:4], files["F32"])
    opened = lambda kind, exact: LlamaCpp(files[kind], ours.config.vocab_size, rows, length, threads, exact)  # noqa: E731
    peers = {f"llama.cpp {kind}": opened(kind, False) for kind in kinds}
    if run.dtype == "float32":
        peers["llama.cpp F32, keys and values too"] = opened("F32", True)
    engine = LocalEngine(ours, tokenizer(shape), rows, run.dtype)
    sides: dict[str, Any] = {"tutelage": lambda: draw(engine, work)}
    sides |= {name: lambda peer=peer: peer.draw(work.prompts, n) for name, peer in peers.items()}
    note = f"{rows} rows of {n} tokens, {threads} threads; F32 logits {gap:.1g} apart"
    aside = [f"llama.cpp {kind}" for kind in OTHERS]
    try:
        return compared(run, f"llama-cpp, {shape}", None, sides, drawing(ours, work.prompts, work.replies), note, aside)
    finally:
        for peer in peers.values():
            peer.close()


def bench(run: Run) -> list[Record]:
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # what its loader raises for a library that does not fit
        why = str(error).partition("\n")[0]
        raise ImportError(f"llama-cpp-python cannot be imported ({why}); pip install -e '.[bench]' builds it") from None
    loads = (("mini", 4, 6),) if run.quick else (("tiny", 64, 64), ("135m", 16, 32))
    with tempfile.TemporaryDirectory() as place:
        return [worst("llama-cpp", [pair(run, *each, Path(place)) for each in loads])]
