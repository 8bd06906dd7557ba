"""Fit: the offline loop. Batches come from a dataset: pretraining on documents, SFT on worked answers, DPO on pairs.

With a `Selection` it measures itself on development tasks as it goes, keeps its best checkpoint and stops where nothing
improves any more. With a ``budget`` it trains until it has spent what the named stages spent (budget.py), so that a control
is given exactly the compute of what it is compared with.

A loss over pairs reads ``prompt``, ``chosen``, ``rejected`` rows, and a batch is then of so many pairs (preference.py).

Leaves out: mixtures of datasets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from tutelage.envs.base import Env
from tutelage.graph import At, DataType, Kind, ModelType, Stage, Type, key
from tutelage.learn.optim import AdamW, Muon, Schedule
from tutelage.losses.base import Loss
from tutelage.losses.nll import NLL
from tutelage.model.lora import Adapter
from tutelage.rollout.base import Sampling
from tutelage.spec import Spec, SpecError, UserError
from tutelage.stages.budget import Budget, foreseen
from tutelage.stages.evaluate import need_domain, need_model, need_same_ids
from tutelage.text.template import Chat, Document, Template
from tutelage.types import Sample

TOKENS_GUESS = 40
"""Tokens of an average row, for estimates."""


class Selection(Spec):
    """Choose the checkpoint by greedy accuracy on development tasks, the mean over domains."""

    tasks: At
    env: Env
    every: int = Field(20, ge=1)
    """steps between trials"""
    limit: int = Field(64, ge=1)
    """tasks a domain"""
    patience: int = Field(0, ge=0)
    """Stop after so many trials without a new best; 0 goes on to the end."""
    template: Template = Chat()
    sampling: Sampling = Sampling(temperature=0.0)


class Fit(Stage):
    """Trains ``model`` on ``data``; see the module's docstring."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "trains"
    on_device: ClassVar[bool] = True
    version: ClassVar[int] = 4

    model: At
    data: At
    template: Template = Chat()
    """`Chat` trains the replies of ``prompt``/``completion`` rows, `Document` the whole ``text``."""
    loss: Loss = NLL()
    reference: At | None = None
    """The policy that a preference loss is measured against, usually the one that ``model`` is."""
    adapter: Adapter | None = None
    """What is trained in place of all weights."""
    optimizer: AdamW | Muon = AdamW()
    schedule: Schedule = Schedule()
    clip: float = Field(1.0, ge=0)
    """bound on the gradient's norm; 0 does not bound it"""
    steps: int = Field(100, ge=1)
    rows: int = Field(64, ge=1)
    """the global batch; with a loss over pairs, pairs"""
    budget: Budget | None = None
    """Compute that bounds this stage; ``steps`` bounds it still."""
    select: Selection | None = None
    checkpoints: tuple[int, ...] = ()
    """Steps kept as a series that edges may name."""
    seed: int = Field(0, ge=0)
    dtype: str = Field("float32", pattern="^(float32|bfloat16)$")
    micro_tokens: int = Field(8192, ge=1, json_schema_extra={"unkeyed": True})

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        model, data = need_model(types, self.model), need_examples(types, self.data, self.template, self.loss)
        need_reference(types, self.reference, model, self.loss)
        if self.select:
            for domain in getattr(types(self.select.tasks), "domains", ("",)):
                need_domain(types, self.select.tasks, domain)
        need_series(self.checkpoints, self.steps, ends_early=bool(self.budget or (self.select and self.select.patience)))
        missing = self.loss.needs() - set(data.signals) - {"ref_logp"}
        if missing:
            raise SpecError(f"loss {self.loss.kind()} needs signals that the data lacks: {', '.join(sorted(missing))}")
        if self.loss.needs() - {"ref_logp"} and data.tokenizer_key != model.tokenizer_key:
            raise SpecError(
                f"{self.data.of.name}.{self.data.port} was scored with another tokenizer ({data.tokenizer_key[:8]}) than "
                f"{self.model.of.name} has ({model.tokenizer_key[:8]}); student and teacher must see the same ids"
            )
        if self.budget:
            self.budget.check(types)
        from dataclasses import replace

        trained = trained_type(model, self.model, self.adapter, self.optimizer)
        return {"policy": replace(trained, checkpoints=self.checkpoints)}

    def estimate(self, types: Callable[[At], Type]) -> float:
        if self.budget:
            return self.budget.estimate(types)
        tokens = float(self.steps * self.rows * TOKENS_GUESS * (2 if self.loss.per == "pairs" else 1))
        asked = 2.0 * need_model(types, self.reference).params if self.reference else 0.0
        return tokens * ((4.0 if self.adapter else 6.0) * need_model(types, self.model).params + asked)

    def run(self, ctx: Any) -> None:
        _Fitting(self, ctx).run()


