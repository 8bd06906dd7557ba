"""The index: a summary of every artifact of a store and the keys of its runs, quick however many there are.

Artifacts never change once they are published, so ``index.json`` at the store's root is a cache and no more: only an
``artifact.json`` that it does not know, or knows with another time or size, is opened. ``index.runs.json`` does the same for
runs. Both are used only if their bytes are those that were written, are made anew without a word where they are not, and may
be deleted at any time.

Leaves out: whether payloads are what they were (upkeep.py); the whole of an ``artifact.json`` (`Store.meta`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tutelage.files import read_object
from tutelage.forms import Artifact, Keys, unfit
from tutelage.spec import UserError

FORMAT = 1
"""The newest ``format`` of an ``artifact.json`` that this version reads; none stands for 1."""

Mark = list[int]
"""Time (ns) and size of the file that a row is read from: with another, it is read again."""
Row = list[Any]
"""The last element says why the file cannot be used, and is empty where it can."""


class Rooted(Protocol):
    """A store, as far as it matters here (the store itself may look things up here)."""

    root: Path


class Summary(NamedTuple):
    """What lists, estimates and look-ups by name need of an artifact."""

    key: str
    name: str
    kind: str
    version: int
    seed: int | None
    """The stage's own; stages that draw nothing have none."""
    finished: float
    """Unix time."""
    seconds: float
    estimate: float
    """FLOPs that were planned."""
    flops: float
    """FLOPs that were spent."""
    threads: int
    outputs: dict[str, str]
    """port -> ``model``, ``data`` or ``scores``"""
    inputs: list[str]
    """Keys, each once."""
    size: int
    """Bytes of all its files."""
    device: str = "cpu"
    """The name of the accelerator that the stage ran on, or ``cpu``."""
    damaged: str = ""
    """Why its ``artifact.json`` cannot be used; the rest is then empty."""


Goals = list[tuple[str, dict[str, str]]]
"""(seed, name -> key) for each of a run's goals; the keys are those of all stages, ancestors included."""


def summaries(store: Rooted) -> dict[str, Summary]:
    """key -> summary of everything published. An artifact that cannot be read is among them, with `Summary.damaged` set."""
    folder = store.root / "artifacts"
    rows = _cached(store.root / "index.json", _published(folder), lambda key, mark: _read(folder / key, mark[0] / 1e9))
    return {key: Summary(*row) for key, row in rows.items()}


def goals(store: Rooted) -> dict[str, Goals]:
    """Of every run that can be read, in no order. `goals_of` says why another cannot."""
    folder = store.root / "runs"

    def read(file: str, mark: Mark) -> Row:
        try:
            return [goals_of(store, file.removesuffix(".json")), ""]
        except UserError as error:
            return [[], str(error)]

    rows = _cached(store.root / "index.runs.json", _saved(folder), read)
    return {file.removesuffix(".json"): [(seed, keys) for seed, keys in row[0]] for file, row in rows.items() if not row[-1]}


def goals_of(store: Rooted, run: str) -> Goals:
    """Raises `UserError` where the file is no run's."""
    file = store.root / "runs" / f"{run}.json"
    listed = read_object(file).get("goals")
    if not isinstance(listed, list) or not listed or not all(map(_has_keys, listed)):
        raise UserError(f"{file} is not a run: it has no goals with keys; remove the file")
    return [(str(g.get("seed", 0)), g["keys"]) for g in listed]


def _has_keys(one: Any) -> bool:
    keys = one.get("keys") if isinstance(one, dict) else None
    return isinstance(keys, dict) and not unfit(keys, Keys)


def _saved(folder: Path) -> list[tuple[str, Mark]]:
    """Files of runs."""
    found = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json"):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    found.append((entry.name, [stat.st_mtime_ns, stat.st_size]))
    return found


def _published(folder: Path) -> list[tuple[str, Mark]]:
    """Keys, each with time and size of its ``artifact.json``."""
    found = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError, NotADirectoryError):
                stat = os.stat(f"{entry.path}/artifact.json")
                found.append((entry.name, [stat.st_mtime_ns, stat.st_size]))
    return found


