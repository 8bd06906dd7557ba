"""Replay beside the policy's own loss, and domains by weight: gradients, shares, metrics, resuming, refusals."""

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests import tiny
from tests.stages.test_loops import refused, same, weights
from tests.stages.test_methods import Picky, lines
from tests.stages.toy import DATA, INIT, Letters, make, rl
from tutelage.context import Stopped
from tutelage.credit.group import GroupRelative
from tutelage.envs.single import SingleTurn
from tutelage.graph import key
from tutelage.learn.learner import Learner
from tutelage.learn.optim import AdamW
from tutelage.losses.nll import NLL
from tutelage.losses.reinforce import REINFORCE
from tutelage.rollout.base import Sampling
from tutelage.rollout.driver import Driver
from tutelage.stages.mixture import Replay, Replays, shares
from tutelage.store import Store
from tutelage.text.rows import read_rows
from tutelage.text.template import Chat, Document
from tutelage.types import Signal

BOTH = ("low", "high")


# --- shares ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 12))
def test_shares_are_never_a_prompt_ahead_and_exact_wherever_they_can_be(parts, prompts):
    total, got = sum(parts), [0] * len(parts)
    for step, given_ in enumerate(islice(shares([p / 10 for p in parts], prompts), 2 * total), 1):
        assert sum(given_) == prompts
        assert min(given_) >= 0
        got = [a + b for a, b in zip(got, given_, strict=True)]
        assert all(g * total < step * prompts * p + total for g, p in zip(got, parts, strict=True))
        if all(step * prompts * p % total == 0 for p in parts):
            assert got == [step * prompts * p // total for p in parts]


def test_a_single_step_is_the_largest_remainder_method():
    assert next(shares([0.47, 0.16, 0.158, 0.12, 0.061, 0.031], 10)) == [5, 2, 1, 1, 1, 0]
    assert list(islice(shares([0.1, 0.2, 0.7], 4), 5)) == [[0, 1, 3], [1, 1, 2], [0, 1, 3], [1, 0, 3], [0, 1, 3]]
    assert list(islice(shares([1.0, 1.0], 6), 3)) == [[3, 3]] * 3


def asked(stage, store, monkeypatch):
    """The tasks of each call of the driver."""
    calls, collect = [], Driver.collect
    monkeypatch.setattr(Driver, "collect", lambda self, tasks, *a: calls.append(list(tasks)) or collect(self, tasks, *a))
    make(stage, store)
    return calls


def test_prompts_are_drawn_by_weight_and_each_domain_goes_through_all_its_tasks(tmp_path, monkeypatch):
    store, stage = Store(tmp_path / "s"), rl(domains=BOTH, weights={"low": 3.0, "high": 1.0}, steps=6, prompts=6)
    calls = asked(stage, store, monkeypatch)
    counts = [Counter(t.domain for t in call) for call in calls]
    assert sum((c for c in counts), Counter()) == {"low": 27, "high": 9}
    assert {c["low"] for c in counts} == {4, 5}
    low = [t.id for call in calls for t in call if t.domain == "low"]
    assert len(set(low[:13])) == len(set(low[13:26])) == 13  # "low" holds thirteen tasks
    for line, count in zip(lines(store, stage), counts, strict=True):
        assert line["prompt_share/low"] == pytest.approx(count["low"] / 6)
        assert line["prompt_share/low"] + line["prompt_share/high"] == pytest.approx(1)
        assert line["token_share/low"] + line["token_share/high"] == pytest.approx(1)
        assert {"reward/low", "reward/high"} <= set(line)


def test_equal_weights_are_no_weights_at_all(tmp_path):
    store = Store(tmp_path / "s")
    plain, weighted = rl(domains=BOTH), rl(domains=BOTH, weights={"low": 0.3, "high": 0.3})
    make(plain, store)
    make(weighted, store)
    assert same(weights(store, plain), weights(store, weighted))
    assert key(plain) != key(weighted)


def test_a_weighted_stage_with_replay_and_resampling_resumes_to_the_same_bits(tmp_path):
    stage = rl(
        domains=BOTH,
        weights={"low": 2.0, "high": 1.0},
        replay=(Replay(data=DATA.out(), weight=0.5, rows=3),),
        env=SingleTurn(verifier=Picky()),
        credit=(GroupRelative(),),
        resample=1,
        minibatches=2,
        steps=4,
    )
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(stage, whole)
    for stop_after in (1, 2):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(stage, cut)
    assert same(weights(whole, stage), weights(cut, stage))
    assert lines(whole, stage) == lines(cut, stage)
    assert done.cost == resumed.cost


def test_further_draws_ask_each_domain_for_its_own_share(tmp_path, monkeypatch):
    fields = {"domains": BOTH, "weights": {"low": 1.0, "high": 3.0}, "resample": 2, "credit": (GroupRelative(),)}
    stage = rl(**fields, env=SingleTurn(verifier=Picky()), steps=2, group=2)
    calls = asked(stage, Store(tmp_path / "s"), monkeypatch)
    again = [[t.id for t in call if t.domain == "high"] for call in calls]  # is never right, so always short
    assert [len(ids) for ids in again] == [3] * 6
    further = [i for n in (1, 2, 4, 5) for i in again[n]]
    assert len(set(further)) == 12  # all twelve tasks of "high" before any comes again


# --- replay ---


def test_the_gradient_is_the_weighted_sum_of_both_apart():
    def gradient(*terms):
        learner = Learner(tiny.model(), micro_tokens=20)
        for samples, loss, weight in terms:
            learner.forward_backward(samples, loss, weight=weight)
        return {n: p.grad.clone() for n, p in learner.model.named_parameters()}

    drawn, data = tiny.samples([7, 12, 9]), tiny.samples([20, 5, 6, 11], seed=1, prompt=1)
    for i, sample in enumerate(drawn):
        for name in ("advantage", "behaviour_logp"):
            values = torch.full((len(sample.trained),), 0.5 * i - 0.4).numpy()
            sample.signals[name] = Signal(values, sample.trained)
    rl_alone, data_alone = gradient((drawn, REINFORCE(), 1.0)), gradient((data, NLL(), 1.0))
    both = gradient((drawn, REINFORCE(), 1.0), (data, NLL(), 0.3))
    for name, found in both.items():
        torch.testing.assert_close(found, rl_alone[name] + 0.3 * data_alone[name], atol=1e-5, rtol=1e-4)
        assert data_alone[name].abs().max() > 1e-3


@pytest.mark.parametrize("template", [Chat(), Document()], ids=["replies", "documents"])
def test_a_stage_with_nothing_but_replay_is_a_fit(template, tmp_path):
    """Where every advantage is zero, only the replayed data is left."""
    store, replay = Store(tmp_path / "s"), Replay(data=DATA.out(), weight=2.0, rows=5, template=template)
    one = Sampling(max_new_tokens=1)
    stage = rl(replay=(replay,), steps=3, group=1, sampling=one, optimizer=AdamW(lr=0.01), clip=0.0)
    cost = make(stage, store).cost
    from tutelage.model.folder import load_model, load_tokenizer
    from tutelage.stages.fit import batch_order

    folder = store.path(key(INIT), "policy")
    learner, tokenizer = Learner(load_model(folder), AdamW(lr=0.01), clip=0.0), load_tokenizer(folder)
    data = []
    for row in read_rows(store.path(key(DATA), "rows")):
        chat = isinstance(template, Chat)
        found = template.example(tokenizer, row["prompt"], row["completion"]) if chat else None
        data.append(found or template.document(tokenizer, row["text"]))
    told, tokens = [], 0
    for step in range(3):
        rows = [data[i] for i in batch_order(len(data), 5, step, 0)]
        told.append(learner.forward_backward(rows, NLL(), weight=2.0)["loss"])
        learner.step()
        tokens += sum(len(r.tokens) for r in rows)
    assert [m["replay/letters.rows/loss"] for m in lines(store, stage)] == pytest.approx(told, rel=1e-5)
    mine = load_file(store.path(key(stage), "policy") / "model.safetensors")
    for name, p in learner.model.state_dict().items():
        if name in mine:
            torch.testing.assert_close(mine[name], p, atol=1e-5, rtol=1e-4)
    assert cost.tokens["trained"] == cost.tokens["sampled"] + cost.tokens["prefilled"] + tokens


def test_each_update_goes_on_where_the_last_one_stopped():
    class Told:
        def forward_backward(self, rows, loss, weight):
            seen.extend(r.tokens[-1] for r in rows)
            return {"loss": 0.0}

    seen: list[int] = []
    replays = Replays((), None, None, 3)
    replays.parts = [(Replay(data=DATA.out(), weight=1.0, rows=4), tiny.samples([3] * 8))]
    for i, sample in enumerate(replays.parts[0][1]):
        sample.tokens[-1] = i
    assert replays.add(Told(), 0)[1] == replays.add(Told(), 1)[1] == 12
    assert sorted(seen) == list(range(8))


# --- what is refused before anything runs ---


def test_weights_that_do_not_fit_the_domains():
    refused(rl(domains=BOTH, weights={"low": 1.0, "hihg": 1.0}), "'hihg'", "high")
    refused(rl(domains=BOTH, weights={"low": 1.0}), "nothing of domain 'high'")
    refused(rl(domains=BOTH, weights={"low": 1.0, "high": 0.0}), "'high'", "leave the domain out")
    refused(rl(domains=BOTH, prompts=5), "5", "2 domains", "weights")


def test_replay_of_data_without_the_columns():
    class Bare(Letters):
        def infer(self, types):
            from dataclasses import replace

            return {"rows": replace(super().infer(types)["rows"], columns=("id", "text"))}

    bare = Bare(name="bare").out()
    refused(rl(replay=(Replay(data=bare, weight=1.0),)), "prompt, completion", "bare.rows")
    rl(replay=(Replay(data=bare, weight=1.0, template=Document()),)).infer(lambda at: at.of.infer(None)[at.port])


def test_data_replayed_twice():
    twice = tuple(Replay(data=DATA.out(), weight=w) for w in (1.0, 2.0))
    refused(rl(replay=twice), "letters.rows twice")
