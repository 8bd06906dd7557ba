"""The index: it says what the artifacts say, opens only what is new, and is never believed when it is not its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tutelage import index
from tutelage.estimate import Estimator
from tutelage.index import goals, size, summaries
from tutelage.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def fill(store: Store, key: str, **more: Any) -> None:
    port = store.work(key) / "policy"
    port.mkdir()
    (port / "model.json").write_text("1" * 100)
    ins = [{"path": path, "key": "a", "port": "data", "name": "data"} for path in ("source", "start")]
    meta = {"name": f"n-{key}", "kind": "toy.Count", "version": 2, "seed": 3, "inputs": ins}
    meta |= {"outputs": {"policy": {"kind": "model", "n": 7}}, "finished": 5.0, "seconds": 2.0, "estimate": 30.0, "threads": 4}
    store.publish(key, {**meta, "cost": {"flops": 40.0}, **more})


def test_a_summary_says_what_the_artifact_says(store):
    fill(store, "k1")
    folder = store.folder("k1")
    files = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
    wanted = index.Summary(
        "k1", "n-k1", "toy.Count", 2, 3, 5.0, 2.0, 30.0, 40.0, 4, {"policy": "model"}, ["a"], sum(files), damaged=""
    )
    assert summaries(store) == {"k1": wanted}
    assert summaries(store) == {"k1": wanted}, "from the index"
    assert size(folder / "artifact.json") + 100 == sum(files)
    assert size(folder / "nothing") == 0


COUNTS = """
import json, sys
from pathlib import Path
from tutelage.index import goals, summaries
from tutelage.store import Store
store = Store(sys.argv[1])
def make(first, last):
    for n in range(first, last):
        folder = store.root / "artifacts" / f"k{n}"
        folder.mkdir()
        meta = {"key": f"k{n}", "name": "a", "kind": "b", "inputs": [], "finished": n}
        (folder / "artifact.json").write_text(json.dumps(meta))
        store.save_run(f"r-{n}", {"goals": [{"keys": {"a": f"k{n}"}}]})
opened = []
sys.addaudithook(lambda event, facts: event == "open" and str(facts[0]).startswith(str(store.root)) and opened.append(facts[0]))
def count():
    opened.clear()
    assert len(summaries(store)) == len(goals(store))
    return len(opened)
make(0, 300)
first, second = count(), count()
make(300, 303)
third = count()
print(first, second, third, count())
"""


def test_only_what_is_new_is_opened(tmp_path):
    words = [sys.executable, "-c", COUNTS, str(tmp_path / "store")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    first, second, third, last = map(int, done.stdout.split())
    assert first >= 600
    assert second == last == 2, "the two files of the index"
    assert third == 2 + 2 * 3 + 2, "and what is new, and writing"


@pytest.mark.parametrize("how", ["cut", "flip", "other", "list", "gone", "another store's", "edited"])
def test_an_index_that_is_not_its_own_is_made_anew(store, tmp_path, how):
    for key in ("k1", "k2"):
        fill(store, key)
    wanted = summaries(store)
    file = store.root / "index.json"
    raw = file.read_bytes()
    other = Store(tmp_path / "other")
    fill(other, "k1", name="of another store")
    fill(other, "k9")
    summaries(other)
    bodies = {
        "cut": raw[: len(raw) // 2],
        "flip": raw.replace(b"n-k1", b"m-k1"),
        "other": b"\xff\x00",
        "list": b"[]",
        "another store's": (other.root / "index.json").read_bytes(),
        "edited": json.dumps({**json.loads(raw), "rows": {}}).encode(),
    }
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(bodies[how])
    assert summaries(store) == wanted
    assert json.loads(file.read_bytes()) == json.loads(raw)


def test_what_is_removed_or_made_again_is_seen(store):
    for key in ("k1", "k2"):
        fill(store, key)
    summaries(store)
    store.remove("k1")
    assert set(summaries(store)) == {"k2"}
    fill(store, "k1", name="made again")
    assert summaries(store)["k1"].name == "made again"


BROKEN = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "list": lambda text: "[]",
    "no name": lambda text: text.replace('"name"', '"nome"'),
    "number as a name": lambda text: text.replace('"n-k1"', "7"),
    "outputs": lambda text: text.replace('"model"', "null"),
    "another key": lambda text: text.replace('"key": "k1"', '"key": "k7"'),
    "newer": lambda text: text.replace("{", '{"format": 2,', 1),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_artifact_that_cannot_be_read_is_listed_as_damaged_and_disturbs_nothing(store, how):
    for key in ("k1", "k2"):
        fill(store, key)
    before = summaries(store)
    file = store.folder("k1") / "artifact.json"
    whole = file.read_text()
    assert BROKEN[how](whole) != whole
    file.write_text(BROKEN[how](whole))
    for _ in range(2):
        found = summaries(store)
        assert found["k1"].damaged
        assert "\n" not in found["k1"].damaged
        assert found["k2"] == before["k2"]
    assert Estimator(store)._rates == {("toy.Count", "n-k2"): [30.0 / 2 / 4], ("toy.Count", ""): [30.0 / 2 / 4]}
    file.write_text(whole)
    assert summaries(store) == before


def test_a_store_that_cannot_be_written_is_read_all_the_same(store):
    fill(store, "k1")
    (store.root / "index.json").mkdir()  # so that no file can take its place
    assert set(summaries(store)) == {"k1"}
    assert not [p for p in store.root.iterdir() if p.name.startswith(".index")]


def test_reading_a_store_that_is_not_there_makes_nothing(tmp_path):
    store = Store(tmp_path / "none", create=False)
    assert summaries(store) == {}
    assert goals(store) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_half_made_artifact_is_not_there(store):
    fill(store, "k1")
    (store.root / "artifacts" / "k2" / "policy").mkdir(parents=True)
    Path(store.root / "artifacts" / "stray").write_text("")
    assert set(summaries(store)) == set(store.keys()) == {"k1"}


def test_the_keys_of_runs_follow_their_files(store):
    one = [{"seed": 4, "keys": {"a": "k1", "b": "k2"}}]
    store.save_run("r-1", {"goals": one})
    assert goals(store) == goals(store) == {"r-1": [("4", {"a": "k1", "b": "k2"})]}
    store.save_run("r-1", {"goals": [*one, {"keys": {"a": "k3"}}]})
    assert goals(store) == {"r-1": [("4", {"a": "k1", "b": "k2"}), ("0", {"a": "k3"})]}
    for text in ("{", "[]", "{}", '{"goals": []}', '{"goals": [3]}', '{"goals": [{"keys": {"a": 3}}]}'):
        (store.root / "runs" / "r-2.json").write_text(text)
        assert set(goals(store)) == {"r-1"}, text
