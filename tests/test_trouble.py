"""What the machine does to a store: a full disk, a read-only one, no locks, no temp folder, a clock that jumps, flipped bits,
holders of locks that die or stand still. Each is one line, exit 2, and nothing made is lost.

The disks are real ones, of a few megabytes, mounted in a user namespace; where that is not allowed those tests are skipped.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from tutelage import locks, upkeep
from tutelage.files import append_line, read_jsonl, trouble
from tutelage.graph import Goals, key, plan, record
from tutelage.run import Silent, run
from tutelage.spec import UserError
from tutelage.store import Store

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
TUTELAGE = f"{sys.executable} -m tutelage"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def go(store: Store, *stages: Any, **how: Any) -> Any:
    goals = Goals(recipe="trouble", stages=tuple(s.out() for s in stages))
    return run(plan([goals], store.has), store, cores=1, **how)


# --- disks ---------------------------------------------------------------------------------------------------------------


def may_mount() -> bool:
    test = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(test, capture_output=True, check=False).returncode == 0


disk = pytest.mark.skipif(not may_mount(), reason="mounting in a user namespace is not allowed here")


def on_a_disk(folder: Path, size: str, script: str) -> list[tuple[int, str]]:
    """Runs the lines of a script with a small disk at ``folder``/disk; (exit code, output) of each."""
    (folder / "disk").mkdir()
    lines = [f"mount -t tmpfs -o size={size} tmpfs disk"]
    for n, line in enumerate(script.strip().splitlines()):
        lines.append(f"{{ {line} ; }} > out.{n} 2>&1; echo $? > rc.{n}")
    subprocess.run(["unshare", "-rm", "sh", "-c", "\n".join(lines)], cwd=folder, env=ENV, check=True)
    count = len(script.strip().splitlines())
    return [(int((folder / f"rc.{n}").read_text()), (folder / f"out.{n}").read_text()) for n in range(count)]


def fat(folder: Path) -> None:
    goals = Goals(recipe="fat", stages=(toy.Fat(name="fat").out(), toy.Fat(name="thin", steps=1).out()))
    (folder / "r.json").write_text(json.dumps(record(goals)))


@disk
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path):
    fat(tmp_path)
    again = f"{TUTELAGE} run r.json --store disk/store --checkpoint-every 0 --cores 1"
    script = f"""
        {again}
        find disk/store -name '.*'; ls disk/store/artifacts | wc -l
        mount -o remount,size=64m disk
        {again}
        {TUTELAGE} store verify --store disk/store
    """
    full, left, _, whole, verify = on_a_disk(tmp_path, "8m", script)
    assert full[0] == 2
    assert "Traceback" not in full[1]
    assert "the disk is full: " in full[1]
    assert "run the same command again: nothing made is lost" in full[1]
    assert left[1].split() == ["0"], "no part of a file was left, and nothing was begun after it"
    assert whole[0] == 0
    assert "goes on from step" in whole[1]
    assert verify[0] == 0


APPEND = """
from pathlib import Path
from tutelage.files import append_line
file = Path("disk/store/events/e.jsonl")
try:
    for n in range(9999):
        append_line(file, {"event": "n" * n})
except OSError as error:
    print(error.strerror, file.read_bytes()[-1:])
