"""Teachers that are told more: what they score, whom a sample is shown, what is left out, and what is refused."""

import asyncio
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests import tiny
from tutelage.credit.base import CreditContext
from tutelage.credit.privileged import HintedTeacher, SiblingTeacher
from tutelage.credit.teacher import distinct
from tutelage.learn.learner import Learner, ModelScorer, PolicyScorer
from tutelage.losses.distill import SampledReverseKL
from tutelage.losses.extrapolated import ExtrapolatedReverseKL
from tutelage.losses.proximal import ProximalReverseKL
from tutelage.losses.surrogate import ClippedReverseKL
from tutelage.spec import UserError
from tutelage.text.template import Chat, reply_sample
from tutelage.types import Batch, Score, Signal, Task

TOKENIZER = tiny.tokenizer()
HEAT = 0.8


def task(name="t", prompt="ab", gold="c", **meta):
    return Task(name, "low", ({"role": "user", "content": prompt},), gold, meta)


def drawn(of, reply, reward=0.0, version=0, error=None):
    """A sample of a task, as a driver makes it."""
    ids = TOKENIZER(reply, add_special_tokens=False)["input_ids"]
    sample = reply_sample(Chat().prompt(TOKENIZER, of.messages), [*ids, TOKENIZER.eos_token_id], of)
    sample.text, sample.score, sample.scalars["reward"] = reply, Score(reward, error=error), reward
    sample.signals["behaviour_logp"] = Signal(np.zeros(len(ids) + 1), sample.trained, {"temperature": HEAT})
    sample.versions = np.where(sample.mask, version, -1)
    return sample


def context(model=None, temperature=HEAT, **more):
    scorer = PolicyScorer(Learner(model)) if model else None
    return CreditContext(temperature, policy=scorer, template=partial(Chat().prompt, TOKENIZER), **more)


def assign(rule, samples, ctx):
    return asyncio.run(rule.assign(samples, ctx))


