"""Evaluate: one checkpoint in one domain, on tasks it has never been trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field

from tutelage.envs.base import Env
from tutelage.graph import At, DataType, Kind, ModelType, ScoresType, Stage, Type
from tutelage.rollout.base import Sampling
from tutelage.spec import SpecError, suggest
from tutelage.text.template import Chat, Template
from tutelage.types import Sample

PROMPT_GUESS = 24
"""Tokens of an average prompt, for estimates."""
REPLY_GUESS = 0.25
"""Share of ``max_new_tokens`` that an average reply is assumed to take, for estimates."""


def tokens_guess(samples: float, sampling: Sampling) -> float:
    """Tokens of so many samples, prompts and replies, roughly."""
    return samples * (PROMPT_GUESS + sampling.max_new_tokens * REPLY_GUESS)


def need_domain(types: Callable[[At], Type], tasks: At, domain: str) -> DataType:
    """The type of a dataset that must hold a domain. Raises `SpecError` naming those it holds."""
    found = types(tasks)
    if not isinstance(found, DataType) or "prompt" not in found.columns:
        raise SpecError(f"{tasks.of.name}.{tasks.port} holds no prompts; give a dataset with a prompt column")
    if domain not in found.domains:
        raise SpecError(f"{tasks.of.name}.{tasks.port} has no domain {domain!r}{suggest(domain, found.domains)}")
    return found


TEACHING = ("causal", "remote")
"""Heads of models that may teach."""


def need_model(types: Callable[[At], Type], model: At, heads: tuple[str, ...] = ("causal",)) -> ModelType:
    """The type of a model edge. Raises `SpecError` where it is none, or one with another head."""
    found = types(model)
    if not isinstance(found, ModelType):
        raise SpecError(f"{model.of.name}.{model.port} is no model")
    if found.head not in heads:
        raise SpecError(f"{model.of.name}.{model.port} is a {found.head} model, which draws no tokens; give a policy")
    return found


def need_same_ids(
    who: str, at: At, types: Callable[[At], Type], model: ModelType, heads: tuple[str, ...] = ("causal",)
) -> ModelType:
    """The type of a model that scores what ``model`` reads or writes. Raises `SpecError` where the two see other ids."""
    asked = need_model(types, at, heads)
    for what, mine, other in (
        ("tokenizer", model.tokenizer_key, asked.tokenizer_key),
        ("chat template", model.template_key, asked.template_key),
    ):
        if mine != other:
            raise SpecError(
                f"{who}, {at.of.name!r}, has another {what} ({other[:8]}) than the student "
                f"({mine[:8]}): both must see the same ids; give both the same tokenizer and template"
            )
    return asked


def _row(sample: Sample) -> dict[str, Any]:
    task, score = sample.task, sample.score
    assert task is not None
    assert score is not None
    facts = {"task": task.id, "value": score.value, "error": score.error, "reply": sample.text}
    return {**facts, "tokens": int(sample.mask.sum()), "level": task.meta.get("level", 0)}


class Evaluate(Stage):
    """Samples (greedily by default) on the domain's tasks and stores every reply with its score."""

    outputs: ClassVar[dict[str, Kind]] = {"scores": "scores"}
    verb: ClassVar[str] = "scores"
    on_device: ClassVar[bool] = True
    version: ClassVar[int] = 4

    model: At
    tasks: At
    domain: str
    env: Env
    limit: int = Field(500, ge=1)
    """The first tasks of the domain, in the dataset's order."""
    template: Template = Chat()
    sampling: Sampling = Sampling(temperature=0.0)
    seed: int = 0
    slots: int = Field(256, ge=1, json_schema_extra={"unkeyed": True})

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        need_model(types, self.model)
        need_domain(types, self.tasks, self.domain)
        return {"scores": ScoresType(self.domain)}

    def estimate(self, types: Callable[[At], Type]) -> float:
        tokens = tokens_guess(self.limit, self.sampling)
        return 2.0 * need_model(types, self.model).params * tokens

    def run(self, ctx: Any) -> None:
        from tutelage.rollout.policy import Policy
        from tutelage.text.rows import read_tasks
        from tutelage.text.scores import write_scores

        tasks = [t for t in read_tasks(ctx.input(self.tasks)) if t.domain == self.domain][: self.limit]
        policy = Policy(ctx.input(self.model), self.slots, device=ctx.device)
        driver = policy.driver(self.template, self.env, self.sampling)
        rows, part = [], max(self.slots, 1) * 2
        for start in range(0, len(tasks), part):
            for sample in driver.collect(tasks[start : start + part], 1, self.seed):
                rows.append(_row(sample))
            mean = sum(r["value"] for r in rows) / len(rows)
            ctx.progress(len(rows), len(tasks), accuracy=mean)
        policy.charge(ctx.cost)
        write_scores(ctx.output("scores"), self.domain, rows)
