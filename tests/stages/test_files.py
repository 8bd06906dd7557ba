"""The `Files` stage: what the plan says of a file, what a run makes of it, splits, and bad rows that are skipped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.stages.toy import SHORT, Types, make
from tutelage.catalog import choose, skipping
from tutelage.credit.group import GroupRelative
from tutelage.envs.single import SingleTurn
from tutelage.graph import DataType, Goals, from_record, key, plan, record
from tutelage.losses.policy import DAPO
from tutelage.spec import SpecError, UserError
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.files import Files
from tutelage.stages.fit import Fit
from tutelage.stages.model import NewModel
from tutelage.stages.online import Online
from tutelage.store import Store
from tutelage.text.rows import read_rows, read_tasks
from tutelage.verify.text import Exact

SPLITS = {"train": 60, "dev": 20, "heldout": 20}


@pytest.fixture
def file(tmp_path):
    """200 questions in two domains; every tenth question comes a second time, in other words as far as letters go."""
    rows = [
        {"prompt": f"what is {i}", "completion": f"{i}", "answer": i, "domain": "odd" if i % 2 else "even"} for i in range(200)
    ]
    rows += [{**row, "prompt": f" What  IS {row['answer']}", "level": 2} for row in rows[::10]]
    return lines(tmp_path / "d.jsonl", *rows)


def lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def made(stage, tmp_path):
    """(context, rows by port)"""
    store = Store(tmp_path / "s")
    ctx = make(stage, store)
    return ctx, {port: read_rows(store.path(key(stage), port)) for port in stage.outputs}


def test_without_splits_there_is_one_port_and_all_rows_are_in_it(file, tmp_path):
    stage = Files(name="f", path=str(file))
    assert stage.infer(Types()) == {
        "data": DataType(("id", "domain", "prompt", "completion", "gold", "meta"), ("even", "odd"), 220)
    }
    ctx, rows = made(stage, tmp_path)
    assert sorted(r["gold"] for r in rows["data"]) == sorted([str(i) for i in range(200)] + [str(i) for i in range(0, 200, 10)])
    assert tuple(rows["data"][0]) == stage.infer(Types())["data"].columns
    assert ctx.facts == {"rows": {"data": {"even": 120, "odd": 100}}}
    assert [r["gold"] for r in rows["data"][:20]] != [str(i) for i in range(20)], "the first rows are no fair sample"


def test_splits_are_a_partition_that_no_question_straddles(file, tmp_path):
    _, rows = made(Files(name="f", path=str(file), splits=SPLITS), tmp_path)
    assert list(rows) == ["dev", "heldout", "train"]
    questions = {
        port: {r["prompt"][0]["content"].strip().casefold().replace("  ", " ") for r in part} for port, part in rows.items()
    }
    assert sum(map(len, questions.values())) == 200
    assert sum(map(len, rows.values())) == 220
    assert all(abs(len(questions[port]) / 200 - share / 100) < 0.12 for port, share in SPLITS.items())


def test_a_question_keeps_its_split_when_rows_are_added_or_moved(file, tmp_path):
    _, before = made(Files(name="f", path=str(file), splits=SPLITS), tmp_path)
    more = [{"prompt": f"new {i}", "completion": "a", "answer": 1, "domain": "odd"} for i in range(50)]
    lines(file, *more, *reversed(file.read_text().splitlines()))
    _, after = made(Files(name="f", path=str(file), splits=dict(reversed(SPLITS.items()))), tmp_path)
    for port in SPLITS:
        old = {r["id"] for r in before[port]}
        assert old == {r["id"] for r in after[port] if not r["prompt"][0]["content"].startswith("new")}


def test_equal_rows_are_different_tasks(tmp_path):
    row = {"prompt": "a", "gold": "b"}
    _, rows = made(Files(name="f", path=str(lines(tmp_path / "d.jsonl", row, row, row))), tmp_path)
    ids = sorted(r["id"] for r in rows["data"])
    assert ids == [ids[0], f"{ids[0]}-1", f"{ids[0]}-2"]


def test_the_key_is_the_content_and_what_is_made_of_it(file, tmp_path):
    stage = Files(name="f", path=str(file))
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(file.read_bytes())
    assert key(Files(name="g", path=str(moved))) == key(stage)
    for more in ({"splits": SPLITS}, {"skip_bad_rows": True}, {"domain": "x"}, {"columns": {"level": ""}}):
        assert key(Files(name="f", path=str(file), **more)) != key(stage)
    lines(file, *file.read_text().splitlines()[1:])
    assert key(Files(name="f", path=str(file))) != key(stage)


def test_the_record_gives_the_same_ports(file):
    stage = Files(name="f", path=str(file), splits=SPLITS)
    again = from_record(json.loads(json.dumps(record(Goals(recipe="r", stages=(stage.out("train"),))))))
    assert list(again.stages[0].of.outputs) == ["dev", "heldout", "train"]
    assert key(again.stages[0].of) == key(stage)


def test_a_port_that_is_no_split_is_refused(file):
    for stage, valid in (
        (Files(name="f", path=str(file)), "data"),
        (Files(name="f", path=str(file), splits=SPLITS), "dev, heldout, train"),
    ):
        with pytest.raises(SpecError, match=f"stage 'f' has no port 'held'.* valid: {valid}"):
            plan([Goals(recipe="r", stages=(stage.out("held"),))], lambda k: False)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"splits": {"train": 90}}, "sum to 90"),
        ({"splits": {"train": 100, "dev": 0}}, "split 'dev' has 0 percent"),
        ({"splits": {"../x": 100}}, "cannot name a port"),
        ({"columns": {"a": "promt"}}, "no column 'promt'; did you mean 'prompt'"),
        ({"columns": {"a": "gold", "b": "gold"}}, "two columns become 'gold'"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, says, file):
    with pytest.raises(ValueError, match=says):
        Files(name="f", path=str(file), **fields)


def test_the_plan_refuses_what_its_first_row_shows(tmp_path):
    for row, says in (
        ({"q": "a"}, "line 1: has q; needs messages"),
        ({"prompt": ""}, "prompt is empty"),
        ("{", "line 1: not JSON"),
    ):
        stage = Files(name="f", path=str(lines(tmp_path / "d.jsonl", row)))
        with pytest.raises(UserError, match=says):
            plan([Goals(recipe="r", stages=(stage.out(),))], lambda k: False)
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        stage.infer(Types())
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        plan([Goals(recipe="r", stages=(Files(name="f", path=str(tmp_path / "gone.jsonl")).out(),))], lambda k: False)


def test_a_split_without_a_domain_is_refused(tmp_path):
    rows = [{"prompt": f"{i}", "domain": "many"} for i in range(100)] + [{"prompt": "a", "domain": "one"}]
    with pytest.raises(UserError, match=r"none of the 1 rows of domain 'one' fell into split '\w+'; give more rows"):
        made(Files(name="f", path=str(lines(tmp_path / "d.jsonl", *rows)), splits=SPLITS), tmp_path)


def test_one_bad_row_in_100_000_is_named(tmp_path):
    rows = [f'{{"prompt": "{i}"}}' for i in range(100_000)]
    rows[76_543] = '{"prompt": ["76543"]}'
    stage = Files(name="f", path=str(lines(tmp_path / "d.jsonl", *rows)))
    stage.infer(Types())
    with pytest.raises(UserError, match=r"d\.jsonl, line 76544: prompt\[0\] must be an object.*--skip-bad-rows"):
        made(stage, tmp_path)


def test_a_domain_of_which_no_row_is_left_is_an_error(tmp_path):
    file = lines(tmp_path / "d.jsonl", {"prompt": "a", "domain": "x"}, {"prompt": "", "domain": "y"})
    with pytest.raises(UserError, match="all rows of domain 'y' are bad"):
        made(Files(name="f", path=str(file), skip_bad_rows=True), tmp_path)


def test_a_file_that_changes_after_it_was_keyed_is_not_stored_under_that_key(file, tmp_path):
    stage = Files(name="f", path=str(file))
    key(stage)
    lines(file, *file.read_text().splitlines()[1:])
    with pytest.raises(UserError, match=r"d\.jsonl changed while the run was going on"):
        made(stage, tmp_path)


BAD = (
    *(
        '{"prompt": "a"',
        '{"prompt": "b"',
        {"prompt": ""},
        {"prompt": "d", "id": "x"},
        {"promt": "e"},
        {"prompt": [], "id": "f"},
    ),
    *({"prompt": "g", "id": 0.5}, {"prompt": "h", "gold": []}, "3", "[]", "null"),
)


def test_skipped_rows_are_counted_by_reason_and_the_first_are_quoted(tmp_path, capsys):
    file = lines(tmp_path / "d.jsonl", *BAD[:1], {"prompt": "a", "id": "x", "gold": None}, *BAD[1:], {"prompt": "z", "id": "y"})
    ctx, rows = made(Files(name="f", path=str(file), skip_bad_rows=True), tmp_path)
    assert {r["id"] for r in rows["data"]} == {"x", "y"}
    told = ctx.facts["skipped"]
    assert (told["rows"], told["of"]) == (11, 13)
    assert told["reasons"] == {"not JSON": 2, "prompt": 3, "id": 2, "gold": 1, "no object": 3}
    assert len(told["first"]) == 10
    places = [int(says.partition("line ")[2].partition(":")[0]) for says in told["first"]]
    assert places == [1, *range(3, 12)]
    assert any("id 'x' stands at" in says and says.count("line 2 already") for says in told["first"])
    assert "skipped 11 of 13 rows" in capsys.readouterr().out
    assert [
        json.loads(line)["skipped"] for line in (ctx.store.path(key(ctx.stage), "data").parent / "metrics.jsonl").open()
    ] == [11]


def test_ids_that_come_twice_are_an_error(tmp_path):
    file = lines(tmp_path / "d.jsonl", {"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"})
    with pytest.raises(UserError, match=r"line 2: id '1' stands at .*d\.jsonl, line 1 already"):
        made(Files(name="f", path=str(file)), tmp_path)


@pytest.mark.parametrize("rows", [("{", "["), ({"prompt": ""}, {"prompt": 3})])
def test_only_bad_rows_are_an_error_even_when_skipped(rows, tmp_path):
    with pytest.raises(UserError, match=r"all .*rows are bad; the first: .*line 1"):
        made(Files(name="f", path=str(lines(tmp_path / "d.jsonl", *rows)), skip_bad_rows=True), tmp_path)


def test_skip_bad_rows_is_set_on_every_stage_that_reads_files(file, tmp_path):
    stages = [Files(name=n, path=str(file), splits=SPLITS) for n in ("a", "b")]
    init = NewModel(name="init", alphabet="ab")
    goals = Goals(recipe="r", stages=(stages[0].out("train"), stages[1].out("dev"), init.out()))
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record(goals)))
    chosen = skipping(choose(str(path), ["b.domain=x"]))
    found = {at.of.name: at.of for at in chosen.goals[0].stages}
    assert [found[n].skip_bad_rows for n in "ab"] == [True, True]
    assert (found["b"].domain, key(found["init"])) == ("x", key(init))
    assert chosen.arguments["set"] == ["b.domain=x", "a.skip_bad_rows=true", "b.skip_bad_rows=true"]
    path.write_text(json.dumps(record(Goals(recipe="r", stages=(init.out(),)))))
    with pytest.raises(UserError, match="--skip-bad-rows: no stage of recipe 'r' reads files"):
        skipping(choose(str(path)))


def test_the_command_ends_with_2_at_a_bad_row_and_tells_what_it_skipped(tmp_path):
    lines(tmp_path / "d.jsonl", {"prompt": "a"}, {"prompt": "b"}, "{")
    goals = Goals(recipe="r", stages=(Files(name="mine", path="d.jsonl").out(),))
    (tmp_path / "r.json").write_text(json.dumps(record(goals)))

    def tutelage(*words):
        command = [sys.executable, "-m", "tutelage", *words, "--store", "s"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    bad = tutelage("run", "r.json")
    assert (bad.returncode, "Traceback" in bad.stderr) == (2, False)
    assert "d.jsonl, line 3: not JSON" in bad.stderr
    assert "--skip-bad-rows" in bad.stderr
    good = tutelage("run", "r.json", "--skip-bad-rows")
    assert good.returncode == 0, good.stderr
    assert "mine skipped 1 of 3 rows (not JSON: 1); the first: d.jsonl, line 3: not JSON" in " ".join(good.stdout.split())
    assert json.loads(tutelage("plan", "r.json", "--skip-bad-rows", "--json").stdout)["totals"]["stored"] == 1


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """The folder that docs/how-to/bring-your-own.md describes, with a tiny base and more rows."""
    from tutelage.model.folder import save_model

    text = (Path(__file__).parents[2] / "docs" / "how-to" / "bring-your-own.md").read_text("utf-8")
    recipe, example = (re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0] for kind in ("python", "json"))
    (tmp_path / "my_recipe.py").write_text(recipe)
    rows = [{**json.loads(example.splitlines()[0]), "question": f"{i} and {i} pears?"} for i in range(200)]
    lines(tmp_path / "questions.jsonl", *example.splitlines(), *rows)
    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_recipe", None)


def test_the_guides_recipe_plans(guide):
    made = plan(choose("my_recipe.py").goals, lambda k: False)
    assert {n.stage.name for n in made.todo} == {"questions", "base", "sft", "rl", "eval base", "eval sft", "eval rl"}
    (questions,) = [n for n in made.todo if n.stage.name == "questions"]
    assert questions.types["heldout"].columns == ("id", "domain", "prompt", "completion", "gold", "meta")


@pytest.mark.long
def test_the_guides_recipe_runs(guide):
    sets = ["--set", "sft.steps=2", "--set", "rl.steps=2", "--set", "rl.group=2"]
    command = [sys.executable, "-m", "tutelage", "run", "my_recipe.py", "--store", "store", *sets]
    done = subprocess.run(command, cwd=guide, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (guide / "store" / "reports" / "my_recipe-1.html").exists()


def test_a_file_and_a_verifier_are_enough_for_sft_rl_and_evaluation(file, tmp_path):
    data = Files(name="f", path=str(file), splits=SPLITS)
    init = NewModel(name="init", alphabet=tiny.ALPHABET + "WIS", width=32, layers=1, mlp=48)
    sft = Fit(name="sft", model=init.out(), data=data.out("train"), steps=1, rows=4)
    env = SingleTurn(verifier=Exact())
    rl = Online(
        name="rl", model=sft.out(), tasks=data.out("train"), domains=("even", "odd"), env=env, sampling=SHORT,
        credit=(GroupRelative(drop_uniform=False),), loss=DAPO(), steps=1, prompts=2, group=2,
    )  # fmt: skip
    scores = Evaluate(name="e", model=rl.out(), tasks=data.out("heldout"), domain="odd", env=env, sampling=SHORT, limit=4)
    assert plan([Goals(recipe="r", stages=(scores.out(),))], lambda k: False).todo[-1].stage is scores
    store = Store(tmp_path / "s")
    make(scores, store)
    assert {t.domain for t in read_tasks(store.path(key(data), "heldout"))} == {"even", "odd"}


def test_a_domain_that_is_no_text_is_a_bad_row_and_none_of_the_domains(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"prompt": "a", "domain": "x"}, {"prompt": "b", "domain": ["y"]})
    stage = Files(name="f", path=str(path), skip_bad_rows=True)
    assert stage.infer(Types())["data"].domains == ("x",)
    assert len(made(stage, tmp_path)[1]["data"]) == 1
