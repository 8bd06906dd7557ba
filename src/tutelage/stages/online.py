"""Online: the loop in which a policy learns from its own samples. RLVR and on-policy distillation are both this.

A step draws prompts, samples replies, lets the environment score them, lets credit rules write signals (a group's
advantage, a teacher's log-probs), and takes one update per minibatch. What makes it GRPO or MOPD is in ``credit`` and
``loss`` alone; stages/methods.py has the published pairs. With ``teachers`` every domain has exactly one teacher, checked
before any weight loads. ``resample`` is DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): prompts are drawn until the
batch is full of groups whose rewards differ, so many times at most; what was drawn in vain is paid for and logged.
``keep="random"`` is its control: the same draws, and as many groups, chosen blind to their rewards.
``curriculum`` chooses the prompts by their pass rates; ``temperature`` moves that of the sampling, and of everything that is
compared with it. Where ``health`` stops a stage, the policy is published as it is, with the verdict in the facts: a run
that collapsed is a result too, and what does not depend on its quality, such as a table over seeds, stays whole. ``replay``
and ``weights`` are mixtures (mixture.py). ``balance`` gives every domain's mean loss the same weight in an update: where all
tokens count alike, domains with long replies drown the others (Open-MOPD, arXiv 2608.19098). What `PPO` adds hangs on
`Loop`'s methods (ppo.py).

Leaves out: asynchronous rollouts, several policies in one stage (codistill.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from tutelage.credit.base import Credit, Scorer
from tutelage.envs.base import Env
from tutelage.graph import At, Kind, ModelType, Stage, Type
from tutelage.learn.optim import AdamW, Muon, Schedule
from tutelage.losses.base import Loss
from tutelage.model.lora import Adapter
from tutelage.rollout.base import Sampling
from tutelage.spec import SpecError, UserError, suggest
from tutelage.stages.budget import Budget, foreseen
from tutelage.stages.curriculum import Curriculum
from tutelage.stages.evaluate import TEACHING, need_domain, need_model, need_same_ids, tokens_guess
from tutelage.stages.fit import need_series, run_order, trained_type
from tutelage.stages.health import Health, Step, Verdict, repetition, watched
from tutelage.stages.mixture import Replay, Replays, need_replays, need_weights, replay_tokens, shares
from tutelage.stages.passrate import need_rates, rates
from tutelage.stages.staged import Staged
from tutelage.stages.temperature import RaiseOnPlateau, TemperatureSchedule
from tutelage.text.template import Chat, Template
from tutelage.types import Sample, Signal, Task

SAMPLED = frozenset({"behaviour_logp", "reward"})
"""What every sample brings along."""
AT_START = "prox_logp"
"""The trainer's own log-probs before the step's first update, scored where the loss needs them."""


class Online(Stage):
    """Trains ``model`` on its own samples of the tasks; see the module's docstring."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    brings: ClassVar[frozenset[str]] = SAMPLED
    """Signals that are there before the credit rules."""
    verb: ClassVar[str] = "trains on its own samples"
    on_device: ClassVar[bool] = True
    version: ClassVar[int] = 7

    model: At
    tasks: At
    domains: tuple[str, ...] = Field(min_length=1)
    """Drawn from in equal numbers, or by ``weights``."""
    weights: dict[str, float] = {}
    """domain -> its part of the prompts, in any unit; empty draws equal numbers"""
    env: Env
    teachers: dict[str, At] = {}
    """domain -> its teacher"""
    staged: Staged | None = None
    """Who teaches before them, and when they take over; None: nobody."""
    reference: At | None = None
    """The policy that KL is measured to, asked by credit.kl.Reference."""
    credit: tuple[Credit, ...] = Field(min_length=1)
    loss: Loss
    replay: tuple[Replay, ...] = ()
    """Data that every update learns from beside the samples: SFT replay, or the pretraining loss of PPO-ptx."""
    adapter: Adapter | None = None
    """What is trained in place of all weights."""
    optimizer: AdamW | Muon = AdamW(lr=4e-4)
    schedule: Schedule = Schedule()
    clip: float = Field(1.0, ge=0)
    """bound on the gradient's norm; 0 does not bound it"""
    steps: int = Field(100, ge=1)
    budget: Budget | None = None
    """Compute that bounds this stage; ``steps`` bounds it still."""
    prompts: int = Field(16, ge=1)
    """prompts a step, all domains together"""
    group: int = Field(8, ge=1)
    """samples a prompt"""
    resample: int = Field(0, ge=0)
    """further draws a step while groups whose rewards differ are fewer than ``prompts``; 0 takes what the first draw gives"""
    keep: Literal["informative", "random"] = "informative"
    """what `resample` trains on: the groups whose rewards differ, or as many of all it drew, by chance (its control)"""
    epochs: int = Field(1, ge=1)
    """passes over a step's samples (the K of PPO, arXiv 1707.06347); more than one makes the later ones off-policy"""
    minibatches: int = Field(1, ge=1)
    """updates a step; more than one makes the later ones off-policy"""
    balance: bool = False
    """Whether the loss is the mean of the domains' means instead of the mean over all their tokens (or rows)."""
    template: Template = Chat()
    sampling: Sampling = Sampling()
    temperature: TemperatureSchedule | None = None
    """Moves the temperature of ``sampling``; None leaves it where it is."""
    curriculum: Curriculum | None = None
    """Chooses each step's prompts by their pass rates; None asks all in a shuffled order before any comes again."""
    health: Health | None = None
    """Says, ends or fails where nothing is learned any more."""
    checkpoints: tuple[int, ...] = ()
    """Steps kept as a series that edges may name."""
    seed: int = Field(0, ge=0)
    dtype: str = Field("float32", pattern="^(float32|bfloat16)$")
    rollout_dtype: str = Field("float32", pattern="^(float32|bfloat16)$")
    slots: int = Field(256, ge=1, json_schema_extra={"unkeyed": True})
    resident: int = Field(0, ge=0, json_schema_extra={"unkeyed": True})
    """teachers and reference in memory at once, adapters counted as their base; 0 holds all, 1 loads each when it is asked"""
    micro_tokens: int = Field(8192, ge=1, json_schema_extra={"unkeyed": True})

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        model = need_model(types, self.model)
        for domain in self.domains:
            need_domain(types, self.tasks, domain)
        self._check_teachers(types, model)
        if self.reference:
            need_same_ids("the reference", self.reference, types, model)
        self._check_signals()
        columns = need_domain(types, self.tasks, self.domains[0]).columns
        for rule in self.credit:
            rule.check(self.domains, columns, self.group)
        if self.resample and self.group == 1:
            raise SpecError("resample looks for groups whose rewards differ, but group is 1; set group to 2 or more")
        if self.keep == "random" and not self.resample:
            raise SpecError(
                "keep is random, the control of resample, but resample is 0; set resample as in the stage it is for"
            )
        self._check_pacing(types)
        if self.budget:
            self.budget.check(types)
        need_series(self.checkpoints, self.steps, ends_early=bool(self.budget))
        if len(set(self.domains)) < len(self.domains):
            raise SpecError(f"domains names one twice: {', '.join(self.domains)}")
        need_weights(self.weights, self.domains, self.prompts)
        need_replays(types, self.replay)
        trained = trained_type(model, self.model, self.adapter, self.optimizer)
        return {"policy": replace(trained, checkpoints=self.checkpoints)}

    def _check_pacing(self, types: Callable[[At], Type]) -> None:
        if self.curriculum:
            need_rates(types, self.tasks)
        if self.temperature:
            self.temperature.check(self.sampling.temperature)
        if isinstance(self.temperature, RaiseOnPlateau):
            trial = self.temperature.select_on
            for domain in self.domains:
                need_domain(types, trial, domain)
            if (trial.of, trial.port) == (self.tasks.of, self.tasks.port):
                raise SpecError("temperature.select_on names the tasks that are trained on; give development tasks")
        if self.health and self.health.action == "end" and self.checkpoints:
            raise SpecError(
                "checkpoints cannot be promised by a stage that health may end before; set health.action to warn or fail"
            )

    def _check_teachers(self, types: Callable[[At], Type], model: ModelType) -> None:
        if not self.teachers:
            if self.staged:
                raise SpecError("staged says who teaches before teachers, but none are given; set teachers to the last ones")
            return
        for domain in self.domains:
            if domain not in self.teachers:
                raise SpecError(f"domain {domain!r} has no teacher{suggest(domain, self.teachers)}")
        for domain, at in self.teachers.items():
            need_same_ids(f"the teacher of {domain!r}", at, types, model, TEACHING)
        if self.staged:
            self.staged.check(self.teachers, self.steps, lambda who, at: need_same_ids(who, at, types, model, TEACHING))

    def _check_signals(self) -> None:
        have = set(self.brings)
        if self.sampling.top_p < 1 or self.sampling.top_k:
            have |= {"kept_logp", "kept"}
        for i, rule in enumerate(self.credit):
            _need(rule.kind(), rule.needs() - have)
            have |= rule.gives()
            if rule.shapes and not any("reward" in r.needs() and "advantage" in r.gives() for r in self.credit[i + 1 :]):
                raise SpecError(
                    f"{rule.kind()} changes what replies are judged by, but no rule after it judges them; put it before the "
                    "baseline, such as credit.group.GroupRelative"
                )
        _need(self.loss.kind(), self.loss.needs() - have - {AT_START})
        if bool(self.reference) != ("ref_logp" in have):
            raise SpecError(
                "reference is given, but no credit rule asks it; add credit.kl.Reference or leave reference out"
                if self.reference
                else "credit.kl.Reference asks a reference, but none is given; set reference to a stage's policy"
            )
        wants_teachers = any("teachers" in rule.asks() for rule in self.credit)
        if wants_teachers and not self.teachers:
            raise SpecError("a credit rule asks teachers, but none are given; set teachers to {domain: a stage's policy}")
        if self.teachers and not wants_teachers:
            raise SpecError("teachers are given, but no credit rule asks them; add credit.teacher.Teacher or leave them out")

    def estimate(self, types: Callable[[At], Type]) -> float:
        if self.budget:
            return self.budget.estimate(types)
        tokens = tokens_guess(self.steps * self.prompts * self.group, self.sampling)
        learns = (4.0 if self.adapter else 6.0) * self.epochs
        each = 2.0 + learns + (2.0 if AT_START in self.loss.needs() else 0.0)
        each += 2.0 * sum("policy" in rule.asks() for rule in self.credit)
        own = need_model(types, self.model).params * (
            each * tokens + learns * replay_tokens(self.replay, self.steps * self.minibatches)
        )
        teachers = [need_model(types, at, TEACHING).params for at in self.teachers.values()]
        asked = sum(teachers) / len(teachers) if teachers else 0.0
        asked += need_model(types, self.reference).params if self.reference else 0.0
        return own + 2.0 * tokens * asked

    def run(self, ctx: Any) -> None:
        Loop(self, ctx).run()


