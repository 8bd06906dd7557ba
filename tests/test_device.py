"""Models on an accelerator: the CPU's numbers from every stage and loss, moving between devices, what is said and scheduled.

The accelerator is pretended (tests/accelerator.py), so that a tensor left on the wrong device fails here too; the tests marked
``gpu`` ask a real one.
"""

from __future__ import annotations

import sys
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests import accelerator, tiny, toy
from tests.losses.plain import Case
from tests.losses.test_losses_common import LOSSES, any_case
from tests.stages.test_codistill import both
from tests.stages.test_loops import ENV, fit, mopd
from tests.stages.test_preference import dpo
from tests.stages.toy import DATA, INIT, SHORT, Taste, Types, rl
from tests.test_run import Watch, many
from tutelage import device as devices
from tutelage.cli import app
from tutelage.context import Context, Stopped
from tutelage.credit.kl import Reference
from tutelage.credit.teacher import Teacher
from tutelage.device import CPU, Device, find, look, relief
from tutelage.envs.single import SingleTurn
from tutelage.estimate import Estimator, span
from tutelage.graph import Goals, Stage, key, order, plan
from tutelage.learn import value
from tutelage.learn.learner import Learner
from tutelage.learn.optim import AdamW, Muon
from tutelage.losses.kl import K3
from tutelage.losses.policy import DAPO
from tutelage.losses.top_k import TailForwardKL, TailReverseKL
from tutelage.model import folder
from tutelage.model.lora import Continue, LoRA, Stack
from tutelage.rollout import draw
from tutelage.rollout.base import Request, Sampling
from tutelage.rollout.local import local_engine
from tutelage.run import run
from tutelage.spec import UserError
from tutelage.stages.best import Best
from tutelage.stages.diagnose import Diagnose
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.fit import Fit, Selection
from tutelage.stages.mixture import Replay
from tutelage.stages.passrate import PassRate
from tutelage.stages.ppo import PPO
from tutelage.stages.teacher_scores import TeacherScores
from tutelage.stages.traces import Traces
from tutelage.store import Store

accelerator.register()  # now: PyTorch counts the devices once a process, at the first backward pass of any test
torch.__future__.set_swap_module_params_on_conversion(False)
DEVICES = ["pretend", pytest.param("cuda", marks=pytest.mark.gpu)]
FAST = AdamW(lr=0.02)
LOW = LoRA(rank=2, alpha=8)
TASTE = SingleTurn(verifier=Taste())


