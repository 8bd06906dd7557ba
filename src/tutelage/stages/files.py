"""Files: a user's own data (text/files.py says in which shapes) as a dataset that every other stage takes.

Without ``splits`` all rows go to the port ``data``. With them, such as ``{"train": 85, "dev": 5, "heldout": 10}``, each
split is a port of its own, so that one file is enough for a whole recipe. A row's split is decided by a hash of what its
user turns say (of its text, where it has no prompt), capitals and white space aside: never by its place or its id. So
a question that comes twice lies in one split, and stays there when rows are added. Shares are of questions, and rough.

Rows are mixed, so that any first rows are a fair sample. The plan reads the first row, and where the rows name their
domains that column; every row is checked when the stage runs.

Leaves out: likeness beyond equal words, and streaming (files are read whole).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from tutelage.graph import At, DataType, Kind, Stage, Type
from tutelage.spec import SpecError, UserError, canonical, digest, outside, suggest
from tutelage.text.files import OURS, BadRow, Shape, conform, data_files, records, shape_of

QUOTED = 10
"""How many skipped rows are kept in words."""


class Files(Stage):
    """Reads ``path``, a file or a folder of ``.jsonl``, ``.json``, ``.csv`` or ``.parquet``; keyed by its content."""

    verb: ClassVar[str] = "reads"
    version: ClassVar[int] = 2

    path: str = outside()
    columns: dict[str, str] = {}
    """The file's name of a column -> ours, such as ``{"question": "prompt"}``; an empty text drops the column."""
    domain: str = Field("data", min_length=1)
    """Of rows that name none."""
    splits: dict[str, int] = {}
    """port -> percent of the questions; must sum to 100"""
    skip_bad_rows: bool = False
    """Leave bad rows out and count them, instead of ending at the first."""

    @property
    def outputs(self) -> dict[str, Kind]:  # type: ignore[override]
        """``data``, or a port for each split."""
        return dict.fromkeys(sorted(self.splits) or ("data",), "data")

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        given = [ours for ours in columns.values() if ours]
        for ours in given:
            if ours not in OURS:
                raise ValueError(f"no column {ours!r}{suggest(ours, OURS)}")
            if given.count(ours) > 1:
                raise ValueError(f"two columns become {ours!r}; choose one")
        return columns

    @field_validator("splits")
    @classmethod
    def _whole(cls, splits: dict[str, int]) -> dict[str, int]:
        for name, share in splits.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ValueError(f"{name!r} cannot name a port; take letters, digits, - and _")
            if share < 1:
                raise ValueError(f"split {name!r} has {share} percent; give it 1 or more, or leave it out")
        if splits and sum(splits.values()) != 100:
            raise ValueError(f"the shares sum to {sum(splits.values())}; they are percents, and must sum to 100")
        return splits

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        try:
            shape, domains, rows = self._peek()
        except BadRow as bad:
            raise SpecError(_hint(bad)) from None
        return dict.fromkeys(self.outputs, DataType(shape.columns, domains, rows))

    def _peek(self) -> tuple[Shape, tuple[str, ...], int]:
        """Columns, domains and a bound on the rows (0 where they were not all read)."""
        found = self._parsed([])
        where, first = next(found)
        shape = shape_of(where, first, self.columns)
        if not self.skip_bad_rows:
            conform(where, first, shape, self.domain)
        name = shape.theirs.get("domain")
        if name is None:
            return shape, (self.domain,), 0
        named = [first.get(name), *(record.get(name) for _, record in found)]
        domains = {self.domain if d is None else d for d in named if d is None or isinstance(d, str)}
        return shape, tuple(sorted(domains)), len(named)

    def _parsed(self, skipped: list[BadRow]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, record) of every row that parses; those that do not are added to ``skipped``. Raises `BadRow`."""
        any_row = False
        for file in data_files(Path(self.path)):
            for where, found in records(file):
                if isinstance(found, BadRow):
                    if not self.skip_bad_rows:
                        raise found
                    skipped.append(found)
                else:
                    any_row = True
                    yield where, found
        if not any_row:
            raise UserError(f"all {len(skipped)} rows are bad; the first: {skipped[0].says}")

    def run(self, ctx: Any) -> None:
        from tutelage.text.rows import write_tasks

        skipped: list[BadRow] = []
        domains: set[str] = set()
        try:
            rows = self._rows(ctx, skipped, domains)
        except BadRow as bad:
            raise UserError(_hint(bad)) from None
        need_unchanged(self, ctx)
        if not rows:
            raise UserError(f"all {len(skipped)} rows are bad; the first: {skipped[0].says}")
        parts: dict[str, list[dict[str, Any]]] = {port: [] for port in self.outputs}
        for row in sorted(rows, key=lambda row: _hash(f"order {row['id']}")):
            parts[self._split(row)].append(row)
        self._check_parts(parts, domains)
        ctx.facts["rows"] = {port: dict(Counter(row["domain"] for row in part)) for port, part in parts.items()}
        if self.skip_bad_rows:
            first, of = [bad.says for bad in skipped[:QUOTED]], len(rows) + len(skipped)
            reasons = dict(sorted(Counter(bad.reason for bad in skipped).items()))
            ctx.facts["skipped"] = {"rows": len(skipped), "of": of, "reasons": reasons, "first": first}
            print(f"skipped {len(skipped)} of {of} rows", *first, sep="\n")
        ctx.log(1, rows=len(rows), skipped=len(skipped))
        for port, part in parts.items():
            write_tasks(ctx.output(port), part)

    def _rows(self, ctx: Any, skipped: list[BadRow], domains: set[str]) -> list[dict[str, Any]]:
        """All rows, checked, with different ids; bad ones are added to ``skipped``. Raises `BadRow`.

        ``domains`` receives those that any row names, bad ones too: the plan has promised them.
        """
        rows: list[dict[str, Any]] = []
        shape, seen, made = None, dict[str, str](), Counter[str]()
        for where, record in self._parsed(skipped):
            shape = shape or shape_of(where, record, self.columns)
            named = record.get(shape.theirs.get("domain", ""), self.domain)
            domains |= {named} if isinstance(named, str) else set()
            try:
                row = conform(where, record, shape, self.domain)
                if record.get(shape.theirs.get("id", "")) in (None, ""):
                    made[row["id"]] += 1  # a row that comes again is another row with the same words
                    row["id"] += f"-{made[row['id']] - 1}" if made[row["id"]] > 1 else ""
                if row["id"] in seen:
                    name = shape.theirs.get("id", "id")
                    raise BadRow(name, f"{where}: {name} {row['id']!r} stands at {seen[row['id']]} already; ids must differ")
            except BadRow as bad:
                if not self.skip_bad_rows:
                    raise
                skipped.append(bad)
                continue
            seen[row["id"]] = where
            rows.append(row)
            if len(rows) % 10000 == 0:
                ctx.progress(0, 1, rows=len(rows))
        return rows

    def _split(self, row: dict[str, Any]) -> str:
        if not self.splits:
            return "data"
        said = " ".join(m["content"] for m in row["prompt"] if m["role"] == "user") if "prompt" in row else row["text"]
        point = _hash(f"split {' '.join(said.casefold().split())}") % 100
        for name in sorted(self.splits):
            point -= self.splits[name]
            if point < 0:
                return name
        raise AssertionError("the shares do not sum to 100")

    def _check_parts(self, parts: dict[str, list[dict[str, Any]]], domains: set[str]) -> None:
        """Raises `UserError` for a split that has nothing of a domain."""
        counts = Counter(row["domain"] for part in parts.values() for row in part)
        for port, part in parts.items():
            for domain in sorted(domains - {row["domain"] for row in part}):
                if not counts[domain]:
                    raise UserError(f"{self.path}: all rows of domain {domain!r} are bad; mend them, or take them out")
                raise UserError(
                    f"{self.path}: none of the {counts[domain]} rows of domain {domain!r} fell into split {port!r}; "
                    f"give more rows, a larger share to {self.name}.splits, or a file for each split"
                )


def need_unchanged(stage: Stage, ctx: Any) -> None:
    """Raises `UserError` where what a stage has read is not what its key speaks of. For stages that take no inputs."""
    if digest(canonical(stage, lambda spec: None)) != ctx.key:
        raise UserError(f"{getattr(stage, 'path', '')} changed while the run was going on; run the same command again")


def _hint(bad: BadRow) -> str:
    return f"{bad.says} (--skip-bad-rows leaves bad rows out and counts them)"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
