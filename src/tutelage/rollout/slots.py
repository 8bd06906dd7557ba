"""The requests that an engine is drawing, side by side: what each asks for and what it has got, as arrays.

A step touches every slot, so that nothing here runs per slot but where a reply is over, or where stop strings make it look at
text. Row i of every array belongs to slot i; the first `len` rows are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from tutelage.rollout.base import Completion, Request
from tutelage.rollout.draw import uniforms

AHEAD = 64
"""Positions whose uniform numbers are made at once."""


class Ticket:
    """A request, and where its answer goes."""

    __slots__ = ("future", "request", "sets")

    def __init__(self, request: Request):
        self.request = request
        self.future: Future[Completion] = Future()
        self.sets: list[np.ndarray] = []


class Slots:
    """Room for so many tickets at once."""

    def __init__(self, slots: int):
        self.tickets: list[Ticket] = []
        self.count = np.zeros(slots, np.int64)
        """Tokens drawn"""
        self.prompt = np.zeros(slots, np.int64)
        """Tokens of the prompt"""
        self.limit = np.zeros(slots, np.int64)
        self.seeds = np.zeros(slots, np.uint64)
        self.ahead = np.zeros((slots, AHEAD))
        """Uniform numbers"""
        self.temperature = np.zeros(slots, np.float32)
        self.scored_at = np.zeros(slots, np.float32)
        self.top_p = np.zeros(slots, np.float32)
        self.top_k = np.zeros(slots, np.int64)
        self.stops = np.full((slots, 1), -1)
        """Stop tokens, filled up with -1"""
        self.read = np.zeros(slots, bool)
        """Whether stop strings are looked for"""
        self.drawn = np.zeros((slots, 0, 3), np.float32)
        """Tokens (whole numbers below 2^24 are exact), log-probs, and log-probs under top-p and top-k, [slots, longest, 3]"""

    def __len__(self) -> int:
        return len(self.tickets)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, the one that was drawn last included."""
        S = len(self)
        return int((self.prompt[:S] + self.count[:S]).max())

    def add(self, tickets: Sequence[Ticket]) -> slice:
        """Takes the next rows; returns which."""
        rows = slice(len(self), len(self) + len(tickets))
        asked = [t.request for t in tickets]
        how = [r.sampling for r in asked]
        self.count[rows] = 0
        self.prompt[rows] = [len(r.tokens) for r in asked]
        self.limit[rows] = [h.max_new_tokens for h in how]
        self.seeds[rows] = np.array([r.seed for r in asked], np.uint64)
        self.temperature[rows] = [h.temperature for h in how]
        self.scored_at[rows] = [h.scored_at for h in how]
        self.top_p[rows] = [h.top_p for h in how]
        self.top_k[rows] = [h.top_k for h in how]
        self.read[rows] = [bool(h.stop) for h in how]
        self.stops = _widened(self.stops, max(len(r.stop_tokens) for r in asked), -1)
        self.stops[rows] = -1
        for row, request in enumerate(asked, rows.start):
            self.stops[row, : len(request.stop_tokens)] = sorted(request.stop_tokens)
        self.drawn = _widened(self.drawn, int(self.limit[rows].max()), 0)
        self.tickets += tickets
        return rows

    def put(self, rows: slice, drawn: np.ndarray) -> None:
        """One more token of each row: [3, rows], as `drawn` holds them."""
        self.drawn[np.arange(rows.start, rows.stop), self.count[rows]] = drawn.T
        self.count[rows] += 1

    def uniforms(self, rows: slice) -> np.ndarray:
        """float64 [rows]: each row's number for its next token."""
        index, place = np.arange(rows.start, rows.stop), self.count[rows] % AHEAD
        if (new := index[place == 0]).size:
            self.ahead[new] = uniforms(self.seeds[new, None], self.count[new, None] + np.arange(AHEAD))
        return self.ahead[index, place]

    def stopped(self, tokenizer: Any) -> np.ndarray:
        """bool [S]: which rows end in a stop token or hold a stop string."""
        S = len(self)
        last = self.drawn[np.arange(S), self.count[:S] - 1, 0]
        found = (last[:, None] == self.stops[:S]).any(1)
        for row in np.flatnonzero(self.read[:S] & ~found):
            strings, n = self.tickets[row].request.sampling.stop, self.count[row]
            tail = self.drawn[row, max(0, n - max(map(len, strings)) - 4) : n, 0].astype(np.int64).tolist()
            text = tokenizer.decode(tail, skip_special_tokens=True)
            found[row] = any(s in text for s in strings)
        return found

    def full(self) -> np.ndarray:
        """bool [S]: which rows are as long as they may be."""
        S = len(self)
        return self.count[:S] >= self.limit[:S]

    def answer(self, row: int, why: str, version: int) -> None:
        """Gives a row's ticket what was drawn."""
        ticket = self.tickets[row]
        tokens, logp, under = self.drawn[row, : self.count[row]].T
        done = (tokens.astype(np.int64), logp.copy(), under.copy())
        extras = {"kept": ticket.sets} if ticket.sets else {}
        ticket.future.set_result(Completion(*done, stop=why, version=version, extras=extras))

    def keep(self, order: Sequence[int]) -> None:
        """Goes on with these rows, in this order (`order_after`)."""
        self.tickets = [self.tickets[row] for row in order]
        to, source = moves(order)
        for name, array in vars(self).items():
            if name != "tickets":
                array[to] = array[source]


def order_after(stay: Sequence[int]) -> list[int]:
    """Which old slot lies in each new one: survivors already in front stay, those behind fill the holes.

    >>> order_after([0, 2, 3])
    [0, 3, 2]
    """
    n = len(stay)
    behind = [i for i in stay if i >= n]
    front = {i for i in stay if i < n}
    return [i if i in front else behind.pop() for i in range(n)]


def moves(order: Sequence[int]) -> tuple[list[int], list[int]]:
    """(new slots, old slots) of those that have to move."""
    pairs = [(new, old) for new, old in enumerate(order) if new != old]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def _widened(array: np.ndarray, width: int, fill: float) -> np.ndarray:
    """With at least so many columns."""
    if width <= array.shape[1]:
        return array
    made = np.full((len(array), width, *array.shape[2:]), fill, array.dtype)
    made[:, : array.shape[1]] = array
    return made
