"""The arrays behind the slots: what a row is does not depend on where it lies."""

import numpy as np
import torch

from tests import tiny
from tests.rollout.test_engine import PROMPTS, drain
from tutelage.rollout.base import Request, Sampling
from tutelage.rollout.draw import uniforms
from tutelage.rollout.local import LocalEngine, PaddedEngine
from tutelage.rollout.slots import AHEAD, Slots, Ticket, order_after


def ticket(seed, length, stops=(), prompt=3):
    return Ticket(Request((5,) * prompt, Sampling(max_new_tokens=length), seed, frozenset(stops)))


def test_rows_keep_what_is_theirs_while_others_come_and_go():
    """Against lists: lengths beyond `AHEAD`, rows that move, later rows with more stop tokens and longer limits."""
    rng, slots = np.random.default_rng(0), Slots(6)
    waiting = [
        ticket(100 + i, n, range(i % 3), i + 1) for i, n in enumerate([3, 2 * AHEAD + 9, 70, 5, AHEAD, AHEAD + 1, 130, 1])
    ]
    drawn = {id(t): [] for t in waiting}
    tickets = list(waiting)
    while waiting or slots:
        if waiting and len(slots) < 6:
            slots.add([waiting.pop(0)])
        rows = slice(0, len(slots))
        assert slots.longest == max(len(t.request.tokens) + len(drawn[id(t)]) for t in slots.tickets)
        places = [len(drawn[id(t)]) for t in slots.tickets]
        seeds = np.array([t.request.seed for t in slots.tickets], np.uint64)
        assert np.array_equal(slots.uniforms(rows), uniforms(seeds, np.array(places)))
        made = np.stack([rng.integers(10, 1 << 20, len(slots)), rng.normal(size=len(slots)), rng.normal(size=len(slots))])
        slots.put(rows, made.astype(np.float32))
        for t, values in zip(slots.tickets, made.T.astype(np.float32), strict=True):
            drawn[id(t)].append(values)
        assert not slots.stopped(None).any()
        full = slots.full()
        assert full.tolist() == [len(drawn[id(t)]) == t.request.sampling.max_new_tokens for t in slots.tickets]
        for row in np.flatnonzero(full):
            slots.answer(row, "length", 7)
        slots.keep(order_after(np.flatnonzero(~full).tolist()))
    for t in tickets:
        done, want = t.future.result(0), np.array(drawn[id(t)])
        assert np.array_equal(done.tokens, want[:, 0].astype(int))
        assert np.array_equal(done.logp, want[:, 1])
        assert np.array_equal(done.kept_logp, want[:, 2])


def test_a_row_stops_at_its_own_stop_tokens_only():
    slots = Slots(3)
    rows = slots.add([ticket(0, 9, (1,)), ticket(1, 9, (1, 8)), ticket(2, 9)])
    slots.put(rows, np.array([[8, 8, 1], [0, 0, 0], [0, 0, 0]], np.float32))
    assert slots.stopped(None).tolist() == [False, True, False]
    slots.keep([])
    slots.put(slots.add([ticket(3, 9), ticket(4, 9, (8,))]), np.array([[1, 1], [0, 0], [0, 0]], np.float32))
    assert slots.stopped(None).tolist() == [False, False]  # what stopped others in these slots is forgotten


def test_a_stop_string_is_found_across_tokens():
    class Letters:
        def decode(self, tokens, skip_special_tokens):
            return "".join(chr(t) for t in tokens)

    slots = Slots(2)
    rows = slots.add([Ticket(Request((5,), Sampling(stop=(s,)), 0)) for s in ("end", "bend")])
    found = []
    for letter in "spend":
        slots.put(rows, np.array([[ord(letter)] * 2, [0, 0], [0, 0]], np.float32))
        found.append(slots.stopped(Letters()).tolist())
    assert found == [[False, False]] * 4 + [[True, False]]


def test_requests_of_every_kind_share_a_batch():
    """Greedy, cooler, cut, stopped by text and much longer ones: each as it is alone."""
    kinds = [
        Sampling(max_new_tokens=9, temperature=0),
        Sampling(max_new_tokens=AHEAD + 20),
        Sampling(max_new_tokens=12, temperature=0.6),
        Sampling(max_new_tokens=15, top_p=0.7, top_k=6),
        Sampling(max_new_tokens=30, stop=("e", "ab")),
    ]
    wanted = [Request(p, k, 10 * i + j, frozenset([1])) for i, p in enumerate(PROMPTS) for j, k in enumerate(kinds)]
    model = tiny.model()
    with torch.no_grad():
        model.get_output_embeddings().weight[1] = 0.0  # the end is not likely: replies get long
    for kind in (LocalEngine, PaddedEngine):
        engine = kind(model if kind is LocalEngine else _stock(model), tiny.tokenizer(), 7)
        together = drain(engine, wanted)
        alone = [drain(engine, [r])[0] for r in wanted]
        for a, b in zip(together, alone, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.stop == b.stop
            np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
            np.testing.assert_allclose(a.kept_logp, b.kept_logp, atol=1e-5)
        assert max(len(d.tokens) for d in together) > AHEAD


def _stock(model):
    import copy

    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other
