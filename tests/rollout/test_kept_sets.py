"""The sets that top-p and top-k had kept, as samples carry them."""

import numpy as np
import torch

from tests import tiny
from tests.stages.toy import ENV
from tutelage.learn.learner import Learner
from tutelage.rollout.base import Sampling
from tutelage.rollout.draw import kept
from tutelage.rollout.driver import Driver, filled
from tutelage.rollout.local import LocalEngine
from tutelage.text.template import Chat
from tutelage.types import Task

TASKS = [Task(str(i), "d", ({"role": "user", "content": word},), "x") for i, word in enumerate(("a", "bc", "def"))]


def draw(sets):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    sampling = Sampling(top_p=0.7, top_k=9, max_new_tokens=5)
    driver = Driver(LocalEngine(model, tokenizer, slots=4), tokenizer, Chat(), ENV, sampling)
    driver.sets = sets
    return model, tokenizer, driver.collect(TASKS, 3, 0)


def test_kept_sets_are_those_of_a_full_forward():
    model, tokenizer, samples = draw(True)
    learner = Learner(model, vocab=len(tokenizer))
    for s in samples:
        found = s.signals["kept"].values
        with torch.no_grad():
            out = learner.output(learner.batch([s]))
            logp = out.head(out.hidden).log_softmax(-1)
        expected = kept(logp, torch.full((len(logp),), 0.7), torch.full((len(logp),), 9))
        assert [sorted(row[row >= 0].tolist()) for row in found] == [row.nonzero()[:, 0].tolist() for row in expected]
        for token, row, value in zip(s.tokens[s.trained], found, s.signals["kept_logp"].values, strict=True):
            assert token in row
            assert value <= 0
        inside = torch.stack([r[torch.from_numpy(f[f >= 0]).long()].logsumexp(0) for r, f in zip(logp, found, strict=True)])
        full = s.signals["behaviour_logp"].values - inside.numpy()
        np.testing.assert_allclose(full, s.signals["kept_logp"].values, atol=1e-5)


def test_sets_are_carried_only_where_asked_and_change_no_draw():
    with_sets, without = draw(True)[2], draw(False)[2]
    assert all("kept" not in s.signals for s in without)
    for a, b in zip(with_sets, without, strict=True):
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.signals["kept_logp"].values, b.signals["kept_logp"].values)


def test_rows_are_filled_up_with_minus_one():
    made = filled([np.array([3, 5]), np.array([1]), np.array([2, 4, 6])])
    assert made.tolist() == [[3, 5, -1], [1, -1, -1], [2, 4, 6]]
    assert made.dtype == np.int32
