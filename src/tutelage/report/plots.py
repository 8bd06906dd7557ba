"""Small plots as inline SVG, drawn by matplotlib: lines over steps, and dots with intervals.

Colours are the style sheet's variables (report.css), so that one drawing serves light and dark pages; text is set in the
page's font. The same numbers give the same text. Leaves out: interaction, and legends, which are the page's HTML.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

STYLE = Path(__file__).with_name("report.css")
SERIES = ("blue", "orange", "green", "pink", "ink", "sky", "red", "gold")
"""Colours of series; further ones take the same again, dashed."""
ROLES = {"after": "blue", "teacher": "orange", "other": "orange", "control": "pink"}
"""Colours of a checkpoint's part in the table; any other is grey."""
VARIABLES = (*SERIES, "grey", "soft", "rule", "card")
STAND_INS = {name: f"#fe00{i:02x}" for i, name in enumerate(VARIABLES)}
"""What matplotlib is told in place of a variable, which it does not know."""
PALE = 0.5
SETTINGS = {
    **{"svg.fonttype": "none", "text.parse_math": False, "font.size": 10.5, "axes.axisbelow": True},
    **{"xtick.bottom": False, "xtick.major.size": 0, "ytick.left": False, "ytick.major.size": 0, "ytick.major.pad": 7},
    **{"grid.color": STAND_INS["rule"], "xtick.labelcolor": STAND_INS["soft"], "ytick.labelcolor": STAND_INS["soft"]},
}


@dataclass(frozen=True)
class Line:
    """One series: ``colour`` is its index among the plot's names, shared by replicate seeds."""

    name: str
    colour: int
    points: list[tuple[float, float]]
    bold: bool = False
    faint: bool = False
    dashed: bool = False
    pale: bool = False
    """Under a dashed line of the same colour, which would be lost on it."""


@dataclass(frozen=True)
class Dot:
    """One measured checkpoint: its mean, interval and every seed's mean, in [0, 1] or the score's unit."""

    name: str
    style: str
    mean: float
    low: float
    high: float
    seeds: list[float] = field(default_factory=list)


def stroke(index: int, dashed: bool = False, pale: bool = False) -> str:
    """A series' colour as CSS."""
    dash = ";stroke-dasharray:4 3" if dashed or index >= len(SERIES) else ""
    return f"stroke:var(--{SERIES[index % len(SERIES)]}){dash}" + (f";stroke-opacity:{PALE}" if pale else "")


def lines(title: str, series: Sequence[Line], unit: str = "step") -> str:
    """A line plot, 320 × 190. Empty where no series has a point."""
    from matplotlib.style import context

    drawn = sorted((s for s in series if s.points), key=lambda each: each.bold)
    if not drawn:
        return ""
    with context(["default", SETTINGS]):
        axes = _axes("y", 320, 190, left=44, right=10, top=8, bottom=32)
        for i, line in enumerate(drawn):
            width, alpha = (1.9, PALE if line.pale else 1.0) if line.bold else (0.8, 0.4) if line.faint else (1.2, 0.9)
            colour = STAND_INS[SERIES[line.colour % len(SERIES)]]
            dash = (0, (4, 3)) if line.dashed or line.colour >= len(SERIES) else "-"
            (made,) = axes.plot(*zip(*line.points, strict=True), color=colour, linestyle=dash, linewidth=width, alpha=alpha)
            made.set(gid=f"title{i}", clip_on=False, marker="" if line.points[1:] else "o", ms=5, mfc="none")
        axes.set_xlim(min(0.0, axes.dataLim.x0), max(axes.dataLim.x1, 1.0))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.text(1, -0.19, unit, transform=axes.transAxes, color=STAND_INS["soft"], ha="right")
        said = f"{title} over {unit}: " + ", ".join(dict.fromkeys(s.name for s in series if s.points))
        return svg(axes.figure, said, [line.name for line in drawn])


def dots(title: str, rows: Sequence[Dot], top: float = 1.0) -> str:
    """Dots with intervals, one row a checkpoint, on a scale from 0 to ``top``; small marks are seeds."""
    from matplotlib.style import context

    with context(["default", SETTINGS]):
        axes = _axes("x", 264, 24 + 19 * len(rows), left=124, right=12, top=4, bottom=20)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        axes.set(xlim=(min(0.0, *(r.low for r in rows)), top), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [r.name if len(r.name) <= 18 else f"{r.name[:17]}…" for r in rows])
        for i, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
            control, other, colour = row.style == "control", row.style == "other", STAND_INS[ROLES.get(row.style, "grey")]
            label.set(size=12, color=STAND_INS["soft" if other else "ink"], style="italic" if control else "normal")
            label.set_weight("bold" if row.style == "after" else "normal")
            (made,) = axes.plot([row.low, row.mean, row.high], [i] * 3, "o-", color=colour, markevery=[1], linewidth=2)
            made.set(markersize=6, markeredgewidth=1.8, markerfacecolor=STAND_INS["card"] if control else colour)
            seeds = row.seeds if len(row.seeds) > 1 else []
            marks = axes.plot(seeds, [i] * len(seeds), "|", color=colour, markersize=12, zorder=1.9)
            for each in (made, *marks):
                each.set(gid=f"title{i}", clip_on=False, alpha=0.5 if other else None)
        titles = [f"{r.name}: {100 * r.mean:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})" for r in rows]
        return svg(axes.figure, f"{title}: " + "; ".join(f"{r.name} {100 * r.mean:.1f} %" for r in rows), titles)


def _axes(grid: Literal["x", "y"], width: float, height: float, left: float, right: float, top: float, bottom: float) -> Any:
    """Axes without frame or background, with these margins in pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), frameon=False)
    axes = figure.add_subplot(frameon=False)
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    axes.grid(axis=grid, clip_on=False)
    axes.locator_params(nbins=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda at, _: (f"{at / 1000:g}k" if abs(at) >= 10_000 else f"{at:.4g}").replace("-", "−"))
    return axes


def light() -> dict[str, str]:
    """The style sheet's colours on a light page, for files that follow no reader's theme."""
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", STYLE.read_text("utf-8").partition("}")[0]))


def svg(figure: Any, said: str, titles: list[str]) -> str:
    """The figure as an ``<svg>`` that can stand beside others in a page; ``titles`` are for artists called title0, ..."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": said}), warnings.catch_warnings(action="ignore"):  # letters that its font lacks
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue().partition("</defs>")[2].rpartition("</svg>")[0]  # the first defs would style the whole page

    def tag(found: re.Match[str]) -> str:
        surplus = r'(?<=\.\d)\d+| ?font-family: [^;"]*;| transform="rotate\(-?0 [^"]*"|xlink:(?=href)'
        short = re.sub(surplus, "", " ".join(found[0].split()))  # a tenth of a pixel is enough
        short = re.sub(r"#fe00([0-9a-f]{2})", lambda hexed: f"var(--{VARIABLES[int(hexed[1], 16)]})", short)
        named = re.fullmatch(r'<g id="(?:title(\d+)|[^"]*)">', short)
        return short if not named else f"<g><title>{escape(titles[int(named[1])])}</title>" if named[1] else "<g>"

    text = re.sub(r">\s+<", "><", re.sub(r"<[^>]+>", tag, text)).strip()
    size = "{:.0f} {:.0f}".format(*72 * figure.get_size_inches())
    return f'<svg class="plot" viewBox="0 0 {size}" role="img" aria-label="{escape(said)}">{text}</svg>'
