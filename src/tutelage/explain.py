"""Why a stage of a plan will run: what differs from its nearest stored neighbour, and differences of records at large.

The *neighbour* is a stored stage of the same name and kind, else of the same kind: the one with the fewest fields and
inputs that differ, then the fewest differences at all (so the same stage by older code is nearer than another seed's), then
the newest. A difference is a field by its dotted path, an input, a version (the stage's, a nested spec's, a library's) or
code of the user's. Fields that are in no key (names, threads) count for nothing, and a field that an older record lacks had
its default.

What a key holds beside the record (versions of nested specs, content of outside files, user code) is compared by the `marks`
that an artifact carries. An artifact without them tells less: where nothing else differs, the cause is one of the places that
could have changed unseen, and all of those are named.

Leaves out: more than the `CANDIDATES` newest neighbours of a stage, so that large stores are planned as fast as small ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tutelage.graph import At, Node, Plan, Stage, all_goals, key, order, record
from tutelage.index import Summary, summaries
from tutelage.spec import Spec, content_hash, dump, flags, foreign_code, library_of, resolve_kind, walk
from tutelage.store import Store

JSON = dict[str, Any]
CANDIDATES = 4
"""How many stored stages of a name are read, the newest, those of the same seed first; or else four times as many of a kind."""
COMPARED = 2
"""How many of them are compared field by field."""
LONG = 40
"""Characters of a value above which a text does not print it."""


@dataclass(frozen=True)
class Change:
    """One difference. ``path`` is the dotted path of a field, empty for the stage itself; ``old`` and ``new`` are JSON."""

    what: Literal["field", "input", "version", "code"]
    path: str
    old: Any
    new: Any
    text: str
    remade: str = ""
    """The stage of an input that is another one only because it will be made again."""

    @property
    def json(self) -> JSON:
        return {"what": self.what, "path": self.path, "old": self.old, "new": self.new}


@dataclass(frozen=True)
class Reason:
    """Why a stage has its status. ``against``: the neighbour's ``{name, key}``, None where there is none or none is needed."""

    lead: str
    changes: list[Change] = field(default_factory=list)
    against: JSON | None = None

    def text(self, most: int | None = None) -> str:
        """One line, inputs that will be remade at its end; with ``most``, so many changes and how many more there are."""
        own = [c.text for c in self.changes if not c.remade]
        said = [", ".join(own[:most]) + (f" … and {len(own) - most} more" if most and len(own) > most else "")]
        remade: dict[str, list[str]] = {}
        for change in self.changes:
            if change.remade:
                remade.setdefault(change.remade, []).append(change.path)
        if remade:
            inputs = [f"{', '.join(paths)}: {name}" for name, paths in remade.items()]
            more = f" and {len(inputs) - most} more" if most and len(inputs) > most else ""
            said.append(f"input{'s' if len(inputs) > 1 else ''} {'; '.join(inputs[:most])}{more} will be remade")
        return ": ".join(filter(None, (self.lead, ", ".join(filter(None, said)))))


NEW = "new: no stage of this name or kind is stored"


# --- plans -------------------------------------------------------------------------------------------------------------


def reasons(plan: Plan, store: Store) -> dict[str, Reason]:
    """By key, why each stage has its status; for one that will run, what differs from its neighbour."""
    stored = _Neighbours(store) if plan.todo else None
    records: dict[str, JSON] = {}
    for one in plan.goals if plan.todo else ():
        stages = record(one)["stages"]
        records.update({key(s): stages[s.name] for s in order(at.of for at in all_goals(one))})
    found = {}
    for node in plan.nodes.values():
        found[node.key] = Reason(node.why)
        if stored is not None and node.status == "run":
            found[node.key] = _reason(plan, node, json.loads(json.dumps(records[node.key])), stored)
    return found


