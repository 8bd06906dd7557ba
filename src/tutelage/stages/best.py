"""Best: of several trials of one method, the policy that is best on the development split.

A trial is a stage like any other, so it is stored, and its setting stands in its record. `Best` asks every candidate the
development tasks, the same for all, and publishes the one with the highest mean over domains; the first of equals. What every
candidate scored and what asking cost is among its facts: ``selected``, ``trials``, ``development_flops``. The held-out split is
never seen here. A comparison of methods is fair where each was given as many trials as the others.

Leaves out: searches that decide the next trial by the last one's score.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from tutelage.envs.base import Env
from tutelage.graph import At, DataType, Kind, Stage, Type
from tutelage.rollout.base import Sampling
from tutelage.spec import SpecError, UserError
from tutelage.stages.evaluate import need_domain, need_model
from tutelage.text.template import Chat, Template


class Best(Stage):
    """Publishes the best of ``candidates`` by greedy accuracy on development tasks; see the module's docstring."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "chooses"
    on_device: ClassVar[bool] = True
    version: ClassVar[int] = 4

    candidates: dict[str, At] = Field(min_length=1)
    """label of the trial -> its policy"""
    select_on: At
    """Development tasks; every domain counts the same."""
    domains: tuple[str, ...] = ()
    """those that count; empty: all that the tasks hold"""
    env: Env
    limit: int = Field(125, ge=1)
    """tasks a domain, the first in the dataset's order"""
    template: Template = Chat()
    sampling: Sampling = Sampling(temperature=0.0)
    slots: int = Field(256, ge=1, json_schema_extra={"unkeyed": True})

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        tasks = types(self.select_on)
        if not isinstance(tasks, DataType) or not {"id", "domain", "prompt"} <= set(tasks.columns):
            raise SpecError(
                f"select_on {self.select_on.of.name}.{self.select_on.port} holds no tasks; give a development split"
            )
        for domain in self.domains:
            need_domain(types, self.select_on, domain)
        made = [replace(need_model(types, at), checkpoints=()) for at in self.candidates.values()]
        for label, model in zip(self.candidates, made, strict=True):
            if model != made[0]:
                first = next(iter(self.candidates))
                raise SpecError(
                    f"candidates {first!r} and {label!r} are models of different kinds (architecture, tokenizer, template or "
                    "adapter); trials of one method start from one model"
                )
        return {"policy": made[0]}

    def estimate(self, types: Callable[[At], Type]) -> float:
        return 0.0  # trials are on no budget, and short beside what they try

    def run(self, ctx: Any) -> None:
        done, folder = ctx.resume()
        trials: dict[str, Any] = json.loads((folder / "trials.json").read_text("utf-8")) if folder else {}
        tasks = self._tasks(ctx)
        for label, at in list(self.candidates.items())[done:]:
            trials[label] = self._trial(ctx, at, tasks)
            done += 1
            ctx.log(done, dev=trials[label]["dev"])
            ctx.progress(done, len(self.candidates), dev=trials[label]["dev"])
            ctx.boundary(done, lambda to: (to / "trials.json").write_text(json.dumps(trials), "utf-8"))
        best = max(trials, key=lambda label: trials[label]["dev"])  # the first of equals
        ctx.facts.update(selected={"candidate": best, "dev": trials[best]["dev"]}, trials=trials)
        shutil.copytree(ctx.input(self.candidates[best]), ctx.output("policy"), dirs_exist_ok=True)

    def _tasks(self, ctx: Any) -> dict[str, list[Any]]:
        """domain -> its first ``limit`` tasks"""
        from tutelage.text.rows import read_tasks

        found: dict[str, list[Any]] = {}
        for task in read_tasks(ctx.input(self.select_on)):
            if not self.domains or task.domain in self.domains:
                found.setdefault(task.domain, []).append(task)
        if not found:
            where = f"{self.select_on.of.name}.{self.select_on.port}"
            raise UserError(f"select_on {where} holds no task to choose by; give a development split that has some")
        return {d: tasks[: self.limit] for d, tasks in sorted(found.items())}

    def _trial(self, ctx: Any, at: At, tasks: dict[str, list[Any]]) -> dict[str, Any]:
        """Mean reward, by domain and over domains. Its tokens are on no budget."""
        from tutelage.context import Cost
        from tutelage.rollout.policy import Policy

        policy, spent = Policy(ctx.input(at), self.slots, device=ctx.device), Cost()
        driver = policy.driver(self.template, self.env, self.sampling)
        domains = {}
        for domain, asked in tasks.items():
            samples = driver.collect(asked, 1, 0)
            domains[domain] = sum(s.scalars["reward"] for s in samples) / len(samples)
        policy.charge(spent)
        ctx.facts["development_flops"] = ctx.facts.get("development_flops", 0.0) + spent.flops
        return {"dev": sum(domains.values()) / len(domains), "domains": domains}
