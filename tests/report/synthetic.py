"""A made-up store that looks like the quickstart's: stages, two seeds, four domains, 500 tasks each, transcripts, metrics.

Numbers come from a fixed generator, so that tests can recompute what a report should say from the files themselves.
`python tests/report/synthetic.py FOLDER` makes one, and its page, to look at.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.spec import digest
from tutelage.store import Store

DOMAINS = ("sum", "reverse", "sort", "base")
HOSTILE = "<script>alert('reply')</script> & <b>bold</b>"
ACCURACY = {
    "base": (0.03, 0.10, 0.12, 0.08),
    "sft": (0.31, 0.33, 0.52, 0.40),
    "specialist sum": (0.68, 0.21, 0.45, 0.33),
    "specialist reverse": (0.19, 0.79, 0.50, 0.28),
    "specialist sort": (0.27, 0.30, 0.71, 0.39),
    "specialist base": (0.25, 0.27, 0.44, 0.41),
    "student": (0.66, 0.72, 0.70, 0.43),
    "sft continued": (0.36, 0.40, 0.57, 0.41),
    "majority answer": (0.01, 0.00, 0.02, 0.01),
}
STAGES = {"base": "pretrain", "sft": "sft", "student": "mopd", "sft continued": "sft-continued"}
STAGES |= {f"specialist {d}": f"rl-{d}" for d in DOMAINS}
"""The last domain's specialist learns nothing: a domain without a gap."""


def ref(stage: str, port: str = "policy", step: int | None = None) -> dict[str, Any]:
    return {"ref": stage, "port": port, "step": step}


def checkpoint(row: str) -> dict[str, Any]:
    """The edge to what a row measures: one specialist is taken from the middle of its series."""
    return ref(STAGES[row], step=200 if row == "specialist sort" else None)


def trained(seed: int) -> dict[str, Any]:
    """The stages that make models and data."""
    fit = {"kind": "stages.fit.Fit", "loss": {"kind": "losses.nll.NLL"}, "seed": seed}
    online = {"kind": "stages.online.Online", "loss": {"kind": "losses.policy.DAPO", "clip_low": 0.2}, "seed": seed}
    select, learn = {"tasks": ref("tasks", "dev")}, {"model": ref("sft"), "tasks": ref("tasks", "rl")}
    stages: dict[str, Any] = {
        "tasks": {"kind": "stages.tasks.TaskSplits", "domains": list(DOMAINS), "count": 500},
        "init": {"kind": "stages.model.NewModel", "width": 96},
        "pretrain": {**fit, "model": ref("init"), "data": ref("tasks", "pretrain"), "steps": 780},
        "sft": {**fit, "model": ref("pretrain"), "data": ref("tasks", "gold"), "select": select},
    }
    for domain in DOMAINS:
        stages[f"rl-{domain}"] = {**online, **learn, "domains": [domain], "credit": [{"kind": "credit.group.GroupRelative"}]}
    taught = {d: checkpoint(f"specialist {d}") for d in DOMAINS}
    stages["mopd"] = {**online, **learn, "teachers": taught, "credit": [{"kind": "credit.teacher.Teacher"}]}
    budget = [ref(f"rl-{d}") for d in DOMAINS]
    stages["sft-continued"] = {**fit, "model": ref("sft"), "data": ref("tasks", "gold"), "budget": budget, "select": select}
    return stages


