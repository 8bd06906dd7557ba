"""Which code decides what a spec class makes, and whether its version says so: the table ``tests/versions.json``.

A stage's key holds versions, not code. So changed code must come with a raised ``version``, or stores would go on serving
what the old code made. For every spec class this computes a hash of all code it reaches by name: its own, its bases',
the functions and classes it uses in other modules, also those imported inside methods; docstrings, comments and layout
do not count. A spec class that is only held in a field is not entered, since keys name its own version; one that is
*called* is, since a default leaves no trace in a key.

    python -m tests.versions                        says what is out of step; exits with 1 if anything is
    python -m tests.versions --record               takes in raised versions, new classes and removed ones
    python -m tests.versions --same "why" CLASS...  takes in code that still computes the same
    python -m tests.versions --init                 writes the whole table anew, asking nothing

Leaves out: the rooms that decide no result (recipes, report), the modules outside rooms (types, spec, graph, context, store),
what is reached only through an attribute of an unannotated value, and module-level statements that define no name.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1] / "src" / "tutelage"
TABLE = Path(__file__).with_name("versions.json")
NO_RESULTS = {"recipes", "report"}
Name = tuple[str, str]
"""(module, definition), such as ("losses.policy", "DAPO")"""


class Code:
    """The definitions of a package's rooms, by name, and what each of them names."""

    def __init__(self, root: Path = ROOT):
        self.package = root.name
        self.files = {f"{f.parent.name}.{f.stem}": f for f in sorted(root.glob("*/*.py")) if f.parent.name not in NO_RESULTS}
        self.made: dict[Name, list[ast.stmt]] = {}
        self.imported: dict[str, dict[str, Name]] = {}
        for module, file in self.files.items():
            tree = ast.parse(file.read_text("utf-8"))
            self.imported[module] = self._imports(tree.body)
            for statement in tree.body:
                for name in _binds(statement):
                    self.made.setdefault((module, name), []).append(statement)
        self.used = {at: {n for s in made for n in self._names(at[0], s)} for at, made in self.made.items()}
        self.shape = {at: f"{at[1]} {[shape(s) for s in made]}".encode() for at, made in self.made.items()}

    def _imports(self, nodes: Iterable[ast.AST]) -> dict[str, Name]:
        """What every ``from package.room.module import name as alias`` among these nodes brings in."""
        found: dict[str, Name] = {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(self.package + "."):
                module = (node.module or "").removeprefix(self.package + ".")
                found.update({a.asname or a.name: (module, a.name) for a in node.names})
        return found

    def _names(self, module: str, statement: ast.stmt) -> Iterator[tuple[Name, bool]]:
        """What a definition names, and whether it builds on it: calls it or inherits from it."""
        nodes = list(ast.walk(statement))
        local = self.imported[module] | self._imports(nodes)
        built = {id(n.func) for n in nodes if isinstance(n, ast.Call)} | {id(b) for b in getattr(statement, "bases", [])}
        for node in nodes:
            if isinstance(node, ast.Name):
                yield local.get(node.id, (module, node.id)), id(node) in built

    def is_spec(self, at: Name) -> bool:
        """Whether a class goes back to `Spec`."""
        if at in (("spec", "Spec"), ("graph", "Stage")):
            return True
        return any(self.is_spec(base) for base in self._bases(at))

    def _bases(self, at: Name) -> list[Name]:
        classes = [s for s in self.made.get(at, ()) if isinstance(s, ast.ClassDef)]
        names = [b.id for s in classes for b in s.bases if isinstance(b, ast.Name)]
        return [self.imported[at[0]].get(n, (at[0], n)) for n in names]

    def version(self, at: Name) -> int:
        """The ``version`` a class gives itself or inherits."""
        for statement in self.made.get(at, ()):
            for node in getattr(statement, "body", []):
                if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "version":
                    return int(ast.literal_eval(node.value or ast.Constant(1)))
        return next((v for v in map(self.version, self._bases(at)) if v != 1), 1)

    def reach(self, at: Name) -> set[Name]:
        """Every definition of the rooms that a spec class's results may depend on, itself included."""
        done: set[Name] = set()
        todo = [at]
        while todo:
            each = todo.pop()
            if ".".join(each) in self.files:  # a whole module
                todo += [n for n in self.made if n[0] == ".".join(each)]
            if each in self.made and each not in done:
                done.add(each)
                todo += [n for n, built in self.used[each] if built or not self.is_spec(n)]
        return done

    @cached_property
    def specs(self) -> dict[str, dict[str, Any]]:
        """Every spec class: its version, and the hash of the code it reaches, in all and by module."""
        found = {}
        for module, name in self.made:
            if self.is_spec((module, name)) and isinstance(self.made[module, name][0], ast.ClassDef):
                reached = sorted(self.reach((module, name)))
                parts: dict[str, Any] = {m: hashlib.blake2b(digest_size=3) for m, _ in reached}
                for each in reached:
                    parts[each[0]].update(self.shape[each])
                code = {m: part.hexdigest() for m, part in parts.items()}
                found[f"{module}.{name}"] = {"version": self.version((module, name)), "code": code}
        return found


def _binds(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    return [n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)]


def shape(node: Any) -> Any:
    """A syntax tree as nested lists, the same for every Python version, without docstrings and positions."""
    if isinstance(node, list):
        return [shape(n) for n in node if not (isinstance(n, ast.Expr) and _text(n.value))]
    if isinstance(node, ast.AST):
        fields = ((f, shape(v)) for f, v in ast.iter_fields(node) if f not in ("kind", "type_comment"))
        return [type(node).__name__, *((f, v) for f, v in fields if v not in (None, []))]
    return repr(node) if isinstance(node, (bytes, complex, type(...))) else node


def _text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# --- the table -----------------------------------------------------------------------------------------------------------


def problems(now: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """One line for each class whose code or version is not what the table says."""
    found = []
    for name in sorted(now.keys() | table.keys()):
        new, old = now.get(name), table.get(name)
        if old is None:
            found.append(f"{name} is not in the table: run `python -m tests.versions --record`")
        elif new is None:
            found.append(f"{name} is gone: run `python -m tests.versions --record`")
        elif new["version"] < old["version"]:
            found.append(f"{name}: its version fell from {old['version']} to {new['version']}; versions only rise")
        elif new["version"] > old["version"]:
            found.append(f"{name}: version {old['version']} → {new['version']}: run `python -m tests.versions --record`")
        elif new["code"] != old["code"]:
            where = {m for m, _ in new["code"].items() ^ old["code"].items()}
            found.append(
                f"{name} still has version {new['version']}, but code it depends on changed ({', '.join(sorted(where))}): if "
                f"it makes something else now, raise its `version` and run `python -m tests.versions --record`; if not, run "
                f'`python -m tests.versions --same "why" {name.rpartition(".")[2]}`'
            )
    return found


def recorded(now: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """The table with everything that needs no reason: raised versions, new classes, removed ones."""
    made = {}
    for name, new in now.items():
        old = table.get(name)
        made[name] = new if old is None or new["version"] > old["version"] else old
    return made


def declared_same(now: dict[str, Any], table: dict[str, Any], why: str, classes: list[str]) -> dict[str, Any]:
    """The table with the present code of some classes, and why it computes what it did. Raises `ValueError`."""
    if not why.strip():
        raise ValueError("say why the code still computes the same")
    short: dict[str, list[str]] = {}
    for name in now:
        short.setdefault(name.rpartition(".")[2], []).append(name)
    made = dict(table)
    for each in classes:
        whole = [each] if each in now else short.get(each, [])
        if len(whole) != 1:
            raise ValueError(f"{each!r} is not one spec class; it may be {', '.join(whole) or ', '.join(sorted(now))}")
        old = table.get(whole[0])
        if old is None or old["version"] != now[whole[0]]["version"]:
            raise ValueError(f"{whole[0]} is new or has another version: run `python -m tests.versions --record`")
        made[whole[0]] = {**now[whole[0]], "same": why}
    return made


def read(path: Path = TABLE) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write(table: dict[str, Any], path: Path = TABLE) -> None:
    """One line a class, so that a change shows as such and merges well."""
    lines = [f"{json.dumps(name)}: {json.dumps(table[name], ensure_ascii=False)}" for name in sorted(table)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="take in raised versions, new and removed classes")
    parser.add_argument("--same", metavar="WHY", help="take in the code of CLASS..., which still computes the same")
    parser.add_argument("--init", action="store_true", help="write the whole table anew")
    parser.add_argument("classes", nargs="*", metavar="CLASS")
    given = parser.parse_args(arguments)
    now, table = Code().specs, read()
    if given.init:
        table = now
    if given.record:
        table = recorded(now, table)
    if given.same is not None:
        try:
            table = declared_same(now, table, given.same, given.classes)
        except ValueError as error:
            parser.error(str(error))
    if given.init or given.record or given.same is not None:
        write(table)
    left = problems(now, table)
    print("\n".join(left) or f"{len(now)} spec classes, all as the table says")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
