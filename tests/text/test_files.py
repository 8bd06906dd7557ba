"""A user's data files: every shape is read as the rows it means, and every mistake is named by file, place and column."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.spec import UserError
from tutelage.text.files import BadRow, conform, data_files, records, shape_of

USER, REPLY = {"role": "user", "content": "12+30"}, {"role": "assistant", "content": "42"}
SYSTEM = {"role": "system", "content": "Add."}


def rows_of(file, columns=(), domain="data"):
    """All rows of a file; a bad one is raised."""
    shape, rows = None, []
    for where, found in records(file):
        if isinstance(found, BadRow):
            raise found
        shape = shape or shape_of(where, found, dict(columns))
        rows.append(conform(where, found, shape, domain))
    return rows


def jsonl(folder, *rows, name="d.jsonl"):
    file = folder / name
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return file


def problem(file, **how):
    """What is said of a file; always one line that names it."""
    with pytest.raises((UserError, BadRow)) as caught:
        rows_of(file, **how)
    says = str(caught.value)
    assert str(file) in says
    assert "\n" not in says
    return says.removeprefix(str(file))


SHAPES = {
    "messages": ({"messages": [SYSTEM, USER, REPLY]}, {"prompt": [SYSTEM, USER], "completion": [REPLY]}),
    "messages of several turns": (
        {"messages": [USER, REPLY, USER, REPLY]},
        {"prompt": [USER, REPLY, USER], "completion": [REPLY]},
    ),
    "prompt and completion": ({"prompt": [USER], "completion": [REPLY]}, {"prompt": [USER], "completion": [REPLY]}),
    "texts": ({"prompt": "12+30", "completion": "42"}, {"prompt": [USER], "completion": [REPLY]}),
    "prompts and gold": ({"prompt": "12+30", "gold": "42"}, {"prompt": [USER], "gold": "42"}),
    "answer is gold": ({"prompt": "12+30", "answer": 42}, {"prompt": [USER], "gold": "42"}),
    "gold beside answer": ({"prompt": "12+30", "gold": None, "answer": "x"}, {"gold": None, "meta": {"answer": "x"}}),
    "text": ({"text": "once"}, {"text": "once"}),
    "others go to meta": (
        {"text": "a", "tests": [1, None], "none": None, "meta": {"b": 1}},
        {"meta": {"tests": [1, None], "b": 1}},
    ),
    "meta as text": ({"text": "a", "meta": '{"b": [1]}'}, {"meta": {"b": [1]}}),
    "id and domain": ({"id": 7, "domain": "sum", "text": "a"}, {"id": "7", "domain": "sum"}),
    "no domain": ({"domain": None, "text": "a"}, {"domain": "data"}),
    "null keys of messages": ({"prompt": [{**USER, "name": None}]}, {"prompt": [USER]}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_in_json_lines_json_and_parquet(name, tmp_path):
    given_row, expected = SHAPES[name]
    array = tmp_path / "d.json"
    array.write_text(json.dumps([given_row], indent=2))
    table = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([given_row]), table)
    for file in (jsonl(tmp_path, given_row), jsonl(tmp_path, given_row, name="lines.json"), array, table):
        (row,) = rows_of(file)
        assert expected.items() <= row.items()
        assert row.keys() == {"id", "domain", "meta", *(expected.keys() - {"id", "domain", "meta"})} | (
            row.keys() & set(given_row)
        )


def test_csv_gives_texts_and_its_lines_are_an_editors(tmp_path):
    file = tmp_path / "d.csv"
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows([["question", "answer", "id"], ["two\nlines, said", "4", ""], ["b", "", "x"]])
    rows = rows_of(file, columns={"question": "prompt"})
    assert [r["prompt"][0]["content"] for r in rows] == ["two\nlines, said", "b"]
    assert [r["gold"] for r in rows] == ["4", None]
    assert rows[1]["id"] == "x"
    assert [where for where, _ in records(file)] == [f"{file}, line 2", f"{file}, line 4"]


def test_a_byte_order_mark_and_empty_lines_are_no_matter(tmp_path):
    for name, body in (
        ("d.jsonl", '{"text": "é"}\r\n\r\n{"text": "b"}'),
        ("d.json", '[{"text": "é"}]'),
        ("d.csv", "text\r\né\r\n"),
    ):
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + body.encode())
        assert rows_of(file)[0]["text"] == "é"
    assert [where for where, _ in records(tmp_path / "d.jsonl")] == [f"{tmp_path}/d.jsonl, line {n}" for n in (1, 3)]


def test_made_ids_tell_content(tmp_path):
    base = {"prompt": "a", "gold": "1", "domain": "d", "level": 1}
    ids = [
        rows_of(jsonl(tmp_path, {**base, **change}))[0]["id"] for change in ({}, {"gold": "2"}, {"domain": "e"}, {"level": 2})
    ]
    assert len(set(ids)) == 4
    assert rows_of(jsonl(tmp_path, dict(reversed(base.items()))))[0]["id"] == ids[0]


GOOD = {"prompt": [USER], "gold": "42", "id": "a"}
BAD_ROWS = {
    "cut": ('{"prompt": "a', "not JSON: Unterminated string starting at column 12", "not JSON"),
    "NaN": ('{"prompt": "a", "id": NaN}', "NaN is no value of JSON", "not JSON"),
    "a list": ("[1]", "must be a JSON object of columns; got [1]", "no object"),
    "no prompt": ({"promt": "a", "id": "b"}, "has no prompt; it has promt, id", "prompt"),
    "empty prompt": ({"prompt": " \n"}, "prompt is empty", "prompt"),
    "no turns": ({"prompt": []}, "prompt must be user and assistant in turn, ending with the user's", "prompt"),
    "a number": ({"prompt": 3}, "prompt must be a text or a list of messages {role, content}; got 3", "prompt"),
    "no reply asked": ({"prompt": [USER, REPLY]}, "got user, assistant", "prompt"),
    "twice the user": ({"prompt": [USER, USER]}, "got user, user", "prompt"),
    "late system": ({"prompt": [USER, SYSTEM]}, "got user, system", "prompt"),
    "role": (
        {"prompt": [{"role": "human", "content": "a"}]},
        "prompt[0].role must be one of system, user, assistant; got 'human'",
        "prompt",
    ),
    "null content": ({"prompt": [{"role": "user", "content": None}]}, "prompt[0].content must be a text; got None", "prompt"),
    "parts": ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "content must be a text; got [{", "prompt"),
    "empty content": ({"prompt": [{"role": "user", "content": ""}]}, "prompt[0].content is empty", "prompt"),
    "tool calls": ({"prompt": [{**USER, "tool_calls": [1]}]}, "prompt[0] has tool_calls; only role and content", "prompt"),
    "not a message": ({"prompt": ["a"]}, "prompt[0] must be an object with role and content; got 'a'", "prompt"),
    "id": ({"prompt": "a", "id": 1.5}, "id must be a text or a whole number; got 1.5", "id"),
    "gold": ({"prompt": "a", "gold": [42]}, "gold must be a text, a number or null; got [42]", "gold"),
    "gold yes": ({"prompt": "a", "gold": True}, "gold must be a text, a number or null; got True", "gold"),
    "domain": ({"prompt": "a", "domain": 3}, "has domain, which the first row has not", "domain"),
    "another shape": ({"prompt": "a", "completion": "b"}, "has completion, which the first row has not", "completion"),
    "half a character": ('{"prompt": "\\ud800"}', "half of a surrogate pair", "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_line_column_and_what_was_found(name, tmp_path):
    row, says, reason = BAD_ROWS[name]
    file = jsonl(tmp_path, GOOD, "", row)
    with pytest.raises(BadRow) as caught:
        rows_of(file)
    assert str(caught.value).startswith(f"{file}, line 3: ")
    assert says in str(caught.value)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_a_wrong_encoding_is_named_by_line_and_byte(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert problem(file) == ", line 2: byte 14 of the line (0xE9) is not UTF-8; save the file as UTF-8"
    file = tmp_path / "d.csv"
    file.write_bytes(b"text\na\ncaf\xe9\n")
    assert problem(file) == ", line 3: byte 11 of the file (0xE9) is not UTF-8; save the file as UTF-8"
    for encoding in ("utf-16", "utf-16-be"):
        file = tmp_path / f"{encoding}.jsonl"
        file.write_bytes((b"\xfe\xff" if encoding.endswith("be") else b"") + '{"text": "a"}'.encode(encoding))
        assert problem(file) == " is UTF-16; save it as UTF-8"


BAD_FILES = {
    "empty.jsonl": (b"", " is empty; it must hold rows with messages, or prompt"),
    "blank.jsonl": (b"\n \n", " is empty"),
    "empty.json": (b"", " is empty"),
    "none.json": (b"[]", " is empty"),
    "empty.csv": (b"", " is empty"),
    "header.csv": (b"prompt,gold\n", " is empty"),
    "empty.parquet": (b"", " is empty"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", " is a Git LFS pointer"),
    "lines.parquet": (b'{"text": "a"}\n', " is no Parquet file: it begins with b'{\"text\":'"),
    "cut.parquet": (b"PAR1" + bytes(40), " cannot be read as Parquet after row 0"),
    "cut.json": (b'[{"text": "a"},\n {"text": "b"', ", line 2: not JSON: Expecting ',' delimiter"),
    "comma.json": (b'[{"text": "a"}\n {"text": "b"}]', ", line 2: not JSON: expecting ',' or ']'"),
    "more.json": (b'[{"text": "a"}]\n[{"text": "b"}]', ": more follows after the array's end"),
    "item.json": (b'[{"text": "a"},\n\n 3]', ", line 3: must be a JSON object of columns; got 3"),
    "nan.json": (b'[{"text": "a"},\n{"text": NaN}]', ", line 2: not JSON: NaN is no value"),
    "columns.jsonl": (b'{"q": "a", "a": "b"}\n', ", line 1: has q, a; needs messages, or prompt"),
    "both.jsonl": (b'{"prompt": "a", "messages": []}\n', ", line 1: has messages and prompt; drop one by columns"),
    "reply.jsonl": (b'{"completion": "a", "text": "b"}\n', ", line 1: has completion and no prompt"),
    "fields.csv": (b"prompt,gold\na,1\nb\nc,3\n", ", line 3: has 1 fields, the header has 2"),
    "comma.csv": (b"prompt,gold\na,1\nb, or not,2\n", ", line 3: has 3 fields, the header has 2"),
    "twice.csv": (b"prompt,prompt\na,1\n", ", line 1: two columns are named 'prompt'"),
    "quote.csv": (b'prompt,gold\na,1\n"b,2\nc,3\n', ", line 3: not CSV"),
    "semicolon.csv": (b"prompt;gold\na;1\n", ", line 2: has prompt;gold; needs messages"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(BAD_FILES[name][0])
    assert problem(tmp_path / name).startswith(BAD_FILES[name][1])


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"prompt": [1, 2]}, ", row 1: prompt must be a text or a list of messages {role, content}; got 1"),
        ({"prompt": ["a", None]}, ", row 2: has no prompt"),
        ({"prompt": ["a"], "id": [float("nan")]}, ", row 1: id must be a text or a whole number; got nan"),
        ({"prompt": ["a"], "raw": [b"\xff"]}, ", row 1: column 'raw' holds a bytes that JSON cannot; drop it by columns"),
        ({"prompt": ["a"], "x": [float("inf")]}, ", row 1: column 'x' holds a float that JSON cannot"),
    ],
)
def test_parquet_of_wrong_types(columns, says, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    assert problem(tmp_path / "d.parquet").startswith(says)


def test_a_column_can_be_renamed_or_dropped(tmp_path):
    row = {"question": "a", "answer": "1", "prompt": "template", "big": "x"}
    (made,) = rows_of(jsonl(tmp_path, row), columns={"question": "prompt", "prompt": "", "big": ""})
    assert (made["prompt"][0]["content"], made["gold"], made["meta"]) == ("a", "1", {})
    assert "question and prompt would both be prompt" in problem(jsonl(tmp_path, row), columns={"question": "prompt"})
    assert "no column 'qestion', which columns names; did you mean 'question'" in problem(
        jsonl(tmp_path, row), columns={"qestion": "prompt"}
    )


def test_a_folder_is_its_data_files_in_order(tmp_path):
    for name in ("b/2.jsonl", "a.parquet", ".git/x.jsonl", ".hidden.json", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in data_files(tmp_path)] == ["a.parquet", "b/2.jsonl"]
    (tmp_path / "c.jsonl.gz").touch()
    with pytest.raises(UserError, match=r"c\.jsonl\.gz is compressed; unpack it"):
        data_files(tmp_path)


def test_what_holds_no_data_is_said(tmp_path):
    with pytest.raises(UserError, match="a folder of such; it holds nothing"):
        data_files(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"it holds notes\.txt"):
        data_files(tmp_path)
    with pytest.raises(UserError, match="it is none of these"):
        data_files(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="does not exist"):
        data_files(tmp_path / "gone")


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "text", "id", "domain", "gold", "meta", "x"]), VALUES)
)
def test_any_record_is_a_row_of_the_declared_columns_or_a_named_mistake(record):
    from tutelage.text.rows import COLUMNS

    said = ""
    try:
        shape = shape_of("f, line 1", record, {})
        row = conform("f, line 1", record, shape, "data")
    except (UserError, BadRow) as error:
        said = str(error)
    if said:
        assert said.startswith("f, line 1: ")
        assert "\n" not in said
    else:
        assert set(shape.columns) == row.keys()
        assert all(COLUMNS[name][0](value) for name, value in row.items())


def test_parquet_texts_that_are_no_utf_8(tmp_path):
    from tutelage.text.rows import read_rows

    raw = pa.py_buffer(b"caf\xe9")
    column = pa.StringArray.from_buffers(1, pa.array([0, 4], pa.int32()).buffers()[1], raw)
    pq.write_table(pa.table({"text": column}), tmp_path / "data.parquet")
    assert problem(tmp_path / "data.parquet").startswith(" cannot be read as Parquet after row 0: 'utf-8' codec")
    with pytest.raises(UserError, match=r"data\.parquet cannot be read as Parquet: 'utf-8' codec"):
        read_rows(tmp_path)
