"""A worker: a process that runs one stage after another, told by JSON lines and telling by JSON lines.

Started by run.py as ``python -c "from tutelage.worker import main; main()"``; orders come on standard input, events go out
on standard output. It keeps what it has imported, so torch is loaded once a worker and not once a stage. While a stage
runs, what it prints goes to ``log.txt`` in the stage's folder. When the input ends, the parent is gone: the worker and all
processes it has started end at once.

A run's device is told once, and handed to every stage in its context; what a stage held there is given back when it ends.

Leaves out: which stage goes when (run.py).
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from tutelage.card import card
from tutelage.context import Context, Stopped
from tutelage.device import Device, exhausted, free, relief
from tutelage.explain import marks
from tutelage.files import trouble
from tutelage.graph import Stage, all_goals, from_record, key, order
from tutelage.locks import Holder
from tutelage.spec import UserError
from tutelage.store import Store
from tutelage.upkeep import damage

Order = dict[str, Any]
LIBRARIES = ("torch", "transformers", "peft", "reasoning-gym", "math-verify", "tutelage")
"""Whose versions are recorded with everything made."""


def main() -> None:
    """Serves until the parent goes away."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Worker(inbox, outbox).serve()


class Worker:
    """Takes orders in a thread of its own, so that a stop is seen in the middle of a stage."""

    def __init__(self, inbox: BinaryIO, outbox: BinaryIO):
        self._inbox, self._outbox = inbox, outbox
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._speaking = threading.Lock()
        self._stop = threading.Event()
        self._stages: dict[int, dict[str, Stage]] = {}
        self._records: dict[int, dict[str, Any]] = {}
        self._sound: set[str] = set()
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())

    def serve(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        hello = self._orders.get()
        self.store, self.every, self.code, self.run = Store(hello["store"]), hello["every"], hello["code"], hello["run"]
        self.device = Device(**hello["device"])
        while True:
            each = self._orders.get()
            if each["do"] == "goals":
                self._records[each["n"]] = each["record"]
            else:
                self._perform(each)

    def _listen(self) -> None:
        for line in self._inbox:
            each = json.loads(line)
            if each["do"] == "stop":
                self._stop.set()
            else:
                self._orders.put(each)
        if os.getpgrp() == os.getpid():  # the parent is gone or wants us gone: nothing started here may outlive us
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def tell(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        with self._speaking:
            self._outbox.write(line)
            self._outbox.flush()

    def _stage(self, goals: int, wanted: str) -> Stage:
        if goals not in self._stages:
            built = from_record(self._records[goals])
            self._stages[goals] = {key(s): s for s in order(at.of for at in all_goals(built))}
        if wanted not in self._stages[goals]:
            raise UserError("what it was planned with (an outside file, a library, its code) has changed since; run again")
        return self._stages[goals][wanted]

    def _perform(self, job: Order) -> None:
        """Runs one stage and says how it ended. Never raises: whatever a stage raises is the stage's failure."""
        mine: str = job["key"]
        facts = {"key": mine, "stage": job["label"]}
        try:
            with self.store.lock(mine, self.run, self._give_up(mine)):
                if self.store.has(mine):
                    self.tell({"event": "finished", **facts, "made": False})
                    return
                done = self._make(job, facts)
            self.tell({"event": "finished", **facts, "made": True, **done})
        except Stopped:
            self._record_end("stopped", facts)
        except BaseException as error:
            self._record_end("failed", {**facts, **self._explained(job, error)})

    def _explained(self, job: Order, error: BaseException) -> dict[str, Any]:
        """What a stage raised: the machine's trouble in one line; anything else in one, and the traceback in its log."""
        mine: str = job["key"]
        if exhausted(error):
            fix = relief(self._stage(job["goals"], mine))
            return {
                "message": f"out of memory on {self.device.where}, {self.device.name}; {fix}: nothing made is lost",
                "user": True,
            }
        if why := trouble(error, self.store.root):
            why = f"{why}; mend that and run the same command again: nothing made is lost"
            return {"message": why, "user": True, "ends": True}
        if isinstance(error, UserError):
            return {"message": str(error), "user": True}
        log = self.store.work(mine) / "log.txt"
        with suppress(OSError), log.open("a") as file:
            traceback.print_exception(error, file=file)
        line = " ".join(str(error).split())[:200]
        return {"message": f"{type(error).__name__}: {line}", "log": str(log)}

    def _record_end(self, how: str, facts: dict[str, Any]) -> None:
        with suppress(OSError):  # a full disk is told all the same
            self.store.event(f"stage {how}", **facts)
        self.tell({"event": how, **facts})

    def _give_up(self, mine: str) -> Any:
        told: set[bool] = set()

        def waiting(holder: Holder) -> None:
            if self._stop.is_set():
                raise Stopped("stopped while another process makes the stage")
            if holder.stalled not in told:
                told.add(holder.stalled)
                self.tell(
                    {
                        "event": "waiting",
                        "key": mine,
                        "holder": str(holder),
                        "still": round(holder.still) if holder.stalled else 0,
                    }
                )

        return waiting

    def _make(self, job: Order, facts: dict[str, Any]) -> dict[str, Any]:
        mine, store = job["key"], self.store
        stage = self._stage(job["goals"], mine)
        set_threads(stage.threads)
        step = store.checkpoint(mine)
        if step is None:
            clean(store.work(mine))
        self._check(job)
        how, at = ("started", {}) if step is None else ("resumed", {"step": step})
        store.event(f"stage {how}", **facts, **at)
        self.tell({"event": how, **facts, **at})
        began = time.time()
        if stage.on_device or stage.holds_models:
            with captured(store.work(mine) / "log.txt"):
                import_torch()
        ctx = Context(stage, store, self._throttled(), self._stop.is_set, self.every, self.device.where)
        self._ctx = ctx
        with captured(ctx.work / "log.txt"):
            stage.run(ctx)
        free(self.device.where)
        for port in stage.outputs:
            if not (ctx.work / port).is_dir():
                raise UserError(f"stage {stage.name!r} ended without filling its port {port!r}")
        meta = self._meta(stage, job, ctx, began)
        for port, kind in stage.outputs.items():
            if kind == "model":
                text = card(store, meta, port)
                for folder in (ctx.work / port, *ctx.work.glob(f"{port}@*")):
                    (folder / "README.md").write_text(text, "utf-8")
        log = ctx.work / "log.txt"
        if log.exists() and not log.stat().st_size:
            log.unlink()
        store.publish(mine, meta)
        store.event("stage finished", **facts, seconds=meta["seconds"], cost=meta["cost"])
        return {"seconds": meta["seconds"], "cost": meta["cost"]}

    def _check(self, job: Order) -> None:
        """Raises `UserError` for an input that is not what was published; each is looked at once a worker."""
        for one in job["inputs"]:
            if one["key"] not in self._sound:
                if found := damage(self.store, one["key"]):
                    raise UserError(
                        f"its input {one['name']!r} is damaged: {found[0]}; `tutelage store verify --remove` takes it out, "
                        "then the same command makes it again"
                    )
                self._sound.add(one["key"])

    def _throttled(self) -> Any:
        """Progress at most ten times a second, with the tokens spent so far."""
        last = 0.0

        def tell(event: dict[str, Any]) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= 0.1 or event["step"] >= event["total"]:
                last = now
                self.tell({**event, "tokens": sum(self._ctx.cost.tokens.values())})

        return tell

    def _meta(self, stage: Stage, job: Order, ctx: Context, began: float) -> dict[str, Any]:
        import platform
        import socket
        from importlib.metadata import PackageNotFoundError, version

        def of(package: str) -> str | None:
            try:
                return version(package)
            except PackageNotFoundError:
                return None

        seed = getattr(stage, "seed", None)
        return {
            "key": job["key"],
            "name": stage.name,
            "kind": stage.kind(),
            "version": stage.version,
            "record": self._records[job["goals"]]["stages"][stage.name],
            "inputs": job["inputs"],
            "outputs": {port: {"kind": kind, **job["types"].get(port, {})} for port, kind in stage.outputs.items()},
            "facts": ctx.facts,
            "cost": asdict(ctx.cost),
            "estimate": job["flops"],
            "seconds": round(ctx.seconds, 3),
            "started": began,
            "finished": time.time(),
            "host": socket.gethostname(),
            "versions": {"python": platform.python_version(), **{p: of(p) for p in LIBRARIES}, "decoding": decoding()},
            "code": self.code,
            "threads": stage.threads,
            "device": self.device.name if stage.on_device else "cpu",
            "marks": marks(stage),
            **({"seed": seed} if seed is not None else {}),
        }


def decoding() -> str | None:
    """Whether the step that draws was built with the package: another order of sums, other last digits. None without models."""
    if "torch" not in sys.modules:
        return None
    from tutelage.model.native import library

    return "compiled" if library() else "by modules"


def import_torch() -> None:
    """Once: with what models need, and without looking for garbage among a million objects that stay, now or later."""
    if "torch" not in sys.modules:
        gc.disable()
        import torch  # noqa: F401
        from transformers import modeling_utils  # noqa: F401

        gc.freeze()
        gc.enable()


def clean(work: Path) -> None:
    """Removes what an attempt without a checkpoint has left."""
    for left in work.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != "log.txt":
            left.unlink()


def set_threads(threads: int) -> None:
    """Before torch is imported the environment decides; after, torch must be told."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


@contextmanager
def captured(log: Path) -> Iterator[None]:
    """Sends this process's output, libraries' and crash reports included, to a file."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    try:
        yield
    finally:
        _flush()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        os.close(nothing)
