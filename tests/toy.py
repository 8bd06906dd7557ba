"""Toy stages without torch: they count, join, fail, hang and wait for each other."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from tutelage.graph import At, DataType, Goals, Kind, ModelType, ScoresType, Stage, Type, all_goals, order
from tutelage.spec import Spec, SpecError, UserError, outside, unkeyed


class Rate(Spec):
    """A nested spec."""

    value: float = 0.1
    shape: Literal["flat", "linear"] = "flat"


class Schedule(Rate):
    """A variant."""

    warmup: int = 3


class Make(Stage):
    """Makes data out of nothing."""

    rows: int = 4
    seed: int = 0
    outputs: ClassVar[dict[str, Kind]] = {"data": "data"}

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        return {"data": DataType(("x",), ("a", "b"), rows=self.rows)}

    def run(self, ctx: Any) -> None:
        (ctx.output("data") / "rows.json").write_text(json.dumps([self.seed + i for i in range(self.rows)]))


class There(Make):
    """Runs on the device, it says."""

    on_device: ClassVar[bool] = True


class Greedy(Make):
    """Asks for more memory than a device has."""

    micro_tokens: int = unkeyed(64)
    slots: int = unkeyed(5)
    on_device: ClassVar[bool] = True

    def run(self, ctx: Any) -> None:
        import torch

        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("a library wrapped it") from error


class Count(Stage):
    """'Trains' by adding numbers, one step at a time, with checkpoints; keeps a series."""

    source: At
    start: At | None = None
    steps: int = 10
    rates: tuple[Rate, ...] = (Rate(),)
    pause: float = unkeyed(0.0)
    die_at: int = unkeyed(-1)
    """Kills its own process after this many steps, the first time."""
    keep: tuple[int, ...] = ()
    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "trains"

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        found = types(self.source)
        if not isinstance(found, DataType):
            raise SpecError(f"source is {type(found).__name__}, not data")
        if self.start is not None:
            types(self.start)
        return {"policy": ModelType("toy", "tok", "tpl", 1000, 10, checkpoints=self.keep)}

    def estimate(self, types: Callable[[At], Type]) -> float:
        found = types(self.source)
        return 6000.0 * self.steps * (found.rows if isinstance(found, DataType) else 0)

    def run(self, ctx: Any) -> None:
        rows = json.loads((ctx.input(self.source) / "rows.json").read_text())
        state = {"sum": 0.0}
        if self.start is not None:
            state = json.loads((ctx.input(self.start) / "model.json").read_text())
        done, folder = ctx.resume()
        if folder:
            state = json.loads((folder / "state.json").read_text())
        for step in range(done, self.steps):
            state["sum"] += sum(rows) * (step + 1) * self.rates[0].value
            ctx.cost.spend("trained", len(rows), 1000)
            ctx.log(step, sum=state["sum"])
            ctx.progress(step + 1, self.steps, sum=state["sum"], reward=0.5)
            if step + 1 in self.keep:
                (ctx.output("policy", step + 1) / "model.json").write_text(json.dumps(state))
            now = state.copy()
            ctx.boundary(step + 1, lambda to, now=now: (to / "state.json").write_text(json.dumps(now)))
            if step + 1 == self.die_at and not folder:
                os.kill(os.getpid(), 9)
            time.sleep(self.pause)
        ctx.facts["sum"] = state["sum"]
        (ctx.output("policy") / "model.json").write_text(json.dumps(state))


class Judge(Stage):
    """Scores a model."""

    policy: At
    domain: str = "a"
    outputs: ClassVar[dict[str, Kind]] = {"scores": "scores"}

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        if not isinstance(types(self.policy), ModelType):
            raise SpecError("policy is not a model")
        return {"scores": ScoresType(self.domain)}

    def run(self, ctx: Any) -> None:
        (ctx.output("scores") / "scores.json").write_text((ctx.input(self.policy) / "model.json").read_text())


class Chain(Stage):
    """A link of a long chain."""

    before: At | None = None
    number: int = 0
    outputs: ClassVar[dict[str, Kind]] = {"data": "data"}
    inferred: ClassVar[list[str]] = []

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        self.inferred.append(self.name)
        if self.before is not None:
            types(self.before)
        return {"data": DataType(("x",), ())}

    def run(self, ctx: Any) -> None:
        ctx.output("data")


class Fail(Stage):
    """Fails, as a user's mistake or as a bug, or forgets its output."""

    how: Literal["user", "bug", "forget", "die"] = "bug"
    source: At | None = None
    outputs: ClassVar[dict[str, Kind]] = {"data": "data"}

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        return {"data": DataType(("x",), ())}

    def run(self, ctx: Any) -> None:
        print("something it said")
        if self.how == "user":
            raise UserError("the dataset is empty; give another")
        if self.how == "bug":
            raise ZeroDivisionError("seven by nothing")
        if self.how == "die":
            os.kill(os.getpid(), 9)


