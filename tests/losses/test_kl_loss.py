"""KL estimators by enumeration: one context, every token once, weighted by the probability of drawing it."""

import math

import pytest
import torch

from tests.losses.plain import PlainOutput, case, noise, tokens
from tests.losses.test_policy_loss import policy_case
from tutelage.losses.gspo import GSPO
from tutelage.losses.kl import K1, K2, K3, UnbiasedKL, k3
from tutelage.losses.policy import DAPO, GRPO

VOCAB = 6


def distributions():
    """Logits of the policy, log-probs of the reference and of another sampler, [V] each."""
    rng = torch.Generator().manual_seed(3)
    logits, ref, sampler = torch.randn(3, VOCAB, generator=rng, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(-1), sampler.log_softmax(-1)


def expected(kl, sampler=None):
    """(E[value], E[gradient]) over tokens drawn from ``sampler`` (None: the policy itself)."""
    logits, ref, _ = distributions()
    logp = logits.log_softmax(-1)
    mu = logp.detach() if sampler is None else sampler
    total = (mu.exp() * kl.value(logp, ref, logp - mu)).sum()
    return total.item(), torch.autograd.grad(total, logits)[0]


def exact(forward=False):
    """(KL(π ‖ ref), its gradient), or of KL(ref ‖ π)."""
    logits, ref, _ = distributions()
    logp = logits.log_softmax(-1)
    kl = (ref.exp() * (ref - logp)).sum() if forward else (logp.exp() * (logp - ref)).sum()
    return kl.item(), torch.autograd.grad(kl, logits)[0]


def test_values_on_policy():
    kl = exact()[0]
    assert expected(K1(beta=1.0))[0] == pytest.approx(kl)
    assert expected(K3())[0] == pytest.approx(kl)
    assert expected(UnbiasedKL(beta=1.0))[0] == pytest.approx(kl)
    assert expected(K2(beta=1.0))[0] != pytest.approx(kl, rel=0.05)  # biased as a measurement …


def test_trap_k1_in_the_loss_regularises_nothing():
    gradient = expected(K1(beta=1.0))[1]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    assert exact()[1].abs().max() > 0.05


def test_k2_has_the_gradient_of_the_kl_on_policy():
    torch.testing.assert_close(expected(K2(beta=1.0))[1], exact()[1])  # … and exact as a loss


def test_trap_k3_has_the_gradient_of_the_other_kl():
    gradient = expected(K3())[1]
    torch.testing.assert_close(gradient, exact(forward=True)[1])
    assert not torch.allclose(gradient, exact()[1], atol=1e-2)


def test_the_unbiased_estimator_is_exact_off_policy_and_the_others_are_not():
    sampler = distributions()[2]
    value, gradient = expected(UnbiasedKL(beta=1.0), sampler)
    assert value == pytest.approx(exact()[0])
    torch.testing.assert_close(gradient, exact()[1])
    torch.testing.assert_close(expected(UnbiasedKL(beta=1.0))[1], exact()[1])
    for other in (K1, K2, K3):
        assert not torch.allclose(expected(other(beta=1.0), sampler)[1], exact()[1], atol=1e-2)


def test_trap_the_weights_gradient_is_part_of_the_unbiased_estimator():
    """With the ratio held constant, what is left is the gradient of the other KL."""
    logits, ref, sampler = distributions()
    logp = logits.log_softmax(-1)
    naive = (sampler.exp() * (logp - sampler).exp().detach() * k3(ref - logp)).sum()
    torch.testing.assert_close(torch.autograd.grad(naive, logits)[0], exact(forward=True)[1])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("loss", [DAPO, GRPO, GSPO])
def test_the_term_is_summed_as_the_loss_is(loss, seed):
    c = policy_case(seed, temperature=0.8)
    c.batch.signals["ref_logp"] = c.logp + noise(c, 0.5, seed)
    x = [t.logp - t.signals["ref_logp"] for t in tokens(c)]
    rows = [t.row for t in tokens(c)]
    weights = [1.0 if loss().per == "tokens" else 1 / rows.count(r) for r in rows]
    term = 0.3 * sum(w * (math.exp(-v) - 1 + v) for w, v in zip(weights, x, strict=True))
    plain, plain_gradient, _ = c.run(loss())
    value, gradient, metrics = c.run(loss(kl=K3(beta=0.3)))
    assert value == pytest.approx(plain + term, rel=1e-10)
    slopes = [0.3 * w * (1 - math.exp(-v)) for w, v in zip(weights, x, strict=True)]
    added = [[k * g for g in t.score_function(c.temperature)] for t, k in zip(tokens(c), slopes, strict=True)]
    torch.testing.assert_close(gradient, plain_gradient + torch.tensor(added, dtype=torch.float64))
    assert metrics["kl"] == pytest.approx(sum(math.exp(-v) - 1 + v for v in x) / len(x), rel=1e-5)


@pytest.mark.parametrize("kl", [K2(beta=1.0), K3(), UnbiasedKL(beta=1.0)], ids=repr)
def test_a_policy_equal_to_its_reference_is_not_moved(kl):
    c = policy_case(1)
    c.batch.signals |= {"ref_logp": c.logp, "advantage": torch.zeros(len(c.logits))}
    value, gradient, metrics = c.run(DAPO(kl=kl))
    assert value == 0
    assert not gradient.any()
    assert metrics["kl"] == 0


@pytest.mark.parametrize("kl", [K1(beta=1.0), K2(beta=1.0), K3(), UnbiasedKL(beta=1.0)], ids=repr)
def test_numerics_far_apart_policies_give_finite_numbers(kl):
    c = case(".xx", dtype=torch.float32)
    c.batch.signals = {"behaviour_logp": c.logp, "advantage": torch.zeros(2)}
    c.batch.signals["ref_logp"] = c.logp - torch.tensor([200.0, -200.0])
    value, gradient, _ = c.run(DAPO(kl=kl))
    assert math.isfinite(value)
    assert gradient.isfinite().all()


def test_needs_the_reference_only_where_it_counts():
    assert "ref_logp" not in DAPO().needs()
    assert "ref_logp" in DAPO(kl=K3()).needs()
    assert K3().beta == 0.04


# --- keeping the sampling mask ---


def kept_case(seed=0):
    """Each trained token's kept set: the two or three likeliest tokens of another policy, and the target."""
    c = policy_case(seed)
    targets = c.batch.tokens[c.batch.index]
    rng = torch.Generator().manual_seed(seed)
    old = (c.logits + 0.3 * torch.randn(c.logits.shape, generator=rng, dtype=torch.float64)).log_softmax(-1)
    kept = torch.full((len(targets), 4), -1, dtype=torch.int32)
    for i, target in enumerate(targets.tolist()):
        best = old[i].topk(3 - i % 2).indices.tolist()
        inside = sorted({*best, target})
        kept[i, : len(inside)] = torch.tensor(inside)
    mass = torch.stack([old[i, k[k >= 0].long()].exp().sum() for i, k in enumerate(kept)])
    full = old.gather(1, targets[:, None])[:, 0]
    c.batch.signals |= {"kept": kept, "behaviour_logp": full, "kept_logp": full - mass.log()}
    return c


@pytest.mark.parametrize("seed", range(3))
def test_kept_mask_is_the_loss_over_the_cut_vocabulary(seed):
    """The naive form: logits outside the set at minus infinity, then the plain loss against the sampler's cut log-probs."""
    c = kept_case(seed)
    kept, width = c.batch.signals["kept"], c.logits.shape[1]
    inside = torch.stack([torch.isin(torch.arange(width), k[k >= 0].long()) for k in kept])
    leaf = c.logits.clone().requires_grad_()
    cut = leaf.masked_fill(~inside, -1e9)
    signals = {**c.batch.signals, "behaviour_logp": c.batch.signals["kept_logp"]}
    mine, gradient, metrics = c.run(DAPO(kept_mask=True))
    naive = case(seed=seed)
    naive.batch.signals, naive.logits = signals, cut
    total, _ = DAPO()(PlainOutput(cut, c.batch.tokens[c.batch.index]), naive.batch)
    assert mine == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, leaf)[0], rtol=1e-6, atol=1e-9)
    gaps = c.run(DAPO())[2]
    assert metrics["sampler_gap"] != pytest.approx(gaps["sampler_gap"])  # like to like, in the measure too


