"""llama.cpp as a peer: the file written is the model, and what it says is held to the model before it is timed."""

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

from bench import llamacpp
from bench.harness import Run, Unequal
from bench.models import model, samples, stock
from tutelage.model.gguf import read_header, state_of


def test_a_file_holds_the_weights_that_an_import_reads(tmp_path):
    ours = model("mini")
    llamacpp.write(ours, "F32", tmp_path / "a.gguf")
    header = read_header(tmp_path / "a.gguf")
    found = state_of(header)
    expected = {k: v for k, v in ours.state_dict().items() if k != "lm_head.weight"}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)
    assert header.meta["llama.vocab_size"] == 64


def test_q8_rounds_matrices_and_leaves_norms(tmp_path):
    ours = model("mini")
    llamacpp.write(ours, "Q8_0", tmp_path / "a.gguf")
    header = read_header(tmp_path / "a.gguf")
    state, found = ours.state_dict(), state_of(header)
    assert header.types == {"F32": 5, "Q8_0": 15}
    assert torch.equal(found["model.norm.weight"], state["model.norm.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    apart = (found[name] - state[name]).norm() / state[name].norm()
    assert 0 < apart < 0.01


def test_rows_of_a_head_pair_neighbours():
    """Row i of a head's first half lies beside row i of its second: llama.cpp rotates neighbours."""
    weight = np.arange(8)[:, None]
    assert llamacpp.permuted(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.fixture
def prompts():
    return [tuple(s.tokens.tolist()) for s in samples("mini", [1] * 3, prompt=9)]


@pytest.fixture
def llama_cpp():
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"no llama-cpp-python: {error}")
    return llama_cpp


@pytest.mark.usefixtures("llama_cpp")
def test_what_llama_cpp_says_is_the_model_s(tmp_path, prompts):
    ours = model("mini")
    llamacpp.write(ours, "F32", tmp_path / "a.gguf")
    assert llamacpp.equal(stock(ours), prompts, tmp_path / "a.gguf") < 1e-5
    engine = llamacpp.LlamaCpp(tmp_path / "a.gguf", 64, 3, 20, 1)
    drawn = [engine.draw(prompts, 6) for _ in range(8)]
    engine.close()
    assert {len(reply) for rows in drawn for reply in rows} == {6}
    assert len({tuple(rows[0]) for rows in drawn}) > 4  # drawn, not the likeliest


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("part", ["permuted", "seed"])
def test_another_model_is_found_out(tmp_path, prompts, part, monkeypatch):
    if part == "permuted":
        monkeypatch.setattr(llamacpp, "permuted", lambda weight, heads: weight)
    llamacpp.write(model("mini", seed=int(part == "seed")), "F32", tmp_path / "a.gguf")
    with pytest.raises(Unequal, match=r"llama\.cpp: logits"):
        llamacpp.equal(stock(model("mini")), prompts, tmp_path / "a.gguf")


@pytest.mark.usefixtures("llama_cpp")
def test_the_record_has_the_ratio_at_our_precision(tmp_path):
    run = Run(rounds=1, quick=True)
    (record,) = llamacpp.bench(run)
    assert "llama.cpp F32" in record.note
    sides = [r["side"] for r in run.details["llama-cpp, mini"]]
    assert sides == ["tutelage", *(f"llama.cpp {k}" for k in ("F32", "F16", "Q8_0", "F32, keys and values too"))]


def test_without_it_the_record_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ImportError, match="pip install"):
        llamacpp.bench(Run())
