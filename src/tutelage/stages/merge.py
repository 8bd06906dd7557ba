"""Merge: an adapter's product added to the weights that it stands on, published as an ordinary whole model.

Leaves out: averages of several models' weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from tutelage.graph import At, Kind, Stage, Type
from tutelage.spec import SpecError
from tutelage.stages.evaluate import need_model


class Merge(Stage):
    """The whole model that an adapter and its base are; peft's ``merge_and_unload``."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "merges"
    holds_models: ClassVar[bool] = True

    model: At

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        model = need_model(types, self.model)
        if not model.adapter:
            raise SpecError(f"model {self.model.of.name}.{self.model.port} is whole weights already; leave the merge out")
        return {"policy": replace(model, adapter=False, base_key="", checkpoints=())}

    def run(self, ctx: Any) -> None:
        from tutelage.model.adapter import merged
        from tutelage.model.folder import load_tokenizer, save_model

        folder = ctx.input(self.model)
        save_model(merged(folder), load_tokenizer(folder), ctx.output("policy"))
