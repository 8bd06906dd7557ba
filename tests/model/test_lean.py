"""The lean body against the modules whose weights it reads."""

import pytest
import torch

from tests import tiny
from tutelage.model.attention import Rows
from tutelage.model.lean import LeanBody
from tutelage.model.lora import LoRA

QWEN2 = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_key_value_heads": 2}
MODELS = {
    "llama": {},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
    "qwen2": QWEN2,
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def made(name):
    kind = "llama" if name == "biases" else name
    model = tiny.model(model_type=kind, **MODELS[name])
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):  # norms and biases are not what they are at first
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_same_as_the_modules_before_and_after_an_update(name):
    model, lengths = made(name), torch.tensor([9, 3, 14])
    ids = torch.randint(5, tiny.VOCAB, (26,), generator=torch.Generator().manual_seed(0))
    pos = torch.cat([torch.arange(n) for n in lengths.tolist()])
    lean = LeanBody.of(model)
    for _ in range(2):
        out = model.get_decoder()(input_ids=ids[None], position_ids=pos[None], use_cache=False, layout=Rows(lengths))
        torch.testing.assert_close(lean(ids, pos, Rows(lengths), 14), out.last_hidden_state[0], atol=1e-5, rtol=1e-5)
        for p in model.parameters():
            p.mul_(0.9)


def test_other_architectures_and_adapters_go_through_their_modules():
    assert LeanBody.of(tiny.model("gemma2")) is None
    model = tiny.model()
    LoRA(rank=2).attach(model, 0)
    assert LeanBody.of(model) is None
