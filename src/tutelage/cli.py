"""The ``tutelage`` command: run, plan, report, lineage, recipes.

Every mistake of the user is one message that names the thing, what is valid and the nearest match, on standard error, with
exit code 2 and before any work. A failed stage exits with 1, a stopped run with 128 + the signal. Imports of weight stay
inside the commands, so that ``plan`` and ``--help`` answer at once.

Leaves out: everything but reading arguments and printing; catalog.py finds recipes, run.py runs them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tutelage.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from tutelage.catalog import Chosen
    from tutelage.graph import Node, Plan
    from tutelage.store import Store

app = typer.Typer(
    name="tutelage",
    help="Whole language-model post-training recipes, from SFT to multi-teacher distillation, as one graph of stages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
STORE = Path("store")


def _version(asked: bool) -> None:
    if asked:
        from tutelage import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _shared(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


def main() -> NoReturn:
    """Runs the command line and exits."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


# --- run -------------------------------------------------------------------------------------------------------------


@app.command()
def run(
    recipe: Which,
    sets: Sets = None,
    seed: Seed = None,
    seeds: Seeds = None,
    store: Where = STORE,
    cores: Cores = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of bars.")] = False,
    checkpoint_every: Annotated[
        float, typer.Option(metavar="SECONDS", help="Checkpoints of a running stage are at most so far apart.", min=0)
    ] = 60.0,
) -> None:
    """Make what is not made yet, then print the table and write the report. The same command goes on after a stop."""
    chosen = _choose(recipe, sets, seed, seeds)
    made = _plan(chosen, store)

    from tutelage.estimate import Estimator, human_time, summary
    from tutelage.progress import watch
    from tutelage.run import core_count
    from tutelage.run import run as execute
    from tutelage.store import Store

    home, out = Store(store), _console()
    cores = cores or core_count()
    estimator = Estimator(home)
    out.print(f"[bold]{chosen.name}[/]: {summary(made, estimator, cores)}", highlight=False)
    with watch(made, estimator, cores, out, plain) as watcher:
        outcome = execute(
            made, home, arguments=chosen.arguments, argv=sys.argv, cores=cores, every=checkpoint_every, watcher=watcher
        )
    took = human_time(time.monotonic() - watcher.began)
    if outcome.state == "stopped":
        out.print(f"stopped after {took}; run the same command again to go on from the last checkpoints")
    elif outcome.state == "failed":
        _failed(outcome.failed, len(made.todo), len(made.todo) - len(outcome.failed) - len(outcome.made))
    else:
        out.print(f"run [bold]{outcome.run}[/] done in {took}", highlight=False)
        _show(home, outcome.run, bool(chosen.goals[0].table), out)
    raise typer.Exit(outcome.exit_code)


def _failed(failed: dict[str, str], total: int, unmade: int) -> None:
    names = ", ".join(failed)
    rest = f"; {unmade} more were not made" if unmade > 0 else ""
    print(f"error: {len(failed)} of {total} stages failed ({names}){rest}; what was made is kept", file=sys.stderr)


def _show(home: Store, name: str, table: bool, out: Console, to: Path | None = None) -> None:
    """The recipe's table, and the report as a file."""
    from tutelage.report import html, terminal

    if table:
        terminal.show(home, name, out)
    path = to or home.root / "reports" / f"{name}.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        html.write(home, name, path)
    except OSError as error:
        raise UserError(f"cannot write the report to {path}: {error.strerror}; give --out FILE.html") from None
    out.print(f"report: {_near(path)}", highlight=False, soft_wrap=True)


# --- plan ------------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    recipe: Which,
    sets: Sets = None,
    seed: Seed = None,
    seeds: Seeds = None,
    store: Where = STORE,
    cores: Cores = None,
    as_json: AsJson = False,
) -> None:
    """Show which stages are stored, which will run and why, and what that will cost. Runs nothing."""
    chosen = _choose(recipe, sets, seed, seeds)
    made = _plan(chosen, store)

    from tutelage.estimate import Estimator, reasons, summary
    from tutelage.run import core_count
    from tutelage.store import Store

    home = Store(store, create=False)
    estimator, cores = Estimator(home), cores or core_count()
    why = reasons(made, home)
    if as_json:
        return _print_json(_plan_json(chosen, made, estimator, why, cores))
    out = _console()
    _plan_table(made, estimator, why, out)
    out.print(f"[bold]{chosen.name}[/]: {summary(made, estimator, cores)}", highlight=False)


