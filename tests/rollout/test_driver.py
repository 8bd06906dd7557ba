"""The driver: order, groups, seeds, stop strings, verifiers that fail or dawdle, several turns."""

import asyncio

import numpy as np
import pytest

from tests import tiny
from tutelage.envs.base import Env
from tutelage.envs.single import SingleTurn
from tutelage.rollout.base import Sampling
from tutelage.rollout.driver import Driver, request_seed
from tutelage.rollout.local import LocalEngine
from tutelage.text.template import Chat, Document
from tutelage.types import Score, Task
from tutelage.verify.base import Verifier

TASKS = [Task(f"t{i}", "d", ({"role": "user", "content": f"{i}+{i}"},), gold=str(2 * i)) for i in range(6)]


class Moody(Verifier):
    """Raises for t1, is slow for t2, and otherwise pays the reply's length."""

    async def __call__(self, task, reply, ctx=None):
        if task.id == "t1":
            raise RuntimeError("no scorer today")
        if task.id == "t2":
            await asyncio.sleep(0.2)
        return Score(float(len(reply)))


class TwoTurns(Env):
    async def __call__(self, task, ask, ctx=None):
        first = await ask(task.messages)
        again = await ask([*task.messages, {"role": "assistant", "content": first}, {"role": "user", "content": "again"}])
        return Score(float(first == again))


def driver(env=None, slots=8, template=None, **how):
    engine = LocalEngine(tiny.model(), tiny.tokenizer(), slots)
    how = {"max_new_tokens": 8, **how}
    return Driver(engine, tiny.tokenizer(), template or Chat(), env or SingleTurn(verifier=Moody()), Sampling(**how))


def test_samples_come_in_order_whole_groups_and_scored():
    drawn = driver().collect(TASKS, 3, seed=5)
    assert [s.task.id for s in drawn] == [t.id for t in TASKS for _ in range(3)]
    assert [s.group for s in drawn] == [t.id for t in TASKS for _ in range(3)]
    for s in drawn:
        assert np.array_equal(s.signals["behaviour_logp"].index, s.trained)
        if s.task.id == "t1":  # an error of that sample alone, never of the run
            assert s.score.error == "RuntimeError: no scorer today"
        else:
            assert s.scalars["reward"] == len(s.text)
            assert s.score.error is None


def test_the_same_seed_draws_the_same_whatever_the_slots():
    runs = [driver(slots=n).collect(TASKS, 2, seed=5) for n in (2, 64)]
    assert [s.text for s in runs[0]] == [s.text for s in runs[1]]
    assert [s.text for s in driver().collect(TASKS, 2, seed=6)] != [s.text for s in runs[0]]


def test_a_task_that_comes_twice_is_two_groups_with_draws_of_their_own():
    drawn = driver().collect([TASKS[0], TASKS[3], TASKS[0]], 3, seed=5)
    assert [s.group for s in drawn] == ["t0"] * 3 + ["t3"] * 3 + ["t0#1"] * 3
    assert [s.text for s in drawn[:3]] != [s.text for s in drawn[6:]]
    alone = driver().collect([TASKS[0]], 6, seed=5)
    assert [s.text for s in alone] == [s.text for s in drawn[:3] + drawn[6:]]


def test_the_mask_covers_the_reply_alone_and_the_end_token_with_it():
    for s in driver(max_new_tokens=40).collect(TASKS, 4, seed=1):
        prompt = Chat().prompt(tiny.tokenizer(), s.task.messages)
        assert s.tokens[: len(prompt)].tolist() == prompt
        assert s.mask.tolist() == [False] * len(prompt) + [True] * (len(s.tokens) - len(prompt))
        assert (s.stop == "stop") == (s.tokens[-1] == tiny.tokenizer().eos_token_id)


def test_documents_end_at_their_stop_string():
    drawn = driver(template=Document(format="Q: {prompt}\nA: ", stop=("e",)), max_new_tokens=40).collect(TASKS, 4, seed=1)
    assert all("e" not in s.text for s in drawn)
    assert any(s.stop == "stop" and s.tokens[-1] != tiny.tokenizer().eos_token_id for s in drawn)


def test_every_turn_of_an_episode_is_a_sample_with_the_episodes_score():
    drawn = driver(env=TwoTurns()).collect(TASKS[:2], 2, seed=3)
    assert len(drawn) == 8
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        assert first.score is second.score
        assert len(second.tokens) > len(first.tokens)


def test_an_environment_that_raises_ends_the_run_with_its_own_error():
    class Broken(Env):
        async def __call__(self, task, ask, ctx=None):
            raise ZeroDivisionError("in the environment")

    with pytest.raises(ZeroDivisionError):
        driver(env=Broken()).collect(TASKS, 1, seed=0)


def test_a_verifier_that_never_answers_is_an_error_of_its_sample():
    class Asleep(Verifier):
        async def __call__(self, task, reply, ctx=None):
            await asyncio.sleep(30 if task.id == "t3" else 0)
            return Score(1.0)

    drawn = driver(env=SingleTurn(verifier=Asleep(), timeout_s=0.2)).collect(TASKS, 1, seed=0)
    assert [bool(s.score.error) for s in drawn] == [t.id == "t3" for t in TASKS]
    assert "late" in drawn[3].score.error


def test_request_seeds_differ_in_every_part():
    seeds = {request_seed(s, t, r, n) for s in range(3) for t in ("a", "b") for r in range(3) for n in range(2)}
    assert len(seeds) == 36
    assert all(0 <= s < 2**63 for s in seeds)
