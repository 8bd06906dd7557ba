"""The store: artifacts by key, published atomically; work in progress; runs; one event file per process.

Layout::

    format                  {"format": 1}
    artifacts/KEY/          artifact.json, metrics.jsonl, log.txt, one folder per port (a Hugging Face folder, Parquet, scores)
    work/KEY/               the same while it is being made, with checkpoint-STEP/
    runs/RUN.json           what a run was asked for and which keys answer it; runs/order: their names, oldest first
    events/HOST-PID.jsonl   what happened, in order, per process
    locks/                  KEY.lock while a stage is made, run.RUN.lock while a run lives; who holds one is in the .json beside

An artifact is visible when its folder has been renamed into ``artifacts``; its content is on disk before that. It goes by
being renamed away. No order is taken from a clock where there is another way to know it: clocks jump.
Keys and artifacts are all the store knows: it has no idea of stages. Leaves out: verification and garbage collection
(upkeep.py), and how locks work (locks.py).
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tutelage.files import append_line, read_jsonl, read_object, sync, sync_folder, trouble, write_json
from tutelage.forms import Artifact, Checkpoint, Run, unfit
from tutelage.index import goals, misfit, summaries
from tutelage.locks import Holder, held, hold
from tutelage.spec import UserError, content_hash, digest, file_hashes, joint_hash, suggest

FORMAT = 1
PARTS = ("artifacts", "work", "runs", "events", "locks")
MEND = "give --store a folder that can be written, or mend this one"


class Store:
    """A folder of artifacts. Raises `UserError` where it cannot be used."""

    def __init__(self, root: str | Path, create: bool = True):
        self.root = absolute(root)
        mark = self.root / "format"
        if mark.exists():
            found = read_object(mark).get("format")
            if found != FORMAT:
                newer = isinstance(found, int) and found > FORMAT
                fix = "install the newer Tutelage that made it, or give another --store" if newer else "give another --store"
                raise UserError(f"the store {self.root} has format {found}, this version reads {FORMAT}; {fix}")
            return
        if self._has_other_things() and not mark.exists():  # another process may just have made it
            raise UserError(f"{self.root} is neither empty nor a store; give --store another folder")
        if create:
            try:
                for part in PARTS:
                    (self.root / part).mkdir(parents=True, exist_ok=True)
                write_json(mark, {"format": FORMAT})
            except OSError as error:
                raise UserError(f"cannot make a store in {self.root}: {error.strerror}; give --store another folder") from None

    def ready(self, waiting: Callable[[Holder], None] = lambda holder: None) -> None:
        """Raises `UserError` unless this process can write here, lock here, and has a temp folder: asked before any work."""
        import tempfile

        try:
            for part in PARTS:
                (self.root / part).mkdir(exist_ok=True)
            write_json(self.root / "work" / ".probe", {})
            (self.root / "work" / ".probe").unlink(missing_ok=True)  # another run may have put its own there, and taken it
        except OSError as error:
            raise UserError(f"cannot write to the store: {trouble(error, self.root) or error}; {MEND}") from None
        with self.lock("probe", waiting=waiting):
            pass
        try:
            tempfile.gettempdir()
        except OSError:
            raise UserError("no temp folder can be written; set TMPDIR to a folder that can") from None

    def _has_other_things(self) -> bool:
        """Whether there is more in the folder than a store that is just being made, or whose making was cut short."""
        there = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not there.is_dir():
            raise UserError(f"cannot make a store in {self.root}: {there} is not a folder; give --store another folder")
        try:
            for each in self.root.iterdir() if there == self.root else ():
                if not (each.name in PARTS and each.is_dir() and not any(each.iterdir())) and not each.name.startswith(
                    ".format."
                ):
                    return True
        except OSError as error:
            raise UserError(f"cannot read {self.root}: {error.strerror}; give --store another folder") from None
        return False

    # --- artifacts ---

    def has(self, key: str) -> bool:
        return (self.root / "artifacts" / key / "artifact.json").exists()

    def folder(self, key: str) -> Path:
        """Where a published stage lies."""
        return self.root / "artifacts" / key

    def path(self, key: str, port: str, step: int | None = None) -> Path:
        """The payload of a port; with ``step``, a checkpoint of its series."""
        return self.folder(key) / (port if step is None else f"{port}@{step}")

    def meta(self, key: str) -> dict[str, Any]:
        """The ``artifact.json`` of a published stage, of `forms.ARTIFACT`. Raises `UserError` where there is none, or a damaged
        one."""
        if not self.has(key):
            raise UserError(f"no artifact {key} in {self.root}")
        file = self.folder(key) / "artifact.json"
        fix = "`tutelage store verify --remove` takes it out"
        try:
            found = read_object(file)
        except UserError as error:
            raise UserError(f"{error}; {fix}") from None
        if wrong := misfit(found, key) or unfit(found, Artifact):
            raise UserError(f"{file} is damaged: {wrong}; {fix}")
        return {"kind": "", "record": {}, "outputs": {}, **found}

    def metrics(self, key: str) -> list[dict[str, Any]]:
        """The metric lines of a stage, published or in progress."""
        for part in ("artifacts", "work"):
            file = self.root / part / key / "metrics.jsonl"
            if file.exists():
                return list(read_jsonl(file))
        return []

    def find(self, text: str) -> str:
        """The key that a key prefix or a stage name stands for (that of the newest run, else the one last made).

        Raises `UserError`.
        """
        made = summaries(self)
        near = [k for k in made if k.startswith(text)] if len(text) >= 4 else []
        if len(near) == 1:
            return near[0]
        if near:
            raise UserError(f"{text!r} begins several keys: {', '.join(near[:5])}; give more of it")
        named = [s for s in made.values() if s.name == text]
        if not named:
            raise UserError(f"no artifact {text!r} in {self.root}{suggest(text, {s.name for s in made.values()} - {''})}")
        of_runs = goals(self)
        for run in reversed(self.runs()):
            for _, keys in of_runs.get(run, ()):
                if keys.get(text) in made:
                    return keys[text]
        return max(named, key=lambda s: s.finished).key

    def keys(self) -> list[str]:
        """Of everything published."""
        return [p.name for p in (self.root / "artifacts").glob("*") if (p / "artifact.json").exists()]

    def metas(self) -> Iterator[dict[str, Any]]:
        """The ``artifact.json`` of everything published."""
        return map(self.meta, self.keys())

    # --- work in progress ---

    def work(self, key: str) -> Path:
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def checkpoint(self, key: str) -> int | None:
        """The step from which unfinished work goes on; None where it starts anew."""
        steps = [int(p.name.rpartition("-")[2]) for p in (self.root / "work" / key).glob("checkpoint-*")]
        return max(steps, default=None)

    def publish(self, key: str, meta: dict[str, Any]) -> None:
        """Moves finished work into the artifacts: content hashed, written through to disk, then one rename.

        The content hash covers payload only: a port's model card (README.md) tells of times and hosts, and an adapter's
        ``adapter_config.json`` of the place of its base; they stay out (the rest of that config is in its ``base_model.json``).
        Checkpoints go last, so that a kill before the rename loses no work.
        """
        work, final = self.root / "work" / key, self.folder(key)
        for cut_short in work.glob(".*.json.*"):
            cut_short.unlink()
        ports = sorted(p for p in work.iterdir() if p.is_dir() and "checkpoint-" not in p.name)
        hashes = {p.name: file_hashes(p, leave_out=("README.md",)) for p in ports}
        files = {f"{port}/{name}": each for port, of in hashes.items() for name, each in of.items()}
        files |= {p.name: file_hashes(p)[""] for p in sorted(work.iterdir()) if p.is_file() and p.name != "artifact.json"}
        meta = {
            **meta,
            "key": key,
            "content": {port: joint_hash(_placeless(of)) for port, of in hashes.items()},
            "files": files,
        }
        write_json(work / "artifact.json", {**meta, "seal": seal(meta)})
        sync(work)
        if final.exists() and not self.has(key):  # a removal that was cut short
            shutil.rmtree(final)
        os.replace(work, final)
        sync_folder(self.root / "artifacts")
        for stale in (*final.glob("checkpoint-*"), *final.glob(".checkpoint-*")):
            shutil.rmtree(stale)

    def remove(self, key: str) -> None:
        """Takes an artifact away: out of sight in one rename, then deleted."""
        gone = self.root / "work" / f".removed-{key}.{os.getpid()}"
        os.replace(self.folder(key), gone)
        shutil.rmtree(gone)

    # --- locks ---

    @contextmanager
    def lock(self, name: str, what: str = "", waiting: Callable[[Holder], None] = lambda holder: None) -> Iterator[None]:
        """Holds a key (the right to make it) or another name; ``what`` tells others who holds it. See `locks.hold`."""
        with hold(self.root / "locks" / f"{name}.lock", what, waiting):
            yield

    def holder(self, name: str) -> Holder | None:
        """Who holds a key or another name now."""
        return held(self.root / "locks" / f"{name}.lock")

    # --- runs and events ---

    def new_run(self, recipe: str, body: dict[str, Any], waiting: Callable[[Holder], None] = lambda holder: None) -> str:
        """Saves a new run under a name nobody has, ``RECIPE-N``, and returns the name."""
        with self.lock("runs", waiting=waiting):
            taken = [f.stem.rpartition("-") for f in (self.root / "runs").glob("*.json")]
            n = max((int(t[2]) for t in taken if t[0] == recipe and t[2].isdigit()), default=0) + 1
            name = f"{recipe}-{n}"
            append_line(self.root / "runs" / "order", {"run": name})
            self.save_run(name, body)
        return name

    def save_run(self, run: str, body: dict[str, Any]) -> None:
        write_json(self.root / "runs" / f"{run}.json", body)

    def alive(self, run: str) -> bool:
        """Whether the process of a run lives; it holds this lock as long as it does."""
        return self.holder(f"run.{run}") is not None

    def runs(self) -> list[str]:
        """Names of the runs, in the order in which they began; those not in the list of that (older stores) come first."""
        order = self.root / "runs" / "order"
        began = {str(line.get("run")): n for n, line in enumerate(read_jsonl(order))} if order.exists() else {}
        files = [
            (began.get(f.stem, -1), f.stat().st_mtime_ns, len(f.stem), f.stem) for f in (self.root / "runs").glob("*.json")
        ]
        return [name for *_, name in sorted(files)]

    def load_run(self, run: str) -> dict[str, Any]:
        """A run by name, by a recipe's name (its newest), or ``last``. Raises `UserError`."""
        names = self.runs()
        if not names:
            raise UserError(f"no runs in the store {self.root}; `tutelage run RECIPE` makes one")
        if run == "last":
            run = names[-1]
        if run not in names:
            of_recipe = [n for n in names if n.rpartition("-")[0] == run]
            if not of_recipe:
                raise UserError(f"unknown run {run!r} in the store {self.root}{suggest(run, names)}")
            run = of_recipe[-1]
        file = self.root / "runs" / f"{run}.json"
        body = {**read_object(file), "run": run}
        if wrong := unfit(body, Run):
            raise UserError(f"{file} is not a run: {wrong}; remove the file")
        if body.get("state") == "running" and not self.alive(run):
            body["state"] = "interrupted"  # killed: it could not say so itself
        return body

    def event(self, what: str, **facts: Any) -> None:
        """Appends one line to this process's event file."""
        file = self.root / "events" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        append_line(file, {"time": time.time(), "event": what, **facts})


