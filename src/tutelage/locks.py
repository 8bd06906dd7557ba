"""Locks between processes, that say who holds them and show that the holder still moves.

The lock is the kernel's (``flock``), so it is free again the moment its holder dies, however it dies. Beside it lies a note
of who holds it, touched every `BEAT` seconds. Whoever waits watches that the note *changes*, by a monotonic clock of its own:
clocks that differ between machines, or jump, decide nothing.

Leaves out: taking a lock from a holder that is alive but stands still. It could wake up and write into what another has
begun; a person must end it, and is told which process it is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tutelage.files import write_json
from tutelage.spec import UserError

BEAT = 5.0
STALLED = 60.0
"""Seconds without a heartbeat after which a holder counts as stalled."""
POLL = 0.2


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str = "?"
    pid: int = 0
    what: str = ""
    """What it does, such as the name of its run."""
    still: float = 0.0
    """Seconds since its last heartbeat, as seen by who asks."""

    @property
    def stalled(self) -> bool:
        return self.still >= STALLED

    def __str__(self) -> str:
        where = f"process {self.pid} on {self.host}" if self.pid else "another process"
        return f"{self.what} ({where})" if self.what else where


@contextmanager
def hold(file: Path, what: str = "", waiting: Callable[[Holder], None] = lambda holder: None) -> Iterator[None]:
    """Holds the lock of a file; while another process does, calls ``waiting`` again and again, which may raise to give up.

    Raises `UserError` where the file system has no locks or the file cannot be made.
    """
    handle = _open(file)
    note = file.with_suffix(".json")
    try:
        _acquire(handle, file, note, waiting)
        ended = threading.Event()
        _write(note, what)
        beat = threading.Thread(target=_beat, args=(note, ended), daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            note.unlink(missing_ok=True)
    finally:
        _open_here.discard(handle)
        os.close(handle)


_open_here: set[int] = set()
"""Handles of locks. A forked child closes its copies, or a lock would live on in it when its holder is dead."""


def _close_all() -> None:
    while _open_here:
        os.close(_open_here.pop())


os.register_at_fork(after_in_child=_close_all)


def held(file: Path) -> Holder | None:
    """Who holds the lock of a file at this moment; None where nobody does."""
    try:
        handle = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _read(file.with_suffix(".json")) if _contended(error) else None
    finally:
        os.close(handle)
    return None


def _open(file: Path) -> int:
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; give --store a folder that can be written") from None
    _open_here.add(handle)
    return handle


def _acquire(handle: int, file: Path, note: Path, waiting: Callable[[Holder], None]) -> None:
    seen, changed, began = 0, time.monotonic(), time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if not _contended(error):
                raise UserError(
                    f"the file system of {file.parent} has no locks ({error.strerror}), so two runs could not share it; "
                    "give --store a folder on another disk"
                ) from None
        with suppress(OSError):
            if (mtime := note.stat().st_mtime_ns) != seen:
                seen, changed = mtime, time.monotonic()
        if time.monotonic() - began > 2 * POLL:  # not merely somebody's look at who holds it
            waiting(replace(_read(note), still=time.monotonic() - changed))
        time.sleep(POLL)


def _contended(error: OSError) -> bool:
    return error.errno in (errno.EAGAIN, errno.EACCES)


def _write(note: Path, what: str) -> None:
    """On a full disk there is no note, rather than that of an earlier holder: who frees the disk must get the lock."""
    try:
        write_json(note, {"host": socket.gethostname(), "pid": os.getpid(), "what": what})
    except OSError:
        with suppress(OSError):
            note.unlink(missing_ok=True)


def _read(note: Path) -> Holder:
    try:
        body = json.loads(note.read_text("utf-8"))
        return Holder(str(body["host"]), int(body["pid"]), str(body["what"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Holder()


def _beat(note: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(note)