class _Neighbours:
    """Stored stages by name and by kind, newest first; artifacts are read when they are compared."""

    def __init__(self, store: Store):
        self.store = store
        self._named: dict[tuple[str, str], list[Summary]] = {}
        self._kind: dict[str, list[Summary]] = {}
        self._read: dict[str, JSON] = {}
        whole = (s for s in summaries(store).values() if not s.damaged)
        for each in sorted(whole, key=lambda s: s.finished, reverse=True):
            self._named.setdefault((each.name, each.kind), []).append(each)
            self._kind.setdefault(each.kind, []).append(each)

    def meta(self, mine: str) -> JSON:
        if mine not in self._read:
            self._read[mine] = self.store.meta(mine)
        return self._read[mine]

    def of(self, node: Node, rec: JSON) -> list[JSON]:
        """Those worth comparing whole: of the candidates the few with the fewest fields and inputs that are not equal."""
        stage, kind = node.stage, node.stage.kind()
        seed = getattr(stage, "seed", None)
        named = sorted(self._named.get((stage.name, kind), []), key=lambda s: s.seed != seed)[:CANDIDATES]
        near = [self.meta(s.key) for s in named or self._kind.get(kind, [])[: 4 * CANDIDATES]]
        fields = [n for n in rec if n != "kind" and not _silent(type(stage), n)]

        def unequal(meta: JSON) -> int:
            inputs = {i["path"]: i["key"] for i in meta["inputs"]}
            moved = sum(inputs.get(path) != k for path, k, _, _ in node.inputs)
            return moved + sum(meta["record"].get(n) != rec[n] for n in fields)

        return sorted(near, key=unequal)[:COMPARED]


def _reason(plan: Plan, node: Node, rec: JSON, stored: _Neighbours) -> Reason:
    step = stored.store.checkpoint(node.key)
    lead = f"goes on from step {step}" if step is not None else ""
    near = stored.of(node, rec)
    if not near:
        return Reason(lead or NEW)
    mine = _Form(node.stage, rec)
    changes, meta = min(((mine.changes(m, node, plan), m) for m in near), key=_far)
    if not lead and meta["name"] != node.stage.name:
        lead = f"unlike {meta['name']}"
    old = {i["path"]: i for i in meta["inputs"]}
    changes = [_caused(c, old, node, plan, stored) if c.what == "input" else c for c in changes]
    return Reason(lead, changes, {"name": meta["name"], "key": meta["key"]})


def _far(each: tuple[list[Change], JSON]) -> tuple[int, int, float]:
    changes, meta = each
    return sum(c.what in ("field", "input") for c in changes), len(changes), -meta["finished"]


def _caused(change: Change, old: JSON, node: Node, plan: Plan, stored: _Neighbours) -> Change:
    """An input's change, with what made the stored input another one where both are stored."""
    new = next((k for path, k, _, _ in node.inputs if path == change.path), None)
    was = old.get(change.path, {}).get("key")
    if not new or not was or new == was or plan.nodes[new].status != "stored" or not stored.store.has(was):
        return change
    differ = [c for c in differences(stored.meta(was)["record"], stored.meta(new)["record"]) if not _is_edge(c.old, c.new)]
    if not differ or stored.meta(was)["name"] != stored.meta(new)["name"]:
        return change
    said = Reason("", differ).text(2)
    return Change(change.what, change.path, change.old, change.new, f"{change.text} ({said})")


