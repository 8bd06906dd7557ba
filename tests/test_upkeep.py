"""Upkeep: every kind of damage is named, what is sound is never blamed; what a kept run needs is never freed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from tests import toy
from tutelage import cli, upkeep
from tutelage.ancestry import gather
from tutelage.context import Context
from tutelage.graph import Goals, plan
from tutelage.index import summaries
from tutelage.run import describe
from tutelage.spec import UserError
from tutelage.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def make(store: Store, *goals: Goals) -> dict[str, str]:
    """Runs toy stages here, without workers, and saves the run; returns name -> key of the last goals."""
    made = plan(goals, store.has)
    store.new_run(goals[0].recipe, describe(made, {}, []))
    for node in made.todo:
        ctx = Context(node.stage, store)
        node.stage.run(ctx)
        (ctx.work / "log.txt").write_text("said something\n")
        ins = [{"path": f, "key": k, "port": p, "step": s, "name": made.nodes[k].stage.name} for f, k, p, s in node.inputs]
        meta = {"name": node.stage.name, "kind": node.stage.kind(), "version": 1, "inputs": ins, "finished": time.time()}
        outputs = {port: {"kind": kind} for port, kind in node.stage.outputs.items()}
        store.publish(node.key, {**meta, "outputs": outputs, "cost": {"flops": 5.0}, "seconds": 1.0})
    return {n.stage.name: n.key for n in made.nodes.values()}


def tutelage(store: Store, *words: str, **more: Any) -> Any:
    """As on the command line, but in this process."""
    return CliRunner().invoke(cli.app, ["store", *words, "--store", str(store.root)], env={"COLUMNS": "150"}, **more)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))


# --- damage ------------------------------------------------------------------------------------------------------------


def test_a_sound_store_has_no_damage(store):
    make(store, toy.small(), toy.small(seed=1))
    assert list(upkeep.verify(store)) == []
    done = tutelage(store, "verify")
    assert (done.exit_code, done.output) == (0, "10 artifacts verified: everything is as it was made\n")


def flip(folder: Path) -> None:
    file = folder / "policy" / "model.json"
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    file.write_bytes(raw)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a flipped bit": (flip, "policy/model.json", "not what"),
    "a cut file": (lambda f: cut(f / "policy" / "model.json"), "policy/model.json", "not what"),
    "a missing file": (lambda f: (f / "policy" / "model.json").unlink(), "policy/model.json", "is missing"),
    "a surplus file": (lambda f: (f / "policy" / "more.bin").write_text(""), "policy/more.bin", "does not belong"),
    "a missing port": (lambda f: shutil.rmtree(f / "policy"), "policy/model.json", "is missing"),
    "a surplus port": (lambda f: shutil.copytree(f / "policy", f / "policy@7"), "policy@7/model.json", "does not belong"),
    "a surplus file beside": (lambda f: (f / "notes").write_text(""), "notes", "does not belong"),
    "cut metrics": (lambda f: cut(f / "metrics.jsonl"), "metrics.jsonl", "not what"),
    "a missing log": (lambda f: (f / "log.txt").unlink(), "log.txt", "is missing"),
    "a cut artifact.json": (lambda f: cut(f / "artifact.json"), "artifact.json", "cannot be read"),
    "an emptied artifact.json": (lambda f: (f / "artifact.json").write_text(""), "artifact.json", "cannot be read"),
    "no artifact.json": (lambda f: (f / "artifact.json").unlink(), "artifact.json", "is missing"),
    "a changed cost": (lambda f: edit(f / "artifact.json", lambda m: m["cost"].update(flops=6.0)), "artifact.json", "changed"),
    "no seal": (lambda f: edit(f / "artifact.json", lambda m: m.pop("seal")), "artifact.json", "changed"),
    "another's": (lambda f: edit(f / "artifact.json", lambda m: m.update(key="k")), "artifact.json", "its key is 'k'"),
    "a newer version": (lambda f: edit(f / "artifact.json", lambda m: m.update(format=2)), "artifact.json", "newer Tutelage"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_once_with_name_key_and_path(store, how):
    keys = make(store, toy.small())
    key = keys["base"]
    harm, path, problem = DAMAGE[how]
    harm(store.folder(key))
    [line] = upkeep.damage(store, key)
    assert line.startswith(f"artifacts/{key}/{path}: ")
    assert problem in line
    assert "\n" not in line
    found = [f for f in upkeep.verify(store) if f.what == "artifact"]
    assert [(f.name, f.key, f.path) for f in found] == [("base", key, f"artifacts/{key}/{path}")]
    assert set(found[0].hangs) == {"left", "right", "score-left", "score-right"}
    done = tutelage(store, "verify")
    assert done.exit_code == 1
    assert f"base {key[:8]}  {line}" in done.output
    assert all(upkeep.damage(store, k) == [] for n, k in keys.items() if n != "base")


def test_a_renamed_file_is_one_missing_and_one_too_many(store):
    key = make(store, toy.small())["base"]
    folder = store.folder(key) / "policy"
    (folder / "model.json").rename(folder / "m.json")
    missing, surplus = upkeep.damage(store, key)
    assert missing.endswith("/policy/model.json: is missing")
    assert surplus.endswith("/policy/m.json: does not belong there")


def test_what_is_not_payload_is_no_damage(store):
    keys = make(store, toy.small())
    folder = store.folder(keys["base"])
    (folder / "policy" / "README.md").write_text("a card")
    (folder / "checkpoint-3").mkdir()
    assert list(upkeep.verify(store)) == []


def test_artifacts_made_before_there_were_seals_verify(store):
    key = make(store, toy.small())["base"]
    edit(store.folder(key) / "artifact.json", lambda m: (m.pop("seal"), m.pop("files")))
    assert upkeep.damage(store, key) == []
    (store.folder(key) / "log.txt").unlink()
    assert upkeep.damage(store, key) == [], "nothing says that there was one"
    flip(store.folder(key))
    assert len(upkeep.damage(store, key)) == 1


def test_verifying_reads_every_payload_byte(store):
    keys = make(store, toy.small())
    read: list[int] = []
    list(upkeep.verify(store, [keys["base"]], read.append))
    folder = store.folder(keys["base"])
    assert sum(read) == summaries(store)[keys["base"]].size - (folder / "artifact.json").stat().st_size


def test_a_missing_input_is_told_once(store):
    keys = make(store, toy.small())
    store.remove(keys["base"])
    [found] = upkeep.verify(store)
    assert (found.what, found.name, found.path) == ("input", "base", f"artifacts/{keys['base']}")
    assert found.hangs == ("left", "right", "score-left", "score-right")
    assert upkeep.remove(store, [found]) == {}, "what was made from it is whole"


def test_runs_events_and_checkpoints_are_read(store):
    keys = make(store, toy.small())
    store.event("something")
    [events] = (store.root / "events").iterdir()
    with events.open("a") as file:
        file.write('{"event": "cut short by a ki')
    (store.root / "runs" / "r-9.json").write_text("{")
    ctx = Context(toy.stages(toy.small(steps=99))["base"], store, every=0.0)
    ctx.boundary(3, lambda to: (to / "state.json").write_text("{}"))
    assert [(f.what, f.path) for f in upkeep.verify(store)] == [("run", "runs/r-9.json")]
    with events.open("a") as file:
        file.write('ll\n{"event": "whole"}\n')
    (ctx.work / "checkpoint-3" / "state.json").write_text("[]")
    found = {f.what: f for f in upkeep.verify(store)}
    assert set(found) == {"run", "events", "checkpoint"}
    assert found["events"].problem == "line 2 is no event"
    assert found["checkpoint"].path == f"work/{ctx.key}/checkpoint-3"
    assert list(upkeep.verify(store, keys.values())) == [], "asked for artifacts alone"


def test_removing_takes_out_the_damaged_alone_and_the_next_run_makes_it_again(store):
    goals = toy.small()
    keys = make(store, goals)
    flip(store.folder(keys["base"]))
    cut(store.folder(keys["score-left"]) / "artifact.json")
    edit(store.folder(keys["more"]) / "artifact.json", lambda m: m.update(format=2))
    done = tutelage(store, "verify", "--remove")
    assert done.exit_code == 1
    removed = done.output.splitlines()[-1]
    assert removed.startswith("removed: ")
    assert f"base {keys['base'][:8]}" in removed
    assert set(store.keys()) == set(keys.values()) - {keys["base"], keys["score-left"]}, "a newer version's stays"
    assert [n.stage.name for n in plan([goals], store.has).todo] == ["score-left"]
    edit(store.folder(keys["more"]) / "artifact.json", lambda m: m.pop("format"))


def test_verify_takes_names_and_keys_and_tells_in_json(store):
    keys = make(store, toy.small())
    flip(store.folder(keys["base"]))
    assert tutelage(store, "verify", "left", keys["right"][:6]).exit_code == 0
    done = tutelage(store, "verify", "base", "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert [d["name"] for d in told["damage"]] == ["base"]
    cut(store.folder(keys["base"]) / "artifact.json")
    assert tutelage(store, "verify", keys["base"][:8]).exit_code == 1


# --- freeing -----------------------------------------------------------------------------------------------------------


def test_the_keys_of_a_run_are_the_whole_ancestry(store):
    """What gc relies on: nothing that a run's artifacts were made from is outside the run's keys."""
    make(store, toy.small(), toy.small(seed=1))
    for goals in upkeep.goals(store).values():
        keys = {k for _, each in goals for k in each.values()}
        assert keys == {m for k in keys for m in gather(store, store.meta(k)).metas}


def two_runs(store: Store) -> tuple[set[str], set[str]]:
    """Keys of small-1 and of small-2, which share some."""
    return set(make(store, toy.small()).values()), set(make(store, toy.small(seed=1)).values())


def test_a_forgotten_run_frees_what_only_it_needs(store):
    first, second = two_runs(store)
    assert first - second
    assert first & second
    (store.root / "reports").mkdir()
    for run in ("small-1", "small-2"):
        (store.root / "reports" / f"{run}.html").write_text("page")
    store.event("something")
    assert tutelage(store, "gc").output == "nothing to free: runs need all there is\n"
    shown = tutelage(store, "gc", "--forget", "small-1")
    assert "nothing was freed; --yes frees it" in shown.output
    assert set(store.keys()) == first | second
    done = tutelage(store, "gc", "--forget", "small-1", "--yes")
    assert done.exit_code == 0
    assert set(store.keys()) == second
    assert store.runs() == ["small-2"]
    assert [f.name for f in (store.root / "reports").iterdir()] == ["small-2.html"]
    assert list((store.root / "events").iterdir()), "history stays"
    assert list(upkeep.verify(store)) == []
    assert list((store.root / "work").iterdir()) == []


def test_the_last_runs_of_each_recipe_are_kept(store):
    for n in range(3):
        store.save_run(f"a-{n}", {"goals": [{"keys": {}}]})
        store.save_run(f"b-c-{n}", {"goals": [{"keys": {}}]})
    assert set(upkeep.kept_runs(store, keep_last=1)) == {"a-2", "b-c-2"}
    assert set(upkeep.kept_runs(store, ["a-2"], keep_last=2)) == {"a-1", "b-c-1", "b-c-2"}
    assert len(upkeep.kept_runs(store)) == 6
    with pytest.raises(UserError, match=r"unknown run 'a-7'.*did you mean"):
        upkeep.kept_runs(store, ["a-7"])


def test_unfinished_work_goes_unless_a_run_wants_it_or_somebody_makes_it(store):
    keys = make(store, toy.small())
    store.remove(keys["score-left"])
    made, wanted, stray, busy = keys["base"], keys["score-left"], "0" * 32, "1" * 32
    for key in (made, wanted, stray, busy):
        (store.work(key) / "checkpoint-1").mkdir()
    with store.lock(busy):
        going = {i.path.name for i in upkeep.survey(store, store.runs()) if i.what == "work"}
        assert going == {made, stray}


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(store):
    keys = make(store, toy.small())
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder = store.folder(keys["base"])
    left = [folder / "checkpoint-4", folder / ".checkpoint-5", store.root / "work" / f".removed-k.{dead.pid}"]
    left += [store.root / "artifacts" / "half-removed" / "policy"]
    for each in left:
        each.mkdir(parents=True)
    half = [
        f".format.{dead.pid}",
        f"runs/.new.{dead.pid}",
        f"work/{keys['base']}/.x.json.{dead.pid}",
        f".index.json.{dead.pid}",
    ]
    store.work(keys["base"])
    living = subprocess.Popen(["sleep", "60"])
    stays = [store.root / f".index.json.{living.pid}", folder / "policy" / ".x.1", store.root / "work" / ".keep"]
    for file in (*(store.root / h for h in half), *stays):
        file.write_text("x")
    with store.lock("2" * 32), store.lock("runs"):
        pass
    with store.lock("3" * 32):
        upkeep_items = upkeep.survey(store, store.runs())
    living.kill()
    assert {i.path for i in upkeep_items if i.what == "lock"} == {store.root / "locks" / f"{'2' * 32}.lock"}
    going = {i.path for i in upkeep_items}
    gone = {*left[:3], left[3].parent, store.root / half[0], store.root / half[1], store.root / half[3]}
    assert gone <= going
    assert not going & set(stays)
    upkeep.free(store, upkeep_items)
    assert not any(p.exists() for p in (*left, *(store.root / h for h in half)))
    assert all(p.exists() for p in stays)
    assert set(store.keys()) == set(keys.values())


def test_nothing_is_freed_or_removed_while_a_run_lives(store):
    make(store, toy.small())
    shown = upkeep.survey(store, [])
    with store.lock("run.small-1"):
        with pytest.raises(UserError, match="run 'small-1' is using the store"):
            upkeep.free(store, shown)
        for words in (("gc", "--yes", "--forget", "small-1"), ("verify", "--remove")):
            done = tutelage(store, *words)
            assert isinstance(done.exception, UserError)
            assert "run 'small-1' is using the store" in str(done.exception)
        assert tutelage(store, "verify").exit_code == 0, "looking is allowed"
    assert len(store.keys()) == 7


def test_a_run_that_began_after_the_showing_keeps_what_it_needs(store):
    keys = make(store, toy.small())
    shown = upkeep.survey(store, upkeep.kept_runs(store, ["small-1"]))
    assert len([i for i in shown if i.what == "artifact"]) == len(keys)
    make(store, toy.small())
    upkeep.free(store, shown)
    assert set(store.keys()) == set(keys.values())
    assert store.runs() == ["small-2"]


def test_a_broken_run_file_frees_nothing(store):
    make(store, toy.small())
    (store.root / "runs" / "small-1.json").write_text("{")
    done = tutelage(store, "gc", "--yes")
    assert isinstance(done.exception, UserError)
    assert "--forget small-1" in str(done.exception)
    assert len(store.keys()) == 7


def test_a_store_without_runs_is_freed_only_when_told_to(store, monkeypatch):
    make(store, toy.small())
    (store.root / "runs" / "small-1.json").unlink()
    on_a_terminal(monkeypatch)
    done = tutelage(store, "gc", input="y\n")
    assert "no run is kept, so nothing in the store is needed; --yes frees it all" in done.output
    assert len(store.keys()) == 7
    tutelage(store, "gc", "--yes")
    assert store.keys() == []


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutelage.commands.store.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))


@pytest.mark.parametrize(("answer", "left"), [("n\n", 2), ("y\n", 1)])
def test_on_a_terminal_it_asks(store, monkeypatch, answer, left):
    two_runs(store)
    on_a_terminal(monkeypatch)
    assert "free it?" in tutelage(store, "gc", "--keep-last", "1", input=answer).output
    assert len(store.runs()) == left


KILLED = """
import os, shutil, sys
from pathlib import Path
from tutelage import upkeep
from tutelage.store import Store

