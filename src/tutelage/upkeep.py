"""Upkeep of a store: whether everything is still what it was when it was made, and what no run needs any more.

*Damage*: every payload is hashed again and held to the hashes in its ``artifact.json``, that file to its seal, and runs, events
and checkpoints are read. Nothing is mended here, but an artifact that is taken out is made again by the next run that needs it.

*Freeing*: a run's keys are the whole ancestry of what it asked for, so what is in no kept run's keys is reached by nothing. The
order of freeing, and renames before deletions, leave a store that works wherever it is killed; freeing again ends it. Event
files stay: they are the history, and small.

Leaves out: stores that a run is using (a run in another process would lose what it has planned with), and mending.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tutelage.files import parse, read_object
from tutelage.index import FORMAT, goals, goals_of, misfit, size, summaries
from tutelage.locks import Holder
from tutelage.spec import UserError, content_hash, file_hashes, suggest
from tutelage.store import Store, checkpoint_state, seal

Told = Callable[[int], None]
"""Is told of the bytes that have been read since it was last told."""


# --- damage ------------------------------------------------------------------------------------------------------------


def damage(store: Store, key: str, told: Told = lambda size: None) -> list[str]:
    """One line for each damaged, missing or surplus thing of a published artifact, its path in the store first.

    Only the artifact itself is looked at, not what it was made from. Model cards and left-over checkpoints are not payload.
    """
    folder, where = store.folder(key), f"artifacts/{key}"
    if not (folder / "artifact.json").exists():
        return [f"{where}/artifact.json: is missing"]
    try:
        meta = read_object(folder / "artifact.json")
    except UserError as error:
        return [f"{where}/artifact.json: {_short(error)}"]
    if wrong := misfit(meta, key):
        return [f"{where}/artifact.json: {wrong}"]
    hashes = meta.get("files", meta.get("content"))  # older ones have one hash for each port, and no seal
    if not isinstance(hashes, dict) or not all(isinstance(h, str) for h in hashes.values()):
        return [f"{where}/artifact.json: lists no hashes"]
    found = []
    if ("seal" in meta or "files" in meta) and meta.get("seal") != seal(meta):
        found.append(f"{where}/artifact.json: was changed after it was made")
    for name, was in sorted(hashes.items()):
        if wrong := _differs(folder / name, was, told):
            found.append(f"{where}/{name}: {wrong}")
    return found + [f"{where}/{name}: does not belong there" for name in _surplus(folder, meta)]


def _surplus(folder: Path, meta: dict[str, Any]) -> list[str]:
    """Files, of older artifacts ports, that it does not list and that are not model cards or what a kill has left."""
    if "files" not in meta:
        spared = {"artifact.json", "metrics.jsonl", "log.txt", *meta["content"]}
        return sorted(p.name for p in folder.iterdir() if p.name not in spared and not _unfinished(p))
    names = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    extra = (n for n in names if not _unfinished(Path(n.parts[0])) and n.as_posix() not in meta["files"])
    return sorted(n.as_posix() for n in extra if n.as_posix() != "artifact.json" and n.parts[1:] != ("README.md",))


def _differs(path: Path, was: str, told: Told) -> str:
    """What is wrong with a file, or an older artifact's port, if anything."""
    if not path.exists():
        return "is missing"
    try:
        now = file_hashes(path)[""] if path.is_file() else content_hash(path, leave_out=("README.md",))
    except (OSError, KeyError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or 'it is a folder'}"
    told(size(path))
    return "" if now == was else "its content is not what was made"


def _unfinished(path: Path) -> bool:
    """Whether it is a checkpoint that was to go when the artifact was published."""
    return path.name.startswith(("checkpoint-", ".checkpoint-"))


def _short(error: UserError) -> str:
    """Without the path, which the line has already."""
    text = str(error)
    at = min((i for i in (text.find("cannot be read"), text.find("holds no JSON")) if i >= 0), default=0)
    return " ".join(text[at:].split())


@dataclass(frozen=True)
class Finding:
    """Something of a store that is not as it was made."""

    what: str
    """``artifact``, ``input``, ``run``, ``events`` or ``checkpoint``"""
    path: str
    """In the store."""
    problem: str
    key: str = ""
    name: str = ""
    """Of the stage, as far as it is known."""
    hangs: tuple[str, ...] = ()
    """Names of the artifacts made from it, in any number of steps. Each has hashes of its own and is judged by those."""
    newer: bool = False
    """Whether it is whole, for all that can be told, but of a format this version does not read."""