@pytest.fixture(autouse=True)
def swapped():
    """What `accelerator.register` sets stands for these tests alone: other tests' models would not load under it."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


# --- every stage that holds a model --------------------------------------------------------------------------------------


def stages() -> dict[str, Stage]:
    """Little of everything, each stage that a recipe could have."""
    adapted = fit(name="adapted", adapter=LOW, optimizer=FAST)
    select = Selection(tasks=DATA.out(), env=ENV, every=2, limit=4, sampling=Sampling(temperature=0.0, max_new_tokens=3))
    asked = {"model": INIT.out(), "tasks": DATA.out(), "env": TASTE, "sampling": SHORT}
    cut = Sampling(max_new_tokens=3, top_p=0.9, top_k=20)
    fresh = {"steps": 2, "prompts": 2, "group": 2}
    low, high = rl(name="t1", optimizer=FAST, **fresh), rl(name="t2", domains=("high",), adapter=LOW, **fresh)
    teachers = {"low": low.out(), "high": high.out()}
    value = {"value": INIT.out(), "reference": INIT.out(), **fresh}
    scores = TeacherScores(name="scores", teacher=teachers["low"], data=DATA.out(), k=6)
    found: list[Stage] = [
        fit(name="chosen", select=select, optimizer=Muon()),
        fit(name="further", model=adapted.out(), adapter=Continue(), steps=2),
        fit(name="stacked", model=adapted.out(), adapter=Stack(rank=2), steps=2),
        dpo(name="dpo", steps=3),
        rl(
            name="kept",
            sampling=cut,
            loss=DAPO(kl=K3(beta=0.1)),
            credit=(*rl().credit, Reference()),
            reference=INIT.out(),
            **fresh,
        ),
        mopd(name="full", teachers=teachers, resident=1, **fresh),
        mopd(
            TailReverseKL(),
            credit=(Teacher(want="topk", k=6),),
            name="topk",
            teachers=teachers,
            adapter=LOW,
            balance=True,
            **fresh,
        ),
        both(low=fresh, high=fresh, **fresh),
        PPO(**{**rl().__dict__, "name": "ppo", "credit": PPO.model_fields["credit"].default, **value}),
        rl(name="mixed", replay=(Replay(data=DATA.out(), weight=0.5, rows=3),), **fresh),
        Evaluate(name="scored", domain="low", **{**asked, "model": adapted.out(), "sampling": cut}),
        PassRate(name="rates", domains=("low",), samples=2, **asked),
        Traces(
            name="traces",
            policies={"low": INIT.out()},
            tasks=DATA.out(),
            env=TASTE,
            sampling=Sampling(max_new_tokens=6),
            at_least=None,
        ),
        Best(
            name="best",
            candidates={"a": INIT.out(), "b": adapted.model_copy(update={"adapter": None}).out()},
            select_on=DATA.out(),
            env=TASTE,
        ),
        Diagnose(name="told", teachers=teachers, domains=("low", "high"), prompts=3, group=2, k=4, **asked),
        Fit(name="stored", model=INIT.out(), data=scores.out(), loss=TailForwardKL(), steps=2, rows=8),
    ]
    return {stage.name: stage for stage in found}


def make(goal: Stage, store: Store, where: str) -> None:
    """Makes what is not made yet, all on one device."""
    for stage in order([goal]):
        if not store.has(key(stage)):
            ctx = Context(stage, store, device=where)
            stage.run(ctx)
            body = {"name": stage.name, "kind": stage.kind(), "inputs": [], "cost": asdict(ctx.cost), "facts": ctx.facts}
            store.publish(key(stage), {**body, "finished": 0.0})


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """One for each device: what several stages build on is made once."""
    here = tmp_path_factory.mktemp("devices")
    return {where: Store(here / where) for where in ("cpu", "pretend", "cuda")}


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of JSON by its path."""
    if isinstance(value, dict):
        return {k: v for name, each in value.items() for k, v in numbers(each, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {k: v for n, each in enumerate(value) for k, v in numbers(each, f"{path}.{n}").items()}
    return {path: value}


@pytest.fixture
def placed(monkeypatch):
    """Where models were put since it was last cleared."""
    seen: set[str] = set()

    def moved(model: Any, where: str) -> Any:
        seen.add(where)
        return model.to(where).eval()

    for module in (folder, value):
        monkeypatch.setattr(module, "moved", moved)
    return seen


@pytest.mark.parametrize("name", stages())
def test_a_stage_makes_on_a_device_what_it_makes_on_the_cpu(name, stores, device, placed):
    stage = stages()[name]
    stage.infer(Types())
    for where in ("cpu", device):
        placed.clear()
        make(stage, stores[where], where)
        assert placed == {where}, "a model that is left on the CPU is slow, and nothing else would tell"
    for each in order([stage]):
        here, there = (stores[where].folder(key(each)) for where in ("cpu", device))
        files = sorted(f.relative_to(here) for f in here.rglob("*.safetensors"))
        assert files == sorted(f.relative_to(there) for f in there.rglob("*.safetensors"))
        for file in files:
            mine, theirs = load_file(here / file), load_file(there / file)
            assert mine.keys() == theirs.keys()
            for tensor, numbers_ in mine.items():
                torch.testing.assert_close(theirs[tensor], numbers_, rtol=1e-3, atol=1e-4, msg=f"{each.name}: {file}, {tensor}")
        assert told(stores[device], each) == pytest.approx(told(stores["cpu"], each), rel=1e-3, abs=1e-4)


def test_a_device_without_fp64_makes_the_same(stores, tmp_path, monkeypatch):
    where = accelerator.NAME
    monkeypatch.setattr(accelerator, "NARROW", [True])
    monkeypatch.setattr(draw, "NO_FP64", {where})
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(1, dtype=torch.float64, device=where)
    narrow = Store(tmp_path / "narrow")
    for name in ("kept", "ppo", "told"):
        for store, on_it in ((stores["cpu"], "cpu"), (narrow, where)):
            make(stages()[name], store, on_it)
        mine, theirs = (told(store, stages()[name]) for store in (stores["cpu"], narrow))
        assert theirs == pytest.approx(mine, rel=1e-3, abs=1e-4)


@pytest.mark.gpu
def test_a_device_trains_in_bf16(stores, tmp_path):
    stage = fit(name="half", dtype="bfloat16", optimizer=FAST)
    losses = []
    for where, store in (("cpu", stores["cpu"]), ("cuda", Store(tmp_path / "there"))):
        make(stage, store, where)
        losses.append([line["nll"] for line in store.metrics(key(stage))])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def told(store: Store, stage: Stage) -> dict[str, Any]:
    """Metrics, facts and cost of a stage, without times."""
    meta = store.meta(key(stage))
    lines = [{k: v for k, v in line.items() if k != "time" and "tokens_per_s" not in k} for line in store.metrics(key(stage))]
    leaves = numbers({"metrics": lines, "facts": meta["facts"], "cost": meta["cost"]})
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, (int, float))}


