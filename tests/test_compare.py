"""``tutelage compare`` and the table of ``tutelage plan``, as a user calls them: what words name, what is said, exit codes."""

from __future__ import annotations

import json
import sys

import pytest

from tests import toy
from tests.report import synthetic
from tutelage import cli
from tutelage.graph import plan, record
from tutelage.run import run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store with a run of two seeds, and one of another recipe that measures nothing."""
    root = tmp_path_factory.mktemp("home") / "store"
    store = synthetic.build(root, n=40)
    run(plan([toy.small()], store.has), store)
    body = store.load_run("quickstart-1")
    other = {**body["goals"][0]["record"], "table": None}
    store.save_run("other-1", {**body, "run": "other-1", "goals": [{**body["goals"][0], "record": other}]})
    return root


@pytest.fixture
def say(home, monkeypatch, capsys):
    """Calls the command: (exit code, output, errors)."""

    def call(*words, columns="80"):
        monkeypatch.setattr(sys, "argv", ["tutelage", *words, "--store", str(home)])
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return call


def test_a_run_by_name_by_its_recipe_and_as_the_last(say, home):
    code, out, err = say("compare", "quickstart-1", "quickstart")
    assert (code, err) == (0, "")
    assert "A quickstart-1\nB quickstart-1\nnothing differs" in out
    assert "B small-1" in say("compare", "quickstart", "last")[1]


def test_rows_and_artifacts(say):
    assert "B quickstart-1:student" in say("compare", "quickstart:sft", "quickstart-1:student")[1]
    code, out, _ = say("compare", "init@0", "init@1")
    assert code == 0
    assert "A init@0\nB init@1" in out
    assert "B init@0 (" not in say("compare", "init@1", "init")[1]


def test_json_holds_everything_and_writes_no_page(say, home):
    code, out, _ = say("compare", "quickstart:base", "quickstart:student", "--json")
    assert code == 0
    body = json.loads(out)
    assert set(body) == {"a", "b", "same", "arguments", "versions", "stages", "scores", "curves", "cost", "methods"}
    assert body["methods"] is None
    assert len(body["scores"]["rows"]) == 4
    assert not (home / "reports" / "quickstart-1-base-and-quickstart-1-student.html").exists()


def test_the_page_goes_beside_the_reports_or_where_it_is_told(say, home, tmp_path):
    assert "page:" in say("compare", "quickstart:sft", "quickstart:student")[1]
    assert (home / "reports" / "quickstart-1-sft-and-quickstart-1-student.html").exists()
    assert say("compare", "quickstart:sft", "quickstart:sft", "--out", str(tmp_path / "p.html"))[0] == 0
    assert "Nothing differs." in (tmp_path / "p.html").read_text()


MISTAKES = [
    (("quickstrt-1", "last"), "no run, recipe or artifact 'quickstrt-1' in", "did you mean 'quickstart-1'?"),
    (("last", "mopdd"), "no run, recipe or artifact 'mopdd' in", "did you mean 'mopd'?"),
    (("quickstart:stuent", "last"), "run 'quickstart-1' has no row 'stuent'; did you mean 'student'?", "valid:"),
    (("other-1:sft", "last"), "run 'other-1' has no row 'sft'; the run draws no table: compare other-1 as a whole", ""),
    (
        ("quickstart", "mopd@0"),
        "quickstart-1 is a whole run and mopd@0 is not; name one of its rows, such as",
        "quickstart-1:base",
    ),
    (("other-1", "mopd@0"), "other-1 is a whole run and mopd@0 is not; name a run on both sides", ""),
    (("mopd@0:nothing", "sft"), "has no port 'nothing'", ""),
    (
        ("last", "last", "--out", "/"),
        "cannot write the report to /: it is a folder",
        "give --out FILE.html",
    ),
]


@pytest.mark.parametrize(("words", "says", "hint"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(say, words, says, hint):
    code, out, err = say("compare", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert hint in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_run_that_has_not_measured_yet(tmp_path, monkeypatch, capsys):
    store = synthetic.build(tmp_path / "s", n=20, skip=("mopd", "eval student"))
    body = store.load_run("quickstart-1")
    del body["run"]
    for goal in body["goals"]:
        goal["keys"] = {n: k if not n.startswith("eval student") else k[::-1] for n, k in goal["keys"].items()}
    store.save_run("quickstart-2", body)
    monkeypatch.setattr(sys, "argv", ["tutelage", "compare", "quickstart-1", "quickstart-2", "--store", str(tmp_path / "s")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "student / sum not paired: A is not measured yet" in out


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_plan_says_why_within_its_columns(say, tmp_path, columns):
    rec = record(toy.small(steps=10))
    rec["stages"]["base"]["rates"][0]["value"] = 0.25
    (tmp_path / "small.json").write_text(json.dumps(rec))
    code, out, _ = say("plan", str(tmp_path / "small.json"), columns=columns)
    assert code == 0
    assert max(map(len, out.splitlines()[:-1])) <= int(columns)
    words = " ".join(out.split())
    assert "rates.0.value 0.1 → 0.25" in words
    if columns == "80":
        assert "input start: base will be remade ← more, base" in words
    body = json.loads(say("plan", str(tmp_path / "small.json"), "--json")[1])
    stages = {s["label"]: s for s in body["stages"]}
    assert stages["base"]["changes"] == [{"what": "field", "path": "rates.0.value", "old": 0.1, "new": 0.25}]
    assert stages["base"]["against"]["name"] == "base"
    assert stages["left"]["why"] == "input start: base will be remade"
    assert stages["data"]["changes"] == []
