"""What is added to the reward: overlong punishment and KL to a reference. By formula, and by enumeration."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.credit.test_group_credit import advantage, assign, sample
from tutelage.credit.base import CreditContext
from tutelage.credit.group import GroupRelative, informative_groups
from tutelage.credit.kl import Reference, ReplyKL, TokenKL
from tutelage.credit.overlong import OverlongFilter, SoftOverlong
from tutelage.credit.reinforce_pp import Reward
from tutelage.spec import SpecError
from tutelage.types import Signal

# --- overlong ---


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (20481, -1), (40000, -1)]
)
def test_soft_punishment_is_equation_13_at_the_papers_lengths(length, expected):
    assert SoftOverlong(length=20480, cache=4096).punishment(length) == pytest.approx(expected)


def test_punishment_reaches_the_advantage_and_not_the_reward():
    samples = [sample("a", 1.0, mask="." + "x" * 4), sample("a", 1.0, mask="." + "x" * 8), sample("a", 0.0, mask=".x")]
    assign(SoftOverlong(length=8, cache=4), samples)
    kept, metrics = assign(GroupRelative(scale="none"), samples)
    assert [advantage(s) for s in kept] == pytest.approx([1.0 - 1 / 3, 0.0 - 1 / 3, 0.0 - 1 / 3])
    assert metrics["reward"] == (2.0, 3.0)


def test_trap_groups_are_informative_by_the_verified_reward_alone():
    """DAPO's filter asks whether answers differ, not whether their lengths do."""
    samples = [sample("a", 1.0, mask="." + "x" * 4), sample("a", 1.0, mask="." + "x" * 8)]
    assign(SoftOverlong(length=8, cache=4), samples)
    assert assign(GroupRelative(), samples)[0] == []
    assert [advantage(s) for s in assign(GroupRelative(scale="none", drop_uniform=False), samples)[0]] == [0.5, -0.5]
    assert informative_groups(samples) == []


def test_informative_groups_ignore_failed_verifiers():
    mixed, broken = [sample("a", 1.0), sample("a", 0.0)], [sample("b", 1.0), sample("b", 0.0, error="late")]
    assert informative_groups([*mixed, *broken, sample("c", 0.0, error="late")]) == [mixed]


def test_filter_after_a_baseline_counts_in_it_and_before_it_does_not():
    for rules, expected in (((GroupRelative, OverlongFilter), [2 / 3]), ((OverlongFilter, GroupRelative), [])):
        samples = [sample("a", 1.0), sample("a", 0.0), sample("a", 0.0)]
        samples[1].stop = samples[2].stop = "length"
        samples[0].stop = "stop"
        kept = samples
        for rule in rules:
            kept, metrics = assign(rule(scale="none") if rule is GroupRelative else rule(), kept)
            if rule is OverlongFilter:
                assert metrics["overlong"] == (2.0, 3.0)
        assert [advantage(s) for s in kept] == pytest.approx(expected)


def test_a_cache_longer_than_the_length():
    with pytest.raises(ValidationError, match="cache 9 is longer than length 8"):
        SoftOverlong(length=8, cache=9)


# --- KL in the reward: every sequence of two tokens out of three ---


