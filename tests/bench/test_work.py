"""The FLOPs of a bench against PyTorch's own count of what a forward and a backward multiply."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.models import model, samples
from bench.work import drawing, forward, learning

T, WIDTH, LAYERS = 7, 32, 2
SQUARE = 4 * WIDTH * LAYERS * (T * T - T * (T + 1) // 2)
"""What attention over a whole square costs more than the causal half."""


@pytest.fixture
def stock():
    made = model("mini")
    made.set_attn_implementation("eager")
    return made


def counted(made, backward=False):
    with FlopCounterMode(display=False) as seen:
        out = made(torch.arange(T)[None] + 5).logits
        if backward:
            out.sum().backward()
    return seen.get_total_flops()


def test_a_forward_is_what_pytorch_counts_but_for_the_masked_half(stock):
    assert counted(stock) == forward(stock, [(T, T)]) + SQUARE


def test_learning_is_three_forwards(stock):
    row = samples("mini", [T - 1], prompt=1)
    head = 2 * stock.lm_head.weight.numel()  # PyTorch's count has logits of the prompt too
    assert counted(stock, backward=True) == learning(stock, row).flops + 3 * (SQUARE + head)
    assert learning(stock, row, teachers=1).flops == pytest.approx(learning(stock, row).flops * 4 / 3)
    assert learning(stock, row).tokens == T


def test_drawing_reads_every_token_but_the_last_once(stock):
    made = drawing(stock, [(1, 2, 3), (1,)], [4, 2])
    assert made.flops == forward(stock, [(6, 4), (2, 2)])
    assert (made.tokens, made.lengths) == (6, (4, 2))


def test_padding_is_no_work(stock):
    a, b = samples("mini", [3]), samples("mini", [30])
    both = learning(stock, [*a, *b])
    assert both.flops == learning(stock, a).flops + learning(stock, b).flops
    assert both.tokens == sum(len(s.tokens) for s in [*a, *b])
    assert np.isclose(both.flops, (both + learning(stock, [])).flops)
