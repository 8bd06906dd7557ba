"""Every architecture declared safe to pack, at tiny size: our packed logits against its own stock forward."""

import pytest
import torch

from tests import tiny
from tutelage.learn.learner import Learner
from tutelage.model.attention import NAME
from tutelage.model.folder import make_model
from tutelage.model.headers import PACKED
from tutelage.types import Sample

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}


@pytest.mark.parametrize("name", sorted(PACKED))
def test_packed_log_probs_equal_the_stock_forward(name):
    fields = {**tiny.config(), "model_type": name, "head_dim": 8, "num_key_value_heads": 2, "rope_theta": 10000.0}
    if "moe" in name or name == "mixtral":
        fields |= EXPERTS
    model = make_model(fields, seed=0).eval()
    samples: list[Sample] = tiny.samples([9, 4, 12])
    mine = Learner(model).score(samples, 1.0, "logp")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for sample, signal in zip(samples, mine, strict=True):
            ids = torch.from_numpy(sample.tokens)
            logp = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            want = logp[:-1].gather(1, ids[1:, None])[sample.trained - 1, 0]
            torch.testing.assert_close(torch.from_numpy(signal.values), want, atol=2e-5, rtol=1e-5)
    model.set_attn_implementation(NAME)
