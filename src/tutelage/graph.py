"""The graph of a recipe: stages, the edges between them, keys, records and the plan. No torch.

A *recipe* is a function that returns `Goals`. A *stage* is a spec whose fields may hold edges (`At`) to ports of other
stages. `plan` orders stages, proves types before any weight loads, and says what is stored, what will run and why.
Everything here is iterative: a chain of a thousand stages must not meet the recursion limit.

Leaves out: running (run.py), storing (store.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from tutelage.spec import (
    Spec,
    SpecError,
    build,
    canonical,
    check_values,
    digest,
    dump,
    load,
    resolve_kind,
    suggest,
    unkeyed,
    walk,
)

Kind = Literal["model", "data", "scores"]


@dataclass(frozen=True)
class ModelType:
    """What is known of a model before it exists."""

    architecture: str
    tokenizer_key: str
    """Digest of what decides the token ids: student and teacher must agree."""
    template_key: str
    """Digest of the chat template: likewise."""
    params: int
    """N: matmul parameters with the output head, without the embedding look-up (the N of FLOP counts)."""
    vocab: int
    head: Literal["causal", "score", "value", "remote"] = "causal"
    base_key: str = ""
    """Of an adapter, its base: KEY/PORT of its stage, @STEP for a checkpoint; of an import, the folder's content."""
    adapter: bool = False
    """Whether it is the adapter alone; ``params`` and ``vocab`` are then its base's."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the stage's series that an edge may name."""


@dataclass(frozen=True)
class DataType:
    """What is known of a dataset before it exists."""

    columns: tuple[str, ...]
    domains: tuple[str, ...]
    rows: int = 0
    """Upper bound on the number of rows, for estimates; 0 where unknown."""
    signals: tuple[str, ...] = ()
    tokenizer_key: str = ""


@dataclass(frozen=True)
class ScoresType:
    """Per-task scores of one checkpoint in one domain."""

    domain: str


Type = ModelType | DataType | ScoresType


class Stage(Spec):
    """One step of a recipe: turns artifacts into artifacts.

    `infer` runs at plan time and raises `SpecError` naming the fix; `run` gets a `tutelage.context.Context`.
    """

    name: str = unkeyed()
    threads: int = unkeyed(1, ge=1)
    """CPU threads, fixed and recorded: the bits of a result depend on them, its key does not."""

    outputs: ClassVar[dict[str, Kind]] = {}
    verb: ClassVar[str] = "makes"
    """How the report names this stage's part in the graph (trains, samples, scores, ...)."""
    on_device: ClassVar[bool] = False
    """Whether `run` computes on ``ctx.device`` where that is an accelerator; such stages take turns there."""
    holds_models: ClassVar[bool] = False
    """Whether `run` reads or makes models on the processor: as those on a device, it is given to a worker that has torch."""

    def out(self, port: str | None = None, step: int | None = None) -> At:
        """An edge from this stage; the only port may be left out."""
        if port is None and len(self.outputs) > 1:
            raise SpecError(f"stage {self.name!r} has ports {', '.join(self.outputs)}: name one")
        return At(of=self, port=port or next(iter(self.outputs)), step=step)

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        """The type of every port. Raises `SpecError` where the inputs do not fit, naming the fix."""
        raise TypeError(f"{type(self).__name__} does not say what it makes")

    def estimate(self, types: Callable[[At], Type]) -> float:
        """Algorithmic FLOPs that `run` will spend, roughly; 0 where it trains and samples nothing."""
        return 0.0

    def run(self, ctx: Any) -> None:
        """Fills ``ctx.output(port)`` for every port."""
        raise TypeError(f"{type(self).__name__} cannot run")


class At(Spec):
    """An edge: a port of a stage, or with ``step`` a checkpoint of its series."""

    of: Stage
    port: str
    step: int | None = None