def record(seed: int, table: bool = True) -> dict[str, Any]:
    """The record of the made-up recipe."""
    stages = trained(seed)
    rows: dict[str, Any] = {}
    for row in ACCURACY:
        for domain in DOMAINS:
            name = f"eval {row} / {domain}"
            if row in STAGES:
                edges = {"kind": "stages.evaluate.Evaluate", "model": checkpoint(row), "tasks": ref("tasks", "heldout")}
            else:
                edges = {"kind": "stages.majority.Majority", "train": ref("tasks", "rl"), "heldout": ref("tasks", "heldout")}
            stages[name] = {**edges, "domain": domain}
            rows.setdefault(row, {})[domain] = ref(name, "scores")
    drawn = {
        "kind": "graph.Table",
        "rows": rows,
        "before": "sft",
        "after": "student",
        "teachers": {d: f"specialist {d}" for d in DOMAINS},
        "controls": ["sft continued", "base", "majority answer"],
        "sources": {r: checkpoint(r) for r in STAGES},
    }
    goals = [ref("mopd")]
    return {"recipe": "quickstart", "seed": seed, "stages": stages, "goals": goals, "table": drawn if table else None}


def build(root: Path, seeds: tuple[int, ...] = (0, 1), n: int = 500, table: bool = True, skip: tuple[str, ...] = ()) -> Store:
    """A store with one run ``quickstart-1``; stages whose name begins with one of ``skip`` are not made yet."""
    with mock.patch("os.fsync"):  # hundreds of folders that need not outlive a power cut
        return _build(Store(root), seeds, n, table, skip)


def _build(store: Store, seeds: tuple[int, ...], n: int, table: bool, skip: tuple[str, ...]) -> Store:
    goals = []
    for seed in seeds:
        rec = record(seed, table)
        keys: dict[str, str] = {}
        for name, spec in rec["stages"].items():
            shared = name == "tasks"
            keys[name] = digest([name, 0 if shared else seed])
            if not any(name.startswith(s) for s in skip) and not store.has(keys[name]):
                make(store, name, spec, keys, seed, n)
        goals.append({"record": rec, "seed": seed, "keys": keys})
    body = {
        "recipe": "quickstart",
        "arguments": {"seeds": len(seeds)},
        "started": 1_760_000_000.0,
        "finished": 1_760_000_420.0,
        "seconds": 420.0,
        "argv": ["tutelage", "run", "quickstart", "--seeds", str(len(seeds))],
        "state": "running" if skip else "done",
        "goals": goals,
    }
    store.save_run("quickstart-1", body)
    return store


def make(store: Store, name: str, spec: dict[str, Any], keys: dict[str, str], seed: int, n: int) -> None:
    """Publishes one artifact."""
    key = keys[name]
    work = store.work(key)
    rng = np.random.default_rng([seed, int(digest(name)[:8], 16)])
    if name == "tasks":
        write_tasks(work / "heldout", n)
    elif name.startswith("eval "):
        write_scores(work / "scores", name, spec["domain"], seed, n)
    else:
        (work / "policy").mkdir()
        write_metrics(work / "metrics.jsonl", name, rng)
    params, steps = 350_000, 1 if name in ("tasks", "init") else 60 if name.startswith("eval ") else 300
    trained = 0 if name.startswith(("eval ", "tasks", "init")) else steps * 4_000
    sampled = steps * 2_500 if spec["kind"].endswith(("Online", "Evaluate")) else 0
    meta = {
        "key": key,
        "name": name,
        "kind": spec["kind"],
        "record": spec,
        "inputs": [],
        "outputs": {},
        "facts": {"selected": {"step": 200, "dev": 0.5}, "steps": 300, "budget": 2.6e12} if name == "sft-continued" else {},
        "cost": {
            "flops": params * (6.0 * trained + 2.0 * sampled),
            "tokens": {"trained": trained, "sampled": sampled} if trained or sampled else {},
        },
        "seconds": steps / 10,
        "started": 1_760_000_000.0 - (5000 if name == "pretrain" else 0),
        "finished": 1_760_000_000.0 + steps / 10 - (5000 if name == "pretrain" else 0),
        "host": "laptop",
        "threads": 1,
    }
    store.publish(key, meta)


def write_tasks(folder: Path, n: int) -> None:
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for domain in DOMAINS:
        for i in range(n):
            prompt = [{"role": "user", "content": f"{domain}: {i * 7919 % 9973}+{i}="}]
            rows.append({"id": f"{domain}-{i}", "domain": domain, "prompt": prompt, "gold": str(i * 7919 % 9973 + i)})
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")


