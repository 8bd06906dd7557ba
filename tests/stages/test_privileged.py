"""Self-distillation in the loop: what moves nothing, resuming, costs, what leaks, what is refused, what is learnt."""

from dataclasses import replace

import pytest

from tests.stages.test_loops import refused, same, weights
from tests.stages.toy import DATA, ENV, INIT, Letters, make, rl
from tutelage.context import Stopped
from tutelage.credit.group import GroupRelative
from tutelage.credit.privileged import HintedTeacher, SiblingTeacher
from tutelage.credit.teacher import Teacher
from tutelage.graph import key
from tutelage.learn.optim import AdamW
from tutelage.losses.distill import FullReverseKL, SampledReverseKL
from tutelage.losses.full import FullForwardKL
from tutelage.losses.top_k import TailReverseKL
from tutelage.rollout.base import Sampling
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.fit import Fit
from tutelage.store import Store
from tutelage.text.scores import read_scores

FORMS = [(FullReverseKL(), "hidden"), (SampledReverseKL(), "logp"), (TailReverseKL(), "topk")]


class Blank(Letters):
    """`Letters` whose gold answers say nothing."""

    def run(self, ctx):
        from tutelage.text.rows import write_tasks

        asked = [[{"role": "user", "content": a}] for a in "abcdefghijklm"]
        write_tasks(
            ctx.output("rows"), [{"id": p[0]["content"], "domain": "low", "prompt": p, "gold": "", "meta": {}} for p in asked]
        )


class Bare(Letters):
    """Said to have fewer columns."""

    without: str

    def infer(self, types):
        made = super().infer(types)["rows"]
        return {"rows": replace(made, columns=tuple(c for c in made.columns if c != self.without))}


def hinted(loss=None, want="hidden", **more):
    rule = {n: more.pop(n) for n in ("text", "who", "key") if n in more}
    rule = HintedTeacher(**{"text": "{prompt}{hint}", **rule}, want=want, k=8)
    return rl(**{"name": "opsd", "credit": (rule,), "loss": loss or FullReverseKL(), "optimizer": AdamW(lr=0.01), **more})


def sdpo(**more):
    """A verifier that accepts anything above its half; the reward learns from what has no sibling."""
    credit = (GroupRelative(drop_uniform=False), SiblingTeacher(text="{prompt}={hint}", accepted=0.5, drop=False))
    fields = {"name": "sdpo", "credit": credit, "loss": SampledReverseKL(alpha=0.3), "optimizer": AdamW(lr=0.01)}
    return rl(**{**fields, **more})


@pytest.mark.parametrize("who", ["policy", "teachers"])
@pytest.mark.parametrize(("loss", "want"), FORMS)
def test_a_hint_that_says_nothing_moves_nothing(loss, want, who, tmp_path):
    store = Store(tmp_path / "s")
    teachers = {"low": INIT.out()} if who == "teachers" else {}
    stage = hinted(loss, want, who=who, teachers=teachers, tasks=Blank(name="blank").out(), steps=2)
    make(stage, store)
    assert same(weights(store, stage), weights(store, INIT))
    lines = store.metrics(key(stage))
    assert all(line["kl"] == 0 and line["grad_norm"] == 0 and line["untaught"] == 0 for line in lines)


@pytest.mark.parametrize(("loss", "want"), FORMS)
def test_a_hint_that_says_something_moves_it(loss, want, tmp_path):
    store, stage = Store(tmp_path / "s"), hinted(loss, want, steps=1)
    make(stage, store)
    assert store.metrics(key(stage))[0]["grad_norm"] > 1e-4


@pytest.mark.parametrize("build", [hinted, sdpo])
def test_stopped_anywhere_it_resumes_to_the_same_bits(build, tmp_path):
    stage = build(minibatches=2)
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(stage, whole)
    for stop_after in (1, 2):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(stage, cut)
    assert same(weights(whole, stage), weights(cut, stage))
    assert not same(weights(whole, stage), weights(whole, INIT))
    assert done.cost == resumed.cost


def test_the_policy_teaches_as_it_is_and_its_start_as_it_was(tmp_path):
    store = Store(tmp_path / "s")
    now, start = hinted(), hinted(who="teachers", teachers={"low": INIT.out()})
    one = [hinted(steps=1), hinted(who="teachers", teachers={"low": INIT.out()}, steps=1)]
    for stage in (now, start, *one):
        make(stage, store)
    assert same(*(weights(store, stage) for stage in one))
    assert not same(weights(store, now), weights(store, start))


