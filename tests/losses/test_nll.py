import math

import pytest
import torch
import torch.nn.functional as F

from tests.losses.plain import case, tokens
from tutelage.losses.nll import NLL


def test_value_and_gradient_are_cross_entropy():
    c = case(seed=1)
    leaf = c.logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, c.batch.tokens[c.batch.index], reduction="sum")
    value, gradient, metrics = c.run(NLL())
    assert value == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])
    assert metrics["nll"] == pytest.approx(expected.item() / len(leaf), rel=1e-12)


def test_value_is_the_naive_sum():
    c = case(seed=2, temperature=0.7)
    assert c.run(NLL())[0] == pytest.approx(-sum(math.log(t.p[t.target]) for t in tokens(c)), rel=1e-12)


def test_normalised_per_token_and_needs_nothing():
    assert NLL().per == "tokens"
    assert NLL().needs() == frozenset()
