"""How a run looks while it goes: live bars on a terminal, plain lines elsewhere.

Each running stage has one line: its name, a bar, step of total, whatever numbers it shows, tokens a second and the time left;
below them the run as a whole. Off a terminal a stage speaks when it starts and ends, and at most once in ten seconds between.
Leaves out: metrics kept for later (context.py writes them), and anything after the run (report/).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tutelage.estimate import Estimator, human_time, si, span
from tutelage.graph import Node, Plan

PLAIN_EVERY = 10.0
WINDOW = 30.0
"""Seconds over which tokens a second are averaged."""


@dataclass
class Lane:
    """One running stage."""

    node: Node
    began: float = field(default_factory=lambda: time.monotonic())
    first: int | None = None
    """The step of the first progress seen: a resumed stage does not start at 0."""
    step: int = 0
    total: int = 0
    shown: dict[str, Any] = field(default_factory=dict)
    waiting: bool = False
    spoke: float = field(default_factory=lambda: time.monotonic())
    _tokens: deque[tuple[float, int]] = field(default_factory=deque)
    _since: float = 0.0

    def update(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._since = event["step"], now
        self.step, self.total, self.shown = event["step"], event["total"], event["shown"]
        self._tokens.append((now, event.get("tokens", 0)))
        while now - self._tokens[0][0] > WINDOW and len(self._tokens) > 2:
            self._tokens.popleft()

    @property
    def share(self) -> float:
        return self.step / self.total if self.total else 0.0

    @property
    def rate(self) -> float:
        """Tokens a second of late."""
        if len(self._tokens) < 2:
            return 0.0
        (t0, n0), (t1, n1) = self._tokens[0], self._tokens[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds left by the pace since the first step seen; None before there is one."""
        if self.first is None or self.step <= self.first:
            return None
        pace = (time.monotonic() - self._since) / (self.step - self.first)
        return pace * (self.total - self.step)

    @property
    def speed(self) -> str:
        return f"{si(self.rate).replace(' ', '')} tok/s" if self.rate >= 1 else ""

    def numbers(self, most: int = 99) -> str:
        return "  ".join(f"{k} {number(v)}" for k, v in list(self.shown.items())[:most])


def number(value: Any) -> str:
    """A shown value, short."""
    if isinstance(value, float):
        return f"{value:.3g}" if value == value and abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def clock(seconds: float | None) -> str:
    """``1:05`` left, or nothing."""
    if seconds is None:
        return ""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Progress:
    """What both looks share: lanes, counts and the time left. A `tutelage.run.Watcher`."""

    cross = ""

    def __init__(self, plan: Plan, estimator: Estimator, cores: int, console: Console):
        self.estimator, self.cores, self.console = estimator, cores, console
        self.left = {n.key: n for n in plan.todo}
        self.total = len(self.left)
        self.began = time.monotonic()
        self.lanes: dict[str, Lane] = {}
        self.failed = 0

    def event(self, node: Node, event: dict[str, Any]) -> None:
        what = event["event"]
        lane = self.lanes.get(node.key)
        if what == "progress":
            if lane:
                lane.update(event)
                self.moved(lane)
            return
        if what == "waiting":
            self.say(f"{node.label}: waits for {event['holder']}, which is making it")
            if event["still"]:
                still = human_time(event["still"])
                self.say(f"  it has shown no sign of life for {still}; is it stopped? continue it or kill it")
        elif what in ("started", "resumed"):
            self.lanes[node.key] = Lane(node)
            self.started(node, f"goes on from step {event['step']}" if what == "resumed" else "starts")
        else:
            self.lanes.pop(node.key, None)
            if what == "finished":
                self._finished(node, event, lane)
            elif what == "stopped":
                self.say(f"{node.label} stopped")
            else:
                self.failed += 1
                self._failed(node, event)

    def _finished(self, node: Node, event: dict[str, Any], lane: Lane | None) -> None:
        self.left.pop(node.key, None)
        if not event["made"]:
            self.say(f"{node.label}: made by another process meanwhile")
            return
        stage = node.stage
        self.estimator.observe(stage.kind(), stage.name, node.flops, stage.threads, event["seconds"])
        self.ended(node, human_time(event["seconds"]), lane.numbers() if lane else "")

    def _failed(self, node: Node, event: dict[str, Any]) -> None:
        log = f" (log: {event['log']})" if event.get("log") else ""
        print(f"{self.cross}stage {node.label!r} failed: {event['message']}{log}", file=sys.stderr, flush=True)

    def time_left(self) -> float | None:
        """By each running stage's own pace where it has one, else by its estimate."""
        if not self.left:
            return 0.0

        def seconds(node: Node) -> float:
            lane = self.lanes.get(node.key)
            own = lane.remaining if lane else None
            if own is not None:
                return own
            gone = time.monotonic() - lane.began if lane else 0.0
            return max(self.estimator.seconds(node) - gone, 0.0)

        return span(list(self.left.values()), seconds, self.cores, self.estimator.device)

    def overall(self) -> str:
        done = self.total - len(self.left)
        text = f"{done}/{self.total} stages · {clock(time.monotonic() - self.began)} gone"
        left = self.time_left()
        return f"{text} · ≈ {human_time(left)} left" if left else text

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def moved(self, lane: Lane) -> None: ...
    def started(self, node: Node, how: str) -> None: ...
    def ended(self, node: Node, took: str, numbers: str) -> None: ...
    def tick(self) -> None: ...
    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None: ...


