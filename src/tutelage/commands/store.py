"""``tutelage store``: what a store holds, whether it is whole, and freeing what no run needs.

The list is aligned here and not by rich, which takes ten seconds for ten thousand lines.
Leaves out: the work itself (index.py, upkeep.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutelage.commands.shared import STORE, AsJson, Where, console, find, open_store, print_json
from tutelage.spec import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from tutelage.index import Summary
    from tutelage.store import Store
    from tutelage.upkeep import Finding, Item, Told

app = typer.Typer(name="store", help="List, verify and clear a store.", no_args_is_help=True)

# --- list --------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help="Only stages of this kind, such as Fit.")] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="GLOB", help="Only names like this, such as 'rl-*@0'.")] = None,
    store: Where = STORE,
    as_json: AsJson = False,
) -> None:
    """List the artifacts of a store, the newest last."""
    home = open_store(store)

    from tutelage.index import summaries

    made = sorted(summaries(home).values(), key=lambda s: s.finished)
    runs, seeds, names = _held(home)
    labels = _labels(made, seeds, names)
    chosen = _like(made, labels, kind, name)
    if as_json:
        return print_json([_facts(s, labels[s.key], runs.get(s.key, []), seeds.get(s.key, set())) for s in chosen])
    out = console()
    _print_rows([_row(s, labels[s.key], runs.get(s.key, [])) for s in chosen], out)
    _total(chosen, out)


def _facts(s: Summary, label: str, runs: list[str], seeds: set[str]) -> dict[str, Any]:
    return {**s._asdict(), "label": label, "runs": runs, "seeds": sorted(seeds)}


def _held(home: Store) -> tuple[dict[str, list[str]], dict[str, set[str]], dict[str, str]]:
    """key -> the runs that hold it, oldest first; key -> their seeds; key -> its name there."""
    from tutelage.index import goals

    readable = goals(home)
    runs: dict[str, list[str]] = {}
    seeds: dict[str, set[str]] = {}
    names: dict[str, str] = {}
    for run in home.runs():
        for seed, keys in readable.get(run, ()):  # `verify` names the others
            for name, key in keys.items():
                names[key] = name
                seeds.setdefault(key, set()).add(seed)
                if run not in (holders := runs.setdefault(key, [])):
                    holders.append(run)
    return runs, seeds, names


def _labels(made: list[Summary], seeds: dict[str, set[str]], names: dict[str, str]) -> dict[str, str]:
    """key -> name, with the seed of the runs that hold it where the store has several seeds of that name."""
    of_name: dict[str, set[str]] = {}
    for s in made:
        if len(mine := seeds.get(s.key, ())) == 1:
            of_name.setdefault(s.name, set()).update(mine)
    labels = {}
    for s in made:
        mine = seeds.get(s.key, set())
        seed = f"@{min(mine)}" if len(mine) == 1 and len(of_name[s.name]) > 1 else ""
        labels[s.key] = (s.name or names.get(s.key, "?")) + seed
    return labels


def _like(made: list[Summary], labels: dict[str, str], kind: str | None, name: str | None) -> list[Summary]:
    from fnmatch import fnmatchcase

    from tutelage.spec import suggest

    short = {s.key: s.kind.rpartition(".")[2] for s in made}
    if kind is not None and kind not in {*short.values(), *(s.kind for s in made)}:
        raise UserError(f"no artifact of kind {kind!r} in the store{suggest(kind, set(short.values()) - {''})}")
    found = [s for s in made if kind is None or kind in (s.kind, short[s.key])]
    return [s for s in found if name is None or fnmatchcase(labels[s.key], name) or fnmatchcase(s.name, name)]


HEADS = ("artifact", "kind", "key", "size", "made", "FLOP", "runs")


def _row(s: Summary, label: str, runs: list[str]) -> tuple[str, ...]:
    from tutelage.estimate import si

    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(s.finished))
    shown = ", ".join(runs[-2:]) + (f" +{len(runs) - 2}" if len(runs) > 2 else "")
    kind = "damaged" if s.damaged else s.kind.rpartition(".")[2]
    return label, kind, s.key[:8], f"{si(s.size)}B", made, si(s.flops).strip() if s.flops else "", shown


def _print_rows(rows: list[tuple[str, ...]], out: Console) -> None:
    """Aligned; a narrow terminal gets no runs and no FLOPs."""
    count = len(HEADS) if out.width >= 110 else 5
    rows = [r[:count] for r in rows]
    widths = [max((len(r[i]) for r in rows), default=0) for i in range(count)]
    widths = [max(w, len(h)) for w, h in zip(widths, HEADS, strict=False)]

    def line(row: Iterable[str]) -> str:
        cells = (c.rjust(w) if h in ("size", "FLOP") else c.ljust(w) for c, w, h in zip(row, widths, HEADS, strict=False))
        return "  ".join(cells).rstrip()

    out.print(line(HEADS[:count]), style="bold", highlight=False, soft_wrap=True)
    if rows:
        print("\n".join(map(line, rows)))


def _total(chosen: list[Summary], out: Console) -> None:
    from tutelage.estimate import count, si

    damaged = sum(bool(s.damaged) for s in chosen)
    more = f"; {damaged} damaged: `tutelage store verify` says how" if damaged else ""
    out.print(f"{count(len(chosen), 'artifact')}, {si(sum(s.size for s in chosen))}B{more}", highlight=False, soft_wrap=True)


# --- verify ------------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    artifacts: Annotated[
        list[str] | None, typer.Argument(metavar="[ARTIFACT]...", help="Names or starts of keys; without any, the whole store.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take damaged artifacts out; the next run makes them again.")
    ] = False,
    store: Where = STORE,
    as_json: AsJson = False,
) -> None:
    """Hash everything again and name what is damaged. Exits with 1 where anything is."""
    home = open_store(store)

    from tutelage import upkeep
    from tutelage.index import summaries

    if remove:
        upkeep.idle(home)
    made = summaries(home)
    keys = [_key(home, each, made) for each in artifacts] if artifacts else None
    with _bar(sum(made[k].size for k in keys or made if k in made)) as told:
        findings = list(upkeep.verify(home, keys, told))
    gone = upkeep.remove(home, findings) if remove and findings else {}
    if as_json:
        from dataclasses import asdict

        checked = {"artifacts": len(keys or made), "damage": [asdict(f) for f in findings], "removed": sorted(gone)}
        print_json(checked)
    else:
        _tell(findings, len(keys or made), gone, remove)
    raise typer.Exit(1 if findings else 0)


def _key(home: Store, text: str, made: dict[str, Summary]) -> str:
    """A key by its start, were the artifact itself unreadable; else as everywhere."""
    near = [k for k in made if k.startswith(text)] if len(text) >= 4 else []
    return near[0] if len(near) == 1 else find(home, text)[0]


@contextmanager
def _bar(total: int) -> Iterator[Told]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    out = Console(stderr=True)
    columns = ("verifying", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda size: progress.advance(task, size)


def _tell(findings: list[Finding], count: int, gone: dict[str, str], remove: bool) -> None:
    from tutelage.estimate import count as counted

    told = set()
    for f in findings:
        who = f"{f.name} {f.key[:8]}  " if f.key else ""
        print(f"{who}{f.path}: {f.problem}")
        if f.hangs and f.key not in told:
            names = ", ".join(f.hangs[:5]) + (f" and {len(f.hangs) - 5} more" if len(f.hangs) > 5 else "")
            print(f"  made from it: {names}; those have hashes of their own and are whole unless named too")
        told.add(f.key)
    if not findings:
        print(f"{counted(count, 'artifact')} verified: everything is as it was made")
        return
    print(f"{counted(count, 'artifact')} verified, {counted(len(findings), 'thing')} damaged")
    removable = {f.key for f in findings if f.what == "artifact" and not f.newer}
    if gone:
        names = ", ".join(f"{name} {key[:8]}" for key, name in gone.items())
        print(f"removed: {names}; the next run that needs it makes it again (what is stored needs nothing)")
    elif removable and not remove:
        print("--remove takes the damaged artifacts out; the next run that needs them makes them again")


# --- gc ----------------------------------------------------------------------------------------------------------------


@app.command()
def gc(
    forget: Annotated[
        list[str] | None, typer.Option("--forget", metavar="RUN", help="Forget this run, so that what only it needs goes.")
    ] = None,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", metavar="N", help="Forget all but the newest N runs of each recipe.", min=1)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Free it without asking.")] = False,
    store: Where = STORE,
) -> None:
    """Free what no run needs: show it, ask, then delete it."""
    home = open_store(store)

    from tutelage import upkeep
    from tutelage.estimate import si

    upkeep.idle(home)
    kept = upkeep.kept_runs(home, forget or (), keep_last)
    items = upkeep.survey(home, kept)
    out = console()
    if not items:
        out.print("nothing to free: runs need all there is", highlight=False)
        return
    _show(items, out)
    if not kept and not yes:
        print("no run is kept, so nothing in the store is needed; --yes frees it all")
        return
    if not yes and not sys.stdin.isatty():
        print("nothing was freed; --yes frees it")
        return
    if yes or typer.confirm("free it?"):
        freed = upkeep.free(home, items)
        out.print(f"freed {si(sum(i.size for i in freed))}B", highlight=False)


WORDS = {
    "artifact": "artifacts",
    "work": "unfinished work",
    "run": "forgotten runs",
    "report": "their reports",
    "leftover": "leftovers",
    "lock": "locks",
}


def _show(items: list[Item], out: Console) -> None:
    """One line a kind: how many, how large, which."""
    from rich.table import Table
    from rich.text import Text

    from tutelage.estimate import si

    groups: dict[tuple[str, str], list[Item]] = {}
    for item in sorted(items, key=lambda i: (list(WORDS).index(i.what), i.kind)):
        groups.setdefault((item.what, item.kind.rpartition(".")[2]), []).append(item)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("to free", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("names", overflow="fold")
    for (what, kind), group in groups.items():
        names = list(dict.fromkeys(i.name for i in group))
        shown = "" if what == "lock" else ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        size = f"{si(sum(i.size for i in group))}B"
        table.add_row(f"{WORDS[what]}{f' ({kind})' if kind else ''}", f"{len(group):,}", size, Text(shown))
    out.print(table, highlight=False)
    out.print(f"{len(items):,} in all, {si(sum(i.size for i in items))}B", highlight=False)
