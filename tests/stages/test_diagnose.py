"""Diagnosing teachers: every number against a naive dense computation, the bootstrap, positions, verdicts, resume, keys."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests import tiny
from tests.stages.toy import DATA, ENV, INIT, Types, make
from tutelage.context import Stopped
from tutelage.graph import Goals, from_record, key, record
from tutelage.learn.optim import AdamW
from tutelage.model.folder import load_model
from tutelage.model.lora import LoRA
from tutelage.rollout.base import Sampling
from tutelage.rollout.policy import Policy
from tutelage.spec import SpecError, UserError
from tutelage.stages import diagnose, verdict
from tutelage.stages.diagnose import COUNT, NUMBERS, Diagnose, Found, compare, draws, interval, means, named, summary, summed
from tutelage.stages.fit import Fit
from tutelage.stages.model import NewModel
from tutelage.stages.verdict import THRESHOLDS, judge
from tutelage.store import Store
from tutelage.text.template import Chat

SIX = Sampling(max_new_tokens=6)
OTHER = NewModel(name="other", alphabet=tiny.ALPHABET, width=24, layers=2, mlp=32, seed=5)
TAUGHT = Fit(name="taught", model=INIT.out(), data=DATA.out(), steps=12, rows=25, optimizer=AdamW(lr=0.02))


def stage(**more):
    fields = {"name": "d", "model": INIT.out(), "teachers": {"low": TAUGHT.out(), "other": OTHER.out()}, "tasks": DATA.out()}
    fields |= {"domains": ("low", "high"), "prompts": 8, "group": 2, "k": 4, "sampling": SIX, "env": ENV}
    return Diagnose(**{**fields, **more})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = Store(tmp_path_factory.mktemp("diagnose"))
    make(stage(), made)
    return made


def found(store, of=None):
    facts = store.meta(key(of or stage()))["facts"]["diagnosis"]
    return {(each["teacher"], each["domain"]): each for each in facts["teachers"]}


def rows(store, name, of=None):
    return pq.read_table(store.path(key(of or stage()), "diagnosis") / f"{name}.parquet").to_pylist()


# --- the numbers ---------------------------------------------------------------------------------------------------------


def dense(store, teacher, domain):
    """Per reply and token, from stock forward passes of one reply at a time: {number: [[...], ...]}, and the tasks."""
    folders = [store.path(key(s), "policy") for s in (INIT, teacher)]
    policy = Policy(folders[0], slots=1)
    from tutelage.text.rows import read_tasks

    tasks = [t for t in read_tasks(store.path(key(DATA), "rows")) if t.domain == domain][:8]
    replies = policy.driver(Chat(), ENV, SIX).collect(tasks, 2, 0)
    models = [load_model(f) for f in folders]
    for model in models:
        model.set_attn_implementation("eager")
    made = {name: [] for name in NUMBERS}
    for reply in replies:
        ids = torch.tensor(reply.tokens)[None]
        with torch.no_grad():
            student, teach = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in models)
        for name in NUMBERS:
            made[name].append([])
        for at in np.flatnonzero(reply.mask):
            s, t, y = student[at - 1], teach[at - 1], reply.tokens[at]
            both = set(s.topk(4).indices.tolist()) & set(t.topk(4).indices.tolist())
            gap = float(t[y] - s[y])
            values = {
                "nll": -float(t[y]),
                "entropy": -sum(float(a.exp() * a) for a in s),
                "kl": sum(float(a.exp() * (a - b)) for a, b in zip(s, t, strict=True)),
                "advantage": gap,
                "clipped": float(abs(gap) > 5),
                "overlap": len(both) / 4,
                "mass": sum(float(s[v].exp()) for v in both),
                "teacher_mass": sum(float(t[v].exp()) for v in both),
                "top1": float(s.argmax() == t.argmax()),
            }
            for name, value in values.items():
                made[name][-1].append(value)
    return made, replies


@pytest.mark.parametrize(("teacher", "label", "domain"), [(TAUGHT, "low", "low"), (OTHER, "other", "high")])
def test_every_number_is_that_of_a_naive_dense_computation(store, teacher, label, domain):
    values, replies = dense(store, teacher, domain)
    mine, samples = (
        found(store)[label, domain],
        [r for r in rows(store, "samples") if (r["teacher"], r["domain"]) == (label, domain)],
    )
    assert [(r["task"], r["reply"], r["tokens"]) for r in samples] == [(s.task.id, s.text, s.mask.sum()) for s in replies]
    assert [r["replica"] for r in samples] == [0, 1] * 8
    for name in NUMBERS:
        flat = np.concatenate(values[name])
        assert mine["numbers"][name]["mean"] == pytest.approx(flat.mean(), abs=2e-5), name
        assert [r[name] for r in samples] == pytest.approx([np.mean(v) for v in values[name]], abs=2e-5), name
        late = np.concatenate([v[(len(v) + 1) // 2 :] for v in values[name]])
        early = np.concatenate([v[: (len(v) + 1) // 2] for v in values[name]])
        assert mine["drift"][name]["mean"] == pytest.approx(late.mean() - early.mean(), abs=2e-5), name
        for at in mine["positions"]:
            there = np.concatenate([v[at["first"] : at["last"] + 1] for v in values[name]])
            assert len(there) == at["tokens"]
            assert at[name]["mean"] == pytest.approx(there.mean(), abs=2e-5), name
    assert mine["numbers"]["spread"]["mean"] == pytest.approx(np.concatenate(values["advantage"]).std(), abs=1e-4)
    assert mine["reward"] == pytest.approx(np.mean([s.score.value for s in replies]))
    assert 0 < mine["numbers"]["overlap"]["mean"] < 1, "the case says something"
    assert mine["numbers"]["kl"]["mean"] > 5e-3


def test_a_teacher_that_is_the_student_has_nothing_to_teach(tmp_path):
    made, same = Store(tmp_path / "s"), stage(teachers={"itself": INIT.out()}, env=None)
    make(same, made)
    for each in found(made, same).values():
        numbers = {name: number["mean"] for name, number in each["numbers"].items()}
        wanted = {"kl": 0, "advantage": 0, "spread": 0, "clipped": 0, "overlap": 1, "top1": 1}
        assert {name: numbers[name] for name in wanted} == wanted
        assert numbers["mass"] == numbers["teacher_mass"] > 4 / tiny.VOCAB
        assert each["verdict"]["level"] == "agrees"
        assert each["reward"] is None


def test_what_is_in_the_files_and_which_teacher_is_asked_where(store):
    assert set(found(store)) == {("low", "low"), ("other", "low"), ("other", "high")}
    at = rows(store, "positions")
    assert {(r["first"], r["last"]) for r in at} == {(0, 0), (1, 1), (2, 3), (4, 7)}
    for r in at:
        (said,) = (p for p in found(store)[r["teacher"], r["domain"]]["positions"] if p["first"] == r["first"])
        assert [r["kl_low"], r["kl"], r["kl_high"]] == [said["kl"][end] for end in ("low", "mean", "high")]


def test_costs_count_what_was_drawn_and_what_was_scored(store):
    cost, samples = store.meta(key(stage()))["cost"], rows(store, "samples")
    n = {s.name: s.infer(Types())["policy"].params for s in (INIT, TAUGHT, OTHER)}
    lengths = {d: sum(r["tokens"] + 3 for r in samples if (r["teacher"], r["domain"]) == ("other", d)) for d in ("low", "high")}
    assert cost["tokens"]["scored"] == 2 * (lengths["low"] + lengths["high"]) + lengths["low"]
    drawn = cost["tokens"]["sampled"] + cost["tokens"]["prefilled"]
    own, both = n["init"] * (drawn + sum(lengths.values())), n["other"] * sum(lengths.values())
    assert cost["flops"] == 2 * (own + both + n["taught"] * lengths["low"])


def test_a_chunk_of_rows_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    heads = [load_head(width, seed) for seed, width in enumerate((6, 9))]
    ours, theirs = (rng.normal(size=(11, h.width)).astype(np.float32) for h in heads)
    targets = rng.integers(0, 20, 11)
    whole = compare(ours, theirs, heads, targets, 0.7, 5)
    monkeypatch.setattr("tutelage.learn.output.CHUNK", 45)
    assert compare(ours, theirs, heads, targets, 0.7, 5) == pytest.approx(whole, rel=1e-5, abs=1e-6)
    s, t = (torch.log_softmax(h(torch.tensor(x)) / 0.7, -1) for h, x in zip(heads, (ours, theirs), strict=True))
    kl = torch.nn.functional.kl_div(t, s, reduction="none", log_target=True).sum(-1)
    assert whole[:, NUMBERS.index("kl")] == pytest.approx(kl.numpy(), abs=1e-5)


def load_head(width, seed):
    from tutelage.model.head import Head

    return Head(torch.randn(20, width, generator=torch.Generator().manual_seed(seed)))


# --- positions, intervals ------------------------------------------------------------------------------------------------


def by_hand(replies):
    """A `Found` whose KL at each token is what the lists say."""
    made = Found()
    for i, values in enumerate(replies):
        block = np.zeros((len(values), COUNT + 1))
        block[:, NUMBERS.index("kl")], block[:, COUNT] = values, 1
        made.rows.append({"domain": "d", "task": f"t{i}", "tokens": len(values), "reward": None})
        made.sums.append(summed(block, 9))
    return made


def test_decay_with_position_by_hand():
    """KL grows by one a token; long replies and short ones. Drift is within replies: 0 where nothing grows within one."""
    grown = summary(by_hand([range(9), range(3), range(1)]), "d", 1, 50)
    means = {(at["first"], at["last"]): at["kl"]["mean"] for at in grown["positions"]}
    assert means == {(0, 0): 0, (1, 1): 1, (2, 3): pytest.approx(7 / 3), (4, 7): 5.5, (8, 15): 8}
    assert [at["prompts"] for at in grown["positions"]] == [3, 2, 2, 1, 1]
    late, early = (5 + 6 + 7 + 8 + 2) / 5, (0 + 1 + 2 + 3 + 4 + 0 + 1 + 0) / 8
    assert grown["drift"]["kl"]["mean"] == pytest.approx(late - early)
    level = summary(by_hand([[3.0] * 9, [3.0] * 3]), "d", 1, 50)
    assert level["drift"]["kl"] == {"mean": 0, "low": 0, "high": 0}
    alone = summary(by_hand([[1.0], [2.0]]), "d", 1, 50)
    assert alone["drift"]["kl"]["mean"] is None
    assert json.dumps(alone, allow_nan=False)


def test_intervals_cover_prompts_and_not_tokens():
    """A hundred tokens of a prompt that say the same are one witness: the interval is that of the prompts' means."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=40)
    few, many = (np.zeros((40, COUNT + 1)) for _ in range(2))
    few[:, 0], few[:, COUNT] = values, 1
    many[:, 0], many[:, COUNT] = 100 * values, 100
    weights = draws("d", 40)
    one, hundred = (named(means(s, weights))["nll"] for s in (few, many))
    assert one == pytest.approx(hundred)
    half = 1.96 * values.std() / 40**0.5
    assert one["mean"] == pytest.approx(values.mean())
    assert [one["low"], one["high"]] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.15 * half)
    assert interval(np.array([np.nan, 1.0, 2.0])) == {"mean": None, "low": None, "high": None}


