"""Why a stage will run: what differs from the nearest stored one, each kind of difference by itself."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest

from tests import toy
from tutelage.explain import CANDIDATES, NEW, Reason, differences, marks, reasons
from tutelage.graph import Goals, Stage, from_record, key, plan, record
from tutelage.index import Summary
from tutelage.run import run
from tutelage.store import Store

NOBODY = set().__contains__


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store that holds `toy.small`."""
    store = Store(tmp_path_factory.mktemp("stored") / "s")
    run(plan([toy.small()], store.has), store)
    return store


def why(store: Store, *goals: Goals) -> dict[str, Reason]:
    made = plan(list(goals), store.has)
    return {made.nodes[k].label: found for k, found in reasons(made, store).items()}


def edited(**edits: Any) -> Goals:
    """`toy.small` with fields replaced: ``base__steps=12``; a stage's whole record by its name alone."""
    rec = record(toy.small())
    for where, value in edits.items():
        name, *path, last = where.split("__")
        spot = rec["stages"][name]
        for part in path:
            spot = spot[int(part)] if part.isdigit() else spot[part]
        spot[int(last) if last.isdigit() else last] = value
    return from_record(rec)


def publish(
    store: Store, stage: Stage, finished: float, name: str = "", told: dict[str, Any] | None = None, **facts: Any
) -> str:
    """Puts an artifact of a stage without inputs into a store, as if it had been made by such code."""
    rec = json.loads(json.dumps(record(Goals(recipe="r", stages=(stage.out(),)))["stages"][stage.name]))
    mine = facts.pop("key", "") or f"{abs(hash((stage.name, finished))):032x}"[:32]
    (store.work(mine) / "data").mkdir()
    meta = {"name": name or stage.name, "kind": stage.kind(), "version": 1, "record": {**rec, "name": name or stage.name}}
    told = {"marks": told} if told is not None else {}
    with mock.patch("os.fsync"):
        store.publish(mine, {**meta, "inputs": [], "finished": finished, "seconds": 1.0, "cost": {}, **told, **facts})
    return mine


def test_a_changed_field_is_named_with_both_values(stored):
    assert why(stored, edited(right__steps=12))["right"].text() == "steps 11 → 12"
    assert why(stored, edited(right__keep=[3]))["right"].text() == "keep [] → [3]"
    found = why(stored, edited(right__rates__0__value=0.2))["right"]
    assert [c.json for c in found.changes] == [{"what": "field", "path": "rates.0.value", "old": 0.1, "new": 0.2}]
    assert found.text() == "rates.0.value 0.1 → 0.2"
    assert found.against["name"] == "right"


def test_a_field_in_no_key_is_no_reason(stored):
    found = why(stored, edited(right__pause=9.0, right__steps=12, right__threads=2))
    assert [c.path for c in found["right"].changes] == ["steps"]
    assert why(stored, edited(right__pause=9.0))["right"].text() == "made before"


def test_another_kind_of_nested_spec_is_one_difference(stored):
    other = {"kind": "tests.toy.Schedule", "value": 0.1, "shape": "flat", "warmup": 3}
    found = why(stored, edited(right__rates__0=other))["right"]
    assert found.text() == "rates.0 Rate → Schedule"
    more = why(stored, edited(right__rates=[{"kind": "tests.toy.Rate", "value": 0.1, "shape": "flat"}, other]))["right"]
    assert more.text() == "rates.1 none → Schedule"


def test_a_stage_that_waits_names_the_inputs_that_will_be_remade(stored):
    found = why(stored, edited(base__steps=12))
    assert found["base"].text() == "steps 10 → 12"
    assert found["left"].text() == "input start: base will be remade"
    assert [c.json["what"] for c in found["left"].changes] == ["input"]
    assert found["left"].changes[0].old.startswith("base@")
    assert found["score-left"].text() == "input policy: left will be remade"
    assert found["data"].text() == "made before"
    both = why(stored, edited(base__steps=12, left__steps=9, more__rows=5))
    assert both["left"].text() == "steps 10 → 9, inputs source: more; start: base will be remade"
    assert both["left"].text(1) == "steps 10 → 9, inputs source: more and 1 more will be remade"


def test_a_stored_input_that_is_another_one_is_told_with_what_made_it_so(tmp_path):
    store = Store(tmp_path / "s")
    run(plan([toy.small()], store.has), store)
    data = toy.Make(name="data", rows=5)
    run(plan([Goals(recipe="r", stages=(data.out(),))], store.has), store)
    found = why(store, edited(data__rows=5))["base"]
    old, new = (key(s)[:8] for s in (toy.stages(toy.small())["data"], data))
    assert found.text() == f"input source changed: data {old} → {new} (rows 4 → 5)"


def test_an_input_of_another_name_or_none(stored):
    found = why(stored, edited(right__source__ref="more"))["right"]
    assert found.text() == "input source changed: data → more"
    none = why(stored, edited(right__start=None))["right"]
    assert none.text() == "input start removed: base"


