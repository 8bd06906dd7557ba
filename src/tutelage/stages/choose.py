"""Choose: the tasks of a pool whose pass rate lies in a band, and as many drawn at random, for the control.

    kept  ⇔  low ≤ pass_rate ≤ high

A task that a policy never solves, or always, gives a group of equal rewards, and so no gradient. The band is applied in
each domain by itself. What a selection is worth only shows against the same number of tasks chosen by chance: port
``control`` holds, for each domain, as many tasks of the same pool, drawn without replacement and blind to the rates. Port
``why`` lists every task of the pool with its rate and what became of it.

    id  string    domain  string    rate  double or null    count  int64    kept  bool    why  string

Leaves out: choosing by anything but the rate, and choosing as the policy learns (``resample`` and ``curriculum`` of
`Online`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from tutelage.graph import At, DataType, Kind, Stage, Type
from tutelage.spec import SpecError, UserError
from tutelage.stages.passrate import COUNT, RATE, need_rates

Row = dict[str, Any]
COLUMNS = {"id": "string", "domain": "string", "rate": "float64", "count": "int64", "kept": "bool", "why": "string"}
REASONS = ("in the band", "too hard", "too easy", "not measured")


class Choose(Stage):
    """Keeps the tasks with ``low ≤ pass_rate ≤ high``; see the module's docstring."""

    outputs: ClassVar[dict[str, Kind]] = {"chosen": "data", "control": "data", "why": "data"}
    verb: ClassVar[str] = "chooses"

    tasks: At
    """Tasks with pass rates, from a PassRate stage."""
    low: float = Field(0.01, ge=0, le=1)
    high: float = Field(0.99, ge=0, le=1)
    """The defaults drop what always gave the same outcome (up to 100 replies a task), as DAPO does as it samples."""
    bands: dict[str, tuple[float, float]] = {}
    """domain -> its own (low, high)"""
    seed: int = Field(0, ge=0)
    """of the control's draw"""

    @field_validator("bands")
    @classmethod
    def _are_bands(cls, bands: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for domain, (low, high) in bands.items():
            if not 0 <= low <= high <= 1:
                raise ValueError(f"the band of {domain!r} is [{low}, {high}]; it must rise within [0, 1]")
        return bands

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        found = need_rates(types, self.tasks)
        if self.low > self.high:
            raise SpecError(f"low {self.low} lies above high {self.high}; no rate can be in that band")
        for domain in self.bands:
            if domain not in found.domains:
                raise SpecError(f"bands names domain {domain!r}, which the tasks lack; they have {', '.join(found.domains)}")
        return {"chosen": found, "control": found, "why": DataType(tuple(COLUMNS), found.domains, found.rows)}

    def run(self, ctx: Any) -> None:
        from tutelage.text.rows import read_rows, write_tasks

        pool = read_rows(ctx.input(self.tasks))
        why = [self._why(row) for row in pool]
        chosen = [row for row, reason in zip(pool, why, strict=True) if reason == REASONS[0]]
        counts = self._counts(pool, why)
        control = matched(pool, chosen, self.seed)
        both = Counter(row["domain"] for row in control if row["id"] in {c["id"] for c in chosen})
        for domain, found in counts.items():
            found["control_in_band"] = both[domain]
        ctx.facts["chosen"] = counts
        ctx.log(1, pool=len(pool), kept=len(chosen))
        write_tasks(ctx.output("chosen"), chosen)
        write_tasks(ctx.output("control"), control)
        _write_why(ctx.output("why"), pool, why)

    def _band(self, domain: str) -> tuple[float, float]:
        return self.bands.get(domain, (self.low, self.high))

    def _why(self, row: Row) -> str:
        (low, high), rate = self._band(row["domain"]), row["meta"].get(RATE)
        if rate is None:
            return REASONS[3]
        return REASONS[1] if rate < low else REASONS[2] if rate > high else REASONS[0]

    def _counts(self, pool: Sequence[Row], why: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What became of each domain's tasks. Raises `UserError` for one of which nothing is left."""
        found: dict[str, dict[str, Any]] = {}
        for domain in sorted({row["domain"] for row in pool}):
            of = Counter(reason for row, reason in zip(pool, why, strict=True) if row["domain"] == domain)
            low, high = self._band(domain)
            if not of[REASONS[0]]:
                rest = ", ".join(f"{of[reason]} {reason}" for reason in REASONS[1:] if of[reason])
                raise UserError(
                    f"no task of domain {domain!r} has a pass rate in [{low}, {high}] ({rest}); widen the band, or "
                    f"measure with another policy"
                )
            found[domain] = {"band": [low, high], "pool": of.total(), **{reason: of[reason] for reason in REASONS}}
        return found


def matched(pool: Sequence[Row], chosen: Sequence[Row], seed: int) -> list[Row]:
    """As many rows of each domain as ``chosen`` has, drawn from ``pool`` without replacement; in the pool's order."""
    from random import Random

    wanted = Counter(row["domain"] for row in chosen)
    taken: set[str] = set()
    for domain, count in sorted(wanted.items()):
        ids = [row["id"] for row in pool if row["domain"] == domain]
        taken.update(Random(f"control {seed} {domain}").sample(ids, count))
    return [row for row in pool if row["id"] in taken]


def _write_why(folder: Path, pool: Sequence[Row], why: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": row["id"], "domain": row["domain"], "rate": row["meta"].get(RATE), "count": row["meta"].get(COUNT, 0)}
        | {"kept": reason == REASONS[0], "why": reason}
        for row, reason in zip(pool, why, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(COLUMNS.items()))), folder / "data.parquet")