def tables(seed):
    """Log-probs of the first token [3], and of the second after each first [3, 3]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, generator=rng, dtype=torch.float64)


def per_token(logits, sequence):
    logp = logits.log_softmax(-1)
    return torch.stack([logp[0, sequence[0]], logp[1 + sequence[0], sequence[1]]])


def expected_gradient(rules):
    """E[Σ_t Â_t ∇log π(y_t)] over every sequence, with a reward of 0, credited by ``rules``."""
    logits, ref, total = tables(0).requires_grad_(), tables(1), 0.0
    for sequence in itertools.product(range(3), repeat=2):
        logp = per_token(logits, sequence)
        s = sample("".join(map(str, sequence)), 0.0, mask=".xx")
        s.signals["behaviour_logp"] = Signal(logp.detach().numpy(), s.trained)
        s.signals["ref_logp"] = Signal(per_token(ref, sequence).numpy(), s.trained)
        kept = [s]
        for rule in rules:
            kept, _ = assign(rule, kept)
        advantages = torch.from_numpy(s.signals["advantage"].values).double()
        total = total + logp.sum().exp().detach() * (advantages * logp).sum()
    return torch.autograd.grad(total, logits)[0]


def exact_gradient():
    logits, ref, kl = tables(0).requires_grad_(), tables(1), 0.0
    for sequence in itertools.product(range(3), repeat=2):
        logp = per_token(logits, sequence).sum()
        kl = kl + logp.exp() * (logp - per_token(ref, sequence).sum())
    return torch.autograd.grad(kl, logits)[0]


@pytest.mark.parametrize("rules", [(ReplyKL(beta=0.5), Reward()), (Reward(), TokenKL(beta=0.5))], ids=["reply", "token"])
def test_k1_in_the_reward_has_the_gradient_of_the_kl_of_whole_replies(rules):
    torch.testing.assert_close(expected_gradient(rules), -0.5 * exact_gradient(), rtol=1e-5, atol=1e-7)


def test_trap_each_tokens_own_kl_is_not_enough():
    """Without what follows, the first token does not pay for where it leads."""

    class Myopic(TokenKL):
        def _charge(self, s, kl):
            old = s.signals["advantage"]
            s.signals["advantage"] = Signal((old.values - self.beta * kl).astype(np.float32), old.index)

    assert not torch.allclose(expected_gradient((Reward(), Myopic(beta=0.5))), -0.5 * exact_gradient(), atol=1e-3)


def with_kl(group, reward, kl):
    s = sample(group, reward, mask="." + "x" * len(kl))
    s.signals["behaviour_logp"] = Signal(np.array(kl, np.float32) - 3, s.trained)
    s.signals["ref_logp"] = Signal(np.full(len(kl), -3, np.float32), s.trained)
    return s


def test_penalties_by_hand_and_the_measure():
    samples = [with_kl("a", 1.0, [0.5, -0.25]), with_kl("a", 0.0, [1.0, 1.0, 1.0])]
    _, metrics = assign(ReplyKL(beta=0.1), samples)
    assert metrics["kl_ref"] == pytest.approx((3.25, 5.0))
    assign(GroupRelative(scale="none"), samples)
    assert advantage(samples[0]) == pytest.approx((0.975 - -0.3) / 2)
    samples = [with_kl("a", 1.0, [0.5, -0.25]), with_kl("a", 0.0, [1.0, 1.0, 1.0])]
    assign(GroupRelative(scale="none"), samples)
    assign(TokenKL(beta=0.1), samples)
    assert samples[0].signals["advantage"].values.tolist() == pytest.approx([0.5 - 0.025, 0.5 + 0.025])
    assert samples[1].signals["advantage"].values.tolist() == pytest.approx([-0.5 - 0.3, -0.5 - 0.2, -0.5 - 0.1])


# --- the reference ---


class Uniform:
    """A scorer that finds every token equally likely."""

    name = "uniform"

    def score(self, samples, temperature, want):
        assert want == "logp"
        facts = {"temperature": temperature}
        return [Signal(np.full(len(s.trained), -2.0, np.float32), s.trained, facts) for s in samples]


def annotate(samples, temperature=1.0, reference=None):
    import asyncio

    return asyncio.run(Reference().assign(samples, CreditContext(temperature, reference=reference)))


def test_the_reference_is_asked_at_the_sampling_temperature():
    samples = [sample("a", 1.0), sample("a", 0.0, mask="....")]
    kept, _ = annotate(samples, 0.7, Uniform())
    assert kept == samples[:1]
    signal = kept[0].signals["ref_logp"]
    assert signal.index.tolist() == [2, 3, 5]
    assert signal.provenance["temperature"] == 0.7


def test_trap_a_reference_at_another_temperature_than_the_sampling():
    s = sample("a", 1.0)
    s.signals["behaviour_logp"] = Signal(np.zeros(3, np.float32), s.trained, {"temperature": 1.0})
    with pytest.raises(ValueError, match=r"at temperature 0\.7, but the sample was drawn at 1\.0"):
        annotate([s], 0.7, Uniform())


def test_a_reference_that_is_not_there():
    with pytest.raises(SpecError, match="none is given"):
        annotate([sample("a", 1.0)])


def test_what_the_rules_need():
    assert Reference().gives() == {"ref_logp"}
    assert ReplyKL(beta=0.1).needs() == {"ref_logp", "behaviour_logp"}
    assert TokenKL(beta=0.1).needs() == {"ref_logp", "behaviour_logp", "advantage"}
