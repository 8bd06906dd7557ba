"""The store: what is visible when something dies, formats, names, lineage; and the checkpoints of a context."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from tutelage.context import Context, Stopped
from tutelage.files import read_jsonl, write_json
from tutelage.locks import Holder
from tutelage.spec import UserError
from tutelage.store import Store

META = {"name": "a", "kind": "toy", "inputs": [], "finished": 1.0}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def fill(store: Store, key: str, **more: Any) -> None:
    """Publishes something under a key."""
    port = store.work(key) / "policy"
    port.mkdir()
    (port / "model.json").write_text("1")
    store.publish(key, {**META, **more})


# --- formats ---------------------------------------------------------------------------------------------------------


def test_a_store_of_another_format_is_refused(store):
    write_json(store.root / "format", {"format": 99})
    with pytest.raises(UserError, match=r"has format 99, this version reads 1; install the newer Tutelage"):
        Store(store.root)


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="neither empty nor a store"):
        Store(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"', "{"])
def test_a_format_that_is_no_object_is_refused(store, text):
    (store.root / "format").write_text(text)
    with pytest.raises(UserError, match="format"):
        Store(store.root)


def test_a_store_whose_making_was_cut_short_is_made(tmp_path):
    for part in ("artifacts", "work"):
        (tmp_path / part).mkdir()
    (tmp_path / ".format.12").write_text("")
    Store(tmp_path, create=False)
    assert Store(tmp_path).keys() == []
    assert (tmp_path / "format").exists()


def test_a_folder_with_a_room_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for create in (True, False):
        with pytest.raises(UserError, match="neither empty nor a store"):
            Store(tmp_path, create=create)


def test_runs_that_cannot_be_written_are_named(store):
    (store.root / "runs").rmdir()
    (store.root / "runs").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the store: .*runs.*; give --store a folder that can be written"):
        store.ready()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make a store in"):
        Store(tmp_path / "file" / "store")


def test_a_path_that_leads_nowhere_or_is_no_text_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match=r"Symlink loop from .*; give another --store"):
        Store(tmp_path / "a")
    with pytest.raises(UserError, match="is no UTF-8 text; give another --store"):
        Store(tmp_path / "a\udcff")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_reading_makes_nothing(tmp_path):
    store = Store(tmp_path / "none", create=False)
    assert not store.has("k")
    assert not store.keys()
    assert not (tmp_path / "none").exists()


# --- publishing ------------------------------------------------------------------------------------------------------


def test_published_work_is_visible_whole(store):
    fill(store, "k1")
    assert store.has("k1")
    assert store.path("k1", "policy").joinpath("model.json").read_text() == "1"
    assert store.path("k1", "policy", 5).name == "policy@5"
    assert set(store.meta("k1")["content"]) == {"policy"}
    assert not (store.root / "work" / "k1").exists()
    with pytest.raises(UserError, match="no artifact k2"):
        store.meta("k2")


KILLED = """
import os, sys
from tutelage import store as module
from tutelage.store import Store
store, at = Store(sys.argv[1]), int(sys.argv[2])
port = store.work("k") / "policy"
port.mkdir()
(port / "model.json").write_text("1")
(store.work("k") / "checkpoint-3").mkdir()
seen = 0
def counting(frame, event, arg):
    global seen
    if event == "line" and frame.f_code.co_filename == module.__file__:
        seen += 1
        if seen == at:
            os.kill(os.getpid(), 9)
    return counting
