"""TRL 1.16's own loss code, called on the same numbers. Importing it takes seconds, so all of it is here."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.losses.plain import PICTURES, noise
from tests.losses.test_distill_loss import full_case, teacher_logits
from tests.losses.test_policy_loss import policy_case
from tutelage.credit.group import relative
from tutelage.losses.cispo import CISPO
from tutelage.losses.correction import IcePop, SequenceMask, TruncatedIS
from tutelage.losses.distill import FullReverseKL
from tutelage.losses.dr_grpo import DrGRPO
from tutelage.losses.full import FullForwardKL, FullJSD
from tutelage.losses.gspo import GSPO
from tutelage.losses.kl import K3, UnbiasedKL
from tutelage.losses.policy import DAPO, GRPO
from tutelage.losses.reinforce import REINFORCE

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")


def stub(c, leaf, loss_type, high, low=0.2, beta=0.0, unbiased=False, level="token", mask=None):
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
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=unbiased),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=low,
        get_off_policy_mask=grpo_trainer.GRPOTrainer.get_off_policy_mask,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=9,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=mask,
        top_entropy_quantile=1.0,
        use_vllm="prox_logp" in batch.signals,
        vllm_importance_sampling_correction=True,
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
    if beta:
        inputs["ref_per_token_logps"] = pad(batch.signals["ref_logp"])
    if trainer.use_vllm:  # as the trainer makes it with mode "token_truncate" or "token_mask"
        inputs["old_per_token_logps"] = pad(batch.signals["prox_logp"])
        inputs["importance_sampling_ratio"] = pad(batch.signals["trl_ratio"])
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


def compare(c, loss, theirs, leaf):
    value, gradient, metrics = c.run(loss)
    count = c.batch.counts[loss.per]
    assert value / count == pytest.approx(theirs.item(), rel=1e-10)
    torch.testing.assert_close(gradient / count, torch.autograd.grad(theirs, leaf)[0])
    return metrics


VARIANTS = {
    "dr_grpo": (DrGRPO(length=9), {"loss_type": "dr_grpo", "high": 0.2}),
    "gspo": (GSPO(), {"loss_type": "grpo", "high": 4e-4, "low": 3e-4, "level": "sequence"}),
    "gspo, wide": (GSPO(clip_low=0.1, clip_high=0.2), {"loss_type": "grpo", "high": 0.2, "low": 0.1, "level": "sequence"}),
    "cispo": (CISPO(clip_high=0.2), {"loss_type": "cispo", "high": 1.2}),
    "k3": (GRPO(kl=K3(beta=0.3)), {"loss_type": "grpo", "high": 0.2, "beta": 0.3}),
    "unbiased": (DAPO(kl=UnbiasedKL(beta=0.3)), {"loss_type": "dapo", "high": 0.28, "beta": 0.3, "unbiased": True}),
    "sequence mask": (GRPO(correction=SequenceMask(delta=0.05)), {"loss_type": "grpo", "high": 0.2, "mask": 0.05}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_variants_are_trls(name, seed):
    loss, how = VARIANTS[name]
    c = policy_case(seed, temperature=0.9)
    c.batch.signals["ref_logp"] = c.logp + noise(c, 0.5, seed + 9)
    if "level" in how or "mask" in how:  # one advantage a row, as TRL's sequence-level forms take it
        c.batch.signals["advantage"] = noise(c, 1.0, seed + 50)[c.batch.trow]
    leaf = c.logits.clone().requires_grad_()
    trainer, inputs = stub(c, leaf, **how)
    if "level" in how or "mask" in how:
        inputs["advantages"] = noise(c, 1.0, seed + 50)[: len(PICTURES)]
    theirs = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    metrics = compare(c, loss, theirs, leaf)
    logged = trainer._metrics["train"]
    if "beta" in how:
        assert metrics["kl"] == pytest.approx(logged["kl"][0], rel=1e-5)
    if name == "sequence mask":
        assert metrics["discarded"] < 1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("correction", [TruncatedIS(high=1.2), TruncatedIS(low=0.8, high=1.3), IcePop(low=0.8, high=1.2)])
def test_decoupled_corrections_are_trls(correction, seed):
    c = policy_case(seed)
    prox = c.batch.signals["prox_logp"] = c.logp + noise(c, 0.3, seed + 20)
    raw = (prox - c.batch.signals["behaviour_logp"]).exp()
    outside = (raw < correction.low) | (raw > correction.high)
    # the two lines of the trainer's generation step that make the ratio
    theirs = raw.masked_fill(outside, 0.0) if isinstance(correction, IcePop) else raw.clamp(correction.low, correction.high)
    c.batch.signals["trl_ratio"] = theirs
    assert 0 < outside.sum() < len(raw)
    leaf = c.logits.clone().requires_grad_()
    trainer, inputs = stub(c, leaf, "dapo", 0.28)
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    metrics = compare(c, DAPO(correction=correction), loss, leaf)
    assert metrics["correction"] == pytest.approx(theirs.mean().item())
    assert metrics["discarded"] == pytest.approx((theirs == 0).double().mean().item())


def test_reinforce_is_trls_rloo_on_policy():
    rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer")
    c = policy_case(4, spread=0.0)
    c.batch.signals["advantage"] = noise(c, 1.0, 9)[c.batch.trow]
    leaf = c.logits.clone().requires_grad_()
    trainer, inputs = stub(c, leaf, "grpo", 0.2)
    inputs["completion_mask"] = inputs["completion_mask"] * inputs["tool_mask"]
    logp = trainer._get_per_token_logps_and_entropies()[0].detach()
    inputs |= {"old_logps": (logp * inputs["completion_mask"]).sum(1), "advantages": noise(c, 1.0, 9)[: len(PICTURES)]}
    theirs = rloo_trainer.RLOOTrainer._compute_loss(trainer, None, inputs)
    gradient = c.run(REINFORCE())[1] / c.batch.counts["rows"]
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, leaf)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("loss", "beta"), [(FullReverseKL(), 1), (FullForwardKL(), 0), (FullJSD(), 0.5), (FullJSD(beta=0.1), 0.1)]
)
def test_full_vocabulary_losses_are_trls_generalized_jsd(loss, beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    c = full_case(1, temperature=temperature)
    leaf = c.logits.clone().requires_grad_()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(leaf, teacher_logits(c), beta=beta, temperature=temperature, reduction="sum")
    value, gradient, _ = c.run(loss)
    assert value == pytest.approx(theirs.item(), rel=1e-10)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, leaf)[0])


def test_group_scale_is_trls():
    rewards = np.array([0.0, 1.0, 1.0, 0.25])
    theirs = torch.tensor(rewards)
    std = grpo_trainer.nanstd(theirs.view(-1, 4), dim=1)
    np.testing.assert_allclose(relative(rewards, "group"), ((theirs - theirs.mean()) / (std + 1e-4)).numpy(), rtol=1e-6)