def _plan_json(chosen: Chosen, made: Plan, estimator: Any, why: dict[str, str], cores: int) -> dict[str, Any]:
    from dataclasses import asdict

    from tutelage.estimate import span
    from tutelage.graph import record

    stages = [
        {
            "label": n.label,
            "name": n.stage.name,
            "kind": n.stage.kind(),
            "key": n.key,
            "status": n.status,
            "why": why[n.key],
            "inputs": [{"path": f, "key": k, "port": p, "step": s, "label": made.nodes[k].label} for f, k, p, s in n.inputs],
            "outputs": {port: {"kind": n.stage.outputs[port], **asdict(t)} for port, t in n.types.items()},
            "threads": n.stage.threads,
            "flops": n.flops,
            "seconds": estimator.seconds(n),
            "measured": estimator.measured(n),
        }
        for n in made.nodes.values()
    ]
    totals = {
        "stored": sum(n.status == "stored" for n in made.nodes.values()),
        "run": len(made.todo),
        "flops": sum(n.flops for n in made.todo),
        "seconds": span(made.todo, estimator.seconds, cores),
        "cores": cores,
    }
    arguments = {"recipe": chosen.name, "arguments": chosen.arguments}
    return {**arguments, "stages": stages, "totals": totals, "records": [record(g) for g in chosen.goals]}


def _plan_table(made: Plan, estimator: Any, why: dict[str, str], out: Console) -> None:
    """One line for stages that differ in nothing shown but their names; two where the terminal is narrow."""
    from rich.table import Table
    from rich.text import Text

    from tutelage.estimate import human_time, si

    wide = out.width >= 110
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("stage", overflow="fold", max_width=44)
    table.add_column("kind", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for head in ("FLOP", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("why", "made from") if wide else ():
        table.add_column(head, overflow="fold")
    words = {"stored": Text("stored", "green"), "run": Text("will run", "yellow"), "unneeded": Text("not needed", "dim")}
    for nodes in _alike(made, why):
        n, first = nodes[0], _reason(made, nodes[0], why)
        flops, seconds = sum(m.flops for m in nodes), sum(estimator.seconds(m) for m in nodes)
        cost = (si(flops).strip() if flops else "", human_time(seconds) if seconds else "") if n.status == "run" else ("", "")
        row = (Text(_braces([m.label for m in nodes])), type(n.stage).__name__, words[n.status], *cost)
        if wide:
            table.add_row(*row, first, _sources(made, n))
        else:
            table.add_row(*row)
            table.add_row(Text.assemble("  ", (first, "dim"), (" ← " if n.inputs else ""), _sources(made, n)))
    out.print(table, highlight=False)


def _alike(made: Plan, why: dict[str, str]) -> list[list[Node]]:
    groups: dict[Any, list[Node]] = {}
    for n in made.nodes.values():
        groups.setdefault((n.stage.kind(), n.status, why[n.key], tuple(n.inputs)), []).append(n)
    return list(groups.values())


def _reason(made: Plan, node: Node, why: dict[str, str]) -> str:
    """Why, short: which inputs a stage waits for is seen in their colour."""
    waits = any(made.nodes[k].status == "run" for _, k, _, _ in node.inputs)
    return "waits" if waits and why[node.key] == node.why else why[node.key]


def _sources(made: Plan, node: Node) -> Text:
    """Inputs; those that must run first in yellow. A port is named where there are several."""
    from rich.text import Text

    parts: dict[str, str] = {}
    for _, k, port, step in node.inputs:
        other = made.nodes[k]
        name = _edge(other.label, port, step) if len(other.stage.outputs) > 1 or step is not None else other.label
        parts[name] = "yellow" if other.status == "run" else ""
    return Text(", ").join(Text(name, style) for name, style in parts.items())


def _braces(labels: list[str]) -> str:
    """``eval student / {sum, sort}@0`` for labels that share their beginning, and their seed."""
    if len(labels) == 1:
        return labels[0]
    seeds = {label.rpartition("@")[2] if "@" in label else "" for label in labels}
    end = f"@{seeds.pop()}" if len(seeds) == 1 and "" not in seeds else ""
    labels = [label.removesuffix(end) for label in labels]
    shared = os.path.commonprefix(labels)  # noqa: RUF071 (characters are what is wanted)
    return f"{shared}{{{', '.join(label[len(shared) :] for label in labels)}}}{end}"


def _edge(label: str, port: str, step: int | None) -> str:
    return f"{label}:{port}" + (f"@{step}" if step is not None else "")


# --- report, lineage, recipes ------------------------------------------------------------------------------------------


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="A run, a recipe (its newest run), or `last`.")] = "last",
    store: Where = STORE,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a run's table and write its report as one self-contained HTML page."""
    home = _open(store)
    body = _load_run(home, run)
    if out and not as_json:
        _check_out(out)
    if as_json:
        from tutelage.report import data

        return _print_json(data.collect(home, body["run"]))
    _show(home, body["run"], bool(body["goals"][0]["record"].get("table")), _console(), out)


