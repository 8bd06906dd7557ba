"""A graph of stages as inline SVG: layered left to right, who starts from whom, who teaches whom, which data feeds what.

Layered drawing after Sugiyama: longest-path layers, dummy nodes on edges that skip layers, barycentre sweeps against
crossings, and heights by least squares under a minimal distance (pool adjacent violators). In a recipe's graph evaluations
are not nodes: a checkpoint names the rows of the table that measure it. Edges that only bound a stage's compute are faint.

Colours are CSS classes (report.css), so that the drawing follows the page's light or dark theme. Leaves out: interaction,
and graphs of more than `LIMIT` nodes, which the page lists instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from html import escape
from itertools import pairwise

from tutelage.report.read import Replicate

WIDTH, HEIGHT, GAP, SPACE, MARGIN = 140.0, 46.0, 94.0, 16.0, 6.0
LIMIT = 150
SWEEPS = 12
VERBS = {
    "start": "starts",
    "teacher": "teaches",
    "data": "",
    "scored by": "scores",
    "reference": "reference of",
    "budget": "budget",
}


@dataclass
class Node:
    """A stage, or (``dummy``) a bend of an edge that passes its layer."""

    name: str
    layer: int = 0
    y: float = 0.0
    dummy: bool = False
    line: str = ""
    """What stands under the name."""
    title: str = ""
    """What is shown when it is pointed at."""
    role: str = ""
    """``before`` | ``after`` | ``teacher`` | ``control`` | ``data``: how it looks."""
    enter: int = 0
    leave: int = 0

    @property
    def x(self) -> float:
        return MARGIN + self.layer * (WIDTH + GAP)

    @property
    def height(self) -> float:
        """Room for every link that enters and every label that leaves."""
        return 6.0 if self.dummy else max(HEIGHT, 9.0 * (self.enter + 1), 13.0 * (self.leave + 1))


@dataclass
class Link:
    """An edge drawn: ``through`` are the dummies between its ends."""

    source: str
    target: str
    role: str
    label: str
    through: list[str] = field(default_factory=list)


@dataclass
class Drawing:
    """Nodes by name and links, in layers once `arrange` has run."""

    nodes: dict[str, Node]
    links: list[Link]

    @property
    def size(self) -> tuple[float, float]:
        layers = max((n.layer for n in self.nodes.values()), default=0) + 1
        low = max((n.y + n.height for n in self.nodes.values()), default=0.0)
        return layers * WIDTH + (layers - 1) * GAP + 2 * MARGIN, low + MARGIN


def build(replicate: Replicate, status: dict[str, str]) -> Drawing:
    """The drawing of a record, not arranged yet. Data that only evaluations read is left out."""
    table, hidden = replicate.table, replicate.evaluations
    links: dict[tuple[str, str, str], Link] = {}
    for target, edges in replicate.edges.items():
        for edge in edges if target not in hidden else ():
            if edge.ref in hidden:
                continue
            step = f" @{edge.step}" if edge.step is not None else ""
            said = (edge.port if edge.role == "data" else edge.detail) + step
            link = links.setdefault((edge.ref, target, edge.role), Link(edge.ref, target, edge.role, VERBS[edge.role]))
            if said.strip() and said not in link.label.split(", "):
                link.label = f"{link.label}{' ' if link.label == VERBS[edge.role] else ', '}{said}".strip()
    used = {end for link in links.values() for end in (link.source, link.target)}
    rows: dict[str, list[str]] = {}
    for row in table.rows:
        source = replicate.source(row)
        if source and source.ref not in hidden:
            rows.setdefault(source.ref, []).append(row)
    makers = {link.source for link in links.values() if link.role not in ("data", "budget")} | set(rows)
    nodes: dict[str, Node] = {}
    for name, spec in replicate.record.get("stages", {}).items():
        if name in hidden or (name not in used and name not in rows):
            continue
        roles = [table.role(r) for r in rows.get(name, []) if table.role(r)]
        trained = name in makers or any(link.target == name for link in links.values())
        role = roles[0] if roles else "" if trained else "data"
        second = {
            "before": "before",
            "after": "student" if table.teachers else "after",
            "teacher": "teacher",
            "control": "control",
        }.get(role, "")
        state = status.get(name, "")
        parts = (str(spec.get("kind", "")).rpartition(".")[2], second, state if state != "stored" else "")
        line = " · ".join(p for p in parts if p)
        named = f"rows of the table: {', '.join(rows[name])}" if rows.get(name) else "not in the table"
        nodes[name] = Node(name, line=line, title=f"{name} ({line}); {named}", role=role)
    return Drawing(nodes, list(links.values()))


# --- arranging -----------------------------------------------------------------------------------------------------------


def arrange(drawing: Drawing) -> None:
    """Gives every node its layer and height, in place."""
    for name, node in drawing.nodes.items():
        node.enter = sum(link.target == name for link in drawing.links)
        node.leave = len({(link.role, link.label) for link in drawing.links if link.source == name})
    _layers(drawing)
    _bend(drawing)
    columns = _columns(drawing)
    before, after = _neighbours(drawing)
    for sweep in range(SWEEPS):
        near, order = (before, columns) if sweep % 2 == 0 else (after, columns[::-1])
        for column in order:
            spots = {name: i for each in columns for i, name in enumerate(each)}
            column.sort(key=lambda n: _mean((spots[m] for m in near[n]), spots[n]))
    for column in columns:
        for i, name in enumerate(column):
            drawing.nodes[name].y = i * (HEIGHT + SPACE)
    for sweep in range(2 * SWEEPS):
        near, order = (before, columns) if sweep % 2 == 0 else (after, columns[::-1])
        for column in order:
            _settle(drawing, column, near)
    top = min((n.y for n in drawing.nodes.values()), default=0.0)
    for node in drawing.nodes.values():
        node.y += MARGIN - top


def _layers(drawing: Drawing) -> None:
    """Longest path from the roots; a root is then drawn as near to its first reader as it can be."""
    sources = {name: [e.source for e in drawing.links if e.target == name] for name in drawing.nodes}
    for name in TopologicalSorter(sources).static_order():
        drawing.nodes[name].layer = max((drawing.nodes[s].layer + 1 for s in sources[name]), default=0)
    for name in (n for n in drawing.nodes if not sources[n]):
        readers = [drawing.nodes[e.target].layer for e in drawing.links if e.source == name]
        drawing.nodes[name].layer = min(readers, default=1) - 1


def _bend(drawing: Drawing) -> None:
    """A dummy for every layer that a link passes; links from one source with one label share their dummies."""
    for link in drawing.links:
        first, last = drawing.nodes[link.source].layer, drawing.nodes[link.target].layer
        for layer in range(first + 1, last):
            name = f"{link.source}\0{link.role}\0{link.label}\0{layer}"
            drawing.nodes.setdefault(name, Node(name, layer, dummy=True))
            link.through.append(name)


def _columns(drawing: Drawing) -> list[list[str]]:
    columns: list[list[str]] = [[] for _ in range(max((n.layer for n in drawing.nodes.values()), default=-1) + 1)]
    for name, node in drawing.nodes.items():
        columns[node.layer].append(name)
    return columns


def _neighbours(drawing: Drawing) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    before: dict[str, list[str]] = {n: [] for n in drawing.nodes}
    after: dict[str, list[str]] = {n: [] for n in drawing.nodes}
    for link in drawing.links:
        path = [link.source, *link.through, link.target]
        for a, b in pairwise(path):
            if a not in before[b]:
                before[b].append(a)
                after[a].append(b)
    return before, after


def _mean(values: Iterable[float], otherwise: float) -> float:
    found = list(values)
    return sum(found) / len(found) if found else otherwise


def _settle(drawing: Drawing, column: list[str], near: dict[str, list[str]]) -> None:
    """Moves a column's nodes towards their neighbours' heights, keeping order and distance.

    Least squares under ``y[i+1] − y[i] ≥ distance`` is isotonic regression of the wishes less the summed distances.
    """
    offset, wishes, offsets = 0.0, [], []
    for name in column:
        node = drawing.nodes[name]
        centres = [drawing.nodes[m].y + drawing.nodes[m].height / 2 for m in near[name]]
        wishes.append(_mean(centres, node.y + node.height / 2) - node.height / 2 - offset)
        offsets.append(offset)
        offset += node.height + SPACE
    for name, value, distance in zip(column, isotonic(wishes), offsets, strict=True):
        drawing.nodes[name].y = value + distance


def isotonic(values: list[float]) -> list[float]:
    """The non-decreasing sequence nearest to ``values`` in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, size = (mean * size + other * more) / (size + more), size + more
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]


