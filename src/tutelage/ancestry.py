"""Ancestry: what an artifact was made from, what each edge was for, and whether and how it descends from another.

Works on the metas (``artifact.json``) that a store keeps. An ancestor whose meta is missing or damaged is *gone*: it stays
in the graph under its key, and what it was made from is not known. Everything is iterative: a chain of a thousand stages
must not meet the recursion limit.

A way from an artifact back to an ancestor is as strong as its weakest edge (`HOW`): the ancestor's weights, data that the
weights were trained on, a model that taught or data that a model wrote, a choice among checkpoints, or compute alone, which
is no descent: nothing of what was made flows along it.

Leaves out: drawing (commands/lineage.py, report/picture.py) and the model card (card.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tutelage.spec import SpecError, UserError, dump, resolve_kind
from tutelage.store import Store

Meta = dict[str, Any]

# --- roles ---------------------------------------------------------------------------------------------------------------

PATTERNS = (
    ("budget", re.compile(r"budget|compute")),
    ("teacher", re.compile(r"teacher|expert|specialist")),
    ("scored by", re.compile(r"judge|verif|scorer|reward|rater")),
    ("reference", re.compile(r"reference|(^|\.)ref($|\.)")),
    ("data", re.compile(r"task|data|prompt|gold|corpus|text|mixture|example|rollout|trace")),
)
MODEL_PORT = re.compile(r"policy|model|value|student|merge|average")
CHOICE = re.compile(r"(^|\.)select")
CANDIDATES = "candidates."
"""Begins the paths of edges of which a stage picks one; ``facts["selected"]["candidate"]`` names it."""


def part(path: str, port: str) -> str:
    """What an edge is for, by the field that holds it, then by its port, since a store has no idea of stages.

    One of ``start`` | ``teacher`` | ``data`` | ``scored by`` | ``reference`` | ``budget``.
    """
    field = path.lower() if not path.startswith(CANDIDATES) else CANDIDATES  # whose labels are a recipe's own words
    for name, pattern in PATTERNS:
        if pattern.search(field):
            return name
    return "start" if MODEL_PORT.search(port) else "data"


def part_detail(path: str, port: str) -> str:
    """What the path adds to the part: ``sum`` of ``credit.teachers.sum``."""
    last = path.rpartition(".")[2]
    return last if part(path, port) == "teacher" and "." in path and not last.isdigit() else ""


HOW = {
    "weights": ("parent",),
    "data": ("data",),
    "teaching": ("teacher", "sampler", "reference", "scored by"),
    "measuring": ("measured",),
    "selection": ("selection",),
    "compute": ("budget",),
}
"""How something descends -> the roles of edges of that strength, strongest first."""
STRENGTH = {role: i for i, roles in enumerate(HOW.values()) for role in roles}
ORDER = {role: i for i, role in enumerate(STRENGTH)}


@dataclass(frozen=True)
class Link:
    """One edge: stage ``child`` (a key) was made with port ``port`` of stage ``key``."""

    child: str
    key: str
    name: str
    port: str
    step: int | None
    path: str
    role: str
    """``parent`` | ``data`` | ``teacher`` | ``sampler`` (of data) | ``measured`` (by scores) | ``selection`` | ..."""

    @property
    def detail(self) -> str:
        return part_detail(self.path, self.port)

    @property
    def label(self) -> str:
        return f"{self.name}:{self.port}" + (f"@{self.step}" if self.step is not None else "")


def _role(meta: Meta, path: str, port: str) -> str:
    """`part`, told apart further by what the stage makes: weights that it goes on from, or a model that it listens to."""
    found = part(path, port)
    if found == "data" and CHOICE.search(path):
        return "selection"
    if path.startswith(CANDIDATES) and path.removeprefix(CANDIDATES) != _picked(meta):
        return "selection"
    if found != "start":
        return found
    kinds = {o.get("kind") for o in meta["outputs"].values() if isinstance(o, dict)}
    return "measured" if kinds == {"scores"} else "sampler" if kinds == {"data"} else "parent"


def _picked(meta: Meta) -> str | None:
    """The label of the candidate that a stage has published."""
    found = (meta.get("facts") or {}).get("selected")
    return found.get("candidate") if isinstance(found, dict) else None


# --- the graph -----------------------------------------------------------------------------------------------------------


@dataclass
class Ancestry:
    """An artifact's stage (``root``, a key) and everything it was made from."""

    root: str
    metas: dict[str, Meta]
    """key -> meta, ancestors first, the root last"""
    gone: dict[str, str] = field(default_factory=dict)
    """key -> why nothing is known of it"""

    @cached_property
    def links(self) -> dict[str, list[Link]]:
        """key -> its edges, the strongest first"""
        found = {}
        for key, meta in self.metas.items():
            mine = [
                Link(key, i["key"], i["name"], i["port"], i.get("step"), i["path"], _role(meta, i["path"], i["port"]))
                for i in meta["inputs"]
            ]
            found[key] = sorted(mine, key=lambda e: (ORDER[e.role], e.path))
        return found

    @cached_property
    def names(self) -> dict[str, str]:
        """key -> name, of what is gone too"""
        named = {e.key: e.name for links in self.links.values() for e in links}
        return {**{k: named.get(k, k[:8]) for k in self.gone}, **{k: m["name"] for k, m in self.metas.items()}}

    @cached_property
    def flowing(self) -> set[str]:
        """Keys of the root and of all from which something flows into it: not of what only bounds its compute."""
        found: set[str] = set()
        stack = [self.root]
        while stack:
            key = stack.pop()
            if key not in found:
                found.add(key)
                stack.extend(e.key for e in self.links.get(key, ()) if e.role != "budget")
        return found

    def __iter__(self) -> Iterator[Link]:
        return (link for links in self.links.values() for link in links)