def free(root, at):
    store, seen = Store(root), 0
    shown = upkeep.survey(store, upkeep.kept_runs(store, ["small-1"]))
    def before(event, facts):
        nonlocal seen
        if event in ("os.remove", "os.rmdir", "os.rename"):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), 9)
    sys.addaudithook(before)
    upkeep.free(store, shown)

n, ended = 0, 1
while ended:  # killed before the first change to the disk, the second, ...
    n += 1
    root = shutil.copytree(sys.argv[1], Path(sys.argv[2]) / str(n))
    child = os.fork()
    if not child:
        free(root, n)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    assert ended in (0, 9), ended
"""


def test_killed_anywhere_it_leaves_a_store_that_works_and_is_ended_by_freeing_again(store, tmp_path):
    first, second = two_runs(store)
    checkpoint = store.work("4" * 32) / "checkpoint-1"
    checkpoint.mkdir()
    state = {"step": 1, "metrics": 0, "cost": {"flops": 0.0, "tokens": {}}, "facts": {}, "seconds": 1.0}
    for name, body in {"context.json": state, "state.json": {}}.items():
        (checkpoint / name).write_text(json.dumps(body))
    copies = tmp_path / "copies"
    copies.mkdir()
    subprocess.run([sys.executable, "-c", KILLED, str(store.root), str(copies)], check=True)
    assert len(list(copies.iterdir())) > 20
    for root in copies.iterdir():
        copy = Store(root)
        assert second <= set(copy.keys()) <= first | second
        assert [f for f in upkeep.verify(copy) if f.what != "input"] == [], "nothing is ever seen in part"
        for run, goals in upkeep.goals(copy).items():
            assert {k for _, keys in goals for k in keys.values()} <= set(copy.keys()), f"{run} stands without its artifacts"
        upkeep.free(copy, upkeep.survey(copy, upkeep.kept_runs(copy, {"small-1"} & set(copy.runs()))))
        assert set(copy.keys()) == second
        assert copy.runs() == ["small-2"]
        assert list((copy.root / "work").iterdir()) == []


# --- list --------------------------------------------------------------------------------------------------------------


def test_the_list_tells_seeds_apart_and_names_the_runs(store):
    make(store, toy.small())
    make(store, toy.small(), toy.small(seed=1))
    lines = tutelage(store, "list").output.splitlines()
    assert lines[0].split() == ["artifact", "kind", "key", "size", "made", "FLOP", "runs"]
    first = {line.split()[0]: line for line in lines[1:-1]}
    assert {"left@0", "left@1", "more@0", "more@1", "base", "data"} <= set(first)
    assert first["base"].endswith("small-1, small-2")
    assert first["left@1"].endswith(" small-2")
    assert lines[-1].startswith("10 artifacts, ")
    made = [s["finished"] for s in json.loads(tutelage(store, "list", "--json").stdout)]
    assert made == sorted(made), "the newest last"


def test_the_list_is_filtered_by_kind_and_name(store):
    keys = make(store, toy.small(), toy.small(seed=1))

    def names(*words: str) -> set[str]:
        return {s["label"] for s in json.loads(tutelage(store, "list", "--json", *words).stdout)}

    assert names("--kind", "Make") == {"data", "more@0", "more@1"}
    assert names("--name", "*@1") == {"left@1", "more@1", "score-left@1"}
    assert names("--name", "left", "--kind", "Count") == {"left@0", "left@1"}
    assert names("--name", "nothing") == set()
    done = tutelage(store, "list", "--kind", "Cuont")
    assert "no artifact of kind 'Cuont' in the store; did you mean 'Count'?" in str(done.exception)
    cut(store.folder(keys["base"]) / "artifact.json")
    out = tutelage(store, "list").output
    assert next(line.split()[:2] for line in out.splitlines() if "damaged" in line) == ["base", "damaged"]
    assert "1 damaged: `tutelage store verify` says how" in out
