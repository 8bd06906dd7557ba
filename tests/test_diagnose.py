"""The command: what words name, what it says and draws, tokenizers and templates that differ, and mistakes in one line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import asdict

import pytest

from tests.stages.toy import DATA as LETTERS
from tests.stages.toy import INIT, make
from tutelage import cli
from tutelage.context import Context
from tutelage.estimate import count
from tutelage.graph import Goals, from_record, key, order, plan, record
from tutelage.learn.optim import AdamW
from tutelage.model.differences import template_difference
from tutelage.model.lora import LoRA
from tutelage.run import Outcome
from tutelage.stages.diagnose import NUMBERS, Diagnose
from tutelage.stages.files import Files
from tutelage.stages.fit import Fit
from tutelage.stages.model import NewModel
from tutelage.store import Store

SMALL = ("--prompts", "4", "--max-new-tokens", "4", "--top-k", "4")


def publish(made, store):
    """Makes what a plan has to do, as the workers would, in this process."""
    records = {key(s): record(g)["stages"][s.name] for g in made.goals for s in order(at.of for at in g.stages)}
    for node in made.todo:
        ctx = Context(node.stage, store)
        with redirect_stdout(io.StringIO()):  # a worker's goes to its log
            node.stage.run(ctx)
        names = {k: made.nodes[k].stage.name for _, k, _, _ in node.inputs}
        inputs = [{"path": f, "key": k, "port": p, "step": s, "name": names[k]} for f, k, p, s in node.inputs]
        outputs = {port: {"kind": kind, **asdict(node.types[port])} for port, kind in node.stage.outputs.items()}
        body = {"name": node.stage.name, "kind": node.stage.kind(), "inputs": inputs, "outputs": outputs, "facts": ctx.facts}
        body["record"] = records[node.key]
        store.publish(node.key, {**body, "cost": asdict(ctx.cost), "finished": 0.0})


def recipe(folder, seed):
    """A base, one that goes on from it with all weights, one with an adapter, and their tasks."""
    data = Files(name="tasks", path=str(folder / "letters.jsonl"), splits={"gold": 50, "dev": 50})
    init = INIT.model_copy(update={"name": "init"})
    fields = {"model": init.out(), "data": data.out("gold"), "steps": 3 + seed, "rows": 8, "seed": seed}
    taught = Fit(name="taught", optimizer=AdamW(lr=0.02), **fields)
    tuned = Fit(name="tuned", optimizer=AdamW(lr=0.05), adapter=LoRA(rank=2, alpha=8), **fields)
    return Goals(recipe="school", stages=(taught.out(), tuned.out()), seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a store, two seeds of a run in it."""
    folder = tmp_path_factory.mktemp("diagnose")
    with (folder / "letters.jsonl").open("w") as file:
        for n, (a, b) in enumerate(zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True)):
            turns = {"prompt": a, "completion": b, "gold": b, "domain": "low" if n % 2 else "high"}
            file.write(json.dumps(turns) + "\n")
    store, goals = Store(folder / "store"), [recipe(folder, seed) for seed in (0, 1)]
    planned = plan(goals, store.has)
    publish(planned, store)
    at = [{"seed": g.seed, "record": record(g), "keys": {s.name: key(s) for s in order(a.of for a in g.stages)}} for g in goals]
    store.new_run("school", {"recipe": "school", "goals": at, "state": "done"})
    other = NewModel(name="other", alphabet="abc", width=16, layers=1, mlp=16)
    make(other, store)
    for name, of, port in (("copy", goals[0].stages[0].of, "policy"), ("alien", other, "policy"), ("plain", INIT, "policy")):
        shutil.copytree(store.path(key(of), port), folder / name)
    return folder


