"""Why a stage will run: what differs from the nearest stored one."""

from __future__ import annotations

from tests import toy
from tutelage.explain import reasons
from tutelage.graph import Goals, Plan, from_record, key, plan, record
from tutelage.run import run
from tutelage.store import Store

NOBODY = set().__contains__


def planned(*goals: Goals) -> Plan:
    return plan(list(goals), NOBODY)


def test_reasons_name_what_differs_from_the_stage_that_is_stored(tmp_path):
    store = Store(tmp_path / "s")
    run(plan([toy.small()], store.has), store)

    def why(path: str, field: str, value: object) -> dict[str, str]:
        rec = record(toy.small())
        rec["stages"][path][field] = value
        made = plan([from_record(rec)], store.has)
        return {made.nodes[k].label: text for k, text in reasons(made, store).items()}

    assert why("right", "steps", 12)["right"] == "steps 11 → 12"
    assert why("right", "keep", [3])["right"] == "keep changed"
    assert why("right", "pause", 9.0)["right"] == "made before"
    found = why("more", "rows", 5)
    assert found["more"] == "rows 4 → 5"
    assert found["left"] == "waits for more"
    assert found["right"] == "made before"
    assert reasons(planned(toy.small()), Store(tmp_path / "none"))[key(toy.stages(toy.small())["data"])] == "new"


def test_each_seed_is_compared_with_its_own_record(tmp_path):
    store = Store(tmp_path / "s")
    run(plan([toy.small(1)], store.has), store)
    made = plan([toy.small(5), toy.small(6)], store.has)
    why = {made.nodes[k].label: text for k, text in reasons(made, store).items()}
    assert why["more@5"] == "seed 101 → 105"
    assert why["more@6"] == "seed 101 → 106"


def test_a_version_bump_is_a_reason(tmp_path, monkeypatch):
    store = Store(tmp_path / "s")
    run(plan([toy.small()], store.has), store)
    monkeypatch.setattr(toy.Make, "version", 7)
    made = plan([toy.small()], store.has)
    assert {made.nodes[k].label: text for k, text in reasons(made, store).items()}["data"] == "version 1 → 7"
