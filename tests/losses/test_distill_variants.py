"""The variants of distillation losses against naive loops, autograd of the plain formulas, and what their papers state."""

import math

import pytest
import torch

from tests.losses.plain import PlainOutput, case, length_weights, noise, tokens
from tests.losses.test_distill_loss import LinearHead, full_case, sampled_case, teacher_logits
from tutelage.losses.correction import IcePop, SequenceMask, TruncatedIS
from tutelage.losses.distill import FullReverseKL, SampledReverseKL
from tutelage.losses.divergence import forward_kl, jensen_shannon, log_mixture, reverse_kl
from tutelage.losses.extrapolated import ExtrapolatedReverseKL
from tutelage.losses.full import FullForwardKL, FullJSD
from tutelage.losses.proximal import ProximalReverseKL
from tutelage.losses.surrogate import ClippedReverseKL
from tutelage.losses.top_k import TailForwardKL, TailReverseKL, TopKReverseKL, outcomes
from tutelage.types import Batch

TOPK = [TopKReverseKL(), TailReverseKL(), TailForwardKL()]
FULL = [FullReverseKL(), FullForwardKL(), FullJSD(), FullJSD(beta=0.1), FullJSD(beta=0.9)]


def with_top_k(c, logits, k=4):
    """The case with the top-k of a teacher's logits [M, V] at its temperature."""
    logprobs = (logits / c.temperature).log_softmax(-1)
    ids = logprobs.topk(k).indices
    c.batch.signals |= {"teacher_topk": ids, "teacher_topk_logp": outcomes(logprobs, ids)}
    return c


def top_case(seed=0, k=4, temperature=1.0, dtype=torch.float64):
    c = case(seed=seed, temperature=temperature, dtype=dtype)
    teacher = case(seed=seed + 70, dtype=dtype).logits
    return with_top_k(c, teacher, k), teacher


def autograd(c, formula):
    """(sum, gradient) of a formula of the student's log-probs [M, V], written plainly."""
    leaf = c.logits.clone().requires_grad_()
    total = formula((leaf / c.temperature).log_softmax(-1))
    return total.item(), torch.autograd.grad(total, leaf)[0]


# --- full vocabulary --------------------------------------------------------------------------------------------------


def plain(loss, p, q):
    """A divergence of two lists of probabilities, by a loop."""
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    if isinstance(loss, FullForwardKL):
        return kl(q, p)
    if isinstance(loss, FullJSD):
        m = [loss.beta * y + (1 - loss.beta) * x for x, y in zip(p, q, strict=True)]
        return loss.beta * kl(q, m) + (1 - loss.beta) * kl(p, m)
    return kl(p, q)


@pytest.mark.parametrize("loss", FULL, ids=repr)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_full_vocabulary_values_are_the_naive_loop_and_gradients_its_differences(loss, temperature):
    c = full_case(2, temperature=temperature)
    teachers = (teacher_logits(c) / temperature).softmax(-1).tolist()

    def value(case_):
        return sum(plain(loss, t.p, q) for t, q in zip(tokens(case_), teachers, strict=True))

    found, gradient, metrics = c.run(loss)
    assert found == pytest.approx(value(c), rel=1e-10)
    assert metrics[loss.measure] == pytest.approx(found / len(c.logits), rel=1e-5)
    for m, v in [(0, 0), (3, 7), (9, 2)]:
        moved = []
        for step in (1e-6, -1e-6):
            old = c.logits.clone()
            c.logits[m, v] += step
            moved.append(value(c))
            c.logits = old
        assert float(gradient[m, v]) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("loss", FULL, ids=repr)
def test_trap_gradient_is_exactly_zero_at_equality(loss):
    c = full_case(4, vocab=501, widths=(6,), dtype=torch.float32)
    c.chunk = 100
    c.logits = c.batch.extras["teacher_heads"][0](c.batch.signals["teacher_hidden"])
    value, gradient, _ = c.run(loss)
    assert value == pytest.approx(0, abs=1e-6)
    assert not gradient.any()


