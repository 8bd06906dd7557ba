"""The splits of the quickstart's domains: nothing leaks, nothing can be guessed, gold ends where RL goes on."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from tutelage.context import Context
from tutelage.graph import At, DataType, Goals, ScoresType, from_record, key, plan, record
from tutelage.spec import SpecError, UserError
from tutelage.stages.majority import Majority
from tutelage.stages.tasks import SHARES, TaskSplits, best_constant, split_of
from tutelage.store import Store
from tutelage.tasks.base import ALPHABET, Domain, document
from tutelage.tasks.gym import GymDomain, Sum
from tutelage.text.rows import read_rows, read_tasks
from tutelage.text.scores import read_scores
from tutelage.types import Task
from tutelage.verify.base import verify
from tutelage.verify.gym import ReasoningGym

DOMAINS: dict[str, Domain] = {d.name: d for d in (kind() for kind in GymDomain.__subclasses__())}
SMALL = {"pretrain": 4000, "gold": 120, "rl": 600, "dev": 60, "heldout": 300}


def make(folder: Path, **fields: Any) -> tuple[TaskSplits, dict[str, Path], dict[str, Any]]:
    """(stage, port -> folder, facts) of splits that have been drawn."""
    stage = TaskSplits(name="tasks", **{"domains": tuple(DOMAINS.values()), **SMALL, **fields})
    ctx = Context(stage, Store(folder))
    stage.run(ctx)
    return stage, {port: ctx.work / port for port in stage.outputs}, ctx.facts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def rows(made) -> dict[str, list[dict[str, Any]]]:
    return {port: read_rows(folder) for port, folder in made[1].items()}


def level(row: dict[str, Any]) -> int:
    return row["meta"]["level"]


# --- leaks ---------------------------------------------------------------------------------------------------------------


def leaks(one: Iterable[tuple[str, str]], other: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """What two sets of (domain, question) share, once questions are normalised."""

    def normal(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
        return {(domain, DOMAINS[domain].same(question)) for domain, question in pairs}

    return normal(one) & normal(other)


def questions(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["domain"], row["prompt"][0]["content"]) for row in rows]


def test_no_question_stands_in_two_splits(rows):
    names = list(rows)
    assert sorted(names) == ["dev", "gold", "heldout", "pretrain", "rl"]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert leaks(questions(rows[one]), questions(rows[other])) == set(), f"{one} and {other}"


def test_no_held_out_question_is_written_in_a_document(rows):
    text = "\n".join(row["text"] for row in rows["pretrain"])
    for _, question in questions(rows["heldout"]):  # a longer one may begin alike: add 12+3 and add 12+34
        assert not re.search(rf"{re.escape(question)}(?! ?[a-z0-9])", text), f"{question!r} is in the documents"


def test_splits_of_two_data_seeds_do_not_leak_into_each_other(rows, tmp_path):
    _, folders, _ = make(tmp_path, data_seed=1)
    later = {port: questions(read_rows(folder)) for port, folder in folders.items()}
    for port, found in rows.items():
        for other in later:
            if other != port:
                assert leaks(questions(found), later[other]) == set()
    old, new = Counter(questions(rows["rl"])), Counter(later["rl"])
    assert sum((old & new).values()) < sum(new.values()) / 2, "another data seed draws other questions"


@pytest.mark.parametrize("name", DOMAINS)
def test_the_librarys_neighbouring_seeds_would_leak(name):
    """The naive way to make a held-out split: ``seed + 1``. The checker above finds nearly all of it in the other."""
    from reasoning_gym import create_dataset

    domain = DOMAINS[name]
    entries = [list(create_dataset(domain.dataset, seed=s, size=200, **domain.config(domain.asked[1]))) for s in (1, 2)]
    train, heldout = ([(name, found[0]) for e in split if (found := domain.put(e))] for split in entries)
    assert len(leaks(train, heldout)) >= 0.95 * len({domain.same(q) for _, q in heldout})


def test_the_split_of_a_question_never_changes():
    """Recorded: an edit that moves questions between splits needs a new version of the stage and this list redone."""
    assert [split_of(q) for q in ("add 1+2", "rev drow", "base 54", "sort 12 52 92", "x")] == RECORDED
    assert sum(SHARES.values()) == 100
    found = Counter(split_of(str(n)) for n in range(20000))
    assert all(abs(found[s] / 200 - share) < 1.5 for s, share in SHARES.items())


RECORDED = ["pretrain", "pretrain", "pretrain", "pretrain", "pretrain"]


# --- sizes, levels, answers ----------------------------------------------------------------------------------------------


def test_every_split_has_its_size(rows, made):
    stage, _, facts = made
    for port, found in rows.items():
        size = getattr(stage, port)
        counts = Counter(row["domain"] for row in found)
        assert counts == facts["rows"][port]
        assert len(found) == size if port == "pretrain" else set(counts.values()) == {size}
        assert len({row["id"] for row in found}) == len(found)
    for port in ("gold", "rl", "dev", "heldout"):
        assert len(set(questions(rows[port]))) == len(rows[port])


@pytest.mark.parametrize("name", DOMAINS)
def test_rl_reaches_beyond_any_gold_example(rows, name):
    domain = DOMAINS[name]
    of = {port: [level(r) for r in found if r["domain"] == name] for port, found in rows.items()}
    assert max(of["gold"]) <= domain.easy[1]
    for port in ("rl", "dev", "heldout"):
        beyond = sum(n > domain.easy[1] for n in of[port]) / len(of[port])
        assert 0.2 < beyond < 1, f"{port}: gold-range tasks are mixed in, and longer ones"
        assert (min(of[port]), max(of[port])) == domain.asked
    assert set(of["pretrain"]) == set(range(domain.levels[0], domain.levels[1] + 1))


def test_any_first_rows_are_a_fair_sample(rows):
    first = Counter(row["domain"] for row in rows["heldout"][:200])
    assert all(30 <= n <= 70 for n in first.values())


def test_gold_replies_are_right_and_only_gold_has_them(rows):
    verifier = ReasoningGym(answer_after="=")

    async def judge() -> list[float]:
        tasks = [Task(r["id"], r["domain"], tuple(r["prompt"]), r["gold"], r["meta"]) for r in rows["gold"]]
        return [
            (await verify(verifier, t, r["completion"][0]["content"])).value for t, r in zip(tasks, rows["gold"], strict=True)
        ]

    assert asyncio.run(judge()) == [1.0] * len(rows["gold"])
    for port in ("pretrain", "rl", "dev", "heldout"):
        assert "completion" not in rows[port][0]
    assert [port for port, found in rows.items() if "text" in found[0]] == ["pretrain"]


def test_no_answer_can_be_guessed(rows, made):
    for name in DOMAINS:
        rl, heldout = (
            [Task(r["id"], name, (), r["gold"]) for r in rows[port] if r["domain"] == name] for port in ("rl", "heldout")
        )
        answer, accuracy = best_constant(rl, heldout)
        assert accuracy < 0.03
        assert made[2]["constant"][name] == {"answer": answer, "heldout": accuracy}
        everywhere = Counter(t.gold for t in rl + heldout)
        assert max(everywhere.values()) / len(rl + heldout) < 0.03


def test_best_constant_is_the_commonest():
    tasks = [Task(str(i), "d", (), gold) for i, gold in enumerate(["2", "1", "2", "3", "1"])]
    assert best_constant(tasks, tasks) == ("1", 0.4)
    with pytest.raises(UserError, match="needs tasks with gold"):
        best_constant([Task("0", "d", ())], tasks)


# --- documents -------------------------------------------------------------------------------------------------------------


def test_documents_come_in_many_layouts_and_some_are_wrong(rows):
    text = [row["text"] for row in rows["pretrain"]]
    assert 0.35 < sum(t.startswith("Q: ") for t in text) / len(text) < 0.47
    assert set("".join(text)) <= set(ALPHABET)
    ends_right = sum(r["text"].endswith(r["gold"] + "\n") for r in rows["pretrain"]) / len(text)
    assert 0.85 <= ends_right < 0.95, "15 % are spoiled, a part of them before the final answer"


def test_documents_without_noise_are_right():
    domain = DOMAINS["sum"]
    item = next(i for i in (domain.draw(3, n) for n in range(9)) if i)
    made = [document(item, Random(n), 0.0) for n in range(50)]
    assert all(item.question in text and text.endswith(item.worked + "\n") for text in made)
    assert len(set(made)) > 20
    assert all(not document(item, Random(n), 1.0).endswith(item.worked + "\n") for n in range(50))


# --- the stage -----------------------------------------------------------------------------------------------------------


def test_the_same_fields_make_the_same_bytes(made, tmp_path):
    _, again, facts = make(tmp_path)
    for port, folder in made[1].items():
        assert (folder / "data.parquet").read_bytes() == (again[port] / "data.parquet").read_bytes()
    assert facts == made[2]


def test_types_are_known_before_anything_is_drawn(made, rows):
    stage = made[0]
    types = stage.infer(lambda at: pytest.fail("it has no inputs"))
    for port, found in rows.items():
        assert isinstance(types[port], DataType)
        assert types[port].columns == tuple(found[0])
        assert set(types[port].domains) == set(DOMAINS)
        assert types[port].rows == len(found)


def test_a_record_brings_back_the_same_stage(made):
    goals = Goals(recipe="r", stages=(made[0].out("rl"),))
    back = from_record(json.loads(json.dumps(record(goals))))
    assert key(back.stages[0].of) == key(made[0])
    moved = made[0].model_copy(update={"data_seed": 1})
    assert key(moved) != key(made[0])


def test_planning_imports_neither_torch_nor_the_library():
    code = (
        "import sys; from tutelage.stages.tasks import TaskSplits; from tutelage.tasks.gym import Sum\n"
        "from tutelage.graph import *\n"
        "s = TaskSplits(name='t', domains=(Sum(),)); plan([Goals(recipe='r', stages=(s.out('rl'),))], lambda k: False)\n"
        "print([m for m in ('torch', 'reasoning_gym', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_too_few_questions_are_said(tmp_path):
    tiny = Sum(levels=(1, 2), easy=(1, 1), asked=(2, 2), weights=(1.0, 1.0))
    with pytest.raises(UserError, match=r"has only \d+ of 120 gold questions at levels 1 to 1; lower tasks\.gold"):
        make(tmp_path, domains=(tiny,))


def test_ranges_that_make_no_sense_are_refused():
    with pytest.raises(ValidationError, match="must reach beyond easy"):
        Sum(easy=(1, 4), asked=(1, 4))
    with pytest.raises(ValidationError, match="must ascend within levels"):
        Sum(easy=(0, 3))
    with pytest.raises(ValidationError, match="a weight >= 0 for each of the levels 1 to 7"):
        Sum(weights=(1.0, 2.0))
    with pytest.raises(ValidationError, match="two domains are named"):
        TaskSplits(name="t", domains=(Sum(), Sum()))


# --- the majority answer ---------------------------------------------------------------------------------------------------


def test_majority_scores_the_best_constant_answer(made, rows, tmp_path):
    tasks, folders, facts = made
    store = Store(tmp_path)
    name = next(iter(DOMAINS))
    stage = Majority(name="m", train=tasks.out("rl"), heldout=tasks.out("heldout"), domain=name, verifier=ReasoningGym())
    ctx = Context(stage, store)
    ctx.input = lambda at: folders[at.port]  # type: ignore[method-assign]
    stage.run(ctx)
    summary, scores = read_scores(ctx.work / "scores")
    assert summary == {"domain": name, "n": 300, "errors": 0, "mean": facts["constant"][name]["heldout"]}
    asked = [t for t in read_tasks(folders["heldout"]) if t.domain == name]
    assert [s["task"] for s in scores] == [t.id for t in asked]
    assert [s["level"] for s in scores] == [t.meta["level"] for t in asked]
    assert {s["reply"] for s in scores} == {facts["constant"][name]["answer"]}


def test_majority_is_typed_when_planned(made):
    def goal(domain: str, port: str = "rl") -> list[Goals]:
        tasks = made[0]
        edge = At(of=tasks, port="heldout")
        stage = Majority(name="m", train=tasks.out(port), heldout=edge, domain=domain, verifier=ReasoningGym())
        return [Goals(recipe="r", stages=(stage.out(),))]

    name = next(iter(DOMAINS))
    node = list(plan(goal(name), lambda key: False).nodes.values())[-1]
    assert node.types == {"scores": ScoresType(name)}
    with pytest.raises(SpecError, match=f"no domain 'poetry'.*{name}"):
        plan(goal("poetry"), lambda key: False)
