"""Context: what a running stage may touch — its inputs, its output folders, metrics, progress, costs and checkpoints.

It joins the graph's edges to the store's folders. A stage calls `boundary` between two steps: that is where checkpoints
fall and where a stop is obeyed, so that a resumed stage goes on from a whole step.

Leaves out: scheduling (run.py).
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tutelage.files import Trouble, append_line, sync, sync_folder, trouble, write_json
from tutelage.graph import At, Stage, key
from tutelage.spec import UserError, content_hash
from tutelage.store import Store, checkpoint_state, seal


class Stopped(Exception):
    """The run was asked to stop; the stage's state is on disk."""


@dataclass
class Cost:
    """What a stage spent. FLOPs are algorithmic (docs/architecture.md): engine savings are not subtracted."""

    flops: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)
    """``sampled``, ``prefilled``, ``scored``, ``trained`` and ``adapted`` (trained in an adapter)."""

    PER_TOKEN = {"sampled": 2, "prefilled": 2, "scored": 2, "trained": 6, "adapted": 4}

    def spend(self, what: str, tokens: int, params: int) -> None:
        """Counts ``tokens`` of one kind on a model of ``params`` matmul parameters (N)."""
        self.flops += self.PER_TOKEN[what] * float(params) * tokens
        self.tokens[what] = self.tokens.get(what, 0) + int(tokens)


class Context:
    """Handed to `Stage.run`."""

    def __init__(
        self,
        stage: Stage,
        store: Store,
        tell: Callable[[dict[str, Any]], None] = lambda event: None,
        stopping: Callable[[], bool] = lambda: False,
        every: float = 60.0,
        device: str = "cpu",
    ):
        self.stage, self.store, self.key = stage, store, key(stage)
        self.work = store.work(self.key)
        self.device = device
        """Where the stage's models are, as torch names it. What a stage writes, it writes from the CPU."""
        self.cost = Cost()
        self._tell, self._stopping, self._every = tell, stopping, every
        self._metrics = self.work / "metrics.jsonl"
        self._saved = self._began = time.monotonic()
        self._earlier = 0.0
        self.facts: dict[str, Any] = {}
        """Small JSON facts published with the artifact (such as which step was selected)."""

    @property
    def seconds(self) -> float:
        """Spent on this stage so far, before a resume included."""
        return self._earlier + time.monotonic() - self._began

    # --- in and out ---

    def input(self, at: At) -> Path:
        """The folder of an input."""
        return self.store.path(key(at.of), at.port, at.step)

    def input_meta(self, at: At) -> dict[str, Any]:
        """The ``artifact.json`` of an input's stage: its cost, facts and ancestry."""
        return self.store.meta(key(at.of))

    def output(self, port: str, step: int | None = None) -> Path:
        """An empty folder to fill; with ``step``, for a checkpoint of the port's series."""
        folder = self.work / (port if step is None else f"{port}@{step}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    # --- being seen ---

    def log(self, step: int, **metrics: Any) -> None:
        """One line of metrics."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        append_line(self._metrics, {"step": step, "time": round(time.time(), 3), **line})

    def progress(self, step: int, total: int, **shown: Any) -> None:
        """What the progress bar shows: step of total, and a few named numbers."""
        self._tell({"event": "progress", "key": self.key, "step": step, "total": total, "shown": shown})

    # --- surviving ---

    def resume(self) -> tuple[int, Path | None]:
        """(step, folder) of the last checkpoint, or (0, None). Metrics and costs go back to what they were then."""
        found = sorted(self.work.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        for extra in self.work.glob(".checkpoint*"):
            shutil.rmtree(extra)
        for folder in reversed(found):
            try:
                state = checkpoint_state(folder)
            except UserError:  # a failing disk, a power cut
                shutil.rmtree(folder)
                continue
            self.cost = Cost(**state["cost"])
            self.facts = state["facts"]
            self._earlier = state["seconds"]
            if self._metrics.exists():
                with self._metrics.open("r+") as file:
                    file.truncate(state["metrics"])
            return state["step"], folder
        self._metrics.unlink(missing_ok=True)
        self.cost, self.facts, self._earlier = Cost(), {}, 0.0
        return 0, None

    def boundary(self, step: int, save: Callable[[Path], None]) -> None:
        """Call between steps, ``step`` steps done: saves when it is time to; raises `Stopped` when asked to stop."""
        stop = self._stopping()
        if not stop and time.monotonic() - self._saved < self._every:
            return
        fresh = self.work / f".checkpoint-{step}"
        try:
            self._checkpoint(step, fresh, save)
        except BaseException as error:
            why = trouble(error, self.work)  # asked before there is room again
            shutil.rmtree(fresh, ignore_errors=True)
            if why:
                raise Trouble(why) from error
            raise
        self._saved = time.monotonic()
        if stop:
            raise Stopped(f"{self.stage.name} stopped after step {step}")

    def _checkpoint(self, step: int, fresh: Path, save: Callable[[Path], None]) -> None:
        """The new one is whole, on disk and in place before the old one goes."""
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save(fresh)
        size = 0
        if self._metrics.exists():
            with self._metrics.open("rb") as file:
                os.fsync(file.fileno())
                size = file.seek(0, os.SEEK_END)
        state = {"step": step, "metrics": size, "cost": asdict(self.cost), "facts": self.facts, "seconds": self.seconds}
        state["content"] = content_hash(fresh)
        write_json(fresh / "context.json", {**state, "seal": seal(state)})
        sync(fresh)
        target = self.work / f"checkpoint-{step}"
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
        sync_folder(self.work)
        for old in self.work.glob("checkpoint-*"):
            if old != target:
                shutil.rmtree(old)
