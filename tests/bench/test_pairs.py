"""Each pair of sides computes the same at toy size: `pair` raises where it does not. And a pair that differs is found out."""

import warnings

import pytest

pytest.importorskip("trl")

from bench import distill, dpo, grpo, rollout, sft
from bench.harness import Unequal
from bench.models import lengths, model, samples, stock
from tutelage.losses.preference import DPO


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_lengths_have_the_mean_and_the_bound():
    found = lengths(192)
    assert sum(found) / len(found) == pytest.approx(64, rel=0.02)
    assert max(found) <= 256
    assert min(found) >= 4
    assert max(found) > 3 * 64


def test_rollouts():
    ours = model("mini")
    rollout.equal(ours, stock(ours), rollout.load("mini", lengths(6, 10, 20), 3))


def test_rollouts_of_another_model_are_found_out():
    with pytest.raises(Unequal, match="greedy tokens differ"):
        rollout.equal(model("mini"), stock(model("mini", seed=1)), rollout.load("mini", [12] * 4, 4))


def test_generate_ends_each_row_at_its_length():
    work = rollout.load("mini", [3, 7, 1, 5], 4, group=2)
    found = rollout.generate(stock(model("mini")), work, 2)
    assert [len(r) for r in found] == work.replies


@pytest.mark.long
def test_sft():
    sft.pair("mini", samples("mini", lengths(6, 16, 40)), "float32")


@pytest.mark.long
def test_dpo():
    dpo.pair("mini", 4, "float32")


@pytest.mark.long
def test_grpo():
    grpo.pair("mini", grpo.groups("mini", 8), "float32")


@pytest.mark.long
@pytest.mark.parametrize("domains", [("a",), ("a", "b", "c", "d")])
def test_distillation(domains):
    distill.pair("mini", 8, domains, "float32")


@pytest.mark.long
def test_another_loss_is_found_out(monkeypatch):
    monkeypatch.setattr(dpo, "LOSS", DPO(beta=0.1, normalise=True))
    with pytest.raises(Unequal):
        dpo.pair("mini", 4, "float32")
    rows = samples("mini", lengths(4, 16, 40))
    monkeypatch.setattr(sft, "stock", lambda ours: stock(model("mini", seed=1)))
    with pytest.raises(Unequal):
        sft.pair("mini", rows, "float32")
