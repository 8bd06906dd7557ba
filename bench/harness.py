"""How the benches measure: interleaved rounds, medians with min and max, CPU seconds beside wall, and the machine they ran
on.

Two sides are timed in turns, so that a neighbour's load falls on both; a pair's ratio is that of the medians, and its
range that of the ratios round by round. Before anything is timed the two sides have to be *equal*: loss within 1e-5 and
gradients within 1e-4, relative, in fp32, or the bench ends with `Unequal`.

Leaves out: devices other than the processor, which the library does not use yet.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LOSS, GRADIENT = 1e-5, 1e-4
"""Relative bounds within which two sides are equal."""
BUSY = 0.3
"""Runnable processes a core beside ours from which on a machine counts as loaded."""


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
class Run:
    """What the suite was asked for; handed to every bench."""

    dtype: str = "float32"
    rounds: int = 5
    quick: bool = False
    """small sizes, to see that everything runs; the numbers mean nothing"""
    folder: Path = Path("bench")
    why: str = ""
    """what a record has to say of the dtype"""
    details: dict[str, Any] = field(default_factory=dict)
    """tables for the page: title -> rows of columns"""


@dataclass
class Timing:
    """Seconds of every side, round by round."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def best(self, ours: str) -> str:
        """The fastest peer, by its median."""
        return min((n for n in self.wall if n != ours), key=lambda n: statistics.median(self.wall[n]))

    def ratio(self, ours: str) -> tuple[float, float, float]:
        """(ratio of medians, least, largest) of the best peer's wall time over ours."""
        mine, theirs = self.wall[ours], self.wall[self.best(ours)]
        rounds = [t / m for m, t in zip(mine, theirs, strict=True)]
        return statistics.median(theirs) / statistics.median(mine), min(rounds), max(rounds)

    def rows(self) -> list[dict[str, Any]]:
        """One row a side: medians, min and max of wall, median of CPU seconds."""
        found = []
        for name, wall in self.wall.items():
            row = {"side": name, "wall s": statistics.median(wall), "min": min(wall), "max": max(wall)}
            found.append({**row, "cpu s": statistics.median(self.cpu[name])})
        return found


def interleave(sides: Mapping[str, Callable[[], Any]], rounds: int) -> Timing:
    """Runs every side once unseen, then all of them in turns."""
    timing = Timing({n: [] for n in sides}, {n: [] for n in sides})
    for round in range(-1, rounds):
        for name, call in sides.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if round >= 0:
                timing.wall[name].append(time.perf_counter() - wall)
                timing.cpu[name].append(time.process_time() - cpu)
    return timing


def compared(run: Run, name: str, target: float, sides: Mapping[str, Callable[[], Any]], note: str = "") -> Record:
    """Times the sides, of which the first is ours, and writes their table."""
    ours = next(iter(sides))
    timing = interleave(sides, run.rounds)
    run.details[name] = timing.rows()
    ratio, low, high = timing.ratio(ours)
    said = "; ".join(x for x in (f"against {timing.best(ours)}", note, run.why) if x)
    return Record(name, ratio, low, high, target, "x", said)


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


# --- the machine -----------------------------------------------------------------------------------------------------------


def peak(dtype: str, seconds: float = 0.5, size: int = 1024) -> float:
    """The best matmul seen, in GFLOP/s; ``size`` shrinks where the dtype is too slow for it."""
    import torch

    kind = getattr(torch, dtype)
    probe = torch.ones(128, 128, dtype=kind)
    began = time.perf_counter()
    probe @ probe
    if time.perf_counter() - began > 0.01:
        size = 128
    a, b = (torch.randn(size, size).to(kind) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def choose_dtype(asked: str, peaks: Mapping[str, float]) -> tuple[str, str]:
    """(the dtype to run, what records say of it): bf16 only where this processor multiplies it faster than fp32."""
    if asked == "bfloat16" and peaks["bfloat16"] < peaks["float32"]:
        said = f"fp32 on both sides: bf16 matmuls reach {peaks['bfloat16']:.0f} GFLOP/s here, fp32 {peaks['float32']:.0f}"
        return "float32", said
    return asked, "bf16 on both sides" if asked == "bfloat16" else "fp32 on both sides"


def machine() -> dict[str, Any]:
    """Processor, cores, threads, load and versions."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    has = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    cores = os.cpu_count() or 1
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "instructions": " ".join(has),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load a core": round(os.getloadavg()[0] / cores, 2),
        "python": platform.python_version(),
        **{n: installed(n) for n in ("torch", "transformers", "trl", "peft", "llama-cpp-python")},
    }


def loaded(facts: Mapping[str, Any]) -> bool:
    """Whether others were at work when the suite began, so that its numbers are to be taken again."""
    return bool(facts["load a core"] > BUSY)


def shares(values: Sequence[int]) -> dict[str, float]:
    """What a table says of lengths."""
    ordered = sorted(values)
    at = lambda q: float(ordered[min(len(ordered) - 1, int(q * len(ordered)))])  # noqa: E731
    return {
        "n": len(ordered),
        "mean": sum(ordered) / len(ordered),
        "p10": at(0.1),
        "p50": at(0.5),
        "p90": at(0.9),
        "max": ordered[-1],
    }


def as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [asdict(r) for r in records]