sys.settrace(counting)
store.publish("k", {"name": "a", "inputs": []})
sys.settrace(None)
print(seen)
"""


def killed(root: Path, at: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", KILLED, str(root), str(at)], capture_output=True, text=True, check=False)


def test_a_kill_at_any_line_of_publishing_leaves_all_or_nothing(tmp_path):
    whole = killed(tmp_path / "whole", -1)
    lines = int(whole.stdout)
    assert lines > 10
    seen = set()
    for at in range(1, lines + 1, max(1, lines // 12)):
        root = tmp_path / str(at)
        assert killed(root, at).returncode == -9
        store = Store(root)
        seen.add(store.has("k"))
        if store.has("k"):
            assert store.meta("k")["content"]
            assert (store.path("k", "policy") / "model.json").read_text() == "1"
        else:
            assert store.checkpoint("k") == 3, "the checkpoint must outlive a kill before the artifact is there"
            assert (store.work("k") / "policy" / "model.json").exists()
            store.publish("k", META)  # and it can be published after all
        assert store.keys() == ["k"]
    assert seen == {True, False}


def test_the_content_hash_covers_payload_only(store):
    for key in ("k1", "k2"):
        port = store.work(key) / "policy"
        port.mkdir()
        (port / "model.json").write_text("1")
        (port / "README.md").write_text(f"made as {key}")
        (store.work(key) / "log.txt").write_text(key)
        store.publish(key, META)
    assert store.meta("k1")["content"] == store.meta("k2")["content"]


def test_a_removal_that_was_cut_short_is_made_again(store):
    fill(store, "k1")
    (store.folder("k1") / "artifact.json").unlink()
    assert not store.has("k1")
    fill(store, "k1")
    assert store.has("k1")


def test_json_is_never_seen_in_part(store):
    """A reader that polls while another writes sees whole documents."""
    file = store.root / "x.json"
    write_json(file, {"n": 0})
    stop = threading.Event()

    def write() -> None:
        for n in range(200):
            write_json(file, {"n": n, "pad": "x" * 5000})
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        assert "n" in json.loads(file.read_text())
    writer.join()


def test_only_one_at_a_time_holds_a_lock(store):
    asked = []

    def give_up(holder: Holder) -> None:
        asked.append(holder)
        raise Stopped

    assert store.holder("k") is None
    with store.lock("k", "the first"):
        other = Store(store.root)
        with pytest.raises(Stopped), other.lock("k", waiting=give_up):
            pass
    assert (asked[0].pid, asked[0].what, asked[0].stalled) == (os.getpid(), "the first", False)
    assert store.holder("k") is None
    with store.lock("k", waiting=give_up):
        assert store.holder("k") is not None


# --- names -----------------------------------------------------------------------------------------------------------


def test_find_by_prefix_and_name(store):
    fill(store, "aaaa1111", name="sft", finished=1.0)
    fill(store, "aaaa2222", name="sft", finished=2.0)
    assert store.find("aaaa1") == "aaaa1111"
    assert store.find("sft") == "aaaa2222"
    with pytest.raises(UserError, match="begins several keys"):
        store.find("aaaa")
    with pytest.raises(UserError, match=r"no artifact 'sfd'.*did you mean 'sft'"):
        store.find("sfd")


def test_runs_count_up_by_recipe(store):
    names = [store.new_run(recipe, {"recipe": recipe}) for recipe in ("a", "a", "b", "a-1", "a")]
    assert names == ["a-1", "a-2", "b-1", "a-1-1", "a-3"]
    assert store.load_run("a")["run"] == "a-3"
    assert store.load_run("b-1")["recipe"] == "b"
    with pytest.raises(UserError, match=r"unknown run 'c'"):
        store.load_run("c")


def test_two_processes_never_get_one_run(store):
    code = "import sys; from tutelage.store import Store\nfor _ in range(20): print(Store(sys.argv[1]).new_run('r', {}))"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    names = [line for each in both for line in each.communicate()[0].split()]
    assert len(names) == len(set(names)) == 40


def test_no_runs_says_what_makes_one(store):
    with pytest.raises(UserError, match="no runs in the store"):
        store.load_run("last")


def test_events_are_lines_of_one_file_a_process(store):
    store.event("run started", run="r")
    store.event("run ended", run="r")
    (file,) = (store.root / "events").iterdir()
    assert file.stem.endswith(f"-{os.getpid()}")
    assert [e["event"] for e in read_jsonl(file)] == ["run started", "run ended"]


def test_a_torn_last_line_is_passed_over(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [e["step"] for e in read_jsonl(file)] == [1, 2]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def context(store: Store, every: float = 0.0, stopping: Any = lambda: False) -> Context:
    return Context(toy.Make(name="m"), store, stopping=stopping, every=every)


def go(ctx: Context, steps: range, save: Any = lambda folder: None) -> None:
    for step in steps:
        ctx.cost.spend("trained", 10, 100)
        ctx.log(step, loss=step)
        ctx.boundary(step + 1, save)


def test_resuming_goes_back_to_the_checkpoint_in_metrics_costs_and_facts(store):
    first = context(store)
    first.facts["best"] = 1
    go(first, range(3), lambda folder: (folder / "w").write_text("w"))
    first.facts["best"] = 2
    first.log(3, loss=3)
    first.cost.spend("sampled", 5, 100)
    with first._metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill

    again = context(store)
    step, folder = again.resume()
    assert step == 3
    assert (folder / "w").read_text() == "w"
    assert again.cost.tokens == {"trained": 30}
    assert again.cost.flops == 6 * 100 * 30
    assert again.facts == {"best": 1}
    assert [m["step"] for m in store.metrics(again.key)] == [0, 1, 2]
    assert again.seconds >= 0


def test_without_a_checkpoint_metrics_begin_anew(store):
    first = context(store, every=99)
    go(first, range(3))
    again = context(store)
    assert again.resume() == (0, None)
    assert store.metrics(again.key) == []


def test_only_the_last_checkpoint_is_kept_and_half_written_ones_go(store):
    ctx = context(store)
    go(ctx, range(4))
    (ctx.work / ".checkpoint-9").mkdir()
    assert [p.name for p in ctx.work.glob("checkpoint-*")] == ["checkpoint-4"]
    assert context(store).resume()[0] == 4
    assert not list(ctx.work.glob(".checkpoint-*"))


def test_a_kill_while_saving_leaves_the_one_before(store):
    ctx = context(store)
    go(ctx, range(2))

    def dies(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(ctx, range(2, 3), dies)
    assert store.checkpoint(ctx.key) == 2
    assert context(store).resume()[0] == 2


def test_checkpoints_wait_their_time_and_a_stop_does_not(store):
    ctx = context(store, every=3600)
    go(ctx, range(3))
    assert store.checkpoint(ctx.key) is None
    ctx = context(store, every=3600, stopping=lambda: True)
    with pytest.raises(Stopped, match="m stopped after step 1"):
        go(ctx, range(3))
    assert store.checkpoint(ctx.key) == 1


def test_an_output_starts_empty(store):
    ctx = context(store)
    (ctx.output("data") / "old").write_text("x")
    assert list(ctx.output("data").iterdir()) == []
    assert ctx.output("data", 3).name == "data@3"


def test_costs_are_counted_by_the_projects_rule(store):
    cost = context(store).cost
    for what in ("sampled", "prefilled", "scored"):
        cost.spend(what, 7, 1000)
    assert cost.flops == 3 * 2 * 7 * 1000
    cost.spend("trained", 7, 1000)
    assert cost.flops == (3 * 2 + 6) * 7 * 1000
    with pytest.raises(KeyError):
        cost.spend("dreamt", 1, 1)


def test_a_store_may_be_moved(store, tmp_path):
    fill(store, "k1")
    shutil.move(store.root, tmp_path / "elsewhere")
    assert Store(tmp_path / "elsewhere").meta("k1")["name"] == "a"
