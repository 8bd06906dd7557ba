"""Ends its own process with SIGKILL at one boundary: a call through which Python changes files.

Boundaries are the functions of ``os`` named below, its ``open`` for writing and ``write``; every file object opened for
writing, the first write to it and its truncation. A kill falls ``before`` the call, ``after`` it, or leaves it ``torn``: half
of what was to be written is.

With this folder first on PYTHONPATH and ``KILL_AT`` set, such as ``worker:17:after``, every such process (``worker`` or
``parent``) dies at its 17th boundary. A process that imports this module and calls `install` sets the moment by `arm`.

What is written survives a kill without fsync, which is counted but not done: it takes most of the time. Leaves out: loss of
power, which is what fsync is for; what torch, safetensors and Arrow write by themselves (kills at random times meet that).
"""

from __future__ import annotations

import builtins
import io
import os
import shutil  # noqa: F401  as it is imported it looks at the functions of os that are replaced here
import signal
import sys
from collections.abc import Callable
from typing import Any

CALLS = ("replace", "rename", "link", "fsync", "unlink", "remove", "mkdir", "rmdir", "truncate")
HOWS = ("before", "after", "torn")
_open, _write, _close, _io_open = os.open, os.write, os.close, io.open


class _State:
    count = 0
    at = 0
    how = "before"
    log = ""
    label = ""
    trace = False


def arm(at: int, how: str = "before", log: str = "", label: str = "", trace: bool = False) -> None:
    """Counts from here and dies at boundary ``at`` (0: never). The file ``log`` gets a line then, with ``trace`` at each."""
    _State.count, _State.at, _State.how, _State.log, _State.label, _State.trace = 0, at, how, log, label, trace


def _note(name: str, what: Any, how: str) -> None:
    if not _State.log:
        return
    if isinstance(what, int):
        what = os.readlink(f"/proc/self/fd/{what}")
    line = f"{_State.label}\t{_State.count}\t{how}\t{name}\t{what}\n"
    handle = _open(_State.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _write(handle, line.encode())
    _close(handle)


def _boundary(name: str, what: Any, call: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
    _State.count += 1
    here = _State.count == _State.at
    if here or _State.trace:
        _note(name, what, _State.how if here else "")
    if here and (_State.how == "before" or (_State.how == "torn" and torn is None)):
        os.kill(os.getpid(), signal.SIGKILL)
    if here and _State.how == "torn" and torn is not None:
        torn()
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        return call()
    finally:  # what fails has been called too
        if here:
            os.kill(os.getpid(), signal.SIGKILL)


def _counted(name: str) -> Callable[..., Any]:
    real = getattr(os, name) if name != "fsync" else lambda handle: None
    return lambda *args, **more: _boundary(name, args[0], lambda: real(*args, **more))


def _os_open(path: Any, flags: int, *args: Any, **more: Any) -> int:
    if not flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
        return _open(path, flags, *args, **more)
    return _boundary("open", path, lambda: _open(path, flags, *args, **more))


def _os_write(handle: int, data: Any) -> int:
    return _boundary("write", handle, lambda: _write(handle, data), lambda: _write(handle, data[: len(data) // 2]))


def _file_open(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
    if not set(mode) & set("wax+") or isinstance(file, int):
        return _io_open(file, mode, *args, **more)
    made = _boundary("open", file, lambda: _io_open(file, mode, *args, **more))
    write, truncate = made.write, made.truncate

    def whole(data: Any) -> Any:
        result = write(data)
        made.flush()
        return result

    def first(data: Any) -> Any:
        made.write = write
        return _boundary("write", file, lambda: whole(data), lambda: whole(data[: len(data) // 2]))

    made.write = first
    made.truncate = lambda *size: _boundary("truncate", file, lambda: truncate(*size))
    return made


def install() -> None:
    """Replaces the functions."""
    for name in CALLS:
        setattr(os, name, _counted(name))
    os.open, os.write, io.open, builtins.open = _os_open, _os_write, _file_open, _file_open  # type: ignore[assignment]


if "KILL_AT" in os.environ:
    role, at, how = os.environ["KILL_AT"].split(":")
    if role == ("worker" if any("tutelage.worker" in word for word in sys.orig_argv) else "parent"):
        arm(int(at), how)
        install()
