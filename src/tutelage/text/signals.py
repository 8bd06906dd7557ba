"""Signals stored beside data: ``signals.parquet``, one row for each row of ``data.parquet``, in its order.

    tokens      list<int32>     the ids that were scored: what reads the signals must have made the same
    index       list<int32>     the positions that the signals speak of
    NAME        list<...>       a signal's values, row-major; the shape behind the positions stands in the file's metadata

Leaves out: streaming (a file is read whole), signals of samples that come from no dataset.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tutelage.spec import UserError
from tutelage.types import Sample, Signal

FILE = "signals.parquet"
ABOUT = b"tutelage"
"""The metadata's key: name -> {"shape": [...], "provenance": {...}}."""


def write_signals(folder: str | Path, samples: Sequence[Sample], names: Sequence[str]) -> None:
    """Writes the named signals of all samples."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "tokens": [s.tokens.astype(np.int32) for s in samples],
        "index": [s.trained.astype(np.int32) for s in samples],
    }
    about = {}
    for name in names:
        signals = [s.signals[name] for s in samples]
        columns[name] = [signal.values.ravel() for signal in signals]
        about[name] = {"shape": signals[0].values.shape[1:], "provenance": signals[0].provenance} if signals else {"shape": []}
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    pq.write_table(table.replace_schema_metadata({ABOUT: json.dumps(about)}), Path(folder) / FILE)


def read_signals(folder: str | Path, samples: Sequence[Sample], names: Collection[str]) -> None:
    """Puts the named signals onto samples made of the folder's rows. Raises `UserError` where they speak of other tokens."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = Path(folder) / FILE
    try:
        table = pq.read_table(file)
        about = json.loads((table.schema.metadata or {})[ABOUT])
        columns = {name: table[name] for name in ("tokens", "index", *names)}
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        says = f"{file} does not hold {', '.join(sorted(names))} ({' '.join(str(error).split())[:200]})"
        raise UserError(f"{says}; score the data after the last stage that chooses rows, with TeacherScores") from None
    if table.num_rows != len(samples):
        raise UserError(f"{file} has {table.num_rows} rows, but the data beside it {len(samples)}; score the data again")
    for number, sample in enumerate(samples):
        row = {name: column[number].values.to_numpy(zero_copy_only=False) for name, column in columns.items()}
        if not (np.array_equal(row["tokens"], sample.tokens) and np.array_equal(row["index"], sample.trained)):
            raise UserError(
                f"{file}, row {number}: other tokens were scored than are trained on; give the training stage the template "
                "that the scoring stage had"
            )
        for name in names:
            values = row[name].reshape(len(sample.trained), *about[name]["shape"])
            sample.signals[name] = Signal(values, sample.trained, about[name]["provenance"])
