"""PassRate: how often a policy solves each task of a pool, measured once and written beside the task.

    rate = mean reward of the sound replies          standard error √(p(1−p)/K) for right-or-wrong rewards

K replies a task are drawn and scored; the rows come back as they were, with ``pass_rate`` and ``pass_count`` (the sound
replies it rests on) in ``meta``. With a graded reward the rate is its mean. A reply whose verifier failed is no evidence
and leaves the rate; a task without any sound reply has rate null and count 0.

Leaves out: rates that follow the policy as it learns (measure again, with the later checkpoint), and weighing by episode:
where an environment asks several times, each turn counts as a reply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tutelage.envs.base import Env
from tutelage.graph import At, DataType, Kind, Stage, Type
from tutelage.rollout.base import Sampling
from tutelage.spec import SpecError, UserError
from tutelage.stages.evaluate import need_domain, need_model, tokens_guess
from tutelage.text.template import Chat, Template
from tutelage.types import Sample, Task

if TYPE_CHECKING:
    import numpy as np

RATE, COUNT = "pass_rate", "pass_count"
"""Keys of ``meta``; the first is also what `DataType.signals` promises."""


class PassRate(Stage):
    """Samples ``samples`` replies to every task of ``domains`` and writes the tasks back with their pass rates."""

    outputs: ClassVar[dict[str, Kind]] = {"tasks": "data"}
    verb: ClassVar[str] = "measures"
    on_device: ClassVar[bool] = True
    version: ClassVar[int] = 4

    model: At
    tasks: At
    domains: tuple[str, ...] = Field(min_length=1)
    """Tasks of other domains are left out."""
    env: Env
    samples: int = Field(8, ge=1)
    """replies a task (K)"""
    template: Template = Chat()
    sampling: Sampling = Sampling()
    """As in the training that the rates are for: a rate speaks of its temperature."""
    seed: int = Field(0, ge=0)
    slots: int = Field(256, ge=1, json_schema_extra={"unkeyed": True})

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        need_model(types, self.model)
        for domain in self.domains:
            found = need_domain(types, self.tasks, domain)
        if "id" not in found.columns:
            raise SpecError(f"{self.tasks.of.name}.{self.tasks.port} has no ids; give tasks with id, domain and prompt")
        columns = found.columns if "meta" in found.columns else (*found.columns, "meta")
        signals = tuple(dict.fromkeys((*found.signals, RATE)))
        return {"tasks": replace(found, columns=columns, domains=self.domains, signals=signals)}

    def estimate(self, types: Callable[[At], Type]) -> float:
        rows = need_domain(types, self.tasks, self.domains[0]).rows
        tokens = tokens_guess(rows * self.samples, self.sampling)
        return 2.0 * need_model(types, self.model).params * tokens

    def run(self, ctx: Any) -> None:
        from tutelage.rollout.policy import Policy
        from tutelage.text.rows import read_rows, read_tasks, write_tasks

        pool = ctx.input(self.tasks)
        rows = [row for row in read_rows(pool) if row["domain"] in self.domains]
        tasks = [task for task in read_tasks(pool) if task.domain in self.domains]
        self._check(rows)
        policy = Policy(ctx.input(self.model), self.slots, device=ctx.device)
        driver = policy.driver(self.template, self.env, self.sampling)
        done, folder = ctx.resume()
        found = _read(folder) if folder else []
        part = max(1, 2 * self.slots // self.samples)
        while done < len(tasks):
            asked = tasks[done : done + part]
            drawn = driver.collect(asked, self.samples, self.seed)
            policy.charge(ctx.cost)
            found.extend(measured([task.id for task in asked], drawn))
            done += len(asked)
            known = [rate for rate, _ in found if rate is not None]
            ctx.log(done, pass_rate=sum(known) / len(known) if known else None)
            ctx.progress(done, len(tasks))
            ctx.boundary(done, lambda to: _write(to, found))
        for row, (rate, count) in zip(rows, found, strict=True):
            row["meta"] = {**(row.get("meta") or {}), RATE: rate, COUNT: count}
        ctx.facts["pass_rate"] = {d: _summary([row["meta"] for row in rows if row["domain"] == d]) for d in self.domains}
        write_tasks(ctx.output("tasks"), rows)

    def _check(self, rows: Sequence[dict[str, Any]]) -> None:
        """Raises `UserError` for a domain that has no tasks."""
        have = Counter(row["domain"] for row in rows)
        for domain in self.domains:
            if not have[domain]:
                raise UserError(f"{self.tasks.of.name}.{self.tasks.port} holds no task of domain {domain!r}")


def measured(tasks: Sequence[str], samples: Sequence[Sample]) -> list[tuple[float | None, int]]:
    """(rate, count) of each task by id; the rate of a task without a sound reply is None."""
    sound: dict[str, list[float]] = {task: [] for task in tasks}
    for sample in samples:
        if sample.task and not (sample.score and sample.score.error):
            sound[sample.task.id].append(sample.scalars["reward"])
    return [(sum(of) / len(of) if of else None, len(of)) for of in sound.values()]


def need_rates(types: Callable[[At], Type], tasks: At) -> DataType:
    """The type of a dataset whose tasks have pass rates. Raises `SpecError`."""
    found = types(tasks)
    if not isinstance(found, DataType) or RATE not in found.signals:
        where = f"{tasks.of.name}.{tasks.port}"
        raise SpecError(f"{where} holds no pass rates; put a PassRate stage between, and take its tasks")
    return found


def rates(tasks: Sequence[Task]) -> np.ndarray:
    """float [n]: the tasks' pass rates. Raises `UserError` for one without."""
    import numpy as np

    for task in tasks:
        if task.meta.get(RATE) is None:
            raise UserError(f"task {task.id!r} has no pass rate; a Choose stage leaves out what could not be measured")
    return np.array([task.meta[RATE] for task in tasks], float)


def _summary(metas: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a domain's rates look like: how many, their mean, and the shares that teach a group nothing."""
    known = [meta[RATE] for meta in metas if meta[RATE] is not None]
    n = max(1, len(known))
    shares = {"never": sum(r <= 0 for r in known) / n, "always": sum(r >= 1 for r in known) / n}
    return {"tasks": len(metas), "unmeasured": len(metas) - len(known), "mean": sum(known) / n, **shares}


def _write(folder: Path, rates: Sequence[tuple[float | None, int]]) -> None:
    import json

    (folder / "rates.json").write_text(json.dumps(rates), "utf-8")


def _read(folder: Path) -> list[tuple[float | None, int]]:
    import json

    return [(rate, count) for rate, count in json.loads((folder / "rates.json").read_text("utf-8"))]
