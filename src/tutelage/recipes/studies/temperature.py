"""Should the sampling temperature fall or rise while a policy is trained by RL? Two published rules, and constants between.

Kimi K2 lets it fall (arXiv 2507.20534, section 3.2), GLM-4.5 raises it when the reward settles, under a budget of
validation (arXiv 2508.06471, section 3.2). The range is the same for both, 0.7 to 1.3, and its ends and its middle are
controls. All else is the quickstart's: the SFT policy, the tasks, the specialists' settings and steps.
What was seen: docs/results/temperature.md.
"""

from __future__ import annotations

from typing import Any

from tutelage.graph import At, Goals, Table
from tutelage.recipes.quickstart import LONGEST, measured, specialist, started
from tutelage.rollout.base import Sampling
from tutelage.stages.temperature import Decay, RaiseOnPlateau

LOW, HIGH = 0.7, 1.3
LADDER = (0.85, 1.0, 1.15, HIGH)


def temperature(seed: int = 0, domains: tuple[str, ...] = ("sum", "sort")) -> Goals:
    """Falling, rising and constant temperatures in RL, on two of the quickstart's domains."""
    tasks, _, sft = started(seed)
    rising = RaiseOnPlateau(select_on=tasks.out("dev"), tried=LADDER, window=5, gain=0.02, limit=125, samples=2)
    arms: dict[str, dict[str, Any]] = {
        "constant 1.0": {},
        "falling 1.3 to 0.7": {"sampling": _at(HIGH), "temperature": Decay(last=LOW)},
        "rising from 0.7": {"sampling": _at(LOW), "temperature": rising},
        "constant 0.7": {"sampling": _at(LOW)},
        "constant 1.3": {"sampling": _at(HIGH)},
    }
    rows: dict[str, dict[str, At]] = {"sft": {d: measured("sft", sft, tasks, d) for d in domains}}
    for arm, changes in arms.items():
        for domain in domains:
            trained = specialist(domain, tasks, sft, **{"name": f"rl-{domain} {arm}", "seed": seed, **changes})
            rows.setdefault(arm, {})[domain] = measured(arm, trained, tasks, domain)
    stages = tuple(at for cells in rows.values() for at in cells.values())
    return Goals(recipe="temperature", stages=stages, table=Table(rows=rows), seed=seed)


def _at(value: float) -> Sampling:
    return Sampling(temperature=value, max_new_tokens=LONGEST)
