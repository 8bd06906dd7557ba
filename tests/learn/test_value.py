"""The value model: stock transformers gives the same values one sequence at a time, and opens what is saved."""

import numpy as np
import pytest
import torch

from tests import tiny
from tutelage.learn.optim import AdamW
from tutelage.learn.value import ValueLearner, load_value
from tutelage.losses.value import ClippedValue
from tutelage.model.folder import matmul_params, save_model
from tutelage.model.headers import PACKED
from tutelage.spec import UserError
from tutelage.stages.ppo import UNVALUED
from tutelage.types import Signal


@pytest.fixture(params=tiny.CONFIGS)
def folder(request, tmp_path):
    save_model(tiny.model(request.param), tiny.tokenizer(), tmp_path / "policy")
    return tmp_path / "policy"


def filled(model, seed=4):
    """A head that is not zero."""
    with torch.no_grad():
        for p in model.score.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def test_values_are_stock_transformers_and_so_is_the_folder(folder, tmp_path):
    from transformers import AutoModelForTokenClassification

    samples = tiny.samples([7, 12, 3, 9])
    learner = ValueLearner(load_value(folder), micro_tokens=16)
    assert all(not v.values.any() for v in learner.values(samples))  # a new head expects nothing
    save_model(filled(learner.model), tiny.tokenizer(), tmp_path / "value")
    stock = AutoModelForTokenClassification.from_pretrained(tmp_path / "value", attn_implementation="eager")
    again = ValueLearner(load_value(tmp_path / "value"))
    for sample, signal, other in zip(samples, learner.values(samples), again.values(samples), strict=True):
        with torch.no_grad():
            logits = stock(input_ids=torch.tensor(sample.tokens[None])).logits[0, :, 0]
        np.testing.assert_array_equal(signal.index, sample.trained)
        np.testing.assert_allclose(signal.values, logits[sample.trained - 1], atol=2e-5)
        np.testing.assert_allclose(signal.values, other.values, atol=1e-5)


def test_the_body_is_the_policys(folder):
    policy, value = tiny_state(folder), load_value(folder).state_dict()
    bodies = {n for n in policy if not n.startswith("lm_head")}
    assert bodies == {n for n in value if not n.startswith("score")}
    assert all(torch.equal(policy[n], value[n]) for n in bodies)


def tiny_state(folder):
    from tutelage.model.folder import load_model

    return load_model(folder).state_dict()


def test_a_reward_model_gives_its_head(tmp_path):
    from transformers import AutoModelForSequenceClassification

    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "policy")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy", num_labels=1)
    reward.save_pretrained(tmp_path / "reward")
    head = load_value(tmp_path / "reward").score
    assert torch.equal(head.weight, reward.score.weight)
    assert head.weight.any()
    assert not head.bias.any()


def test_a_folder_without_part_of_its_body_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(tiny.model(), tiny.tokenizer(), tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks tensor 'model.layers.1.mlp.up_proj.weight'"):
        load_value(tmp_path)


def test_micro_batches_do_not_change_the_gradient_and_a_model_learns_its_returns(tmp_path):
    save_model(tiny.model(initializer_range=0.1), tiny.tokenizer(), tmp_path)
    samples = tiny.samples([7, 12, 3, 9])
    for i, sample in enumerate(samples):
        n = len(sample.trained)
        sample.signals["value"] = Signal(np.zeros(n, np.float32), sample.trained)
        sample.signals["return"] = Signal(np.full(n, i % 2, np.float32), sample.trained)
    found = []
    for micro in (4, 1000):
        learner = ValueLearner(filled(load_value(tmp_path)), micro_tokens=micro)
        learner.forward_backward(samples, ClippedValue(clip=0))
        found.append({n: p.grad for n, p in learner.model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4)
    learner = ValueLearner(load_value(tmp_path), AdamW(lr=0.01))
    first = learner.forward_backward(samples, ClippedValue(clip=0))["loss"]
    for _ in range(25):
        learner.step()
        last = learner.forward_backward(samples, ClippedValue(clip=0))["loss"]
    assert last < 0.2 * first


def test_its_params_are_the_policys_without_the_vocabulary(tmp_path):
    policy = tiny.model()
    save_model(policy, tiny.tokenizer(), tmp_path)
    learner = ValueLearner(load_value(tmp_path))
    assert learner.params == matmul_params(policy) - tiny.VOCAB * 32 + 32


def test_which_architectures_have_no_token_classifier():
    from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as HAVE

    assert PACKED - set(HAVE) == UNVALUED