def _need(who: str, missing: frozenset[str] | set[str]) -> None:
    if missing:
        fix = "use the stage PPO, which has a value model" if "value" in missing else "add the credit rule that does"
        raise SpecError(f"{who} needs {', '.join(sorted(missing))}, which nothing before it gives; {fix}")


class Loop:
    """The state of one running `Online`."""

    def __init__(self, stage: Online, ctx: Any):
        from tutelage.credit.base import CreditContext
        from tutelage.learn.learner import Learner, PolicyScorer, Scorers
        from tutelage.rollout.policy import Policy
        from tutelage.text.rows import read_tasks

        self.stage, self.ctx = stage, ctx
        self.policy = Policy(ctx.input(stage.model), stage.slots, stage.rollout_dtype, stage.adapter, stage.seed, ctx.device)
        vocab = len(self.policy.tokenizer)
        self.learner = Learner(self.policy.model, stage.optimizer, stage.clip, stage.micro_tokens, stage.dtype, vocab)
        self.driver = self.policy.driver(stage.template, stage.env, stage.sampling)
        self.driver.sets = "kept" in stage.loss.needs()
        self.scorers = Scorers(vocab, stage.resident, ctx.device)  # one for each folder, however many domains it teaches
        by_domain: dict[str, Scorer] = {d: self._scorer(at) for d, at in stage.teachers.items() if d in stage.domains}
        reference = self._scorer(stage.reference) if stage.reference else None
        self.itself = PolicyScorer(self.learner)
        self.credit_context = CreditContext(
            stage.sampling.scored_at,
            by_domain,
            reference,
            self.itself,
            partial(stage.template.prompt, self.policy.tokenizer),
            stage.seed,
        )
        self.turns = {d: [*map(self._scorer, ats), by_domain[d]] for d, ats in self._earlier().items() if d in by_domain}
        self.turn = stage.staged.begin() if stage.staged else {}
        self.pools: dict[str, list[Task]] = {d: [] for d in stage.domains}
        for task in read_tasks(ctx.input(stage.tasks)):
            if task.domain in self.pools:
                self.pools[task.domain].append(task)
        self.rates = {d: rates(tasks) for d, tasks in self.pools.items()} if stage.curriculum else {}
        self.heat = stage.temperature.begin(stage.sampling.temperature) if stage.temperature else {}
        self.development = self._development(stage.temperature) if isinstance(stage.temperature, RaiseOnPlateau) else {}
        self.history: list[Step] = []
        self.allowed = stage.budget.allowed(ctx) if stage.budget else math.inf
        self.total = stage.steps
        """steps in all, as far as it can be foreseen"""
        self.progress = 0.0
        """share of them that is over: 0 at the first and 1 at the last"""
        self.replays = Replays(stage.replay, ctx, self.policy.tokenizer, stage.seed)
        self._sharing = shares([stage.weights.get(d, 1.0) for d in self.pools], stage.prompts)
        self._shared = [[0] * len(self.pools)]  # prompts of each domain before step 0, 1, ...

    def _earlier(self) -> dict[str, tuple[At, ...]]:
        return self.stage.staged.teachers if self.stage.staged else {}

    def _scorer(self, at: At) -> Scorer:
        return self.scorers.of(self.ctx.input(at), at.of.name)

    def run(self) -> None:
        import torch

        step, folder = self.ctx.resume()
        if folder:
            self._restore(torch.load(folder / "state.pt"))
        while self._goes_on(step):
            if not self._take(step):
                step += 1
                break
            step += 1
            self.ctx.boundary(step, self._save)
        self._finish(step)

    def _goes_on(self, step: int) -> bool:
        """Whether there is a step number ``step``."""
        return step < self.stage.steps and self.ctx.cost.flops < self.allowed

    def _take(self, step: int) -> bool:
        """Takes step number ``step`` and keeps the checkpoint that is to follow it; False where health ends the stage."""
        if self._ends(step + 1, self._step(step)):
            return False
        if step + 1 in self.stage.checkpoints:
            self._publish(step + 1)
        return True

    def _finish(self, steps: int) -> None:
        """Publishes what so many steps have made."""
        if self.stage.budget:
            self.ctx.facts.update(steps=steps, budget=self.allowed)
        self._publish()

    def _save(self, folder: Path) -> None:
        import torch

        torch.save(self._state(), folder / "state.pt")

    def _state(self) -> dict[str, Any]:
        return {**self.learner.state(), "heat": self.heat, "history": self.history, "turn": self.turn}

    def _restore(self, state: dict[str, Any]) -> None:
        self.learner.restore(state)
        self.heat, self.history = state.get("heat", self.heat), state.get("history", self.history)
        self.turn = state.get("turn", self.turn)

    def _publish(self, step: int | None = None) -> None:
        """Writes every port; with ``step``, a checkpoint of its series."""
        self.policy.save(self.ctx.output("policy", step))

    def _step(self, step: int) -> Verdict:
        stage, ctx, began = self.stage, self.ctx, time.monotonic()
        self.total = foreseen(step, stage.steps, ctx.cost.flops, self.allowed)
        self.progress = min(1.0, step / max(1, self.total - 1))
        self.policy.refresh(step)
        if stage.staged:
            self.credit_context.teachers |= {d: stage.staged.now(self.turn, turns) for d, turns in self.turns.items()}
        if stage.temperature:
            self._heat(stage.temperature.at(self.heat, step, self.total))
        drawn, chosen, filled = self._draw(step)
        self.policy.charge(ctx.cost)
        trained, credited = self._assign(chosen)
        metrics = credited | _describe(drawn) | filled  # of everything drawn, not of what credit saw
        metrics |= _parts(drawn, trained, stage.domains)
        if trained:
            metrics.update(self._update(trained, step))
        tokens = sum(int(s.mask.sum()) for s in drawn)
        metrics["tokens_per_s"] = tokens / (time.monotonic() - began)
        if stage.staged:
            metrics["teacher_stage"] = float(min(self.turn["stage"], max(map(len, self.turns.values())) - 1))
            self.turn = stage.staged.switch.after(self.turn, step + 1, metrics)
        if stage.temperature:
            metrics["temperature"] = self.driver.sampling.scored_at
            if step + 1 < self.total:  # a trial after the last step would be for nothing
                self.heat, tried = stage.temperature.after(self.heat, metrics["reward"], lambda t: self._trial(t, step + 1))
                metrics |= tried
        verdict = self._judge(metrics)
        ctx.log(step + 1, **metrics)
        shown: dict[str, Any] = {k: metrics[k] for k in ("reward", "kl") if k in metrics}
        if verdict.sign:
            shown["health"] = verdict.sign
        ctx.progress(step + 1, foreseen(step + 1, stage.steps, ctx.cost.flops, self.allowed), **shown)
        return verdict

    def _judge(self, metrics: dict[str, float]) -> Verdict:
        """What health thinks of the stage with this step; adds its part to the step's metrics."""
        if not self.stage.health:
            return Verdict("ok")
        self.history.append(watched(metrics))
        verdict = self.stage.health.judge(self.history)
        metrics["health"] = float(("ok", "warn", "stop").index(verdict.level))
        return verdict

    def _ends(self, step: int, verdict: Verdict) -> bool:
        """Whether the stage ends after this step; says every sign once. Raises `UserError` where it is to fail."""
        health = self.stage.health
        if not health or verdict.level == "ok":
            return False
        told = self.ctx.facts.setdefault("health", [])
        if not any((t["level"], t["sign"]) == verdict[:2] for t in told):
            told.append({"step": step, **verdict._asdict()})
            print(f"health, step {step}, {verdict.level}: {verdict.says}")
        if verdict.level == "stop" and health.action == "fail":
            raise UserError(f"health stopped {self.stage.name} after step {step}: {verdict.says}")
        return verdict.level == "stop" and health.action == "end"

    def _heat(self, temperature: float) -> None:
        """From now on samples are drawn, and everybody is compared, at this temperature."""
        self.driver.sampling = self.driver.sampling.model_copy(update={"temperature": temperature})
        self.credit_context.temperature = temperature

    def _trial(self, temperature: float, version: int) -> float:
        """The mean over domains of the development score at a temperature. Its tokens are on no budget."""
        stage, schedule = self.stage, self.stage.temperature
        assert isinstance(schedule, RaiseOnPlateau)
        sampling = stage.sampling.model_copy(update={"temperature": temperature})
        self.policy.refresh(version)
        driver = self.policy.driver(stage.template, stage.env, sampling)
        means = []
        for tasks in self.development.values():
            samples = driver.collect(tasks, schedule.samples, stage.seed)
            means.append(_mean([s.scalars["reward"] for s in samples]))
        engine, facts = self.policy.engine, self.ctx.facts
        facts["development_tokens"] = facts.get("development_tokens", 0) + engine.sampled + engine.prefilled
        engine.sampled = engine.prefilled = 0
        return _mean(means)

    def _development(self, schedule: RaiseOnPlateau) -> dict[str, list[Task]]:
        from tutelage.text.rows import read_tasks

        found: dict[str, list[Task]] = {d: [] for d in self.pools}
        for task in read_tasks(self.ctx.input(schedule.select_on)):
            if task.domain in found and len(found[task.domain]) < schedule.limit:
                found[task.domain].append(task)
        for domain, tasks in found.items():
            if not tasks:
                raise UserError(f"{schedule.select_on.of.name}.{schedule.select_on.port} holds no task of domain {domain!r}")
        return found

    def _draw(self, step: int) -> tuple[list[Sample], list[Sample], dict[str, float]]:
        """Everything drawn in a step, what of it goes on to credit, and how the batch was filled.

        A domain that is short of groups whose rewards differ draws its whole share again; what is over is left.
        """
        from tutelage.credit.group import informative_groups
        from tutelage.rollout.driver import request_seed

        stage = self.stage
        seed = stage.seed * 1_000_003 + step
        drawn = self.driver.collect(self._prompts(step, list(self.pools)), stage.group, seed)
        if not stage.resample:
            return drawn, drawn, {}
        share, fresh, draws = {d: n for d, (_, n) in self._shares(step).items()}, drawn, 1
        full: dict[str, list[list[Sample]]] = {d: [] for d in self.pools}
        while True:
            for group in informative_groups(fresh):
                full[group[0].domain].append(group)
            short = [d for d in self.pools if len(full[d]) < share[d]]
            if not short or draws > stage.resample:
                break
            fresh = self.driver.collect(self._prompts(step, short, draws), stage.group, request_seed(seed, "resample", draws))
            for sample in fresh:
                sample.group += f"+{draws}"
            drawn, draws = drawn + fresh, draws + 1
        found = sum(map(len, full.values())) / len({s.group for s in drawn})
        if stage.keep == "random":
            full = _by_chance(drawn, {d: min(share[d], len(full[d])) for d in full}, seed)
        chosen = [s for d in self.pools for group in full[d][: share[d]] for s in group]
        vain = 1 - len(chosen) / len(drawn)
        return drawn, chosen, {"draws": float(draws), "informative_groups": found, "drawn_in_vain": vain}

    def _prompts(self, step: int, domains: Sequence[str], draw: int = 0) -> list[Task]:
        """Each domain's share of tasks, by the curriculum or in the domain's own shuffled order."""
        stage, found = self.stage, []
        for k, (domain, (before, share)) in enumerate(self._shares(step).items()):
            if domain not in domains or not share:
                continue
            tasks, seed = self.pools[domain], stage.seed * 1009 + k
            if stage.curriculum:
                order = stage.curriculum.pick(self.rates[domain], share, step, self.total, seed, draw)
            elif draw:  # a series of its own: the first draws stay what they are without it
                at = before * stage.resample + (draw - 1) * share
                order = run_order(len(tasks), at, share, seed + len(self.pools))
            else:
                order = run_order(len(tasks), before, share, seed)
            found += [tasks[i] for i in order]
        return found

    def _shares(self, step: int) -> dict[str, tuple[int, int]]:
        """domain -> (prompts it was given before a step, prompts it is given in it)"""
        while len(self._shared) <= step + 1:
            self._shared.append([a + b for a, b in zip(self._shared[-1], next(self._sharing), strict=True)])
        before, after = self._shared[step], self._shared[step + 1]
        return {d: (a, b - a) for d, a, b in zip(self.pools, before, after, strict=True)}

    def _assign(self, drawn: Sequence[Sample]) -> tuple[list[Sample], dict[str, float]]:
        samples, found = list(drawn), {}
        for rule in self.stage.credit:
            samples, metrics = asyncio.run(rule.assign(samples, self.credit_context))
            found.update({name: a / b if b else a for name, (a, b) in metrics.items()})
        itself = [self.itself] if self.itself.scored else []
        for scorer in (*self.scorers.made.values(), *itself):
            self.ctx.cost.spend("scored", scorer.scored, scorer.params)
            scorer.scored = 0
        return samples, found

    def _update(self, samples: list[Sample], step: int) -> dict[str, float]:
        """``epochs`` passes over the samples in whole groups; the metrics of the first minibatch, which is on-policy."""
        stage, temperature = self.stage, self.driver.sampling.scored_at
        if AT_START in stage.loss.needs():
            for sample, signal in zip(samples, self.learner.score(samples, temperature, "logp"), strict=True):
                sample.signals[AT_START] = signal
            self.ctx.cost.spend("scored", sum(len(s.tokens) for s in samples), self.policy.params)
        if self.driver.sets:
            _widen(samples)
        first: dict[str, float] = {}
        for number, part in enumerate(_minibatches(samples, stage.minibatches) * stage.epochs):
            metrics = self._learn(part, step, step * stage.minibatches * stage.epochs + number)
            first = first or metrics
        return first

    def _learn(self, part: list[Sample], step: int, number: int) -> dict[str, float]:
        """Update ``number`` of the stage."""
        stage = self.stage
        metrics = self._backward(part)
        replayed, tokens = self.replays.add(self.learner, number)
        metrics |= replayed | self.learner.step(stage.schedule.factor(step, self.total))
        self.policy.charge_training(self.ctx.cost, sum(len(s.tokens) for s in part) + tokens)
        return metrics

    def _backward(self, part: list[Sample]) -> dict[str, float]:
        """Adds the gradient of a minibatch; with ``balance`` the metrics are means over domains too."""
        domains = list(dict.fromkeys(s.domain for s in part)) if self.stage.balance else [None]
        found = []
        for domain in domains:
            mine = [s for s in part if domain in (None, s.domain)]
            args = (mine, self.stage.loss, self.driver.sampling.scored_at, self._extras())
            found.append(self.learner.forward_backward(*args, weight=1 / len(domains)))
        return {n: (max if n.endswith("max") else _mean)([f[n] for f in found if n in f]) for n in found[0]}

    def _extras(self) -> dict[str, Any]:
        from tutelage.credit.teacher import distinct

        teachers = self.credit_context.teachers
        extras: dict[str, Any] = {"progress": self.progress}
        if "teacher_hidden" in self.stage.loss.needs():
            extras["teacher_heads"] = tuple(s.head for s in (*distinct(teachers), self.itself))
        return extras


