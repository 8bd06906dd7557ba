"""The quickstart: one base, one SFT, four specialists, one student that learns from all of them, and the controls.

What it shows and how it was measured: docs/results/quickstart.md. The recipe is MOPD's (MiMo-V2-Flash, arXiv 2601.02780)
at the size of a laptop: a character-level decoder of a third of a million parameters, tasks of `reasoning-gym`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.credit.group import GroupRelative
from tutelage.credit.teacher import Teacher
from tutelage.envs.base import Env
from tutelage.envs.single import SingleTurn
from tutelage.graph import At, Goals, Stage, Table
from tutelage.learn.optim import AdamW, Muon, Schedule
from tutelage.losses.distill import FullReverseKL
from tutelage.losses.policy import DAPO
from tutelage.rollout.base import Sampling
from tutelage.spec import SpecError, suggest
from tutelage.stages.budget import Budget
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.fit import Fit, Selection
from tutelage.stages.majority import Majority
from tutelage.stages.model import NewModel, Pretrained
from tutelage.stages.online import Online
from tutelage.stages.tasks import TaskSplits
from tutelage.tasks.base import ALPHABET, LAYOUT
from tutelage.tasks.gym import Base, Reverse, Sort, Sum
from tutelage.text.template import Chat, Document, Template
from tutelage.verify.base import Verifier
from tutelage.verify.gym import ReasoningGym

DOMAINS = (
    Sum(name="sum", share=0.2),
    Reverse(name="reverse", share=0.24),
    Sort(name="sort", share=0.2),
    Base(name="convert", share=0.36),
)
CLIMB = {"sum": 80, "reverse": 140, "sort": 80, "convert": 120}
"""Steps of each specialist's RL."""
NAMES = tuple(d.name for d in DOMAINS)
SOLVED = SingleTurn(verifier=ReasoningGym(answer_after="="))
"""The library's scorer on what follows the last ``=`` (the whole reply where there is none)."""
LONGEST = 72
GREEDY = Sampling(temperature=0.0, max_new_tokens=LONGEST)


def quickstart(seed: int = 0, base: str | None = None) -> Goals:
    """Base, SFT, four RL specialists, one student by MOPD, and the controls, on a laptop CPU in minutes.

    ``seed`` decides every training stage, never the tasks. ``base``: a Hugging Face folder to start from instead of the
    small decoder pretrained here.
    """
    tasks, start, sft = started(seed, base)
    specialists = {name: specialist(name, tasks, sft, seed=seed) for name in NAMES}
    student = distilled(tasks, sft, {name: stage.out() for name, stage in specialists.items()}, seed)
    continued = Fit(
        name="sft-continued",
        model=sft.out(),
        data=tasks.out("gold"),
        optimizer=AdamW(lr=1e-3),
        schedule=Schedule(warmup=5),
        steps=100_000,
        budget=Budget(of=tuple(stage.out() for stage in specialists.values())),
        select=Selection(tasks=tasks.out("dev"), env=SOLVED, every=100, limit=125, patience=8, sampling=GREEDY),
        seed=seed,
    )
    checkpoints: dict[str, Stage] = {"base": start, "sft": sft}
    checkpoints |= {f"specialist {name}": stage for name, stage in specialists.items()}
    checkpoints |= {"student": student, "sft continued": continued}
    return _goals(tasks, checkpoints, seed)


def started(seed: int, base: str | None = None) -> tuple[TaskSplits, Stage, Fit]:
    """The tasks, the base and the SFT policy that everything else starts from; studies start there too."""
    tasks = TaskSplits(name="tasks", domains=DOMAINS)
    start = pretrained(tasks, seed) if base is None else Pretrained(name="pretrain", path=base)
    return tasks, start, tuned(tasks, start, seed)


def pretrained(tasks: TaskSplits, seed: int, suffix: str = "") -> Stage:
    """A small decoder, pretrained to an imperfect base on documents of which some are wrong. ``suffix`` goes to the names."""
    init = NewModel(name=f"init{suffix}", alphabet=ALPHABET, seed=seed)
    return Fit(
        name=f"pretrain{suffix}",
        model=init.out(),
        data=tasks.out("pretrain"),
        template=Document(),
        optimizer=Muon(lr=0.014, rest=AdamW(lr=3e-3)),
        schedule=Schedule(shape="linear", warmup=20, floor=0.05),
        steps=1500,
        rows=32,
        seed=seed,
    )


