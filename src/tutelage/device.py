"""The device that models are on: what the user asked for, found by a process of its own, and its memory running out.

`tutelage run --device` names it as PyTorch does: ``cuda``, ``cuda:1``, ``mps``; ``auto`` is the first CUDA device (or ROCm's,
which PyTorch calls the same) where there is one, else the CPU. It is in no key: stages are the same wherever they run.

Leaves out: more than one device in a run, and choosing the one with the most room.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tutelage.spec import UserError

KNOBS = ("micro_tokens", "slots")
"""Fields of stages that bound what is in memory at once, and change no result but by rounding."""


@dataclass(frozen=True)
class Device:
    """Where a run's models are."""

    where: str = "cpu"
    """as PyTorch names it, with its number"""
    name: str = "cpu"
    """what it is called: NVIDIA H100 80GB HBM3"""

    stages: int = 1
    """how many may be there at once, where it is not the CPU"""

    @property
    def accelerator(self) -> bool:
        return self.where != "cpu"

    def takes(self, node: Any) -> bool:
        """Whether a plan's node runs there and not on the CPU alone."""
        return bool(self.accelerator and node.stage.on_device)


CPU = Device()


def find(asked: str, stages: int = 1) -> Device:
    """The device that is meant, for so many stages at once. PyTorch is imported by another process, and by none where the
    answer is plain without.

    Raises `UserError` for a device that PyTorch does not see.
    """
    if asked == "cpu" or (asked == "auto" and not _built_for_cuda()):
        return CPU
    command = [sys.executable, "-P", "-c", "from tutelage.device import main; main()", asked]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"--device {asked}: PyTorch cannot be asked for it: {why}; --device cpu does without") from None
    if "error" in said:
        raise UserError(said["error"])
    return Device(**said, stages=stages)


def main() -> None:
    """Answers `find`, in JSON on the last line of what it prints."""
    try:
        found = look(sys.argv[1])
        print(json.dumps({"where": found.where, "name": found.name}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))


def look(asked: str) -> Device:
    """`find`, with PyTorch in this process."""
    import torch

    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
        module: Any = None if device.type == "cpu" else torch.get_device_module(device.type)
    except RuntimeError:
        raise UserError(f"--device {asked}: PyTorch knows no such device; say auto, cpu, cuda, cuda:N or mps") from None
    if module is None:
        return CPU
    count = module.device_count() if module.is_available() else 0
    number = device.index or 0
    if number >= count:
        sees = f"{count} of {device.type}, numbered from 0" if count else f"no {device.type} device"
        fix = (
            "give a number that is there"
            if count
            else "install its driver and a build of PyTorch for it, or leave --device out"
        )
        raise UserError(f"--device {asked}: PyTorch {torch.__version__} sees {sees}; {fix}")
    where = f"{device.type}:{number}"
    called = getattr(module, "get_device_name", None)
    return Device(where, called(number) if called else device.type)


def _built_for_cuda() -> bool:
    """Whether the installed PyTorch could see a CUDA device at all; without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    with suppress(OSError):
        said = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
        return bool(said.get("cuda") or said.get("hip"))
    return True


def free(where: str) -> None:
    """Gives back what a stage that has ended held on a device: the next one may be another process's."""
    if where != "cpu" and (torch := sys.modules.get("torch")):
        gc.collect()  # models hold cycles
        torch.get_device_module(where).empty_cache()


def exhausted(error: BaseException | None) -> bool:
    """Whether an error says that a device has no memory left."""
    torch = sys.modules.get("torch")
    while torch and error:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def relief(stage: Any) -> str:
    """What to do where a stage does not fit: fields to lower, as ``--set`` takes them."""
    sets = " ".join(f"--set {path}={value}" for path, value in _lower(stage, stage.name))
    less = f"run it again with {sets} (no result changes but by rounding), " if sets else ""
    return f"{less}{'or ' if sets else ''}with a smaller model, a device with more memory or --device cpu"


def _lower(stage: Any, path: str) -> Iterator[tuple[str, int]]:
    """Every knob of a stage, and of the stages that it holds itself, at half of what it is."""
    for name in type(stage).model_fields:
        value = getattr(stage, name)
        if name in KNOBS:
            yield f"{path}.{name}", max(1, value // 2)
        elif name == "resident" and value == 0:
            yield f"{path}.{name}", 1
        elif type(value) is dict:
            for key, each in value.items():
                if hasattr(each, "threads"):
                    yield from _lower(each, f"{path}.{name}.{key}")
        elif hasattr(value, "threads"):
            yield from _lower(value, f"{path}.{name}")