@pytest.fixture
def place(made, monkeypatch):
    """In that folder, stages made in this process, counted."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("COLUMNS", "120")
    ran = []

    def run(planned, store, **_):
        ran.append([n.label for n in planned.todo])
        publish(planned, store)
        return Outcome("diagnose-1")

    monkeypatch.setattr("tutelage.run.run", run)
    return ran


def say(capsys, *words):
    """(exit code, output, errors) of the command."""
    sys.argv = ["tutelage", "diagnose", *words]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr()
    return ended.value.code or 0, out.out, out.err


def told(capsys, *words):
    code, out, _ = say(capsys, *words, *SMALL, "--json")
    return code, json.loads(out)


def key_of(found, label):
    inputs = Store("store").meta(found["key"])["inputs"]
    return next(i["key"] for i in inputs if i["path"] == f"teachers.{label}")


def teachers(found):
    return {(each["teacher"], each["domain"]): each for each in found["teachers"]}


# --- what it answers -----------------------------------------------------------------------------------------------------


def test_an_answer_as_json_and_a_second_time_at_once(place, made, capsys):
    code, found = told(capsys, "init", "taught@1", "low=init")
    assert code == 0
    assert place == [["diagnosis"]], "the artifacts stand in the graph as they are"
    assert set(found) == {"student", "key", "k", "vocab", "temperature", "group", "teachers"}
    assert (found["student"], found["k"], found["temperature"]) == ("init", 4, 1.0)
    assert set(teachers(found)) == {("taught@1", "high"), ("taught@1", "low"), ("low", "low")}
    for each in found["teachers"]:
        assert set(each["numbers"]) == {*NUMBERS, "spread"}
        assert set(each["drift"]) == set(NUMBERS)
        assert set(each["verdict"]) == {"level", "words", "signs", "unsure"}
        assert {"first", "last", "prompts", "tokens", *NUMBERS} == set(each["positions"][0])
        for number in each["numbers"].values():
            assert number["low"] <= number["mean"] <= number["high"]
    assert teachers(found)["low", "low"]["verdict"]["level"] == "agrees"
    assert told(capsys, "init", "taught@1", "low=init") == (0, found)
    assert len(place) == 1


def test_the_stage_underneath_is_the_one_a_recipe_would_have(place, made, capsys):
    """Rebuilt from what lies in the store, the graph leads to the keys that the recipe's own stages have."""
    _, found = told(capsys, "init", "taught@1", "low=taught")
    store, goals = Store(made / "store"), [recipe(made, seed) for seed in (0, 1)]
    init = goals[0].stages[0].of.model
    inputs = {(i["path"], i["key"]) for i in store.meta(found["key"])["inputs"]}
    tasks = goals[0].stages[0].of.data.of
    wanted = {"taught@1": goals[1].stages[0].of, "low": goals[0].stages[0].of}
    assert inputs == {("model", key(init.of)), ("tasks", key(tasks))} | {(f"teachers.{n}", key(s)) for n, s in wanted.items()}


def test_names_go_on_meaning_what_they_meant(place, made, capsys):
    """A question about seed 0 leaves `taught` the newest run's, although the question names that stage too."""
    from tutelage.commands.shared import find

    store = Store(made / "store")
    before = find(store, "taught@1"), find(store, "taught")
    stage = Diagnose(name="d", model=INIT.out(), teachers={"t": INIT.out()}, tasks=LETTERS.out(), domains=("low",))
    from tutelage.commands.diagnose import Ends

    ends = Ends(store, "taught@0", None)
    goals = Goals(recipe="diagnose", stages=(ends.at(ends.student), stage.out()))
    made_by = {s.name: key(s) for s in order(at.of for at in goals.stages)}
    store.new_run("diagnose", {"recipe": "diagnose", "goals": [{"seed": 0, "record": record(goals), "keys": made_by}]})
    assert (find(store, "taught@1"), find(store, "taught")) == before


def test_all_forms_of_a_name(place, capsys):
    _, first = told(capsys, "init", "taught@1")
    for form in ("school:taught@1", "school-1:taught@1:policy", "taught@1:policy", key_of(first, "taught@1")[:12]):
        _, found = told(capsys, "school:init", form)
        assert teachers(found)[form, "low"]["numbers"] == teachers(first)["taught@1", "low"]["numbers"]


def test_a_folder_of_what_the_store_has_is_the_same_model(place, capsys):
    """Its digests are those of its files and the artifact's those of its recipe: both are then taken by their files."""
    _, first = told(capsys, "init", "low=taught@0", "high=taught@1")
    _, found = told(capsys, "init", "low=copy", "high=taught@1")
    assert [n["numbers"] for n in found["teachers"]] == [n["numbers"] for n in first["teachers"]]


def test_folders_and_a_file_need_no_store(place, made, tmp_path, capsys):
    code, found = told(capsys, "plain", "copy", "--tasks", "letters.jsonl", "--store", str(tmp_path / "fresh"))
    assert code == 0
    assert set(teachers(found)) == {("copy", "high"), ("copy", "low")}
    assert teachers(found)["copy", "low"]["numbers"]["kl"]["mean"] > 1e-3


def test_an_artifact_of_older_code_is_imported_by_its_folder(place, monkeypatch, capsys):
    _, first = told(capsys, "init", "taught@1")
    monkeypatch.setattr(Fit, "version", 99)
    _, found = told(capsys, "init", "taught@1")
    assert found["key"] != first["key"]
    assert [n["numbers"] for n in found["teachers"]] == [n["numbers"] for n in first["teachers"]]
    code, _, err = say(capsys, "init", "tuned@1", *SMALL)
    assert code == 2
    assert err == (
        "error: tuned@1 is an adapter that cannot be imported by its folder; merge it into its base, and give that\n"
    )


def test_an_adapter_teaches(place, capsys):
    _, found = told(capsys, "init", "tuned@0")
    assert teachers(found)["tuned@0", "low"]["numbers"]["kl"]["mean"] > 1e-4


