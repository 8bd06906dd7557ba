"""Rollouts: the local engine against transformers' `generate`, on replies of mixed and of fixed lengths and on groups.

Proven first: greedy tokens are the peer's, but for ties, and the log-probs reported are those of a full forward. What is
timed draws at temperature 1. Random models do not know when to stop, so each request carries the length at which it ends;
`generate` gets a stopping criterion that ends each row at its own, and is run in batches as large as our slots and all at
once, whichever is faster. On a GPU vLLM is a further peer where it is installed (vllm.py).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from bench.harness import Record, Run, Unequal, compared
from bench.models import lengths, model, samples, stock, tokenizer
from bench.work import drawing
from tutelage.learn.learner import Learner
from tutelage.rollout.base import Completion, Request, Sampling
from tutelage.rollout.local import LocalEngine
from tutelage.types import Sample

NAMES = ("rollout-mixed", "rollout-fixed-tiny", "rollout-fixed-135m", "rollout-group")


GAP = {"135m": 5e-5, "1b": 2e-4}
"""Most that a log-prob may differ from a full forward's in fp32, by shape; 1e-5 for small ones."""


@dataclass
class Load:
    """What is to be drawn: prompts, the length of each reply, slots of ours."""

    shape: str
    prompts: list[tuple[int, ...]]
    replies: list[int]
    slots: int


def load(shape: str, replies: Sequence[int], slots: int, prompt: int = 16, group: int = 1) -> Load:
    rows = samples(shape, replies, prompt, group)
    return Load(shape, [tuple(s.tokens[~s.mask].tolist()) for s in rows], list(replies), slots)


def draw(engine: LocalEngine, work: Load, temperature: float = 1.0) -> list[Completion]:
    """All of it through the engine, in the order asked."""
    futures = []
    for i, (prompt, n) in enumerate(zip(work.prompts, work.replies, strict=True)):
        futures.append(engine.submit(Request(prompt, Sampling(temperature=temperature, max_new_tokens=n), seed=i)))
    while engine.pump():
        pass
    return [f.result() for f in futures]


def generate(peer: Any, work: Load, batch: int, sample: bool = True) -> list[list[int]]:
    """The same through `generate`, in batches, prompts padded on the left."""
    found: list[list[int]] = []
    peer.generation_config.eos_token_id = None
    for at in range(0, len(work.prompts), batch):
        prompts, ends = work.prompts[at : at + batch], torch.tensor(work.replies[at : at + batch], device=peer.device)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=peer.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=peer.device)

        def stop(so_far: torch.Tensor, scores: Any, width: int = width, ends: torch.Tensor = ends, **_: Any) -> torch.Tensor:
            return so_far.shape[1] - width >= ends

        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
        with torch.inference_mode():
            out = peer.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=int(ends.max()),
                stopping_criteria=[stop],
                pad_token_id=0,
                **how,
            )
        found += [row[width : width + n].tolist() for row, n in zip(out, ends.tolist(), strict=True)]
    return found


def equal(ours: Any, peer: Any, work: Load, tie: float = 1e-4) -> None:
    """Raises `Unequal` where greedy tokens differ by more than a tie, or log-probs are not those of a full forward."""
    engine = LocalEngine(ours, tokenizer(work.shape), work.slots)
    mine, theirs = draw(engine, work, 0.0), generate(peer, work, len(work.prompts), sample=False)
    for prompt, a, b in zip(work.prompts, mine, theirs, strict=True):
        got = a.tokens.tolist()
        apart = next((t for t, (x, y) in enumerate(zip(got, b, strict=True)) if x != y), None)
        if apart is not None:
            with torch.inference_mode():
                logits = peer(torch.tensor([[*prompt, *got[:apart]]], device=peer.device)).logits[0, -1]
            if abs(float(logits[got[apart]] - logits[b[apart]])) > tie:
                raise Unequal(f"rollout, {work.shape}: greedy tokens differ at place {apart} of a reply; nothing was timed")
    rows = []
    for prompt, done in zip(work.prompts, mine, strict=True):
        tokens = np.array([*prompt, *done.tokens])
        rows.append(Sample(tokens, np.arange(len(tokens)) >= len(prompt)))
    gap = max(float(np.abs(s.values - d.logp).max()) for s, d in zip(Learner(ours).score(rows, 1.0, "logp"), mine, strict=True))
    if gap > GAP.get(work.shape, 1e-5):
        raise Unequal(f"rollout, {work.shape}: log-probs differ from a full forward by {gap:.2g}; nothing was timed")


def behind(model: Any, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> float:
    """How far a reply's token lies below the likeliest at its place, at most, in logits of a full forward."""
    found = 0.0
    for prompt, reply in zip(prompts, replies, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *reply]], device=model.device)).logits[0, len(prompt) - 1 : -1].float()
        drawn = logits.gather(1, torch.tensor(list(reply), device=model.device)[:, None])[:, 0]
        found = max(found, float((logits.max(-1).values - drawn).max()))
    return found


def pair(run: Run, name: str, target: float, work: Load) -> Record:
    ours = model(work.shape, device=run.device)
    peer = stock(ours)
    few = min(len(work.prompts), 16)
    equal(ours, peer, Load(work.shape, work.prompts[:few], [min(n, 24) for n in work.replies[:few]], work.slots))
    engine = LocalEngine(ours, tokenizer(work.shape), work.slots, run.dtype)
    theirs = copy.deepcopy(peer).to(getattr(torch, run.dtype))
    sides = {
        "tutelage": lambda: draw(engine, work),
        f"generate, batches of {work.slots}": lambda: generate(theirs, work, work.slots),
    }
    if len(work.prompts) > work.slots:
        sides["generate, all at once"] = lambda: generate(theirs, work, len(work.prompts))
    aside = ["generate in fp32"] if run.dtype != "float32" else []
    for each in aside:
        sides[each] = lambda: generate(peer, work, work.slots)
    if run.device == "cuda" and find_spec("vllm"):
        from bench.vllm import drawn_by

        sides["vLLM"] = drawn_by(ours, peer, work, run.dtype)
    made = compared(run, name, target, sides, drawing(ours, work.prompts, work.replies), aside=aside)
    made.note += f"; {run.details[name][0]['tokens/s']:.0f} tokens/s"
    return made


def bench(run: Run) -> list[Record]:
    if run.device == "cuda" and not run.quick:
        return [
            pair(run, "rollout-mixed", 5.0, load("135m", lengths(768), 256)),
            pair(run, "rollout-fixed-135m", 2.0, load("135m", [128] * 256, 256)),
            pair(run, "rollout-fixed-1b", 2.0, load("1b", [128] * 128, 128)),
            pair(run, "rollout-group", 3.0, load("135m", [128] * 256, 256, prompt=128, group=8)),
        ]
    if run.quick:
        small = load("mini", lengths(12, 12, 24), 4)
        return [pair(run, "rollout-mixed", 5.0, small), pair(run, "rollout-group", 3.0, load("mini", [6] * 16, 16, 24, 8))]
    return [
        pair(run, "rollout-mixed", 5.0, load("tiny", lengths(192), 64)),
        pair(run, "rollout-fixed-tiny", 2.0, load("tiny", [64] * 64, 64)),
        pair(run, "rollout-fixed-135m", 2.0, load("135m", [32] * 16, 16)),
        pair(run, "rollout-group", 3.0, load("135m", [32] * 16, 16, prompt=128, group=8)),
    ]
