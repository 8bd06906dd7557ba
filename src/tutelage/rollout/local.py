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
from tutelage.model.padded import Decoding, is_packed, lines_up
from tutelage.rollout.base import Completion, Request
from tutelage.rollout.draw import draw, kept, uniforms


class _Slot:
    """A sequence being drawn."""

    __slots__ = ("future", "kept", "logp", "request", "sets", "tokens")

    def __init__(self, request: Request, future: Future[Completion]):
        self.request, self.future = request, future
        self.tokens: list[int] = []
        self.logp: list[float] = []
        self.kept: list[float] = []
        self.sets: list[np.ndarray] = []


class LocalEngine:
    """Draws from one transformers model with packed attention (`tutelage.model.folder.load_model`).

    ``model`` is shared, not copied: a learner that updates it in place only has to say so through `load`.
    ``dtype`` other than the model's makes a copy that `load` refreshes.
    """

    def __init__(self, model: Any, tokenizer: Any, slots: int = 256, dtype: str | None = None):
        wanted = getattr(torch, dtype) if dtype else model.dtype
        self.source = model
        self.model = model if wanted == model.dtype else _copy(model, wanted)
        self.tokenizer, self.slots, self.version = tokenizer, slots, 0
        self.vocab = len(tokenizer)  # padded rows can never be drawn
        self.lean = LeanBody.of(self.model)
        self.sampled = self.prefilled = 0
        self._waiting: deque[_Slot] = deque()
        self._running: list[_Slot] = []
        self._cache: Cache | None = None
        self._lock = threading.Lock()

    # --- the protocol ---

    def submit(self, request: Request) -> Future[Completion]:
        """Queues a request. Raises ValueError for an empty prompt."""
        if not request.tokens:
            raise ValueError("a request needs at least one prompt token")
        slot = _Slot(request, Future())
        with self._lock:
            self._waiting.append(slot)
        return slot.future

    def load(self, weights: Any, version: int) -> None:
        """Takes new weights (a state dict; None when the shared model was updated in place). Only when drained."""
        if self._running or self._waiting:
            raise RuntimeError("weights may change only when the engine is drained")
        if weights is not None:
            self.model.load_state_dict(weights)
        elif self.model is not self.source:
            self.model.load_state_dict(self.source.state_dict())
        self.lean, self.version = LeanBody.of(self.model), version

    @torch.inference_mode()
    def pump(self) -> bool:
        """Refills free slots, then decodes one token everywhere. False when idle."""
        self._refill()
        if self._running:
            self._decode()
            self._retire()
        return bool(self._running or self._waiting)

    # --- the work ---

    def _refill(self) -> None:
        fresh = self._admit()
        if not fresh:
            return
        prompts: dict[tuple[int, ...], int] = {}
        source = [prompts.setdefault(s.request.tokens, len(prompts)) for s in fresh]
        hidden = self._prefill(list(prompts), source)
        self.prefilled += sum(len(s.request.tokens) for s in fresh)  # as if nothing were shared: costs are algorithmic
        self._running += fresh
        self._append(fresh, hidden)
        self._retire()

    def _admit(self) -> list[_Slot]:
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
        cache = self._room(max(map(len, prompts)))
        layout = Prefill(lengths, cache, slots, torch.tensor(source, device=device))
        ids = torch.tensor([t for p in prompts for t in p], device=device)
        pos = torch.cat([torch.arange(len(p), device=device) for p in prompts])
        return self._forward(ids, pos, layout)[lengths.cumsum(0) - 1][source]

    def _decode(self) -> None:
        self._append(self._running, self._step([s.tokens[-1] for s in self._running]))

    def _step(self, tokens: list[int]) -> torch.Tensor:
        """The last token of each running slot -> hidden states [S, D]."""
        device = self.model.device
        ids = torch.tensor(tokens, device=device)
        places = [len(s.request.tokens) + len(s.tokens) - 1 for s in self._running]
        pos = torch.tensor(places, device=device)
        cache = self._room(max(places) + 1)
        return self._forward(ids, pos, Decode(cache, pos))

    def _forward(self, ids: torch.Tensor, pos: torch.Tensor, layout: Any) -> torch.Tensor:
        if self.lean:
            return self.lean(ids, pos, layout)
        body = self.model.get_decoder()
        out = body(input_ids=ids[None], position_ids=pos[None], use_cache=False, layout=layout)
        return out.last_hidden_state[0]

    def _append(self, slots: list[_Slot], hidden: torch.Tensor) -> None:
        """Draws one token for each slot from hidden states [S, D]."""
        logits = Head.of(self.model, self.vocab)(hidden)
        how = [s.request.sampling for s in slots]
        if any(h.scored_at != 1 for h in how):
            logits = logits / torch.tensor([h.scored_at for h in how], device=logits.device)[:, None]
        logp = torch.log_softmax(logits, -1)
        allowed = logp
        if any(h.top_k or h.top_p < 1 for h in how):
            top_p = torch.tensor([h.top_p for h in how], device=logits.device)
            keep = kept(logp, top_p, torch.tensor([h.top_k for h in how], device=logits.device))
            allowed = torch.log_softmax(logp.masked_fill(~keep, -torch.inf), -1)
            for slot, row in zip(slots, keep, strict=True):
                if slot.request.sets:
                    slot.sets.append(row.nonzero()[:, 0].cpu().numpy().astype(np.int32))
        greedy = [h.temperature == 0 for h in how]
        if all(greedy):
            token = logits.argmax(-1)
        else:
            seeds = np.array([s.request.seed for s in slots], dtype=np.uint64)
            u = uniforms(seeds, np.array([len(s.tokens) for s in slots]))
            token = draw(allowed, torch.from_numpy(u))
            if any(greedy):
                token = torch.where(torch.tensor(greedy, device=logits.device), logits.argmax(-1), token)
        full = logp.gather(1, token[:, None])[:, 0].tolist()
        part = full if allowed is logp else allowed.gather(1, token[:, None])[:, 0].tolist()
        for slot, t, a, b in zip(slots, token.tolist(), full, part, strict=True):
            slot.tokens.append(t)
            slot.logp.append(a)
            slot.kept.append(b)
        self.sampled += len(slots)

    def _retire(self) -> None:
        """Answers finished requests and moves the rest to the front of the cache."""
        stay = []
        for i, slot in enumerate(self._running):
            why = self._finished(slot)
            if why:
                done = (np.array(slot.tokens), np.array(slot.logp, np.float32), np.array(slot.kept, np.float32))
                extras = {"kept": slot.sets} if slot.sets else {}
                slot.future.set_result(Completion(*done, stop=why, version=self.version, extras=extras))
            else:
                stay.append(i)
        if len(stay) < len(self._running):
            self._keep(stay)
            self._running = [self._running[i] for i in _order_after(stay)]

    def _keep(self, stay: list[int]) -> None:
        moved = _compaction(stay)
        if moved is not None and self._cache is not None:
            self._cache.move(*moved)

    def _finished(self, slot: _Slot) -> str:
        request = slot.request
        if slot.tokens[-1] in request.stop_tokens:
            return "stop"
        if request.sampling.stop:
            longest = max(map(len, request.sampling.stop))
            tail = self.tokenizer.decode(slot.tokens[-longest - 4 :], skip_special_tokens=True)
            if any(s in tail for s in request.sampling.stop):
                return "stop"
        return "length" if len(slot.tokens) >= request.sampling.max_new_tokens else ""

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

    def _admit(self) -> list[_Slot]:
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

    def _step(self, tokens: list[int]) -> torch.Tensor:
        return self._decoding.step(torch.tensor(tokens, device=self.model.device))

    def _keep(self, stay: list[int]) -> None:
        if stay:
            self._decoding.take(_order_after(stay))
        else:
            del self._decoding  # its memory, before the next batch takes more


def local_engine(model: Any, tokenizer: Any, slots: int = 256, dtype: str | None = None) -> LocalEngine:
    """The engine for a loaded model."""
    kind = LocalEngine if is_packed(model) else PaddedEngine
    return kind(model, tokenizer, slots, dtype)


def _order_after(stay: list[int]) -> list[int]:
    """Which old slot lies in each new one: survivors already in front stay, those behind fill the holes.

    >>> _order_after([0, 2, 3])
    [0, 3, 2]
    """
    n = len(stay)
    behind = [i for i in stay if i >= n]
    front = {i for i in stay if i < n}
    return [i if i in front else behind.pop() for i in range(n)]


def _compaction(stay: list[int]) -> tuple[list[int], list[int]] | None:
    """(new slots, old slots) of the survivors that have to move, or None."""
    pairs = [(new, old) for new, old in enumerate(_order_after(stay)) if new != old]
    return ([p[0] for p in pairs], [p[1] for p in pairs]) if pairs else None


def _copy(model: Any, dtype: torch.dtype) -> Any:
    import copy

    return copy.deepcopy(model).to(dtype)