def verify(store: Store, keys: Iterable[str] | None = None, told: Told = lambda size: None) -> Iterator[Finding]:
    """What is damaged among some artifacts; without ``keys``, in the whole store."""
    made = summaries(store)
    names = {**_names(store), **{k: s.name for k, s in made.items() if s.name}}
    below: dict[str, list[str]] = {}
    for summary in made.values():
        for each in summary.inputs:
            below.setdefault(each, []).append(summary.key)
    gone: dict[str, None] = {}

    def hanging(key: str) -> tuple[str, ...]:
        return tuple(sorted(names.get(k, k[:8]) for k in _all_below(key, below)))

    for key in list(keys) if keys is not None else _folders(store):
        for line in damage(store, key, told):
            path, _, problem = line.partition(": ")
            if store.folder(key).exists():  # and was not removed while it was read
                yield Finding("artifact", path, problem, key, names.get(key, "?"), hanging(key), _newer(store, key))
        gone.update(dict.fromkeys(k for k in (made[key].inputs if key in made else ()) if not store.folder(k).exists()))
    for key in gone:
        missing = "is not in the store, but what was made from it is"
        yield Finding("input", f"artifacts/{key}", missing, key, names.get(key, "?"), hanging(key))
    if keys is None:
        yield from _other_damage(store, names)


def _newer(store: Store, key: str) -> bool:
    with suppress(UserError):
        made = read_object(store.folder(key) / "artifact.json").get("format")
        return isinstance(made, int) and made > FORMAT
    return False


def _folders(store: Store) -> list[str]:
    with suppress(FileNotFoundError):
        return sorted(p.name for p in (store.root / "artifacts").iterdir() if p.is_dir())
    return []


def _names(store: Store) -> dict[str, str]:
    """key -> name, of everything the runs hold."""
    found = {}
    for each in goals(store).values():
        found.update({k: n for _, keys in each for n, k in keys.items()})
    return found


