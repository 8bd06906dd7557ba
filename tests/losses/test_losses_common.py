"""What must hold for every loss of nll, policy and distill."""

import json
import subprocess
import sys

import pytest
import torch

from tests.losses.plain import Case, PlainOutput, case, noise
from tests.losses.test_distill_loss import full_case
from tests.losses.test_distill_variants import with_top_k
from tutelage.losses.cispo import CISPO
from tutelage.losses.correction import IcePop, SequenceMask, TruncatedIS
from tutelage.losses.distill import FullReverseKL, SampledReverseKL
from tutelage.losses.dr_grpo import DrGRPO
from tutelage.losses.extrapolated import ExtrapolatedReverseKL
from tutelage.losses.full import FullForwardKL, FullJSD
from tutelage.losses.gspo import GSPO, GSPOToken
from tutelage.losses.kimi import Kimi
from tutelage.losses.kl import K2, K3, UnbiasedKL
from tutelage.losses.nll import NLL
from tutelage.losses.policy import DAPO, GRPO
from tutelage.losses.proximal import ProximalReverseKL
from tutelage.losses.reinforce import REINFORCE
from tutelage.losses.surrogate import ClippedReverseKL
from tutelage.losses.top_k import TailForwardKL, TailReverseKL, TopKReverseKL
from tutelage.spec import dump, load, resolve_kind

VARIANTS = [
    GSPO(clip_low=0.2, clip_high=0.2),
    GSPOToken(clip_low=0.2, clip_high=0.2),
    CISPO(),
    Kimi(tau=0.1),
    DAPO(kl=UnbiasedKL(beta=0.1), correction=IcePop()),
    GRPO(kl=K3(), correction=SequenceMask(delta=0.01)),
]
SUMS = [REINFORCE(correction=TruncatedIS()), DrGRPO(length=9, kl=K2(beta=0.1))]
"""Replies weigh by their length, and the sum is divided by their number."""
DISTILL = [FullReverseKL(), FullForwardKL(), FullJSD(beta=0.3), TopKReverseKL(), TailReverseKL(), TailForwardKL()]
DISTILL += [SampledReverseKL(alpha=0.5), ProximalReverseKL(), ExtrapolatedReverseKL(alpha=0.5), ClippedReverseKL()]
LOSSES = [NLL(), DAPO(), GRPO(), *DISTILL, *VARIANTS, *SUMS]


def any_case(seed: int = 0) -> Case:
    """A batch with every signal."""
    c = full_case(seed)
    c.batch.signals |= {
        "advantage": noise(c, 1.0, 1),
        "behaviour_logp": c.logp + noise(c, 0.3, 2),
        "teacher_logp": c.logp + noise(c, 1.0, 3),
        "prox_logp": c.logp + noise(c, 0.2, 4),
        "ref_logp": c.logp + noise(c, 0.5, 5),
    }
    return with_top_k(c, case(seed=seed + 7).logits)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("parts", [((0,), (1, 2, 3)), ((3, 0), (2, 1)), ((0,), (1,), (2,), (3,))])
def test_micro_batches_with_global_counts_are_one_batch(loss, parts):
    c = any_case()
    value, gradient, metrics = c.run(loss)
    whole = gradient / c.batch.counts[loss.per]
    found, total, sums = torch.zeros_like(whole), 0.0, {}
    for rows in parts:
        micro = c.rows(*rows)
        order = torch.cat([c.trained(r).nonzero().squeeze(1) for r in sorted(rows)])
        out = PlainOutput(micro.logits, micro.batch.tokens[micro.batch.index])
        for name, (s, n) in loss(out, micro.batch)[1].items():
            a, b = sums.get(name, (0.0, 0.0))
            sums[name] = (max(a, s), 1.0) if name.endswith("_max") else (a + s, b + n)
        part, part_gradient, _ = micro.run(loss)
        found[order] = part_gradient / micro.batch.counts[loss.per]
        total += part
    assert total == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(found, whole)
    assert {k: s / n for k, (s, n) in sums.items()} == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_trap_prompt_and_tool_tokens_carry_no_loss(loss):
    """Logits for all N tokens; only those of the index may move, and all of them do."""
    c = any_case(1)
    c.batch.signals |= {"behaviour_logp": c.logp, "prox_logp": c.logp}  # nothing clipped, nothing discarded
    everything = torch.randn(len(c.batch.tokens), c.logits.shape[1], dtype=torch.float64)
    everything[c.batch.index] = c.logits
    everything.requires_grad_()
    out = PlainOutput(everything[c.batch.index], c.batch.tokens[c.batch.index])
    total, _ = loss(out, c.batch)
    total.backward()
    moved = everything.grad.any(1)
    assert torch.equal(moved.nonzero().squeeze(1), c.batch.index)
    assert len(c.batch.index) < len(c.batch.tokens)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_row_losses_weigh_replies_equally_and_token_losses_tokens(loss):
    """Repeating every trained token of one row doubles its weight per token, and leaves it per row."""
    single, double = case(".x"), case(".xx")
    for c in (single, double):
        n = len(c.logits)
        c.batch.tokens, c.logits = torch.zeros_like(c.batch.tokens), single.logits.expand(n, -1)
        c.batch.signals = {"advantage": torch.ones(n), "behaviour_logp": c.logp, "teacher_logp": c.logp + 1}
        c.batch.signals |= {"prox_logp": c.logp, "ref_logp": c.logp - 0.1}
        c.batch.signals |= {"teacher_hidden": torch.ones(n, 3, dtype=torch.float64), "teacher": torch.zeros(n).long()}
        source = full_case(widths=(3,))
        c.batch.extras = source.batch.extras
        with_top_k(c, case(".x", seed=3).logits.expand(n, -1))
    ratio = double.run(loss)[0] / single.run(loss)[0]
    assert ratio == pytest.approx(2 if loss in SUMS else {"tokens": 2, "rows": 1}[loss.per])


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_record_round_trip(loss):
    record = json.loads(json.dumps(dump(loss, lambda s: None)))
    again = load(record, lambda d: None)
    assert type(again) is type(loss) is resolve_kind(type(loss).__name__)
    assert dump(again, lambda s: None) == record


def test_planning_imports_no_torch():
    code = "import sys, tutelage.losses.nll, tutelage.losses.policy, tutelage.losses.distill, tutelage.credit.group"
    code += ", tutelage.credit.teacher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
