"""The picture of an ancestry as a file: SVG, PNG or PDF by matplotlib, or an HTML page with the drawing of graph.py.

Both draw the same arrangement (graph.py) in the colours of report.css; the page follows its reader's light or dark theme, the
other files are light. Leaves out: ancestries of more than `LIMIT` stages.
"""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from typing import Any

from tutelage.ancestry import Ancestry
from tutelage.report import graph, plots
from tutelage.report.graph import LIMIT, Drawing, Link, Node
from tutelage.spec import UserError

SUFFIXES = (".svg", ".png", ".pdf", ".html")
PARTS = {"parent": "start", "sampler": "start", "measured": "start", "selection": "data"}
"""How edges look whose role is told apart further than the report's graph does."""
COLOURS = {"teacher": "orange", "scored by": "green", "reference": "green"}
DASHES = {"budget": (0, (1, 3)), "teacher": (0, (5, 3)), "scored by": (0, (2, 3)), "reference": (0, (2, 3))}


def save(of: Ancestry, path: Path) -> None:
    """Draws an ancestry into a file. Raises `UserError` for another suffix, too many stages, or where it cannot write."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"cannot draw {path}: give --out a name that ends in {', '.join(SUFFIXES)}")
    drawing = build(of)
    if len(drawing.nodes) > LIMIT:
        raise UserError(f"cannot draw {len(drawing.nodes)} stages, {LIMIT} at most; leave out --out, or take --json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(of, drawing), "utf-8") if suffix == ".html" else paint(drawing, path)
    except OSError as error:
        raise UserError(f"cannot write the picture to {path}: {error.strerror or error}; give another --out") from None


def build(of: Ancestry) -> Drawing:
    """The drawing of an ancestry, not arranged yet; nodes by key."""
    links: dict[tuple[str, str, str], Link] = {}
    for one in of:
        role = PARTS.get(one.role, one.role)
        words = "" if one.role in ("parent", "data") else one.role
        link = links.setdefault((one.key, one.child, one.role), Link(one.key, one.child, role, words))
        said = (one.port if role == "data" else "") + (f" @{one.step}" if one.step is not None else "")
        if said.strip() and said not in link.label.split(", "):
            link.label = f"{link.label}{', ' if link.label not in ('', words) else ' '}{said}".strip()
    readers = {key: {e.role for e in of if e.key == key} for key in (*of.metas, *of.gone)}
    nodes = {key: _node(of, key, readers[key]) for key in readers}
    return Drawing(nodes, list(links.values()))


def _node(of: Ancestry, key: str, read_as: set[str]) -> Node:
    if key in of.gone:
        return Node(of.names[key], line=f"{key[:8]} · gone", title=f"{of.names[key]} {key} is {of.gone[key]}", role="control")
    meta = of.metas[key]
    role = "after" if key == of.root else "teacher" if "teacher" in read_as and "parent" not in read_as else ""
    if not role and read_as <= {"data", "selection"}:
        role = "data"
    kind = meta.get("kind", "").rpartition(".")[2]
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(meta["finished"])) if "finished" in meta else ""
    spent = f"{meta.get('cost', {}).get('flops', 0):.3g} FLOP, {meta.get('seconds', 0):.0f} s"
    facts = [key, made, spent, f"on {meta.get('host', '?')}", f"code {meta.get('code', '?')}"]
    facts += [f"{port} {digest}" for port, digest in meta.get("content", {}).items()]
    return Node(meta["name"], line=f"{kind} · {key[:8]}", title=f"{meta['name']} ({kind}); {'; '.join(facts)}", role=role)


def page(of: Ancestry, drawing: Drawing) -> str:
    """One self-contained HTML page."""
    name = escape(of.names[of.root])
    drawn = graph.draw(drawing, f"Ancestry of {of.names[of.root]}")
    note = "Point at a stage for its key, date, cost, host, code and content hashes."
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Ancestry of {name}</title><style>{plots.STYLE.read_text('utf-8')}\n"
        f"main{{max-width:none;overflow-x:auto}}.graph{{margin:0}}</style></head>"
        f'<body><header style="max-width:none"><h1>Ancestry of {name}</h1><p class="soft">{note}</p></header>'
        f"<main>{drawn}</main></body></html>\n"
    )


# --- by matplotlib -------------------------------------------------------------------------------------------------------


def paint(drawing: Drawing, path: Path) -> None:
    """Arranges a drawing and paints it; one unit is a point."""
    from matplotlib import rc_context
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.figure import Figure

    graph.arrange(drawing)
    colours = plots.light()
    (r, g, b), (red, green, blue) = to_rgb(colours["grey"]), to_rgb(colours["card"])
    colours["faint"] = to_hex(((r + red) / 2, (g + green) / 2, (b + blue) / 2))  # no alpha: lines lie on one another
    width, height = drawing.size
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ancestry", "text.parse_math": False, "pdf.fonttype": 42}):
        figure = Figure(figsize=(width / 72, height / 72), facecolor=colours["card"])
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        exits = graph.leaving(drawing)
        for link in drawing.links:
            _paint_link(axes, drawing, link, exits, colours)
        for x, y, role, text in graph.said(drawing, exits):
            box = {"facecolor": colours["card"], "edgecolor": "none", "pad": 0.5}
            axes.text(x, y, text, size=7.5, color=colours["orange" if role == "teacher" else "soft"], bbox=box, zorder=2)
        for node in drawing.nodes.values():
            if not node.dummy:
                _paint_node(axes, node, colours)
        figure.savefig(path, dpi=min(200, 60000 / max(width, height) * 72), format=path.suffix[1:].lower())


def _paint_link(axes: Any, drawing: Drawing, link: Link, exits: graph.Exits, colours: dict[str, str]) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    curves = graph.route(drawing, link, exits)
    points = [curves[0][0], *(p for curve in curves for p in curve[1:])]
    line = Line(points, [Line.MOVETO] + [Line.CURVE4] * (len(points) - 1))
    faint = link.role in ("data", "budget")
    colour = colours["faint" if faint else COLOURS.get(link.role, "grey")]
    arrow = FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=7, fill=False, zorder=0.9 if faint else 1)
    arrow.set(color=colour, linewidth=0.8 if faint else 1.3, linestyle=DASHES.get(link.role, "-"))
    axes.add_patch(arrow)


def _paint_node(axes: Any, node: Node, colours: dict[str, str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    edge = colours[{"after": "blue", "teacher": "orange", "control": "pink", "data": "rule"}.get(node.role, "grey")]
    face = colours["tint" if node.role == "data" else "card"]
    box = FancyBboxPatch((node.x + 7, node.y + 7), graph.WIDTH - 14, node.height - 14, boxstyle="round,pad=7", zorder=3)
    box.set(facecolor=face, edgecolor=edge, linewidth=2 if node.role == "after" else 1.2)
    box.set_linestyle((0, (5, 3)) if node.role == "control" else "-")
    axes.add_patch(box)
    middle = node.y + node.height / 2
    axes.text(node.x + 10, middle - 3, graph.short(node.name, 20), size=9, weight="bold", color=colours["ink"], zorder=4)
    axes.text(node.x + 10, middle + 12, graph.short(node.line, 26), size=7.5, color=colours["soft"], zorder=4)