def trained_type(model: ModelType, at: At, adapter: Adapter | None, optimizer: AdamW | Muon) -> ModelType:
    """What training makes of the model of an edge. Raises `SpecError` where model, adapter and optimizer do not fit."""
    name = f"{at.of.name}.{at.port}"
    if model.adapter and not (adapter and adapter.over):
        raise SpecError(
            f"model {name} is an adapter; set adapter to Continue (trains it further) or Stack (a new one over it), or take "
            "the model of a Merge stage (whole weights)"
        )
    if not adapter:
        return model
    if adapter.over and not model.adapter:
        raise SpecError(f"adapter is {type(adapter).__name__}, but model {name} is whole weights; set adapter to LoRA")
    if isinstance(optimizer, Muon):
        raise SpecError("optimizer is Muon, which is for whole weight matrices; set optimizer to AdamW to train an adapter")
    if model.adapter:
        return model
    from dataclasses import replace

    base = f"{key(at.of)}/{at.port}" + ("" if at.step is None else f"@{at.step}")
    return replace(model, adapter=True, base_key=base)


def need_examples(types: Callable[[At], Type], at: At, template: Template, loss: Loss) -> DataType:
    """The type of a dataset that a template can make examples of. Raises `SpecError` naming the columns it lacks."""
    data = types(at)
    need: tuple[str, ...] = ("text",) if isinstance(template, Document) else ("prompt", "completion")
    if loss.per == "pairs":
        need = ("prompt", "chosen", "rejected")
        if isinstance(template, Document):
            raise SpecError(f"loss {loss.kind()} compares replies, and template Document has none; set template to Chat")
    if not isinstance(data, DataType) or not set(need) <= set(data.columns):
        has = ", ".join(getattr(data, "columns", ())) or "no columns"
        raise SpecError(f"data needs columns {', '.join(need)}; {at.of.name}.{at.port} has {has}")
    return data


def need_reference(types: Callable[[At], Type], at: At | None, model: ModelType, loss: Loss) -> None:
    """Raises `SpecError` where a loss lacks its reference, has none to ask, or would read other ids than it."""
    if at:
        need_same_ids("the reference", at, types, model)
    if bool(at) != ("ref_logp" in loss.needs()):
        raise SpecError(
            f"reference is given, but loss {loss.kind()} is measured against none; leave reference out"
            if at
            else f"loss {loss.kind()} is measured against a reference; set reference to a policy, usually that of model"
        )


def examples(ctx: Any, at: At, template: Template, tokenizer: Any) -> list[Sample]:
    """The rows of a dataset as samples to train on. Raises `UserError` where there are none."""
    from tutelage.text.rows import read_rows

    made = []
    for row in read_rows(ctx.input(at)):
        if isinstance(template, Document):
            made.append(template.document(tokenizer, row["text"]))
        else:
            made.append(template.example(tokenizer, row["prompt"], row["completion"]))
    if not made:
        raise UserError(f"{at.of.name}.{at.port} is empty; a model cannot be trained on it")
    return made


def need_series(checkpoints: tuple[int, ...], steps: int, ends_early: bool = False) -> None:
    """Raises `SpecError` for a checkpoint that would never be written."""
    for step in checkpoints:
        if not 1 <= step <= steps:
            raise SpecError(f"checkpoints names step {step}, but the stage has steps 1 to {steps}")
    if checkpoints and ends_early:
        raise SpecError(
            "checkpoints cannot be promised by a stage that a budget or patience may end before; set one or the other"
        )


