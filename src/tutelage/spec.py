"""Spec: a frozen object that is its own configuration, with a JSON form, a fingerprint and overrides.

A spec is parsed and typed by pydantic, compared by identity, and known by its *kind*: the dotted path of its class, short
(``losses.policy.DAPO``) inside this package. A record is the JSON form: every nested spec is an object with a ``kind``.
Fingerprints leave out fields equal to their default (a new field does not invalidate a store; a changed default needs a
version bump) unless a spec in them has raised its version, and fields marked `unkeyed` (names, threads, devices).

Leaves out: edges between stages and their keys (graph.py) and where results live (store.py).
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PACKAGE = __name__.rpartition(".")[0]
ROOMS = ("text", "losses", "credit", "verify", "tasks", "envs", "model", "learn", "rollout", "stages")
ABSTRACT = "Base of "
"""How the docstring of a class begins that is there to be made from and cannot stand in a record itself."""


class UserError(Exception):
    """A mistake in what the user gave; the message names the thing and the fix. The CLI prints it and exits with 2.

    The message is made one line of fewer than 1,000 characters, whatever the user's names and values that stand in it are.
    """

    def __init__(self, says: str):
        line = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in says)
        super().__init__(line if len(line) < 1000 else f"{line[:600]} … {line[-300:]}")


class SpecError(UserError, ValueError):
    """A record, field or kind that is not valid."""


def unkeyed(default: Any = ..., **facts: Any) -> Any:
    """A field that changes where or how fast a stage runs, never what it makes, and so stays out of its key."""
    return Field(default, json_schema_extra={"unkeyed": True}, **facts)


def outside(default: Any = ..., **facts: Any) -> Any:
    """A field that holds a path outside the store; it is keyed by the content found there, not by its name."""
    return Field(default, json_schema_extra={"outside": True}, **facts)


class Spec(BaseModel):
    """Base of everything that can be written in a recipe. Raises `SpecError` on load, pydantic's error on construction."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    version: ClassVar[int] = 1
    """Bump when the class computes something else than before: what it made is then made again."""
    library: ClassVar[str] = ""
    """A distribution that decides what the class makes (a task library's generators and scorers): its version is keyed."""

    @model_validator(mode="after")
    def _no_base(self) -> Self:
        """An object without a ``kind`` is taken for the class of its field, which may be one that does nothing itself."""
        if _is_base(type(self)):
            raise ValueError(f"give it a kind{suggest('', usable(type(self).__name__))}")
        return self

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @classmethod
    def kind(cls) -> str:
        module = cls.__module__.removeprefix(PACKAGE + ".")
        return f"{module}.{cls.__qualname__}"

    def __repr__(self) -> str:  # never walks the graph: a chain of a thousand stages must print too
        return f"<{self.kind()} {getattr(self, 'name', '')}>"

    __str__ = __repr__


def flags(cls: type[Spec], name: str) -> dict[str, Any]:
    extra = cls.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


SHOWN = 12
"""How many valid words a message lists."""


FINDINGS = 3
"""How many of a spec's mistakes a message names."""
DEEPEST = 64
"""Levels of nesting that a record may have; no recipe comes near, and everything that walks a record recurses."""
LARGEST = 2**63
"""Whole numbers of a record are smaller: they are sizes, counts and seeds, and become machine numbers."""