class Lines(Progress):
    """Plain lines, for logs and pipes."""

    def started(self, node: Node, how: str) -> None:
        self.say(f"{node.label} {how}")

    def moved(self, lane: Lane) -> None:
        now = time.monotonic()
        if now - lane.spoke < PLAIN_EVERY:
            return
        lane.spoke = now
        left = lane.remaining
        parts = [f"{lane.step}/{lane.total}", lane.numbers(), lane.speed, f"{human_time(left)} left" if left else ""]
        self.say(f"{lane.node.label} {'  '.join(p for p in parts if p)}")

    def ended(self, node: Node, took: str, numbers: str) -> None:
        self.say(f"{node.label} done in {took}{'  ' if numbers else ''}{numbers}  [{self.overall()}]")


class Bars(Progress):
    """Live bars; what has ended scrolls up as a line."""

    cross = "✗ "

    def __init__(self, plan: Plan, estimator: Estimator, cores: int, console: Console):
        super().__init__(plan, estimator, cores, console)
        self.wide = max((len(n.label) for n in plan.todo), default=5)
        self._live = Live(self, console=console, refresh_per_second=4, transient=True)
        self._overall, self._asked = "", 0.0

    def __enter__(self) -> Progress:
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.stop()

    def started(self, node: Node, how: str) -> None:
        if how != "starts":
            self.say(f"{node.label} {how}")

    def ended(self, node: Node, took: str, numbers: str) -> None:
        line = Text.assemble(("✓ ", "green"), (self._name(node.label, 99), "bold"), f"  {took:>8}", (f"  {numbers}", "dim"))
        self.console.print(line, no_wrap=True, overflow="ellipsis")

    def tick(self) -> None:
        """The overall line, at most once a second: it simulates the rest of the run."""
        if time.monotonic() - self._asked >= 1:
            self._overall, self._asked = self.overall(), time.monotonic()

    def _name(self, label: str, most: int) -> str:
        wide = min(self.wide, most)
        return label.ljust(wide) if len(label) <= wide else label[: wide - 1] + "…"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, 1))
        room = options.max_width
        for lane in list(self.lanes.values()):
            table.add_row(*self._cells(lane, room))
        yield table
        yield Text(self._overall or self.overall(), style="dim", no_wrap=True, overflow="ellipsis")

    def _cells(self, lane: Lane, room: int) -> Iterator[Text]:
        """name, bar, steps, time left, speed, numbers: what does not fit falls away from the right."""
        name = self._name(lane.node.label, max(12, room // 4))
        bar = 10 if room < 100 else 20
        full = round(bar * lane.share)
        steps = f"{lane.step}/{lane.total}" if lane.total else f"{clock(time.monotonic() - lane.began)} gone"
        cells = [
            Text(name, style="bold", no_wrap=True),
            Text.assemble(("━" * full, "green"), ("─" * (bar - full), "bright_black")),
            Text(f"{steps:>9}", no_wrap=True),
            Text(f"{clock(lane.remaining):>5}", style="cyan", no_wrap=True),
            Text(f"{lane.speed:>10}", style="dim", no_wrap=True),
        ]
        left = room - sum(c.cell_len + 1 for c in cells) - 1
        most = len(lane.shown)
        while most and len(lane.numbers(most)) > left:
            most -= 1
        yield from cells
        yield Text(f" {lane.numbers(most)}", no_wrap=True)


def watch(plan: Plan, estimator: Estimator, cores: int, console: Console, plain: bool) -> Progress:
    """Bars on a terminal, else lines."""
    look = Lines if plain or not console.is_terminal else Bars
    return look(plan, estimator, cores, console)
