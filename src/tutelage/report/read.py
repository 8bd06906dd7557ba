"""Reading a run from the store: the record's graph, scores, replies and tasks.

What an edge is for (start, teacher, data, ...) is read from the path of the field that holds it (ancestry.py). Everything
here is tolerant: what is not there yet reads as nothing.

Leaves out: what the numbers mean (data.py, stats.py) and drawing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tutelage.ancestry import part, part_detail
from tutelage.store import Store

JSON = dict[str, Any]


# --- the run and its graph -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edge:
    """An edge of a record: the field that holds it, and what it names."""

    path: str
    ref: str
    port: str
    step: int | None

    @property
    def role(self) -> str:
        """``start`` | ``teacher`` | ``data`` | ``scored by`` | ``reference`` | ``budget``: by the path, then the port."""
        return part(self.path, self.port)

    @property
    def detail(self) -> str:
        """What the path adds to the role: ``sum`` of ``credit.teachers.sum``."""
        return part_detail(self.path, self.port)

    @property
    def label(self) -> str:
        return self.ref if self.step is None else f"{self.ref}@{self.step}"


@dataclass(frozen=True)
class Table:
    """The recipe's table; empty where the recipe has none."""

    rows: dict[str, dict[str, Edge]] = field(default_factory=dict)
    """row -> domain -> scores"""
    before: str = ""
    after: str = ""
    teachers: dict[str, str] = field(default_factory=dict)
    """domain -> row"""
    controls: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    sources: dict[str, Edge] = field(default_factory=dict)
    """row -> the checkpoint it measures"""
    taught_by: dict[str, dict[str, str]] = field(default_factory=dict)
    """method -> domain -> row, where its teachers are others than ``teachers``"""

    def teachers_of(self, row: str) -> dict[str, str]:
        """domain -> the row of its teacher, for one method"""
        return self.taught_by.get(row) or self.teachers

    def role(self, row: str) -> str:
        """``before`` | ``after`` | ``teacher`` | ``control`` | ``method`` | nothing"""
        named = {self.before: "before", self.after: "after"}
        teacher = "teacher" if row in self.teachers.values() else ""
        return named.get(row) or teacher or ("control" if row in self.controls else "method" if row in self.methods else "")


def as_table(record: JSON) -> Table:
    raw = record.get("table") or {}
    return Table(
        {r: {d: as_edge(d, e) for d, e in by.items()} for r, by in (raw.get("rows") or {}).items()},
        raw.get("before") or "",
        raw.get("after") or "",
        raw.get("teachers") or {},
        tuple(raw.get("controls") or ()),
        tuple(raw.get("methods") or ()),
        {r: as_edge(r, e) for r, e in (raw.get("sources") or {}).items()},
        raw.get("taught_by") or {},
    )


@dataclass
class Replicate:
    """One goal of a run: a recipe at a seed."""

    seed: int
    record: JSON
    keys: dict[str, str]

    @cached_property
    def edges(self) -> dict[str, list[Edge]]:
        """stage -> its incoming edges, by field path"""
        return {n: sorted(find_edges(s), key=lambda e: e.path) for n, s in self.record.get("stages", {}).items()}

    @cached_property
    def table(self) -> Table:
        return as_table(self.record)

    @cached_property
    def evaluations(self) -> set[str]:
        """Stages that only measure: the ones the table names, and the ones of their kind."""
        named = {e.ref for row in self.table.rows.values() for e in row.values()}
        stages = self.record.get("stages", {})
        return {n for n, s in stages.items() if n in named or ".evaluate." in str(s.get("kind", ""))}

    @cached_property
    def one_name(self) -> dict[str, str]:
        """stage -> the first stage that is the same artifact: equal stages may go by several names"""
        first: dict[str, str] = {}
        return {n: first.setdefault(self.keys.get(n) or n, n) for n in self.record.get("stages", {})}

    def parents(self, stage: str) -> list[Edge]:
        """What a stage starts from."""
        return [e for e in self.edges.get(stage, []) if e.role == "start"]

    def above(self, stage: str) -> set[str]:
        """A stage and everything it was made from (not what only bounds its compute)."""
        done: set[str] = set()
        stack = [stage]
        while stack:
            each = stack.pop()
            if each not in done:
                done.add(each)
                stack.extend(e.ref for e in self.edges.get(each, []) if e.role != "budget")
        return done

    def source(self, row: str) -> Edge | None:
        """The checkpoint that a row of the table measures."""
        if row in self.table.sources:
            return self.table.sources[row]
        for edge in self.table.rows.get(row, {}).values():
            return next(iter(self.parents(edge.ref)), edge)
        return None


@dataclass
class Run:
    """A run of the store."""

    name: str
    body: JSON
    replicates: list[Replicate] = field(default_factory=list)

    @property
    def table(self) -> Table:
        return next((r.table for r in self.replicates if r.table.rows), Table())

    @property
    def first(self) -> Replicate:
        return self.replicates[0] if self.replicates else Replicate(0, {}, {})


