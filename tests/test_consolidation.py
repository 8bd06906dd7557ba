"""The consolidation recipe: equal trials and budgets by construction, and, long, the whole of it in miniature."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.miniature import shrunk
from tutelage.graph import Goals, Stage, from_record, key, order, plan, record
from tutelage.recipes.consolidation import consolidation
from tutelage.recipes.quickstart import NAMES, quickstart
from tutelage.stages.best import Best
from tutelage.stages.fit import Fit
from tutelage.stages.online import Online

ROOT = Path(__file__).parents[1]
PAID = {"kind": "tests.stages.toy.Taste"}
SELECTS = {"select.env.verifier": PAID, "select.sampling.max_new_tokens": 8, "select.every": 2, "select.limit": 8, "rows": 24}
SETS: dict[str, dict[str, Any]] = {
    "tasks": {"pretrain": 600, "gold": 20, "rl": 40, "dev": 10, "heldout": 12},
    "init": {"width": 32, "layers": 1, "mlp": 48},
    "pretrain": {"steps": 20, "rows": 24},
    "sft": {**SELECTS, "steps": 4},
    "sft-continued": {**SELECTS, "select.patience": 2},
    "(rl|mixed|cascade)": {"env.verifier": PAID, "sampling.max_new_tokens": 10, "prompts": 8, "group": 4},
    "rl-": {"steps": 4},
    "mopd": {"env.verifier": PAID, "sampling.max_new_tokens": 10, "prompts": 16, "steps": 4},
    "traces": {"env.verifier": PAID, "at_least": None, "sampling.max_new_tokens": 30, "prompts": 24},
    "best": {"env.verifier": PAID, "sampling.max_new_tokens": 8, "limit": 4},
    "eval": {"sampling.max_new_tokens": 8, "limit": 6},
}


def miniature() -> dict[str, Any]:
    """The recipe's record with little of everything; replies are paid by their characters, or nothing would be learnt."""
    return shrunk(record(consolidation()), SETS)


def stages(goals: Goals) -> dict[str, Stage]:
    return {s.name: s for s in order(at.of for at in goals.stages)}


def test_the_teachers_and_the_distillation_are_the_quickstarts_own():
    made = plan([consolidation(), quickstart()], has=lambda key: False)
    old = {key(s) for s in order(at.of for at in quickstart().stages)}
    assert old <= made.nodes.keys()
    assert len(made.nodes) == len(plan([consolidation()], has=lambda key: False).nodes) + len(NAMES)  # its row "student"


def test_every_method_has_as_many_trials_and_starts_from_sft():
    found = stages(consolidation())
    best = {name: s for name, s in found.items() if isinstance(s, Best)}
    assert {len(s.candidates) for s in best.values()} == {3}
    assert {key(s.select_on.of) for s in best.values()} == {key(found["tasks"])}
    assert {s.select_on.port for s in best.values()} == {"dev"}
    sft = key(found["sft"])
    for name, stage in found.items():
        if isinstance(stage, (Online, Fit)) and name not in ("pretrain", "sft") and not name.startswith("cascade"):
            assert key(stage.model.of) == sft, name


def test_what_takes_no_teachers_may_spend_what_the_teachers_spent():
    found = stages(consolidation())
    student, everything = {key(found["mopd"])}, {key(found[n]) for n in ("mopd", *(f"rl-{d}" for d in NAMES))}
    budgets = {n: s.budget for n, s in found.items() if isinstance(s, (Online, Fit)) and s.budget}
    for name, budget in budgets.items():
        whole = everything if re.match(r"mixed-rl lr|cascade", name) else student
        assert {key(at.of) for at in budget.of} == whole, name
        assert budget.share == (1 / len(NAMES) if name.startswith("cascade") else 1), name
        assert [at.of.name for at in budget.less] == (
            [f"traces of {name.partition(' lr')[0]}"] if "trace-sft" in name else []
        ), name
    assert len(budgets) == 3 * (3 + 1 + 1 + len(NAMES))


def test_only_the_held_out_split_is_in_the_table():
    table = consolidation().table
    assert table
    assert set(table.methods) <= table.rows.keys() > {"sft", "routed oracle"}
    for label, cells in table.rows.items():
        for domain, at in cells.items():
            if label != "majority answer":
                assert at.of.tasks.port == "heldout", (label, domain)
    for domain, row in table.teachers.items():
        assert table.rows["routed oracle"][domain].of is table.rows[row][domain].of


@pytest.mark.long
def test_the_whole_comparison_in_miniature(tmp_path):
    rec, store = miniature(), tmp_path / "store"
    (tmp_path / "mini.json").write_text(json.dumps(rec), "utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    how: dict[str, Any] = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env}
    command = [sys.executable, "-m", "tutelage", "run", "mini.json", "--plain", "--store", str(store)]
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    made = {
        n: json.loads((store / "artifacts" / key(s) / "artifact.json").read_text()) for n, s in stages(from_record(rec)).items()
    }
    spent = {n: m["cost"]["flops"] for n, m in made.items()}
    teachers = sum(spent[f"rl-{d}"] for d in NAMES)
    for name, meta in made.items():
        if budget := meta["facts"].get("budget"):
            assert budget <= spent[name] < budget * (1 + 3 / meta["facts"]["steps"]), name
    for lr in ("5e-05", "0.0001", "0.0002"):
        assert sum(spent[f"cascade-{d} lr {lr}"] for d in NAMES) == pytest.approx(teachers + spent["mopd"], rel=0.3)
    for lr in ("0.0005", "0.001", "0.002"):
        assert spent["traces of trace-sft"] + spent[f"trace-sft lr {lr}"] == pytest.approx(spent["mopd"], rel=0.3)
    report = subprocess.run([*command[:3], "report", "--json", "--store", str(store)], **how)
    assert report.returncode == 0, report.stderr
    found = json.loads(report.stdout)["methods"]["rows"]
    assert list(found) == list(rec["table"]["methods"])