def tuned(tasks: TaskSplits, start: Stage, seed: int, env: Env = SOLVED, **changes: Any) -> Fit:
    """SFT on the gold answers, to the best of its development trials, which ``env`` judges; with other fields."""
    select = Selection(tasks=tasks.out("dev"), env=env, every=20, limit=125, patience=3, sampling=GREEDY)
    fields: dict[str, Any] = {
        "name": "sft",
        "model": start.out(),
        "data": tasks.out("gold"),
        "optimizer": AdamW(lr=1e-3),
        "schedule": Schedule(warmup=5),
        "steps": 200,
        "select": select,
        "seed": seed,
    }
    return Fit(**{**fields, **changes})


def specialist(domain: str, tasks: TaskSplits, sft: Stage, **changes: Any) -> Online:
    """RLVR on one domain: GRPO's group-relative advantage, DAPO's token-level loss and filter, no KL; with other fields."""
    if domain not in CLIMB:
        raise SpecError(f"unknown domain {domain!r}{suggest(domain, CLIMB)}")
    fields: dict[str, Any] = {
        "name": f"rl-{domain}",
        "credit": (GroupRelative(),),
        "loss": DAPO(),
        "optimizer": AdamW(lr=2e-4),
        "schedule": Schedule(warmup=5),
        "steps": CLIMB[domain],
        "prompts": 32,
        "group": 8,
        "sampling": Sampling(max_new_tokens=LONGEST),
    }
    play = {"model": sft.out(), "tasks": tasks.out("rl"), "domains": (domain,), "env": SOLVED}
    return Online(**{**fields, **play, **changes})


def distilled(tasks: TaskSplits, sft: Stage, teachers: dict[str, At], seed: int, **changes: Any) -> Online:
    """MOPD: the exact reverse KL to each domain's teacher on the student's own samples; with other fields."""
    fields: dict[str, Any] = {
        "name": "mopd",
        "model": sft.out(),
        "tasks": tasks.out("rl"),
        "domains": NAMES,
        "env": SOLVED,
        "teachers": teachers,
        "credit": (Teacher(want="hidden"),),
        "loss": FullReverseKL(),
        "optimizer": AdamW(lr=1e-3),
        "schedule": Schedule(shape="linear", warmup=5, floor=0.1),
        "steps": 100,
        "prompts": 64,
        "group": 1,
        "sampling": Sampling(max_new_tokens=LONGEST),
        "seed": seed,
    }
    return Online(**{**fields, **changes})


def measured(
    label: str, stage: Stage, tasks: TaskSplits, domain: str, template: Template | None = None, env: Env = SOLVED
) -> At:
    """Greedy accuracy of a checkpoint on a domain's held-out tasks."""
    return Evaluate(
        name=f"eval {label} / {domain}",
        model=stage.out(),
        tasks=tasks.out("heldout"),
        domain=domain,
        env=env,
        sampling=GREEDY,
        template=template or Chat(),
    ).out()


def majority(tasks: TaskSplits, domains: Sequence[str], verifier: Verifier) -> dict[str, At]:
    """The best constant answer of each domain."""
    split: dict[str, Any] = {"train": tasks.out("rl"), "heldout": tasks.out("heldout"), "verifier": verifier}
    return {name: Majority(name=f"majority / {name}", domain=name, **split).out() for name in domains}


def _goals(tasks: TaskSplits, checkpoints: dict[str, Stage], seed: int) -> Goals:
    """One evaluation for each checkpoint and domain; the base is asked in its own format."""
    rows: dict[str, dict[str, At]] = {}
    sources: dict[str, At] = {}
    for label, stage in checkpoints.items():
        template = Document(format=LAYOUT, stop=("\n",)) if label == "base" else None
        sources[label] = stage.out()
        rows[label] = {name: measured(label, stage, tasks, name, template) for name in NAMES}
    rows["majority answer"] = majority(tasks, NAMES, SOLVED.verifier)
    table = Table(
        rows=rows,
        before="sft",
        after="student",
        teachers={name: f"specialist {name}" for name in NAMES},
        controls=("sft continued", "base", "majority answer"),
        sources=sources,
    )
    return Goals(recipe="quickstart", stages=(checkpoints["student"].out(),), table=table, seed=seed)
