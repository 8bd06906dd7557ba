"""The study of co-distillation: equal trials and compute by construction, and, long, the whole of it in miniature."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.miniature import put, shrunk
from tests.test_consolidation import SETS, stages
from tutelage.graph import from_record, key, plan, record
from tutelage.recipes.quickstart import CLIMB, NAMES, quickstart
from tutelage.recipes.studies.codistillation import RATES, codistillation

ROOT = Path(__file__).parents[1]
LABELS = tuple(f"lr {lr:g}" for lr in RATES)
PLAYS = {**SETS["(rl|mixed|cascade)"], "steps": 4}
LEARNS = {**SETS["mopd"], "steps": 6}


def miniature() -> dict[str, Any]:
    """The study's record with little of everything; branches stay what the stages of their own are."""
    sets = {**{p: s for p, s in SETS.items() if p not in ("mopd", "rl-")}, "rl-": PLAYS, "mopd": {**LEARNS, "steps": 100}}
    rec = shrunk(record(codistillation()), sets)
    for name, stage in rec["stages"].items():
        if name.startswith("codistill"):
            put(stage["student"], LEARNS, name)
            for branch in stage["branches"].values():
                put(branch, PLAYS, name)
    return rec


def test_both_ways_have_the_same_specialists_start_and_trials():
    found, old = stages(codistillation()), stages(quickstart())
    assert set(found["best mopd"].candidates) == set(found["best codistill"].candidates) == set(LABELS)
    for label in LABELS:
        both, alone = found[f"codistill {label}"], found[f"mopd {label}"]
        for name in NAMES:
            assert key(both.branches[name]) == key(alone.teachers[name].of) == key(old[f"rl-{name}"])
        as_mine = {f: getattr(both.student, f) for f in ("name", "steps", "budget", "teachers")}
        assert key(alone.model_copy(update=as_mine)) == key(both.student)
        assert key(both.student.model.of) == key(found["sft"])
        assert both.student.steps == max(CLIMB.values())


def test_the_student_that_waits_may_spend_what_the_other_spent():
    found = stages(codistillation())
    for label in LABELS:
        budget = found[f"mopd {label}"].budget
        assert [key(at.of) for at in budget.of] == [key(found[f"codistill {label}"])]
        assert {key(at.of) for at in budget.less} == {key(found[f"rl-{d}"]) for d in NAMES}
        assert budget.share == 1


def test_only_the_held_out_split_is_in_the_table():
    table = codistillation().table
    assert table
    assert {at.of.tasks.port for cells in table.rows.values() for at in cells.values()} == {"heldout"}
    assert plan([codistillation()], has=lambda key: False).todo


@pytest.mark.long
def test_the_whole_study_in_miniature(tmp_path):
    rec, store = miniature(), tmp_path / "store"
    (tmp_path / "mini.json").write_text(json.dumps(rec), "utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    how: dict[str, Any] = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env}
    command = [sys.executable, "-m", "tutelage"]
    done = subprocess.run([*command, "run", "mini.json", "--plain", "--store", str(store)], **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    homes = {n: store / "artifacts" / key(s) for n, s in stages(from_record(rec)).items()}
    made = {n: json.loads((home / "artifact.json").read_text()) for n, home in homes.items()}
    teachers = sum(made[f"rl-{d}"]["cost"]["flops"] for d in NAMES)
    for label in LABELS:
        both, alone = made[f"codistill {label}"], made[f"mopd {label}"]
        step = alone["cost"]["flops"] / alone["facts"]["steps"]
        assert 0 <= teachers + alone["cost"]["flops"] - both["cost"]["flops"] < 1.5 * step, label
        for name in NAMES:
            assert both["facts"]["learners"][name]["flops"] == made[f"rl-{name}"]["cost"]["flops"]
            files = [homes[n] / p / "model.safetensors" for n, p in ((f"codistill {label}", name), (f"rl-{name}", "policy"))]
            assert files[0].read_bytes() == files[1].read_bytes()
        assert "student" in (homes[f"codistill {label}"] / "student" / "README.md").read_text()
    report = subprocess.run([*command, "report", "--json", "--store", str(store)], **how)
    assert report.returncode == 0, report.stderr
    assert list(json.loads(report.stdout)["methods"]["rows"]) == list(rec["table"]["methods"])
