"""Executes a plan: skips what is stored, runs independent stages side by side in worker processes, survives what dies.

Workers are started when first needed and kept (importing torch takes seconds); a stage takes as many of the cores as it has
threads; of the stages that could start, the one with the longest way still before it goes first. A stage that fails keeps
back only what depends on it. SIGINT, SIGTERM and SIGHUP ask the stages to write a checkpoint at their next step and end; a
second one ends them at once. Whatever happens, the same command goes on from what is in the store.

Leaves out: what a worker does with a stage (worker.py), how it looks (progress.py), machines other than this one.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tutelage.device import CPU, Device
from tutelage.estimate import Estimator, priorities, slots, waits
from tutelage.graph import Node, Plan, all_goals, key, order, record
from tutelage.locks import Holder
from tutelage.spec import UserError
from tutelage.store import Store

Event = dict[str, Any]


class Watcher(Protocol):
    """What is told of a run (progress.py draws it)."""

    def event(self, node: Node, event: Event) -> None:
        """What: started, resumed, progress, waiting, finished, failed, stopped or died."""
        ...

    def say(self, text: str) -> None:
        """One line for the user."""
        ...

    def tick(self) -> None:
        """Called several times a second."""
        ...


class Silent:
    """Watches without a word."""

    def event(self, node: Node, event: Event) -> None: ...
    def say(self, text: str) -> None: ...
    def tick(self) -> None: ...


@dataclass
class Outcome:
    """How a run ended."""

    run: str
    state: str = "done"
    """``done``, ``failed`` or ``stopped``"""
    failed: dict[str, str] = field(default_factory=dict)
    """label -> why"""
    made: list[str] = field(default_factory=list)
    """Labels of the stages made by this run."""
    signal: int = 0
    """The signal that stopped it."""
    users: bool = False
    """Whether everything that failed is the user's to mend: bad input, a full disk."""

    @property
    def exit_code(self) -> int:
        return {"done": 0, "failed": 2 if self.users else 1, "stopped": 128 + self.signal}[self.state]


def run(
    plan: Plan,
    store: Store,
    *,
    arguments: dict[str, Any] | None = None,
    argv: list[str] | None = None,
    cores: int | None = None,
    device: Device = CPU,
    every: float = 60.0,
    watcher: Watcher | None = None,
) -> Outcome:
    """Makes everything the plan says and saves the run. A failing stage is told in the outcome, not raised.

    ``cores`` and ``device`` are shared by all stages that run at one time; checkpoints are at most ``every`` seconds apart.
    Raises `UserError` where the store cannot be written, before any work.
    """
    watcher = watcher or Silent()
    waiting = _tells(watcher)
    store.ready(waiting)
    body = describe(plan, arguments or {}, argv or [])
    name = store.new_run(body["recipe"], body, waiting)
    with store.lock(f"run.{name}", name):
        began = time.monotonic()
        outcome = Outcome(name, state="failed")
        try:
            store.event("run started", run=name)
            _still_there(plan, store, waiting)
            scheduler = Scheduler(plan, store, cores or core_count(), every, watcher, name, device)
            scheduler.go()
            state = "stopped" if scheduler.signal else "failed" if scheduler.failed else "done"
            outcome = Outcome(name, state, scheduler.failed, scheduler.made, scheduler.signal, scheduler.users)
        finally:
            took = round(time.monotonic() - began, 3)
            body.update(finished=time.time(), seconds=took, state=outcome.state, failed=outcome.failed)
            with suppress(OSError):  # what ended the run has been told; a run that cannot say so counts as interrupted
                store.save_run(name, body)
                store.event("run ended", run=name, state=outcome.state)
    return outcome


def _tells(watcher: Watcher) -> Callable[[Holder], None]:
    """Says once for whom the start of a run waits, and once that this one stands still."""
    told: set[bool] = set()

    def waiting(holder: Holder) -> None:
        if holder.stalled not in told:
            told.add(holder.stalled)
            still = f", which has shown no sign of life for {holder.still:.0f} s; continue it or kill it"
            watcher.say(f"waits for {holder}, which is at work in the store{still if holder.stalled else ''}")

    return waiting


def _still_there(plan: Plan, store: Store, waiting: Callable[[Holder], None]) -> None:
    """Raises `UserError` where what the plan builds on has been removed since: a collection that had begun ends first."""
    with store.lock("gc", waiting=waiting):
        pass
    needed = {k for n in plan.todo for _, k, _, _ in n.inputs} | {key(at.of) for one in plan.goals for at in all_goals(one)}
    gone = [n.label for n in plan.nodes.values() if n.key in needed and n.status == "stored" and not store.has(n.key)]
    if gone:
        raise UserError(f"{', '.join(gone[:3])} went from the store while this run was planned; run the same command again")


