"""Recipes by name: found by reading source, called with the user's arguments, edited by ``--set``.

A recipe is a function named like its module (``recipes/quickstart.py`` holds ``quickstart(seed=0, ...) -> Goals``); the first
line of its docstring describes it. Others come from ``tutelage.recipes`` entry points, from a Python file given by path, or
as JSON: a record, a run of a store (``runs/RUN.json``), or what ``tutelage plan --json`` prints. Only the chosen one is
imported.

Leaves out: planning (graph.py) and running (run.py).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from tutelage.graph import Goals, all_goals, from_record, record
from tutelage.spec import Spec, SpecError, UserError, explain, override, parse_set, resolve_kind, suggest


@dataclass(frozen=True)
class Recipe:
    name: str
    description: str
    where: str
    """``module:function``"""


@dataclass(frozen=True)
class Chosen:
    """What the user asked for: one `Goals` a seed."""

    name: str
    goals: list[Goals]
    arguments: dict[str, Any]


def recipes() -> dict[str, Recipe]:
    """Every recipe there is, by name."""
    found: dict[str, Recipe] = {}
    home = Path(__file__).parent / "recipes"
    for file in sorted(home.rglob("[!_]*.py"), key=lambda f: (len(f.parts), f)):
        text = _describe(file, file.stem)
        if text is not None:
            way = file.relative_to(home).with_suffix("").parts
            found["/".join(way)] = Recipe("/".join(way), text, f"tutelage.recipes.{'.'.join(way)}:{file.stem}")
    for point in entry_points(group="tutelage.recipes"):
        module, _, function = point.value.partition(":")
        text = None
        with suppress(UserError, ImportError, ValueError):  # another package's broken recipe is told when it is chosen
            spec = importlib.util.find_spec(module)
            text = _describe(Path(spec.origin), function) if spec and spec.origin else None
        found[point.name] = Recipe(point.name, text or "", point.value)
    return found


def _describe(file: Path, function: str) -> str | None:
    """The first docstring line of a function in a file, without importing it; None where there is no such function.

    Raises `UserError` for a file that is not Python.
    """
    try:
        body = ast.parse(file.read_bytes()).body  # bytes, so that a declared encoding counts
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{file}{line}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file} cannot be parsed: {error}") from None
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return None


def choose(text: str, sets: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Chosen:
    """The goals of a recipe by name or path. Raises `UserError` for whatever the user got wrong."""
    path = Path(text)
    if path.suffix == ".json":
        name, goals, arguments = _from_json(path, sets, seeds)
    else:
        name, goals, arguments = _from_function(text, sets, seeds or [0])
    for one in goals:
        if not all_goals(one):
            raise SpecError(f"recipe {one.recipe!r} has no goals; its goals, or its table, name the stages to make")
    given = {**arguments, "seeds": [g.seed for g in goals], "set": list(sets)}
    return Chosen(name, goals, given)


def skipping(chosen: Chosen) -> Chosen:
    """The same with ``skip_bad_rows`` set on every stage that has it, as by ``--set``. Raises `UserError` where none has."""
    goals, sets = [], list(chosen.arguments["set"])
    for one in chosen.goals:
        rec = record(one)
        more = [f"{name}.skip_bad_rows=true" for name, stage in rec["stages"].items() if "skip_bad_rows" in stage]
        if not more:
            raise UserError(f"--skip-bad-rows: no stage of recipe {one.recipe!r} reads files with rows to skip; leave it out")
        goals.append(_edited(rec, [parse_set(s) for s in more]))
        sets += [s for s in more if s not in sets]
    return Chosen(chosen.name, goals, {**chosen.arguments, "set": sets})


def _from_function(text: str, sets: Sequence[str], seeds: Sequence[int]) -> Any:
    name, function = _from_file(Path(text)) if Path(text).suffix == ".py" else _function(text)
    arguments, edits = _split(name, function, sets)
    made = []
    for seed in seeds:
        try:
            with _blamed(text):
                goals = function(**arguments, **({"seed": seed} if "seed" in inspect.signature(function).parameters else {}))
        except ValidationError as error:
            raise SpecError(_plain(error)) from None
        if not isinstance(goals, Goals):
            raise UserError(f"recipe {name!r} returned {type(goals).__name__}, not Goals")
        made.append(_edited(record(goals), edits) if edits else goals)
    if len(seeds) > 1 and "seed" not in inspect.signature(function).parameters:
        raise UserError(f"recipe {name!r} takes no seed; leave --seeds out")
    return name, made, {k: v if isinstance(v, (str, int, float, bool, type(None))) else str(v) for k, v in arguments.items()}


def _from_json(path: Path, sets: Sequence[str], seeds: Sequence[int] | None) -> Any:
    if seeds is not None:
        raise UserError(f"{path} holds its seeds; leave --seed and --seeds out, or name the recipe instead of a file")
    try:
        body = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a recipe; a record has recipe, stages and goals") from None
    records = [body]
    if isinstance(body, dict) and "records" in body:
        records = body["records"]
    elif isinstance(body, dict) and "stages" not in body and isinstance(body.get("goals"), list):
        records = [g.get("record") if isinstance(g, dict) else g for g in body["goals"]]
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise UserError(f"{path} holds no recipe: a record has recipe, stages and goals")
    edits = [parse_set(s) for s in sets]
    for at, _ in edits:
        if "." not in at:
            raise SpecError(f"--set {at}: a record has no arguments; name a stage's field, such as sft.steps=200")
    goals = [_edited(r, edits) for r in records]
    return goals[0].recipe, goals, {"record": str(path)}


def _edited(rec: dict[str, Any], edits: Sequence[tuple[str, Any]]) -> Goals:
    if edits and not isinstance(rec.get("stages"), dict):
        raise SpecError("the record has no 'stages'; a recipe record holds recipe, stages and goals")
    rec = json.loads(json.dumps(rec))
    for at, value in edits:
        override(rec, at, value)
    return from_record(rec)


def _function(name: str) -> tuple[str, Callable[..., Goals]]:
    found = recipes()
    if name not in found:
        raise UserError(f"unknown recipe {name!r}{suggest(name, found)}; a path to a .py or .json file is taken too")
    where = found[name].where
    module, _, function = where.partition(":")
    with _blamed(name):
        made = importlib.import_module(module)
    if not callable(getattr(made, function, None)):
        raise UserError(f"recipe {name!r} is said to be {where}, where there is no such function")
    return name, getattr(made, function)


def _from_file(path: Path) -> tuple[str, Callable[..., Goals]]:
    """Imports a Python file by its stem, its folder on the path, so that workers find its stages by their kinds."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if _describe(path, path.stem) is None:
        raise UserError(f"{path} has no function {path.stem!r}; a recipe is a function named like its file")
    sys.path.insert(0, str(path.resolve().parent))
    with _blamed(str(path)):
        module = importlib.import_module(path.stem)
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise UserError(f"{path} has the name of another module, {module.__file__}; give it another name")
    return path.stem, getattr(module, path.stem)


