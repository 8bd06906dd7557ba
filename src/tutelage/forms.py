"""What the store's JSON files hold: whether an ``artifact.json`` or a run is what this package writes.

Files are written by this package and read by it, but disks, editors and older versions come between. Whoever reads one can
rely on the fields below being absent or of the type they have here. Leaves out: fields that nothing reads, and whether what
they say is true (upkeep.py).
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

STRICT = ConfigDict(strict=True)
Name = Annotated[str, Field(pattern=r"^[^./\x00][^/\x00]{0,199}$")]
Number = Annotated[int | float, Field(gt=-1e30, lt=1e30)]
"""Small enough that sums and ratios stay finite."""
Time = Annotated[int | float, Field(ge=0, lt=1e11)]
"""Unix time or seconds; calendars end soon after."""
Whole = Annotated[int, Field(gt=-(2**63), lt=2**63)]
Objects = dict[str, Any]


class _Ref(TypedDict):
    ref: str


@with_config(STRICT)
class Edge(_Ref, total=False):
    port: Name | None
    step: Whole | None


def _edges_are_edges(stage: Objects) -> Objects:
    """Whatever of a stage's record has a ``ref``, however deep, is an edge."""
    spots: list[Any] = [stage]
    while spots:
        spot = spots.pop()
        if isinstance(spot, dict):
            if isinstance(spot.get("ref"), str):
                _adapter(Edge).validate_python(spot)
            spots.extend(spot.values())
        elif isinstance(spot, list):
            spots.extend(spot)
    return stage


@with_config(STRICT)
class Table(TypedDict, total=False):
    rows: dict[str, dict[str, Edge]] | None
    before: str | None
    after: str | None
    teachers: dict[str, str] | None
    controls: list[str] | None
    sources: dict[str, Edge] | None


@with_config(STRICT)
class Record(TypedDict, total=False):
    stages: dict[str, Annotated[Objects, AfterValidator(_edges_are_edges)]]
    table: Table | None


@with_config(STRICT)
class Goal(TypedDict, total=False):
    seed: Whole
    record: Record | None
    keys: dict[str, Name] | None


@with_config(STRICT)
class Run(TypedDict, total=False):
    """A file of ``runs``."""

    recipe: str | None
    state: str | None
    arguments: Objects | None
    argv: list[str] | None
    started: Time | None
    finished: Time | None
    seconds: Time | None
    failed: dict[str, str] | None
    goals: list[Goal] | None


class _Source(TypedDict):
    path: str
    key: Name
    port: Name
    name: str


@with_config(STRICT)
class Input(_Source, total=False):
    step: Whole | None


@with_config(STRICT)
class Output(TypedDict, total=False):
    kind: str


@with_config(STRICT)
class Cost(TypedDict, total=False):
    flops: Number
    tokens: dict[str, Number]


class _Made(TypedDict):
    key: Name
    name: str
    inputs: list[Input]


@with_config(STRICT)
class Artifact(_Made, total=False):
    """An ``artifact.json``."""

    kind: str
    version: Whole
    seed: Whole | None
    record: Objects
    outputs: dict[str, Output]
    facts: Objects
    cost: Cost
    estimate: Number
    seconds: Time
    started: Time
    finished: Time
    host: str
    versions: Objects
    marks: dict[str, Objects]
    code: str
    threads: Whole
    device: str
    content: dict[str, str]


@with_config(ConfigDict(strict=True, extra="forbid"))
class Spent(TypedDict):
    flops: Number
    tokens: dict[str, Number]


class _State(TypedDict):
    step: Annotated[int, Field(ge=0, lt=2**63)]
    metrics: Annotated[int, Field(ge=0, lt=2**63)]
    cost: Spent
    facts: Objects
    seconds: Time


@with_config(ConfigDict(strict=True, extra="forbid"))
class Checkpoint(_State, total=False):
    """A ``context.json``; older ones have no hashes."""

    content: str
    seal: str


Keys = dict[str, Name]
"""stage -> key"""


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def unfit(value: Any, form: Any) -> str:
    """Where a value is not of a form, and what is needed there; nothing where it is."""
    try:
        _adapter(form).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    return ""