def eager(model):
    """The same weights in transformers' own attention, unpacked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny.config()), attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    return plain.eval()


@pytest.mark.parametrize("who", ["policy", "teachers"])
@pytest.mark.parametrize("want", ["logp", "hidden", "topk"])
def test_each_reply_is_scored_as_a_naive_loop_scores_it_under_the_longer_prompt(want, who):
    policy, start = tiny.model(), tiny.model(seed=3)
    samples = [drawn(task("a", "ab", "c"), "xyz"), drawn(task("b", "k", "12 34"), "q"), drawn(task("c", "abcdef", "7"), "a=1")]
    tokens = [s.tokens.copy() for s in samples]
    ctx = context(policy, teachers={"low": ModelScorer("start", start)} if who == "teachers" else {})
    kept, _ = assign(HintedTeacher(text="{prompt}: {hint},", want=want, k=5, who=who), samples, ctx)
    assert kept == samples
    teacher = eager(policy if who == "policy" else start)
    for s, before in zip(samples, tokens, strict=True):
        assert np.array_equal(s.tokens, before)  # the student's own prompt stays what it was
        text = f"<|user|>{s.task.messages[0]['content']}: {s.task.gold},<|assistant|>"
        prompt = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        reply = s.tokens[s.mask].tolist()
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / HEAT).log_softmax(-1)
        names = {
            "logp": ["teacher_logp"],
            "hidden": ["teacher_hidden", "teacher"],
            "topk": ["teacher_topk", "teacher_topk_logp"],
        }
        for name in names[want]:
            assert np.array_equal(s.signals[name].index, np.flatnonzero(s.mask))
        if want == "logp":
            found, oracle = s.signals["teacher_logp"].values, logprobs[torch.arange(len(reply)), reply]
        elif want == "hidden":
            heads = [*(t.head for t in distinct(ctx.teachers)), ctx.policy.head]
            head = heads[s.signals["teacher"].values[0]]
            found = (head(torch.from_numpy(s.signals["teacher_hidden"].values)) / HEAT).log_softmax(-1).detach()
            oracle = logprobs
        else:
            best = logprobs.topk(5)
            assert np.array_equal(s.signals["teacher_topk"].values, best.indices)
            found, oracle = s.signals["teacher_topk_logp"].values[:, :5], best.values
        np.testing.assert_allclose(found, oracle, rtol=1e-3, atol=1e-4)


def test_the_longer_prompt_is_what_is_paid_for():
    model, sample = tiny.model(), drawn(task(gold="12345"), "xy")
    ctx = context(model)
    assign(HintedTeacher(text="{prompt}:{hint}"), [sample], ctx)
    assert ctx.policy.scored == len(sample.tokens) + len(":12345")


def test_later_updates_of_the_step_do_not_move_the_teacher():
    model, sample = tiny.model(), drawn(task(), "xyz")
    ctx = context(model)
    assign(HintedTeacher(text="{prompt}{hint}", want="hidden"), [sample], ctx)
    hidden = torch.from_numpy(sample.signals["teacher_hidden"].values)
    before = ctx.policy.head(hidden)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert torch.equal(ctx.policy.head(hidden), before)
    assert not ctx.policy.head.weight.requires_grad


# --- siblings ---


def test_a_sibling_is_always_verified_and_never_the_sample_itself():
    rng, rule = np.random.default_rng(0), SiblingTeacher(accepted=0.5)
    for trial in range(60):
        samples = []
        for g in range(3):
            of = task(f"t{g}")
            for r in range(int(rng.integers(1, 6))):
                error = "broken" if rng.random() < 0.2 else None
                samples.append(drawn(of, f"{g} {r}", float(rng.choice([0, 0.4, 0.5, 1.0])), trial, error))
        rng.shuffle(samples)
        by_text = {s.text: s for s in samples}
        for sample, hint in zip(samples, rule.hints(samples, context()), strict=True):
            good = [s for s in samples if s.group == sample.group and s.scalars["reward"] >= 0.5 and not s.score.error]
            others = [s.text for s in good if s is not sample]
            assert (hint is None) == (not others)
            if hint is not None:
                assert hint in others
                assert by_text[hint] is not sample


def test_which_sibling_is_decided_by_what_names_the_sample():
    """Neither the other groups of the step nor what was drawn before have a say; every sibling has its turn."""
    rule = SiblingTeacher()
    group = lambda name, version: [drawn(task(name), f"{name} {r}", 1.0, version) for r in range(4)]  # noqa: E731
    alone = rule.hints(group("a", 7), context())
    assert rule.hints([*group("b", 7), *group("a", 7)], context())[4:] == alone
    drawn_once = [tuple(rule.hints(group("a", v), context())) for v in range(40)]
    assert len(set(drawn_once)) > 20
    assert {h[0] for h in drawn_once} == {"a 1", "a 2", "a 3"}
    assert [rule.hints(group("a", v), context(seed=1)) for v in range(9)] != [list(h) for h in drawn_once[:9]]


def test_samples_without_a_sibling_are_left_out_and_counted():
    one, two = task("one"), task("two")
    lonely = [drawn(one, "x", 1.0), drawn(one, "y", 0.0)]  # the right one has no sibling but the wrong one
    hopeless = [drawn(two, "x", 0.0), drawn(two, "y", 0.0)]
    kept, metrics = assign(SiblingTeacher(text="{prompt}{hint}"), lonely + hopeless, context(tiny.model()))
    assert kept == [lonely[1]]
    assert metrics["untaught"] == (3.0, 4.0)
    nobody, metrics = assign(SiblingTeacher(text="{prompt}{hint}"), hopeless, context(tiny.model()))
    assert nobody == []
    assert metrics["untaught"] == (2.0, 2.0)


def test_what_nobody_teaches_is_kept_where_a_reward_teaches_it():
    of = task("one")
    samples = [drawn(of, "x", 1.0), drawn(of, "yy", 0.0)]
    kept, metrics = assign(SiblingTeacher(text="{prompt}{hint}", drop=False), samples, context(tiny.model()))
    assert kept == samples
    assert metrics["untaught"] == (1.0, 2.0)
    assert np.isnan(samples[0].signals["teacher_logp"].values).all()
    assert np.isfinite(samples[1].signals["teacher_logp"].values).all()


@pytest.mark.parametrize("loss", [SampledReverseKL(alpha=0.5), ProximalReverseKL(alpha=0.5), ExtrapolatedReverseKL(alpha=0.5)])
def test_untaught_tokens_learn_from_the_reward_alone(loss):
    """Row 0 has no teacher: its gradient is −α Â / |y| in closed form. Row 1 has the gradient it has alone."""
    nan = float("nan")
    logp = torch.tensor([-1.0, -2.0, -1.5, -0.5, -3.0], requires_grad=True)
    teacher = torch.tensor([nan, nan, -1.0, -1.0, -1.0])
    row = torch.tensor([0, 0, 1, 1, 1])
    signals = {"teacher_logp": teacher, "advantage": torch.tensor([2.0, 2.0, -1.0, -1.0, -1.0])}
    signals |= {"behaviour_logp": logp.detach().clone(), "ref_logp": torch.full((5,), -1.2)}

    def gradient(part):
        mine = logp.detach()[part].requires_grad_()
        out = SimpleNamespace(logp=mine, entropy=torch.zeros(len(mine)))
        where = row[part] - row[part].min()
        batch = Batch(mine, where, where, torch.arange(len(mine)), where, signals={n: s[part] for n, s in signals.items()})
        value, metrics = loss(out, batch)
        value.backward()
        return mine.grad, metrics

    whole, metrics = gradient(slice(0, 5))
    alone, _ = gradient(slice(2, 5))
    torch.testing.assert_close(whole[:2], torch.tensor([-0.5 * 2.0 / 2] * 2))
    torch.testing.assert_close(whole[2:], alone)
    gap = (teacher - logp.detach())[2:]
    assert metrics["kl"] == (pytest.approx(-gap.sum().item()), 3.0)


def test_the_clipped_surrogate_learns_nothing_where_nobody_teaches():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    signals = {"teacher_logp": torch.tensor([float("nan"), -1.0])}
    signals |= dict.fromkeys(("prox_logp", "behaviour_logp"), logp.detach().clone())
    row = torch.zeros(2, dtype=torch.long)
    out = SimpleNamespace(logp=logp, entropy=torch.zeros(2))
    value, metrics = ClippedReverseKL()(out, Batch(logp, row, row, torch.arange(2), row, signals=signals))
    value.backward()
    assert logp.grad[0] == 0
    assert logp.grad[1] != 0
    assert metrics["teacher_kl"] == (-1.0, 1.0)


# --- hints ---


def test_a_hint_is_the_gold_answer_or_what_meta_holds():
    of = [task("a", gold="g", note="n", number=[1, 2]), task("b", gold=None, note=None, number=3)]
    samples = [drawn(t, "x") for t in of]
    assert HintedTeacher().hints(samples, context()) == ["g", None]
    assert HintedTeacher(key="note").hints(samples, context()) == ["n", None]
    assert HintedTeacher(key="number").hints(samples, context()) == ["[1, 2]", "3"]
    with pytest.raises(UserError, match=r"'a'.*'nota'.*note"):
        HintedTeacher(key="nota").hints(samples, context())


def test_braces_in_prompts_and_hints_are_theirs():
    model, sample = tiny.model(), drawn(task(gold="{prompt}"), "x")
    shown = HintedTeacher(text="{prompt}{{}}{hint}").told(sample, "{prompt}", context(model))
    written = Chat().prompt(TOKENIZER, ({"role": "user", "content": "ab{}{prompt}"},))
    assert shown.tokens[~shown.mask].tolist() == written


def test_a_prompt_that_is_not_the_tasks_own():
    sample = drawn(task(prompt="ab"), "x")
    sample.task = task(prompt="abc")
    with pytest.raises(UserError, match=r"'t' was not asked as its messages stand.*SingleTurn"):
        assign(HintedTeacher(), [sample], context(tiny.model()))


@pytest.mark.parametrize("text", ["{prompt}", "{hint}", "{prompt} {hint} {gold}", "{prompt}{hint.x}", "{prompt}{hint!r}", "{"])
def test_a_text_that_cannot_be_written(text):
    with pytest.raises(ValidationError, match="text"):
        HintedTeacher(text=text)


def test_nothing_but_the_sampled_token_has_another_term():
    with pytest.raises(ValidationError, match="drop is False"):
        SiblingTeacher(drop=False, want="hidden")