def suggest(word: object, valid: Iterable[str]) -> str:
    """``; did you mean X? valid: ...`` for an unknown word; of many valid ones the nearest."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(word), names, 1, 0.55)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    more = len(names) - SHOWN
    if more > 0:
        match = difflib.SequenceMatcher(b=str(word).lower())
        alike = {}
        for name in names:
            match.set_seq1(name.lower())
            alike[name] = match.ratio()
        names = sorted(names, key=lambda n: (n not in near, -alike[n], n))[:SHOWN]
    return f"{hint} valid: {', '.join(names) or 'none'}" + (f" … and {more} more" if more > 0 else "")


# --- kinds -----------------------------------------------------------------------------------------------------------


@cache
def _source() -> tuple[dict[str, str], dict[str, set[str]], set[str]]:
    """Short class name -> kind and its parents' names, and which names are abstract: every spec class of this package.

    Reads source instead of importing it, so that planning stays fast.
    """
    bases: dict[str, set[str]] = {}
    found: dict[str, str] = {}
    abstract: set[str] = set()
    root = Path(__file__).parent
    for room in ROOMS:
        for file in sorted((root / room).glob("*.py")):
            for node in ast.parse(file.read_text("utf-8")).body:
                parents = {b.id for b in node.bases if isinstance(b, ast.Name)} if isinstance(node, ast.ClassDef) else set()
                if parents and isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    bases[node.name] = parents
                    found[node.name] = f"{room}.{file.stem}.{node.name}"
                    if (ast.get_docstring(node) or "").startswith(ABSTRACT):
                        abstract.add(node.name)
    specs = {"Spec", "Stage"}
    while more := {name for name, parents in bases.items() if name not in specs and parents & specs}:
        specs |= more
    return {name: kind for name, kind in found.items() if name in specs}, bases, abstract


@cache
def kinds() -> dict[str, str]:
    """Short class name -> kind, for every spec class of this package and of ``tutelage.specs`` entry points."""
    found = dict(_source()[0])
    from importlib.metadata import entry_points

    for point in entry_points(group="tutelage.specs"):
        found[point.name] = point.value.replace(":", ".")
    return found


def usable(base: str = "") -> list[str]:
    """Short names of the kinds that may stand in a record; with ``base``, those made from that class where any are known."""
    _, parents, abstract = _source()
    names = [name for name in kinds() if name not in abstract]
    fits = {base}
    while more := {name for name, above in parents.items() if name not in fits and above & fits}:
        fits |= more
    return [name for name in names if name in fits] or names


def _is_abstract(cls: type[Spec]) -> bool:
    """Of the graph's classes only the table is written with a kind."""
    return cls.__name__ != "Table" if cls.__module__ == f"{PACKAGE}.graph" else _is_base(cls)


def _is_base(cls: type[Spec]) -> bool:
    """Bases of this package say so in their docstring."""
    return cls.__module__.startswith(f"{PACKAGE}.") and (cls.__dict__.get("__doc__") or "").startswith(ABSTRACT)


@cache
def _is_ours(module: str) -> bool:
    """Whether the package has a module of that name; a thousand stages of a user's kind ask once."""
    with suppress(ModuleNotFoundError, ValueError):
        return importlib.util.find_spec(module) is not None
    return False


def resolve_kind(kind: str) -> type[Spec]:
    """The class of a kind (``losses.policy.DAPO``) or of a short name (``DAPO``); raises `SpecError`."""
    if not isinstance(kind, str):
        raise SpecError(f"a kind is a word such as losses.policy.GRPO, not {kind!r}")
    path = kinds().get(kind, kind) if "." not in kind else kind
    module, _, name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        module = ""
    for full in (f"{PACKAGE}.{module}", module):
        try:
            if not module or (full.startswith(f"{PACKAGE}.") and not _is_ours(full)) or importlib.util.find_spec(full) is None:
                continue
        except (ModuleNotFoundError, ValueError):
            continue
        cls = getattr(importlib.import_module(full), name, None)
        if isinstance(cls, type) and issubclass(cls, Spec):
            if _is_abstract(cls):
                raise SpecError(f"{cls.kind()} is abstract and does nothing itself{suggest(name, usable(name))}")
            return cls
    raise SpecError(f"unknown kind {kind!r}{suggest(kind.rpartition('.')[2], usable())}")


# --- records ---------------------------------------------------------------------------------------------------------


def dump(value: Any, edge: Callable[[Spec], Any]) -> Any:
    """The JSON form of a spec or field value. ``edge`` writes what it knows (returns None for the rest)."""
    if isinstance(value, Spec):
        written = edge(value)
        if written is not None:
            return written
        fields = {n: dump(getattr(value, n), edge) for n in type(value).model_fields}
        return {"kind": value.kind(), **fields}
    if isinstance(value, (tuple, list)):
        return [dump(v, edge) for v in value]
    if isinstance(value, dict):
        return {k: dump(v, edge) for k, v in value.items()}
    return value


def check_values(value: Any, what: str = "the record", numbers: bool = True) -> None:
    """Raises `SpecError` for JSON that no spec can hold: nested too deep, texts that are no Unicode, and (where ``numbers``
    are looked at) numbers that are too large or not finite. Iterative."""
    spots: list[tuple[Any, str, int]] = [(value, "", 0)]
    while spots:
        spot, at, depth = spots.pop()
        if wrong := _unfit(spot, depth, numbers):
            raise SpecError(f"{at[:200] or what}: {wrong}")
        inner = spot.items() if isinstance(spot, dict) else enumerate(spot) if isinstance(spot, (list, tuple)) else ()
        for k, v in inner:
            where = f"{at}.{k}" if at else str(k)
            spots += [(k, where, depth), (v, where, depth + 1)] if isinstance(k, str) else [(v, where, depth + 1)]


