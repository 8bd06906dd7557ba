"""A made-up store of a consolidation study: two specialists, five ways to make one student, two of them picked among trials.

Costs are whole numbers of `UNIT`, so that ledgers can be added by hand. `python -m tests.report.consolidation FOLDER` makes
one, and its pages, to look at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.report.synthetic import ref
from tutelage.spec import digest
from tutelage.store import Store

UNIT = 1e10
DOMAINS = ("a", "b", "raw a")
"""The last is nobody's to teach: the same tasks in another format."""
ACCURACY = {
    "sft": (0.3, 0.4, 0.8),
    "specialist a": (0.7, 0.38, 0.6),
    "specialist b": (0.28, 0.8, 0.78),
    "MOPD": (0.69, 0.78, 0.66),
    "trace SFT": (0.6, 0.66, 0.7),
    "mixed RL": (0.66, 0.75, 0.62),
    "average": (0.45, 0.52, 0.74),
    "task arithmetic": (0.5, 0.6, 0.72),
}
STAGES = {"sft": "sft", "specialist a": "rl-a", "specialist b": "rl-b", "MOPD": "mopd", "trace SFT": "best-fit"}
STAGES |= {"mixed RL": "mixed", "average": "average", "task arithmetic": "best-sum"}
COST = {"init": 1, "pretrain": 1000, "sft": 100, "rl-a": 10, "rl-b": 20, "mopd": 3, "mixed": 40, "traces": 5, "more-traces": 6}
COST |= {"fit-short": 4, "fit-long": 8, "dev-choice": 99}
PICKED = {"best-fit": ("short", "long"), "best-sum": ("0.5", "0.5")}
"""By seed."""
DEVELOPMENT = {"best-fit": 2, "best-sum": 7}


def stages(seed: int) -> dict[str, Any]:
    """The stages that make models and data."""
    fit, online = {"kind": "stages.fit.Fit", "seed": seed}, {"kind": "stages.online.Online", "seed": seed}
    start, prompts = {"model": ref("sft")}, {"tasks": ref("tasks", "rl")}
    specialists = [ref("rl-a"), ref("rl-b")]
    both, select = {"policies": {"a": ref("rl-a"), "b": ref("rl-b")}}, {"tasks": ref("dev-choice", "dev")}
    merged = {"models": specialists, "base": ref("sft")}
    return {
        "tasks": {"kind": "stages.tasks.TaskSplits"},
        "dev-choice": {"kind": "stages.choose.Choose", "tasks": ref("tasks", "dev")},
        "init": {"kind": "stages.model.NewModel"},
        "pretrain": {**fit, "model": ref("init"), "data": ref("tasks", "pretrain")},
        "sft": {**fit, "model": ref("pretrain"), "data": ref("tasks", "gold")},
        "rl-a": {**online, **start, **prompts},
        "rl-b": {**online, **start, **prompts},
        "mopd": {**online, **start, **prompts, "teachers": {"a": ref("rl-a"), "b": ref("rl-b")}},
        "mixed": {**online, **start, **prompts, "budget": [ref("mopd"), *specialists]},
        "traces": {"kind": "stages.traces.Traces", **prompts, **both},
        "more-traces": {"kind": "stages.traces.Traces", **prompts, **both},
        "fit-short": {**fit, **start, "data": [ref("traces", "traces")], "select": select},
        "fit-long": {**fit, **start, "data": [ref("traces", "traces"), ref("more-traces", "traces")]},
        "best-fit": {
            "kind": "stages.best.Best",
            "candidates": {"short": ref("fit-short"), "long": ref("fit-long")},
            "tasks": ref("tasks", "dev"),
        },
        "average": {"kind": "stages.average.Average", **merged},
        "sum-0.5": {"kind": "stages.average.TaskArithmetic", **merged, "scale": 0.5},
        "sum-1": {"kind": "stages.average.TaskArithmetic", **merged, "scale": 1.0},
        "best-sum": {
            "kind": "stages.best.Best",
            "candidates": {"0.5": ref("sum-0.5"), "budget 1": ref("sum-1")},
            "tasks": ref("tasks", "dev"),
        },
    }