def write_scores(folder: Path, name: str, domain: str, seed: int, n: int) -> None:
    """Tasks have a difficulty that every checkpoint shares, so that paired differences are tighter than unpaired ones."""
    folder.mkdir()
    row = name.removeprefix("eval ").removesuffix(f" / {domain}")
    p = ACCURACY[row][DOMAINS.index(domain)] + (0.02 if seed and row not in ("base", "majority answer") else 0)
    hard = np.random.default_rng([7, DOMAINS.index(domain)]).normal(size=n)
    own = np.random.default_rng([seed, int(digest(name)[:8], 16)]).normal(size=n)
    ability = hard * 0.8 + own * 0.6
    right = ability < np.quantile(ability, p) if p > 0 else np.zeros(n, bool)
    rows = []
    for i in range(n):
        gold = str(i * 7919 % 9973 + i)
        reply = f"step 1: {i}\nstep 2: carry\nanswer: {gold if right[i] else '17'}"
        error = "took longer than 5 s" if row == "student" and domain == "sum" and i in (3, 4) else None
        rows.append(
            {
                "task": f"{domain}-{i}",
                "value": 0.0 if error else float(right[i]),
                "error": error,
                "reply": reply if right[i] or row != "student" else HOSTILE,
                "tokens": 20 + i % 9,
                "level": i % 3,
            }
        )
    schema = pa.schema(
        [
            ("task", "string"),
            ("value", "float64"),
            ("error", "string"),
            ("reply", "string"),
            ("tokens", "int64"),
            ("level", "int64"),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "scores.parquet")
    mean = float(np.mean([r["value"] for r in rows]))
    errors = sum(r["error"] is not None for r in rows)
    (folder / "summary.json").write_text(json.dumps({"domain": domain, "n": n, "errors": errors, "mean": mean}))


def write_metrics(file: Path, name: str, rng: np.random.Generator) -> None:
    online = name.startswith(("rl-", "mopd"))
    if name == "init":
        return
    with file.open("w") as out:
        for step in range(1, 301):
            t = 1 - math.exp(-step / 90)
            line: dict[str, Any] = {"step": step, "time": 1_760_000_000 + step * 0.2, "loss": 2 - t + rng.normal() * 0.03}
            if online:
                line |= {
                    "reward": 0.3 + 0.4 * t + rng.normal() * 0.05,
                    "entropy": 0.5 * math.exp(-step / 120) + abs(rng.normal()) * 0.02,
                    "length": 22 + 10 * t + rng.normal(),
                    "informative_groups": max(0.0, 0.7 - 0.4 * t + rng.normal() * 0.06),
                    "verifier_errors": int(rng.random() < 0.01),
                    "tokens_per_s": 9000 + rng.normal() * 300,
                }
            else:
                line |= {"nll": 2 - t + rng.normal() * 0.03, "tokens_per_s": 30000 + rng.normal() * 600}
            if name == "mopd":
                share = np.array([0.4, 0.2, 0.25, 0.15]) + rng.normal(size=4) * 0.02
                line |= {"kl": 0.3 * math.exp(-step / 60) + abs(rng.normal()) * 0.004}
                line |= {f"token_share/{d}": float(s / share.sum()) for d, s in zip(DOMAINS, share, strict=True)}
                line |= {f"reward/{d}": 0.4 + 0.3 * t + rng.normal() * 0.05 for d in DOMAINS}
            if step % 25 == 0 and not online and name != "pretrain":
                line |= {f"dev/{d}": 0.3 + 0.3 * t + rng.normal() * 0.02 for d in DOMAINS}
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    from rich.console import Console

    from tutelage.report import html, terminal

    target = Path(sys.argv[1])
    made = build(target / "store") if not (target / "store").exists() else Store(target / "store")
    terminal.show(made, "last", Console(width=100))
    html.write(made, "last", target / "report.html")
