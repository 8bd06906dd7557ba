"""The picture of methods: mean score against compute, in both ledgers.

Two panels of one height, compute on log scales: consolidation alone, and with the teachers. A marker is a method, its bar
the 95 % interval over tasks, the small dots its seeds; horizontal lines are the checkpoint before and the routed oracle.
Methods of about the same cost and score stand side by side. Names stand at the right, moved apart, each tied to its marker.
What costs next to nothing (an average of weights) stands at the left edge, as a log scale has no 0. Drawn by matplotlib: as
inline SVG in the style sheet's colours, or a file in the light ones.

Leaves out: trials, which are told in the table and count against no budget.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tutelage.report import graph, plots, terminal
from tutelage.report.read import JSON
from tutelage.spec import UserError

SUFFIXES = (".svg", ".png", ".pdf")
PANELS = (("consolidation", "consolidation alone"), ("with_teachers", "with the teachers"))
MARKERS = "osD^vPX<>"
NOTHING = 1e-3
"""Of the largest cost in a panel: less is drawn as nothing."""
LONGEST = 34
"""Characters of a name."""
BESIDE, APART = 5.0, 10.0
"""Points that a seed stands beside its method's bar where it cost as much; points between methods of equal cost and score."""
GAP = 15.0
"""Points between names."""


def draw(found: JSON) -> str:
    """The picture as inline SVG; empty where no method is measured and costed yet."""
    from matplotlib.style import context

    if not drawable(found):
        return ""
    with context(["default", plots.SETTINGS]):
        figure, titles = paint(found, plots.STAND_INS)
        return plots.svg(figure, f"Mean score against compute: {'; '.join(titles)}", titles)


def save(found: JSON, path: Path) -> None:
    """The picture as a file. Raises `UserError` where there is nothing to draw yet, and where it cannot write."""
    from matplotlib.style import context

    if not drawable(found):
        raise UserError("nothing to draw yet: no method is measured in every domain and made whole; see the table")
    files = {"savefig.dpi": 200, "svg.hashsalt": "methods", "pdf.fonttype": 42}
    colours = plots.light()
    with context(["default", {k: v for k, v in plots.SETTINGS.items() if "color" not in k}, files]):
        figure, _ = paint(found, colours)
        figure.set(facecolor=colours["card"], frameon=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            dated = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix.lower())
            figure.savefig(path, format=path.suffix[1:].lower(), metadata={dated: None} if dated else None)
        except OSError as error:
            raise UserError(f"cannot write the picture to {path}: {error.strerror or error}; give another --out") from None


def drawable(found: JSON) -> bool:
    return any(m["mean"] and m["ledgers"] and any(m["ledgers"]["mean"][p] is not None for p, _ in PANELS) for m in named(found))


def named(found: JSON) -> list[JSON]:
    """The methods that are measured, with their names, colours' and markers' numbers."""
    return [{**m, "name": row, "at": i} for i, (row, m) in enumerate(found["rows"].items()) if m["mean"]]


# --- the drawing ---------------------------------------------------------------------------------------------------------


def paint(found: JSON, colours: dict[str, str]) -> tuple[Any, list[str]]:
    """The figure, and a title for each of its markers."""
    from matplotlib.figure import Figure

    methods = named(found)
    tags = labels(found, methods)
    margin = 34 + 6.4 * max(len(tag["text"]) for tag in tags)
    width, height = 720 + margin, max(380.0, 70 + GAP * len(tags))
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False)
    panels = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.07})
    figure.subplots_adjust(48 / width, 44 / height, 1 - margin / width, 1 - 22 / height)
    ends = [end for m in methods for end in (*m["mean"]["interval"], *(s["mean"] for s in m["mean"]["seeds"]))]
    ends += [tag["y"] for tag in tags]
    pad = 0.05 * (max(ends) - min(ends) or 0.1)
    titles: list[str] = []
    for axes, (ledger, words) in zip(panels, PANELS, strict=True):
        axes.set_frame_on(False)
        axes.grid(axis="y", clip_on=False, color=colours["rule"])
        axes.tick_params(labelcolor=colours["soft"])
        axes.set_ylim(min(ends) - pad, max(ends) + pad)
        axes.yaxis.set_major_formatter(lambda at, _: f"{100 * at:.4g}".replace("-", "−"))
        place = scale(axes, methods, ledger, words, colours)
        for line in (t for t in tags if t["rule"]):
            axes.axhline(line["y"], color=colours[line["colour"]], linestyle=line["rule"], linewidth=1.2, zorder=1)
        spots = side_by_side(axes, methods, ledger, place)
        for m in methods:
            if m["name"] in spots:
                mark(axes, m, ledger, place, spots[m["name"]], colours, titles)
    panels[0].text(0, 1.02, "mean score over the domains, %", transform=panels[0].transAxes, color=colours["soft"])
    tie(figure, panels[1], tags, spots, colours)
    return figure, titles


