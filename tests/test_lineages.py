"""The studies of teachers by lineage and number: arms that differ in what is asked alone; and, long, each in miniature."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.miniature import shrunk
from tutelage.graph import Goals, Stage, all_goals, key, order, plan, record
from tutelage.recipes.quickstart import NAMES, quickstart
from tutelage.recipes.studies.diagnose import FORMAT, LINEAGES, SAME, TAUGHT, WARM, diagnose
from tutelage.recipes.studies.overlap import overlap
from tutelage.recipes.studies.teachers import SETS, halved, teachers
from tutelage.recipes.studies.warmup import LENGTHS, warmup
from tutelage.stages.best import Best
from tutelage.stages.diagnose import Diagnose
from tutelage.stages.fit import Fit
from tutelage.stages.online import Online
from tutelage.store import Store

ROOT = Path(__file__).parents[1]
STUDIES = {"diagnose": diagnose, "warmup": warmup, "overlap": overlap, "teachers": teachers}


def stages(goals: Goals) -> dict[str, Stage]:
    return {s.name: s for s in order(at.of for at in all_goals(goals))}


# --- arms ----------------------------------------------------------------------------------------------------------------


def test_the_same_lineage_is_the_quickstarts_and_the_other_base_that_of_its_next_seed():
    found = stages(diagnose(3))
    for seed, ending in ((3, ""), (4, " other base")):
        own = stages(quickstart(seed))
        for name in ("pretrain", "sft", *(f"rl-{d}" for d in TAUGHT)):
            assert key(found[name + ending]) == key(own[name]), name
    assert len({key(found[f"rl-sort{'' if n == SAME else ' ' + n}"]) for n in LINEAGES}) == len(LINEAGES)


def test_the_studies_share_their_arms():
    whole = {key(s) for s in stages(diagnose()).values()}
    for other in (overlap, warmup):
        mine = {key(s): n for n, s in stages(other()).items() if isinstance(s, (Online, Diagnose))}
        new = {n for k, n in mine.items() if k not in whole}
        if other is overlap:
            assert len(new) == 2 * len(LINEAGES)  # the learning rates that studies/diagnose does not try
            assert all(n.endswith(("lr 0.0005", "lr 0.00025")) for n in new)
        else:
            assert {n.rpartition(" after ")[2] for n in new} == {str(n) for n in LENGTHS if n not in (0, WARM)}


@pytest.mark.parametrize("study", [diagnose, warmup])
def test_a_warm_up_is_paid_by_the_distillation(study):
    found = stages(study())
    warmed = {n: s for n, s in found.items() if isinstance(s, Online) and " after " in n}
    assert warmed
    for name, stage in warmed.items():
        whole, _, steps = name.rpartition(" after ")
        assert [at.of.name for at in stage.budget.of] == [whole]
        fit = stage.model.of
        assert isinstance(fit, Fit)
        assert (fit.steps, key(fit.model.of)) == (int(steps), key(found["sft"]))
        assert {key(at.of) for at in stage.budget.less} == {key(fit), key(fit.data.of)}
        assert stage.teachers == fit.data.of.policies
        assert stage.loss is found[whole].loss


@pytest.mark.parametrize("name", STUDIES)
def test_every_method_is_held_to_the_teachers_that_taught_it(name):
    table = STUDIES[name]().table
    assert plan([STUDIES[name]()], has=lambda key: False).todo
    for method in table.methods:
        stage = table.sources[method].of
        stage = next(iter(stage.candidates.values())).of if isinstance(stage, Best) else stage
        taught = getattr(stage, "teachers", None) or stage.data.of.policies
        rows = table.taught_by.get(method, table.teachers)
        assert {d: key(table.sources[row].of) for d, row in rows.items()} == {d: key(at.of) for d, at in taught.items()}, method
        assert not isinstance(stage, Online) or set(stage.domains) == set(rows)


def test_every_student_and_set_of_teachers_is_measured_before():
    for study in (diagnose, overlap, warmup):
        found = stages(study())
        told = {
            (key(s.model.of), *sorted(key(t.of) for t in s.teachers.values()))
            for s in found.values()
            if isinstance(s, Diagnose)
        }
        for stage in found.values():
            if isinstance(stage, Online) and stage.teachers:
                assert (key(stage.model.of), *sorted(key(t.of) for t in stage.teachers.values())) in told


def test_equal_trials_on_the_domains_that_are_taught():
    best = [s for s in stages(overlap()).values() if isinstance(s, Best)]
    assert {len(s.candidates) for s in best} == {2}
    assert {(s.domains, s.select_on.port) for s in best} == {(TAUGHT, "dev")}


def test_each_set_of_teachers_is_asked_as_much_and_no_half_is_left_out():
    found = stages(teachers())
    names = tuple(d.name for d in halved())
    spent: dict[int, int] = {}
    for count in SETS:
        climbs = {key(at.of): at.of for at in found[f"mopd {count}"].teachers.values()}
        assert len(climbs) == count
        spent[count] = sum(s.steps * s.prompts * s.group for s in climbs.values())
        assert set(found[f"mopd {count}"].teachers) == set(found[f"mopd {count}, balanced"].domains) == set(names)
    assert len(set(spent.values())) == 1
    for short, long in zip(halved()[::2], halved()[1::2], strict=True):
        whole = next(d for d in found["tasks"].domains if d.name == short.name.removeprefix("short "))
        assert short.asked[0] == whole.asked[0]
        assert short.asked[1] + 1 == long.asked[0]
        assert long.asked[1] == whole.asked[1]
        assert type(short)(**dict(short)).asked == short.asked  # and it passes the checks of a domain
    assert len(names) == 2 * len(NAMES)


# --- in miniature --------------------------------------------------------------------------------------------------------

PAID = {"kind": "tests.stages.toy.Taste"}
SELECTS = {"select.env.verifier": PAID, "select.sampling.max_new_tokens": 8, "select.every": 2, "select.limit": 8, "rows": 24}
ASKS = {"env.verifier": PAID, "sampling.max_new_tokens": 10}
SETS_OF: dict[str, dict[str, Any]] = {
    "tasks$": {"pretrain": 400, "gold": 20, "rl": 40, "dev": 10, "heldout": 12},
    "tasks ": {"gold": 8},
    "tasks halves": {"rl": 16, "dev": 2, "heldout": 8},
    "init": {"width": 32, "layers": 1, "mlp": 48},
    "pretrain": {"steps": 10, "rows": 24},
    "sft": {**SELECTS, "steps": 3},
    "rl-": {**ASKS, "steps": 2, "prompts": 8, "group": 4},
    "mopd [^ ]+ [^ ]+ [^ ]+ [^ ]+$|mopd .*lr|mopd [0-9]": {"steps": 6},
    "mopd": {**ASKS, "prompts": 16},
    "traces": {**ASKS, "at_least": None, "sampling.max_new_tokens": 30, "prompts": 6},
    "warm-up": {"rows": 2},
    "warm-up [0-9]": {"steps": 1},
    "best": {"env.verifier": PAID, "sampling.max_new_tokens": 8, "limit": 4},
    "diagnosis": {**ASKS, "prompts": 6},
    "eval": {"env.verifier": PAID, "sampling.max_new_tokens": 8, "limit": 8},
}


def miniature(goals: Goals) -> dict[str, Any]:
    """A record with little of everything; replies are paid by their characters, or nothing would be learnt."""
    return shrunk(record(goals), SETS_OF)


@pytest.mark.long
@pytest.mark.parametrize("name", STUDIES)
def test_a_whole_study_in_miniature(name, tmp_path):
    rec, store = miniature(STUDIES[name]()), tmp_path / "store"
    (tmp_path / "mini.json").write_text(json.dumps(rec), "utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    how: dict[str, Any] = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env}
    command = [sys.executable, "-m", "tutelage", "run", "mini.json", "--plain", "--store", str(store)]
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = subprocess.run([*command[:3], "report", "--json", "--store", str(store)], **how)
    assert report.returncode == 0, report.stderr
    methods = json.loads(report.stdout)["methods"]["rows"]
    assert list(methods) == list(rec["table"]["methods"])
    assert all(set(m["domains"]) == set(rec["table"]["teachers"]) for m in methods.values())
    if name == "teachers":
        return
    found = runpy.run_path(str(ROOT / "docs" / "results" / "predict.py"))["predictors"](Store(store, create=False), "last")
    arms = [m for m in methods if not re.search("alone|nothing else|for everything", m)]
    assert {d: n + found["left_out"][d] for d, n in found["points"].items()} == dict.fromkeys(TAUGHT, len(arms))


def test_gold_in_the_other_format_is_the_same_gold():
    found = stages(diagnose())
    assert key(found["gold other format"].data.of) == key(found["tasks"])
    assert found["gold other format"].layout.model_dump() == found[f"rl-sort {FORMAT}"].env.verifier.layout.model_dump()