# --- drawing -------------------------------------------------------------------------------------------------------------


def svg(replicate: Replicate, status: dict[str, str]) -> str:
    """A recipe's graph as an ``<svg>``; empty where there is nothing, or too much, to draw."""
    drawing = build(replicate, status)
    return draw(drawing, "Graph of the recipe") if drawing.nodes and len(drawing.nodes) <= LIMIT else ""


def draw(drawing: Drawing, called: str) -> str:
    """Arranges a drawing and writes it as an ``<svg>`` in the style of report.css."""
    arrange(drawing)
    width, height = drawing.size
    spoken = "; ".join(_spoken(drawing, link) for link in drawing.links)
    heads = "".join(
        f'<marker id="head-{_css(role)}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0.5L8 4L0 7.5z" class="head {_css(role)}"/></marker>'
        for role in VERBS
    )
    exits = leaving(drawing)
    links = "".join(
        _link(drawing, link, exits) for link in sorted(drawing.links, key=lambda e: e.role not in ("data", "budget"))
    )
    nodes = "".join(_node(n) for n in drawing.nodes.values() if not n.dummy)
    size = f'style="min-width:{0.85 * width:.0f}px;max-width:{width:.0f}px" viewBox="0 0 {width:.0f} {height:.0f}"'
    label = escape(f"{called}: {spoken}")
    drawn = f"<defs>{heads}</defs>{links}{_labels(drawing, exits)}{nodes}"
    return f'<svg class="graph" {size} role="img" aria-label="{label}">{drawn}</svg>'


