"""Files that survive a kill: JSON written whole or not at all, lines of JSON, fsync; and what a failing disk is called.

Leaves out: where files lie (store.py).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tutelage.spec import DEEPEST, UserError, check_values


def write_json(path: Path, body: Any) -> None:
    """Writes a JSON file so that a reader sees the old one or the new one, never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(body, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises `UserError`."""
    try:
        body = parse(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(body, dict):
        raise UserError(f"{path} holds no JSON object; it is damaged or not a store's")
    return body


def parse(text: str) -> Any:
    """JSON that can be walked by recursion and printed. Raises `ValueError`."""
    try:
        body = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text.lower() or text.count("[") + text.count("{") > DEEPEST:  # else it cannot be wrong
        check_values(body, "it", numbers=False)
    return body


def append_line(path: Path, body: dict[str, Any]) -> None:
    """Adds one line of JSON, or nothing; a line that a kill has cut short before is closed first. One writer a file."""
    line = json.dumps(body).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            while line:
                line = line[os.write(handle, line) :]
        except OSError:  # a full disk takes a part
            with suppress(OSError):
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a line that a kill has cut short is passed over, and so is a damaged one."""
    with path.open("r", encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                found = parse(line)
                if line.endswith("\n") and isinstance(found, dict):
                    yield found


def sync(folder: Path) -> None:
    """Writes a folder's files, and its folders' lists of them, through to disk."""
    for file in folder.rglob("*"):
        if file.is_dir():
            sync_folder(file)
        elif file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- a failing disk ----------------------------------------------------------------------------------------------------

CALLED = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file has reached the size limit",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EIO: "the disk fails",
    errno.ESTALE: "the network mount is gone",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
}
FULL = 1 << 16
"""Bytes of room below which a library's unclear failure to write is put down to a full disk."""


class Trouble(UserError):
    """The disk's trouble, found where it came up."""


def trouble(error: BaseException, root: Path) -> str:
    """One line where an error is the disk's and not the code's, else nothing.

    Libraries say it in their own ways (safetensors by a text, torch by a RuntimeError), so the causes of an error, its text
    and the room left under ``root`` are looked at.
    """
    if isinstance(error, UserError):  # it says its own line
        return str(error) if isinstance(error, Trouble) else ""
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    for one in chain:
        if isinstance(one, Trouble):
            return str(one)
        if isinstance(one, OSError) and one.errno in CALLED:
            name = one.filename if isinstance(one.filename, str) else str(root)
            return f"{CALLED[one.errno]}: {name}"
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            if f"os error {number})" in str(one) or os.strerror(number) in str(one):
                return f"{CALLED[number]}: {root}"
    with suppress(OSError):
        if isinstance(error, (OSError, RuntimeError)) and shutil.disk_usage(root).free < FULL:
            return f"{CALLED[errno.ENOSPC]}: {root}"
    return ""