def _read(folder: Path, made: float) -> Row:
    try:
        return list(_summary(read_object(folder / "artifact.json"), folder))
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        why = (
            str(error)
            if isinstance(error, (UserError, ValueError))
            else f"it is no artifact's ({type(error).__name__}: {error})"
        )
        return [folder.name, "", "", 0, None, made, 0.0, 0.0, 0.0, 1, {}, [], size(folder), "cpu", why]


def _summary(meta: dict[str, Any], folder: Path) -> Summary:
    if wrong := misfit(meta, folder.name) or unfit(meta, Artifact):
        raise ValueError(wrong)
    seed = meta.get("seed")
    return Summary(
        folder.name,
        _text(meta["name"]),
        _text(meta["kind"]),
        int(meta.get("version", 1)),
        None if seed is None else int(seed),
        float(meta["finished"]),
        float(meta.get("seconds", 0.0)),
        float(meta.get("estimate", 0.0)),
        float(meta.get("cost", {}).get("flops", 0.0)),
        int(meta.get("threads", 1)),
        {port: _text(facts["kind"]) for port, facts in meta.get("outputs", {}).items()},
        list(dict.fromkeys(_text(each["key"]) for each in meta.get("inputs", ()))),
        size(folder),
        _text(meta.get("device", "cpu")),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def misfit(meta: dict[str, Any], key: str) -> str:
    """Why an ``artifact.json`` cannot be the one of a key's folder; nothing where it can."""
    made = meta.get("format", FORMAT)
    if made != FORMAT:
        newer = "; a newer Tutelage made it and is needed to read it" if isinstance(made, int) and made > FORMAT else ""
        return f"its format is {made!r}, this version reads {FORMAT}{newer}"
    if meta.get("key") != key:
        return f"its key is {meta.get('key')!r}, its folder's {key!r}"
    return ""


def size(folder: Path) -> int:
    """Bytes of a file, or of a folder's files; 0 where nothing is."""
    total, spots = 0, [str(folder)]
    while spots:
        spot = spots.pop()
        with suppress(OSError):
            try:
                with os.scandir(spot) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            spots.append(entry.path)
                        else:
                            total += entry.stat(follow_symlinks=False).st_size
            except NotADirectoryError:
                total += os.stat(spot, follow_symlinks=False).st_size
    return total


# --- the files ---------------------------------------------------------------------------------------------------------

HEAD = b'{"seal":"%s","rows":'


def _cached(file: Path, there: list[tuple[str, Mark]], read: Callable[[str, Mark], Row]) -> dict[str, Row]:
    """A row for each name that is there, read only where the file does not know it. What cannot be used is not remembered."""
    old = _load(file)
    found: dict[str, Row] = {}
    known: dict[str, tuple[Mark, Row] | list[Any]] = {}
    for name, mark in there:
        was = old.get(name)
        now = was if was is not None and was[0] == mark else (mark, read(name, mark))
        found[name] = now[1]
        if not now[1][-1]:
            known[name] = now
    if known != old:
        _save(file, known)
    return found


def _seal(text: bytes) -> bytes:
    """Of the rows as they were written and of their columns."""
    return blake2b(text + repr(Summary._fields).encode(), digest_size=16).hexdigest().encode()


def _load(file: Path) -> dict[str, Any]:
    """name -> [mark, row]; none where the file is not what `_save` wrote."""
    try:
        raw = file.read_bytes()
    except OSError:
        return {}
    text = raw[len(HEAD % (b"0" * 32)) : -1]
    return json.loads(text) if raw == HEAD % _seal(text) + text + b"}" else {}


def _save(file: Path, rows: dict[str, Any]) -> None:
    """In one rename, and not waiting for the disk; where the store cannot be written, not at all."""
    text = json.dumps(rows, separators=(",", ":")).encode()
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_bytes(HEAD % _seal(text) + text + b"}")
        os.replace(fresh, file)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