@pytest.mark.parametrize("begins", ["cpu", "there"])
@pytest.mark.parametrize("optimizer", [FAST, Muon()], ids=["adamw", "muon"])
def test_a_stage_begun_on_one_device_goes_on_on_another(begins, optimizer, stores, device, tmp_path):
    stage, ways = rl(name=f"moves-{optimizer.kind()[-5:]}", optimizer=optimizer), ["cpu", device]
    make(stage, stores["cpu"], "cpu")
    first, second = ways if begins == "cpu" else ways[::-1]
    cut = Store(tmp_path / "cut")
    for each in order([stage])[:-1]:
        make(each, cut, first)
    calls: list[int] = []
    with pytest.raises(Stopped):
        stage.run(Context(stage, cut, stopping=lambda: calls.append(1) or len(calls) == 2, device=first))
    state = torch.load(next(cut.work(key(stage)).glob("checkpoint-2/state.pt")))
    assert {t.device.type for t in tensors(state)} == {"cpu"}
    make(stage, cut, second)
    mine, theirs = (load_file(s.path(key(stage), "policy") / "model.safetensors") for s in (stores["cpu"], cut))
    torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-4)
    assert [m["step"] for m in cut.metrics(key(stage))] == [1, 2, 3, 4]


def tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


# --- what stages are made of ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("name", [*tiny.CONFIGS, "undeclared", "longrope"])
def test_a_model_of_any_kind_scores_and_draws_there_as_on_the_cpu(name, long, device):
    """Long rows take another way through attention than short ones."""
    if long and name not in ("llama", "qwen3", "mistral-window"):
        pytest.skip("takes one way only")
    samples = tiny.samples([300, 280, 7] if long else [9, 4, 12], prompt=3)
    found = []
    for where in ("cpu", device):
        model = tiny.model(name).to(where)
        scored = [signal.values for signal in Learner(model, vocab=tiny.VOCAB).score(samples, 0.7, "logp")]
        engine = local_engine(model, tiny.tokenizer(), slots=3)
        how = [Sampling(max_new_tokens=5), Sampling(max_new_tokens=9, top_p=0.8), Sampling(max_new_tokens=4, temperature=0.0)]
        asked = [Request(tuple(s.tokens[:5].tolist()), how[i % 3], seed=i, sets=i % 3 == 1) for i, s in enumerate(samples * 2)]
        futures = [engine.submit(each) for each in asked]
        while engine.pump():
            pass
        found.append((scored, [f.result().tokens.tolist() for f in futures], [f.result().logp for f in futures]))
    (mine, drawn, logp), (theirs, again, relogp) = found
    assert drawn == again
    for a, b in zip([*mine, *logp], [*theirs, *relogp], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


def on(case: Case, where: str) -> Case:
    """The same batch and logits on a device."""
    to = lambda x: x.to(where) if isinstance(x, torch.Tensor) else x  # noqa: E731
    batch = replace(case.batch, **{name: to(getattr(case.batch, name)) for name in ("tokens", "row", "pos", "index", "trow")})
    batch.signals = {name: to(signal) for name, signal in case.batch.signals.items()}
    batch.extras = dict(case.batch.extras)
    if heads := batch.extras.get("teacher_heads"):
        batch.extras["teacher_heads"] = tuple(map(copy, heads))
        for head in batch.extras["teacher_heads"]:
            head.weight = to(head.weight)
    return replace(case, batch=batch, logits=to(case.logits))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_loss_is_the_same_there(loss, device):
    value, gradient, metrics = any_case().run(loss)
    there, moved, told = on(any_case(), device).run(loss)
    assert moved.device.type == device
    assert there == pytest.approx(value)
    torch.testing.assert_close(moved.cpu(), gradient)
    assert told == pytest.approx(metrics)


def test_the_pretended_accelerator_is_as_strict_as_a_real_one(device):
    there = torch.arange(4.0, device=device)
    for mixed in (
        lambda: there + torch.ones(4),
        lambda: there @ torch.ones(4),
        lambda: torch.cat([there, torch.ones(1)]),
        lambda: there.index_select(0, torch.tensor([1])),
        lambda: torch.where(there > 1, there, torch.zeros(4)),
        lambda: torch.nn.Linear(4, 2)(there),
    ):
        with pytest.raises(RuntimeError):
            mixed()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    assert (there + torch.tensor(1.0)).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert there[torch.tensor([2])].tolist() == [2.0], "indices may lie on the CPU"
    assert there.cpu().numpy().tolist() == [0.0, 1.0, 2.0, 3.0]


# --- which device --------------------------------------------------------------------------------------------------------


def test_no_process_is_asked_where_the_answer_is_plain(monkeypatch):
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: pytest.fail("a process was asked"))
    monkeypatch.setattr(devices, "_built_for_cuda", lambda: False)
    assert find("auto") == find("cpu") == CPU


