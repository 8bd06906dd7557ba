"""Data files that are no good: refused in a line that names file and place, or rows that fit their columns; and what
``skip_bad_rows`` leaves is what the file without its bad rows holds."""

from __future__ import annotations

import csv
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.broken import as_text, broken, byte_edits, edited, edits, examples, tried, values
from tutelage.graph import key
from tutelage.spec import UserError
from tutelage.stages.files import Files
from tutelage.text.files import OURS
from tutelage.text.rows import COLUMNS, read_rows

USER, REPLY = {"role": "user", "content": "12+30"}, {"role": "assistant", "content": "42"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [USER, REPLY]},
        {"messages": [USER, REPLY, USER, REPLY], "domain": "b"},
        {"messages": [USER, REPLY]},
    ],
    "prompt": [
        {"prompt": "a", "answer": 3, "level": 1},
        {"prompt": "b", "answer": "4"},
        {"prompt": [USER], "meta": {"x": [1]}},
    ],
    "reply": [{"id": "1", "prompt": "a", "completion": "b"}, {"id": 2, "prompt": "c", "completion": [REPLY]}],
    "text": [{"text": "some words"}, {"text": "more", "id": ""}, {"text": "Zürich", "meta": '{"a": 1}'}],
}
WORDS = [*OURS, "answer", "role", "content", "system", "user", "assistant", "level"]


class Around:
    """What the stage needs of its surroundings."""

    def __init__(self, stage: Files, folder: Path):
        self.key, self.folder, self.facts = key(stage), folder, dict[str, Any]()

    def output(self, port: str) -> Path:
        return self.folder

    def progress(self, *what: Any, **shown: Any) -> None: ...

    def log(self, *what: Any, **shown: Any) -> None: ...


def read(path: Path, skip: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, bad rows in words) as plan and run read them. Raises `UserError`."""
    stage = Files(name="f", path=str(path), skip_bad_rows=skip)
    stage.infer(lambda at: None)  # type: ignore[arg-type, return-value]
    around = Around(stage, path.parent)
    with redirect_stdout(io.StringIO()):
        stage.run(around)
    return read_rows(path.parent), around.facts["skipped"]["first"] if skip else []


def judged(path: Path, skip: bool = False) -> tuple[list[dict[str, Any]], list[str]] | None:
    """What `read` gives, proven to fit the columns; None for a refusal, which must be one short line with file and place."""
    try:
        rows, skipped = read(path, skip)
    except UserError as error:
        said = str(error)
        assert len(said.splitlines()) == 1, said
        assert len(said) < 1000, said
        assert str(path) in said
        assert re.search(
            r"(line|row) \d+|is empty|cannot be read as Parquet after row|is no Parquet|is UTF-16|array|all (\d+ )?rows", said
        ), said
        return None
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == rows[0].keys() <= COLUMNS.keys()
        for name, value in row.items():
            assert COLUMNS[name][0](value), (name, value)
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
    return rows, skipped


def written(rows: Any, ending: str) -> bytes:
    """Rows as a file of that ending; of values that it cannot hold, the JSON."""
    listed = rows if isinstance(rows, list) else [rows]
    if ending == ".json":
        return as_text(rows).encode("utf-8", "surrogatepass")
    if ending == ".jsonl":
        return b"".join(as_text(row).encode("utf-8", "surrogatepass") + b"\n" for row in listed)
    table = [row if isinstance(row, dict) else {"text": row} for row in listed]
    names = list(dict.fromkeys(str(name) for row in table for name in row))
    out = io.StringIO(newline="")
    sheet = csv.writer(out)
    sheet.writerows(
        [names, *([row[n] if isinstance(row.get(n), str) else as_text(row.get(n)) for n in names] for row in table)]
    )
    return out.getvalue().encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
@examples(350)
def test_changed_rows_are_refused_by_file_and_line_or_fit(tmp_path, ending, count):
    file = tmp_path / f"mine{ending}"

    @tried(count)
    @given(st.sampled_from(sorted(ROWS)), edits(WORDS), st.booleans())
    def check(which, steps, skip):
        file.write_bytes(written(edited(ROWS[which], steps), ending))
        judged(file, skip)

    check()


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
@examples(200)
def test_other_bytes_are_refused_by_file_and_line_or_fit(tmp_path, ending, count):
    file = tmp_path / f"mine{ending}"
    whole = {which: _parquet(rows) if ending == ".parquet" else written(rows, ending) for which, rows in ROWS.items()}

    @tried(count)
    @given(st.sampled_from(sorted(ROWS)), st.binary(max_size=60) | byte_edits, st.booleans())
    def check(which, how, skip):
        file.write_bytes(how if isinstance(how, bytes) else broken(whole[which], how))
        judged(file, skip)

    check()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    """Rows as a Parquet file; columns that hold several types as texts. Raises where no file can hold them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        column = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(column)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            columns[name] = pa.array([None if v is None else json.dumps(v) for v in column])
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


@examples(200)
def test_changed_parquet_rows_are_refused_by_file_and_row_or_fit(tmp_path, count):
    file = tmp_path / "mine.parquet"

    @tried(count)
    @given(st.sampled_from(sorted(ROWS)), edits(WORDS), st.booleans())
    def check(which, steps, skip):
        try:
            raw = _parquet(edited(ROWS[which], steps))
        except (ValueError, TypeError, OverflowError, AttributeError, NotImplementedError):  # not every table can be written
            return
        file.write_bytes(raw)
        judged(file, skip)

    check()


@examples(300)
def test_skipping_bad_rows_is_reading_the_file_without_them(tmp_path, count):
    file, good = tmp_path / "mine.jsonl", tmp_path / "good.jsonl"
    row = st.sampled_from(sorted(ROWS)).flatmap(lambda which: st.sampled_from(ROWS[which]))
    bent = st.tuples(row, edits(WORDS, 1)).map(lambda pair: edited(*pair))
    line = st.one_of(
        st.sampled_from(ROWS["prompt"]).map(as_text),
        bent.map(as_text),
        values(WORDS).map(as_text),
    ).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=20).map(lambda b: b.replace(b"\n", b""))

    @tried(count)
    @given(st.lists(line, min_size=1, max_size=8))
    def check(lines):
        file.write_bytes(b"\n".join(lines) + b"\n")
        found = judged(file, skip=True)
        if found is None:
            return
        rows, skipped = found
        assert len(rows) + len(skipped) == sum(bool(each.strip()) for each in file.read_bytes().split(b"\n"))
        bad = {int(re.search(r", line (\d+)", each).group(1)) for each in skipped}  # type: ignore[union-attr]
        assert len(bad) == len(skipped)
        good.write_bytes(b"".join(each + b"\n" for n, each in enumerate(lines, 1) if n not in bad))
        assert read(good)[0] == rows

    check()
