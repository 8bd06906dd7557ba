"""RemoteTeacher: a model that a server holds, as a teacher (learn/remote.py says what it is asked).

Its artifact is an address: ``remote.json``, with the tokenizer and chat template of ``reference``, which the served model must
share; the ids in the server's answers are held to those that were sent. It is keyed by the model's name and not by its address.
What a server answers is not reproducible in the sense of this project: nothing tells when it serves other weights.

Leaves out: starting a server, keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from tutelage.graph import At, Kind, Stage, Type
from tutelage.spec import unkeyed
from tutelage.stages.evaluate import need_model


class RemoteTeacher(Stage):
    """A served model; may be a teacher of `Online` or `TeacherScores`, by ``logp`` or ``topk``."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "names"

    served: str = Field(min_length=1)
    """The model's name at the server."""
    reference: At
    """A model with the served one's tokenizer and chat template, such as the student's start."""
    params: int = Field(ge=1)
    """Matmul parameters of the served model, for the ledgers of compute."""
    url: str = unkeyed(pattern=r"^https?://")
    """The API's root, such as http://localhost:8000/v1"""
    timeout: float = unkeyed(120.0, gt=0)
    """seconds for an answer"""
    retries: int = unkeyed(4, ge=0)
    """further tries where the server is down, busy or late"""

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        like = need_model(types, self.reference)
        return {"policy": replace(like, head="remote", params=self.params, checkpoints=(), adapter=False, base_key="")}

    def run(self, ctx: Any) -> None:
        from tutelage.learn.remote import Remote
        from tutelage.model.folder import load_tokenizer

        tokenizer = load_tokenizer(ctx.input(self.reference))
        remote = Remote(self.url, self.served, self.params, self.timeout, self.retries)
        remote.logprobs([tokenizer.eos_token_id] * 2, 1)  # a wrong name or server shows before anything is trained
        folder = ctx.output("policy")
        tokenizer.save_pretrained(folder)
        remote.save(folder)
