"""The local engine: continuous batching on one device through the packed forward; and one that runs any decoder in batches.

Slots hold sequences; a finished one gives its slot to the next request at once, and when nobody waits the batch shrinks.
Requests with one prompt share its prefill. Log-probs are taken in fp32 from the logits that drew the token.

`PaddedEngine` is for models that cannot be packed (model/padded.py). It draws and answers by the same code; only its batches
run to their end before the next begins.

Leaves out: paged memory (a slot is as long as the longest sequence), speculative decoding, several models at once.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from tutelage.model.attention import Cache, Decode, Prefill
from tutelage.model.head import Head
from tutelage.model.lean import LeanBody
from tutelage.model.native import NativeBody, linear
from tutelage.model.padded import Decoding, is_packed, lines_up
from tutelage.rollout.base import Completion, Request
from tutelage.rollout.draw import draw, kept
from tutelage.rollout.slots import Slots, Ticket, moves, order_after


class LocalEngine:
    """Draws from one transformers model with packed attention (`tutelage.model.folder.load_model`).

    ``model`` is shared, not copied: a learner that updates it in place only has to say so through `load`.
    ``dtype`` other than the model's makes a copy that `load` refreshes.
    """

    def __init__(self, model: Any, tokenizer: Any, slots: int = 256, dtype: str | None = None):
        wanted = getattr(torch, dtype) if dtype else model.dtype
        self.source = model
        self.model = model if wanted == model.dtype else _copy(model, wanted)
        self.tokenizer, self.slots = tokenizer, slots
        self.vocab = len(tokenizer)  # padded rows can never be drawn
        self._look(0)
        self.sampled = self.prefilled = 0
        self._waiting: deque[Ticket] = deque()
        self._running = Slots(slots)
        self._at = torch.zeros(2, slots, dtype=torch.long, device=model.device)  # each slot's last token, and its position
        self._cache: Cache | None = None
        self._lock = threading.Lock()

    # --- the protocol ---

    def submit(self, request: Request) -> Future[Completion]:
        """Queues a request. Raises ValueError for an empty prompt."""
        if not request.tokens:
            raise ValueError("a request needs at least one prompt token")
        ticket = Ticket(request)
        with self._lock:
            self._waiting.append(ticket)
        return ticket.future

    def load(self, weights: Any, version: int) -> None:
        """Takes new weights (a state dict; None when the shared model was updated in place). Only when drained."""
        if self._running or self._waiting:
            raise RuntimeError("weights may change only when the engine is drained")
        if weights is not None:
            self.model.load_state_dict(weights)
        elif self.model is not self.source:
            self.model.load_state_dict(self.source.state_dict())
        self._look(version)

    @torch.inference_mode()
    def pump(self) -> bool:
        """Refills free slots, then decodes one token everywhere. False when idle."""
        self._refill()
        if self._running:
            S = len(self._running)
            self._append(slice(0, S), self._step(self._at[0, :S]))
            self._retire()
        return bool(self._running or self._waiting)

    # --- the work ---

    def _look(self, version: int) -> None:
        """Finds the model's parts."""
        self.lean, self.version = LeanBody.of(self.model), version
        self.native = NativeBody.of(self.lean)

    def _refill(self) -> None:
        fresh = self._admit()
        if not fresh:
            return
        prompts: dict[tuple[int, ...], int] = {}
        source = [prompts.setdefault(t.request.tokens, len(prompts)) for t in fresh]
        hidden = self._prefill(list(prompts), source)
        self.prefilled += sum(len(t.request.tokens) for t in fresh)  # as if nothing were shared: costs are algorithmic
        rows = self._running.add(fresh)
        self._at[1, rows] = torch.tensor([len(t.request.tokens) - 1 for t in fresh], device=self._at.device)
        self._append(rows, hidden)
        self._retire()

    def _admit(self) -> list[Ticket]:
        """Waiting requests, once an eighth of the slots is free (or nothing runs): prefills are best in company."""
        free = self.slots - len(self._running)
        if not self._waiting or (self._running and free < max(1, self.slots // 8)):
            return []
        with self._lock:
            return [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]

    def _prefill(self, prompts: list[tuple[int, ...]], source: list[int]) -> torch.Tensor:
        """Distinct prompts, and which of them each fresh slot takes -> the slots' last hidden states [S, D]."""
        device = self.model.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        first = len(self._running)
        slots = torch.arange(first, first + len(source), device=device)
        longest = max(map(len, prompts))
        cache = self._room(longest)
        layout = Prefill(lengths, cache, slots, torch.tensor(source, device=device))
        ids = torch.tensor([t for p in prompts for t in p], device=device)
        pos = torch.cat([torch.arange(len(p), device=device) for p in prompts])
        return self._forward(ids, pos, layout, longest)[lengths.cumsum(0) - 1][source]

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        """The last token of each running slot, int [S] -> hidden states [S, D]."""
        pos, longest = self._at[1, : len(ids)], self._running.longest
        if self.native:
            return self.native(ids, pos, self._room(longest), longest)
        return self._forward(ids, pos, Decode(self._room(longest), pos, longest), longest)

    def _forward(self, ids: torch.Tensor, pos: torch.Tensor, layout: Any, longest: int) -> torch.Tensor:
        if self.lean:
            return self.lean(ids, pos, layout, longest)
        body = self.model.get_decoder()
        out = body(input_ids=ids[None], position_ids=pos[None], use_cache=False, layout=layout)
        return out.last_hidden_state[0]

    def _append(self, rows: slice, hidden: torch.Tensor) -> None:
        """Draws one token for each of some slots from hidden states [S, D]."""
        logits, state = Head.of(self.model, self.vocab)(hidden, linear), self._running
        temperature = state.temperature[rows]
        if (state.scored_at[rows] != 1).any():
            logits = logits / torch.from_numpy(state.scored_at[rows]).to(logits.device)[:, None]
        logp = torch.log_softmax(logits, -1)
        allowed = logp
        if state.top_k[rows].any() or (state.top_p[rows] < 1).any():
            top_p, top_k = (torch.from_numpy(x[rows]).to(logits.device) for x in (state.top_p, state.top_k))
            keep = kept(logp, top_p, top_k)
            allowed = torch.log_softmax(logp.masked_fill(~keep, -torch.inf), -1)
            for i, ticket in enumerate(state.tickets[rows]):
                if ticket.request.sets:
                    ticket.sets.append(keep[i].nonzero()[:, 0].cpu().numpy().astype(np.int32))
        if (temperature == 0).all():
            token = logits.argmax(-1)
        else:
            token = draw(allowed, torch.from_numpy(state.uniforms(rows)))
            if (temperature == 0).any():
                greedy = torch.from_numpy(temperature == 0).to(logits.device)
                token = torch.where(greedy, logits.argmax(-1), token)
        full = logp.gather(1, token[:, None])[:, 0]
        part = full if allowed is logp else allowed.gather(1, token[:, None])[:, 0]
        state.put(rows, torch.stack((token.float(), full, part)).cpu().numpy())
        self._at[0, rows] = token
        self._at[1, rows] += 1
        self.sampled += len(token)

    def _retire(self) -> None:
        """Answers finished requests and moves the rest to the front of the cache."""
        stopped = self._running.stopped(self.tokenizer)
        over = stopped | self._running.full()
        if not over.any():
            return
        for row in np.flatnonzero(over).tolist():
            self._running.answer(row, "stop" if stopped[row] else "length", self.version)
        order = order_after(np.flatnonzero(~over).tolist())
        self._running.keep(order)
        self._at[:, : len(order)] = self._at[:, torch.tensor(order, dtype=torch.long, device=self._at.device)]
        self._keep(order)

    def _keep(self, order: list[int]) -> None:
        to, source = moves(order)
        if to and self._cache is not None:
            self._cache.move(to, source)

    def _room(self, length: int) -> Cache:
        """The cache, at least so long. It grows as sequences do: short rows stay close together in memory."""
        if self._cache is None:
            self._cache = Cache(self.model.config, self.slots, self.model.dtype, self.model.device)
        if self._running:
            self._cache.grow(length, len(self._running))
        else:
            self._cache.restart(length)
        return self._cache


class PaddedEngine(LocalEngine):
    """Draws from any causal decoder, with transformers' own cache: a batch is admitted when the last one has ended, its
    finished rows leave at once, and its prompts are of one length unless `lines_up` allows more."""

    _decoding: Decoding

    def _admit(self) -> list[Ticket]:
        if self._running or not self._waiting:
            return []
        with self._lock:
            waiting = list(self._waiting)
            length = len(waiting[0].request.tokens)
            fits = waiting if lines_up(self.model) else [s for s in waiting if len(s.request.tokens) == length]
            fresh = fits[: self.slots]
            taken = set(map(id, fresh))
            self._waiting = deque(s for s in waiting if id(s) not in taken)
        return fresh

    def _prefill(self, prompts: list[tuple[int, ...]], source: list[int]) -> torch.Tensor:
        self._decoding = Decoding(self.model)
        hidden = self._decoding.begin(prompts)
        if source != list(range(len(prompts))):
            self._decoding.take(source)
        return hidden[source]

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        return self._decoding.step(ids)

    def _keep(self, order: list[int]) -> None:
        if order:
            self._decoding.take(order)
        else:
            del self._decoding  # its memory, before the next batch takes more


def local_engine(model: Any, tokenizer: Any, slots: int = 256, dtype: str | None = None) -> LocalEngine:
    """The engine for a loaded model."""
    kind = LocalEngine if is_packed(model) else PaddedEngine
    return kind(model, tokenizer, slots, dtype)


def _copy(model: Any, dtype: torch.dtype) -> Any:
    import copy

    return copy.deepcopy(model).to(dtype)