def _spoken(drawing: Drawing, link: Link) -> str:
    ends = [drawing.nodes[end].name for end in (link.source, link.target)]
    return f"{ends[0]} {link.label or link.role} → {ends[1]}"


def _css(role: str) -> str:
    return role.replace(" ", "-")


Point = tuple[float, float]
Exits = dict[tuple[str, str, str], float]
"""(source, role, label) -> height at which its links leave"""


def leaving(drawing: Drawing) -> Exits:
    """Different kinds of link leave a stage apart."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for link in drawing.links:
        if (link.role, link.label) not in kinds.setdefault(link.source, []):
            kinds[link.source].append((link.role, link.label))
    found: Exits = {}
    for source, mine in kinds.items():
        node = drawing.nodes[source]
        for i, (role, label) in enumerate(sorted(mine, key=lambda k: _reach(drawing, source, k))):
            found[source, role, label] = node.y + node.height * (i + 1) / (len(mine) + 1)
    return found


def _reach(drawing: Drawing, source: str, kind: tuple[str, str]) -> float:
    """Mean height of where links of a kind go next."""
    mine = [e for e in drawing.links if (e.source, e.role, e.label) == (source, *kind)]
    return _mean((drawing.nodes[(e.through or [e.target])[0]].y for e in mine), 0.0)


def _entries(drawing: Drawing, link: Link) -> float:
    """Height at which a link enters: links enter in the order of where they come from."""
    node = drawing.nodes[link.target]
    mine = [e for e in drawing.links if e.target == link.target]
    mine.sort(key=lambda e: drawing.nodes[(e.through or [e.source])[-1]].y)
    return node.y + node.height * (mine.index(link) + 1) / (len(mine) + 1)


def route(drawing: Drawing, link: Link, exits: Exits) -> list[tuple[Point, Point, Point, Point]]:
    """A link as cubic Bézier curves, one after another (end, handles, end); along a bend they are straight."""
    source, target = drawing.nodes[link.source], drawing.nodes[link.target]
    at, found = (source.x + WIDTH, exits[link.source, link.role, link.label]), []
    for name in link.through:
        bend = drawing.nodes[name]
        first, last = (bend.x, bend.y + 3), (bend.x + WIDTH, bend.y + 3)
        found += [_curve(at, first), _curve(first, last)]
        at = last
    return [*found, _curve(at, (target.x - 1, _entries(drawing, link)))]


def _curve(start: Point, end: Point) -> tuple[Point, Point, Point, Point]:
    middle = (start[0] + end[0]) / 2
    return start, (middle, start[1]), (middle, end[1]), end


def _link(drawing: Drawing, link: Link, exits: Exits) -> str:
    curves = route(drawing, link, exits)
    further = "".join("C" + " ".join(f"{x:.1f} {y:.1f}" for x, y in curve[1:]) for curve in curves)
    path = "M{:.1f} {:.1f}".format(*curves[0][0]) + further
    title, role = escape(_spoken(drawing, link)), _css(link.role)
    return f'<path class="link {role}" d="{path}" marker-end="url(#head-{role})"><title>{title}</title></path>'


def said(drawing: Drawing, exits: Exits) -> list[tuple[float, float, str, str]]:
    """(x, y, role, text): one label where links of a kind leave a stage."""
    made = []
    for (source, role, label), y in exits.items():
        label = label if len(label) <= 15 else label.removeprefix(f"{VERBS[role]} ")
        made.append((drawing.nodes[source].x + WIDTH + 5, y - 3, role, short(label, 17)))
    return made


def _labels(drawing: Drawing, exits: Exits) -> str:
    each = said(drawing, exits)
    return "".join(f'<text class="say {_css(r)}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>' for x, y, r, text in each)


def _node(node: Node) -> str:
    middle = node.y + node.height / 2
    return (
        f'<g class="node {_css(node.role) or "plain"}"><title>{escape(node.title)}</title>'
        f'<rect x="{node.x:.1f}" y="{node.y:.1f}" width="{WIDTH}" height="{node.height:.1f}" rx="7"/>'
        f'<text class="name" x="{node.x + 10:.1f}" y="{middle - 3:.1f}">{escape(short(node.name, 18))}</text>'
        f'<text class="line" x="{node.x + 10:.1f}" y="{middle + 13:.1f}">{escape(short(node.line, 24))}</text></g>'
    )


def short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