def _placeless(hashes: dict[str, str]) -> dict[str, str]:
    return {name: each for name, each in hashes.items() if name != "adapter_config.json"}


def absolute(root: str | Path) -> Path:
    """Raises `UserError` for a path that leads nowhere, or that JSON cannot hold."""
    try:
        found = Path(root).expanduser().resolve()
        str(found).encode()
    except RuntimeError as error:  # an unknown ~user, links in a circle
        why = str(error).rstrip(".")
        raise UserError(f"cannot use {root} as a store: {why}; give another --store") from None
    except UnicodeEncodeError:
        raise UserError(f"the path of the store, {str(root)!a}, is no UTF-8 text; give another --store") from None
    return found


def checkpoint_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, of `forms.Checkpoint`. Raises `UserError` where it is not what was written."""
    state = read_object(folder / "context.json")
    if wrong := unfit(state, Checkpoint):
        raise UserError(f"context.json is no checkpoint's: {wrong}")
    if state.get("seal") not in (None, seal(state)):
        raise UserError("context.json was changed after it was written")
    try:
        whole = state.get("content") in (None, content_hash(folder, leave_out=("context.json",)))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    if not whole:
        raise UserError("its files or their content are not what was written")
    return state


def seal(meta: dict[str, Any]) -> str:
    """A digest of an ``artifact.json`` or ``context.json`` but for the seal itself: what tells that it was changed."""
    return digest({k: v for k, v in meta.items() if k != "seal"})
