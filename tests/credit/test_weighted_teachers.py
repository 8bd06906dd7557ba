"""Several teachers a prompt: V4's weighted sum against a naive loop and against the geometric mean it is the KL to."""

import asyncio

import numpy as np
import pytest
import torch

from tests.credit.test_teacher_credit import Bigram, distil, sample
from tutelage.credit.base import CreditContext
from tutelage.credit.teacher import Teacher
from tutelage.credit.weighted import WeightedTeachers
from tutelage.losses.distill import FullReverseKL
from tutelage.losses.weighted import WeightedReverseKL
from tutelage.spec import SpecError

TEACHERS = {"math": Bigram("m", width=3, seed=1), "code": Bigram("c", width=5, seed=2), "art": Bigram("a", seed=3)}
WEIGHTS = {"math": {"math": 0.7, "code": 0.2, "art": 0.1}, "code": {"code": 1.0}, "art": {"math": 0.5, "art": 0.5}}


def weighted(weights=WEIGHTS, teachers=TEACHERS, temperature=0.7):
    samples = [sample(domain, seed=i) for i, domain in enumerate(weights)]
    rule = WeightedTeachers(weights=weights)
    rule.check(tuple(weights), (), 1)
    asyncio.run(rule.assign(samples, CreditContext(temperature, teachers)))
    return samples


def by_hand(samples, student, temperature=0.7):
    """Σ_t Σ_i w_i KL(student ‖ teacher i) and its gradient, autograd over dense distributions."""
    weight, total = student.weight.clone().requires_grad_(), 0.0
    for s in samples:
        p = (student.hidden(s) @ weight.T / temperature).log_softmax(-1)
        for name, w in WEIGHTS[s.domain].items():
            q = (TEACHERS[name](TEACHERS[name].hidden(s)) / temperature).log_softmax(-1)
            total = total + w * (p.exp() * (p - q)).sum()
    total.backward()
    return total.item(), weight.grad


def test_value_and_gradient_are_the_weighted_sum():
    samples, student = weighted(), Bigram(seed=9)
    expected, expected_gradient = by_hand(samples, student)
    value, gradient = distil(WeightedReverseKL(), samples, student, TEACHERS, 0.7)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_kl_to_the_geometric_mean():
    (s,), student = [x for x in weighted() if x.domain == "math"], Bigram(seed=9)
    _, gradient = distil(WeightedReverseKL(), [s], student, TEACHERS, 0.7)
    logs = [w * (TEACHERS[n](TEACHERS[n].hidden(s)) / 0.7).log_softmax(-1) for n, w in WEIGHTS["math"].items()]
    mean, weight = sum(logs).log_softmax(-1), student.weight.clone().requires_grad_()
    p = (student.hidden(s) @ weight.T / 0.7).log_softmax(-1)
    (p.exp() * (p - mean)).sum().backward()
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-5)
    arithmetic = sum(w * (TEACHERS[n](TEACHERS[n].hidden(s)) / 0.7).softmax(-1) for n, w in WEIGHTS["math"].items()).log()
    assert (arithmetic - mean).abs().max() > 0.01


def test_one_teacher_of_weight_one_is_the_plain_loss():
    own = {d: {d: 1.0} for d in TEACHERS}
    plain, student = [sample(d, seed=i) for i, d in enumerate(own)], Bigram(seed=9)
    asyncio.run(Teacher(want="hidden").assign(plain, CreditContext(0.7, TEACHERS)))
    one = distil(FullReverseKL(), plain, student, TEACHERS, 0.7)
    several = distil(WeightedReverseKL(), weighted(own), student, TEACHERS, 0.7)
    assert one[0] == pytest.approx(several[0], rel=1e-6)
    assert torch.equal(one[1], several[1])


def test_teachers_equal_to_the_student_move_nothing():
    same = dict.fromkeys(TEACHERS, Bigram(seed=9))
    samples = weighted(teachers=same)
    assert samples[0].signals["teacher"].values.tolist() == [[0]] * 3  # one model, asked once with all its weights
    assert np.allclose(samples[0].signals["teacher_weight"].values, 1.0)
    assert not distil(WeightedReverseKL(), samples, Bigram(seed=9), same, 0.7)[1].any()


def test_signals_say_who_taught_and_with_what_weight():
    math, code, _ = weighted()
    assert math.signals["teacher"].values.shape == (3, 3)
    assert math.signals["teacher_hidden"].values.shape == (3, 3, 5)
    assert code.signals["teacher"].values.tolist() == [[1, -1, -1]] * 3
    assert code.signals["teacher_weight"].values.tolist() == [[1.0, 0.0, 0.0]] * 3
    assert math.signals["teacher"].provenance["models"] == {"a": 0.1, "c": 0.2, "m": 0.7}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"math": {"math": 1.0}}, "nothing of domain 'code'"),
        ({"math": {"maths": 1.0}, "code": {"code": 1.0}}, "'maths'.*math"),
        ({"math": {"math": 0.0}, "code": {"code": 1.0}}, "'math' must be positive"),
        ({"math": {}, "code": {"code": 1.0}}, "'math' must be positive"),
    ],
)
def test_weights_that_do_not_fit_the_domains_are_refused(weights, says):
    with pytest.raises(SpecError, match=says):
        WeightedTeachers(weights=weights).check(("math", "code"), (), 1)
