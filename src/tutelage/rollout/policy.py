"""A policy in memory: model, tokenizer, engine, and what it has cost. Shared by the stages that sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage.envs.base import Env
from tutelage.model.adapter import Base, save_adapter
from tutelage.model.folder import load_model, load_tokenizer, matmul_params, save_model
from tutelage.model.lora import Adapter
from tutelage.rollout.base import Sampling
from tutelage.rollout.driver import Driver
from tutelage.rollout.local import local_engine
from tutelage.text.template import Template


class Policy:
    """Loads a model folder; the engine shares the model's weights, so an in-place update needs only `refresh`.

    With an ``adapter`` to be trained, which begins from ``seed``, it is published as that alone.
    """

    def __init__(
        self,
        folder: Path,
        slots: int,
        dtype: str | None = None,
        adapter: Adapter | None = None,
        seed: int = 0,
        device: str = "cpu",
    ):
        self.model, self.tokenizer = load_model(folder, device=device), load_tokenizer(folder)
        self._base = Base.of(folder) if adapter else None
        if adapter:
            adapter.attach(self.model, seed)
        self.engine = local_engine(self.model, self.tokenizer, slots, dtype)
        self.params = matmul_params(self.model)

    def driver(self, template: Template, env: Env, sampling: Sampling) -> Driver:
        return Driver(self.engine, self.tokenizer, template, env, sampling)

    def refresh(self, version: int) -> None:
        """Tells the engine that the weights have moved."""
        self.engine.load(None, version)

    def save(self, folder: Path) -> None:
        """Writes what is trained: the whole model, or the adapter and where its base is."""
        if self._base:
            save_adapter(self.model, self.tokenizer, folder, self._base)
        else:
            save_model(self.model, self.tokenizer, folder)

    def charge_training(self, cost: Any, tokens: int) -> None:
        """Books the forward and backward passes of an update."""
        cost.spend("adapted" if self._base else "trained", tokens, self.params)

    def charge(self, cost: Any) -> None:
        """Books the tokens drawn since the last call."""
        cost.spend("sampled", self.engine.sampled, self.params)
        cost.spend("prefilled", self.engine.prefilled, self.params)
        self.engine.sampled = self.engine.prefilled = 0
