"""A reply's layout, what writes it otherwise, and `EitherLayout`, the verifier that accepts a reply in either.

Two policies that answer alike in different layouts are strangers to each other token by token. Studies of teachers that write
otherwise than their student need rewards that do not care which of the two was written.

Leaves out: more than two layouts, and layouts that one pair of marks and a separator cannot say.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from tutelage.spec import Spec
from tutelage.types import Score, Task
from tutelage.verify.base import Verifier


class ReplyLayout(Spec):
    """``17 30 41`` -> ``<17|30|41>``: marks around a reply, and another separator for its spaces."""

    opens: str = Field("<", min_length=1)
    between: str = Field("|", min_length=1)
    closes: str = Field(">", min_length=1)

    @model_validator(mode="after")
    def _can_be_undone(self) -> ReplyLayout:
        if any(" " in part for part in (self.opens, self.between, self.closes)):
            raise ValueError("a space in opens, between or closes could not be told from those of a reply; use another mark")
        return self

    def wrapped(self, text: str) -> str:
        """A plain text in this layout."""
        return f"{self.opens}{text.replace(' ', self.between)}{self.closes}"

    def plain(self, text: str) -> str:
        """`wrapped`, undone; a text that is not wrapped whole comes back as it is."""
        body = text.strip()
        if len(body) < len(self.opens) + len(self.closes) or not (body.startswith(self.opens) and body.endswith(self.closes)):
            return text
        body = body[len(self.opens) : len(body) - len(self.closes)]
        return text if " " in body else body.replace(self.between, " ")


class EitherLayout(Verifier):
    """What ``verifier`` says of a reply, once a reply in ``layout`` has been read as a plain one."""

    verifier: Verifier
    layout: ReplyLayout = ReplyLayout()

    async def __call__(self, task: Task, reply: str, ctx: Any = None) -> Score:
        return await self.verifier(task, self.layout.plain(reply), ctx)
