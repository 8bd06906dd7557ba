"""Traces: replies of specialists that a verifier accepts, as worked answers to train on. Rejection sampling.

Each domain's policy answers ``prompts`` of its tasks ``samples`` times; replies whose reward reaches ``at_least`` become rows
with ``prompt`` and ``completion``. Fit on them is trace-distillation SFT ("off-policy finetune", the baseline of MOPD, arXiv
2606.30406; the consolidation of DeepSeek V3.2, arXiv 2512.02556, and of MAI-Thinking-1); with one policy for every domain it
is rejection-sampling SFT. ``at_least=None`` keeps all replies: what the verifier is worth shows against that.

A reply that was cut off at its longest is never kept, since training on it would teach to stop there, nor one whose verifier
failed, nor the same reply to a task twice. Rows are shuffled over domains by ``seed``.

Leaves out: the token ids (a row is text, and is tokenised again by what trains on it), the policies' log-probs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from tutelage.envs.base import Env
from tutelage.graph import At, DataType, Kind, Stage, Type
from tutelage.rollout.base import Sampling
from tutelage.spec import SpecError, UserError
from tutelage.stages.evaluate import need_domain, need_model, tokens_guess
from tutelage.stages.fit import run_order
from tutelage.text.template import Chat, Template
from tutelage.types import Sample

PART = 256
"""Tasks asked between two checkpoints."""
FATES = ("kept", "wrong", "cut off", "verifier failed", "said before")
Row = dict[str, Any]


class Traces(Stage):
    """Samples replies to tasks and keeps the verified; see the module's docstring."""

    outputs: ClassVar[dict[str, Kind]] = {"traces": "data"}
    verb: ClassVar[str] = "samples"
    on_device: ClassVar[bool] = True
    version: ClassVar[int] = 4

    policies: dict[str, At] = Field(min_length=1)
    """domain -> who answers its tasks"""
    tasks: At
    env: Env
    prompts: int = Field(1000, ge=1)
    """tasks asked of each domain, drawn without replacement; all where there are fewer"""
    samples: int = Field(1, ge=1)
    """replies a task"""
    at_least: float | None = 1.0
    """The reward that a reply must reach; None keeps whatever was said to its end."""
    template: Template = Chat()
    sampling: Sampling = Sampling()
    seed: int = Field(0, ge=0)
    slots: int = Field(256, ge=1, json_schema_extra={"unkeyed": True})

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        for domain, at in self.policies.items():
            need_model(types, at)
            found = need_domain(types, self.tasks, domain)
        if "id" not in found.columns:
            raise SpecError(f"{self.tasks.of.name}.{self.tasks.port} has no ids; give tasks with id, domain and prompt")
        columns = ("id", "domain", "prompt", "completion", "gold", "meta")
        rows = self.prompts * self.samples * len(self.policies)
        made = DataType(columns, tuple(self.policies), min(rows, found.rows * self.samples) if found.rows else rows)
        return {"traces": made}

    def estimate(self, types: Callable[[At], Type]) -> float:
        tokens = tokens_guess(self.prompts * self.samples, self.sampling)
        return 2.0 * tokens * sum(need_model(types, at).params for at in self.policies.values())

    def run(self, ctx: Any) -> None:
        from tutelage.text.rows import read_rows, write_tasks

        asked = self._asked(ctx)
        total = sum(map(len, asked.values()))
        done, folder = ctx.resume()
        rows: list[Row] = read_rows(folder) if folder else []
        before = 0
        for domain, tasks in asked.items():
            if done < before + len(tasks):
                driver, policy = self._driver(ctx, domain)
            while done < before + len(tasks):
                part = tasks[done - before : done - before + PART]
                samples = driver.collect(part, self.samples, self.seed)
                policy.charge(ctx.cost)
                fates = _fates(samples, self.at_least)
                rows += [_row(s, n) for n, (s, fate) in enumerate(zip(samples, fates, strict=True)) if fate == "kept"]
                told = ctx.facts.setdefault("fates", {}).setdefault(domain, dict.fromkeys(FATES, 0))
                told.update(Counter(told) + Counter(fates))
                done += len(part)
                ctx.log(done, kept=fates.count("kept") / len(fates))
                ctx.progress(done, total, kept=len(rows))
                ctx.boundary(done, partial(write_tasks, rows=rows))
            before += len(tasks)
        self._check(ctx, rows)
        write_tasks(ctx.output("traces"), [rows[i] for i in run_order(len(rows), 0, len(rows), self.seed)])

    def _asked(self, ctx: Any) -> dict[str, list[Any]]:
        from tutelage.text.rows import read_tasks

        pool = read_tasks(ctx.input(self.tasks))
        found = {}
        for k, domain in enumerate(self.policies):
            mine = [task for task in pool if task.domain == domain]
            if not mine:
                raise UserError(f"{self.tasks.of.name}.{self.tasks.port} holds no task of domain {domain!r}")
            order = run_order(len(mine), 0, min(self.prompts, len(mine)), self.seed * 1009 + k)
            found[domain] = [mine[i] for i in order]
        return found

    def _driver(self, ctx: Any, domain: str) -> tuple[Any, Any]:
        from tutelage.rollout.policy import Policy

        policy = Policy(ctx.input(self.policies[domain]), self.slots, device=ctx.device)
        return policy.driver(self.template, self.env, self.sampling), policy

    def _check(self, ctx: Any, rows: Sequence[Row]) -> None:
        """Raises `UserError` for a domain that is left without a trace."""
        for domain, fates in ctx.facts["fates"].items():
            if not fates["kept"]:
                why = ", ".join(f"{n} {fate}" for fate, n in fates.items() if n)
                raise UserError(
                    f"no reply of domain {domain!r} was kept ({why}); ask more prompts, lower at_least, or leave the domain out"
                )


def _fates(samples: Sequence[Sample], at_least: float | None) -> list[str]:
    """What becomes of each reply, one of `FATES`."""
    said: set[tuple[str, str]] = set()
    found = []
    for sample in samples:
        assert sample.task
        assert sample.score
        fate = "kept"
        if sample.score.error:
            fate = "verifier failed"
        elif sample.stop == "length":
            fate = "cut off"
        elif at_least is not None and sample.scalars["reward"] < at_least:
            fate = "wrong"
        elif (sample.task.id, sample.text) in said:
            fate = "said before"
        if fate == "kept":
            said.add((sample.task.id, sample.text))
        found.append(fate)
    return found


def _row(sample: Sample, number: int) -> Row:
    task = sample.task
    assert task
    return {
        "id": f"{task.id}#{number}",
        "domain": task.domain,
        "prompt": list(task.messages),
        "completion": [{"role": "assistant", "content": sample.text}],
        "gold": task.gold,
        "meta": {**task.meta, "reward": sample.scalars["reward"]},
    }