def test_trap_autograd_of_the_plain_forms_is_not_exactly_zero_at_equality():
    c = full_case(4, vocab=501, widths=(6,), dtype=torch.float32)
    t = c.logits.log_softmax(-1)
    assert autograd(c, lambda s: (t.exp() * (t - s)).sum())[1].any()
    assert autograd(c, lambda s: (s.exp() * (s - t)).sum())[1].any()


def test_jensen_shannon_tends_to_both_kls_and_is_symmetric_at_a_half():
    s, t = case(seed=1).logits.log_softmax(-1), case(seed=2).logits.log_softmax(-1)
    torch.testing.assert_close(jensen_shannon(s, t, 1e-7) / 1e-7, forward_kl(s, t), rtol=1e-4, atol=0)
    torch.testing.assert_close(jensen_shannon(s, t, 1 - 1e-7) / 1e-7, reverse_kl(s, t), rtol=1e-4, atol=0)
    torch.testing.assert_close(jensen_shannon(s, t, 0.5), jensen_shannon(t, s, 0.5))
    assert (jensen_shannon(s, t, 0.5) <= math.log(2)).all()


@pytest.mark.parametrize("loss", FULL, ids=repr)
def test_trap_a_far_teacher_stays_finite(loss):
    c = full_case(3, widths=(6,), dtype=torch.float32)
    for scale in (200.0, -200.0):
        c.logits = scale * case(seed=9).logits.float()
        value, gradient, _ = c.run(loss)
        assert math.isfinite(value)
        assert gradient.isfinite().all()
        assert value > 0


@pytest.mark.parametrize("loss", FULL, ids=repr)
def test_trap_padded_vocabularies_are_refused(loss):
    c = full_case(6, widths=(6,))
    c.batch.extras["teacher_heads"] = (LinearHead(6, 13, seed=6),)
    with pytest.raises(ValueError, match=r"11 entries and the teacher's 13.*true vocabulary"):
        c.run(loss)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_the_ends_of_beta_are_other_losses(beta):
    with pytest.raises(ValueError, match="beta"):
        FullJSD(beta=beta)


# --- top-k ------------------------------------------------------------------------------------------------------------


def dense(loss, s, teacher, k):
    """The formulas over whole log-probs [M, V] of student and teacher, by loops over tokens and outcomes."""
    total = 0.0
    for a, b in zip(s, teacher, strict=True):
        inside = b.argsort(descending=True)[:k].tolist()
        p, q = [a[v].exp() for v in inside], [b[v].exp() for v in inside]
        if isinstance(loss, (TailReverseKL, TailForwardKL)):
            outside = [v for v in range(len(a)) if v not in inside]
            p, q = [*p, a[outside].exp().sum()], [*q, b[outside].exp().sum()]
        pairs = list(zip(p, q, strict=True))
        if isinstance(loss, TailForwardKL):
            total = total + sum(y * (y / x).log() for x, y in pairs)
        elif isinstance(loss, TailReverseKL):
            total = total + sum(x * (x / y).log() for x, y in pairs)
        else:
            total = total + sum(x * (x / y).log() - x + y for x, y in pairs)
    return total


