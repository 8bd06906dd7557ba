"""The smallest case of every mistake that the tests beside have found."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import toy
from tests.fuzz.broken import DEEP
from tutelage.catalog import choose
from tutelage.graph import record
from tutelage.index import summaries
from tutelage.report.data import series
from tutelage.spec import SpecError, UserError, build, parse_set
from tutelage.store import Store
from tutelage.text.files import BadRow, conform, shape_of

# --- records -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * DEEP + "]" * DEEP, "nested too deeply"),
        ('{"a":' * 100 + "0" + "}" * 100, "nested deeper than 64 levels"),
        ('{"a": 1e999}', "^a: must be a finite number"),
        ('{"a": [NaN]}', "^a.0: must be a finite number"),
        ('{"a": %s}' % ("9" * 400), r"^a: is too large a number; give one below 2\^63"),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ('{"a": %s}' % ("9" * 5000), "is not JSON"),
    ],
)
def test_a_record_that_no_spec_can_hold(tmp_path, text, says):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=says):
        choose(str(tmp_path / "r.json"))


def test_several_mistakes_of_a_spec_are_one_line():
    with pytest.raises(
        SpecError, match=r"^unknown field 'a'.*; unknown field 'b'.*; unknown field 'c'.*; and 1 more mistakes$"
    ):
        build(toy.Rate, dict.fromkeys("abcd", 1))


def test_a_message_is_one_short_line_whatever_stands_in_it():
    said = str(UserError("two\nlines \x1b[31m\ud800" + "x" * 5000 + "; the fix"))
    assert said.startswith("two lines \\x1b[31m\\ud800xxx")
    assert said.endswith("xxx; the fix")
    assert len(said) < 1000


def test_an_object_without_a_kind_is_no_spec_of_an_abstract_class():
    rec: Any = json.loads(json.dumps(record(choose("quickstart").goals[0])))
    rec["stages"]["sft"]["loss"] = {}
    from tutelage.graph import from_record

    with pytest.raises(SpecError, match=r"sft.loss: .*give it a kind; valid: .*DAPO"):
        from_record(rec)


def test_a_value_that_only_looks_like_json_is_text():
    deep = "[" * DEEP
    assert parse_set(f"a.b={deep}") == ("a.b", deep)
    assert parse_set(f"a.b={'9' * 5000}") == ("a.b", "9" * 5000)


# --- rows ----------------------------------------------------------------------------------------------------------------


def test_a_role_that_is_no_text_is_a_bad_row():
    row = {"messages": [{"role": {}, "content": "a"}]}
    with pytest.raises(BadRow, match=r"messages\[0\].role must be one of system, user, assistant; got {}"):
        conform("f, line 1", row, shape_of("f, line 1", row, {}), "data")


# --- stores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"key": "k", "name": "a", "inputs": [], "cost": 7}', "cost: Input should be a valid dict"),
        ('{"key": "k", "name": "a", "inputs": [], "finished": 1e300}', "finished: Input should be less than"),
        ('{"key": "k", "name": "a", "inputs": [{"path": "x", "key": "../..", "port": "p", "name": "b"}]}', "inputs.0.key"),
        ('{"key": "k", "name": "\\ud800", "inputs": []}', "half of a surrogate pair"),
        ("[" * DEEP + "]" * DEEP, "nested too deeply"),
    ],
)
def test_an_artifact_of_another_form_is_damaged(tmp_path, body, says):
    store = Store(tmp_path)
    store.folder("k").mkdir()
    (store.folder("k") / "artifact.json").write_text(body)
    with pytest.raises(UserError, match=says):
        store.meta("k")
    assert says in summaries(store)["k"].damaged


def test_a_run_of_another_form_is_no_run(tmp_path):
    store = Store(tmp_path)
    store.save_run("r-1", {"goals": [{"seed": "x", "keys": {}}]})
    with pytest.raises(UserError, match=r"r-1.json is not a run: goals.0.seed: Input should be a valid integer"):
        store.load_run("r-1")


def test_metrics_that_are_no_numbers_are_no_curve():
    assert series([{"step": "x", "a": 1}, {"step": 1, "a": 10**400}, {"step": 2, "a": 3.0}]) == {"a": ([2], [3.0])}
