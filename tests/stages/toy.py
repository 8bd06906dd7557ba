"""A toy domain for stage tests: answer with the letter that follows; and a way to make stages without the runner."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from tests import tiny
from tutelage.context import Context
from tutelage.credit.group import GroupRelative
from tutelage.envs.single import SingleTurn
from tutelage.graph import DataType, Kind, Stage, key, order
from tutelage.losses.policy import DAPO
from tutelage.rollout.base import Sampling
from tutelage.stages.model import NewModel
from tutelage.stages.online import Online
from tutelage.store import Store
from tutelage.types import Score, Task
from tutelage.verify.base import Verifier
from tutelage.verify.text import Exact


class Taste(Verifier):
    """Pays for the characters drawn, so that an untrained policy has something to learn from."""

    async def __call__(self, task: Task, reply: str, ctx: Any = None) -> Score:
        return Score(sum(map(ord, reply)) % 7 / 7)


ENV = SingleTurn(verifier=Exact())
SHORT = Sampling(max_new_tokens=3)


class Letters(Stage):
    """``a`` -> ``b``, in two domains (``low``: a to m, ``high``: n to y), as gold rows, prompts and documents at once."""

    outputs: ClassVar[dict[str, Kind]] = {"rows": "data"}

    def infer(self, types: Any) -> Any:
        columns = ("id", "domain", "prompt", "completion", "text", "gold", "meta")
        return {"rows": DataType(columns, ("high", "low"), 24)}

    def run(self, ctx: Context) -> None:
        from tutelage.text.rows import write_tasks

        rows = []
        for a, b in zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True):
            prompt, reply = [{"role": "user", "content": a}], [{"role": "assistant", "content": b}]
            row = {"id": a, "domain": "low" if a < "n" else "high", "prompt": prompt, "completion": reply}
            rows.append({**row, "text": f"{a}:{b}", "gold": b, "meta": {"level": 1}})
        write_tasks(ctx.output("rows"), rows)


DATA = Letters(name="letters")
INIT = NewModel(name="init", alphabet=tiny.ALPHABET, width=32, layers=1, mlp=48)


def rl(**more: Any) -> Online:
    fields: dict[str, Any] = {
        "name": "rl",
        "model": INIT.out(),
        "tasks": DATA.out(),
        "domains": ("low",),
        "env": SingleTurn(verifier=Taste()),
    }
    fields |= {"credit": (GroupRelative(drop_uniform=False),), "loss": DAPO(), "steps": 4, "prompts": 4, "group": 3}
    return Online(**{**fields, "sampling": SHORT, **more})


def make(goal: Stage, store: Store, **how: Any) -> Context:
    """Makes a stage and what it needs; ``how`` goes to the goal's own context."""
    goal.infer(Types())
    for stage in order([goal]):
        if store.has(key(stage)):
            continue
        ctx = Context(stage, store, **(how if stage is goal else {}))
        stage.run(ctx)
        body = {"name": stage.name, "kind": stage.kind(), "inputs": [], "cost": asdict(ctx.cost), "facts": ctx.facts}
        store.publish(key(stage), {**body, "finished": 0.0})
    return ctx


class Types:
    """Types of edges, inferred on demand (a `plan` without a store)."""

    def __call__(self, at: Any) -> Any:
        return at.of.infer(self)[at.port]