@pytest.mark.parametrize("loss", TOPK, ids=repr)
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (4, 1.0), (4, 0.6), (10, 1.0)])
def test_top_k_value_and_gradient_are_autograds_of_the_dense_loop(loss, k, temperature):
    c, teacher = top_case(3, k, temperature)
    t = (teacher / temperature).log_softmax(-1)
    expected, expected_gradient = autograd(c, lambda s: dense(loss, s, t, k))
    value, gradient, metrics = c.run(loss)
    assert value == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(gradient, expected_gradient)
    assert metrics[loss.measure] == pytest.approx(value / len(c.logits), rel=1e-5)
    assert metrics["teacher_mass"] == pytest.approx(float(t.exp().topk(k).values.sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("loss", TOPK, ids=repr)
def test_trap_top_k_is_never_negative_and_zero_only_at_the_teacher(loss):
    c, teacher = top_case(4)
    c.logits = teacher
    value, gradient, _ = c.run(loss)
    assert value == pytest.approx(0, abs=1e-14)
    assert not gradient.any()
    for seed in range(30):
        c.logits = teacher + 10.0 ** -(seed % 3) * case(seed=seed).logits
        assert c.run(loss)[0] > 1e-8


@pytest.mark.parametrize("loss", TOPK, ids=repr)
def test_trap_top_k_gradient_is_exactly_zero_at_equality_in_fp32(loss):
    c, teacher = top_case(5, dtype=torch.float32)
    c.logits = teacher
    c.chunk = 100
    assert not c.run(loss)[1].any()


def test_trap_the_uncorrected_form_goes_negative_and_drains_the_set():
    """Descending on Σ_{TopK} p_s log(p_s/p_t) empties the set; on the corrected form it fills it as the teacher does."""
    teacher = torch.tensor([[0.0, 0.0, 0.0, 0.0, -1.0, -1.0]], dtype=torch.float64).log_softmax(-1)
    ids, mass = torch.tensor([[0, 1, 2, 3]]), {}
    values = {}
    for corrected in (False, True):
        logits = teacher.clone().requires_grad_()
        for _ in range(3000):
            s = logits.log_softmax(-1)
            if corrected:
                loss = TopKReverseKL().at_tokens(s, ids, outcomes(teacher, ids)).sum()
            else:
                p = s.gather(1, ids)
                loss = (p.exp() * (p - teacher.gather(1, ids))).sum()
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - 0.1 * gradient).detach().requires_grad_()
        mass[corrected], values[corrected] = logits.softmax(-1)[0, :4].sum().item(), loss.item()
    start = float(teacher[0, :4].exp().sum())
    assert values[False] < -0.1
    assert mass[False] < 0.5 * start
    assert values[True] == pytest.approx(0, abs=1e-12)
    assert mass[True] == pytest.approx(start)


def test_tail_forms_are_lower_bounds_that_meet_the_full_divergence_where_k_leaves_one_token():
    c, teacher = top_case(6, k=10)
    t = teacher.log_softmax(-1)
    for loss, formula in [(TailReverseKL(), reverse_kl), (TailForwardKL(), forward_kl)]:
        whole = float(formula(c.logits.log_softmax(-1), t).sum())
        values = [with_top_k(c, teacher, k) and c.run(loss)[0] for k in (1, 3, 6, 10)]
        assert values == sorted(values)
        assert values[-1] == pytest.approx(whole, rel=1e-10)


def test_trap_a_top_k_of_a_padded_vocabulary_is_refused():
    c, _ = top_case(7)
    c.batch.signals["teacher_topk"][2, 1] = 11
    for loss in TOPK:
        with pytest.raises(ValueError, match=r"11 entries.*names token 11.*true vocabulary"):
            c.run(loss)


# --- other rewards of the sampled token -------------------------------------------------------------------------------


def rewarded(c, reward, clip=5.0):
    """MiMo's loss by a loop with another reward: (sum, gradient)."""
    found, total, gradient = tokens(c), 0.0, []
    for t, share in zip(found, length_weights(found), strict=True):
        w = math.exp(t.logp - t.signals["behaviour_logp"])
        w = w if 0.2 <= w <= 5 else 0.0
        a = max(-clip, min(clip, reward(t)))
        total -= share * w * a * t.logp
        gradient.append([-share * w * a * g for g in t.score_function(c.temperature)])
    return total, torch.tensor(gradient, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_proximal_teacher_is_the_mixture(share):
    c = sampled_case(3, gap=3.0)

    def reward(t):
        pi, teacher = math.exp(t.logp), math.exp(t.signals["teacher_logp"])
        return math.log(share * teacher + (1 - share) * pi) - t.logp

    expected, expected_gradient = rewarded(c, reward)
    value, gradient, metrics = c.run(ProximalReverseKL(share=share))
    assert value == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(gradient, expected_gradient)
    assert metrics["kl"] == pytest.approx(float((c.logp - c.batch.signals["teacher_logp"]).mean()), rel=1e-5)  # the true gap


def test_the_proximal_reward_is_bounded_below_and_zero_at_the_student():
    gaps = torch.tensor([-1e4, -50.0, -1.0, 0.0, 1.0, 29.9, 30.1, 300.0])
    found = log_mixture(gaps, 0.5)
    assert (found >= -math.log(2)).all()
    assert found[3] == 0
    assert found.isfinite().all()
    torch.testing.assert_close(found[5:], gaps[5:] - math.log(2))
    assert (found.diff() >= 0).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25])
