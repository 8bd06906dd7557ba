"""The runner: what is skipped, what overlaps, what fails, what dies, and that a resumed stage makes the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from tutelage import run as runner
from tutelage.files import read_jsonl
from tutelage.graph import Goals, Node, Stage, from_record, key, plan, record
from tutelage.run import Outcome, run
from tutelage.store import Store

ROOT = Path(__file__).parents[1]


class Watch:
    """Remembers everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.events: list[dict[str, Any]] = []
        self.said: list[str] = []

    def event(self, node: Node, event: dict[str, Any]) -> None:
        self.events.append({**event, "label": node.label})
        if event["event"] != "progress":
            self.seen.append((event["event"], node.label))

    def say(self, text: str) -> None:
        self.said.append(text)

    def tick(self) -> None: ...

    def labels(self, what: str) -> list[str]:
        return [label for event, label in self.seen if event == what]

    def most_at_once(self) -> int:
        now = most = 0
        for event, _ in self.seen:
            now += {"started": 1, "resumed": 1, "waiting": 0}.get(event, -1)
            most = max(most, now)
        return most


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def go(store: Store, *goals: Goals | Stage, cores: int = 2, every: float = 60.0) -> tuple[Outcome, Watch]:
    watch = Watch()
    all_of = [g if isinstance(g, Goals) else Goals(recipe="one", stages=(g.out(),)) for g in goals]
    return run(plan(all_of, store.has), store, cores=cores, every=every, watcher=watch), watch


def many(*stages: Stage) -> Goals:
    return Goals(recipe="many", stages=tuple(s.out() for s in stages))


def models(store: Store, goals: Goals) -> dict[str, str]:
    """The bytes every stage of a goal has made, by name."""
    made = {}
    for name, stage in toy.stages(goals).items():
        for file in sorted(store.folder(key(stage)).glob("*/*.json")):
            made[f"{name}/{file.parent.name}"] = file.read_text()
    return made


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def happened(store: Store) -> list[dict[str, Any]]:
    return [e for file in (store.root / "events").iterdir() for e in read_jsonl(file)]


# --- what is made, and what is not ---------------------------------------------------------------------------------------


