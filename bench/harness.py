"""How the benches measure: interleaved rounds, medians with min and max, CPU seconds, memory and the share of the peak beside
wall.

Two sides are timed in turns, so that a neighbour's load falls on both; a pair's ratio is that of the medians, and its
range that of the ratios round by round. Before anything is timed the two sides have to be *equal*: loss within 1e-5 and
gradients within 1e-4, relative, in fp32, or the bench ends with `Unequal`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import most_memory, reset_memory, settle
from bench.work import Work

LOSS, GRADIENT = 1e-5, 1e-4
"""Relative bounds within which two sides are equal."""


class Unequal(Exception):
    """Two sides that are compared do not compute the same."""


@dataclass
class Record:
    """One line of results.json. ``ratio`` is None where the bench could not run; ``note`` says why."""

    name: str
    ratio: float | None
    low: float | None
    high: float | None
    target: float | None
    unit: str
    """``x`` (peer's time over ours, more is better), ``of peer`` (ours over the peer's, less is better) or ``s``"""
    note: str = ""


@dataclass
class Timing:
    """Seconds of every side, round by round."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    memory: dict[str, float] = field(default_factory=dict)
    """MiB that a side's first call took over what stood before it, where that can be told: activations, gradients, caches,
    the optimizer's memory, and no weights"""

    def best(self, ours: str, aside: Sequence[str] = ()) -> str:
        """The fastest peer, by its median; those ``aside`` are none."""
        return min((n for n in self.wall if n not in (ours, *aside)), key=lambda n: statistics.median(self.wall[n]))

    def ratio(self, ours: str, peer: str) -> tuple[float, float, float]:
        """(ratio of medians, least, largest) of a peer's wall time over ours."""
        mine, theirs = self.wall[ours], self.wall[peer]
        rounds = [t / m for m, t in zip(mine, theirs, strict=True)]
        return statistics.median(theirs) / statistics.median(mine), min(rounds), max(rounds)

    def rows(self, work: Work | None = None, peak: float = 0.0) -> list[dict[str, Any]]:
        """One row a side: medians, min and max of wall, median of CPU seconds, tokens a second, share of the peak [GFLOP/s],
        memory."""
        found = []
        for name, wall in self.wall.items():
            middle = statistics.median(wall)
            row = {
                "side": name,
                "wall s": middle,
                "min": min(wall),
                "max": max(wall),
                "cpu s": statistics.median(self.cpu[name]),
            }
            if work:
                row |= {"tokens/s": work.tokens / middle, "of peak": work.flops / middle / peak / 1e9}
            found.append(row | ({"MiB": self.memory[name]} if name in self.memory else {}))
        return found


def interleave(sides: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> Timing:
    """Runs every side once untimed, watching its memory, then all of them in turns."""
    timing = Timing({n: [] for n in sides}, {n: [] for n in sides})
    for name, call in sides.items():
        before = reset_memory(device)
        call()
        settle(device)
        if before is not None:
            timing.memory[name] = most_memory(device) - before
    for _ in range(rounds):
        for name, call in sides.items():
            gc.collect()
            settle(device)
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            settle(device)
            timing.wall[name].append(time.perf_counter() - wall)
            timing.cpu[name].append(time.process_time() - cpu)
    return timing


@dataclass
class Run:
    """What the suite was asked for; handed to every bench."""

    dtype: str = "float32"
    rounds: int = 5
    device: str = "cpu"
    peak: float = 1.0
    """of the dtype, measured with as many threads as the benches have [GFLOP/s]"""
    quick: bool = False
    """small sizes, to see that everything runs; the numbers mean nothing"""
    folder: Path = Path("bench")
    why: str = ""
    """what a record has to say of the dtype"""
    details: dict[str, Any] = field(default_factory=dict)
    """tables for the page: title -> rows of columns"""
    interleave: Callable[[Mapping[str, Callable[[], Any]], int, str], Timing] = interleave
    """how sides are run; profile.py looks at them in another way"""


def compared(
    run: Run,
    name: str,
    target: float | None,
    sides: Mapping[str, Callable[[], Any]],
    work: Work,
    note: str = "",
    aside: Sequence[str] = (),
) -> Record:
    """Times the sides, of which the first is ours, and writes their table. The ratio is to the fastest peer at our precision;
    sides ``aside`` are of another one: where they are faster, the note has their ratio."""
    ours = next(iter(sides))
    timing = run.interleave(sides, run.rounds, run.device)
    run.details[name] = timing.rows(work, run.peak)
    if len(set(work.lengths)) > 1:
        run.details[f"{name}: lengths of replies"] = [shares(work.lengths)]
    best = timing.best(ours, aside)
    ratio, low, high = timing.ratio(ours, best)
    others = [f"{n} {r:.2f}" for n in aside if (r := timing.ratio(ours, n)[0]) < ratio]
    said = [f"against {best}", note, run.why, f"faster at another precision: {', '.join(others)}" if others else ""]
    return Record(name, ratio, low, high, target, "x", "; ".join(filter(None, said)))


def worst(name: str, found: list[Record]) -> Record:
    """The shape on which we do least well, with the others in its note."""
    least = min(found, key=lambda r: r.ratio or 0.0)
    others = "; ".join(f"{r.name.partition(', ')[2]} {r.ratio:.2f}" for r in found if r is not least)
    said = f"{least.name.partition(', ')[2]} {least.note}" + (f"; others: {others}" if others else "")
    return Record(name, least.ratio, least.low, least.high, least.target, least.unit, said)


# --- equality --------------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Any]:
    """name -> gradient in float64, a copy"""
    return {n: p.grad.detach().double().clone() for n, p in model.named_parameters() if p.grad is not None}


def prove(what: str, ours: tuple[float, Mapping[str, Any]], theirs: tuple[float, Mapping[str, Any]]) -> tuple[float, float]:
    """Relative distance of two losses and of two sets of gradients (all tensors as one vector); raises `Unequal`."""
    (a, mine), (b, other) = ours, theirs
    if mine.keys() != other.keys():
        raise Unequal(f"{what}: gradients of {sorted(mine.keys() ^ other.keys())[:3]} are on one side only")
    loss = abs(a - b) / max(1.0, abs(b))
    apart = sum(float((mine[n] - other[n]).square().sum()) for n in mine)
    whole = sum(float(g.square().sum()) for g in other.values())
    gradient = (apart / whole) ** 0.5 if whole else float("inf")
    if not (loss <= LOSS and gradient <= GRADIENT):
        raise Unequal(f"{what}: losses {a:.8g} and {b:.8g}, gradients {gradient:.2g} apart; nothing was timed")
    return loss, gradient


def shares(values: Sequence[int]) -> dict[str, float]:
    """What a table says of lengths."""
    ordered = sorted(values)
    at = lambda q: float(ordered[min(len(ordered) - 1, int(q * len(ordered)))])  # noqa: E731
    return {
        "n": len(ordered),
        "min": ordered[0],
        "mean": sum(ordered) / len(ordered),
        "p10": at(0.1),
        "p50": at(0.5),
        "p90": at(0.9),
        "max": ordered[-1],
    }


def as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [asdict(r) for r in records]
