"""The machine of a bench: what it is, its peak, when a call on it has ended, how much memory the call took.

On a GPU a call has ended when the device is done, and memory is what PyTorch's allocator gave out; on a processor it is the
process's resident memory, where Linux tells its high-water mark.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUSY = 0.3
"""Runnable processes a core beside ours from which on a machine counts as loaded."""


def settle(device: str) -> None:
    """Waits until the device has done what it was asked to."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def reset_memory(device: str) -> float | None:
    """Forgets the largest memory so far; what is in use now [MiB], None where nobody can tell."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return most_memory(device)


def most_memory(device: str) -> float:
    """The largest memory in use since `reset_memory` [MiB]."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 2**10 if found else 0.0


def peak(dtype: str, device: str = "cpu", seconds: float = 1.0) -> float:
    """The best square matmul seen, in GFLOP/s, with PyTorch's threads as they are; smaller where the dtype is too slow."""
    import torch

    kind, sizes = getattr(torch, dtype), (4096, 8192) if device == "cuda" else (512, 1024)
    probe = torch.ones(128, 128, dtype=kind, device=device)
    taken = []
    for _ in range(4):  # the first call starts libraries, and others may be at work in another
        began = time.perf_counter()
        probe @ probe
        settle(device)
        taken.append(time.perf_counter() - began)
    if device == "cpu" and min(taken) > 0.005:
        sizes = (128,)
    best = 0.0
    for size in sizes:  # a small one fits between two interruptions, a large one needs its start less
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        end = time.perf_counter() + seconds / len(sizes)
        while time.perf_counter() < end:
            began = time.perf_counter()
            a @ b
            settle(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def choose_dtype(asked: str, peaks: Mapping[str, float]) -> tuple[str, str]:
    """(the dtype to run, what records say of it): bf16 only where this machine multiplies it faster than fp32."""
    if asked == "bfloat16" and peaks["bfloat16"] < peaks["float32"]:
        said = f"fp32 on both sides: bf16 matmuls reach {peaks['bfloat16']:.2g} GFLOP/s here, fp32 {peaks['float32']:.3g}"
        return "float32", said
    return asked, "bf16 on both sides" if asked == "bfloat16" else "fp32 on both sides"


def machine(device: str = "cpu") -> dict[str, Any]:
    """The GPU where one is used, processor, cores, threads, load and versions."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    has = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    cores = os.cpu_count() or 1
    return {
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "instructions": " ".join(has),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load a core": round(os.getloadavg()[0] / cores, 2),
        "python": platform.python_version(),
        **{n: installed(n) for n in ("torch", "transformers", "trl", "peft", "llama-cpp-python", "vllm")},
    }


def place(facts: Mapping[str, Any]) -> str:
    """The name that a machine's results stand under."""
    return str(facts.get("gpu") or facts["processor"])


def loaded(facts: Mapping[str, Any]) -> bool:
    """Whether others were at work when the suite began, so that its numbers are to be taken again."""
    return bool(facts["load a core"] > BUSY)
