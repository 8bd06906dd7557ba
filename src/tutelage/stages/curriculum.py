"""Curricula: which tasks of a domain's pool a step asks, by the pass rates that a policy had on them before (`PassRate`).

A curriculum puts the pool into an order at every step; the step asks the first tasks, a further draw (``resample``) the
next ones. With n tasks, b of them a step, and t the share of the steps that is done (0 at the first, 1 at the last):

    EasyToHard        the b tasks from rank t(n − b) on, of the pool sorted from the highest rate to the lowest
    MovingGaussian    b draws without replacement, weights exp(−(rate − μ)² / 2σ²), μ = first + t(last − first)
    UniformDraw       the same draws with equal weights: blind to difficulty
    Shuffled          the steps of another curriculum in a random order: the same tasks as often, blind to the order

The last two are controls. `Shuffled` tells what the order is worth, `UniformDraw` (or no curriculum, where every task comes
once before any comes again) what order and choice are worth together. Draws without replacement take the largest of log weight
+ Gumbel noise, which is drawing one after another in proportion to the weights (Kool et al., arXiv 1903.06059). The moving
Gaussian is that of Nemotron 3 Nano (arXiv 2512.20848, section 3.2.2): within each domain, the mean moves linearly towards
harder tasks; its ends and its width are not published, and the defaults here are ours. There the batch's rates follow the
Gaussian; here the pool's do, times the Gaussian.

Leaves out: rates that follow the policy, shares of the domains that move (they stay equal), and difficulty by level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tutelage.spec import Spec

if TYPE_CHECKING:
    import numpy as np


class Curriculum(Spec):
    """Base of all curricula."""

    def order(self, rates: np.ndarray, size: int, step: int, total: int, seed: int) -> np.ndarray:
        """int [n]: the indices of a pool with pass rates [n], those that a step of ``size`` tasks asks in front."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def pick(self, rates: np.ndarray, size: int, step: int, total: int, seed: int, draw: int = 0) -> list[int]:
        """The ``size`` tasks that draw number ``draw`` of step ``step`` of ``total`` asks. A pool that runs out begins anew."""
        order = self.order(rates, size, step, total, seed)
        return [int(order[(draw * size + i) % len(order)]) for i in range(size)]


class EasyToHard(Curriculum):
    """A window that moves over the sorted pool from its easiest tasks to its hardest; a further draw widens it."""

    def order(self, rates: np.ndarray, size: int, step: int, total: int, seed: int) -> np.ndarray:
        import numpy as np

        n = len(rates)
        sorted_ = np.lexsort((np.random.default_rng(seed).random(n), -rates))  # equals in an order of the seed's
        first = round(max(0, n - size) * step / max(1, total - 1))
        middle = first + (min(size, n) - 1) / 2
        return sorted_[np.argsort(np.abs(np.arange(n) - middle), kind="stable")]


class Draws(Curriculum):
    """Base of curricula that draw without replacement, by weights."""

    def logits(self, rates: np.ndarray, done: float) -> np.ndarray:
        """Log weights [n], up to a constant, once the share ``done`` of the steps is done."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def order(self, rates: np.ndarray, size: int, step: int, total: int, seed: int) -> np.ndarray:
        import numpy as np

        noise = np.random.default_rng([seed, step]).gumbel(size=len(rates))
        return np.argsort(-(self.logits(rates, step / max(1, total - 1)) + noise), kind="stable")


class MovingGaussian(Draws):
    """A target rate that moves linearly from ``first`` to ``last``, with width ``sigma``."""

    first: float = Field(0.8, ge=0, le=1)
    last: float = Field(0.2, ge=0, le=1)
    sigma: float = Field(0.15, gt=0)

    def logits(self, rates: np.ndarray, done: float) -> np.ndarray:
        target = self.first + done * (self.last - self.first)
        return -((rates - target) ** 2) / (2 * self.sigma**2)


class UniformDraw(Draws):
    """Equal weights, whatever the rates."""

    def logits(self, rates: np.ndarray, done: float) -> np.ndarray:
        return 0.0 * rates


class Shuffled(Curriculum):
    """Another curriculum's steps in a random order, for each domain its own: the control of an order."""

    of: Curriculum

    def order(self, rates: np.ndarray, size: int, step: int, total: int, seed: int) -> np.ndarray:
        import numpy as np

        steps = np.random.default_rng([seed, total]).permutation(total)
        return self.of.order(rates, size, int(steps[step]), total, seed)