# --- verdicts ------------------------------------------------------------------------------------------------------------


def numbers(**means):
    """Numbers that are sound but for those named; a pair is the ends of an interval."""
    sound = {"kl": 0.04, "top1": 0.85, "overlap": 0.8, "mass": 0.98, "nll": 9.0}
    ends = {n: v if isinstance(v, tuple) else (v - 1e-3, v + 1e-3) for n, v in {**sound, **means}.items()}
    return {n: {"low": low, "mean": (low + high) / 2, "high": high} for n, (low, high) in ends.items()}


VERDICTS = [
    ({}, "teaches", ()),
    ({"kl": 0.7}, "teaches", ("kl",)),
    ({"kl": 0.7, "top1": 0.6}, "warm up", ("kl", "top1")),
    ({"overlap": 0.5, "mass": 0.9}, "warm up", ("overlap", "mass")),
    ({"kl": 0.7, "top1": (0.6, 0.8)}, "unclear", ("kl",)),
    ({"kl": (0.05, 0.2), "top1": (0.6, 0.8)}, "unclear", ()),
    ({"top1": (0.6, 0.8)}, "teaches", ()),
    ({"kl": (0.0, 5e-4)}, "agrees", ()),
]


@pytest.mark.parametrize(("means", "level", "signs"), VERDICTS)
def test_verdicts(means, level, signs):
    made = judge(numbers(**means), 16, 50_000)
    assert (made.level, made.signs) == (level, signs)
    assert "\n" not in made.words
    assert level == "agrees" or verdict.CAVEAT in made.words
    for threshold in THRESHOLDS:
        assert (threshold.says in made.words) == (threshold.number in (*made.signs, *made.unsure)) or level == "teaches"