def _by_chance(drawn: Sequence[Sample], counts: dict[str, int], seed: int) -> dict[str, list[list[Sample]]]:
    """So many groups of each domain, without replacement and blind to their rewards, in the order they were drawn in."""
    from random import Random

    from tutelage.credit.group import groups

    chosen = {}
    for domain, count in counts.items():
        mine = groups(s for s in drawn if s.domain == domain)
        chosen[domain] = [mine[i] for i in sorted(Random(f"keep {seed} {domain}").sample(range(len(mine)), count))]
    return chosen


def _minibatches(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Whole groups in order, every domain's spread evenly over the parts; never more parts than groups."""
    import numpy as np

    from tutelage.credit.group import groups

    listed, place = groups(samples), {}
    for domain in {group[0].domain for group in listed}:
        mine = [g for g, group in enumerate(listed) if group[0].domain == domain]
        place.update({g: (i + 0.5) / len(mine) for i, g in enumerate(mine)})
    shares = np.array_split(sorted(place, key=lambda g: (place[g], g)), min(parts, len(listed)))
    return [[s for g in sorted(share) for s in listed[g]] for share in shares]


def _widen(samples: Sequence[Sample]) -> None:
    """Fills up the kept sets to the widest, so that the samples pack together."""
    import numpy as np

    widest = max(s.signals["kept"].values.shape[1] for s in samples)
    for sample in samples:
        old = sample.signals["kept"]
        values = np.pad(old.values, ((0, 0), (0, widest - old.values.shape[1])), constant_values=-1)
        sample.signals["kept"] = Signal(values, old.index, old.provenance)


def _describe(samples: Sequence[Sample]) -> dict[str, float]:
    """Reward, length and health of what was drawn, by domain where there are several."""
    scored = [s for s in samples if not (s.score and s.score.error)]
    found = {
        "reward": _mean([s.scalars["reward"] for s in scored]),
        "length": _mean([float(s.mask.sum()) for s in samples]),
        "truncated": _mean([float(s.stop == "length") for s in samples]),
        "verifier_errors": 1 - len(scored) / len(samples),
        **repetition(samples),
    }
    domains = sorted({s.domain for s in samples})
    if len(domains) > 1:
        for d in domains:
            found[f"reward/{d}"] = _mean([s.scalars["reward"] for s in scored if s.domain == d])
    return found


def _parts(drawn: Sequence[Sample], trained: Sequence[Sample], domains: Sequence[str]) -> dict[str, float]:
    """Where there are several domains, each one's share of the prompts drawn and of the tokens trained on."""
    from tutelage.credit.teacher import token_share

    if len(domains) == 1:
        return {}
    prompts = {s.group: s.domain for s in drawn}
    found = {f"prompt_share/{d}": list(prompts.values()).count(d) / len(prompts) for d in domains}
    return found | {name: a / b for name, (a, b) in token_share(trained, domains).items() if b}


def _mean(values: Sequence[float]) -> float:
    """NaN of nothing: a step whose every verifier failed has no reward, not a reward of 0."""
    return sum(values) / len(values) if values else math.nan
