"""Data artifacts: a folder with ``data.parquet``, in the columns that users of TRL and `datasets` know.

    id          string                        unique in the file
    domain      string
    prompt      list<struct{role, content}>   up to and including the last user turn
    completion  list<struct{role, content}>   the reply that is trained, where there is one
    chosen      list<struct{role, content}>   of two replies the better one, in preference data
    rejected    list<struct{role, content}>   the other
    text        string                        a raw document, for pretraining
    gold        string or null                the reference final answer
    meta        string                        a JSON object; read and written here as a dict

A file holds those columns that its rows have. Every row is checked on the way in and on the way out.

Leaves out: tokens and signals, and streaming (a file is read whole).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tutelage.spec import UserError, suggest
from tutelage.types import Task

FILE = "data.parquet"
MESSAGES = ("prompt", "completion", "chosen", "rejected")
Row = dict[str, Any]


def write_tasks(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes ``path/data.parquet``. All rows must have the same columns; ``meta`` is a dict. Raises `UserError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(rows)
    file = Path(path) / FILE
    columns = [c for c in COLUMNS if not rows or c in rows[0]]
    seen: set[str] = set()
    for number, row in enumerate(rows):
        _check(file, number, row, seen)
        if row.keys() != rows[0].keys():
            raise UserError(f"{file}, row {number}: has columns {', '.join(row)}; row 0 has {', '.join(rows[0])}")
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([(c, message if c in MESSAGES else pa.string()) for c in columns])
    as_json = [{**row, "meta": json.dumps(row["meta"], sort_keys=True)} if "meta" in row else row for row in rows]
    pq.write_table(pa.Table.from_pylist(as_json, schema=schema), file)


def read_rows(folder: str | Path) -> list[Row]:
    """The rows of a Data artifact. Raises `UserError` naming the file, the row and what it needs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = Path(folder) / FILE
    if not file.is_file():
        raise UserError(f"{file} does not exist; a Data artifact is a folder that holds {FILE}")
    try:
        rows = pq.read_table(file).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if "meta" in row:
            row["meta"] = _meta(file, number, row["meta"])
        _check(file, number, row, seen)
    return rows


def read_tasks(folder: str | Path) -> list[Task]:
    """The tasks of a Data artifact, which must have ``id``, ``domain`` and ``prompt``. Raises `UserError`."""
    rows = read_rows(folder)
    missing = [c for c in ("id", "domain", "prompt") if rows and c not in rows[0]]
    if missing:
        raise UserError(f"{Path(folder) / FILE} has no column {', '.join(missing)}; tasks need id, domain and prompt")
    return [Task(r["id"], r["domain"], tuple(r["prompt"]), r.get("gold"), r.get("meta") or {}) for r in rows]


# --- what a row must be ------------------------------------------------------------------------------------------------


def _messages(last: str) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or not value:
            return False
        sound = all(isinstance(m, dict) and m.keys() == {"role", "content"} for m in value)
        return sound and all(isinstance(t, str) for m in value for t in m.values()) and value[-1]["role"] == last

    return fits


COLUMNS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda v: isinstance(v, str) and bool(v), "a text that no other row has"),
    "domain": (lambda v: isinstance(v, str) and bool(v), "the name of its domain"),
    "prompt": (_messages("user"), "a list of messages {role, content} that ends with the user's"),
    "completion": (_messages("assistant"), "a list of messages {role, content} that ends with the assistant's"),
    "chosen": (_messages("assistant"), "a list of messages {role, content} that ends with the assistant's"),
    "rejected": (_messages("assistant"), "a list of messages {role, content} that ends with the assistant's"),
    "text": (lambda v: isinstance(v, str) and bool(v), "a document"),
    "gold": (lambda v: v is None or isinstance(v, str), "a text, or null where only a verifier knows"),
    "meta": (lambda v: isinstance(v, dict), "a JSON object"),
}
"""column -> (does a value fit, what is needed)"""


def _check(file: Path, number: int, row: Row, seen: set[str]) -> None:
    for name, value in row.items():
        if name not in COLUMNS:
            raise UserError(f"{file}, row {number}: unknown column {name!r}{suggest(name, COLUMNS)}")
        fits, needed = COLUMNS[name]
        if not fits(value) or (name == "id" and value in seen):
            raise UserError(f"{file}, row {number}: {name} must be {needed}; got {str(value)[:80]!r}")
    if "id" in row:
        seen.add(row["id"])


def _meta(file: Path, number: int, text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise UserError(f"{file}, row {number}: meta must be a JSON object; got {str(text)[:80]!r}") from None