class Meet(Stage):
    """Ends once ``others`` stages like it are running at the same time: a barrier made of files."""

    others: int = 2
    number: int = 0
    folder: str = unkeyed()
    source: At | None = None
    outputs: ClassVar[dict[str, Kind]] = {"data": "data"}

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        return {"data": DataType(("x",), ())}

    def run(self, ctx: Any) -> None:
        here = Path(self.folder)
        (here / f"{self.number}.{os.getpid()}").touch()
        until = time.monotonic() + 30
        while len(list(here.iterdir())) < self.others:
            if time.monotonic() > until:
                raise UserError("nobody came")
            time.sleep(0.01)
        ctx.output("data")


class Hang(Stage):
    """Starts a process of its own, writes down who it is, and never comes to a step's end."""

    folder: str = unkeyed()
    outputs: ClassVar[dict[str, Kind]] = {"data": "data"}

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        return {"data": DataType(("x",), ())}

    def run(self, ctx: Any) -> None:
        child = subprocess.Popen(["sleep", "600"])
        note = Path(self.folder) / "fresh"
        note.write_text(f"{os.getpid()} {child.pid}")
        note.rename(note.with_name("pids"))
        child.wait()


class Outside(Stage):
    """Reads a file that lies outside the store."""

    file: str = outside()
    outputs: ClassVar[dict[str, Kind]] = {"data": "data"}

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        return {"data": DataType(("x",), ())}


class Two(Stage):
    """Two ports."""

    outputs: ClassVar[dict[str, Kind]] = {"left": "data", "right": "data"}

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        return {"left": DataType(("x",), ()), "right": DataType(("y",), ())}


def small(seed: int = 0, steps: int = 10, pause: float = 0.0) -> Goals:
    """data -> base -> two branches -> two scores."""
    data = Make(name="data", rows=4)
    base = Count(name="base", source=data.out(), steps=steps, pause=pause)
    left = Count(name="left", source=Make(name="more", seed=seed + 100).out(), start=base.out(), steps=steps, pause=pause)
    right = Count(name="right", source=data.out(), start=base.out(), steps=steps + 1, pause=pause)
    scores = [Judge(name=f"score-{s.name}", policy=s.out()) for s in (left, right)]
    return Goals(recipe="small", stages=tuple(s.out() for s in scores), seed=seed)


def stages(goals: Goals) -> dict[str, Stage]:
    return {s.name: s for s in order(at.of for at in all_goals(goals))}


class Fat(Stage):
    """Writes a megabyte a step, in checkpoints and at the end: what a small disk does not hold."""

    steps: int = 6
    outputs: ClassVar[dict[str, Kind]] = {"data": "data"}

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        return {"data": DataType(("x",), ())}

    def run(self, ctx: Any) -> None:
        step, _ = ctx.resume()
        while step < self.steps:
            step += 1
            ctx.log(step, value=step)
            ctx.boundary(step, lambda folder, step=step: self.write(folder / "state", step))
        self.write(ctx.output("data") / "all", step)

    def write(self, file: Path, step: int) -> None:
        file.write_bytes(bytes([step]) * (step << 20))
