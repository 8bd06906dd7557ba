"""What a plan will cost: seconds by stage from measured rates, which stage goes first, and how long the whole takes.

A rate is *estimated* FLOPs over seconds of stages made before, so that an estimate that is off by a factor for a kind of
stage still predicts its time. Stages of the same kind and name count first, then of the same kind, then a stated default.
Leaves out: memory, transfers, and the seconds a worker takes to import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from statistics import median

from tutelage.device import CPU, Device
from tutelage.graph import Node, Plan
from tutelage.index import summaries
from tutelage.store import Store

DEFAULT_RATE = 20e9
"""FLOP/s of one CPU thread where nothing has been measured: small models, far below a core's peak."""


class Estimator:
    """Seconds by stage, from what the store has measured on this device and from what a run observes."""

    def __init__(self, store: Store | None = None, device: Device = CPU):
        self.device = device
        self._rates: dict[tuple[str, str], list[float]] = {}
        self._times: dict[tuple[str, str], list[float]] = {}
        for made in summaries(store).values() if store else ():
            flops = made.estimate or made.flops
            if not made.damaged and (made.device == device.name or not flops):
                self.observe(made.kind, made.name, flops, made.threads, made.seconds)

    def observe(self, kind: str, name: str, flops: float, threads: int, seconds: float) -> None:
        """Learns from a stage that has ended."""
        if seconds <= 0:
            return
        for spot in ((kind, name), (kind, "")):
            if flops > 0:
                self._rates.setdefault(spot, []).append(flops / seconds / threads)
            else:
                self._times.setdefault(spot, []).append(seconds)

    def measured(self, node: Node) -> bool:
        """Whether a stage of this kind has been timed here, or is not worth timing."""
        kind = node.stage.kind()
        return node.flops <= 0 or (kind, "") in self._rates

    def seconds(self, node: Node) -> float:
        kind, name = node.stage.kind(), node.stage.name
        if node.flops <= 0:
            found = self._times.get((kind, name)) or self._times.get((kind, ""))
            return median(found) if found else 0.0
        rates = self._rates.get((kind, name)) or self._rates.get((kind, ""))
        return node.flops / (median(rates) if rates else DEFAULT_RATE) / node.stage.threads


def waits(nodes: Iterable[Node]) -> dict[str, set[str]]:
    """For each of the nodes, which others of them it waits for."""
    nodes = list(nodes)
    mine = {n.key for n in nodes}
    return {n.key: {k for _, k, _, _ in n.inputs if k in mine} for n in nodes}


def priorities(nodes: list[Node], weight: Callable[[Node], float]) -> dict[str, float]:
    """The longest way from each node to an end, itself included; ``nodes`` in running order. The longest goes first."""
    longest = {n.key: 0.0 for n in nodes}
    for node in reversed(nodes):
        longest[node.key] += weight(node) + 1e-9
        for _, k, _, _ in node.inputs:
            if k in longest:
                longest[k] = max(longest[k], longest[node.key])
    return longest


def slots(node: Node, cores: int) -> int:
    """The cores a stage takes: its threads, or all there are."""
    return min(node.stage.threads, cores)


def span(nodes: list[Node], seconds: Callable[[Node], float], cores: int, device: Device = CPU) -> float:
    """Seconds until all nodes are made on so many cores and a device, scheduled as the runner does."""
    first = priorities(nodes, seconds)
    left, by_key = waits(nodes), {n.key: n for n in nodes}
    below: dict[str, list[str]] = {k: [] for k in left}
    for k, before in left.items():
        for each in before:
            below[each].append(k)
    rank = {k: (-first[k], n) for n, k in enumerate(left)}
    ready = [(rank[k], k) for k in left if not left[k]]
    heapify(ready)
    running: list[tuple[float, str]] = []
    now, free, seats = 0.0, cores, device.stages
    waiting: list[tuple[tuple[float, int], str]] = []  # for the device
    while ready or running:
        while ready:
            node = by_key[ready[0][1]]
            if device.takes(node) and seats < 1:
                waiting.append(heappop(ready))
                continue
            if slots(node, cores) > free:
                break
            heappop(ready)
            free, seats = free - slots(node, cores), seats - device.takes(node)
            heappush(running, (now + seconds(node), node.key))
        now, done = heappop(running)
        free, seats = free + slots(by_key[done], cores), seats + device.takes(by_key[done])
        while waiting and seats:
            heappush(ready, waiting.pop())
        for k in below[done]:
            left[k].discard(done)
            if not left[k]:
                heappush(ready, (rank[k], k))
    return now


def summary(plan: Plan, estimator: Estimator, cores: int) -> str:
    """One sentence: what a run will cost."""
    todo, stored = plan.todo, sum(n.status == "stored" for n in plan.nodes.values())
    if not todo:
        return f"nothing to run: {count(stored, 'stage')} stored"
    flops = sum(n.flops for n in todo)
    time = human_time(span(todo, estimator.seconds, cores, estimator.device))
    costly = [n for n in todo if n.flops > 0]
    unknown = sum(not estimator.measured(n) for n in costly)
    known = "measured here" if not unknown else "no measurement here yet"
    if 0 < unknown < len(costly):
        known = f"{unknown} of them not measured here yet"
    cost = f"about {si(flops)}FLOP, ≈ {time} on {count(cores, 'core')}"
    return f"{count(len(todo), 'stage')} to run, {stored} stored; {cost} ({known})"


# --- numbers as text ---------------------------------------------------------------------------------------------------


def count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def si(value: float) -> str:
    """``3.2 T`` for 3.2e12; a unit may follow at once."""
    for scale, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            short = value / scale
            return f"{short:.0f} {letter}" if short >= 10 else f"{short:.1f} {letter}"
    return f"{value:.0f} "


def human_time(seconds: float) -> str:
    """``45 s``, ``3.4 min``, ``2.1 h``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 or seconds == 0 else f"{max(seconds, 0.1):.1f} s"
    if seconds < 3570:
        return f"{seconds / 60:.1f} min" if seconds < 570 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86400 else f"{seconds / 86400:.1f} days"