def test_the_longer_prompt_is_paid_for(tmp_path):
    store, stage = Store(tmp_path / "s"), hinted(steps=2)
    tokens = make(stage, store).cost.tokens
    assert tokens["trained"] == tokens["sampled"] + tokens["prefilled"]
    assert tokens["scored"] == tokens["trained"] + 2 * 4 * 3  # one letter more for each sample


def test_samples_without_a_sibling_are_counted_and_the_rest_goes_on(tmp_path):
    store = Store(tmp_path / "s")
    stage, nobody = sdpo(steps=3), rl(name="n", credit=(SiblingTeacher(accepted=9.0),), loss=SampledReverseKL(), steps=2)
    make(stage, store)
    make(nobody, store)
    assert any(0 < line["untaught"] < 1 for line in store.metrics(key(stage)))
    assert all(line["skipped"] == 0 for line in store.metrics(key(stage)))
    assert [line["untaught"] for line in store.metrics(key(nobody))] == [1.0, 1.0]
    assert same(weights(store, nobody), weights(store, INIT))


def test_trap_no_hint_leaks_into_the_students_own_prompt(tmp_path, monkeypatch):
    from tutelage.learn.learner import Learner
    from tutelage.rollout.local import LocalEngine

    asked, learned = [], []
    submit, learn = LocalEngine.submit, Learner.forward_backward
    monkeypatch.setattr(LocalEngine, "submit", lambda self, r: asked.append(list(r.tokens)) or submit(self, r))
    monkeypatch.setattr(Learner, "forward_backward", lambda self, s, *a, **k: learned.extend(s) or learn(self, s, *a, **k))
    make(hinted(text="{prompt}+{hint}", steps=2), Store(tmp_path / "s"))
    lengths = {int((~s.mask).sum()) for s in learned}
    assert len(asked) == len(learned) == 2 * 4 * 3
    assert lengths == {3}  # a mark, the letter, a mark
    assert sorted(asked) == sorted(s.tokens[~s.mask].tolist() for s in learned)


# --- what is refused before anything runs ---


def test_what_is_refused():
    refused(hinted(tasks=Bare(name="b", without="gold").out()), "no such column", "gold", "set key")
    refused(hinted(tasks=Bare(name="b", without="meta").out(), key="level"), "no such column", "meta")
    refused(rl(credit=(SiblingTeacher(),), loss=SampledReverseKL(), group=1), "group is 1", "2 or more")
    refused(hinted(FullReverseKL(), "logp"), "teacher_hidden", "nothing before it gives")
    refused(hinted(teachers={"low": INIT.out()}), "no credit rule asks them")
    refused(hinted(who="teachers"), "asks teachers, but none are given")
    refused(hinted(tasks=Bare(name="b", without="gold").out(), credit=(Teacher(),), loss=SampledReverseKL()), "none are given")


def test_the_rule_is_keyed():
    assert key(hinted(text="{prompt}{hint}!")) != key(hinted())
    assert key(rl()) == key(rl(credit=(GroupRelative(drop_uniform=False),)))


# --- what it teaches ---


class Copying(Letters):
    """Whatever letter is shown after a colon is the reply; without one, any letter may be."""

    def run(self, ctx):
        from tutelage.text.rows import write_tasks

        letters, rows = "abcdefghijklmnopqrstuvwxyz", []
        for i, a in enumerate(letters):
            for j, b in enumerate(letters):
                for text in (f"{a}:{b}", a):
                    turn = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
                    row = {"id": f"{i} {j} {text}", "domain": "low", "prompt": turn("user", text)}
                    rows.append({**row, "completion": turn("assistant", b), "text": text, "gold": b, "meta": {}})
        write_tasks(ctx.output("rows"), rows)


@pytest.mark.long
def test_gold_hints_teach_what_is_then_known_without_them(tmp_path):
    store = Store(tmp_path / "s")
    begun = INIT.model_copy(update={"layers": 2})
    base = Fit(name="copy", model=begun.out(), data=Copying(name="c").out(), steps=600, rows=64, optimizer=AdamW(lr=0.003))
    start = {"who": "teachers", "teachers": {"low": base.out()}}  # a teacher that moves with its student may fall with it
    fields = {"model": base.out(), "steps": 100, "prompts": 12, "group": 8, "optimizer": AdamW(lr=0.003)}
    stage = hinted(FullForwardKL(), text="{prompt}:{hint}", **start, **fields)

    def accuracy(model):
        score = Evaluate(name="e", model=model.out(), tasks=DATA.out(), domain="low", env=ENV, sampling=Sampling(temperature=0))
        make(score, store)
        _, rows = read_scores(store.path(key(score), "scores"))
        return sum(r["value"] for r in rows) / len(rows)

    make(stage, store)
    before, after = accuracy(base), accuracy(stage)
    assert before < 0.3
    assert after > 0.9