def load(store: Store, run_name: str) -> Run:
    """A run by name, recipe or ``last``. Raises `UserError`."""
    body = store.load_run(run_name)
    goals = body.get("goals") or []
    replicates = [Replicate(g.get("seed", 0), g.get("record") or {}, g.get("keys") or {}) for g in goals]
    return Run(body["run"], body, replicates)


def as_edge(path: str, value: JSON) -> Edge:
    return Edge(path, value["ref"], value.get("port") or "policy", value.get("step"))


def find_edges(value: Any, path: str = "") -> Iterator[Edge]:
    """Every edge inside a record's value, with the dotted path of its field."""
    if isinstance(value, dict):
        if isinstance(value.get("ref"), str):
            yield as_edge(path, value)
            return
        for name, inner in value.items():
            yield from find_edges(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from find_edges(inner, f"{path}.{i}" if path else str(i))


# --- scores --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One evaluation: ``values`` by task."""

    values: dict[str, float]
    errors: int


def read_scores(store: Store, key: str, port: str, step: int | None) -> Measured | None:
    """The scores of an evaluation; several replies to one task are averaged. None where there are none yet."""
    file = store.path(key, port, step) / "scores.parquet"
    if not key or not store.has(key) or not file.exists():
        return None
    import pyarrow.parquet as pq

    have = pq.read_schema(file).names
    columns = pq.read_table(file, columns=[c for c in ("task", "value", "error") if c in have]).to_pydict()
    values = [0.0 if v is None or math.isnan(v) else float(v) for v in columns["value"]]
    by_task: dict[str, list[float]] = {}
    for task, value in zip(columns["task"], values, strict=True):
        by_task.setdefault(str(task), []).append(value)
    errors = sum(bool(e) for e in columns.get("error", []))
    return Measured({t: sum(v) / len(v) for t, v in by_task.items()}, errors)


# --- transcripts ---------------------------------------------------------------------------------------------------------


def transcripts(store: Store, run: Run, each: int = 1) -> list[JSON]:
    """Tasks of every domain with the replies of the student and of the checkpoint before, at the first seed.

    Taken are the first ``each`` that the student got right and the first it got wrong, in the order of a hash of the
    task's id, so that nobody picked them.
    """
    table, first = run.table, run.first
    found: list[JSON] = []
    for domain in [*table.teachers] or [*table.rows.get(table.after, {})]:
        edges = {role: table.rows.get(row, {}).get(domain) for role, row in (("after", table.after), ("before", table.before))}
        shown = {role: read_replies(store, first, edge) if edge else {} for role, edge in edges.items()}
        for right in (True, False):
            fits = [t for t, r in shown["after"].items() if (r["value"] >= 1) == right and r.get("reply") is not None]
            for task in sorted(fits, key=lambda t: zlib.crc32(t.encode()))[:each]:
                asked = shown["after"][task]["asked"]
                if edges["after"] and not asked.get("prompt"):
                    asked = {**asked, **read_task(store, first, edges["after"].ref, task)}
                replies = {role: shown[role].get(task) for role in ("after", "before")}
                found.append({"domain": domain, "task": task, "right": right, **asked, **replies})
    return found


def read_replies(store: Store, each: Replicate, edge: Edge) -> JSON:
    """task -> {value, reply, error, tokens, asked} of an evaluation; the first reply where there are several."""
    import pyarrow.parquet as pq

    key = each.keys.get(edge.ref, "")
    file = store.path(key, edge.port, edge.step) / "scores.parquet"
    if not key or not store.has(key) or not file.exists():
        return {}
    found: JSON = {}
    for row in pq.read_table(file).to_pylist():
        reply = {k: row[k] for k in ("reply", "error", "tokens") if k in row}
        asked = {k: row[k] for k in ("prompt", "gold") if row.get(k) is not None}
        found.setdefault(str(row["task"]), {"value": row.get("value") or 0.0, **reply, "asked": asked})
    return found


def read_task(store: Store, each: Replicate, evaluation: str, task: str) -> JSON:
    """A held-out task's prompt and gold answer, from the data that its evaluation read."""
    import pyarrow.parquet as pq

    for source in each.edges.get(evaluation, []):
        key = each.keys.get(source.ref, "")
        if source.role != "data" or not key or not store.has(key):
            continue
        for file in sorted(store.path(key, source.port, source.step).glob("*.parquet")):
            have = pq.read_schema(file).names
            wanted = [c for c in ("prompt", "messages", "gold") if c in have]
            if "id" in have and wanted:
                for row in pq.read_table(file, columns=wanted, filters=[("id", "=", task)]).to_pylist():
                    return {"prompt": row.get("prompt") or row.get("messages"), "gold": row.get("gold")}
    return {}
