"""PPO: `Online` with a value model that learns beside the policy (Schulman et al., arXiv 1707.06347).

Before credit is given the value model says what it expects at each trained token; `GAE` makes advantages and returns of that;
each minibatch then updates the policy by ``loss`` and the value model by ``value_loss``, each with an optimizer of its own.
The defaults are InstructGPT's (arXiv 2203.02155): per-token KL to ``reference`` in the reward at β = 0.02, γ = 1, λ = 0.95,
clip 0.2, one pass over the samples. Advantages are whitened over the step's tokens, by the rule `GlobalNormalization`. With
``replay`` on documents it is PPO-ptx. docs/methods/ppo.md says where each number is from.

The value model is published as the port ``value``: an ordinary folder, from which a later stage can go on.

Leaves out: a body shared by policy and value model, an adaptive β.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from tutelage.credit.base import Credit
from tutelage.credit.gae import GAE
from tutelage.credit.kl import Reference
from tutelage.credit.reinforce_pp import GlobalNormalization
from tutelage.graph import At, Kind, Type
from tutelage.learn.optim import AdamW
from tutelage.losses.base import Loss
from tutelage.losses.policy import DAPO
from tutelage.losses.value import ClippedValue
from tutelage.spec import SpecError
from tutelage.stages.evaluate import need_model, need_same_ids, tokens_guess
from tutelage.stages.online import SAMPLED, Loop, Online
from tutelage.types import Sample

HEADS = ("causal", "score", "value")
"""A value model may begin from any."""
UNVALUED = frozenset({"gemma3_text", "olmo", "olmo2", "olmo3", "olmoe"})
"""Architectures that pack, but for which transformers has no token classifier (a test holds this to the library)."""


class PPO(Online):
    """Trains ``model`` on its own samples with a value model; see the module's docstring."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model", "value": "model"}
    brings: ClassVar[frozenset[str]] = SAMPLED | {"value"}

    value: At
    """What the value model begins from: the SFT policy (its head then begins at zero), a reward model or a value model."""
    credit: tuple[Credit, ...] = (Reference(), GAE(beta=0.02), GlobalNormalization())
    loss: Loss = DAPO(clip_high=0.2)
    value_loss: ClippedValue = ClippedValue()
    value_optimizer: AdamW = AdamW(lr=4e-4)
    """Under the stage's ``schedule`` and ``clip``."""

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        made = super().infer(types)
        begun = need_same_ids("the value model", self.value, types, need_model(types, self.model), HEADS)
        name = f"{self.value.of.name}.{self.value.port}"
        if begun.adapter:
            raise SpecError(f"value {name} is an adapter; take the model of a Merge stage (whole weights)")
        if begun.architecture in UNVALUED:
            raise SpecError(
                f"value {name} is of architecture {begun.architecture!r}, which transformers has no token classifier for; "
                "begin from a model of another one with the same tokenizer, such as llama or qwen3"
            )
        return {**made, "value": replace(begun, head="value", checkpoints=self.checkpoints)}

    def _check_signals(self) -> None:
        super()._check_signals()
        if isinstance(self.loss, ClippedValue):
            raise SpecError("loss is the policy's, and ClippedValue the value model's; set value_loss to it")
        if not any("return" in rule.gives() for rule in self.credit):
            raise SpecError("no credit rule gives returns to the value model; add credit.gae.GAE, or use Online")

    def estimate(self, types: Callable[[At], Type]) -> float:
        if self.budget:
            return self.budget.estimate(types)
        tokens = tokens_guess(self.steps * self.prompts * self.group, self.sampling)
        return super().estimate(types) + 8.0 * need_model(types, self.value, HEADS).params * tokens

    def run(self, ctx: Any) -> None:
        _PPO(self, ctx).run()


class _PPO(Loop):
    """The state of one running `PPO`."""

    stage: PPO

    def __init__(self, stage: PPO, ctx: Any):
        from tutelage.learn.value import ValueLearner, load_value

        super().__init__(stage, ctx)
        model = load_value(ctx.input(stage.value), ctx.device)
        self.value = ValueLearner(model, stage.value_optimizer, stage.clip, stage.micro_tokens, stage.dtype)

    def _assign(self, drawn: Sequence[Sample]) -> tuple[list[Sample], dict[str, float]]:
        asked = [s for s in drawn if s.mask.any()]
        for sample, signal in zip(asked, self.value.values(asked), strict=True):
            sample.signals["value"] = signal
        self.ctx.cost.spend("scored", sum(len(s.tokens) for s in asked), self.value.params)
        return super()._assign(drawn)

    def _learn(self, part: list[Sample], step: int, number: int) -> dict[str, float]:
        metrics = super()._learn(part, step, number)
        found = self.value.forward_backward(part, self.stage.value_loss)
        found |= self.value.step(self.stage.schedule.factor(step, self.total))
        self.ctx.cost.spend("trained", sum(len(s.tokens) for s in part), self.value.params)
        return metrics | {f"value/{name}": x for name, x in found.items()}

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "value": self.value.state()}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.value.restore(state["value"])

    def _publish(self, step: int | None = None) -> None:
        from tutelage.model.folder import save_model

        super()._publish(step)
        save_model(self.value.model, self.policy.tokenizer, self.ctx.output("value", step))
