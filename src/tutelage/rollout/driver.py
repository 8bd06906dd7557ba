"""The rollout driver: environments as coroutines, one pump for the engine in a thread of its own.

The event loop never runs torch, and the engine never waits for a verifier. Every draw is seeded by (seed, task, replica,
turn), so neither the order of answers nor the neighbours decide a sample. The samples come back in the order asked for.

Leaves out: asynchronous training while samples are still being drawn; the step waits for all of them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tutelage.envs.base import Env
from tutelage.rollout.base import Completion, Request, Sampler, Sampling
from tutelage.text.template import Template, reply_sample
from tutelage.types import Message, Sample, Signal, Task


def request_seed(seed: int, task: str, replica: int, turn: int = 0) -> int:
    """63 bits from what names a draw, the same on every machine."""
    text = f"{seed}\0{task}\0{replica}\0{turn}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Driver:
    """Draws and scores samples of one policy. ``template`` writes prompts, ``env`` asks and scores; with ``sets`` the samples
    carry the tokens that top-p and top-k had kept at each draw, as signal ``kept`` int32 [T_sel, K], filled up with -1."""

    sets = False

    def __init__(self, engine: Sampler, tokenizer: Any, template: Template, env: Env, sampling: Sampling):
        stops = sampling.stop + tuple(s for s in getattr(template, "stop", ()) if s not in sampling.stop)
        self.sampling = sampling.model_copy(update={"stop": stops})
        self.engine, self.tokenizer, self.template, self.env = engine, tokenizer, template, env
        self._stop_tokens = template.stop_tokens(tokenizer)

    def collect(self, tasks: Sequence[Task], replicas: int, seed: int) -> list[Sample]:
        """``replicas`` samples of each task (a group), scored; grouped and in the order of the tasks. A task that comes
        twice is two groups with draws of their own."""
        return asyncio.run(self._collect(tasks, replicas, seed))

    async def _collect(self, tasks: Sequence[Task], replicas: int, seed: int) -> list[Sample]:
        episodes, seen = [], Counter[str]()
        for task in tasks:
            n, seen[task.id] = seen[task.id], seen[task.id] + 1
            group = f"{task.id}#{n}" if n else task.id
            episodes += [self._episode(task, group, n * replicas + r, seed) for r in range(replicas)]
        running = [asyncio.ensure_future(e) for e in episodes]
        await asyncio.sleep(0)  # every single-turn episode has submitted before the first round
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            while not all(r.done() for r in running):
                busy = await loop.run_in_executor(thread, self._pump)
                left = [r for r in running if not r.done()]
                if left and not busy:
                    await asyncio.wait(left, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
        return [sample for r in running for sample in r.result()]

    def _pump(self, rounds: int = 32) -> bool:
        """Several rounds a hand-over: waking the event loop for each would cost more than the round."""
        return all(self.engine.pump() for _ in range(rounds))

    async def _episode(self, task: Task, group: str, replica: int, seed: int) -> list[Sample]:
        turns: list[Sample] = []

        async def ask(messages: Sequence[Message]) -> str:
            prompt = self.template.prompt(self.tokenizer, messages)
            draw = request_seed(seed, task.id, replica, len(turns))
            request = Request(tuple(prompt), self.sampling, draw, self._stop_tokens, self.sets)
            done = await asyncio.wrap_future(self.engine.submit(request))
            turns.append(self._sample(task, prompt, done))
            return turns[-1].text

        score = await self.env(task, ask)
        for sample in turns:
            sample.group, sample.score = group, score
            sample.scalars["reward"] = score.value
        return turns

    def _sample(self, task: Task, prompt: Sequence[int], done: Completion) -> Sample:
        sample = reply_sample(prompt, done.tokens.tolist(), task)
        facts = {"temperature": self.sampling.scored_at, "kind": "sampled"}
        sample.signals["behaviour_logp"] = Signal(done.logp, sample.trained, facts)
        if self.sampling.top_p < 1 or self.sampling.top_k:
            sample.signals["kept_logp"] = Signal(done.kept_logp, sample.trained, facts)
        if self.sets:
            sample.signals["kept"] = Signal(filled(done.extras["kept"]), sample.trained, facts)
        sample.stop = done.stop
        sample.versions = np.where(sample.mask, done.version, -1)
        sample.text = reply_text(self.tokenizer, done.tokens.tolist(), self.sampling.stop)
        return sample


def filled(sets: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several lengths as one array, the shorter ones filled up with -1 on the right."""
    widths = np.array([len(s) for s in sets])
    made = np.full((len(sets), widths.max()), -1, np.int32)
    made[np.arange(widths.max()) < widths[:, None]] = np.concatenate(sets)
    return made


def reply_text(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str]) -> str:
    """The reply without special tokens, cut before the first stop string."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    for stop in stops:
        text = text.partition(stop)[0]
    return text