def _unfit(value: Any, depth: int, numbers: bool) -> str:
    """Why a JSON value cannot stand in a record, if anything."""
    if depth > DEEPEST:
        return f"is nested deeper than {DEEPEST} levels; take levels out"
    if numbers and isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number (got {value})"
    if numbers and isinstance(value, int) and abs(value) >= LARGEST:
        return "is too large a number; give one below 2^63"
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        return "holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
    return ""


def load(value: Any, edge: Callable[[dict], Any], where: str = "") -> Any:
    """The inverse of `dump`: objects with a ``kind`` become specs, lists become tuples. Raises `SpecError`."""
    if isinstance(value, dict):
        found = edge(value)
        if found is not None:
            return found
        fields = {k: load(v, edge, f"{where}.{k}" if where else k) for k, v in value.items() if k != "kind"}
        return build(resolve_kind(value["kind"]), fields, where) if "kind" in value else fields
    if isinstance(value, list):
        return tuple(load(v, edge, f"{where}.{i}") for i, v in enumerate(value))
    return value


def build(cls: type[Spec], fields: dict[str, Any], where: str = "") -> Spec:
    """``cls(**fields)``, with an error that names the field, what is valid and the nearest match."""
    try:
        return cls(**fields)
    except ValidationError as error:
        raise SpecError(explain(error, cls, where)) from None


def explain(error: ValidationError, cls: type[BaseModel], where: str = "") -> str:
    """pydantic's findings in one line, in this project's words."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(p) for p in (where, *item["loc"]) if str(p))
        last = str(item["loc"][-1]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown field {path!r}{suggest(last, cls.model_fields)}")
        elif item["type"] == "missing":
            lines.append(f"missing field {path!r}")
        elif item["type"] == "model_type" and isinstance(item["input"], (str, Spec)):
            lines.append(f"{path}: {_misfit(item['input'], item.get('ctx', {}).get('class_name', ''))}")
        else:
            got = item["input"] if isinstance(item["input"], (str, int, float, bool, type(None))) else "..."
            lines.append(f"{path or cls.__name__}: {item['msg']} (got {shown(got)})")
    more = f"; and {len(lines) - FINDINGS} more mistakes" if len(lines) > FINDINGS else ""
    return "; ".join(lines[:FINDINGS]) + more


def shown(value: object) -> str:
    """A value as it would be written, cut."""
    text = "a very large number" if isinstance(value, int) and abs(value) >= LARGEST else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _misfit(given: str | Spec, wanted: str) -> str:
    """Why a word or a spec cannot stand where a class is wanted."""
    if isinstance(given, Spec):
        name = type(given).__name__
        return (
            f"{name} is no {wanted}{suggest(name, usable(wanted))}"
            if wanted != "At"
            else f'{name} is no edge, such as {{"ref": "sft"}}'
        )
    if wanted == "At":
        return f"an edge is written {json.dumps({'ref': given}, ensure_ascii=False)} (got {given!r})"
    return f"unknown kind {given!r}{suggest(given, usable(wanted))}"


# --- fingerprints ----------------------------------------------------------------------------------------------------


def canonical(value: Any, edge: Callable[[Spec], Any]) -> Any:
    """What identifies a value: kinds, versions and non-default keyed fields. ``edge`` as in `dump`."""
    if isinstance(value, Spec):
        written = edge(value)
        if written is not None:
            return written
        cls = type(value)
        form: dict[str, Any] = {"kind": cls.kind(), "version": cls.version, **foreign_code(cls), **library_of(cls)}
        for name, info in cls.model_fields.items():
            fact, flag = getattr(value, name), flags(cls, name)
            if flag.get("unkeyed") or (_is_default(fact, info) and _unmended(fact)):
                continue
            form[name] = content_hash(Path(fact)) if flag.get("outside") else canonical(fact, edge)
        return form
    if isinstance(value, (tuple, list)):
        return [canonical(v, edge) for v in value]
    if isinstance(value, dict):
        return {k: canonical(value[k], edge) for k in sorted(value)}
    return value


def _is_default(fact: Any, info: Any) -> bool:
    return not info.is_required() and _same(fact, info.get_default(call_default_factory=True))


def _unmended(fact: Any) -> bool:
    """Whether no spec inside has raised its version: one that has must show in the key even where it is the default."""
    if isinstance(fact, Spec):
        return type(fact).version == 1 and all(_unmended(getattr(fact, n)) for n in type(fact).model_fields)
    if isinstance(fact, (tuple, list)):
        return all(map(_unmended, fact))
    return all(map(_unmended, fact.values())) if isinstance(fact, dict) else True


def _same(a: Any, b: Any) -> bool:
    """Equal as configurations (specs compare by identity, so their forms are compared)."""
    if isinstance(a, Spec) or isinstance(b, Spec):
        if not (isinstance(a, Spec) and isinstance(b, Spec)):
            return False
        return a is b or (type(a) is type(b) and all(_same(getattr(a, n), getattr(b, n)) for n in type(a).model_fields))
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a == b


def digest(form: Any) -> str:
    """Hex digest of a JSON form."""
    text = json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()  # damaged files are hashed too


@cache
def library_of(cls: type[Spec]) -> dict[str, str]:
    """The version of the library that decides what a class makes, where it names one."""
    from importlib.metadata import version

    return {"library": f"{cls.library} {version(cls.library)}"} if cls.library else {}


@cache
def foreign_code(cls: type) -> dict[str, str]:
    """User classes are keyed by the source of their module; ours by their version."""
    if cls.__module__.partition(".")[0] == PACKAGE:
        return {}
    try:
        source = inspect.getsource(sys.modules[cls.__module__])
    except (OSError, TypeError):
        return {}
    return {"code": hashlib.blake2b(source.encode(), digest_size=16).hexdigest()}


def content_hash(path: Path, leave_out: Iterable[str] = ()) -> str:
    """Digest of a file, or of a folder's relative names and bytes, but for the names left out. Raises `UserError` where
    nothing is."""
    return joint_hash(file_hashes(path, leave_out))


def file_hashes(path: Path, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """Hex digest of a file (under the name ""), or of each file of a folder by its relative name. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give the path of a file or folder that does")
    found = {}
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix() if file != path else ""
        if not name or name not in leave_out:
            try:
                with file.open("rb") as handle:
                    found[name] = hashlib.file_digest(handle, "blake2b").hexdigest()
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror}") from None
    return found