class _Fitting:
    """The state of one running `Fit`."""

    def __init__(self, stage: Fit, ctx: Any):
        from tutelage.learn.learner import Learner, Scorers
        from tutelage.rollout.policy import Policy
        from tutelage.stages.preference import References, pairs
        from tutelage.text.rows import read_tasks
        from tutelage.text.signals import read_signals

        self.stage, self.ctx = stage, ctx
        self.policy = Policy(ctx.input(stage.model), slots=256, adapter=stage.adapter, seed=stage.seed, device=ctx.device)
        vocab = len(self.policy.tokenizer)
        self.learner = Learner(self.policy.model, stage.optimizer, stage.clip, stage.micro_tokens, stage.dtype, vocab)
        self.each = 2 if stage.loss.per == "pairs" else 1  # samples of a row
        read: Callable[..., list[Sample]] = pairs if self.each == 2 else examples
        self.samples = read(ctx, stage.data, stage.template, self.policy.tokenizer)
        if stored := stage.loss.needs() - {"ref_logp"}:
            read_signals(ctx.input(stage.data), self.samples, stored)
        self.references: References | None = None
        if stage.reference:
            scorer = Scorers(vocab, device=ctx.device).of(ctx.input(stage.reference), stage.reference.of.name)
            self.references = References(scorer, self.samples)
        self.allowed = stage.budget.allowed(ctx) if stage.budget else math.inf
        self.best: dict[str, Any] = {"score": -1.0, "step": 0}
        if stage.select:
            found: dict[str, list[Any]] = {}
            for task in read_tasks(ctx.input(stage.select.tasks)):
                found.setdefault(task.domain, []).append(task)
            self.dev = {d: t[: stage.select.limit] for d, t in sorted(found.items())}

    def run(self) -> None:
        import torch

        from tutelage.model.adapter import load_weights

        stage, ctx = self.stage, self.ctx
        step, folder = ctx.resume()
        if folder:
            state = torch.load(folder / "state.pt")
            self.learner.restore(state["learner"])
            if self.references:
                self.references.restore(state["references"])
            self.best = state["best"]
        elif stage.select:
            self._trial(0)
        while step < stage.steps and ctx.cost.flops < self.allowed and not self._stale(step):
            self._step(step)
            step += 1
            if step in stage.checkpoints:
                self.policy.save(ctx.output("policy", step))
            if stage.select and step % stage.select.every == 0:
                self._trial(step)
            ctx.boundary(step, self._save)
        if stage.select:
            load_weights(self.policy.model, self.best["weights"])
        ctx.facts.update(steps=step, budget=self.allowed if stage.budget else None)
        self.policy.save(ctx.output("policy"))

    def _step(self, step: int) -> None:
        stage, ctx = self.stage, self.ctx
        order = batch_order(len(self.samples) // self.each, stage.rows, step, stage.seed)
        rows = [self.samples[i * self.each + k] for i in order for k in range(self.each)]
        if self.references:
            self.references.annotate(rows, ctx.cost)
        metrics = self.learner.forward_backward(rows, stage.loss)
        metrics |= self.learner.step(stage.schedule.factor(step, foreseen(step, stage.steps, ctx.cost.flops, self.allowed)))
        tokens = sum(len(r.tokens) for r in rows)
        self.policy.charge_training(ctx.cost, tokens)
        ctx.log(step + 1, **metrics)
        total = foreseen(step + 1, stage.steps, ctx.cost.flops, self.allowed)
        ctx.progress(step + 1, total, loss=metrics["loss"])

    def _stale(self, step: int) -> bool:
        select = self.stage.select
        return bool(select and select.patience and step - self.best["step"] >= select.patience * select.every)

    def _trial(self, step: int) -> None:
        """Measures the development tasks; keeps the weights when they are the best so far."""
        from tutelage.model.adapter import weights

        select, ctx = self.stage.select, self.ctx
        assert select
        driver = self.policy.driver(select.template, select.env, select.sampling)
        means = {}
        for domain, tasks in self.dev.items():
            samples = driver.collect(tasks, 1, self.stage.seed)
            means[domain] = sum(s.scalars["reward"] for s in samples) / len(samples)
        score = sum(means.values()) / len(means)
        trial = {"sampled": self.policy.engine.sampled, "prefilled": self.policy.engine.prefilled}
        self.policy.engine.sampled = self.policy.engine.prefilled = 0
        ctx.facts["development_tokens"] = ctx.facts.get("development_tokens", 0) + sum(trial.values())
        ctx.log(step, dev=score, **{f"dev/{d}": m for d, m in means.items()})
        if score > self.best["score"]:
            best = {k: v.clone() for k, v in weights(self.policy.model).items()}
            self.best = {"score": score, "step": step, "weights": best}
            ctx.facts["selected"] = {"step": step, "dev": score}

    def _save(self, folder: Path) -> None:
        import torch

        more = {"references": self.references.state()} if self.references else {}
        torch.save({"learner": self.learner.state(), "best": self.best, **more}, folder / "state.pt")


def batch_order(n: int, size: int, step: int, seed: int) -> list[int]:
    """Indices of the batch at ``step``: each epoch is its own permutation, and batches run on across epochs."""
    return run_order(n, step * size, size, seed)


def run_order(n: int, at: int, size: int, seed: int) -> list[int]:
    """The ``size`` indices from place ``at`` on of the endless shuffled order that `batch_order` cuts into batches."""
    import numpy as np

    picked: list[int] = []
    while len(picked) < size:
        epoch, offset = divmod(at, n)
        order = np.random.default_rng([seed, epoch]).permutation(n)
        chunk = order[offset : offset + size - len(picked)].tolist()
        picked += chunk
        at += len(chunk)
    return picked