def test_trap_cut_sampling_against_the_whole_vocabulary_is_a_false_gap():
    """On policy under top-p the ratio of like to like is 1; against the whole vocabulary's it is the kept mass."""
    c = case(".xx", vocab=5)
    targets = c.batch.tokens[c.batch.index]
    kept = torch.stack([targets, (targets + 1) % 5], 1).int()
    mass = c.logits.softmax(-1).gather(1, kept.long()).sum(1)
    c.batch.signals = {"advantage": torch.ones(2).double(), "kept": kept, "kept_logp": c.logp - mass.log()}
    c.batch.signals["behaviour_logp"] = c.logp
    assert c.run(DAPO(kept_mask=True))[2]["ratio"] == pytest.approx(1)
    c.batch.signals["behaviour_logp"] = c.batch.signals["kept_logp"]
    assert c.run(DAPO())[2]["ratio"] == pytest.approx(float(mass.mean()), rel=1e-5)


def test_a_set_of_one_cannot_move():
    c = case(".x")
    c.batch.signals = {"advantage": torch.ones(1).double(), "behaviour_logp": c.logp, "kept_logp": torch.zeros(1).double()}
    c.batch.signals["kept"] = c.batch.tokens[c.batch.index][:, None].int()
    torch.testing.assert_close(c.run(DAPO(kept_mask=True))[1], torch.zeros(1, 11, dtype=torch.float64))


def test_kept_mask_needs_its_signals():
    assert {"kept", "kept_logp"} <= DAPO(kept_mask=True).needs()
    assert not {"kept", "kept_logp"} & DAPO().needs()