def joint_hash(hashes: dict[str, str]) -> str:
    """One digest of files by name, as `content_hash` gives it for their folder."""
    total = hashlib.blake2b(digest_size=16)
    for name, digest in hashes.items():
        total.update(name.encode() + b"\0" + bytes.fromhex(digest))
    return total.hexdigest()


# --- overrides -------------------------------------------------------------------------------------------------------


def parse_set(expression: str) -> tuple[str, Any]:
    """``a.b=value`` -> (``a.b``, value); the value is JSON where it parses as JSON, else text."""
    path, eq, text = expression.partition("=")
    if not eq or not path.strip():
        raise SpecError(f"--set {expression!r} is not of the form path=value, such as sft.steps=200")
    try:
        return path.strip(), json.loads(text)
    except (ValueError, RecursionError):
        return path.strip(), text


def override(record: dict[str, Any], path: str, value: Any) -> None:
    """Sets ``stage.field.sub`` in the stages of a record, in place. Raises `SpecError` naming what is there."""
    stages = record["stages"]
    name, *rest = path.split(".")
    for cut in range(len(path.split(".")), 0, -1):  # stage names may hold dots
        head = ".".join(path.split(".")[:cut])
        if head in stages:
            name, rest = head, path.split(".")[cut:]
            break
    else:
        raise SpecError(f"unknown stage {name!r} in --set {path}{suggest(name, stages)}")
    if not rest:
        raise SpecError(f"--set {path}: name a field of the stage{suggest('', stages[name])}")
    if rest == ["name"]:
        raise SpecError(f"--set {path}: a stage's name cannot be set; it is its key in stages")
    spot, at = stages[name], name
    for part in rest[:-1]:
        spot, at = _enter(spot, part, path, at), part
    _enter(spot, rest[-1], path, at)
    if isinstance(value, str) and value in kinds() and isinstance(spot, dict):
        value = kinds()[value] if rest[-1] == "kind" else {"kind": kinds()[value]}
    if isinstance(spot, list):
        spot[int(rest[-1])] = value
    else:
        spot[rest[-1]] = value


def _enter(spot: Any, part: str, path: str, at: str) -> Any:
    if isinstance(spot, list) and part.isdigit() and int(part) < len(spot):
        return spot[int(part)]
    if isinstance(spot, dict) and part in spot:
        return spot[part]
    if isinstance(spot, list):
        which = {0: "no items", 1: "1 item (0)"}.get(len(spot), f"{len(spot)} items (0 to {len(spot) - 1})")
        raise SpecError(f"unknown field {part!r} in --set {path}; {at} has {which}")
    valid = [k for k in spot if k != "kind"] if isinstance(spot, dict) else []
    raise SpecError(f"unknown field {part!r} in --set {path}{suggest(part, valid)}")


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Spec]]:
    """Every spec directly inside a value, with its dotted path; does not enter the specs it yields."""
    if isinstance(value, Spec):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, v in enumerate(value):
            yield from walk(v, f"{path}.{i}" if path else str(i))
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from walk(v, f"{path}.{k}" if path else str(k))