def gather(store: Store, root: Meta) -> Ancestry:
    """The ancestry of a stage, given its meta (of a stage that is not published yet, too)."""
    done: dict[str, Meta] = {}
    gone: dict[str, str] = {}
    read: dict[str, Meta] = {root["key"]: root}
    stack = [(root["key"], False)]
    while stack:
        key, ready = stack.pop()
        if key in done or key in gone:
            continue
        if ready:
            done[key] = read[key]
            continue
        if key not in read:
            why = _read(store, key, read)
            if why:
                gone[key] = why
                continue
        stack.append((key, True))
        stack.extend((i["key"], False) for i in reversed(read[key]["inputs"]))
    return Ancestry(root["key"], done, gone)


def _read(store: Store, key: str, into: dict[str, Meta]) -> str:
    """Reads a meta; or why it cannot be used."""
    if not store.has(key):
        return "not in the store"
    try:
        meta = store.meta(key)
    except (UserError, OSError):
        return "damaged"
    inputs, outputs = meta.get("inputs"), meta.get("outputs")
    whole = isinstance(meta.get("name"), str) and isinstance(inputs, list) and isinstance(outputs, dict)
    if not whole or not all(isinstance(i, dict) and {"path", "key", "port", "name"} <= i.keys() for i in inputs or ()):
        return "damaged"
    into[key] = meta
    return ""


# --- descent -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A path from the root back to an ancestor; its first link is the root's own."""

    how: str
    """A name of `HOW`: that of its weakest edge."""
    links: tuple[Link, ...]
    more: int = 0
    """Further edges of the root, of the same role, from which a way as strong leads there."""