def _check_out(path: Path) -> None:
    """Raises `UserError` where no file can be written, before anything is printed."""
    why = ""
    try:
        if path.is_dir():
            why = "it is a folder"
        else:
            above = next(p for p in path.absolute().parents if p.exists())
            if not above.is_dir():
                why = f"{above} is not a folder"
            elif not os.access(path if path.exists() else above, os.W_OK):
                why = "no permission"
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise UserError(f"cannot write the report to {path}: {why}; give --out FILE.html")


def _load_run(home: Store, name: str) -> dict[str, Any]:
    """A run whose file holds what a run's does. Raises `UserError`."""
    body = home.load_run(name)
    goals = body.get("goals")
    listed = goals if isinstance(goals, list) else []
    whole = (isinstance(g, dict) and isinstance(g.get("record"), dict) and isinstance(g.get("keys"), dict) for g in listed)
    if not listed or not all(whole):
        file = home.root / "runs" / f"{body['run']}.json"
        raise UserError(f"{file} is not a run: it has no goals with record and keys; remove the file")
    return body


@app.command()
def lineage(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A stage's name or the start of a key; or NAME:PORT.")],
    store: Where = STORE,
    as_json: AsJson = False,
) -> None:
    """Print everything an artifact was made from, back to the first stage."""
    home = _open(store)
    key, port = _find(home, artifact)
    metas = home.lineage(key)
    if as_json:
        return _print_json({"key": key, "port": port, "stages": metas})
    out = _console()
    if several := _newest_of(home, artifact.partition(":")[0], key):
        out.print(several, highlight=False, soft_wrap=True)
    out.print(_tree(key, port, {m["key"]: m for m in metas}), highlight=False)
    total = sum(m["cost"]["flops"] for m in metas), sum(m["seconds"] for m in metas)
    from tutelage.estimate import count, human_time, si

    out.print(f"{count(len(metas), 'stage')}, {si(total[0])}FLOP, {human_time(total[1])} in all", highlight=False)
    if port:
        out.print(f"files: {_near(home.path(key, port))}", highlight=False, soft_wrap=True)


def _find(home: Store, text: str) -> tuple[str, str]:
    """(key, port) of ``KEY``, ``NAME``, ``NAME@SEED``, each with ``:PORT``. Raises `UserError`."""
    from tutelage.spec import suggest

    text, _, port = text.partition(":")
    name, _, seed = text.rpartition("@")
    key = next((k for k in _of_seed(home, name, seed) if home.has(k)), None) if name else None
    key = key or home.find(text)
    outputs = home.meta(key)["outputs"]
    if port and port not in outputs:
        raise UserError(f"{text!r} has no port {port!r}{suggest(port, outputs)}")
    return key, port or (next(iter(outputs)) if len(outputs) == 1 else "")