def test_nothing_of_the_kind_is_stored(tmp_path):
    found = why(Store(tmp_path / "none"), toy.small())
    assert {r.text() for r in found.values()} == {NEW}
    assert all(r.against is None for r in found.values())


def test_without_its_name_the_nearest_of_its_kind_counts(tmp_path):
    store = Store(tmp_path / "s")
    publish(store, toy.Make(name="far", rows=9, seed=9), 3.0)
    near = publish(store, toy.Make(name="near", rows=9, seed=1), 1.0)
    found = why(store, Goals(recipe="r", stages=(toy.Make(name="fresh", rows=8, seed=1).out(),)))["fresh"]
    assert found.text() == "unlike near: rows 9 → 8"
    assert found.against == {"name": "near", "key": near}
    same = publish(store, toy.Make(name="fresh", rows=1, seed=2), 0.0)  # its own name counts first, however far and old
    assert why(store, Goals(recipe="r", stages=(toy.Make(name="fresh", rows=8, seed=1).out(),)))["fresh"].against["key"] == same


def test_of_equally_near_ones_the_newest_counts(tmp_path):
    store = Store(tmp_path / "s")
    for finished, rows in ((2.0, 7), (3.0, 6), (1.0, 5)):
        publish(store, toy.Make(name="data", rows=rows), finished)
    publish(store, toy.Make(name="data", rows=3, seed=3), 9.0)
    found = why(store, Goals(recipe="r", stages=(toy.Make(name="data", rows=8).out(),)))["data"]
    assert found.text() == "rows 6 → 8"


def test_the_same_stage_by_older_code_is_nearer_than_another_seed(alone, monkeypatch):
    for seed, finished in ((0, 1.0), (1, 2.0)):
        publish(alone, Nested(name="n", seed=seed), finished)
    monkeypatch.setattr("tutelage.explain.foreign_code", lambda cls: {})
    for cls, version in ((toy.Rate, 2), (toy.Schedule, 3)):
        monkeypatch.setattr(cls, "version", version)
    found = why(alone, Goals(recipe="r", stages=(Nested(name="n", seed=0).out(),)))["n"]
    assert {c.text for c in found.changes} == {f"perhaps rates.{n} version changed to {n + 2}" for n in (0, 1)}


def test_each_seed_is_compared_with_its_own_record(stored):
    found = why(stored, toy.small(5), toy.small(6))
    assert found["more@5"].text() == "seed 100 → 105"
    assert found["more@6"].text() == "seed 100 → 106"


def test_a_version_bump_is_a_reason(stored, monkeypatch):
    monkeypatch.setattr(toy.Make, "version", 7)
    found = why(stored, edited())["data"]
    assert [c.json for c in found.changes] == [{"what": "version", "path": "", "old": 1, "new": 7}]
    assert found.text() == "version 1 → 7"


@pytest.fixture
def alone(tmp_path):
    """A store, and a toy stage with nested specs and no inputs to put there."""
    return Store(tmp_path / "s")


class Nested(toy.Make):
    """Make with nested specs."""

    rates: tuple[toy.Rate, ...] = (toy.Rate(), toy.Schedule())


def test_a_nested_specs_version_is_told_by_its_path(alone, monkeypatch):
    stage = Nested(name="n")
    publish(alone, stage, 1.0, told=marks(stage))
    monkeypatch.setattr(toy.Schedule, "version", 3)
    found = why(alone, Goals(recipe="r", stages=(Nested(name="n").out(),)))["n"]
    assert [c.json for c in found.changes] == [{"what": "version", "path": "rates.1", "old": 1, "new": 3}]
    assert found.text() == "rates.1 version 1 → 3"


class Borrowed(toy.Rate):
    """A nested spec whose results a library decides."""

    library = "pytest"


@pytest.mark.parametrize("told", [True, False])
def test_a_library_of_another_version_is_told(alone, told):
    stage = Nested(name="n", rates=(Borrowed(),))
    older = {**marks(stage), "rates.0": {**marks(stage)["rates.0"], "library": "pytest 0.1"}}
    publish(alone, stage, 1.0, told=older if told else None, versions={"pytest": "0.1"})
    found = why(alone, Goals(recipe="r", stages=(Nested(name="n", rates=(Borrowed(),)).out(),)))["n"]
    assert found.text() == f"rates.0 pytest 0.1 → {pytest.__version__}"
    assert found.changes[0].what == "version"


def test_the_users_code_is_told_by_its_module(alone, monkeypatch):
    stage = Nested(name="n")
    was = marks(stage)
    assert was[""]["code"]  # the tests' modules are not the package's
    for path in ("", "rates.0", "rates.1"):
        was[path] = {**was[path], "code": "0" * 32}
    publish(alone, stage, 1.0, told=was)
    found = why(alone, Goals(recipe="r", stages=(Nested(name="n").out(),)))["n"]
    assert found.text() == "code of tests.test_explain changed, code of tests.toy changed"
    assert [c.path for c in found.changes] == ["", "rates.0"]