def test_the_extrapolated_reward_is_the_papers(scale):
    c = sampled_case(4)
    c.batch.signals["ref_logp"] = c.logp + noise(c, 0.7, 9)

    def reward(t):
        ref = t.signals["ref_logp"]
        return scale * (t.signals["teacher_logp"] - ref) - (t.logp - ref)

    expected, expected_gradient = rewarded(c, reward)
    value, gradient, _ = c.run(ExtrapolatedReverseKL(scale=scale))
    assert value == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(gradient, expected_gradient)
    if scale == 1:
        torch.testing.assert_close(gradient, c.run(SampledReverseKL())[1])


@pytest.mark.parametrize(("scale", "still"), [(1.25, True), (1.0, False)])
def test_the_extrapolated_optimum_is_the_tilted_reference(scale, still):
    """At π ∝ π_ref (π_T/π_ref)^1.25 the expected gradient vanishes: every token sampled once, weighted by π/μ."""
    vocab, n = 11, torch.arange(11)
    ref, teacher = (case(".x", seed=i).logits[0].log_softmax(-1) for i in (1, 2))
    leaf = (ref + 1.25 * (teacher - ref)).requires_grad_()
    batch = Batch(tokens=n, row=n, pos=n * 0, index=n, trow=n, counts={"rows": vocab, "tokens": vocab})
    uniform = torch.full((vocab,), -math.log(vocab), dtype=torch.float64)
    batch.signals = {"teacher_logp": teacher, "ref_logp": ref, "behaviour_logp": uniform}
    loss = ExtrapolatedReverseKL(scale=scale, advantage_clip=None, weight_low=0.0, weight_high=1e9)
    total, _ = loss(PlainOutput(leaf.expand(vocab, -1), n), batch)
    (gradient,) = torch.autograd.grad(total, leaf)
    assert (float(gradient.abs().max()) < 1e-12) == still


# --- outcome rewards that fade -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "shares"), [("linear", [1, 0.75, 0.5, 0.25, 0]), ("cosine", [1, 0.853553, 0.5, 0.146447, 0])]
)
def test_alpha_moves_from_its_start_to_its_end(shape, shares):
    c = sampled_case(5)
    loss = SampledReverseKL(alpha=0.8, alpha_end=0.2, alpha_shape=shape)
    for progress, share in zip([0, 0.25, 0.5, 0.75, 1], shares, strict=True):
        c.batch.extras["progress"] = progress
        value, gradient, metrics = c.run(loss)
        fixed = SampledReverseKL(alpha=0.2 + 0.6 * share)
        assert metrics["alpha"] == pytest.approx(fixed.alpha, abs=1e-6)
        assert value == pytest.approx(c.run(fixed)[0], rel=1e-5)
        torch.testing.assert_close(gradient, c.run(fixed)[1], rtol=1e-5, atol=1e-6)


def test_an_alpha_that_begins_or_ends_at_zero_needs_the_advantage():
    assert "advantage" in SampledReverseKL(alpha_end=0.5).needs()
    assert "advantage" in SampledReverseKL(alpha=0.5, alpha_end=0.0).needs()
    assert "advantage" not in SampledReverseKL(alpha_end=0.0).needs()


