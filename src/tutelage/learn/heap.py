"""Big buffers outside the C library's heap, so that what was freed can be used again.

A chunk of logits (learner.py) is some 16 MB, made and freed many times between small things that stay. glibc serves such
sizes from its heap once it has seen one freed, and aligned requests, PyTorch's all are, do not fit the holes that their like
left: the heap grew by several whole [M, V] where a few chunks are alive at once. Mapped on their own they go back when they
are freed, for the price of fresh pages. Results do not change.

Leaves out: other C libraries (nothing is done there), accelerators (PyTorch has its own allocator there).
"""

from __future__ import annotations

import ctypes
from functools import cache

MAP_FROM = 12 << 20
"""Bytes from which a buffer is mapped on its own: less than a chunk, more than anything of a small model."""
M_MMAP_THRESHOLD = -3
"""mallopt's name for it"""


@cache
def map_big_buffers() -> None:
    """Once a process; where the C library has no `mallopt`, nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, MAP_FROM)
