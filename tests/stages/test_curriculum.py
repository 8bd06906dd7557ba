"""Curricula: which tasks a step asks, against closed forms and counts."""

import numpy as np
import pytest

from tutelage.stages.curriculum import EasyToHard, MovingGaussian, Shuffled, UniformDraw

RATES = np.round(np.random.default_rng(0).random(40) * 8) / 8  # many equal ones, as rates of 8 replies are


def naive_window(rates, size, step, total):
    """Rates, as a sorted multiset, of the window that starts at its share of the way."""
    ranked = sorted(rates, reverse=True)
    first = round((len(rates) - size) * step / (total - 1))
    return sorted(ranked[first : first + size])


@pytest.mark.parametrize("step", range(7))
def test_easy_to_hard_is_a_window_over_the_sorted_pool(step):
    picked = EasyToHard().pick(RATES, 6, step, 7, seed=3)
    assert len(set(picked)) == 6
    assert sorted(RATES[picked]) == naive_window(RATES, 6, step, 7)


def test_easy_to_hard_begins_with_the_easiest_and_ends_with_the_hardest():
    ranked = sorted(RATES)
    first, last = (RATES[EasyToHard().pick(RATES, 6, step, 50, seed=0)] for step in (0, 49))
    assert sorted(first) == ranked[-6:]
    assert sorted(last) == ranked[:6]
    means = [RATES[EasyToHard().pick(RATES, 6, step, 50, seed=0)].mean() for step in range(50)]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("curriculum", [EasyToHard(), MovingGaussian(), UniformDraw(), Shuffled(of=EasyToHard())], ids=repr)
def test_further_draws_of_a_step_ask_other_tasks(curriculum):
    drawn = [curriculum.pick(RATES, 10, 2, 5, 1, draw) for draw in range(4)]
    assert sorted(i for part in drawn for i in part) == list(range(40))
    assert curriculum.pick(RATES, 10, 2, 5, 1, draw=4) == drawn[0]


def test_a_further_draw_of_easy_to_hard_takes_the_nearest_ranks():
    rates = np.linspace(1, 0, 21)  # rank = index
    curriculum = EasyToHard()
    assert sorted(curriculum.pick(rates, 5, 1, 3, 0)) == [8, 9, 10, 11, 12]
    assert sorted(curriculum.pick(rates, 4, 1, 3, 0) + curriculum.pick(rates, 4, 1, 3, 0, draw=1)) == list(range(6, 14))


def test_a_pool_smaller_than_a_step_is_asked_again():
    assert sorted(UniformDraw().pick(RATES[:3], 7, 0, 5, 0)) == sorted(
        [0, 1, 2] * 2 + [UniformDraw().pick(RATES[:3], 1, 0, 5, 0)[0]]
    )


def test_moving_gaussian_draws_in_proportion_to_its_weights():
    """The first draw by w/Σw; the second, given the first, by what is left: drawing one after another without replacement."""
    rates, curriculum = np.array([1.0, 0.8, 0.5, 0.45, 0.0]), MovingGaussian(first=0.7, last=0.3, sigma=0.3)
    step, total, n = 1, 3, 5_000
    target = 0.7 + 0.5 * (0.3 - 0.7)
    w = np.exp(-((rates - target) ** 2) / (2 * 0.3**2))
    first, second = np.zeros(5), np.zeros((5, 5))
    for seed in range(n):
        a, b = curriculum.pick(rates, 2, step, total, seed)
        first[a] += 1
        second[a, b] += 1
    assert np.abs(first / n - w / w.sum()).max() < 3 * 0.5 / np.sqrt(n)  # at most three standard errors of a share
    for a in range(5):
        rest = np.where(np.arange(5) == a, 0, w)
        seen = second[a].sum()
        assert np.abs(second[a] / seen - rest / rest.sum()).max() < 4 * 0.5 / np.sqrt(seen)


def test_moving_gaussian_follows_its_target_and_the_control_does_not():
    rates = np.linspace(0, 1, 400)
    for step, target in ((0, 0.8), (10, 0.5), (20, 0.2)):
        mine = rates[MovingGaussian(sigma=0.05).pick(rates, 40, step, 21, seed=step)]
        assert mine.mean() == pytest.approx(target, abs=0.05)
        assert mine.std() < 0.1
    spread = [rates[UniformDraw().pick(rates, 40, step, 21, 0)].mean() for step in range(21)]
    assert np.abs(np.array(spread) - 0.5).max() < 0.2


def test_trap_far_tasks_have_weights_below_the_smallest_float():
    """exp(−(0.9)²/2·0.01²) is 0 in floats; a naive draw by weights could then not fill a step."""
    rates = np.array([0.0] * 5 + [0.9])
    assert np.exp(-((0.0 - 0.9) ** 2) / (2 * 0.01**2)) == 0
    picked = MovingGaussian(first=0.9, sigma=0.01).pick(rates, 4, 0, 10, 0)
    assert picked[0] == 5
    assert len(set(picked)) == 4


def test_draws_are_fixed_by_seed_and_step():
    draw = lambda step, seed: UniformDraw().pick(RATES, 8, step, 9, seed)  # noqa: E731
    assert draw(2, 1) == draw(2, 1)
    assert draw(2, 1) != draw(3, 1)
    assert draw(2, 1) != draw(2, 2)


@pytest.mark.parametrize("of", [EasyToHard(), MovingGaussian()], ids=repr)
def test_shuffled_asks_the_same_steps_in_another_order(of):
    """The same batches, each once; over seeds, no place of the run is easier than another."""
    ordered = [of.pick(RATES, 6, step, 12, seed=3) for step in range(12)]
    control = [Shuffled(of=of).pick(RATES, 6, step, 12, seed=3) for step in range(12)]
    assert control != ordered
    assert sorted(control) == sorted(ordered)
    places = np.array(
        [[RATES[Shuffled(of=of).pick(RATES, 6, step, 12, seed)].mean() for step in (0, 11)] for seed in range(200)]
    )
    spread = places.std() / np.sqrt(200)
    assert abs(places[:, 0].mean() - places[:, 1].mean()) < 4 * np.sqrt(2) * spread
    assert abs(RATES[ordered[0]].mean() - RATES[ordered[-1]].mean()) > 20 * spread
