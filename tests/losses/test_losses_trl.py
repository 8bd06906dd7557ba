"""TRL 1.16's own loss code, called on the same numbers. Importing it takes seconds, so all of it is here."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.losses.plain import PICTURES
from tests.losses.test_distill_loss import full_case, teacher_logits
from tests.losses.test_policy_loss import policy_case
from tutelage.credit.group import relative
from tutelage.losses.distill import FullReverseKL
from tutelage.losses.policy import DAPO, GRPO

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")


def stub(c, leaf, loss_type, high):
    """What `GRPOTrainer._compute_loss` reads of its trainer, with padded logits scattered from ``leaf`` [M, V]."""
    batch = c.batch
    width = int(batch.pos.max()) + 1

    def pad(x):  # [M] -> [R, T]
        return x.new_zeros(int(batch.row[-1]) + 1, width).index_put((batch.trow, batch.pos[batch.index]), x)

    def logps(*args, **kwargs):
        logprobs = torch.log_softmax(leaf / c.temperature, -1)
        logp = logprobs[torch.arange(len(leaf)), batch.tokens[batch.index]]
        return pad(logp), pad(-(logprobs.exp() * logprobs).sum(-1).detach()), None

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=logps,
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type=loss_type,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    # the pictures' prompt and tool tokens are masked as TRL masks tool tokens, its padding as padding
    lengths = torch.tensor([len(p) for p in PICTURES])
    ids = torch.zeros(int(batch.row[-1]) + 1, width, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(int(batch.row[-1]) + 1, 1),
        "completion_ids": ids,
        "completion_mask": (torch.arange(width) < lengths[:, None]).double(),
        "tool_mask": pad(torch.ones(len(leaf), dtype=torch.float64)),
        "advantages": pad(batch.signals["advantage"]),
        "old_per_token_logps": pad(batch.signals["behaviour_logp"]),
        "num_items_in_batch": torch.tensor(float(len(leaf))),
    }
    return trainer, inputs


@pytest.mark.parametrize(("loss", "kind", "high"), [(DAPO(), "dapo", 0.28), (GRPO(), "grpo", 0.2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_policy_losses_are_trls(loss, kind, high, seed):
    c = policy_case(seed, temperature=0.9)
    leaf = c.logits.clone().requires_grad_()
    trainer, inputs = stub(c, leaf, kind, high)
    theirs = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    value, gradient, metrics = c.run(loss)
    count = c.batch.counts[loss.per]
    assert value / count == pytest.approx(theirs.item(), rel=1e-10)
    torch.testing.assert_close(gradient / count, torch.autograd.grad(theirs, leaf)[0])
    logged = trainer._metrics["train"]
    assert metrics["clip_fraction"] == pytest.approx(logged["clip_ratio/region_mean"][0], rel=1e-5)
    assert metrics["clip_fraction"] > 0
    assert metrics["entropy"] == pytest.approx(logged["entropy"][0], rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_full_reverse_kl_is_trls_generalized_jsd_at_beta_1(temperature):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    c = full_case(1, temperature=temperature)
    leaf = c.logits.clone().requires_grad_()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(leaf, teacher_logits(c), beta=1, temperature=temperature, reduction="sum")
    value, gradient, _ = c.run(FullReverseKL())
    assert value == pytest.approx(theirs.item(), rel=1e-10)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, leaf)[0])


def test_group_scale_is_trls():
    rewards = np.array([0.0, 1.0, 1.0, 0.25])
    theirs = torch.tensor(rewards)
    std = grpo_trainer.nanstd(theirs.view(-1, 4), dim=1)
    np.testing.assert_allclose(relative(rewards, "group"), ((theirs - theirs.mean()) / (std + 1e-4)).numpy(), rtol=1e-6)
