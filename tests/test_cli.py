"""The command line, as a user runs it: a process of its own, its exit code, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy
from tutelage import catalog, cli
from tutelage.catalog import choose, parse_seeds, recipes
from tutelage.graph import all_goals, inputs, key, order, record
from tutelage.spec import SpecError, UserError
from tutelage.store import Store

ROOT = Path(__file__).parents[1]
RECIPE = '''
"""A user's recipe."""
from tests import toy
from tutelage.graph import Goals

def branches(seed: int = 0, steps: int = 10, factor: float = 0.5, base: str | None = None, keep: tuple[int, ...] = ()) -> Goals:
    """Two toy branches.

    More is said here.
    """
    return toy.small(seed, steps)
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a recipe and a record; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "branches", raising=False)
    (tmp_path / "branches.py").write_text(RECIPE)
    (tmp_path / "small.json").write_text(json.dumps(record(toy.small())))
    return tmp_path


def tutelage(place: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tutelage", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}", "COLUMNS": "120", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- mistakes: exit code 2, one message, no traceback, nothing made --------------------------------------------------------

MISTAKES = [
    (("run", "quickstrt"), "unknown recipe 'quickstrt'; did you mean 'quickstart'?"),
    (("plan", "nothing.json"), "cannot read nothing.json"),
    (("plan", "nothing.py"), "there is no file nothing.py"),
    (("run", "small.json", "--set", "bse.steps=3"), "unknown stage 'bse' in --set bse.steps; did you mean 'base'?"),
    (("run", "small.json", "--set", "base.stps=3"), "unknown field 'stps' in --set base.stps; did you mean 'steps'?"),
    (("run", "small.json", "--set", "base.steps=many"), "base.steps: Input should be a valid integer (got 'many')"),
    (("run", "small.json", "--set", "base.steps=1.5"), "base.steps"),
    (("run", "small.json", "--set", "base.rates.0=GRPPO"), "unknown kind 'GRPPO'; did you mean 'GRPO'?"),
    (("run", "small.json", "--set", "base.steps"), "--set 'base.steps' is not of the form path=value"),
    (("run", "small.json", "--set", "steps=3"), "a record has no arguments"),
    (("run", "small.json", "--set", "left.source.ref=base"), "stage 'left': stage 'base' has no port 'data'; valid: policy"),
    (("run", "small.json", "--seed", "3"), "holds its seeds"),
    (("plan", "branches.py", "--set", "stps=3"), "unknown argument 'stps' of recipe 'branches'; did you mean 'steps'?"),
    (("plan", "branches.py", "--set", "steps=few"), "argument 'steps' of recipe 'branches': Input should be a valid integer"),
    (("plan", "branches.py", "--set", "seed=3"), "give the seed by --seed"),
    (("plan", "branches.py", "--seeds", "x"), "--seeds 'x' is neither a count"),
    (("plan", "branches.py", "--seed", "1", "--seeds", "2"), "give --seed or --seeds, not both"),
    (("plan", "branches.py", "--seed", "-1"), "--seed"),
    (("report",), "there is no store in store; give --store DIR"),
    (("lineage", "x"), "there is no store in store"),
    (("plan", "studies/temperature", "--set", 'domains=["sun"]'), "unknown domain 'sun'; did you mean 'sum'?"),
    (("run", "small.json", "--store", "."), "neither empty nor a store"),
    (("run", "small.json", "--cores", "0"), "--cores"),
    (("plan", "small.json", "--store", "."), "neither empty nor a store"),
    (("plan", "small.json", "--store", "small.json"), "small.json is not a folder; give --store another folder"),
    (("plan", "small.json", "--set", "base.name=x"), "a stage's name cannot be set; it is its key in stages"),
    (("plan", "small.json", "--store", "~nobody-of-this-name/x"), "cannot use ~nobody-of-this-name/x as a store: "),
    (("store", "list", "--store", "~nobody-of-this-name/x"), "cannot use ~nobody-of-this-name/x as a store: "),
    (("plan", "small.json", "--store", "a\udcff"), "'a\\udcff' on the command line is no UTF-8 text; rename what it names"),
    (("plan",), "RECIPE"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[" ".join(w) for w, _ in MISTAKES])
def test_a_mistake_is_one_message_and_exit_code_2(place, words, says, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["tutelage", *words])
    monkeypatch.setenv("COLUMNS", "120")
    before = sorted(p.name for p in place.iterdir())
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert says in " ".join(err.replace("│", " ").split())
    assert out == ""
    assert [p for p in sorted(p.name for p in place.iterdir()) if p != "__pycache__"] == before


@pytest.mark.parametrize(("words", "says"), [MISTAKES[n] for n in (0, 3, 4, 5, 8)], ids=lambda w: " ".join(w))
def test_no_traceback_in_a_process_of_its_own(place, words, says):
    done = tutelage(place, *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (place / "store").exists()


BAD = {"{": "is not JSON", "[1]": "holds no recipe", "{}": "the record has no 'recipe'", '{"records": []}': "no recipe"}


@pytest.mark.parametrize("text", BAD)
def test_bad_json_is_a_mistake_too(place, text):
    (place / "bad.json").write_text(text)
    with pytest.raises(UserError, match=BAD[text]):
        choose(str(place / "bad.json"))


def test_a_recipe_without_goals_is_refused(place):
    (place / "none.json").write_text(json.dumps({**record(toy.small()), "goals": [], "table": None}))
    with pytest.raises(SpecError, match="recipe 'small' has no goals"):
        choose(str(place / "none.json"))


BROKEN = {
    "def broken(:": "error: r/broken.py, line 1: invalid syntax",
    "def broken():\n    raise RuntimeError('boom')": "raised RuntimeError: boom (broken.py, line 2, in broken)",
    "import nosuchmodule\ndef broken(): ...": "raised ModuleNotFoundError: No module named 'nosuchmodule' (broken.py, line 1,",
    "x = 1 / 0\ndef broken(): ...": "recipe r/broken.py raised ZeroDivisionError: division by zero (broken.py, line 1,",
    "import sys\nsys.exit(0)\ndef broken(): ...": "raised SystemExit: 0",
    "def broken(a: 'Nope' = 1): ...": "recipe 'broken' has an annotation that means nothing: name 'Nope' is not defined",
    "def broken(): ...": "recipe 'broken' returned NoneType, not Goals",
    "x = '\xff'\ndef broken(): ...": "error: r/broken.py",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_recipe_file_is_a_mistake(place, text, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (place / "r").mkdir()
    (place / "r" / "broken.py").write_text(text, "latin-1")
    monkeypatch.setattr(sys, "argv", ["tutelage", "plan", "r/broken.py"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert BROKEN[text] in err
    sys.modules.pop("broken", None)


def say(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tutelage", *words])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code, *capsys.readouterr()


def stored(place: Path, *goals: toy.Goals) -> Store:
    """A store in which goals have been run, without workers."""
    store = Store(place / "store")
    metas: dict[str, dict] = {}
    for one in goals:
        keys = {}
        for stage in order(at.of for at in all_goals(one)):
            mine = keys[stage.name] = key(stage)
            ins = [{"path": p, "key": key(a.of), "port": a.port, "step": a.step, "name": a.of.name} for p, a in inputs(stage)]
            metas[mine] = {
                "name": stage.name, "kind": stage.kind(), "version": 1, "inputs": ins, "host": "h",
                "outputs": {port: {"kind": kind} for port, kind in stage.outputs.items()},
                "finished": 1.0 + len(metas), "seconds": 1.0, "cost": {"flops": 0.0}, "record": {},
            }  # fmt: skip
            if not store.has(mine):
                store.work(mine)
                store.publish(mine, metas[mine])
        store.new_run(one.recipe, {"goals": [{"record": record(one), "seed": one.seed, "keys": keys}]})
    return store


def test_a_report_that_cannot_be_written_is_refused_before_the_table(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    stored(place, toy.small())
    for out, why in (("store", "it is a folder"), ("small.json/x.html", "small.json is not a folder"), ("", "it is a folder")):
        code, printed, err = say(monkeypatch, capsys, "report", "--out", out)
        assert (code, printed) == (2, "")
        assert why in err
        assert err.startswith("error: cannot write the report to ")
        assert err.endswith("; give --out FILE.html\n")


def test_a_damaged_run_file_is_named(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    store = stored(place, toy.small())
    for text in ("{}", '{"goals": [1]}', "[]", "{"):
        (store.root / "runs" / "small-1.json").write_text(text)
        for words in (("report",), ("lineage", "left@0")):
            code, printed, err = say(monkeypatch, capsys, *words)
            assert (code, printed) == (2, "")
            assert "runs/small-1.json" in err


def test_lineage_says_which_seed_and_shows_a_thing_before_it_says_shown_above(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    stored(place, *map(toy.small, (0, 1, 2)))
    code, out, err = say(monkeypatch, capsys, "lineage", "left", "--short")
    assert code == 0, err
    assert "left@2 (one of 3 seeds: left@0, left@1, left@2)" in out
    assert "one of" not in say(monkeypatch, capsys, "lineage", "left@1")[1]

    shared = toy.Chain(name="shared")
    deep = toy.Chain(name="deep", before=shared.out())

    class Two(toy.Chain):
        other: toy.At

    join = Two(name="join", before=deep.out(), other=shared.out())
    stored(place, toy.Goals(recipe="r", stages=(join.out(),)))
    lines = say(monkeypatch, capsys, "lineage", "join", "--short")[1].splitlines()
    where = [n for n, line in enumerate(lines) if "shared" in line]
    assert ["(shown above)" in lines[n] for n in where] == [False, True]


# --- plan ----------------------------------------------------------------------------------------------------------------


def test_plan_as_json_and_back(place):
    done = tutelage(
        place, "plan", "branches.py", "--seeds", "2", "--set", "steps=4", "--set", "right.keep=[2]", "--json", "--cores", "2"
    )
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["recipe"] == "branches"
    assert body["totals"]["run"] == 10
    assert body["totals"]["cores"] == 2
    assert body["totals"]["flops"] == sum(s["flops"] for s in body["stages"])
    stages = {s["label"]: s for s in body["stages"]}
    assert stages["right"]["outputs"]["policy"]["checkpoints"] == [2]
    assert stages["left@1"]["why"] == "new: no stage of this name or kind is stored"
    assert stages["left@1"]["inputs"][0] == {
        "path": "source",
        "key": stages["more@1"]["key"],
        "port": "data",
        "step": None,
        "label": "more@1",
    }
    assert not (place / "store").exists(), "a plan makes nothing"
    (place / "again.json").write_text(done.stdout)
    again = json.loads(tutelage(place, "plan", "again.json", "--json").stdout)
    assert [s["key"] for s in again["stages"]] == [s["key"] for s in body["stages"]]


def test_plan_shows_a_table_and_the_sum_at_two_widths(place):
    for columns in ("80", "120"):
        done = tutelage(place, "plan", "branches.py", COLUMNS=columns)
        assert done.returncode == 0
        lines = done.stdout.splitlines()
        assert all(len(line) <= int(columns) for line in lines)
        assert any("base" in line and "Count" in line and "will run" in line for line in lines)
        assert "7 stages to run, 0 stored" in done.stdout
        assert "no measurement here yet" in " ".join(done.stdout.split())


# --- a whole life ----------------------------------------------------------------------------------------------------------


def test_run_then_plan_then_run_again_then_lineage(place):
    first = tutelage(place, "run", "branches.py", "--seed", "3", "--cores", "2")
    assert first.returncode == 0, first.stderr
    assert "branches: 7 stages to run, 0 stored; about" in first.stdout
    assert "score-left done in" in first.stdout
    assert "report: store/reports/small-1.html" in first.stdout
    assert (place / "store" / "reports" / "small-1.html").stat().st_size > 1000

    body = json.loads((place / "store" / "runs" / "small-1.json").read_text())
    assert body["state"] == "done"
    assert body["arguments"] == {"seeds": [3], "set": []}
    assert "run" in body["argv"]

    changed = tutelage(place, "plan", "branches.py", "--seed", "3", "--set", "right.steps=12")
    assert "steps 11 → 12" in changed.stdout

    again = tutelage(place, "run", "branches.py", "--seed", "3", "--cores", "2")
    assert "nothing to run: 7 stages stored" in again.stdout
    assert " starts" not in again.stdout

    from_run = tutelage(place, "plan", "store/runs/small-1.json")
    assert "nothing to run" in from_run.stdout

    shown = tutelage(place, "lineage", "left@3:policy", "--short")
    assert shown.returncode == 0, shown.stderr
    for part in ("left:policy  Count", "base:policy  Count", "more:data  Make", "data:data  Make", "4 stages"):
        assert part in shown.stdout
    found = json.loads(tutelage(place, "lineage", "left", "--json").stdout)
    assert [m["name"] for m in found["stages"]][-1] == "left"
    assert found["key"] == key(toy.stages(toy.small(3))["left"])
    wrong = tutelage(place, "lineage", "left:plicy")
    assert wrong.returncode == 2
    assert "'left' has no port 'plicy'; did you mean 'policy'" in wrong.stderr


def test_the_store_is_an_option_or_an_environment_variable(place):
    assert tutelage(place, "run", "small.json", TUTELAGE_STORE="by-env").returncode == 0
    assert Store(place / "by-env").runs() == ["small-1"]
    assert tutelage(place, "run", "small.json", "--store", "by-option", TUTELAGE_STORE="by-env").returncode == 0
    assert Store(place / "by-option").runs() == ["small-1"]


@pytest.mark.parametrize(("how", "code"), [("user", 2), ("bug", 1)])
def test_a_failing_stage_names_itself_and_exits_by_whose_fault_it_is(place, how, code):
    bad = toy.Fail(name="bad", how=how)
    goals = toy.Goals(recipe="r", stages=(toy.Fail(name="after", source=bad.out(), how="forget").out(),))
    (place / "bad.json").write_text(json.dumps(record(goals)))
    done = tutelage(place, "run", "bad.json")
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    first, last = done.stderr.splitlines()
    assert first.startswith("stage 'bad' failed: " + {"user": "the dataset is empty; give another", "bug": "ZeroDivision"}[how])
    assert [last] == [
        "error: 1 of 2 stages failed (bad); 1 more were not made; what was made is kept",
    ]


def test_help_and_version_answer(monkeypatch, capsys):
    assert "lineage" in tutelage(ROOT, "--help").stdout
    for words, says in ((("--version",), "0.1.0"), *(((c, "--help"), "Usage") for c in ("run", "plan", "report", "lineage"))):
        monkeypatch.setattr(sys, "argv", ["tutelage", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        assert says in capsys.readouterr().out


# --- recipes ---------------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_without_importing_them():
    before = set(sys.modules)
    found = recipes()
    assert not {m for m in set(sys.modules) - before if m.startswith("tutelage.recipes")}
    assert found["quickstart"].where == "tutelage.recipes.quickstart:quickstart"
    assert found["quickstart"].description
    assert json.loads(tutelage(ROOT, "recipes", "--json").stdout)[0].keys() == {"name", "description", "where"}


def test_a_recipe_of_another_package_is_found_by_its_entry_point(place, monkeypatch):
    class Point:
        name, value = "theirs", "branches:branches"

    monkeypatch.setattr(catalog, "entry_points", lambda group: [Point] if group == "tutelage.recipes" else [])
    monkeypatch.syspath_prepend(str(place))
    assert recipes()["theirs"].description == "Two toy branches."
    chosen = choose("theirs", ["steps=4"], [2])
    assert toy.stages(chosen.goals[0])["base"].steps == 4
    assert chosen.arguments == {"steps": 4, "seeds": [2], "set": ["steps=4"]}


def test_arguments_are_typed_by_their_annotation(place):
    def given(*sets: str) -> dict:
        return choose(str(place / "branches.py"), sets).arguments

    assert given("base=models/1")["base"] == "models/1"
    assert given("base=123")["base"] == "123", "text stays text"
    assert given("base=null")["base"] is None
    assert given("factor=2")["factor"] == 2.0
    assert given("keep=[1,2]")["keep"] == "(1, 2)"
    for bad in ("steps=1.5", "steps=true", "steps=", "factor=x", "keep=3"):
        with pytest.raises(SpecError, match="argument"):
            given(bad)


def test_an_argument_goes_before_an_edit_whatever_their_order(place):
    goals = choose(str(place / "branches.py"), ["base.steps=7", "steps=5"]).goals[0]
    steps = {n: s.steps for n, s in toy.stages(goals).items() if isinstance(s, toy.Count)}
    assert steps == {"base": 7, "left": 5, "right": 6}


def test_seeds():
    assert parse_seeds("3") == [0, 1, 2]
    assert parse_seeds("5,7") == [5, 7]
    for bad in ("", "x", "0", "1,1", "-3", "1,-2", ",", "5,", "0,,1"):
        with pytest.raises(UserError, match=r"neither a count.*such as --seed 0"):
            parse_seeds(bad)
    for many in ("100000000", ",".join(map(str, range(1001)))):
        with pytest.raises(UserError, match="more than 1000 seeds"):
            parse_seeds(many)