class Table(Spec):
    """How evaluations become the recipe's table."""

    rows: dict[str, dict[str, At]]
    """checkpoint label -> domain -> edge to scores; in display order."""
    before: str = ""
    """The row of the checkpoint that enters distillation; a table without a distillation leaves these three out."""
    after: str = ""
    """The row of the student."""
    teachers: dict[str, str] = {}
    """domain -> the row of its teacher."""
    taught_by: dict[str, dict[str, str]] = {}
    """method -> domain -> the row of its own teacher, where those are not ``teachers``."""
    controls: tuple[str, ...] = ()
    """Rows that are controls."""
    methods: tuple[str, ...] = ()
    """Rows that consolidate the same teachers in other ways, in display order; ``after``, one of them, is the reference."""
    sources: dict[str, At] = {}
    """row -> the checkpoint it measures; what names the column's stage and parent."""


class Goals(Spec):
    """What a recipe returns: the stages to reach, and the table to draw from them."""

    recipe: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """names its runs, so a word"""
    stages: tuple[At, ...]
    table: Table | None = None
    seed: int = 0


# --- edges, order, keys ------------------------------------------------------------------------------------------------


def edges(stage: Spec) -> Iterator[tuple[str, At]]:
    """Every edge held by a spec, with the dotted path of the field that holds it."""
    spots = [("", stage)]
    while spots:
        path, spot = spots.pop()
        for name in type(spot).model_fields:
            for where, inner in walk(getattr(spot, name), f"{path}{name}"):
                if isinstance(inner, At):
                    yield where, inner
                else:
                    spots.append((f"{where}.", inner))


_inputs_memo: dict[int, tuple[Stage, list[tuple[str, At]]]] = {}


def inputs(stage: Stage) -> list[tuple[str, At]]:
    """`edges` of a stage, memoised and ordered by path."""
    if id(stage) not in _inputs_memo:
        _inputs_memo[id(stage)] = (stage, sorted(edges(stage), key=lambda e: e[0]))
    return _inputs_memo[id(stage)][1]


def order(stages: Iterable[Stage]) -> list[Stage]:
    """All stages that the given ones need, inputs first, each once. Specs are frozen, so no cycle can be built."""
    done: dict[int, Stage] = {}
    stack = [(s, False) for s in reversed(list(stages))]
    while stack:
        stage, ready = stack.pop()
        if id(stage) in done:
            continue
        if ready:
            done[id(stage)] = stage
        else:
            stack.append((stage, True))
            stack.extend((at.of, False) for _, at in reversed(inputs(stage)) if id(at.of) not in done)
    return list(done.values())


_key_memo: dict[int, tuple[Stage, str]] = {}


def key(stage: Stage) -> str:
    """The stage's key: its kind, version, keyed fields and its inputs' keys. Memoised; visits only what has none yet."""
    stack = [stage]
    while stack:
        each = stack[-1]
        fresh = [at.of for _, at in inputs(each) if id(at.of) not in _key_memo]
        if fresh and id(each) not in _key_memo:
            stack.extend(fresh)
            continue
        stack.pop()
        if id(each) not in _key_memo:  # the memo holds the stage too, so that its id stays taken
            _key_memo[id(each)] = (each, digest(canonical(each, _key_edge)))
    return _key_memo[id(stage)][1]


def _key_edge(spec: Spec) -> Any:
    return ["at", _key_memo[id(spec.of)][1], spec.port, spec.step] if isinstance(spec, At) else None


# --- records -----------------------------------------------------------------------------------------------------------


def record(goals: Goals) -> dict[str, Any]:
    """The resolved recipe as JSON: ``{recipe, seed, stages: {name: ...}, goals, table}``; `from_record` loads it back."""

    def edge(spec: Spec) -> Any:
        if isinstance(spec, At):
            return {"ref": spec.of.name, "port": spec.port, "step": spec.step}
        return None

    stages: dict[str, Any] = {}
    for stage in order(at.of for at in all_goals(goals)):
        if stage.name in stages:
            raise SpecError(f"two stages of recipe {goals.recipe!r} are named {stage.name!r}; names must differ")
        stages[stage.name] = dump(stage, edge)
    return {
        "recipe": goals.recipe,
        "seed": goals.seed,
        "stages": stages,
        "goals": [edge(at) for at in goals.stages],
        "table": dump(goals.table, edge) if goals.table else None,
    }