class Reads(toy.Outside):
    """Reads two outside files."""

    other: str = toy.outside()


def test_the_outside_file_whose_content_changed_is_told_by_its_field(alone, tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    stage = Reads(name="reads", file=str(tmp_path / "a"), other=str(tmp_path / "b"))
    publish(alone, stage, 1.0, told=marks(stage))
    (tmp_path / "b").write_text("2")
    (tmp_path / "c").write_text("1")  # another path with the same content is no difference
    again = Reads(name="reads", file=str(tmp_path / "c"), other=str(tmp_path / "b"))
    found = why(alone, Goals(recipe="r", stages=(again.out(),)))["reads"]
    assert found.text() == "other: its content changed"
    assert found.changes[0].json["what"] == "field"


def test_an_artifact_that_tells_no_marks_leaves_what_could_have_changed(alone, tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.explain.foreign_code", lambda cls: {})
    (tmp_path / "a").write_text("1")
    one = toy.Outside(name="one", file=str(tmp_path / "a"))
    publish(alone, one, 1.0)
    assert why(alone, Goals(recipe="r", stages=(one.out(),)))["one"].text() == "file: its content changed"
    two = Reads(name="two", file=str(tmp_path / "a"), other=str(tmp_path / "a"))
    publish(alone, two, 1.0)
    found = why(alone, Goals(recipe="r", stages=(two.out(),)))["two"]
    assert found.text() == "perhaps file: its content changed, perhaps other: its content changed"
    publish(alone, toy.Make(name="none"), 1.0)
    assert why(alone, Goals(recipe="r", stages=(toy.Make(name="none").out(),)))["none"].text() == "its code changed"


def test_a_field_that_an_older_record_lacks_had_its_default(alone):
    stage = Nested(name="n", rows=5)
    mine = publish(alone, stage, 1.0)
    file = alone.folder(mine) / "artifact.json"
    meta = json.loads(file.read_text())
    del meta["record"]["rates"], meta["record"]["seed"]
    file.write_text(json.dumps(meta))
    found = why(alone, Goals(recipe="r", stages=(Nested(name="n", rows=6, rates=(toy.Rate(value=0.5),)).out(),)))["n"]
    assert sorted(c.text for c in found.changes) == ["rates.0.value 0.1 → 0.5", "rates.1 Schedule → none", "rows 5 → 6"]


def test_unfinished_work_goes_on_and_still_says_what_differs(tmp_path, stored):
    made = plan([edited(right__steps=12)], stored.has)
    node = next(n for n in made.todo if n.label == "right")
    with mock.patch.object(Store, "checkpoint", lambda self, k: 5 if k == node.key else None):
        assert reasons(made, stored)[node.key].text() == "goes on from step 5: steps 11 → 12"


def test_differences_of_records():
    old = {
        "kind": "a.B",
        "name": "x",
        "model": {"ref": "sft", "port": "policy", "step": None},
        "by": {"sum": 1},
        "t": "long" * 20,
    }
    new = {**old, "name": "y", "model": {"ref": "sft", "port": "policy", "step": 5}, "by": {"sum": 1, "sort": 2}, "t": "short"}
    assert [c.text for c in differences(old, new)] == ["model sft:policy → sft:policy@5", "by.sort none → 2", "t changed"]
    assert differences(old, {**old, "name": "y"}) == []


def test_a_large_store_is_explained_in_few_reads(tmp_path, monkeypatch):
    """Artifacts are read for the nearest neighbours only, so reads grow with the plan and not with the store."""
    store = Store(tmp_path / "s")
    facts = {"version": 1, "seconds": 0.0, "estimate": 0.0, "flops": 0.0, "threads": 1, "outputs": {}, "inputs": [], "size": 0}
    known = [
        Summary(key=f"{i:032x}", name=f"s{i % 100}", kind="tests.toy.Chain", seed=None, finished=float(i), **facts)
        for i in range(5000)
    ]
    rec = {"kind": "tests.toy.Chain", "name": "s", "threads": 1, "before": None, "number": 7}
    reads = []
    monkeypatch.setattr("tutelage.explain.summaries", lambda store: {s.key: s for s in known})
    monkeypatch.setattr(Store, "meta", lambda self, k: reads.append(k) or {**known[int(k, 16)]._asdict(), "record": rec})
    chain = [toy.Chain(name="s0", number=-1)]
    for i in range(1, 300):
        chain.append(toy.Chain(name=f"s{i}", number=i, before=chain[-1].out()))
    found = why(store, Goals(recipe="r", stages=(chain[-1].out(),)))
    assert all(len(r.changes) >= 1 for r in found.values())
    assert len(reads) == len(set(reads)) <= CANDIDATES * 104