def _of_seed(home: Store, name: str, seed: str) -> list[str]:
    """Keys of a stage in runs with a seed, newest run first."""
    return [k for s, k in _seeds_of(home, name) if s == seed]


def _seeds_of(home: Store, name: str) -> list[tuple[str, str]]:
    """(seed, key) of every run's stage of that name, newest run first."""
    runs = [_load_run(home, r) for r in reversed(home.runs())]
    return [(str(g.get("seed", 0)), g["keys"][name]) for r in runs for g in r["goals"] if name in g["keys"]]


def _newest_of(home: Store, name: str, key: str) -> str:
    """Which seed a bare name was taken to mean, where the store has several of it; else nothing."""
    if home.meta(key)["name"] != name:
        return ""
    newest: dict[str, str] = {}
    mine = ""
    for seed, each in _seeds_of(home, name):
        if home.has(each):
            newest.setdefault(seed, each)
            mine = mine or (seed if each == key else "")
    if len(set(newest.values())) < 2 or not mine:
        return ""
    all_seeds = ", ".join(f"{name}@{s}" for s in sorted(newest, key=lambda s: (len(s), s)))
    return f"{name}@{mine} (newest of {len(newest)} seeds: {all_seeds})"


def _tree(key: str, port: str, metas: dict[str, dict[str, Any]]) -> Any:
    from rich.text import Text
    from rich.tree import Tree

    from tutelage.estimate import human_time, si

    def label(meta: dict[str, Any], through: str) -> Text:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(meta["finished"]))
        spent = f"{si(meta['cost']['flops'])}FLOP, " if meta["cost"]["flops"] else ""
        facts = (meta["kind"].rpartition(".")[2], meta["key"][:8], made, spent + human_time(meta["seconds"]), meta["host"])
        return Text.assemble((meta["name"], "bold"), (f":{through}" if through else ""), ("  " + "  ".join(facts), "dim"))

    root = Tree(label(metas[key], port), guide_style="dim")
    shown = {key}
    stack = [(root, one) for one in reversed(metas[key]["inputs"])]
    while stack:  # in the order of the lines
        branch, one = stack.pop()
        through = _edge("", one["port"], one["step"])[1:]
        if one["key"] in shown:
            branch.add(Text.assemble((one["name"], "bold"), f":{through}", ("  (shown above)", "dim")))
            continue
        shown.add(one["key"])
        below = branch.add(label(metas[one["key"]], through))
        stack.extend((below, each) for each in reversed(metas[one["key"]]["inputs"]))
    return root


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes there are."""
    from tutelage.catalog import recipes as found

    if as_json:
        return _print_json([{"name": r.name, "description": r.description, "where": r.where} for r in found().values()])
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for each in found().values():
        table.add_row(each.name, each.description)
    _console().print(table, highlight=False)


# --- shared ----------------------------------------------------------------------------------------------------------


def _choose(recipe: str, sets: list[str] | None, seed: int | None, seeds: str | None) -> Chosen:
    from tutelage.catalog import choose, parse_seeds

    if seed is not None and seeds is not None:
        raise UserError("give --seed or --seeds, not both")
    which = parse_seeds(seeds) if seeds is not None else [seed] if seed is not None else None
    return choose(recipe, sets or (), which)


def _plan(chosen: Chosen, store: Path) -> Plan:
    from tutelage.graph import plan as make
    from tutelage.store import Store

    return make(chosen.goals, Store(store, create=False).has)


def _open(store: Path) -> Store:
    """A store to read. Raises `UserError` where there is none."""
    from tutelage.store import Store

    if not (store.expanduser() / "format").exists():
        raise UserError(f"there is no store in {store}; give --store DIR, set TUTELAGE_STORE, or make one with `tutelage run`")
    return Store(store)


def _console() -> Console:
    from rich.console import Console

    out = Console()
    return out if out.is_terminal or "COLUMNS" in os.environ else Console(width=120)


def _near(path: Path) -> str:
    """A path as the user would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _print_json(body: Any) -> None:
    print(json.dumps(body, indent=1, ensure_ascii=False))