def labels(found: JSON, methods: list[JSON]) -> list[JSON]:
    """What stands at the right: ``{name, text, y, colour, rule, bold}``, methods and the two lines."""
    made = []
    for m in methods:
        bold = m["name"] == found["reference"]
        made.append({**tag(m["name"], m["mean"], plots.SERIES[m["at"] % len(plots.SERIES)]), "bold": bold})
    before, oracle = found["before"], found["oracle"]
    made += [tag(f"before: {before['row']}", before, "grey", "--")] if before and before.get("seeds") else []
    return made + ([tag("routed oracle", oracle, "ink", ":")] if oracle else [])


def tag(name: str, mean: JSON, colour: str, rule: Any = "") -> JSON:
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    text = f"{short}  {terminal.percent(mean['mean'])}"
    return {"name": name, "text": text, "y": mean["mean"], "colour": colour, "rule": rule, "bold": False}


def scale(axes: Any, methods: list[JSON], ledger: str, words: str, colours: dict[str, str]) -> Any:
    """Sets a panel's x axis; returns where a cost stands on it."""
    costs = [
        c for m in methods if m["ledgers"] for c in (m["ledgers"]["mean"][ledger], *(s[ledger] for s in m["ledgers"]["seeds"]))
    ]
    costs = [c for c in costs if c is not None]
    most = max(costs, default=0.0) or 1.0
    real = [c for c in costs if c > NOTHING * most] or [most]
    low, high = math.log10(min(real)), math.log10(max(real))
    pad = max(0.08 * (high - low), 0.06)
    low, high = low - pad, high + pad
    nothing = low - 0.1 * (high - low) if len(real) < len(costs) else low
    unit, letter = next((u for u in terminal.FLOPS if most >= u[0]), terminal.FLOPS[-1])
    at = ticks(low, high)
    shown = [f"{10**t / unit:.3g}" for t in at]
    if nothing < low:
        at, shown = [nothing, *at], ["≈ 0", *shown]
        axes.axvline(low, color=colours["rule"], linewidth=1, linestyle=(0, (2, 3)), zorder=0)
    axes.set_xlim(nothing - (0.05 * (high - low) if nothing < low else 0), high)
    axes.set_xticks(at, shown)
    axes.text(0.5, -0.1, f"{words}, {letter}FLOP", transform=axes.transAxes, ha="center", va="top", color=colours["soft"])
    axes.axhline(axes.get_ylim()[0], color=colours["rule"], linewidth=1, zorder=0, clip_on=False)
    return lambda cost: math.log10(cost) if cost > NOTHING * most else nothing


def ticks(low: float, high: float) -> list[float]:
    """Logarithms of three to seven round numbers within (low, high), where there are so many."""
    made: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), [1 + i / 10 for i in range(90)]):
        powers = range(math.floor(low) - 1, math.ceil(high) + 1)
        made = [at for power in powers for step in steps if low < (at := power + math.log10(step)) < high]
        if len(made) >= 3:
            break
    return made[:: math.ceil(len(made) / 7) or 1]