@contextmanager
def _blamed(which: str) -> Iterator[None]:
    """Whatever a recipe's own code raises becomes a `UserError` with the place; ours and pydantic's pass."""
    try:
        yield
    except (UserError, ValidationError):
        raise
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{error.filename or which}{line}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
        mine = [f for f in frames if Path(f.filename).name == Path(which).name] or frames
        at = f" ({Path(mine[-1].filename).name}, line {mine[-1].lineno}, in {mine[-1].name})" if mine else ""
        says = f": {error}" if str(error) else ""
        raise UserError(f"recipe {which} raised {type(error).__name__}{says}{at}") from error


def _split(name: str, function: Callable[..., Goals], sets: Sequence[str]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """``--set`` without a dot is an argument of the recipe; the rest edits stages."""
    try:
        hints = get_type_hints(function)
    except Exception as error:
        raise UserError(f"recipe {name!r} has an annotation that means nothing: {error}") from error
    known = {n: p for n, p in inspect.signature(function).parameters.items() if n != "seed"}
    arguments: dict[str, Any] = {}
    edits = []
    for expression in sets:
        path, value = parse_set(expression)
        if path in known:
            arguments[path] = _typed(name, path, hints.get(path, Any), expression.partition("=")[2])
        elif path == "seed":
            raise UserError("give the seed by --seed N or --seeds 0,1,2")
        elif "." not in path:
            raise SpecError(
                f"unknown argument {path!r} of recipe {name!r}{suggest(path, known)} (fields of stages: stage.field)"
            )
        else:
            edits.append((path, value))
    missing = [n for n, p in known.items() if p.default is p.empty and n not in arguments and p.kind not in (2, 4)]
    if missing:
        raise UserError(f"recipe {name!r} needs {', '.join(missing)}: give {' '.join(f'--set {m}=...' for m in missing)}")
    return arguments, edits


def _typed(recipe: str, name: str, hint: Any, text: str) -> Any:
    """An argument by its annotation: as JSON where it fits, else as text."""
    try:
        adapter = TypeAdapter(hint)
    except PydanticUserError:
        raise UserError(f"argument {name!r} of recipe {recipe!r} is a {hint}, which --set cannot make") from None
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        try:
            return adapter.validate_python(text)
        except ValidationError as second:
            found = second if "JSON" in error.errors(include_url=False)[0]["msg"] else error
            says = found.errors(include_url=False)[0]["msg"].partition(", unable to parse")[0]
            raise SpecError(f"argument {name!r} of recipe {recipe!r}: {says} (got {text!r})") from None


def _plain(error: ValidationError) -> str:
    """pydantic's error for a spec that a recipe built, in this project's words."""
    cls: type[Spec] = Spec
    with suppress(SpecError):
        cls = resolve_kind(error.title)
    return explain(error, cls, error.title)


MOST_SEEDS = 1000


def parse_seeds(text: str) -> list[int]:
    """``3`` -> 0, 1, 2; ``0,7`` -> 0 and 7. Raises `UserError`."""
    try:
        seeds = [int(p) for p in text.split(",")]
    except ValueError:
        seeds = []
    if len(seeds) > MOST_SEEDS or (len(seeds) == 1 and seeds[0] > MOST_SEEDS):
        raise UserError(f"--seeds {text[:20]!r} asks for more than {MOST_SEEDS} seeds; for the one seed N give --seed N")
    if len(seeds) == 1:
        seeds = list(range(seeds[0]))
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(
            f"--seeds {text!r} is neither a count, such as 3, nor a list of different seeds, such as 0,1,2; "
            "for one seed give --seed, such as --seed 0"
        )
    return seeds
