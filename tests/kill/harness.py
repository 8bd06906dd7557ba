"""Runs a recipe whose workers are killed at chosen moments, again and again until it is done; what went wrong on the way.

The runner and the worker are the real ones. A worker is a fork of this process instead of a new Python, so that torch is
imported once and not once a kill; it dies by SIGKILL at a boundary (inject/sitecustomize.py) or at a share of the time its
stage usually takes. Which stage is killed when follows from one seed.

Leaves out: what is run and killed (programs.py), and kills through the command (test_kill.py).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from tests.kill.inject import sitecustomize as inject
from tutelage import run as runner
from tutelage import worker
from tutelage.files import read_jsonl
from tutelage.graph import Goals, Node, all_goals, key, order, plan
from tutelage.run import Outcome, Silent, run
from tutelage.store import Store

TIMED = {"time", "tokens_per_s"}
"""Metrics that tell of the clock."""


# --- workers as forks -----------------------------------------------------------------------------------------------------


class Forked:
    """`subprocess.Popen` of a worker, as far as run.py uses it."""

    newest: ClassVar[Forked]

    def __init__(self, *command: Any, **how: Any):
        read, orders = os.pipe()
        events, write = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._serve(read, write)
        for mine in (read, write):
            os.close(mine)
        with suppress(PermissionError):
            os.setpgid(self.pid, self.pid)
        self.stdin, self.stdout = os.fdopen(orders, "wb"), os.fdopen(events, "rb")
        Forked.newest = self

    def _serve(self, read: int, write: int) -> None:
        try:
            os.setpgid(0, 0)
            os.dup2(read, 0)
            os.dup2(write, 1)
            os.closerange(3, 1024)  # the ends of other pipes: while they are open nobody sees that the parent is gone
            for each in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(each, signal.SIG_DFL)
            inject.install()
            inject.arm(0)
            worker.main()
        finally:
            os._exit(1)

    def poll(self, flags: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int | None:
        return self.poll(0)


@contextmanager
def forks(begin: Callable[[str], None]) -> Iterator[None]:
    """Workers are forks, and call ``begin`` with a stage's key before they touch its files."""
    popen, version, lock = runner.subprocess, runner.code_version, Store.lock

    def locked(self: Store, mine: str, *more: Any, **named: Any) -> Any:
        begin(mine)
        return lock(self, mine, *more, **named)

    runner.subprocess = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE)  # type: ignore[assignment]
    runner.code_version = lambda: "killed"
    Store.lock = locked  # type: ignore[method-assign]
    try:
        yield
    finally:
        runner.subprocess, runner.code_version = popen, version
        Store.lock = lock  # type: ignore[method-assign]


# --- kills ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """Boundary ``at`` of a stage's work, or so many seconds after its start."""

    at: int = 0
    how: str = "before"
    seconds: float = 0.0