def side_by_side(axes: Any, methods: list[JSON], ledger: str, place: Any) -> dict[str, float]:
    """Where each method stands on a panel's x axis: at its cost, or beside those of about the same cost and score."""
    costs = {m["name"]: m["ledgers"]["mean"][ledger] for m in methods if m["ledgers"]}
    spots = {m["name"]: (place(costs[m["name"]]), *m["mean"]["interval"]) for m in methods if costs.get(m["name"]) is not None}
    span, pixels = axes.get_xlim(), axes.get_window_extent().width
    apart = APART * (span[1] - span[0]) / pixels
    made: dict[str, float] = {}
    groups: list[list[str]] = []
    for name in sorted(spots, key=lambda n: spots[n][0]):
        x, low, high = spots[name]
        near = [g for g in groups if any(x - spots[n][0] < apart and low < spots[n][2] and spots[n][1] < high for n in g)]
        groups = [g for g in groups if g not in near] + [[n for g in near for n in g] + [name]]
    for group in groups:
        group.sort(key=lambda n: spots[n][0])
        made |= zip(group, spread([spots[n][0] for n in group], apart, span[0], span[1]), strict=True)
    return made


def mark(axes: Any, m: JSON, ledger: str, place: Any, spot: float, colours: dict[str, str], titles: list[str]) -> None:
    """A method in one panel, at ``spot``; its seeds at their own costs, moved as far as the method was."""
    cost, colour, mean = m["ledgers"]["mean"][ledger], colours[plots.SERIES[m["at"] % len(plots.SERIES)]], m["mean"]
    span, pixels = axes.get_xlim(), axes.get_window_extent().width
    aside, moved = BESIDE * (span[1] - span[0]) / pixels, spot - place(cost)
    spent = {s["seed"]: place(s[ledger]) + moved for s in m["ledgers"]["seeds"] if s[ledger] is not None}
    for s in mean["seeds"] if len(mean["seeds"]) > 1 else ():
        if s["seed"] in spent:  # a seed at its method's mean cost would be lost under the bar
            at = spent[s["seed"]] if abs(spent[s["seed"]] - spot) > aside else spot + aside
            axes.plot(
                [at], [s["mean"]], "o", color=colour, markersize=3.2, markeredgewidth=0, alpha=0.8, zorder=2, clip_on=False
            )
    low, high = mean["interval"]
    (bar,) = axes.plot([spot] * 3, [low, mean["mean"], high], "-", color=colour, linewidth=1.4, zorder=3)
    bar.set(marker=MARKERS[m["at"] % len(MARKERS)], markevery=[1], markersize=7, markeredgewidth=1)
    bar.set(markeredgecolor=colours["card"], gid=f"title{len(titles)}", clip_on=False)
    figures = f"{terminal.percent(mean['mean'])} ({terminal.percent(low)} to {terminal.percent(high)})"
    titles.append(f"{m['name']}: {figures} at {terminal.flops(cost) if cost else '0 FLOP'}, {dict(PANELS)[ledger]}")


def tie(figure: Any, axes: Any, tags: list[JSON], spots: dict[str, float], colours: dict[str, str]) -> None:
    """Names at the right of the last panel, moved apart, each with a thin line to its marker or rule."""
    from matplotlib.lines import Line2D

    width, height = figure.bbox.size
    edge = axes.get_window_extent().x1
    tags = sorted(tags, key=lambda t: t["y"])
    at = [axes.transData.transform((0, t["y"]))[1] for t in tags]
    for tag, there, y in zip(tags, spread(at, GAP, 8.0, height - 8), at, strict=True):
        start = axes.transData.transform((spots[tag["name"]], tag["y"]))[0] if tag["name"] in spots else edge
        path = [(start, y), (edge + 4, y), (edge + 22, there)]
        xs, ys = ([p[i] / size for p in path] for i, size in ((0, width), (1, height)))
        figure.add_artist(Line2D(xs, ys, color=colours[tag["colour"]], linewidth=0.7, alpha=0.6, zorder=0.5))
        weight = "bold" if tag["bold"] else "normal"
        figure.text((edge + 26) / width, there / height, tag["text"], va="center", weight=weight, color=colours["ink"])


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places at least ``gap`` apart, near ``wanted`` (ascending) in least squares, and within [low, high] where
    there is room: isotonic regression of the places less what the gaps before them take."""
    top = max(low, high - (len(wanted) - 1) * gap)
    level = graph.isotonic([place - i * gap for i, place in enumerate(wanted)])
    return [min(max(place, low), top) + i * gap for i, place in enumerate(level)]
