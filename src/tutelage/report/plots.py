"""Small plots as inline SVG: lines over steps, and dots with intervals. Made by hand: a plot is a few hundred bytes.

Colours are CSS classes (``s0`` ... ``s7``, ``before``, ``after``, ...: report.css), so that one drawing serves light and
dark pages; text is set in the page's font. Leaves out: anything interactive, logarithmic axes, legends (the page's HTML).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = 8
"""Classes ``s0`` ... that the style sheet knows; further series take the same colours, dashed."""


@dataclass(frozen=True)
class Line:
    """One series: ``colour`` is its index among the plot's names, shared by replicate seeds."""

    name: str
    colour: int
    points: list[tuple[float, float]]
    bold: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Dot:
    """One measured checkpoint: its mean, interval and every seed's mean, in [0, 1] or the score's unit."""

    name: str
    style: str
    mean: float
    low: float
    high: float
    seeds: list[float] = field(default_factory=list)


def colour_class(index: int) -> str:
    return f"s{index % COLOURS}" + (" dashed" if index >= COLOURS else "")


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that cover [low, high], about so many."""
    if not high > low:
        low, high = low - (abs(low) * 0.1 or 0.5), low + (abs(low) * 0.1 or 0.5)
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: 12k, 0.25, 3e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def lines(title: str, series: Sequence[Line], unit: str = "step") -> str:
    """A line plot, 320 × 190. Empty where no series has a point."""
    series = [s for s in series if s.points]
    if not series:
        return ""
    left, right, top, bottom = 44.0, 310.0, 8.0, 160.0
    xs, ys = [x for s in series for x, _ in s.points], [y for s in series for _, y in s.points]
    x_ticks, y_ticks = ticks(min(0, *xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = x_ticks[0], x_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = []
    for y in y_ticks:
        height = at(x_low, y)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{height + 3.5:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        across = at(x, y_ticks[0])[0]
        parts.append(f'<text class="tick" x="{across:.1f}" y="{bottom + 14}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text class="tick" x="{right}" y="{bottom + 27}" text-anchor="end">{escape(unit)}</text>')
    for line in sorted(series, key=lambda each: each.bold):
        style = f"{colour_class(line.colour)}{' bold' * line.bold}{' faint' * line.faint}"
        drawn = [at(x, y) for x, y in line.points]
        if len(drawn) == 1:
            parts.append(f'<circle class="dot {style}" cx="{drawn[0][0]:.1f}" cy="{drawn[0][1]:.1f}" r="2.5"/>')
            continue
        path, name = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn), escape(line.name)
        parts.append(f'<polyline class="line {style}" points="{path}"><title>{name}</title></polyline>')
    said = f"{title} over {unit}: " + ", ".join(dict.fromkeys(s.name for s in series))
    return f'<svg class="plot" viewBox="0 0 320 190" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def dots(title: str, rows: Sequence[Dot], top: float = 1.0) -> str:
    """Dots with intervals, one row a checkpoint, on a scale from 0 to ``top``; small marks are seeds."""
    left, right, row_height = 124.0, 252.0, 19.0
    scale = ticks(0.0, top)
    low = min(0.0, *(r.low for r in rows)) if rows else 0.0
    bottom = 6 + row_height * len(rows)

    def at(value: float) -> float:
        return left + (value - low) / (scale[-1] - low) * (right - left)

    parts = []
    for tick in scale:
        parts.append(f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="4" y2="{bottom}"/>')
        label = f"{100 * tick:g}"
        parts.append(f'<text class="tick" x="{at(tick):.1f}" y="{bottom + 13}" text-anchor="middle">{label}</text>')
    for i, row in enumerate(rows):
        y = 4 + row_height * (i + 0.5)
        name = escape(_short(row.name))
        parts.append(f'<text class="name {row.style}" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        said = f"{row.name}: {100 * row.mean:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
        marks = (
            "".join(f'<path class="seed" d="M{at(s):.1f} {y - 6:.1f}v12"/>' for s in row.seeds) if len(row.seeds) > 1 else ""
        )
        parts.append(
            f'<g class="mark {row.style}"><title>{escape(said)}</title>{marks}'
            f'<line x1="{at(row.low):.1f}" x2="{at(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{at(row.mean):.1f}" cy="{y:.1f}" r="3.6"/></g>'
        )
    said = f"{title}: " + "; ".join(f"{r.name} {100 * r.mean:.1f} %" for r in rows)
    height = bottom + 18
    return f'<svg class="plot" viewBox="0 0 264 {height:.0f}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def _short(text: str, length: int = 18) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
