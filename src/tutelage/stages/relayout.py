"""Relayout: the same worked answers in another layout, to train a policy that says the same in other tokens.

The last message of every completion is written in ``layout`` (verify/layout.py, which also has the verifier that accepts both);
prompts, gold answers and all else stay. A policy trained on these rows is of another format, and of the same base and data.

Leaves out: documents and pairs, and a layout for each domain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from tutelage.graph import At, DataType, Kind, Stage, Type
from tutelage.spec import SpecError, UserError
from tutelage.verify.layout import ReplyLayout


class Relayout(Stage):
    """Writes the completions of ``data`` in another layout; see the module's docstring."""

    outputs: ClassVar[dict[str, Kind]] = {"relaid": "data"}
    verb: ClassVar[str] = "rewrites"

    data: At
    """Rows with ``completion``."""
    layout: ReplyLayout = ReplyLayout()

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        found = types(self.data)
        if not isinstance(found, DataType) or "completion" not in found.columns:
            raise SpecError(
                f"{self.data.of.name}.{self.data.port} has no completions; give worked answers, such as port 'gold'"
            )
        return {"relaid": found}

    def run(self, ctx: Any) -> None:
        from tutelage.text.rows import read_rows, write_tasks

        rows = read_rows(ctx.input(self.data))
        for row in rows:
            *before, last = row["completion"]
            row["completion"] = [*before, {**last, "content": self._written(row["id"], last["content"])}]
        ctx.facts["rows"] = len(rows)
        write_tasks(ctx.output("relaid"), rows)

    def _written(self, row: str, text: str) -> str:
        """Raises `UserError` for a text that could not be read back from the layout."""
        made = self.layout.wrapped(text)
        if self.layout.plain(made) != text:
            raise UserError(
                f"row {row!r} of {self.data.of.name}.{self.data.port} holds {self.layout.between!r} itself, so its layout "
                f"could not be undone; set {self.name}.layout.between to a mark that no completion has"
            )
        return made