# --- what differs --------------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_the_verdict_and_nothing_is_computed(place, capsys):
    code, found = told(capsys, "plain", "alien", "--tasks", "letters.jsonl")
    assert (code, place) == (1, [])
    (only,) = found["teachers"]
    assert only["verdict"]["level"] == "tokenizer differs"
    assert "the student alone has 38 of its 46 tokens, such as 'd'" in only["verdict"]["words"]
    code, out, _ = say(capsys, "plain", "alien", "--tasks", "letters.jsonl")
    assert code == 1
    assert "alien: tokenizer differs, nothing can be compared" in out


def test_another_template_is_named_with_the_place_and_the_other_teachers_are_measured(place, made, capsys):
    shutil.copytree(made / "copy", made / "templated", dirs_exist_ok=True)
    for file in (made / "templated").iterdir():
        if file.suffix in (".jinja", ".json") and "<|assistant|>" in file.read_text() and file.name != "tokenizer.json":
            file.write_text(file.read_text().replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>=' }}"))
    code, found = told(capsys, "plain", "templated", "low=copy", "--tasks", "letters.jsonl")
    assert code == 1
    verdicts = {each["teacher"]: each["verdict"] for each in found["teachers"]}
    assert verdicts["templated"]["level"] == "template differs"
    assert "<|assistant|>=" in verdicts["templated"]["words"]
    assert verdicts["low"]["level"] not in ("template differs", "tokenizer differs")


def test_the_first_difference_of_two_templates():
    assert template_difference("same", "same") == ""
    assert template_difference("abc<|x|>", "abc<|y|>") == (
        "from character 6 on: 'abc<|x|>' for the student, 'abc<|y|>' for the teacher"
    )
    assert template_difference("ab", "abc").startswith("from character 3 on")


# --- how it looks --------------------------------------------------------------------------------------------------------


def test_table_verdicts_and_picture(place, made, capsys):
    for suffix in ("svg", "png", "html"):
        code, out, _ = say(capsys, "init", "taught@1", "low=taught@0", *SMALL, "--out", f"decay.{suffix}")
        assert code == 0
        assert "95 % intervals over prompts" in out
        assert f"picture: decay.{suffix}" in out
        for line in ("taught@1 on high: ", "taught@1 on low: ", "low: "):
            assert line in out
        assert "a warning sign, not a proven predictor" in out
    assert "2–3" in (made / "decay.svg").read_text()
    page = (made / "decay.html").read_text()
    assert "<svg" in page
    assert "not a proven predictor" in page
    assert (made / "decay.png").read_bytes().startswith(b"\x89PNG")


MISTAKES = [
    (("init", "nowhere"), "no artifact 'nowhere' in "),
    (("plain", "copy"), "plain is a folder, which knows no tasks; give --tasks"),
    (("init", "copy", "--tasks", "missing.jsonl"), "no artifact 'missing.jsonl' in "),
    (("init", "copy", "--tasks", "taught@1"), "'taught@1' is no dataset; its ports: policy"),
    (("init", "tasks"), "'tasks' is no model; its ports: dev, gold"),
    (("init", "lwo=copy"), "lwo=copy: the tasks have no domain 'lwo'; did you mean 'low'?"),
    (("init", "low=copy", "low=taught@1"), "domain 'low' is given two teachers"),
    (("init", "copy", "copy"), "teacher 'copy' is given twice"),
    (("init", "school:taugt"), "run school-1 has no stage 'taugt'; did you mean 'taught'?"),
    (("init", "copy", "--out", "decay.gif"), "cannot draw decay.gif: give --out a name that ends in .svg, .png, .pdf, .html"),
    (("init", "empty"), "empty is empty; give a folder saved by transformers with its tokenizer"),
    (("init", "copy", "--store", "elsewhere"), "'init' is no folder, and there is no store in "),
    (("init",), "TEACHER"),
    (("init", "copy", "--prompts", "1"), "--prompts"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[" ".join(w) for w, _ in MISTAKES])
def test_a_mistake_is_one_line(place, made, words, says, capsys):
    (made / "empty").mkdir(exist_ok=True)
    code, out, err = say(capsys, *words)
    assert code == 2
    assert says in " ".join(err.replace("│", " ").split())
    assert out == ""
    assert place == []
    assert err.count("\n") == 1 or "Usage" in err
    assert not (made / "elsewhere").exists()


@pytest.mark.long
def test_the_command_as_a_process(made, tmp_path):
    import os
    import subprocess
    from pathlib import Path

    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tutelage", "diagnose", "plain", "copy", "--tasks", "letters.jsonl", *SMALL, "--json"]
    env = {**os.environ, "PYTHONPATH": f"{root}/src", "TUTELAGE_STORE": str(tmp_path / "s"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--cores", "1"], cwd=made, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["teachers"][0]["replies"] == 4
    assert count(4, "stage") in done.stderr
    body = Store(tmp_path / "s").load_run("last")
    assert {s.name for s in order(at.of for at in from_record(body["goals"][0]["record"]).stages)} >= {"diagnosis", "tasks"}
