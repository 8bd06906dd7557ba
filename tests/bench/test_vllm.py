"""vLLM as a peer, with its interface imitated: replies have their lengths, and another model's tokens are found out."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench.harness import Unequal
from bench.models import model, stock
from bench.rollout import behind, generate, load
from tutelage.model.folder import load_model


class LLM:
    """Greedy, one prompt after another, as many tokens as asked."""

    def __init__(self, folder, **how):
        assert set(how) == {"dtype", "skip_tokenizer_init", "gpu_memory_utilization", "max_num_seqs"}
        self.model = stock(load_model(Path(folder)))

    def generate(self, prompts, how, use_tqdm):
        found = []
        for prompt, each in zip(prompts, how, strict=True):
            work = load("mini", [each.max_tokens], 1)
            work.prompts = [tuple(prompt["prompt_token_ids"])]
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=generate(self.model, work, 1, sample=False)[0])]))
        return found


@pytest.fixture(autouse=True)
def _vllm(monkeypatch):
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", fake)


def test_it_draws_the_load():
    from bench.vllm import drawn_by

    ours, work = model("mini"), load("mini", [3, 5, 4], 2)
    assert [len(r) for r in drawn_by(ours, stock(ours), work, "float32")()] == [3, 5, 4]


def test_another_model_is_found_out(monkeypatch):
    import bench.vllm as peer

    ours, work = model("mini"), load("mini", [8] * 4, 2)
    monkeypatch.setattr(peer, "TIE", 0.05)  # a random mini's logits lie close together
    with pytest.raises(Unequal, match="vLLM's greedy tokens"):
        peer.drawn_by(ours, stock(model("mini", seed=1)), work, "float32")


def test_behind_is_the_distance_to_the_likeliest():
    ours = stock(model("mini"))
    with torch.inference_mode():
        logits = ours(torch.tensor([[5, 6, 7]])).logits[0, -1]
    order = logits.argsort(descending=True).tolist()
    assert behind(ours, [(5, 6, 7)], [[order[0]]]) == pytest.approx(0, abs=1e-5)
    assert behind(ours, [(5, 6, 7)], [[order[3]]]) == pytest.approx(float(logits[order[0]] - logits[order[3]]), abs=1e-5)
