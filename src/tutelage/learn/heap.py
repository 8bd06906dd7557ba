"""Memory of PyTorch on a processor: big buffers outside the C library's heap, and a heap that keeps what was freed.

A chunk of logits (output.py) is some 16 MB, made and freed many times between small things that stay. glibc serves such
sizes from its heap once it has seen one freed, and aligned requests, PyTorch's all are, do not fit the holes that their like
left: the heap grew by several whole [M, V] where a few chunks are alive at once. Mapped on their own they go back when they
are freed, for the price of fresh pages. Of all that is smaller, activations above all, glibc gives the end of the heap back as
soon as it is free, and every step of training would pay for the same pages again, up to a fifth of its time: so it keeps some.
Results do not change.

Leaves out: other C libraries (nothing is done there), accelerators (PyTorch has its own allocator there).
"""

from __future__ import annotations

import ctypes
from functools import cache

MAP_FROM = 12 << 20
"""Bytes from which a buffer is mapped on its own: less than a chunk, more than anything of a small model."""
KEEP = 1 << 30
"""Bytes at the heap's end that stay when they are freed."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""mallopt's names for them"""


@cache
def settle_heap() -> None:
    """Once a process; where the C library has no `mallopt`, nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, MAP_FROM)
        mallopt(M_TRIM_THRESHOLD, KEEP)