def describe(plan: Plan, arguments: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """A run as the store keeps it: enough to find every stage again without the recipe's code."""
    goals = []
    for one in plan.goals:
        stages = order(at.of for at in all_goals(one))
        goals.append({"record": record(one), "seed": one.seed, "keys": {s.name: key(s) for s in stages}})
    of_status: dict[str, list[str]] = {"stored": [], "run": [], "unneeded": []}
    for node in plan.nodes.values():
        of_status[node.status].append(node.label)
    return {
        "recipe": plan.goals[0].recipe,
        "arguments": arguments,
        "argv": argv,
        "started": time.time(),
        "finished": None,
        "seconds": None,
        "state": "running",
        "plan": {**of_status, "flops": sum(n.flops for n in plan.todo)},
        "goals": goals,
    }


def core_count() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def code_version() -> str:
    """``git describe`` of the checkout this package lies in, else its version."""
    from tutelage import __version__

    here = Path(__file__).resolve()
    if (here.parents[2] / ".git").exists():
        command = ["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--tags"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return __version__


# --- workers ---------------------------------------------------------------------------------------------------------


class Hand:
    """A worker process as its parent sees it; its own process group, so that it ends with everything it has started."""

    def __init__(self, hello: Event, threads: int):
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p),
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-P", "-c", "from tutelage.worker import main; main()"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, process_group=0)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.inbox, self.outbox = self.process.stdin, self.process.stdout
        self.node: Node | None = None
        self.there = False
        """whether it has been on the device"""
        self.warm = False
        """whether it has held models: it need not import torch again"""
        self._records: set[int] = set()
        self._rest = b""
        self.send({"do": "hello", **hello})

    def send(self, order: Event) -> None:
        with suppress(BrokenPipeError):  # it died; reading finds that out
            self.inbox.write(json.dumps(order).encode() + b"\n")
            self.inbox.flush()

    def begin(self, node: Node, goals: int, job: Event, rec: dict[str, Any]) -> None:
        """Hands a stage to an idle worker; a record is sent once."""
        if goals not in self._records:
            self._records.add(goals)
            self.send({"do": "goals", "n": goals, "record": rec})
        self.node = node
        self.send({"do": "run", "goals": goals, **job})

    def read(self) -> list[Event] | None:
        """Events that have come; None once the worker is dead."""
        got = os.read(self.outbox.fileno(), 1 << 16)
        if not got:
            return None
        *lines, self._rest = (self._rest + got).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """Ends the worker and all it has started, now."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.inbox, self.outbox):
            with suppress(BrokenPipeError):
                pipe.close()
        self.process.wait()


# --- scheduling ------------------------------------------------------------------------------------------------------


class Scheduler:
    """Gives the plan's stages to workers until nothing can start and nothing runs."""

    def __init__(
        self, plan: Plan, store: Store, cores: int, every: float, watcher: Watcher, run: str = "", device: Device = CPU
    ):
        self.plan, self.store, self.cores, self.watcher, self.device = plan, store, cores, watcher, device
        self.hello = {"store": str(store.root), "every": every, "code": code_version(), "run": run, "device": asdict(device)}
        todo = plan.todo
        first = priorities(todo, Estimator(store, device).seconds)
        self.left = waits(todo)
        self.ready = sorted(todo, key=lambda n: -first[n.key])
        self.hands: list[Hand] = []
        self.records = [record(one) for one in plan.goals]
        self.home = _homes(plan)
        self.failed: dict[str, str] = {}
        self.made: list[str] = []
        self.users = True  # as long as nothing else has failed
        self.signal = 0  # the first one that came
        self.asked, self.told = 0, False
        self.poll = selectors.DefaultSelector()

    @property
    def busy(self) -> list[Hand]:
        return [h for h in self.hands if h.node]

    def go(self) -> None:
        with self._signals():
            try:
                while True:
                    self._launch()
                    if not self.busy:
                        return
                    self._listen()
                    self._obey()
                    self.watcher.tick()
            finally:
                for hand in self.hands:
                    hand.end()
                self.poll.close()

    def _launch(self) -> None:
        """Starts the stages that wait for nothing, those with the longest way before them first.

        The first that does not fit keeps its place: cores that come free are saved for it, or small stages starve a wide one.
        Stages that wait for the device let others pass, and go to workers that have been there: each takes memory of it. Other
        stages with models go to workers that had some, and those without leave these free.
        """
        busy = [h.node for h in self.hands if h.node]
        free = self.cores - sum(slots(node, self.cores) for node in busy)
        seats = self.device.stages - sum(map(self.device.takes, busy))
        for node in [n for n in self.ready if not self.left[n.key]]:
            there = self.device.takes(node)
            if there and seats < 1:
                continue
            if self.signal or slots(node, self.cores) > free:
                return
            free, seats = free - slots(node, self.cores), seats - there
            self.ready.remove(node)
            models = node.stage.on_device or node.stage.holds_models
            idle = sorted((h for h in self.hands if not h.node), key=lambda h: (h.there != there, h.warm != models))
            hand = idle[0] if idle else self._hire(node.stage.threads)
            hand.there, hand.warm = hand.there or there, hand.warm or models
            goals = self.home[node.key]
            hand.begin(node, goals, self._job(node, goals), self.records[goals])

    def _hire(self, threads: int) -> Hand:
        hand = Hand(self.hello, threads)
        self.hands.append(hand)
        self.poll.register(hand.outbox, selectors.EVENT_READ, hand)
        return hand

    def _job(self, node: Node, goals: int) -> Event:
        nodes = self.plan.nodes
        inputs = [{"path": f, "key": k, "port": p, "step": s, "name": nodes[k].stage.name} for f, k, p, s in node.inputs]
        types = {port: asdict(facts) for port, facts in node.types.items()}
        return {"key": node.key, "label": node.label, "flops": node.flops, "inputs": inputs, "types": types}

    def _listen(self) -> None:
        """Waits a moment for events; finds workers that have died."""
        for found, _ in self.poll.select(0.2):
            hand: Hand = found.data
            events = hand.read()
            for event in events or ():
                self._heed(hand, event)
            if events is None:
                self._bury(hand)
        for hand in self.busy:  # a process it had started may hold its output open
            if hand.process.poll() is not None and not self.poll.select(0):
                self._bury(hand)

    def _heed(self, hand: Hand, event: Event) -> None:
        node = self.plan.nodes[event["key"]]
        what = event["event"]
        if what in ("finished", "failed", "stopped"):
            hand.node = None
        if what == "finished":
            if event["made"]:
                self.made.append(node.label)
            for ends in self.left.values():
                ends.discard(node.key)
        elif what == "failed":
            self.failed[node.label] = event["message"]
            self.users = self.users and event.get("user", False)
            if self.device.takes(node):  # what went wrong there may stick to the process, its memory does
                self._bury(hand)
            if event.get("ends"):  # the next stage would meet the same full disk
                self.ready.clear()
        elif what == "stopped" and not self.signal:  # a batch system may signal the workers alone
            self._heard(signal.SIGTERM, None)
        self.watcher.event(node, event)

    def _bury(self, hand: Hand) -> None:
        node = hand.node
        self.poll.unregister(hand.outbox)
        self.hands.remove(hand)
        hand.end()
        if node and self.asked >= 2:
            self.watcher.event(node, {"event": "stopped", "key": node.key})
        elif node:
            why = "its worker died (killed, or out of memory?); run the same command again to go on from its last checkpoint"
            log = self.store.root / "work" / node.key / "log.txt"
            self.failed[node.label] = why
            self.users = False
            with suppress(OSError):
                self.store.event("stage died", key=node.key, stage=node.label, exit=hand.process.returncode)
            event = {"event": "died", "key": node.key, "message": why}
            self.watcher.event(node, {**event, "log": str(log)} if log.exists() and log.stat().st_size else event)

    # --- being stopped ---

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {}
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(each) is not signal.SIG_IGN:  # nohup stays nohup
                old[each] = signal.signal(each, self._heard)
        try:
            yield
        finally:
            for each, handler in old.items():
                signal.signal(each, handler)

    def _heard(self, number: int, frame: Any) -> None:
        self.signal = self.signal or number
        self.asked += 1
        if number == signal.SIGHUP:
            _leave_terminal()

    def _obey(self) -> None:
        """Passes on what the signals asked for; outside the handler, which may interrupt a message half-way."""
        if self.asked >= 1 and not self.told:
            self.told = True
            for hand in self.hands:
                hand.send({"do": "stop"})
            self.watcher.say("stopping: each running stage writes a checkpoint at its next step (once more to stop at once)")
        if self.asked >= 2:
            for hand in self.busy:
                with suppress(ProcessLookupError, PermissionError):  # it has ended by itself
                    os.killpg(hand.process.pid, signal.SIGKILL)


def _leave_terminal() -> None:
    """Sends what goes to a terminal that has been closed to nowhere: writing there fails, and the stages are still to stop."""
    for out in (1, 2):
        try:
            termios.tcgetattr(out)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, out)
                os.close(nowhere)


def _homes(plan: Plan) -> dict[str, int]:
    """For each key, the first goals that hold it."""
    homes: dict[str, int] = {}
    for n, one in enumerate(plan.goals):
        for stage in order(at.of for at in all_goals(one)):
            homes.setdefault(key(stage), n)
    return homes
