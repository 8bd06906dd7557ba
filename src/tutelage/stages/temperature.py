"""Temperature schedules of an online stage. Without one the temperature is that of ``sampling``; with one, that is T₀.

    Decay             T = last + (T₀ − last)(1 − t), or with ½(1 + cos πt) for 1 − t; t is 0 at the first step, 1 at the last
    RaiseOnPlateau    T ← max{T' ∈ {T} ∪ tried : T' ≥ T, score(T') ≥ max score − loss}, whenever the reward is flat

Two published rules that contradict each other: Kimi K2 (arXiv 2507.20534, section 3.2) starts hot and cools down, from
exploring to using what was found; its values and shape are not published. GLM-4.5 (arXiv 2508.06471, section 3.2) heats up
when the reward of its rollouts has settled: it measures a range of temperatures on held-out tasks and takes the highest that
costs at most 1 % against the best. When a reward has settled, and which temperatures are tried, is not published: here it is
flat when the mean of ``window`` steps is less than ``gain`` above that of the ``window`` before, and the 1 % are
points of the mean score (0.01), the mean over domains. Every temperature of a trial answers the same tasks with the same
random numbers. Trials read development tasks, never those that are trained on; their tokens are counted apart
(``development_tokens``) and on no budget.

Leaves out: temperatures by domain or by token, and learned ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from tutelage.graph import At
from tutelage.spec import Spec, SpecError

State = dict[str, Any]
"""What a schedule must not forget: plain numbers and lists, kept in the stage's checkpoints."""
ROUNDING = 1e-9


class TemperatureSchedule(Spec):
    """Base of all temperature schedules."""

    def check(self, first: float) -> None:
        """Raises `SpecError` where the schedule cannot start from this temperature."""
        if first == 0:
            raise SpecError("sampling.temperature is 0, greedy: a schedule has nothing to start from; set it above 0")

    def begin(self, first: float) -> State:
        """The state before the first step."""
        return {"temperature": first}

    def at(self, state: State, step: int, total: int) -> float:
        """The temperature of step ``step`` (from 0) of ``total``."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def after(self, state: State, reward: float, score: Callable[[float], float]) -> tuple[State, dict[str, float]]:
        """The state after a step with this mean reward, and metrics; ``score`` tries a temperature on development tasks."""
        return state, {}


class Decay(TemperatureSchedule):
    """Falls from ``sampling.temperature`` to ``last``."""

    last: float = Field(gt=0)
    shape: Literal["linear", "cosine"] = "linear"

    def check(self, first: float) -> None:
        super().check(first)
        if self.last > first:
            raise SpecError(f"temperature.last {self.last} is above sampling.temperature {first}; a decay ends below its start")

    def at(self, state: State, step: int, total: int) -> float:
        done = step / max(1, total - 1)
        left = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.last + (state["temperature"] - self.last) * left


class RaiseOnPlateau(TemperatureSchedule):
    """Raises the temperature when the reward is flat, as far as the development score allows."""

    select_on: At
    """The development tasks of the stage's domains."""
    tried: tuple[float, ...] = Field(min_length=1)
    """Temperatures to try, rising; those above the present one are."""
    window: int = Field(10, ge=1)
    """steps"""
    gain: float = 0.01
    """Of the mean reward, from window to window; less is a plateau."""
    loss: float = Field(0.01, ge=0)
    """Of the development score against the best of the trial; more is too much."""
    limit: int = Field(64, ge=1)
    """development tasks a domain"""
    samples: int = Field(1, ge=1)
    """replies a development task and temperature"""
    trials: int = Field(4, ge=0)
    """at most"""

    @field_validator("tried")
    @classmethod
    def _rises(cls, tried: tuple[float, ...]) -> tuple[float, ...]:
        if any(t <= 0 for t in tried) or list(tried) != sorted(set(tried)):
            raise ValueError(f"temperatures to try must be above 0 and rise; got {', '.join(map(str, tried))}")
        return tried

    def check(self, first: float) -> None:
        super().check(first)
        if self.tried[-1] <= first:
            raise SpecError(f"temperature.tried has nothing above sampling.temperature {first}; give it higher ones")

    def begin(self, first: float) -> State:
        return {"temperature": first, "rewards": [], "trials": 0}

    def at(self, state: State, step: int, total: int) -> float:
        return float(state["temperature"])

    def after(self, state: State, reward: float, score: Callable[[float], float]) -> tuple[State, dict[str, float]]:
        state = {**state, "rewards": [*state["rewards"], reward][-2 * self.window :]}
        higher = [t for t in self.tried if t > state["temperature"]]
        if not higher or state["trials"] >= self.trials or not self.flat(state["rewards"]):
            return state, {}
        scores = {t: score(t) for t in (state["temperature"], *higher)}
        enough = max(scores.values()) - self.loss - ROUNDING
        chosen = max(t for t, found in scores.items() if found >= enough)
        after = {"temperature": chosen, "rewards": [], "trials": state["trials"] + 1}
        return after, {f"dev/T={t:g}": found for t, found in scores.items()}

    def flat(self, rewards: Sequence[float]) -> bool:
        """Whether the last ``window`` rewards are, in the mean, less than ``gain`` above the ``window`` before."""
        if len(rewards) < 2 * self.window:
            return False
        before, now = rewards[-2 * self.window : -self.window], rewards[-self.window :]
        return sum(now) / self.window < sum(before) / self.window + self.gain
