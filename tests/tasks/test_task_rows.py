"""Data and Scores artifacts as files: what is written is read back, and what does not fit is refused by name."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tutelage.spec import UserError
from tutelage.text.rows import read_rows, read_tasks, write_tasks
from tutelage.text.scores import read_scores, write_scores
from tutelage.types import Task

ASKED = [{"role": "user", "content": "12+30"}]
ROW = {"id": "a", "domain": "sum", "prompt": ASKED, "gold": "42", "meta": {"level": 2, "entry": {"answer": "42"}}}
REPLY = [{"role": "assistant", "content": "42"}]


def test_rows_come_back_as_they_were(tmp_path):
    rows = [{**ROW, "completion": REPLY}, {**ROW, "id": "b", "completion": REPLY, "gold": None, "meta": {}}]
    write_tasks(tmp_path, rows)
    assert read_rows(tmp_path) == rows
    assert read_tasks(tmp_path) == [Task("a", "sum", tuple(ASKED), "42", ROW["meta"]), Task("b", "sum", tuple(ASKED), None, {})]


def test_the_columns_are_those_that_trl_reads(tmp_path):
    write_tasks(tmp_path, [{**ROW, "completion": REPLY}])
    schema = pq.read_schema(tmp_path / "data.parquet")
    assert schema.names == ["id", "domain", "prompt", "completion", "gold", "meta"]
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    assert (schema.field("prompt").type, schema.field("completion").type) == (message, message)
    assert schema.field("meta").type == pa.string()


def test_no_rows_are_a_dataset_too(tmp_path):
    write_tasks(tmp_path, [])
    assert read_tasks(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": []}, "prompt must be a list of messages"),
        ({"prompt": REPLY}, "ends with the user's"),
        ({"prompt": [{"role": "user"}]}, "role, content"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt must be"),
        ({"id": ""}, "id must be"),
        ({"id": "a"}, "id must be a text that no other row has; got 'a'"),
        ({"domain": 3}, "domain must be"),
        ({"gold": 42}, "gold must be a text, or null"),
        ({"meta": [1]}, "meta must be a JSON object"),
        ({"completion": ASKED}, "ends with the assistant's"),
        ({"golf": "42"}, "did you mean 'gold'"),
    ],
)
def test_a_bad_row_is_named_when_written(tmp_path, change, says):
    with pytest.raises(UserError, match=r"data\.parquet, row 1: ") as caught:
        write_tasks(tmp_path, [ROW, {**ROW, "id": "b", **change}])
    assert says in str(caught.value)


def test_rows_of_unlike_columns_are_refused(tmp_path):
    with pytest.raises(UserError, match="row 1: has columns"):
        write_tasks(tmp_path, [ROW, {"id": "b", "domain": "sum", "prompt": ASKED}])


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"id": ["a", "a"], "domain": ["d", "d"], "prompt": [ASKED, ASKED]}, "row 1: id must be"),
        ({"id": ["a", None], "domain": ["d", "d"], "prompt": [ASKED, ASKED]}, "row 1: id must be"),
        ({"id": ["a", "b"], "domain": ["d", "d"], "prompt": [ASKED, []]}, "row 1: prompt must be"),
        ({"id": ["a", "b"], "domain": ["d", "d"], "prompt": [ASKED, ASKED], "meta": ["{}", "{"]}, "row 1: meta must be"),
        ({"id": ["a", "b"], "prompt": [ASKED, ASKED]}, "no column domain"),
        ({"text": ["x", "y"]}, "no column id, domain, prompt"),
    ],
)
def test_a_bad_row_of_somebody_elses_file_is_named_when_read(tmp_path, columns, says):
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    with pytest.raises(UserError) as caught:
        read_tasks(tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path / "data.parquet") in str(caught.value)


def test_what_is_no_dataset_is_said(tmp_path):
    with pytest.raises(UserError, match=r"a folder that holds data\.parquet"):
        read_rows(tmp_path / "nowhere")
    (tmp_path / "data.parquet").write_text("id,domain")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_rows(tmp_path)


SCORE = {"task": "a", "value": 1.0, "error": None, "reply": "42", "tokens": 3, "level": 2}


def test_scores_come_back_with_their_summary(tmp_path):
    rows = [SCORE, {**SCORE, "task": "b", "value": 0.0, "error": "late"}, {**SCORE, "task": "c", "value": 0.5}]
    write_scores(tmp_path, "sum", rows)
    assert read_scores(tmp_path) == ({"domain": "sum", "n": 3, "errors": 1, "mean": 0.5}, rows)


def test_scores_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="row 1: has columns task, value"):
        write_scores(tmp_path, "sum", [SCORE, {"task": "b", "value": 1.0}])
    with pytest.raises(UserError, match="does not fit"):
        write_scores(tmp_path, "sum", [{**SCORE, "tokens": "three"}])
    with pytest.raises(UserError, match="no Scores artifact"):
        read_scores(tmp_path)