def record(seed: int) -> dict[str, Any]:
    made = stages(seed)
    rows: dict[str, Any] = {}
    for row in ACCURACY:
        for domain in DOMAINS:
            name = f"eval {row} / {domain}"
            made[name] = {"kind": "stages.evaluate.Evaluate", "model": ref(STAGES[row]), "domain": domain}
            rows.setdefault(row, {})[domain] = ref(name, "scores")
    table = {
        "kind": "graph.Table",
        "rows": rows,
        "before": "sft",
        "after": "MOPD",
        "teachers": {"a": "specialist a", "b": "specialist b"},
        "methods": ["MOPD", "trace SFT", "mixed RL", "average", "task arithmetic"],
        "sources": {row: ref(stage) for row, stage in STAGES.items()},
    }
    return {"recipe": "consolidation", "seed": seed, "stages": made, "goals": [ref("mopd")], "table": table}


def build(root: Path, n: int = 40, seeds: tuple[int, ...] = (0, 1), skip: tuple[tuple[str, int], ...] = ()) -> Store:
    """A store with one run ``consolidation-1``; ``skip``: (stage, seed) that are not made yet."""
    with mock.patch("os.fsync"):
        store, goals = Store(root), []
        for seed in seeds:
            rec = record(seed)
            keys = {name: digest([name, seed]) for name in rec["stages"]}
            for name, spec in rec["stages"].items():
                if (name, seed) not in skip:
                    make(store, name, spec, keys[name], seed, n)
            goals.append({"record": rec, "seed": seed, "keys": keys})
        body = {"recipe": "consolidation", "arguments": {}, "started": 1.0, "argv": ["tutelage", "run", "consolidation"]}
        store.save_run("consolidation-1", {**body, "state": "running" if skip else "done", "goals": goals})
    return store


def make(store: Store, name: str, spec: dict[str, Any], key: str, seed: int, n: int) -> None:
    """Publishes one artifact. Each seed of mopd costs one unit more than the one before."""
    work = store.work(key)
    facts: dict[str, Any] = {}
    if name.startswith("eval "):
        row, domain = name.removeprefix("eval ").split(" / ")
        write_scores(work / "scores", ACCURACY[row][DOMAINS.index(domain)], domain, [seed, int(digest(name)[:8], 16)], n)
    elif name in PICKED:
        label, *_ = [PICKED[name][seed % 2]]
        trials = {c: {"dev": 0.6 if c == label else 0.5, "domains": {"a": 0.5}} for c in spec["candidates"]}
        facts = {"selected": {"candidate": label, "dev": 0.6}, "trials": trials}
        facts["development_flops"] = DEVELOPMENT[name] * UNIT
    flops = UNIT * (COST.get(name, 0) + (seed if name == "mopd" else 0))
    told = {"key": key, "name": name, "kind": spec["kind"], "record": spec, "inputs": [], "outputs": {}, "facts": facts}
    times = {"seconds": 1.0, "started": 1.0, "finished": 2.0}
    store.publish(key, {**told, "cost": {"flops": flops, "tokens": {"trained": 10} if flops else {}}, **times})


def write_scores(folder: Path, mean: float, domain: str, seed: list[int], n: int) -> None:
    """Tasks have a difficulty that every checkpoint shares."""
    folder.mkdir()
    hard = np.random.default_rng(DOMAINS.index(domain)).random(n)
    luck = np.random.default_rng(seed).normal(size=n) * 0.1
    values = (hard + luck < mean).astype(float)
    pq.write_table(pa.table({"task": [f"{domain}-{i}" for i in range(n)], "value": values}), folder / "scores.parquet")


if __name__ == "__main__":
    from rich.console import Console

    from tutelage.report import data, html, scatter, terminal

    target = Path(sys.argv[1])
    made = build(target / "store", 400, (0, 1, 2)) if not (target / "store").exists() else Store(target / "store")
    terminal.show(made, "last", Console(width=int(sys.argv[2]) if sys.argv[2:] else 80))
    html.write(made, "last", target / "report.html")
    found = data.collect(made, "last")["methods"]
    (target / "methods.json").write_text(json.dumps(found, indent=1))
    for kind in ("svg", "png"):
        scatter.save(found, target / f"methods.{kind}")