"""


@disk
def test_a_full_disk_is_freed_and_has_no_line_cut_short(tmp_path):
    fat(tmp_path)
    (tmp_path / "append.py").write_text(APPEND)
    script = f"""
        {TUTELAGE} run r.json --store disk/store --set fat.steps=1
        rm -r disk/store/locks/*; cat /dev/zero > disk/fill
        truncate -s -20K disk/fill; {sys.executable} append.py; cat /dev/zero >> disk/fill
        {TUTELAGE} store verify --store disk/store
        {TUTELAGE} store gc --forget fat-1 --yes --store disk/store
        {TUTELAGE} store list --store disk/store
    """
    made, _, cut, verify, freed, left = on_a_disk(tmp_path, "8m", script)
    assert made[0] == 0
    assert "No space left on device b'\\n'" in cut[1]
    assert verify[0] == 0, verify[1]
    assert freed[0] == 0, freed[1]
    assert left[1].splitlines()[-1].startswith("0 artifacts")


@disk
def test_a_read_only_store_can_be_read_and_refuses_a_run(tmp_path):
    fat(tmp_path)
    script = f"""
        {TUTELAGE} run r.json --store disk/store --cores 1
        mount -o remount,ro disk
        {TUTELAGE} run r.json --store disk/store --set fat.steps=2
        {TUTELAGE} plan r.json --store disk/store
        {TUTELAGE} lineage fat --store disk/store
        {TUTELAGE} store list --store disk/store
        {TUTELAGE} store verify --store disk/store
        {TUTELAGE} store gc --forget fat-1 --yes --store disk/store
        {TUTELAGE} run r.json --store disk/other
    """
    made, _, refused, *read, freed, other = on_a_disk(tmp_path, "32m", script)
    assert made[0] == 0
    for code, text in (refused, other, freed):
        assert code == 2, text
        assert "Traceback" not in text
        assert "read-only" in text.lower()
    assert len(refused[1].strip().splitlines()) == 2, "the summary of the plan, and why not"
    assert [code for code, _ in read] == [0, 0, 0, 0], read


LIBRARIES = """
import sys
from pathlib import Path
from tutelage.files import trouble
import torch, safetensors.torch, pyarrow as pa, pyarrow.parquet as pq
disk = Path("disk")
big = torch.zeros(4 << 20)
for write in (
    lambda: torch.save(big, disk / "a.pt"),
    lambda: safetensors.torch.save_file({"a": big}, disk / "a.safetensors"),
    lambda: pq.write_table(pa.table({"a": big.numpy()}), disk / "a.parquet", compression=None, use_dictionary=False),
):
    try:
        write()
    except BaseException as error:
        print(trouble(error, disk))
    else:
        print("it fitted")
"""


@disk
def test_every_library_that_writes_is_understood_when_the_disk_is_full(tmp_path):
    (tmp_path / "x.py").write_text(LIBRARIES)
    ((code, text),) = on_a_disk(tmp_path, "2m", f"{sys.executable} x.py")
    assert code == 0
    assert [line.partition(":")[0] for line in text.splitlines()] == ["the disk is full"] * 3


def test_an_error_of_the_code_is_not_the_disks(tmp_path):
    for error in (ZeroDivisionError("x"), RuntimeError("cannot write that"), OSError(errno.ENOENT, "no such file")):
        assert trouble(error, tmp_path) == ""
    deep = RuntimeError("x")
    deep.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/d/f")
    assert trouble(deep, tmp_path) == "the disk is full: /d/f"


# --- before any work -----------------------------------------------------------------------------------------------------


def test_a_mount_without_locks_is_refused(store, monkeypatch):
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with pytest.raises(UserError, match=r"has no locks \(No locks available\).*give --store a folder on another disk"):
        go(store, toy.Make(name="m"))
    assert not store.runs()


def test_no_temp_folder_is_told(store, monkeypatch):
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(UserError, match="no temp folder can be written; set TMPDIR"):
        go(store, toy.Make(name="m"))
    assert not store.runs()


def test_the_newest_run_is_the_last_begun_whatever_the_clock_says(store):
    for recipe, mtime in (("a", 3e9), ("b", 2e9), ("c", 1e9)):
        os.utime(store.root / "runs" / f"{store.new_run(recipe, {})}.json", (mtime, mtime))
    assert store.runs() == ["a-1", "b-1", "c-1"]
    assert store.load_run("last")["run"] == "c-1"


def test_a_clock_that_goes_back_makes_no_time_negative(store, monkeypatch):
    began = time.time()
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: began - 1000 * next(clock))
    outcome = go(store, toy.Make(name="m"))
    assert outcome.state == "done"
    assert store.load_run("last")["seconds"] >= 0


# --- damage --------------------------------------------------------------------------------------------------------------


def test_a_damaged_input_is_found_before_it_is_read(store):
    data = toy.Make(name="data")
    count = toy.Count(name="count", source=data.out(), steps=2)
    go(store, data)
    (file,) = store.path(key(data), "data").iterdir()
    file.write_bytes(bytes([file.read_bytes()[0] ^ 4]) + file.read_bytes()[1:])
    outcome = go(store, count)
    assert outcome.exit_code == 2
    assert "its input 'data' is damaged" in outcome.failed["count"]
    assert f"artifacts/{key(data)}/data/{file.name}" in outcome.failed["count"]
    assert "`tutelage store verify --remove`" in outcome.failed["count"]
    store.remove(key(data))
    assert go(store, count).state == "done"


def test_a_checkpoint_that_is_not_what_was_written_is_not_used(tmp_path):
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    data = toy.Make(name="data")
    go(whole, toy.Count(name="count", source=data.out(), steps=9), every=0)
    go(broken, toy.Count(name="count", source=data.out(), steps=9, die_at=5), every=0)
    mine = key(toy.Count(name="count", source=data.out(), steps=9))
    (folder,) = (broken.root / "work" / mine).glob("checkpoint-*")
    for file in folder.iterdir():
        if file.name != "context.json":
            file.write_bytes(b"\0" + file.read_bytes()[1:])
    assert go(broken, toy.Count(name="count", source=data.out(), steps=9), every=0).state == "done"
    for what in ("content", "cost"):
        assert whole.meta(mine)[what] == broken.meta(mine)[what]
    assert len(whole.metrics(mine)) == len(broken.metrics(mine)) == 9


@pytest.mark.parametrize("how", ["{}", "[]", '{"step": 3}', '"step": 4', '"metrics": 9', '"cosu"'])
def test_a_checkpoint_whose_own_account_is_not_what_was_written_is_told_and_not_used(store, how):
    broken = toy.Count(name="count", source=toy.Make(name="data").out(), steps=9, die_at=5)
    go(store, broken, every=0)
    (file,) = (store.root / "work" / key(broken)).glob("checkpoint-*/context.json")
    text = file.read_text()
    changed = {'"step": 4': ('"step": 5', how), '"metrics": 9': ('"metrics": ', how), '"cosu"': ('"cost"', how)}
    file.write_text(text.replace(*changed[how]) if how in changed else how)
    assert file.read_text() != text
    assert [f.what for f in upkeep.verify(store)] == ["checkpoint"]
    assert go(store, broken.model_copy(update={"die_at": -1}), every=0).state == "done"
    assert [m["step"] for m in store.metrics(key(broken))] == list(range(9))


