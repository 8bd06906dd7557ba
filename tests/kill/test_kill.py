"""Killed at any moment and run again, a recipe ends in the same bits; nothing that was finished is made again.

harness.py says how workers are killed, inject/sitecustomize.py what a boundary is. Every test says its seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from tests.kill.harness import differences, events, goal_keys
from tests.kill.inject import sitecustomize as inject
from tests.kill.quick import short
from tutelage.graph import Goals, key, plan, record
from tutelage.recipes.quickstart import quickstart
from tutelage.run import run
from tutelage.store import Store

ROOT = Path(__file__).parents[2]
KINDS = sorted(set(goal_keys(quickstart()).values()))
STUDENTS = ("init", "pretrain", "sft", "rl-sum", "rl-sort", "mopd", "sft-continued")
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_leftovers():
    """A test that fails must not leave its runs running."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def program(name: str, folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """What a program of programs.py tells."""
    folder.mkdir()
    env = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kill.programs", name, str(folder), str(seed), str(kills)]
    done = subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)


# --- every boundary of a toy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("again", "seed"), [(1, 0), pytest.param(4, 1, marks=pytest.mark.long)])
def test_a_worker_killed_at_every_boundary(tmp_path, again, seed):
    told = program("worker", tmp_path / "f", seed, again)
    assert told["moments"] > 90
    assert told["kills"] >= told["moments"] * (1 + again / 2)
    assert not told["wrong"], f"seed {seed}"


def test_a_run_killed_at_every_boundary(tmp_path):
    told = program("parent", tmp_path / "f", 0, 0)
    assert told["kills"] == told["moments"] > 30
    assert not told["wrong"]


def test_what_was_done_since_the_last_checkpoint_is_lost_and_no_more(tmp_path):
    """harness.lost holds the bound."""
    told = program("clock", tmp_path / "f", 0, 3)
    assert not told["wrong"]
    assert max(told["lost"]) > 1, "a kill fell between two checkpoints"


# --- random moments in every kind of stage --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The short quickstart, made whole and killed: (seed, folder, what was told)."""
    folder = tmp_path_factory.mktemp("kill") / "f"
    return 0, folder, program("quickstart", folder, 0, 30)


def check(seed: int, told: dict[str, Any], kills: int) -> None:
    assert not told["wrong"], f"seed {seed}, killed at {told['kills']}"
    assert len(told["kills"]) >= kills
    assert set(told["sorts"]) == {"time", *inject.HOWS}
    assert all(told["kinds"].get(kind, 0) >= 1 for kind in KINDS), told["kinds"]


def test_the_short_quickstart_learns(killed):
    """Where nothing is learnt, a stage that forgets what it has learnt would go unseen."""
    store, at = Store(killed[1] / "whole"), {name: key(stage) for name, stage in toy.stages(short()).items()}
    contents = [store.meta(at[name])["content"]["policy"] for name in STUDENTS]
    assert len(set(contents)) == len(STUDENTS)
    assert store.meta(at["sft"])["facts"]["selected"]["step"] > 0
    assert all(sum(m["grad_norm"] > 0 for m in store.metrics(at[name]) if "grad_norm" in m) >= 4 for name in STUDENTS[1:])


def test_a_quickstart_killed_at_random_moments(killed):
    seed, _, told = killed
    check(seed, told, 30)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1])
def test_a_quickstart_killed_two_hundred_times(tmp_path, seed):
    check(seed, program("quickstart", tmp_path / "f", seed, 200), 200)


# --- the command ----------------------------------------------------------------------------------------------------------