def all_goals(goals: Goals) -> list[At]:
    """Every edge the goals name, the table's too."""
    table = [at for _, at in edges(goals.table)] if goals.table else []
    return [*goals.stages, *table]


def from_record(rec: dict[str, Any]) -> Goals:
    """Builds the goals of a record. Raises `SpecError` for an unknown stage, field, kind or reference, or a cycle."""
    check_values(rec)
    for part in ("recipe", "stages", "goals"):
        if part not in rec:
            raise SpecError(f"the record has no {part!r}; a recipe record holds recipe, stages and goals")
    raw: dict[str, Any] = rec["stages"]
    if not isinstance(raw, dict) or not isinstance(rec["goals"], list):
        raise SpecError("a record's 'stages' is an object of stages by name, and its 'goals' a list of edges")
    for name, each in raw.items():
        if not isinstance(each, dict) or "kind" not in each:
            raise SpecError(f"stage {name!r} of the record is not an object with a 'kind'")
    built: dict[str, Stage] = {}
    opened: set[str] = set()

    def edge(value: dict) -> At | None:
        if "ref" not in value:
            return None
        if not isinstance(value["ref"], str) or value["ref"] not in raw:
            raise SpecError(f"unknown stage {value['ref']!r}{suggest(value['ref'], raw)}")
        of = built[value["ref"]]
        made = build(At, {"port": next(iter(of.outputs), ""), **{k: v for k, v in value.items() if k != "ref"}, "of": of})
        assert isinstance(made, At)
        return made

    stack = list(reversed(raw))
    while stack:
        name = stack[-1]
        missing = [r for r in _refs(raw[name]) if r in raw and r not in built]
        if name in built or not missing:
            stack.pop()
            if name not in built:
                cls = resolve_kind(raw[name]["kind"])
                if not issubclass(cls, Stage):
                    raise SpecError(f"{name!r} is not a stage but a {cls.kind()}; give it the kind of one")
                built[name] = load({**raw[name], "name": name}, edge, name)
        elif name in opened and any(m in opened and m in stack for m in missing):
            raise SpecError(f"stage {name!r} needs itself, through {missing[0]!r}")
        else:
            opened.add(name)
            stack.extend(missing)
    table = load(rec["table"], edge, "table") if rec.get("table") else None
    reached = tuple(load(g, edge, f"goals.{i}") for i, g in enumerate(rec["goals"]))
    goals = build(Goals, {"recipe": rec["recipe"], "seed": rec.get("seed", 0), "table": table, "stages": reached}, "record")
    assert isinstance(goals, Goals)
    return goals


def _refs(value: Any) -> Iterator[str]:
    spots = [value]
    while spots:
        spot = spots.pop()
        if isinstance(spot, dict):
            if isinstance(spot.get("ref"), str):
                yield spot["ref"]
            spots.extend(spot.values())
        elif isinstance(spot, list):
            spots.extend(spot)


# --- the plan ----------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """One stage of a plan. Equal stages of several goals are one node."""

    key: str
    stage: Stage
    label: str
    inputs: list[tuple[str, str, str, int | None]]
    """(field path, key, port, step)"""
    types: dict[str, Type]
    flops: float
    status: Literal["stored", "run", "unneeded"] = "run"
    why: str = ""


@dataclass
class Plan:
    """Nodes in running order, and where each goal's stages lie in it."""

    nodes: dict[str, Node] = field(default_factory=dict)
    goals: list[Goals] = field(default_factory=list)

    @property
    def todo(self) -> list[Node]:
        return [n for n in self.nodes.values() if n.status == "run"]