@dataclass
class Killer(Silent):
    """Kills each stage at its moments, one a run, in turn. The watcher of the runs, to know when a stage starts."""

    log: Path
    moments: dict[str, list[Moment]] = field(default_factory=dict)
    trace: bool = False
    died: list[tuple[str, Moment]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = 0.0
    _timer: threading.Timer | None = None

    def begin(self, mine: str) -> None:
        """In the worker."""
        now = (self.moments.get(mine) or [Moment()])[0]
        inject.arm(now.at, now.how, str(self.log), mine, self.trace)

    def event(self, node: Node, event: dict[str, Any]) -> None:
        """In the runner."""
        what, left = event["event"], self.moments.get(node.key)
        if what in ("started", "resumed"):
            self._began = time.monotonic()
            if left and left[0].seconds:
                self._timer = threading.Timer(left[0].seconds, os.kill, (Forked.newest.pid, signal.SIGKILL))
                self._timer.start()
        elif what in ("finished", "failed", "stopped", "died"):
            if self._timer:
                self._timer.cancel()
                self._timer = None
            self.seconds[node.key] = time.monotonic() - self._began
            if what == "died":
                self.died.append((node.key, left[0] if left else Moment()))
            if left:
                left.pop(0)

    def boundaries(self) -> Counter[str]:
        """Of each stage, from a trace."""
        return Counter(line.partition("\t")[0] for line in self.log.read_text().splitlines())

    def every(self, mine: str) -> list[Moment]:
        """Every moment between two boundaries of a trace, and each write half-done. After one is before the next."""
        lines = [line.split("\t") for line in self.log.read_text().splitlines()]
        steps = [(int(line[1]), line[3]) for line in lines if line[0] == mine]
        torn = [Moment(n, "torn") for n, name in steps if name == "write"]
        return [*(Moment(n) for n, _ in steps), *torn, Moment(steps[-1][0], "after")]


def drawn(rng: random.Random, usual: Killer, kinds: dict[str, str], kills: int) -> dict[str, list[Moment]]:
    """``kills`` moments: one for each stage, two at least for each kind, the rest by the boundaries a stage has."""
    counts, of_kind = usual.boundaries(), Counter(kinds.values())
    chosen = [*kinds, *(mine for mine, kind in kinds.items() if of_kind[kind] == 1)]
    chosen += rng.choices(list(kinds), [counts[mine] for mine in kinds], k=max(0, kills - len(chosen)))
    found: dict[str, list[Moment]] = {mine: [] for mine in kinds}
    for mine in chosen:
        found[mine].append(_moment(rng, counts[mine], usual.seconds[mine], first=not found[mine]))
    return found


def _moment(rng: random.Random, boundaries: int, seconds: float, first: bool) -> Moment:
    if rng.random() < 0.4:
        return Moment(seconds=seconds * rng.uniform(0.02, 0.8 if first else 0.4))
    return Moment(rng.randint(1, boundaries if first else min(boundaries, 40)), rng.choice(inject.HOWS))


# --- what must hold -------------------------------------------------------------------------------------------------------


def goal_keys(goals: Goals) -> dict[str, str]:
    """key -> kind"""
    return {key(s): s.kind() for s in order(at.of for at in all_goals(goals))}


def once(goals: Goals, store: Store, killer: Killer, every: float) -> tuple[Outcome, list[str]]:
    """One run, and what went wrong in it."""
    ready = {k for k in goal_keys(goals) if store.has(k)}
    newest = {k: store.checkpoint(k) for k in goal_keys(goals)}
    since = time.time()
    with forks(killer.begin):
        outcome = run(plan([goals], store.has), store, cores=1, every=every, watcher=killer)
    wrong = []
    tried: Counter[str] = Counter()
    for event in events(store):
        if event["time"] >= since and event["event"] in ("stage started", "stage resumed"):
            mine = event["key"]
            tried[mine] += 1
            if mine in ready:
                wrong.append(f"{event['stage']} was finished and runs again")
            elif event.get("step") != newest[mine]:
                wrong.append(f"{event['stage']} goes on from step {event.get('step')}, its checkpoint is of {newest[mine]}")
    wrong += [f"{mine} was tried {n} times in one run" for mine, n in tried.items() if n > 1]
    return outcome, wrong + [w for mine in tried for w in lost(store, mine, every, since)]


def lost(store: Store, mine: str, every: float, since: float) -> list[str]:
    """Whether a stage killed since then has lost more than the steps of ``every`` seconds and the one that was on its way.

    The line of step s + 1 is written after the checkpoint of step s. Had a later step ended ``every`` seconds after it,
    there would be a checkpoint of that step, but for the last one: it may have been killed before its own.
    """
    if store.has(mine):
        return []
    at = {line["step"]: line["time"] for line in store.metrics(mine) if line["time"] >= since}
    after = sorted(step for step in at if step > (store.checkpoint(mine) or 0))
    if len(after) < 2 or at[after[-2]] - at[after[0]] <= every + 0.001:  # times are rounded to milliseconds
        return []
    return [f"{mine} has lost the steps {after[0]} to {after[-1]}, {at[after[-2]] - at[after[0]]:.3f} s and one step"]


def events(store: Store) -> list[dict[str, Any]]:
    return [e for file in (store.root / "events").iterdir() for e in read_jsonl(file)]


def differences(whole: Store, other: Store, goals: Goals) -> list[str]:
    """Where two stores do not hold the same bits, metrics, costs and facts, or a stage was finished twice.

    Checkpoints do not count: a kill between the rename that publishes a stage and their removal leaves them there.
    """
    found = []
    for stage in order(at.of for at in all_goals(goals)):
        mine = key(stage)
        if not (whole.has(mine) and other.has(mine)):
            found.append(f"{stage.name} is not made")
            continue
        one, two = whole.meta(mine), other.meta(mine)
        found += [f"{stage.name}: {part} differs" for part in ("content", "cost", "facts") if one[part] != two[part]]
        lines = [[{k: v for k, v in m.items() if k not in TIMED} for m in s.metrics(mine)] for s in (whole, other)]
        if lines[0] != lines[1]:
            names = {k for a, b in zip(*lines, strict=False) for k in a | b if a.get(k) != b.get(k)}
            found.append(f"{stage.name}: metrics differ ({len(lines[0])} and {len(lines[1])} lines): {sorted(names)}")
        folders = [{p.name for p in s.folder(mine).glob("[!.]*") if "checkpoint-" not in p.name} for s in (whole, other)]
        if folders[0] != folders[1]:
            found.append(f"{stage.name}: folders {sorted(folders[0])} and {sorted(folders[1])}")
    ended = Counter(e["key"] for e in events(other) if e["event"] == "stage finished")
    return found + [f"{mine} was finished {n} times" for mine, n in ended.items() if n > 1]