def test_trap_a_fixed_mixture_of_reward_and_teacher_collapses_entropy_and_a_fading_one_does_not():
    """One context, exact expectations: the optimum of a fixed α is π_T exp(α Â), and the entropy that is logged shows it."""
    vocab, n = 6, torch.arange(6)
    teacher = case(".x", vocab=vocab, seed=3).logits[0].log_softmax(-1) / 4
    teacher = teacher.log_softmax(-1)
    batch = Batch(tokens=n, row=n, pos=n * 0, index=n, trow=n, counts={"rows": vocab, "tokens": vocab})
    uniform = torch.full((vocab,), -math.log(vocab), dtype=torch.float64)
    batch.signals = {"teacher_logp": teacher, "behaviour_logp": uniform, "advantage": (n == 2).double()}
    last = {}
    for end in (None, 0.0):
        loss = SampledReverseKL(alpha=8.0, alpha_end=end, weight_low=0.0, weight_high=1e9)
        logits = teacher.clone()
        for step in range(400):
            batch.extras["progress"] = min(1.0, step / 200)
            leaf = logits.clone().requires_grad_()
            total, metrics = loss(PlainOutput(leaf.expand(vocab, -1), n), batch)
            logits = logits - 0.2 * torch.autograd.grad(total, leaf)[0]
        last[end] = metrics["entropy"][0] / metrics["entropy"][1]
    whole = float(-(teacher.exp() * teacher).sum())
    assert last[None] < 0.05 * whole
    assert last[0.0] == pytest.approx(whole, rel=0.01)


# --- Nemotron's surrogate ---------------------------------------------------------------------------------------------


def surrogate_case(seed=0):
    c = sampled_case(seed, gap=1.5)
    c.batch.signals["prox_logp"] = c.logp + noise(c, 0.3, seed + 20)
    return c


@pytest.mark.parametrize("correction", [IcePop(low=0.8, high=1.3), TruncatedIS(low=0.8, high=1.3)])
def test_the_surrogate_is_the_naive_loop(correction):
    c, low, high, bound = surrogate_case(2), 0.2, 0.2, 1.0
    total, gradient, dropped = 0.0, [], 0
    for t in tokens(c):
        prox = t.signals["prox_logp"]
        r, weight = math.exp(t.logp - prox), math.exp(prox - t.signals["behaviour_logp"])
        if isinstance(correction, IcePop):
            weight = weight if 0.8 <= weight <= 1.3 else 0.0
        weight = max(0.8, min(1.3, weight)) if weight else 0.0
        dropped += weight == 0
        a = max(-bound, min(bound, t.signals["teacher_logp"] - prox))
        held = max(1 - low, min(1 + high, r)) * a
        total -= weight * min(r * a, held)
        free = r * a <= held
        gradient.append([-weight * r * a * free * g for g in t.score_function(c.temperature)])
    loss = ClippedReverseKL(correction=correction, advantage_clip=bound)
    value, found, metrics = c.run(loss)
    assert value == pytest.approx(total, rel=1e-10)
    torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64))
    if isinstance(correction, IcePop):
        assert metrics["discarded"] == pytest.approx(dropped / len(c.logits))
        assert dropped


def test_the_surrogate_at_the_teacher_moves_nothing_and_needs_no_advantage():
    c = surrogate_case(3)
    c.batch.signals |= {"prox_logp": c.logp, "teacher_logp": c.logp}
    del c.batch.signals["advantage"]
    assert not c.run(ClippedReverseKL())[1].any()
    assert ClippedReverseKL().needs() == {"teacher_logp", "prox_logp", "behaviour_logp"}


@pytest.mark.parametrize("correction", [None, SequenceMask()])
def test_a_surrogate_without_the_steps_start_is_refused(correction):
    with pytest.raises(ValueError, match="IcePop or TruncatedIS"):
        ClippedReverseKL(correction=correction)
