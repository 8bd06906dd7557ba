"""The versions table is in step with the code; and the tool that says so notices what it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.versions import Code, declared_same, problems, read, recorded, write

LOSS = '''
"""A loss."""
from demo.spec import Spec
from demo.losses.common import mean

class Loss(Spec):
    """Doc."""
    version: ClassVar[int] = {version}
    def __call__(self, x):
        from demo.learn.core import used
        return mean(x) + used(x)

class Child(Loss):
    weight: float = 1.0

class Other(Spec):
    loss: Loss

class Calls(Spec):
    loss: Loss = Child()
'''
COMMON = "LIMIT = 20\n\ndef mean(x):\n    return min(x, LIMIT)\n\ndef apart(x):\n    return x\n"
CORE = "def used(x):\n    return x\n\ndef unused(x):\n    return x\n"


def test_every_spec_class_is_as_the_table_says():
    now = Code().specs
    assert len(now) > 20, "the scan finds no spec classes"
    found = problems(now, read())
    assert not found, "\n\n".join(["tests/versions.json is out of step with the code", *found])


def demo(root: Path, loss: str = LOSS, common: str = COMMON, core: str = CORE, version: int = 1) -> dict:
    for name, text in (("losses/a", loss.replace("{version}", str(version))), ("losses/common", common), ("learn/core", core)):
        file = root / "demo" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Code(root / "demo").specs


@pytest.fixture
def before(tmp_path):
    return demo(tmp_path)


def flagged(found: list[str]) -> set[str]:
    return {line.split(" ")[0].removeprefix("losses.a.").rstrip(":") for line in found}


def test_only_spec_classes_are_listed(before):
    assert before.keys() == {f"losses.a.{n}" for n in ("Loss", "Child", "Other", "Calls")}


@pytest.mark.parametrize(
    ("what", "old", "new"),
    [
        ("loss", '"""Doc."""', '"""Another."""\n    # a comment'),
        ("loss", "return mean(x) + used(x)", "return (\n            mean(x) + used(x))"),
        ("common", "def apart(x):\n    return x\n", "def apart(x):\n    return 2 * x\n"),
        ("core", "def unused(x):\n    return x\n", ""),
    ],
)
def test_what_computes_the_same_is_not_flagged(tmp_path, before, what, old, new):
    source = {"loss": LOSS, "common": COMMON, "core": CORE}[what]
    assert old in source
    assert problems(demo(tmp_path, **{what: source.replace(old, new)}), before) == []


@pytest.mark.parametrize(
    ("what", "old", "new", "who"),
    [
        ("loss", "mean(x) + used", "mean(x) - used", {"Loss", "Child", "Calls"}),
        ("loss", "weight: float = 1.0", "weight: float = 2.0", {"Child", "Calls"}),
        ("common", "min(x, LIMIT)", "max(x, LIMIT)", {"Loss", "Child", "Calls"}),
        ("common", "LIMIT = 20", "LIMIT = 30", {"Loss", "Child", "Calls"}),
        ("core", "def used(x):\n    return x\n", "def used(x):\n    return -x\n", {"Loss", "Child", "Calls"}),
    ],
)
def test_a_change_flags_the_classes_it_reaches_and_no_other(tmp_path, before, what, old, new, who):
    source = {"loss": LOSS, "common": COMMON, "core": CORE}[what]
    assert old in source
    found = problems(demo(tmp_path, **{what: source.replace(old, new)}), before)
    assert flagged(found) == who
    assert all("raise its `version`" in line and "--same" in line for line in found)


def test_a_raised_version_is_recorded_and_inherited(tmp_path, before):
    changed = LOSS.replace("mean(x) + used", "mean(x) - used")
    now = demo(tmp_path, changed, version=2)
    assert {n: s["version"] for n, s in now.items()} == {
        "losses.a.Loss": 2,
        "losses.a.Child": 2,
        "losses.a.Other": 1,
        "losses.a.Calls": 1,
    }
    table = recorded(now, before)
    assert flagged(problems(now, table)) == {"Calls"}, "its default is another class: only a version of its own can tell"
    assert problems(now, declared_same(now, table, "no store has one", ["Calls"])) == []


def test_an_unraised_version_is_not_recorded(tmp_path, before):
    now = demo(tmp_path, LOSS.replace("mean(x) + used", "mean(x) - used"))
    assert recorded(now, before) == before


def test_a_version_never_falls(tmp_path, before):
    now = demo(tmp_path, version=2)
    table = recorded(now, declared_same(now, before, "only its number", ["Calls"]))
    assert problems(now, table) == []
    assert flagged(problems(before, table)) >= {"Loss", "Child"}


def test_new_and_removed_classes_are_recorded(tmp_path, before):
    now = demo(tmp_path, LOSS.replace("class Other", "class Fresh"))
    assert flagged(problems(now, before)) == {"Fresh", "Other"}
    assert problems(now, recorded(now, before)) == []


def test_the_same_needs_a_reason_and_a_known_class(tmp_path, before):
    now = demo(tmp_path, common=COMMON.replace("min(x, LIMIT)", "min(LIMIT, x)"))
    with pytest.raises(ValueError, match="why"):
        declared_same(now, before, " ", ["Loss"])
    with pytest.raises(ValueError, match="'Lass' is not one spec class"):
        declared_same(now, before, "commutes", ["Lass"])
    table = declared_same(now, before, "min commutes", ["Loss", "Child", "losses.a.Calls"])
    assert problems(now, table) == []
    assert table["losses.a.Loss"]["same"] == "min commutes"


def test_the_table_survives_a_round_trip(tmp_path, before):
    write(before, tmp_path / "table.json")
    assert read(tmp_path / "table.json") == before
