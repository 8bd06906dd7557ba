"""What the commands share: options, opening a store, finding runs and artifacts in it, printing.

Leaves out: any command.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutelage.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from tutelage.catalog import Chosen
    from tutelage.device import Device
    from tutelage.graph import Plan
    from tutelage.store import Store

Which = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a path to a recipe .py or record .json.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="A recipe argument or a stage's field; repeatable.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The one seed to run (default 0).", min=0)]
Seeds = Annotated[str | None, typer.Option("--seeds", metavar="N|A,B,..", help="How many seeds from 0 on, or which ones.")]
Where = Annotated[Path, typer.Option("--store", metavar="DIR", envvar="TUTELAGE_STORE", help="Where everything made is kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Cores = Annotated[
    int | None, typer.Option("--cores", "--jobs", "-j", metavar="N", help="CPU cores to share (default: all).", min=1)
]
On = Annotated[
    str,
    typer.Option(
        "--device", metavar="DEVICE", help="Where models are: auto (a CUDA device if there is one), cpu, cuda:N, mps."
    ),
]
AtOnce = Annotated[
    int, typer.Option("--device-stages", metavar="N", help="Stages at once on a device other than the CPU.", min=1)
]
STORE = Path("store")


def chosen_recipe(recipe: str, sets: list[str] | None, seed: int | None, seeds: str | None) -> Chosen:
    from tutelage.catalog import choose, parse_seeds

    if seed is not None and seeds is not None:
        raise UserError("give --seed or --seeds, not both")
    which = parse_seeds(seeds) if seeds is not None else [seed] if seed is not None else None
    return choose(recipe, sets or (), which)


def planned(chosen: Chosen, store: Path) -> Plan:
    from tutelage.graph import plan as make
    from tutelage.store import Store

    return make(chosen.goals, Store(store, create=False).has)


def found_device(asked: str, stages: int, plan: Plan, out: Console) -> Device:
    """The device that a run's models are to be on; says which where it is not the CPU. Raises `UserError`."""
    from tutelage.device import CPU, find

    if asked == "auto" and not any(node.stage.on_device for node in plan.todo):
        return CPU
    device = find(asked, stages)
    if device.accelerator:
        out.print(f"models are on {device.where}, {device.name}", highlight=False, markup=False, soft_wrap=True)
    return device


def open_store(store: Path) -> Store:
    """A store to read. Raises `UserError` where there is none."""
    from tutelage.store import Store, absolute

    if not (absolute(store) / "format").exists():
        raise UserError(f"there is no store in {store}; give --store DIR, set TUTELAGE_STORE, or make one with `tutelage run`")
    return Store(store)


def console() -> Console:
    from rich.console import Console

    out = Console()
    return out if out.is_terminal or "COLUMNS" in os.environ else Console(width=120)


def near(path: Path) -> str:
    """A path as the user would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def print_json(body: Any) -> None:
    print(json.dumps(body, indent=1, ensure_ascii=False))


# --- finding ---


def load_run(home: Store, name: str) -> dict[str, Any]:
    """A run whose file holds what a run's does. Raises `UserError`."""
    body = home.load_run(name)
    goals = body.get("goals")
    listed = goals if isinstance(goals, list) else []
    whole = (isinstance(g, dict) and isinstance(g.get("record"), dict) and isinstance(g.get("keys"), dict) for g in listed)
    if not listed or not all(whole):
        file = home.root / "runs" / f"{body['run']}.json"
        raise UserError(f"{file} is not a run: it has no goals with record and keys; remove the file")
    return body


def find(home: Store, text: str) -> tuple[str, str]:
    """(key, port) of ``KEY``, ``NAME``, ``NAME@SEED``, each with ``:PORT``. Raises `UserError`."""
    from tutelage.spec import suggest

    text, _, port = text.partition(":")
    name, _, seed = text.rpartition("@")
    key = next((k for k in of_seed(home, name, seed) if home.has(k)), None) if name else None
    key = key or home.find(text)
    outputs = home.meta(key)["outputs"]
    if port and port not in outputs:
        raise UserError(f"{text!r} has no port {port!r}{suggest(port, outputs)}")
    return key, port or (next(iter(outputs)) if len(outputs) == 1 else "")


def of_seed(home: Store, name: str, seed: str) -> list[str]:
    """Keys of a stage in runs with a seed, newest run first."""
    return [k for s, k in seeds_of(home, name) if s == seed]


def seeds_of(home: Store, name: str) -> list[tuple[str, str]]:
    """(seed, key) of every run's stage of that name, newest run first."""
    runs = [load_run(home, r) for r in reversed(home.runs())]
    return [(str(g.get("seed", 0)), g["keys"][name]) for r in runs for g in r["goals"] if name in g["keys"]]


def newest_of(home: Store, name: str, key: str) -> str:
    """Which seed a bare name was taken to mean (the first of the newest run), where the store has several; else nothing."""
    if home.meta(key)["name"] != name:
        return ""
    newest: dict[str, str] = {}
    mine = ""
    for seed, each in seeds_of(home, name):
        if home.has(each):
            newest.setdefault(seed, each)
            mine = mine or (seed if each == key else "")
    if len(set(newest.values())) < 2 or not mine:
        return ""
    all_seeds = ", ".join(f"{name}@{s}" for s in sorted(newest, key=lambda s: (len(s), s)))
    return f"{name}@{mine} (one of {len(newest)} seeds: {all_seeds})"


def edge(label: str, port: str, step: int | None) -> str:
    return f"{label}:{port}" + (f"@{step}" if step is not None else "")