def test_a_line_cut_short_by_a_kill_spoils_no_other(tmp_path):
    file = tmp_path / "e.jsonl"
    append_line(file, {"n": 1})
    with file.open("ab") as handle:
        handle.write(b'{"n": 2, "ha')
    append_line(file, {"n": 3})
    with file.open("ab") as handle:
        handle.write(b"\xff\xfe[]\n{}")
    assert list(read_jsonl(file)) == [{"n": 1}, {"n": 3}]


# --- two at once ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from tutelage import locks
locks.BEAT = 0.1
with locks.hold(Path(sys.argv[1]), "other-1"):
    print("mine", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds a lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "k.lock")]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


def test_a_holder_that_moves_is_waited_for_one_that_stands_still_is_told_and_a_dead_one_loses(tmp_path, other, monkeypatch):
    monkeypatch.setattr(locks, "STALLED", 1.0)
    seen: list[locks.Holder] = []
    got = threading.Event()

    def wait() -> None:
        with locks.hold(tmp_path / "k.lock", "me", seen.append):
            got.set()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    time.sleep(2.5)
    assert seen
    assert not any(h.stalled for h in seen), "its heart beats"
    assert (seen[0].pid, seen[0].what) == (other.pid, "other-1")
    assert str(seen[0]).startswith(f"other-1 (process {other.pid} on ")
    other.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    assert seen[-1].stalled
    assert not got.is_set(), "it could wake up and go on writing"
    other.kill()
    assert got.wait(5), "the kernel gives back the lock of the dead"
    waiter.join()


FORKS = """
import os, sys, time
from pathlib import Path
from tutelage import locks
with locks.hold(Path(sys.argv[1])):
    if child := os.fork():
        print(child, flush=True)
        os.kill(os.getpid(), 9)
    time.sleep(600)
"""


def test_a_child_that_outlives_a_holder_does_not_hold(tmp_path):
    command = [sys.executable, "-c", FORKS, str(tmp_path / "k.lock")]
    parent = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    try:
        parent.wait()
        time.sleep(0.3)  # the child's first lines
        os.kill(child, 0)
        assert locks.held(tmp_path / "k.lock") is None
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["gc", "runs", "probe"])
def test_a_run_that_waits_to_begin_says_for_whom(store, name):
    said: list[str] = []

    class Watch(Silent):
        def say(self, text: str) -> None:
            said.append(text)
            freed.set()

    freed, held = threading.Event(), threading.Event()

    def other() -> None:
        with store.lock(name, "store gc"):
            held.set()
            freed.wait(20)

    holder = threading.Thread(target=other)
    holder.start()
    held.wait()
    assert go(store, toy.Make(name="data"), watcher=Watch()).state == "done"
    holder.join()
    assert said == [f"waits for store gc (process {os.getpid()} on {socket.gethostname()}), which is at work in the store"]


def test_asking_who_holds_a_lock_takes_nothing(tmp_path, other):
    assert (locks.held(tmp_path / "k.lock") or locks.Holder()).pid == other.pid
    other.kill()
    other.wait()
    assert locks.held(tmp_path / "k.lock") is None
    assert locks.held(tmp_path / "never.lock") is None


def test_a_run_that_was_killed_counts_as_interrupted(store):
    name = store.new_run("r", {"state": "running"})
    with store.lock(f"run.{name}"):
        assert store.alive(name)
        assert store.load_run(name)["state"] == "running"
    assert store.load_run(name)["state"] == "interrupted"


def test_what_went_while_a_run_was_planned_is_told(store):
    data = toy.Make(name="data")
    count = toy.Count(name="count", source=data.out(), steps=2)
    go(store, data)
    planned = plan([Goals(recipe="late", stages=(count.out(),))], store.has)
    store.remove(key(data))
    with pytest.raises(UserError, match="data went from the store while this run was planned; run the same command again"):
        run(planned, store)
    assert store.load_run("last")["state"] == "failed"