def test_a_run_makes_everything_and_a_second_one_nothing(store, monkeypatch):
    goals = toy.small()
    outcome, watch = go(store, goals)
    assert outcome.state == "done"
    assert outcome.exit_code == 0
    assert sorted(outcome.made) == sorted(toy.stages(goals))
    assert all(store.has(key(s)) for s in toy.stages(goals).values())

    def nobody(*_: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(runner, "Hand", nobody)
    again, watch = go(store, toy.small())
    assert (again.state, again.made, watch.seen) == ("done", [], [])
    assert (outcome.run, again.run) == ("small-1", "small-2")


def test_inputs_are_made_before_what_needs_them(store):
    goals = toy.small()
    _, watch = go(store, goals)
    for stage in toy.stages(goals).values():
        for at in (getattr(stage, f, None) for f in ("source", "start", "policy")):
            if at:
                assert watch.seen.index(("finished", at.of.name)) < watch.seen.index(("started", stage.name))


def test_only_what_changed_is_made_again(store):
    go(store, toy.small())
    rec = record(toy.small())
    rec["stages"]["right"]["steps"] = 3
    outcome, _ = go(store, from_record(rec))
    assert sorted(outcome.made) == ["right", "score-right"]


def test_seeds_share_what_is_equal(store):
    outcome, _ = go(store, toy.small(0), toy.small(1))
    assert len(outcome.made) == 10
    assert outcome.made.count("base") == 1


def test_branches_overlap(store, tmp_path):
    """Each stage ends only once the other runs too."""
    meet = tmp_path / "meet"
    meet.mkdir()
    outcome, _ = go(store, many(*(toy.Meet(name=f"m{n}", number=n, folder=str(meet)) for n in range(2))))
    assert outcome.state == "done"
    assert len({p.suffix for p in meet.iterdir()}) == 2, "two processes"


def test_one_core_runs_one_at_a_time_and_threads_take_cores(store):
    goals = many(*(toy.Make(name=f"m{n}", seed=n) for n in range(4)))
    assert go(store, goals, cores=1)[1].most_at_once() == 1
    wide = many(*(toy.Make(name=f"w{n}", seed=10 + n, threads=2) for n in range(4)))
    assert go(store, wide, cores=2)[1].most_at_once() == 1
    widest = many(*(toy.Make(name=f"v{n}", seed=20 + n, threads=64) for n in range(2)))
    assert go(store, widest, cores=2)[0].state == "done", "more threads than cores is no deadlock"


def test_workers_are_kept(store):
    go(store, toy.small(0), toy.small(1), cores=2)
    workers = {f.stem for f in (store.root / "events").iterdir()} - {f"{os.uname().nodename}-{os.getpid()}"}
    assert 1 <= len(workers) <= 2


def test_the_longest_way_goes_first(store):
    data = toy.Make(name="data")
    short = toy.Count(name="short", source=data.out(), steps=2)
    long = toy.Count(name="long", source=data.out(), steps=3)
    end = toy.Count(name="end", source=data.out(), start=long.out(), steps=50)
    middle = toy.Count(name="middle", source=data.out(), steps=20)
    _, watch = go(store, many(short, middle, end), cores=1)
    assert watch.labels("started") == ["data", "long", "end", "middle", "short"]


def test_small_stages_do_not_starve_a_wide_one(store):
    """On two cores, a stage of two threads with the longest way before it goes as soon as both have come free."""
    data, slow = toy.Make(name="data"), toy.Make(name="slow", seed=1)
    wide = toy.Count(name="wide", source=data.out(), steps=50, threads=2)
    small = [toy.Count(name=f"small-{n}", source=data.out(), steps=n + 1) for n in range(6)]
    other = toy.Count(name="other", source=slow.out(), steps=90, pause=0.005)
    _, watch = go(store, many(wide, other, *small))
    started = watch.labels("started")
    assert all(started.index("wide") < started.index(s.name) for s in small)


def test_a_chain_of_a_thousand_reaches_a_worker(store):
    last: Stage = toy.Chain(name="link-0")
    for n in range(1, 1000):
        last = toy.Chain(name=f"link-{n}", before=last.out(), number=n)
    goals = Goals(recipe="chain", stages=(last.out(),))
    by_name = toy.stages(goals)
    stored = {key(s) for n, s in by_name.items() if int(n[5:]) < 998}
    before = key(by_name["link-997"])
    (store.work(before) / "data").mkdir()
    store.publish(before, {"name": "link-997", "kind": toy.Chain.kind(), "inputs": []})
    outcome = run(plan([goals], lambda k: k in stored or store.has(k)), store, cores=2)
    assert outcome.made == ["link-998", "link-999"]


def test_two_runs_at_once_make_each_stage_once(store, tmp_path):
    both = [background(store, tmp_path, toy.small(steps=30, pause=0.01)) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    made = [e["key"] for e in happened(store) if e["event"] == "stage finished"]
    assert len(made) == len(set(made)) == 7


# --- what is written down ------------------------------------------------------------------------------------------------


def test_a_run_is_saved_with_its_record_and_keys(store):
    outcome, _ = go(store, toy.small(0), toy.small(1))
    body = store.load_run("last")
    assert body["run"] == outcome.run
    assert body["state"] == "done"
    assert body["recipe"] == "small"
    assert body["finished"] >= body["started"]
    assert len(body["plan"]["run"]) == 10
    assert [g["seed"] for g in body["goals"]] == [0, 1]
    again = from_record(body["goals"][1]["record"])
    assert {n: key(s) for n, s in toy.stages(again).items()} == body["goals"][1]["keys"]
    assert {"run started", "run ended", "stage started", "stage finished"} == {e["event"] for e in happened(store)}


def test_an_artifact_says_what_made_it(store):
    goals = toy.small(seed=5)
    go(store, goals)
    left = toy.stages(goals)["left"]
    meta = store.meta(key(left))
    assert meta["name"] == "left"
    assert meta["kind"] == "tests.toy.Count"
    assert [(i["path"], i["name"], i["port"]) for i in meta["inputs"]] == [
        ("source", "more", "data"),
        ("start", "base", "policy"),
    ]
    assert meta["outputs"]["policy"]["kind"] == "model"
    assert meta["outputs"]["policy"]["params"] == 1000
    assert meta["cost"] == {"flops": 6.0 * 1000 * 40, "tokens": {"trained": 40}}
    assert meta["estimate"] == 6000.0 * 10 * 4
    assert meta["facts"] == {"sum": json.loads(models(store, goals)["left/policy"])["sum"]}
    assert meta["record"] == record(goals)["stages"]["left"]
    assert meta["started"] <= meta["finished"]
    libraries = {"python", "torch", "transformers", "peft", "reasoning-gym", "math-verify", "tutelage"}
    assert set(meta["versions"]) == {*libraries, "decoding"}
    assert meta["threads"] == 1
    assert meta["code"]
    assert "seed" not in meta
    assert store.meta(key(toy.stages(goals)["more"]))["seed"] == 105


def test_a_model_carries_its_ancestry(store):
    data = toy.Make(name="data")
    base = toy.Count(name="base", source=data.out(), keep=(2,))
    top = toy.Count(name="top", source=data.out(), start=base.out(step=2), keep=(4,))
    go(store, top)
    for step in (None, 4):
        card = (store.path(key(top), "policy", step) / "README.md").read_text()
        assert card.startswith('---\nlibrary_name: "transformers"\n')
        for name in ("data", "base", "top"):
            assert f"| {name} |" in card
    assert not (store.path(key(data), "data") / "README.md").exists()


def test_what_a_stage_prints_is_kept_beside_it(store, capfd):
    class_ = toy.Fail(name="loud", how="forget")
    go(store, class_)
    assert "something it said" in (store.work(key(class_)) / "log.txt").read_text()
    assert "something" not in "".join(capfd.readouterr())


# --- failing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "says", "traceback"),
    [
        ("user", "the dataset is empty; give another", False),
        ("bug", "ZeroDivisionError: seven by nothing", True),
        ("forget", "ended without filling its port 'data'", False),
    ],
)
def test_a_failing_stage_keeps_back_only_what_needs_it(store, how, says, traceback):
    bad = toy.Fail(name="bad", how=how)
    after = toy.Fail(name="after", how="forget", source=bad.out())
    outcome, watch = go(store, many(after, *toy.stages(toy.small()).values()))
    assert outcome.state == "failed"
    assert outcome.exit_code == (1 if how == "bug" else 2)
    assert list(outcome.failed) == ["bad"]
    assert says in outcome.failed["bad"]
    assert "\n" not in outcome.failed["bad"]
    assert len(outcome.made) == 7, "the rest went on"
    assert "after" not in watch.labels("started")
    (event,) = [e for e in watch.events if e["event"] == "failed"]
    assert ("log" in event) == traceback
    if traceback:
        text = Path(event["log"]).read_text()
        assert "Traceback" in text
        assert "something it said" in text
    assert store.load_run("last")["state"] == "failed"
    assert store.load_run("last")["failed"].keys() == {"bad"}


def test_a_failed_stage_is_tried_again(store):
    go(store, toy.Fail(name="bad", how="bug"))
    outcome, _ = go(store, toy.Fail(name="bad", how="bug"))
    assert list(outcome.failed) == ["bad"]


def test_a_dead_worker_is_one_clear_line_and_the_others_go_on(store):
    bad = toy.Fail(name="bad", how="die")
    outcome, watch = go(store, many(bad, *toy.stages(toy.small()).values()))
    assert outcome.failed == {
        "bad": "its worker died (killed, or out of memory?); run the same command again to go on from its last checkpoint"
    }
    assert len(outcome.made) == 7
    assert ("died", "bad") in watch.seen
    assert [e["exit"] for e in happened(store) if e["event"] == "stage died"] == [-9]


# --- resuming ------------------------------------------------------------------------------------------------------------


def test_a_stage_killed_in_the_middle_goes_on_and_makes_the_same_bytes(tmp_path):
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    data = toy.Make(name="data")
    calm = many(toy.Count(name="count", source=data.out(), steps=12, keep=(3, 9)))
    dying = many(toy.Count(name="count", source=data.out(), steps=12, keep=(3, 9), die_at=7))
    go(whole, calm, every=0)
    first, _ = go(broken, dying, every=0)
    assert list(first.failed) == ["count"]
    mine = key(toy.stages(dying)["count"])
    assert broken.checkpoint(mine) == 7
    second, watch = go(broken, dying, every=0)
    assert second.state == "done"
    assert ("resumed", "count") in watch.seen
    assert [e["step"] for e in watch.events if e["event"] == "resumed"] == [7]
    assert models(whole, calm) == models(broken, dying)
    assert whole.meta(mine)["content"] == broken.meta(mine)["content"]
    assert whole.meta(mine)["cost"] == broken.meta(mine)["cost"]
    assert untimed(whole.metrics(mine)) == untimed(broken.metrics(mine))
    assert "resumed" in {e["event"].removeprefix("stage ") for e in happened(broken)}
    assert not list(broken.folder(mine).glob("*checkpoint*"))


def test_leftovers_without_a_checkpoint_are_removed(store):
    stage = toy.Make(name="m")
    left = store.work(key(stage))
    (left / "data@9").mkdir()
    (left / "metrics.jsonl").write_text('{"step": 0}\n')
    go(store, stage)
    assert sorted(p.name for p in store.folder(key(stage)).iterdir()) == ["artifact.json", "data"]


# --- signals: the whole command in a process of its own --------------------------------------------------------------------


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_leftovers():
    """A test that fails must not leave its runs running."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def background(store: Store, tmp_path: Path, goals: Goals, every: float = 0.0) -> subprocess.Popen[str]:
    """``python -c`` that runs goals through a record, as the command does."""
    file = tmp_path / "record.json"
    file.write_text(json.dumps(record(goals)))
    code = (
        "import json, sys; from tutelage.graph import from_record, plan; from tutelage.run import run; from tutelage.store "
        "import Store; s = Store(sys.argv[1]); g = from_record(json.load(open(sys.argv[2])));"
        "o = run(plan([g], s.has), s, cores=2, every=float(sys.argv[3])); print(o.state); sys.exit(o.exit_code)"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    command = [sys.executable, "-c", code, str(store.root), str(file), str(every)]
    STARTED.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return STARTED[-1]


def until(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = true()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody has waited for has ended too)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_and_makes_the_same_bytes(tmp_path, number, code):
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    slow = toy.small(steps=40, pause=0.05)
    fast = toy.small(steps=40)
    process = background(broken, tmp_path, slow, every=3600)
    base = key(toy.stages(slow)["base"])
    until(lambda: len(broken.metrics(base)) > 2)
    process.send_signal(number)
    assert process.wait(30) == code
    assert process.stdout and process.stdout.read() == "stopped\n"  # noqa: PT018
    assert 2 < (broken.checkpoint(base) or 0) < 40
    assert broken.load_run("last")["state"] == "stopped"
    assert "stage stopped" in {e["event"] for e in happened(broken)}
    go(broken, fast)
    go(whole, fast)
    assert models(whole, fast) == models(broken, fast)
    assert untimed(whole.metrics(base)) == untimed(broken.metrics(base))


HANG_UP = """
import fcntl, os, pty, subprocess, sys, termios
outer, inner = pty.openpty()
terminal = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
process = subprocess.Popen(sys.argv[1:], stdin=inner, stdout=inner, stderr=inner, start_new_session=True, preexec_fn=terminal)
os.close(inner)
seen = b""
while b" starts" not in seen and (b"base" not in seen or b"/40" not in seen):
    seen += os.read(outer, 4096)
os.close(outer)
sys.exit(process.wait(60))
"""


@pytest.mark.parametrize("look", [(), ("--plain",)])
def test_a_closed_terminal_stops_a_run_at_a_checkpoint(store, tmp_path, look):
    slow = toy.small(steps=40, pause=0.1)
    (tmp_path / "r.json").write_text(json.dumps(record(slow)))
    words = ("-m", "tutelage", "run", "r.json", "--store", str(store.root), "--checkpoint-every", "3600", "--cores", "1", *look)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}", "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", HANG_UP, sys.executable, *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, check=False, timeout=90)
    assert done.returncode == 128 + signal.SIGHUP
    assert store.load_run("last")["state"] == "stopped"
    begun = (store.root / "work").glob("*/metrics.jsonl")
    assert all(store.checkpoint(p.parent.name) for p in begun), "work was lost"


def test_a_signal_to_a_worker_alone_stops_the_run_too(store, tmp_path):
    slow = toy.small(steps=100, pause=0.05)
    process = background(store, tmp_path, slow, every=3600)
    base = key(toy.stages(slow)["base"])
    until(lambda: len(store.metrics(base)) > 2)
    workers = {int(f.stem.rpartition("-")[2]) for f in (store.root / "events").iterdir()} - {process.pid}
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    assert process.wait(30) == 143
    assert store.checkpoint(base)
    assert store.load_run("last")["state"] == "stopped"


def test_a_second_signal_ends_what_does_not_stop(store, tmp_path):
    process = background(store, tmp_path, many(toy.Hang(name="h", folder=str(tmp_path))))
    pids = [int(p) for p in until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().split())]
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first signal waits for the step's end"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    until(lambda: all(map(gone, pids)))


def test_nothing_outlives_a_killed_parent(store, tmp_path):
    """Neither the worker nor a process the stage has started."""
    process = background(store, tmp_path, many(toy.Hang(name="h", folder=str(tmp_path))))
    pids = [int(p) for p in until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().split())]
    assert not any(map(gone, pids))
    process.kill()
    process.wait()
    until(lambda: all(map(gone, pids)))


def test_nothing_outlives_a_killed_worker(store, tmp_path):
    process = background(store, tmp_path, many(toy.Hang(name="h", folder=str(tmp_path))))
    worker, child = [int(p) for p in until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().split())]
    os.kill(worker, signal.SIGKILL)
    assert process.wait(30) == 1
    until(lambda: gone(child))