class Command:
    """``tutelage run`` of one record on one store, started again and again."""

    def __init__(self, folder: Path, goals: Goals, store: Store, every: float = 0.0):
        self.store, self.file, self.every = store, folder / "recipe.json", every
        self.file.write_text(json.dumps(record(goals)))

    def start(self, kill_at: str = "") -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": f"{inject.__file__.rpartition('/')[0]}:{ROOT}/src:{ROOT}"}
        env |= {"OMP_NUM_THREADS": "1"} | ({"KILL_AT": kill_at} if kill_at else {})
        command = [sys.executable, "-m", "tutelage", "run", str(self.file), "--store", str(self.store.root), "--plain"]
        command += ["--cores", "1", "--checkpoint-every", str(self.every)]
        pipe = subprocess.PIPE
        STARTED.append(subprocess.Popen(command, env=env, cwd=self.file.parent, text=True, stdout=pipe, stderr=pipe))
        return STARTED[-1]

    def end(self, kill_at: str = "") -> tuple[int, str]:
        process = self.start(kill_at)
        out, err = process.communicate(timeout=120)
        return process.returncode, out + err


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def attempts(store: Store, stage: str) -> list[int | None]:
    """The steps a stage was begun at, in order; None for its first."""
    found = [e for e in events(store) if e["event"] in ("stage started", "stage resumed") and e["stage"] == stage]
    return [e.get("step") for e in sorted(found, key=lambda e: e["time"])]


@pytest.fixture
def toys(tmp_path):
    """(whole store, empty store, goals, command)"""
    goals = toy.small(steps=12, pause=0.04)
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    assert run(plan([toy.small(steps=12)], whole.has), whole, cores=2).state == "done"
    return whole, broken, goals, Command(tmp_path, goals, broken)


def test_the_command_killed_at_boundaries(toys):
    """Itself as a run begins, each of its workers three times, itself again when all is made and the run is written down."""
    whole, broken, goals, command = toys
    rng = random.Random(0)
    moments = [("parent", 3, 9), *[("worker", 10, 40)] * 3, ("parent", 11, 14)]
    ends = [command.end(f"{role}:{rng.randint(first, last)}:{rng.choice(inject.HOWS)}") for role, first, last in moments]
    assert [code for code, _ in ends] == [-signal.SIGKILL, 1, 1, 1, -signal.SIGKILL], "a dead worker is a failed stage"
    assert len([e for e in events(broken) if e["event"] == "stage died"]) >= 3
    assert command.end()[0] == 0
    assert not differences(whole, broken, goals)
    assert all(broken.load_run(name)["recipe"] == "small" for name in broken.runs())


@pytest.mark.parametrize("whom", ["worker", "parent"])
def test_the_command_killed_at_a_random_time(toys, whom):
    whole, broken, goals, command = toys
    rng = random.Random(0)
    for name in ("base", "right"):
        mine, process = key(toy.stages(goals)[name]), command.start()
        until(lambda: len(broken.metrics(mine)) > 1)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        worker = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1])
        os.kill(worker if whom == "worker" else process.pid, signal.SIGKILL)
        assert process.wait(30) == (1 if whom == "worker" else -signal.SIGKILL)
    assert command.end()[0] == 0
    assert not differences(whole, broken, goals)
    assert attempts(broken, "base")[1] is not None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_stopped_by_a_signal_says_how_to_go_on(toys, tmp_path, number, code):
    whole, broken, goals, _ = toys
    command, base = Command(tmp_path, goals, broken, every=3600), key(toy.stages(goals)["base"])
    process = command.start()
    until(lambda: len(broken.metrics(base)) > 1)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert "run the same command again to go on from the last checkpoints" in out
    step = broken.checkpoint(base)
    assert command.end()[0] == 0
    assert step
    assert attempts(broken, "base") == [None, step]
    assert not differences(whole, broken, goals)


def test_the_command_killed_while_it_distils(killed, tmp_path):
    """A worker that has imported torch by itself, stopped between other checkpoints, ends in the bits of the forked ones."""
    whole, goals = Store(killed[1] / "whole"), short()
    mine, step = key(toy.stages(goals)["mopd"]), None
    for boundary in (100, 85, 115, 70, 130):  # how many there are before the first checkpoint depends on the code
        broken = Store(shutil.copytree(whole.root, tmp_path / f"broken-{boundary}"))
        for name in ("mopd", "eval student / sum", "eval student / sort"):
            shutil.rmtree(broken.folder(key(toy.stages(goals)[name])))
        for file in (broken.root / "events").iterdir():
            file.unlink()
        assert Command(tmp_path, goals, broken).end(f"worker:{boundary}:after")[0] in (0, 1)
        if step := broken.checkpoint(mine):
            break
    assert step
    command = Command(tmp_path, goals, broken, every=60)
    code, out = command.end()
    assert code == 0, out
    assert attempts(broken, "mopd") == [None, step]
    assert not differences(whole, broken, goals)