def plan(goals: Sequence[Goals], has: Callable[[str], bool]) -> Plan:
    """Orders, types and keys everything the goals need; ``has(key)`` tells what is stored. Raises `SpecError`."""
    made = Plan(goals=list(goals))
    types: dict[tuple[str, str], Type] = {}

    def typed(at: At) -> Type:
        found = types.get((key(at.of), at.port))
        if found is None:
            raise SpecError(f"stage {at.of.name!r} has no port {at.port!r}{suggest(at.port, at.of.outputs)}")
        if at.step is not None and not (isinstance(found, ModelType) and at.step in found.checkpoints):
            steps = ", ".join(map(str, getattr(found, "checkpoints", ()))) or "none"
            raise SpecError(f"stage {at.of.name!r} keeps no checkpoint of step {at.step}; kept steps: {steps}")
        return found

    for one in goals:
        names: dict[str, Stage] = {}
        for stage in order(at.of for at in all_goals(one)):
            if names.setdefault(stage.name, stage) is not stage:
                raise SpecError(f"two stages of recipe {one.recipe!r} are named {stage.name!r}; names must differ")
            mine = key(stage)
            if mine in made.nodes:
                continue
            try:
                for _, at in inputs(stage):
                    typed(at)
                outs = stage.infer(typed)
                flops = stage.estimate(typed)
            except SpecError as error:
                raise SpecError(f"stage {stage.name!r}: {error}") from None
            types.update({(mine, port): t for port, t in outs.items()})
            ins = [(path, key(at.of), at.port, at.step) for path, at in inputs(stage)]
            made.nodes[mine] = Node(mine, stage, stage.name, ins, outs, flops)
        for at in all_goals(one):
            typed(at)
        if one.table:
            _check_table(one.table)
    _label(made)
    _mark(made, {key(at.of) for one in goals for at in all_goals(one)}, has)
    return made


def _check_table(table: Table) -> None:
    """Raises `SpecError` where the table names a row or a domain that it does not have, or methods without a reference."""
    named = {where: row for where, row in (("before", table.before), ("after", table.after)) if row}
    named |= {f"teachers.{d}": row for d, row in table.teachers.items()}
    named |= {f"controls.{i}": row for i, row in enumerate(table.controls)} | {f"sources.{r}": r for r in table.sources}
    named |= {f"methods.{i}": row for i, row in enumerate(table.methods)}
    named |= {f"taught_by.{m}.{d}": row for m, of in table.taught_by.items() for d, row in of.items()}
    for where, row in named.items():
        if row not in table.rows:
            raise SpecError(f"table.{where} names row {row!r}, which the table does not have{suggest(row, table.rows)}")
    domains = {d for cells in table.rows.values() for d in cells}
    for domain in table.teachers:
        if domain not in domains:
            raise SpecError(f"table.teachers names domain {domain!r}, which no row has{suggest(domain, domains)}")
    for method, of in table.taught_by.items():
        if method not in table.methods:
            raise SpecError(f"table.taught_by names {method!r}, which is no method{suggest(method, table.methods)}")
        if of.keys() != table.teachers.keys():
            raise SpecError(f"table.taught_by.{method} must name a teacher for each of {', '.join(table.teachers)}")
    if table.methods and table.after not in table.methods:
        raise SpecError(
            f"table.methods does not name the table's after, {table.after!r}; the other methods are measured against it"
        )
    for row in table.methods:
        if table.methods.count(row) > 1:
            raise SpecError(f"table.methods names row {row!r} twice; name it once")


def _label(made: Plan) -> None:
    """Nodes of one name and several keys (replicate seeds) get their seed as a suffix."""
    by_name: dict[str, list[Node]] = {}
    for node in made.nodes.values():
        by_name.setdefault(node.stage.name, []).append(node)
    seed_of: dict[str, int] = {}
    for one in made.goals:
        for stage in order(at.of for at in all_goals(one)):
            seed_of.setdefault(key(stage), one.seed)
    for name, nodes in by_name.items():
        if len(nodes) > 1:
            for node in nodes:
                node.label = f"{name}@{seed_of[node.key]}"


def _mark(made: Plan, wanted: set[str], has: Callable[[str], bool]) -> None:
    needed = set(wanted)
    for node in reversed(list(made.nodes.values())):
        stored = has(node.key)
        if stored:
            node.status, node.why = "stored", "made before"
        elif node.key in needed:
            node.status = "run"
            needed.update(k for _, k, _, _ in node.inputs)
        else:
            node.status, node.why = "unneeded", "everything made from it is stored"
    for node in made.todo:
        fresh = [made.nodes[k].label for _, k, _, _ in node.inputs if made.nodes[k].status == "run"]
        node.why = f"waits for {', '.join(dict.fromkeys(fresh))}" if fresh else "not in the store"
