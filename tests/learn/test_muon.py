"""fp32 Muon against PyTorch's own, and its orthogonalisation against the singular values it should reach."""

import copy

import torch

from tutelage.learn.muon import Muon, orthogonal

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def test_follows_pytorchs_muon_within_bf16():
    torch.manual_seed(0)
    mine = torch.nn.ModuleList([torch.nn.Linear(24, 16, bias=False), torch.nn.Linear(16, 40, bias=False)])
    theirs = copy.deepcopy(mine)
    start = [p.clone() for p in mine.parameters()]
    how = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = [Muon(mine.parameters(), **how), torch.optim.Muon(theirs.parameters(), **how)]
    for step in range(5):
        for model, optimizer in zip((mine, theirs), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for a, b, s in zip(mine.parameters(), theirs.parameters(), start, strict=True):
        assert (a - b).norm() < 0.02 * (a - s).norm()


def test_singular_values_come_near_one():
    x = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(x, COEFFICIENTS, 5))
    assert values.min() > 0.6
    assert values.max() < 1.3
    tall = orthogonal(x.mT, COEFFICIENTS, 5)
    torch.testing.assert_close(tall, orthogonal(x, COEFFICIENTS, 5).mT)
