"""`PackedOutput` against plain autograd over whole logits: values and gradients, kept or made again, with each kind of head."""

import pytest
import torch

from tests.losses.plain import PlainOutput
from tutelage.learn import output
from tutelage.learn.output import PackedOutput
from tutelage.losses.divergence import entropy, reverse_kl, with_entropy
from tutelage.model.head import Head

M, D, V = 7, 5, 11
HEADS = {"plain": {}, "cap and scale": {"softcap": 1.5, "scale": 0.7}}


def toy(how, bias, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=rng, dtype=dtype)  # noqa: E731
    head = Head(new(V, D).requires_grad_(), new(V).requires_grad_() if bias else None, **HEADS[how])
    return new(M, D).requires_grad_(), head, torch.randint(V, (M,), generator=rng), new(M, V).log_softmax(-1), new(M)


def both_gradients(out, hidden, head, other, weights):
    """Of a sum that reads picked log-probs, and a divergence of some tokens, every token with a weight of its own."""
    some = torch.tensor([4, 0, 6])
    found = out.reduce_vocab(lambda s, t: with_entropy(reverse_kl(s, t), s), some, other[some])
    alone = out.reduce_vocab(lambda s: s[:, :3].logsumexp(-1), some)  # one column
    total = (weights * out.logp).sum() + (weights[some] * (found[:, 0] + alone)).sum()
    leaves = [x for x in (hidden, head.weight, head.bias) if x is not None]
    return found.detach(), total.detach(), torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("keep", [0, 10**6])
@pytest.mark.parametrize("chunk", [2 * V, 10**6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", HEADS)
def test_values_and_gradients_are_those_of_whole_logits(monkeypatch, how, bias, chunk, keep):
    monkeypatch.setattr(output, "CHUNK", chunk)
    monkeypatch.setattr(output, "KEEP", keep)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # the head gives fp32; here all is fp64
    hidden, head, targets, other, weights = toy(how, bias)
    mine = PackedOutput(hidden, head, targets, 0.8)
    plain = PlainOutput(head(hidden), targets, 0.8)
    torch.testing.assert_close(mine.entropy, plain.entropy)
    for a, b in zip(
        both_gradients(mine, hidden, head, other, weights), both_gradients(plain, hidden, head, other, weights), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_head_that_does_not_learn_gets_no_gradient_and_nothing_is_kept_without_one():
    hidden, head, targets, _, weights = toy("plain", False, torch.float32)
    fixed = Head(head.weight.detach())
    out = PackedOutput(hidden, fixed, targets, 1.0)
    (out.logp * weights).sum().backward()
    assert fixed.weight.grad is None
    want = torch.autograd.grad((PlainOutput(head(hidden), targets).logp * weights).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, want)
    with torch.no_grad():
        silent = PackedOutput(hidden, head, targets, 1.0)._rows(lambda logits, wanted: (logits[:, :1], wanted or None), hidden)
    assert not silent.requires_grad


def test_entropy_is_that_of_the_formula_and_has_no_gradient():
    logp = torch.tensor([[0.5, 0.25, 0.25], [1.0 - 2e-30, 1e-30, 1e-30]]).log().requires_grad_()
    torch.testing.assert_close(entropy(logp), torch.tensor([1.5 * torch.log(torch.tensor(2.0)).item(), 0.0]))
    assert not entropy(logp).requires_grad
