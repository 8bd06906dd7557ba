"""Scores artifacts: a folder with ``scores.parquet``, one row a reply, and ``summary.json``.

    task    string          the task's id
    value   double          what the verifier gave; 0 where it failed
    error   string or null  why the verifier failed
    reply   string
    tokens  int64           of the reply
    level   int64           the task's difficulty

The summary is ``{"domain", "n", "errors", "mean"}``; a reply that could not be verified counts as 0 in the mean.

Leaves out: what the numbers mean (report/stats.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tutelage.spec import UserError

COLUMNS = {"task": "string", "value": "float64", "error": "string", "reply": "string", "tokens": "int64", "level": "int64"}


def write_scores(folder: str | Path, domain: str, rows: Iterable[dict[str, Any]]) -> None:
    """Writes ``scores.parquet`` and ``summary.json`` into ``folder``. Raises `UserError` for a row that does not fit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(rows)
    file = Path(folder) / "scores.parquet"
    for number, row in enumerate(rows):
        if row.keys() != COLUMNS.keys():
            raise UserError(f"{file}, row {number}: has columns {', '.join(row)}; scores have {', '.join(COLUMNS)}")
    try:
        table = pa.Table.from_pylist(rows, schema=pa.schema(list(COLUMNS.items())))
    except pa.ArrowException as error:
        types = ", ".join(f"{n} {t}" for n, t in COLUMNS.items())
        raise UserError(f"{file}: a row does not fit ({error}); scores have {types}") from None
    pq.write_table(table, file)
    errors = sum(row["error"] is not None for row in rows)
    mean = sum(row["value"] for row in rows) / max(len(rows), 1)
    summary = {"domain": domain, "n": len(rows), "errors": errors, "mean": mean}
    (Path(folder) / "summary.json").write_text(json.dumps(summary) + "\n", "utf-8")


def read_scores(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary, rows) of a Scores artifact. Raises `UserError` where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        return summary, pq.read_table(folder / "scores.parquet").to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{folder} is no Scores artifact (scores.parquet and summary.json): {error}") from None
