"""What is run and killed, each in a process of its own: it forks, and a fork of a process with threads may hang.

    python -m tests.kill.programs NAME FOLDER SEED KILLS

prints as JSON how it ended, ``wrong`` (empty where all is well), and which kills there were.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pkgutil
import random
import shutil
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import tutelage
from tests import toy
from tests.kill.harness import Killer, Moment, differences, drawn, forks, goal_keys, once
from tests.kill.inject import sitecustomize as inject
from tutelage import worker as worker_module
from tutelage.graph import Goals, all_goals, key, order, plan
from tutelage.run import run
from tutelage.store import Store

MOMENTS = 40
"""Kills meant for one store; some stages are done before all of theirs have come."""


def warm() -> None:
    """Imports and looks up what a worker will, so that no fork has to."""
    for name in ("filelock", "platform"):
        importlib.import_module(name)
    for name in worker_module.LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)


def warm_models(folder: Path) -> None:
    """The same for stages with models. Some libraries do more where they find others, such as pandas."""
    from tests import tiny
    from tutelage.model.folder import load_model, load_tokenizer, save_model

    ours = (m.name for m in pkgutil.walk_packages(tutelage.__path__, "tutelage.") if not m.name.endswith("__main__"))
    for name in (*ours, "pandas", "pyarrow.parquet", "pyarrow.dataset", "reasoning_gym", "tokenizers.trainers"):
        with suppress(ImportError):
            importlib.import_module(name)
    save_model(tiny.model(), tiny.tokenizer(), folder)
    load_model(folder)
    load_tokenizer(folder)


def quickstart(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """The short quickstart, whole, and in as many stores as ``kills`` ask for killed at random moments in every stage."""
    warm()
    warm_models(folder / "model")

    from tests.kill.quick import short

    goals, rng = short(), random.Random(seed)
    kinds = goal_keys(goals)
    whole = Store(folder / "whole")
    usual, died, wrong = Killer(folder / "trace", trace=True), [], []
    assert once(goals, whole, usual, every=0)[0].state == "done"
    while len(died) < kills:
        broken = Store(folder / f"broken-{len(died)}")
        killer = Killer(folder / "killed", drawn(rng, usual, kinds, MOMENTS))
        for _ in range(MOMENTS):
            outcome, more = once(goals, broken, killer, every=rng.choice((0.0, 0.0, 0.0, 0.2)))
            wrong += more
            if outcome.state == "done":
                break
        wrong += differences(whole, broken, goals)
        died += killer.died
    names = {key(s): s.name for s in order(at.of for at in all_goals(goals))}
    return {
        "wrong": wrong,
        "kills": [f"{names[k]}: {m}" for k, m in died],
        "kinds": Counter(kinds[k] for k, _ in died),
        "sorts": Counter("time" if m.seconds else m.how for _, m in died),
    }


def worker(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """A toy stage at every boundary it has, and a second time while it goes on (``kills`` is how often that)."""
    warm()
    count = toy.Count(name="count", source=toy.Make(name="data").out(), steps=3, keep=(2,))
    goals, mine, rng = Goals(recipe="toy", stages=(count.out(),)), key(count), random.Random(seed)
    whole, start = Store(folder / "whole"), Store(folder / "start")
    usual = Killer(folder / "trace", trace=True)
    assert once(goals, whole, usual, every=0)[0].state == "done"
    assert once(Goals(recipe="toy", stages=(count.source,)), start, Killer(folder / "none"), every=0)[0].state == "done"
    last, moments = usual.boundaries()[mine], usual.every(mine)
    wrong, died = [], 0
    for first in moments:
        again = [Moment(rng.randint(1, last // 2), rng.choice(inject.HOWS)) for _ in range(kills)]
        killer = Killer(folder / "killed", {mine: [first, *again]})
        shutil.copytree(start.root, folder / "broken")
        store = Store(folder / "broken")
        found = []
        try:
            for _ in range(kills + 2):
                outcome, more = once(goals, store, killer, every=0)
                found += more
            if outcome.state != "done":
                found.append(f"it ends as {outcome.state}")
            found += differences(whole, store, goals)
        except Exception as error:
            found.append(repr(error))
        wrong += [f"{first}, {again}: {f}" for f in found]
        died += len(killer.died)
        shutil.rmtree(store.root)
    return {"wrong": wrong, "moments": len(moments), "kills": died}


def parent(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """The process that runs a recipe, at every boundary it has, from the making of its store on."""
    warm()
    goals = Goals(recipe="toy", stages=(toy.Make(name="data").out(),))
    killer = Killer(folder / "killed")
    whole = Store(folder / "whole")
    assert once(goals, whole, killer, every=0)[0].state == "done"
    assert _parent(goals, folder / "traced", Moment(), folder / "trace") == 0
    moments = Killer(folder / "trace").every("parent")
    wrong, died = [], 0
    for moment in moments:
        root = folder / "broken"
        died += _parent(goals, root, moment) == -9
        found = []
        try:
            store = Store(root)
            outcome, found = once(goals, store, killer, every=0)
            if outcome.state != "done" or store.load_run("last")["state"] != "done":
                found.append(f"it ends as {outcome.state}")
            for name in store.runs():
                store.load_run(name)
            found += differences(whole, store, goals)
        except Exception as error:
            found.append(repr(error))
        wrong += [f"{moment}: {f}" for f in found]
        shutil.rmtree(root)
    return {"wrong": wrong, "moments": len(moments), "kills": died}


def clock(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """A stage of 1.2 seconds with checkpoints 0.2 seconds apart, killed at random times: how many steps it lost each time."""
    warm()
    count = toy.Count(name="count", source=toy.Make(name="data").out(), steps=60, pause=0.02)
    goals, mine, rng = Goals(recipe="toy", stages=(count.out(),)), key(count), random.Random(seed)
    store, killer = Store(folder / "broken"), Killer(folder / "killed")
    killer.moments = {mine: [Moment(seconds=rng.uniform(0.25, 0.65)) for _ in range(kills)]}
    wrong, lost = [], []
    for _ in range(kills + 1):
        outcome, more = once(goals, store, killer, every=0.2)
        wrong += more
        if outcome.state == "done":
            break
        lost.append(len(store.metrics(mine)) - (store.checkpoint(mine) or 0))
    return {"wrong": wrong, "state": outcome.state, "lost": lost}


def _parent(goals: Goals, root: Path, moment: Moment, trace: Path | None = None) -> int:
    """Runs goals in a fork that dies at a moment; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            inject.install()
            inject.arm(moment.at, moment.how, str(trace or ""), "parent", trace is not None)
            store = Store(root)
            with forks(lambda mine: None):
                os._exit(run(plan([goals], store.has), store, cores=1, every=0).exit_code)
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    os.fsync = lambda handle: None  # as in sitecustomize.py
    name, where, *numbers = sys.argv[1:]
    print(json.dumps({f.__name__: f for f in (quickstart, worker, parent, clock)}[name](Path(where), *map(int, numbers))))