class _Form:
    """A stage that will run, ready to be compared with stored ones."""

    def __init__(self, stage: Stage, rec: JSON):
        self.stage, self.record = stage, rec
        self.specs = dict(_specs(stage))
        self.classes = {type(s).kind(): type(s) for s in self.specs.values()}
        self.marks = marks(stage)

    def changes(self, meta: JSON, node: Node, plan: Plan) -> list[Change]:
        """All that differs from a stored stage, in the order version, fields, inputs, code."""
        old: JSON = meta["record"]
        fields = [c for c in differences(old, self.record, self.classes) if not _is_edge(c.old, c.new)]
        same = {p for p in self.marks if not any(p == c.path or p.startswith(f"{c.path}.") for c in fields)}
        beside = list({c.text: c for p in sorted(same, reverse=True) for c in self._beside(p, meta)}.values())[::-1]
        found = [c for c in beside if c.what == "version"] + fields + _inputs(meta, node, plan)
        found += [c for c in beside if c.what != "version"]
        return found or self._unseen(meta)

    def _beside(self, path: str, meta: JSON) -> Iterator[Change]:
        """What differs at a path that is in the key and not in the record."""
        now, told = self.marks[path], meta.get("marks")
        was: JSON = (told or {}).get(path, {})
        if not told:
            name = str(now.get("library", "")).partition(" ")[0]
            version = (meta.get("versions") or {}).get(name)
            was = {"library": f"{name} {version}"} if version else {}
        if not path:
            was = {**was, "version": meta.get("version", 1)}
        spot = f"{path} " if path else ""
        for name in ("version", "library", "code", "content"):
            a, b = was.get(name), now.get(name)
            if a is None or b is None or a == b:
                continue
            if name == "version":
                yield Change("version", path, a, b, f"{spot}version {a} → {b}")
            elif name == "library":
                yield Change("version", path, a, b, f"{spot}{a} → {b.partition(' ')[2]}")
            elif name == "code":
                yield Change("code", path, a, b, f"code of {_module(self.specs[path])} changed")
            else:
                yield Change("field", path, a, b, f"{path}: its content changed")

    def _unseen(self, meta: JSON) -> list[Change]:
        """Where nothing that is told differs: the places that could differ untold."""
        spots: list[Change] = []
        for path, now in self.marks.items() if not meta.get("marks") else ():
            if "content" in now:
                spots.append(Change("field", path, None, now["content"], f"{path}: its content changed"))
            if "code" in now:
                spots.append(Change("code", path, None, now["code"], f"code of {_module(self.specs[path])} changed"))
            if path and now.get("version", 1) > 1:
                spots.append(Change("version", path, None, now["version"], f"{path} version changed to {now['version']}"))
        texts = list(dict.fromkeys(c.text for c in spots))
        if len(texts) > 1:
            return [Change(c.what, c.path, c.old, c.new, f"perhaps {c.text}") for c in spots]
        return spots[:1] or [Change("code", "", None, None, "its code changed")]


def marks(stage: Stage) -> JSON:
    """What a stage's key holds beside its record, by dotted path: ``version``, ``library`` and ``code`` of the stage ("")
    and of its nested specs, ``content`` of outside files."""
    found: JSON = {}
    for path, spec in _specs(stage):
        cls = type(spec)
        found[path] = {"version": cls.version, **library_of(cls), **foreign_code(cls)}
        for name, info in cls.model_fields.items():
            fact = getattr(spec, name)
            if flags(cls, name).get("outside") and (info.is_required() or fact != info.default):
                found[f"{path}.{name}" if path else name] = {"content": content_hash(Path(fact))}
    return found


def _specs(stage: Stage) -> Iterator[tuple[str, Spec]]:
    """A stage and the specs in its keyed fields, by dotted path; edges are not entered."""
    spots: list[tuple[str, Spec]] = [("", stage)]
    while spots:
        path, spec = spots.pop()
        yield path, spec
        for name in type(spec).model_fields:
            if not flags(type(spec), name).get("unkeyed"):
                inner = walk(getattr(spec, name), f"{path}.{name}" if path else name)
                spots.extend((where, each) for where, each in inner if not isinstance(each, At))


def _module(spec: Spec) -> str:
    return type(spec).__module__


def _inputs(meta: JSON, node: Node, plan: Plan) -> list[Change]:
    """Inputs that are others than the stored stage's."""
    old = {i["path"]: (i["name"], i["key"], i["port"], i["step"]) for i in meta["inputs"]}
    new = {path: (plan.nodes[k].stage.name, k, port, step) for path, k, port, step in node.inputs}
    found = []
    for path in sorted(old.keys() | new.keys()):
        a, b = old.get(path), new.get(path)
        if a is None or b is None:
            ends = (_full(a) if a else None, _full(b) if b else None)
            said = f"input {path} removed: {a[0]}" if a else f"input {path} added: {b[0] if b else ''}"
            found.append(Change("input", path, *ends, said))
        elif a[1:] != b[1:]:
            fresh = plan.nodes[b[1]].status == "run"
            remade = b[0] if fresh and a[0] == b[0] and a[2:] == b[2:] else ""
            found.append(Change("input", path, _full(a), _full(b), f"input {path} {_moved(a, b, fresh)}", remade))
    return found


