"""The clipped value loss against a loop over tokens, and what the clip does to its gradient.

TRL 1.16 has no PPO trainer any more, so the loop stands in for it: half the sum of the larger of two squared errors.
"""

from types import SimpleNamespace

import pytest
import torch

from tutelage.losses.value import ClippedValue


def case(seed, n=40):
    make = torch.Generator().manual_seed(seed)
    old, target = torch.randn(2, n, generator=make, dtype=torch.float64)
    values = (old + 0.4 * torch.randn(n, generator=make, dtype=torch.float64)).requires_grad_()
    return values, SimpleNamespace(signals={"value": old, "return": target})


def run(loss, values, batch):
    total, metrics = loss(SimpleNamespace(values=values), batch)
    return total, torch.autograd.grad(total, values)[0], metrics


@pytest.mark.parametrize("clip", [0.2, 0.0, 1.0])
def test_the_loss_is_the_loop(clip):
    values, batch = case(1)
    total, gradient, metrics = run(ClippedValue(clip=clip), values, batch)
    expected, slopes, stopped = 0.0, [], 0
    rows = zip(values.tolist(), batch.signals["value"].tolist(), batch.signals["return"].tolist(), strict=True)
    for v, old, target in rows:
        free, held = (v - target) ** 2, (min(max(v, old - clip), old + clip) - target) ** 2
        bound = clip > 0 and held > free
        expected += 0.5 * (held if bound else free)
        slopes.append(0.0 if bound else v - target)
        stopped += bound
    assert total.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64))
    assert metrics["clip_fraction"] == (stopped, 40.0)
    assert stopped > 0 or clip != 0.2


def test_beyond_the_clip_a_value_may_come_back_but_go_no_further():
    signals = {"value": torch.tensor([0.0, 0.0]), "return": torch.tensor([1.0, -1.0])}
    values = torch.tensor([0.5, 0.5], requires_grad=True)
    _, gradient, _ = run(ClippedValue(clip=0.2), values, SimpleNamespace(signals=signals))
    assert gradient.tolist() == [0.0, 1.5]
