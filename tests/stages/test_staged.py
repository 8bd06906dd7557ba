"""Staged teachers: whose turn it is, when it changes, resuming, and what is refused."""

import pytest

from tests.stages.test_loops import mopd, refused, same, weights
from tests.stages.toy import INIT, make, rl
from tutelage.context import Stopped
from tutelage.credit.group import GroupRelative
from tutelage.graph import key
from tutelage.learn.optim import AdamW
from tutelage.losses.policy import DAPO
from tutelage.spec import UserError
from tutelage.stages.model import NewModel
from tutelage.stages.staged import AtKL, AtSteps, Staged
from tutelage.store import Store

CLIMB = rl(name="climb", optimizer=AdamW(lr=0.03), steps=4, checkpoints=(1, 2))
LAST = {"low": CLIMB.out(), "high": rl(name="high", domains=("high",)).out()}


def staged(switch, steps=6, **more):
    order = Staged(teachers={"low": (CLIMB.out(step=1), CLIMB.out(step=2))}, switch=switch)
    return mopd(**{"teachers": LAST, "staged": order, "steps": steps, **more})


def asked(store, stage, monkeypatch):
    """The folders of the teachers that scored, in order."""
    from tutelage.learn.learner import ModelScorer, Scorers

    seen, names = [], {}
    of, score = Scorers.of, ModelScorer.score

    def remember(self, folder, name):
        scorer = of(self, folder, name)
        names[id(scorer)] = folder
        return scorer

    monkeypatch.setattr(Scorers, "of", remember)
    monkeypatch.setattr(ModelScorer, "score", lambda self, *a: seen.append(names[id(self)]) or score(self, *a))
    make(stage, store)
    return seen


def test_teachers_take_turns_at_the_steps_given_and_other_domains_keep_theirs(tmp_path, monkeypatch):
    store, stage = Store(tmp_path / "s"), staged(AtSteps(steps=(2, 5)))
    for at in LAST.values():
        make(at.of, store)
    seen = asked(store, stage, monkeypatch)
    path = lambda step: store.path(key(CLIMB), "policy", step)  # noqa: E731
    low = [p for p in seen if p.parent == path(None).parent]
    assert low == [path(1)] * 2 + [path(2)] * 3 + [path(None)]
    assert len(seen) - len(low) == 6
    assert [m["teacher_stage"] for m in store.metrics(key(stage))] == [0, 0, 1, 1, 1, 2]


def test_a_teacher_staged_before_itself_changes_nothing(tmp_path):
    store = Store(tmp_path / "s")
    plain = mopd(teachers=LAST, steps=3)
    twice = mopd(teachers=LAST, steps=3, staged=Staged(teachers={"low": (CLIMB.out(),)}, switch=AtSteps(steps=(1,))))
    make(plain, store)
    make(twice, store)
    assert same(weights(store, plain), weights(store, twice))
    assert key(plain) != key(twice)
    assert key(mopd(staged=None)) == key(mopd())


@pytest.mark.parametrize("switch", [AtSteps(steps=(2, 3)), AtKL(below=9.0, window=2), AtKL(below=1e-9, longest=2)])
def test_stopped_anywhere_it_resumes_to_the_same_bits(switch, tmp_path):
    stage = staged(switch)
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    make(stage, whole)
    for stop_after in (1, 2, 2):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    make(stage, cut)
    assert same(weights(whole, stage), weights(cut, stage))
    turns = [[m["teacher_stage"] for m in s.metrics(key(stage))] for s in (whole, cut)]
    assert turns[0] == turns[1]
    assert turns[0][-1] == 2


def test_the_next_stage_begins_when_the_mean_kl_of_the_window_is_low():
    switch, state = AtKL(below=0.5, window=2), {"stage": 0, "since": 0}
    stages = []
    for step, kl in enumerate([0.4, 0.7, 0.4, 0.5, 0.1, 0.8, 0.3, 0.3], 1):
        state = switch.after(state, step, {"kl": kl})
        stages.append(state["stage"])
    assert stages == [0, 0, 0, 1, 1, 2, 2, 3]  # 0.55 0.55 0.45, then from anew 0.45, then 0.3
    state = AtKL(below=1e-9, longest=3).after({"stage": 0, "since": 4}, 7, {"kl": 5.0})
    assert (state["stage"], state["since"]) == (1, 7)


def test_a_switch_that_watches_what_is_not_there():
    with pytest.raises(UserError, match=r"kl.*AtSteps"):
        AtKL(below=1.0).after({"stage": 0, "since": 0}, 1, {"reward": 1.0})


def test_what_is_refused_before_anything_runs():
    refused(staged(AtSteps(steps=(2,))), "1 steps for 3 stages", "give 2")
    refused(staged(AtSteps(steps=(2, 6))), "step 6", "never teaches")
    other = NewModel(name="other", alphabet="abc", width=32, layers=1, mlp=48)
    turns = AtSteps(steps=(1,))
    refused(mopd(staged=Staged(teachers={"low": (other.out(),)}, switch=turns)), "teacher 1 of 'low'", "tokenizer")
    refused(mopd(staged=Staged(teachers={"lwo": (INIT.out(),)}, switch=turns)), "'lwo'", "low")
    alone = {"teachers": {}, "credit": (GroupRelative(),), "loss": DAPO()}
    refused(rl(staged=Staged(teachers={"low": (INIT.out(),)}, switch=turns), **alone), "staged", "set teachers")