Input = tuple[str, str, str, int | None]
"""(name, key, port, step)"""


def _full(each: Input) -> str:
    return f"{each[0]}@{each[1]}:{each[2]}" + (f"@{each[3]}" if each[3] is not None else "")


def _moved(old: Input, new: Input, fresh: bool) -> str:
    """How an input differs, in words; a port or step is named where it does."""
    if old[0] == new[0] and old[2:] == new[2:]:
        return f"changed: {new[0]} {old[1][:8]} → {new[1][:8]}"
    ends = []
    for each in (old, new):
        port = f":{each[2]}" if old[2] != new[2] else ""
        ends.append(f"{each[0]}{port}" + (f"@{each[3]}" if each[3] is not None else ""))
    return f"changed: {ends[0]} → {ends[1]}" + (", which will be made" if fresh else "")


# --- records -----------------------------------------------------------------------------------------------------------


def differences(old: Any, new: Any, known: Mapping[str, type[Spec]] | None = None, path: str = "") -> list[Change]:
    """Fields that differ between two records of a stage (or values in them), by dotted path; names are left out.

    ``known`` (classes by kind) tells which fields are in no key, which then do not count, and the defaults of those that an
    older record lacks. An edge is one value, and so is a list without objects, and an object whose kind differs.
    """
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind") and not _is_edge(old, new):
        cls = (known or {}).get(str(new.get("kind")))
        found = []
        for name in [*new, *(n for n in old if n not in new)]:
            if (name == "name" and not path) or (cls and name in cls.model_fields and _silent(cls, name)):
                continue
            was = old[name] if name in old else _default(cls, name)
            found += differences(was, new.get(name), known, f"{path}.{name}" if path else name)
        return found
    if isinstance(old, list) and isinstance(new, list) and any(isinstance(v, dict) for v in (*old, *new)):
        found = []
        for i in range(max(len(old), len(new))):
            was, now = (v[i] if i < len(v) else None for v in (old, new))
            found += differences(was, now, known, f"{path}.{i}")
        return found
    return [Change("field", path, old, new, _text(path, old, new))]


def classes(*records: JSON) -> dict[str, type[Spec]]:
    """The classes of all kinds in records, by kind, as far as they can still be found."""
    found: dict[str, type[Spec]] = {}
    spots: list[Any] = list(records)
    while spots:
        spot = spots.pop()
        if isinstance(spot, dict) and isinstance(spot.get("kind"), str) and spot["kind"] not in found:
            with suppress(Exception):  # a user's module that is not here, or fails, only tells no defaults
                found[spot["kind"]] = resolve_kind(spot["kind"])
        spots.extend(spot.values() if isinstance(spot, dict) else spot if isinstance(spot, list) else ())
    return found


def _silent(cls: type[Spec], name: str) -> bool:
    """In no key, or in it by content and not by value."""
    return bool(flags(cls, name).get("unkeyed") or flags(cls, name).get("outside"))


def _default(cls: type[Spec] | None, name: str) -> Any:
    if cls is None or name not in cls.model_fields or cls.model_fields[name].is_required():
        return None
    return json.loads(json.dumps(dump(cls.model_fields[name].get_default(call_default_factory=True), lambda spec: None)))


def _is_edge(*values: Any) -> bool:
    return any(isinstance(v, dict) and "ref" in v for v in values)


def _text(path: str, old: Any, new: Any) -> str:
    a, b = word(old), word(new)
    return f"{path} {a} → {b}" if max(len(a), len(b)) <= LONG else f"{path} changed"


def word(value: Any) -> str:
    """A record's value, short: an object by its kind, an edge as ``stage:port@step``."""
    if value is None:
        return "none"
    if isinstance(value, dict) and "ref" in value:
        return f"{value['ref']}:{value.get('port')}" + (f"@{value['step']}" if value.get("step") is not None else "")
    if isinstance(value, dict) and "kind" in value:
        return str(value["kind"]).rpartition(".")[2]
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, list) and not any(isinstance(v, (dict, list)) for v in value):
        return f"[{', '.join(map(word, value))}]"
    return json.dumps(value, ensure_ascii=False)