def test_overlap_is_not_judged_where_chance_alone_gives_much():
    few = {"overlap": 0.3, "kl": 0.7}
    assert judge(numbers(**few), 16, 50_000).level == "warm up"
    assert judge(numbers(**few), 16, 46).level == "teaches"


def test_every_threshold_has_a_number_and_its_evidence():
    assert {t.number for t in THRESHOLDS} <= set(NUMBERS)
    for threshold in THRESHOLDS:
        assert "arXiv" in threshold.evidence or "prototype" in threshold.evidence


# --- as a stage ----------------------------------------------------------------------------------------------------------


def test_stopped_anywhere_it_resumes_to_the_same_bits(tmp_path):
    small, whole, cut = stage(slots=3), Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(small, whole)
    for stop_after in (1, 3):
        calls = []
        with pytest.raises(Stopped):
            make(small, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(small, cut)
    assert asdict(resumed.cost) == asdict(done.cost)
    assert resumed.facts == done.facts
    assert whole.meta(key(small))["content"] == cut.meta(key(small))["content"]
    assert [m["step"] for m in cut.metrics(key(small))] == [3, 6, 9, 12, 15, 16]


def test_keys_follow_what_is_asked_and_not_how_many_slots():
    assert key(stage(slots=3)) == key(stage()) == key(stage(name="again"))
    others = [{"k": 5}, {"prompts": 9}, {"group": 1}, {"seed": 1}, {"teachers": {"low": OTHER.out(), "other": OTHER.out()}}]
    assert len({key(stage(**more)) for more in ({}, *others)}) == 1 + len(others)
    loaded = from_record(record(Goals(recipe="d", stages=(stage().out(),)))).stages[0].of
    assert key(loaded) == key(stage())


def test_adapters_teach_too(tmp_path):
    """Teachers that are adapters of the student's base are scored as what they are."""
    made = Store(tmp_path / "s")
    tuned = Fit(
        name="t", model=INIT.out(), data=DATA.out(), steps=6, rows=25, adapter=LoRA(rank=2, alpha=8), optimizer=AdamW(lr=0.05)
    )
    both = stage(teachers={"tuned": tuned.out(), "itself": INIT.out()})
    make(both, made)
    kl = {label: each["numbers"]["kl"]["mean"] for (label, _), each in found(made, both).items()}
    assert kl["tuned"] > 0.01
    assert kl["itself"] == 0


BAD = [
    ({"domains": ("low", "hihg")}, "no domain 'hihg'; did you mean 'high'?"),
    ({"domains": ("low", "low")}, "names one twice"),
    ({"teachers": {"low": TAUGHT.out()}}, "domain 'high' has no teacher"),
    (
        {"teachers": {"x": NewModel(name="x", alphabet="abc").out()}},
        "the teacher 'x', 'x', has another tokenizer",
    ),
    ({"model": DATA.out()}, "is no model"),
]


@pytest.mark.parametrize(("more", "says"), BAD)
def test_mistakes_are_refused_in_the_plan(more, says):
    with pytest.raises(SpecError) as error:
        stage(**more).infer(Types())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_domain_with_a_single_task_has_no_interval(tmp_path, monkeypatch):
    from tutelage.text import rows as module

    kept = module.read_tasks
    monkeypatch.setattr(module, "read_tasks", lambda folder: kept(folder)[:1])
    with pytest.raises(UserError, match="holds 1 task of domain 'low'"):
        make(stage(domains=("low",)), Store(tmp_path / "s"))


def test_the_docs_say_what_the_thresholds_are():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "methods" / "diagnose.md").read_text("utf-8")
    for threshold in THRESHOLDS:
        assert f"{threshold.side} {threshold.bound:g}" in page
    for name in (*NUMBERS, "spread"):
        assert f"`{name}`" in page
    assert diagnose.CLIP == 5
