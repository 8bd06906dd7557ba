"""Averages of weights: consolidation without training. Adapters are merged into whole weights first (merge.py).

    `Average`          θ = Σ_i w_i θ_i / Σ_i w_i                     model soups (arXiv 2203.05482)
    `TaskArithmetic`   θ = θ_0 + λ Σ_i (θ_i − θ_0)                   (arXiv 2212.04089, section 2)

With n models from one θ_0, λ = 1/n is the plain average. Sums are taken in float64, tensor by tensor, and rounded once to the
tensor's own type. Nothing is trained, so neither is on any ledger of FLOPs; choosing w or λ on a development split is
(best.py).

Leaves out: trimming and electing signs (TIES), dropping at random (DARE), Fisher weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from tutelage.graph import At, Kind, ModelType, Stage, Type
from tutelage.spec import SpecError, UserError
from tutelage.stages.evaluate import need_model


class Average(Stage):
    """The weighted mean of models' weights."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "averages"
    holds_models: ClassVar[bool] = True

    models: tuple[At, ...] = Field(min_length=1)
    weights: tuple[float, ...] = ()
    """of each model, in any unit; empty weighs them alike"""

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        if self.weights and len(self.weights) != len(self.models):
            raise SpecError(f"weights has {len(self.weights)} numbers for {len(self.models)} models; give each model its own")
        if self.weights and sum(self.weights) <= 0:
            raise SpecError(f"weights add up to {sum(self.weights):g}; their sum must be positive")
        return {"policy": _same(types, self.models)}

    def run(self, ctx: Any) -> None:
        weights = self.weights or (1.0,) * len(self.models)
        shares = [w / sum(weights) for w in weights]
        _publish(ctx, [ctx.input(at) for at in self.models], shares)


class TaskArithmetic(Stage):
    """A base plus ``scale`` times the sum of the task vectors of ``models``, which were trained from it."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "adds task vectors"
    holds_models: ClassVar[bool] = True

    base: At
    models: tuple[At, ...] = Field(min_length=1)
    scale: float
    """λ"""

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        return {"policy": _same(types, (self.base, *self.models))}

    def run(self, ctx: Any) -> None:
        folders = [ctx.input(at) for at in (self.base, *self.models)]
        _publish(ctx, folders, [1 - self.scale * len(self.models), *(self.scale for _ in self.models)])


def _same(types: Callable[[At], Type], models: Sequence[At]) -> ModelType:
    """The type that all the models have. Raises `SpecError` where they cannot be added."""
    found = [replace(need_model(types, at), checkpoints=()) for at in models]
    for at, model in zip(models, found, strict=True):
        name = f"{at.of.name}.{at.port}"
        if model.adapter:
            raise SpecError(f"{name} is an adapter; put a Merge stage between, and average whole weights")
        if model != found[0]:
            first = f"{models[0].of.name}.{models[0].port}"
            raise SpecError(
                f"{name} and {first} differ in architecture, size, tokenizer or template; their weights do not add up"
            )
    return found[0]


def _publish(ctx: Any, folders: Sequence[Path], factors: Sequence[float]) -> None:
    from tutelage.model.folder import load_model, load_tokenizer, save_model

    made = load_model(folders[0])
    made.load_state_dict(combined([made, *map(load_model, folders[1:])], factors))
    save_model(made, load_tokenizer(folders[0]), ctx.output("policy"))


def combined(models: Sequence[Any], factors: Sequence[float]) -> dict[str, Any]:
    """Σ_i factors_i θ_i, tensor by tensor; what is no floating-point number is the first model's. Raises `UserError`."""
    states = [m.state_dict() for m in models]
    found = {}
    for name, first in states[0].items():
        parts = [s.get(name) for s in states]
        if any(p is None or p.shape != first.shape for p in parts):
            raise UserError(f"tensor {name!r} has not the same shape in all models; average models of one architecture")
        if first.is_floating_point():
            found[name] = sum(f * p.double() for f, p in zip(factors, parts, strict=True)).to(first.dtype)
        else:
            found[name] = first
    return found