def ways(of: Ancestry, key: str, port: str = "") -> list[Way]:
    """How the root descends from a stage, or from one ``port`` of it; nothing where it does not.

    One way for each role among the root's edges: of the strongest, a shortest. The strongest come first.
    """
    found: dict[str, Way] = {}
    for strength, how in enumerate(HOW):
        onward = _onward(of, key, port, strength)
        by_role: dict[str, list[tuple[Link, ...]]] = {}
        for link in of.links.get(of.root, ()):
            if link.role not in found and (trail := _trail(link, onward, key, port, strength)):
                by_role.setdefault(link.role, []).append(trail)
        for role, trails in by_role.items():
            found[role] = Way(how, min(trails, key=len), len(trails) - 1)
    return list(found.values())


def _onward(of: Ancestry, key: str, port: str, strength: int) -> dict[str, Link]:
    """stage -> the first edge of a shortest way from it to the target, over edges at least so strong."""
    readers: dict[str, list[Link]] = {}
    for link in of:
        if STRENGTH[link.role] <= strength:
            readers.setdefault(link.key, []).append(link)
    found: dict[str, Link] = {}
    front = [link for link in readers.get(key, ()) if not port or link.port == port]
    while front:
        further: list[Link] = []
        for link in front:
            if link.child not in found:
                found[link.child] = link
                further.extend(readers.get(link.child, ()))
        front = further
    return found


def _trail(link: Link, onward: dict[str, Link], key: str, port: str, strength: int) -> tuple[Link, ...]:
    """The shortest way that begins with an edge; empty where it does not lead there."""
    if STRENGTH[link.role] > strength:
        return ()
    trail = [link]
    while trail[-1].key != key or (port and trail[-1].port != port):
        if trail[-1].key not in onward:
            return ()
        trail.append(onward[trail[-1].key])
    return tuple(trail)


def nearest_common(one: Ancestry, other: Ancestry) -> list[str]:
    """Keys in both ancestries that no other common one was made from, what bounds compute aside; the newest first."""
    common = [k for k in (*reversed(one.metas), *one.gone) if k in one.flowing and k in other.flowing]
    above = {e.key for k in common for e in one.links.get(k, ()) if e.role != "budget"}
    return [k for k in common if k not in above]


def data_of(of: Ancestry) -> list[Link]:
    """One edge for each data port that the root or an ancestor of it read, the nearest to the root."""
    found: dict[tuple[str, str], Link] = {}
    for key in reversed(list(of.metas)):
        for link in of.links[key] if key in of.flowing else ():
            if link.role in ("data", "selection"):
                found.setdefault((link.key, link.port), link)
    return list(found.values())


# --- the spec ------------------------------------------------------------------------------------------------------------


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """Fields of a stage's record that differ from their defaults, as ``--set`` would name them; edges and name left out.

    Defaults are those of the installed code. Of a kind that is not known here every field counts as different.
    """
    found: dict[str, Any] = {}
    usual = _defaults(record)
    spots = [(name, value, usual.get(name)) for name, value in record.items() if name not in ("kind", "name")]
    while spots:
        where, value, default = spots.pop()
        if value == default or _is_edge(value):
            continue
        inner: dict[str, Any] = value if isinstance(value, dict) else {}
        if isinstance(value, list):
            inner = {str(i): v for i, v in enumerate(value)}
        if isinstance(inner.get("kind"), str):
            if not isinstance(default, dict) or default.get("kind") != inner["kind"]:
                found[where], default = inner["kind"].rpartition(".")[2], _defaults(inner)
            spots += [(f"{where}.{n}", v, default.get(n)) for n, v in inner.items() if n != "kind"]
        elif any(isinstance(v, dict) for v in inner.values()):
            spots += [(f"{where}.{n}", v, None) for n, v in inner.items()]
        else:
            found[where] = value
    return dict(sorted(found.items()))


def _is_edge(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("ref"), str)


def _defaults(record: dict[str, Any]) -> dict[str, Any]:
    try:
        fields = resolve_kind(record.get("kind", "")).model_fields
    except (SpecError, ImportError):
        return {}
    kept = {n: f for n, f in fields.items() if not f.is_required()}
    return {n: dump(f.get_default(call_default_factory=True), lambda spec: None) for n, f in kept.items()}