@pytest.mark.parametrize(
    ("asked", "count", "says"),
    [("cuda", 0, "sees no cuda device"), ("cuda:3", 2, "sees 2 of cuda, numbered from 0"), ("gpu", 0, "knows no such device")],
)
def test_a_device_that_is_not_there(asked, count, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=says) as error:
        look(asked)
    assert "\n" not in str(error.value)


def test_auto_is_the_first_cuda_device_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Number {number}")
    assert look("auto") == Device("cuda:0", "Number 0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert look("auto") == CPU


def test_a_device_that_is_not_there_ends_the_command_before_any_work(tmp_path, monkeypatch):
    def nobody(asked: str, stages: int) -> Device:
        raise UserError("--device cuda: PyTorch 9 sees no cuda device; leave --device out")

    monkeypatch.setattr(devices, "find", nobody)
    monkeypatch.setattr(sys, "argv", ["tutelage"])
    done = CliRunner().invoke(app, ["run", "quickstart", "--device", "cuda", "--store", str(tmp_path / "s")])
    assert isinstance(done.exception, UserError)
    assert not (tmp_path / "s").exists()


# --- runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_every_process(tmp_path, monkeypatch):
    """Has the pretended accelerator registered wherever PyTorch is imported, as a vendor's package would."""
    site = tmp_path / "site" / "pretend-1.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: pretend\nVersion: 1.0\n")
    (site / "entry_points.txt").write_text("[torch.backends]\npretend = tests.accelerator:register\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site.parent), str(Path(__file__).parents[1])])


@pytest.mark.usefixtures("in_every_process")
def test_a_run_in_workers_is_on_the_device_and_says_so(tmp_path):
    there = find("pretend")
    assert there == Device("pretend:0", "Pretend 1")
    store, scored = (
        Store(tmp_path / "s"),
        Evaluate(name="scored", model=INIT.out(), tasks=DATA.out(), domain="low", env=TASTE, limit=3, sampling=SHORT),
    )
    goals, watch = many(scored, toy.Greedy(name="greedy")), Watch()
    outcome = run(plan([goals], store.has), store, cores=1, device=there, watcher=watch)
    assert store.meta(key(scored))["device"] == "Pretend 1"
    assert store.meta(key(INIT))["device"] == "cpu"
    assert outcome.failed == {
        "greedy": "out of memory on pretend:0, Pretend 1; run it again with --set greedy.micro_tokens=32 --set greedy.slots=2 "
        "(no result changes but by rounding), or with a smaller model, a device with more memory or --device cpu: nothing made "
        "is lost"
    }
    assert outcome.exit_code == 2
    make(scored, cpu := Store(tmp_path / "cpu"), "cpu")
    assert told(store, scored) == told(cpu, scored)
    made = [f for s in (store, cpu) for f in (s.path(key(scored), "scores")).glob("*.parquet")]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_what_to_lower_is_named_in_stages_inside_stages():
    said = relief(both())
    assert "--set both.student.micro_tokens=4096" in said
    assert "--set both.branches.low.slots=128" in said
    assert "--set both.student.resident=1" in said
    assert relief(INIT).startswith("with a smaller model")


@pytest.mark.parametrize(("seats", "most"), [(1, 1), (2, 2)])
def test_stages_take_turns_on_the_device_and_others_pass(seats, most, tmp_path):
    store, watch = Store(tmp_path / "s"), Watch()
    stages = [toy.There(name=f"there{n}", seed=n) for n in range(3)] + [toy.Make(name=f"here{n}", seed=n + 9) for n in range(2)]
    run(plan([many(*stages)], store.has), store, cores=4, device=Device("cuda:0", "H", seats), watcher=watch)
    assert len(watch.labels("finished")) == 5
    held = Watch()
    held.seen = [(event, label) for event, label in watch.seen if label.startswith("there")]
    assert held.most_at_once() <= most
    assert {label for _, label in watch.seen[:4]} & {"here0", "here1"}, "the CPU's stages need not wait"


def test_the_span_counts_turns_on_the_device():
    stages = [toy.There(name=f"there{n}", seed=n) for n in range(3)] + [toy.Make(name="here", seed=9)]
    todo = plan([Goals(recipe="r", stages=tuple(s.out() for s in stages))], set().__contains__).todo
    assert span(todo, lambda node: 2.0, 4) == 2
    assert span(todo, lambda node: 2.0, 4, Device("cuda:0", "H", 1)) == 6
    assert span(todo, lambda node: 2.0, 4, Device("cuda:0", "H", 2)) == 4
    assert span(todo, lambda node: 2.0, 1, Device("cuda:0", "H", 2)) == 8


def test_rates_are_those_of_the_device(tmp_path):
    store = Store(tmp_path / "s")
    made = plan([toy.small(steps=5)], store.has)
    run(made, store)
    assert Estimator(store).measured(next(n for n in made.todo if n.label == "base"))
    assert not Estimator(store, Device("cuda:0", "H")).measured(next(n for n in made.todo if n.label == "base"))
