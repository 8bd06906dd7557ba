"""Files that survive a kill: JSON written whole or not at all, JSON lines whose cut last line is passed over, fsync.

Leaves out: where files lie (store.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tutelage.spec import UserError


def write_json(path: Path, body: Any) -> None:
    """Writes a JSON file so that a reader sees the old one or the new one, never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with fresh.open("w") as file:
        json.dump(body, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises `UserError`."""
    try:
        body = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(body, dict):
        raise UserError(f"{path} holds no JSON object; it is damaged or not a store's")
    return body


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a JSON-lines file; a last line cut short by a kill is passed over."""
    with path.open("r", encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def sync(folder: Path) -> None:
    """Writes a folder's files through to disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