def _all_below(key: str, below: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    spots = [key]
    while spots:
        for each in below.get(spots.pop(), ()):
            if each not in found:
                found.add(each)
                spots.append(each)
    return found


def _other_damage(store: Store, names: dict[str, str]) -> Iterator[Finding]:
    """Of runs, events and checkpoints."""
    for run in store.runs():
        try:
            goals_of(store, run)
        except UserError as error:
            text = str(error)
            yield Finding("run", f"runs/{run}.json", _short(error) if "cannot be read" in text else "has no goals with keys")
    for file in sorted((store.root / "events").glob("*.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            if not _event(line):
                yield Finding("events", f"events/{file.name}", f"line {number} is no event")
    for folder in sorted((store.root / "work").glob("[!.]*/checkpoint-*")):
        wrong = _checkpoint_damage(folder)
        if wrong and folder.exists():
            key = folder.parent.name
            yield Finding("checkpoint", f"work/{key}/{folder.name}", wrong, key, names.get(key, "?"))


def _event(line: bytes) -> bool:
    try:
        found = parse(line.decode())
    except ValueError:
        return False
    return isinstance(found, dict) and "event" in found


def _checkpoint_damage(folder: Path) -> str:
    """What `Context.resume` would pass over it for, if anything."""
    try:
        checkpoint_state(folder)
    except UserError as error:
        return f"{_short(error)}; its stage will start anew"
    return ""


def remove(store: Store, findings: Iterable[Finding]) -> dict[str, str]:
    """Takes the damaged artifacts out, so that they can be made again; returns key -> name. Those of a newer version stay."""
    gone = {f.key: f.name for f in findings if f.what == "artifact" and not f.newer}
    with _alone(store, "verify --remove"):
        for key in gone:
            _away(store, store.folder(key))
            store.event("artifact removed", key=key, stage=gone[key], why="damaged")
    return gone


# --- freeing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """Something that can go."""

    what: str
    """``report``, ``run``, ``leftover``, ``work``, ``artifact`` or ``lock``: in this order they go."""
    path: Path
    name: str
    size: int
    kind: str = ""
    """Of the stage, where it is an artifact."""


ORDER = ("report", "run", "leftover", "work", "artifact", "lock")


def kept_runs(store: Store, forget: Iterable[str] = (), keep_last: int | None = None) -> list[str]:
    """The runs that are left, oldest first, without those named and all but the newest of each recipe. Raises `UserError`."""
    names = store.runs()
    forget = set(forget)
    for name in sorted(forget):
        if name not in names:
            raise UserError(f"unknown run {name!r} in the store {store.root}{suggest(name, names)}")
    of_recipe: dict[str, list[str]] = {}
    for name in names:
        of_recipe.setdefault(name.rpartition("-")[0], []).append(name)
    newest = {n for each in of_recipe.values() for n in (each if keep_last is None else each[-keep_last:])}
    return [n for n in names if n in newest and n not in forget]


def idle(store: Store) -> None:
    """Raises `UserError` where a run is alive on the store."""
    for run in store.runs():
        if store.alive(run):
            raise UserError(f"run {run!r} is using the store {store.root}; wait until it ends, or stop it")


def survey(store: Store, kept: Iterable[str]) -> list[Item]:
    """What no kept run reaches, and what is left over from work that was cut short. Raises `UserError` on a broken run file."""
    kept = list(kept)
    made = summaries(store)
    wanted = _reached(store, kept)
    items = [Item("run", store.root / "runs" / f"{r}.json", r, 0) for r in store.runs() if r not in kept]
    items += [Item("report", f, f.name, 0) for i in items if (f := store.root / "reports" / f"{i.name}.html").exists()]
    items += [Item("artifact", store.folder(k), s.name or "?", 0, s.kind) for k, s in made.items() if k not in wanted]
    names = _names(store)
    for folder in (store.root / "work").glob("[!.]*"):
        key = folder.name  # of a stored stage, it is what a worker opened that came too late
        if folder.is_dir() and (key not in wanted or key in made) and not store.holder(key):
            items.append(Item("work", folder, names.get(key, key[:8]), 0))
    items += [Item("leftover", p, p.name, 0) for p in _leftovers(store, {i.path for i in items})]
    items += [Item("lock", p, p.name, 0) for p in _locks(store, wanted | set(kept))]
    return [replace(i, size=made[i.path.name].size if i.what == "artifact" else size(i.path)) for i in items]


def _reached(store: Store, kept: Iterable[str]) -> set[str]:
    """Keys of the kept runs: a run's keys are all its stages, ancestors included."""
    wanted: set[str] = set()
    readable = goals(store)
    for run in kept:
        try:
            found = readable[run] if run in readable else goals_of(store, run)
        except UserError as error:
            raise UserError(f"{error}; or give --forget {run}, which frees what only it needs") from None
        wanted.update(k for _, keys in found for k in keys.values())
    return wanted


def _leftovers(store: Store, going: set[Path]) -> list[Path]:
    """Of processes that died half-way, but for those inside what goes anyway."""
    root = store.root
    found = [p for p in root.glob("artifacts/*/*") if _unfinished(p)]
    found += [p for p in root.glob("artifacts/*") if p.is_dir() and not store.has(p.name)]
    for pattern in (".*", "runs/.*", "work/.*", "work/*/.*", "locks/.*", "reports/.*"):
        found += [p for p in root.glob(pattern) if _of_the_dead(p)]
    return [p for p in dict.fromkeys(found) if p.parent not in going]


def _of_the_dead(path: Path) -> bool:
    """Whether it is named for a process that is gone (``.NAME.PID``, as everything half-written is)."""
    pid = path.name.rpartition(".")[2]
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _locks(store: Store, wanted: set[str]) -> list[Path]:
    """Files of locks that nobody holds on stages and runs that nobody wants, and notes beside them. Locks of other names are
    few, and stay."""
    found = []
    for file in sorted((store.root / "locks").glob("*")):
        name = file.stem
        of_any = re.fullmatch("[0-9a-f]{32}", name) or name.startswith("run.")
        if of_any and name.removeprefix("run.") not in wanted and not store.holder(name):
            found.append(file)
    return found


def free(store: Store, shown: Iterable[Item]) -> list[Item]:
    """Frees what was shown and still is of no use; returns it. Raises `UserError` where a run is alive or the disk refuses."""
    paths = {item.path: item for item in shown}
    forgotten = {item.name for item in paths.values() if item.what == "run"}
    with _alone(store, "store gc"):
        kept = [run for run in store.runs() if run not in forgotten]  # those that began since it was shown too
        items = [item for item in survey(store, kept) if item.path in paths]
        for item in sorted(items, key=lambda i: ORDER.index(i.what)):
            _away(store, item.path)
        if items:
            keys = [i.path.name for i in items if i.what == "artifact"]
            runs = [i.name for i in items if i.what == "run"]
            store.event("store freed", runs=runs, artifacts=keys, bytes=sum(i.size for i in items))
    return items


@contextmanager
def _alone(store: Store, what: str) -> Iterator[None]:
    """Keeps other upkeep and new runs out. Raises `UserError` where one of them is at work."""

    def busy(holder: Holder) -> None:
        raise UserError(f"{holder} is at work in the store {store.root}; wait until it ends")

    with store.lock("gc", what, busy), store.lock("runs", what, busy):
        idle(store)
        yield


def _away(store: Store, path: Path) -> None:
    """Deletes a file or folder; a folder goes out of sight first, so that none is ever seen in part."""
    try:
        if path.parent == store.root / "artifacts":
            store.remove(path.name)
        elif path.is_dir():
            gone = path if path.parent == store.root / "work" and path.name.startswith(".") else _hidden(store, path)
            shutil.rmtree(gone)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}; mend that and run the same command again") from None


def _hidden(store: Store, path: Path) -> Path:
    gone = store.root / "work" / f".removed-{path.name}.{os.getpid()}"
    os.replace(path, gone)
    return gone
