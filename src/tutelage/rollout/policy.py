"""A policy in memory: model, tokenizer, engine, and what it has cost. Shared by the stages that sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage.envs.base import Env
from tutelage.model.folder import load_model, load_tokenizer, matmul_params
from tutelage.rollout.base import Sampling
from tutelage.rollout.driver import Driver
from tutelage.rollout.local import LocalEngine
from tutelage.text.template import Template


class Policy:
    """Loads a model folder; the engine shares the model's weights, so an in-place update needs only `refresh`."""

    def __init__(self, folder: Path, slots: int, dtype: str | None = None):
        self.model, self.tokenizer = load_model(folder), load_tokenizer(folder)
        self.engine = LocalEngine(self.model, self.tokenizer, slots, dtype)
        self.params = matmul_params(self.model)

    def driver(self, template: Template, env: Env, sampling: Sampling) -> Driver:
        return Driver(self.engine, self.tokenizer, template, env, sampling)

    def refresh(self, version: int) -> None:
        """Tells the engine that the weights have moved."""
        self.engine.load(None, version)

    def charge(self, cost: Any) -> None:
        """Books the tokens drawn since the last call."""
        cost.spend("sampled", self.engine.sampled, self.params)
        cost.spend("prefilled", self.engine.prefilled, self.params)
        self.engine.sampled = self.engine.prefilled = 0
