"""``tutelage run``: make what is not made yet, then show it."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutelage.commands.report import show
from tutelage.commands.shared import (
    STORE,
    AtOnce,
    Cores,
    On,
    Seed,
    Seeds,
    Sets,
    Where,
    Which,
    chosen_recipe,
    console,
    found_device,
    planned,
)
from tutelage.spec import UserError

if TYPE_CHECKING:
    from tutelage.graph import Plan
    from tutelage.store import Store

SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave bad rows of your files out and count them, instead of ending.")
]


def run(
    recipe: Which,
    sets: Sets = None,
    seed: Seed = None,
    seeds: Seeds = None,
    store: Where = STORE,
    cores: Cores = None,
    device: On = "auto",
    device_stages: AtOnce = 1,
    skip_bad_rows: SkipBadRows = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of bars.")] = False,
    checkpoint_every: Annotated[
        float, typer.Option(metavar="SECONDS", help="Checkpoints of a running stage are at most so far apart.", min=0)
    ] = 60.0,
) -> None:
    """Make what is not made yet, then print the table and write the report. The same command goes on after a stop."""
    chosen = chosen_recipe(recipe, sets, seed, seeds)
    if skip_bad_rows:
        from tutelage.catalog import skipping

        chosen = skipping(chosen)
    made = planned(chosen, store)

    from tutelage.estimate import Estimator, human_time, summary
    from tutelage.progress import watch
    from tutelage.run import core_count
    from tutelage.run import run as execute
    from tutelage.store import Store

    out = console()
    there = found_device(device, device_stages, made, out)
    home, cores = Store(store), cores or core_count()
    estimator = Estimator(home, there)
    out.print(f"[bold]{chosen.name}[/]: {summary(made, estimator, cores)}", highlight=False, soft_wrap=True)
    with watch(made, estimator, cores, out, plain) as watcher:
        outcome = execute(
            made,
            home,
            arguments=chosen.arguments,
            argv=sys.argv,
            cores=cores,
            device=there,
            every=checkpoint_every,
            watcher=watcher,
        )
    for line in _skipped(made, home):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    took = human_time(time.monotonic() - watcher.began)
    if outcome.state == "stopped":
        out.print(f"stopped after {took}; run the same command again to go on from the last checkpoints", soft_wrap=True)
    elif outcome.state == "failed":
        _failed(outcome.failed, len(made.todo), len(made.todo) - len(outcome.failed) - len(outcome.made))
    else:
        out.print(f"run [bold]{outcome.run}[/] done in {took}", highlight=False)
        show(home, outcome.run, bool(chosen.goals[0].table), out)
    raise typer.Exit(outcome.exit_code)


def _failed(failed: dict[str, str], total: int, unmade: int) -> None:
    names = ", ".join(failed)
    rest = f"; {unmade} more were not made" if unmade > 0 else ""
    print(f"error: {len(failed)} of {total} stages failed ({names}){rest}; what was made is kept", file=sys.stderr)


def _skipped(made: Plan, home: Store) -> list[str]:
    """One line for each stage that left rows of its files out."""
    lines = []
    for node in made.nodes.values():
        found: dict[str, Any] = {}
        with suppress(UserError):  # a damaged artifact is not this line's to tell
            found = home.meta(node.key)["facts"].get("skipped", {}) if home.has(node.key) else {}
        if found.get("rows"):
            why = ", ".join(f"{reason}: {count}" for reason, count in found["reasons"].items())
            lines.append(f"{node.label} skipped {found['rows']} of {found['of']} rows ({why}); the first: {found['first'][0]}")
    return lines
