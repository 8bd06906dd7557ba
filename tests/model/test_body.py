"""The body that is trained against transformers' own modules and eager attention, one row at a time."""

import pytest
import torch

from tests.model.test_attention import alone, ids_of
from tests.model.test_lean import MODELS, made
from tests.tiny import model as tiny_model
from tutelage.learn.learner import Learner
from tutelage.model import attention, padded
from tutelage.model.adapter import activate
from tutelage.model.attention import Rows
from tutelage.model.body import lean_states
from tutelage.model.lora import LoRA
from tutelage.model.padded import row_states


def gradients(model, states, weight):
    model.zero_grad()
    (states * weight).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, g in theirs.items():
        torch.testing.assert_close(mine[name], g, atol=2e-6 * float(g.abs().max()) + 1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plain_up_to", [256, 10])
def test_states_and_all_gradients_are_the_modules(name, plain_up_to, monkeypatch):
    monkeypatch.setattr(attention, "PLAIN_UP_TO", plain_up_to)
    monkeypatch.setattr(attention, "CUT", 6)
    lengths = [9, 3, 14, 1]
    model, rows = made(name), ids_of(lengths)
    weight = torch.randn(sum(lengths), model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    pos = torch.cat([torch.arange(n) for n in lengths])
    mine = lean_states(model, torch.cat(rows), pos, Rows(torch.tensor(lengths)))
    theirs = torch.cat(alone(model, rows))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    close(gradients(model, mine, weight), gradients(model, theirs, weight))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gradients_reach_a_prompt_through_all_rows_that_share_it(name, monkeypatch):
    monkeypatch.setattr(attention, "CUT", 4)
    model, (prompt, *replies) = made(name), ids_of([7, 9, 2, 5])
    lengths, after = torch.tensor([7, 9, 2, 5]), torch.tensor([-1, 0, 0, 0])
    pos = torch.cat([torch.arange(7), *(torch.arange(7, 7 + len(r)) for r in replies)])
    weight = torch.randn(16, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    mine = lean_states(model, torch.cat([prompt, *replies]), pos, Rows(lengths, after))[7:]
    theirs = torch.cat([x[7:] for x in alone(model, [torch.cat([prompt, r]) for r in replies])])
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    close(gradients(model, mine, weight), gradients(model, theirs, weight))


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same():
    model, lengths = made("biases"), torch.tensor([9, 3])
    rows, pos = torch.cat(ids_of([9, 3])), torch.cat([torch.arange(9), torch.arange(3)])
    weight = torch.randn(12, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    whole = gradients(model, lean_states(model, rows, pos, Rows(lengths)), weight)
    frozen = [n for i, n in enumerate(whole) if i % 3]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    some = gradients(model, lean_states(model, rows, pos, Rows(lengths)), weight)
    close(some, {n: g for n, g in whole.items() if n not in frozen})


def test_training_and_scoring_take_it_and_what_it_is_not_for_goes_through_modules(monkeypatch):
    taken = []
    monkeypatch.setattr(padded, "lean_states", lambda *a: taken.append(lean_states(*a)) or taken[-1])
    rows, pos, lengths = torch.cat(ids_of([4, 3])), torch.tensor([0, 1, 2, 3, 0, 1, 2]), torch.tensor([4, 3])
    llama, adapted, bf16 = tiny_model(), tiny_model(), tiny_model().to(torch.bfloat16)
    LoRA(rank=2).attach(adapted, 0)
    for model in (llama, tiny_model("gemma2"), adapted, bf16):
        row_states(model, rows, pos, lengths)
    with Learner(llama, dtype="bfloat16").autocast:
        row_states(llama, rows, pos, lengths)
    activate(adapted, [])
    row_states(adapted, rows, pos, lengths)
    assert [x is not None for x in taken] == [True, False, False, False, False, True]
    assert (taken[0] == taken[-1]).all()  # to the bit: whether adapters lie beside a base must not show
