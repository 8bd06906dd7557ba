"""Where our side of a bench spends its time: a table by op of seconds on the processor (on a GPU, on the device), on standard
output.

    python -m bench.profile FAMILY [python -m bench's options]

Each pair is proven equal as ever; then our side runs once unseen and once under PyTorch's profiler, its peers not at all.
Leaves out: what happens in Python between two ops, but for the sum of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from bench.__main__ import asked, measure
from bench.harness import Run, Timing
from bench.machine import choose_dtype, peak, settle

ROWS = 15


def looked_at(sides: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> Timing:
    """In the place of `interleave`: prints the table of the first side. Every side gets its seconds, which nobody reads."""
    from torch.profiler import ProfilerActivity, profile

    name, call = next(iter(sides.items()))
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    call()
    with profile(activities=kinds) as seen:
        began = perf_counter()
        call()
        settle(device)
        seconds = perf_counter() - began
    ops = seen.key_averages()
    inside = sum(o.self_cpu_time_total for o in ops) / 1e6
    print(f"\n{name}, {seconds:.3g} s under the profiler, {inside:.3g} s of it in ops ({sum(o.count for o in ops)} calls)")
    print(ops.table(sort_by=f"self_{device}_time_total", row_limit=ROWS, max_name_column_width=40))
    return Timing({n: [seconds] for n in sides}, {n: [seconds] for n in sides})


def main(words: list[str] | None = None) -> int:
    given = asked(words)
    peaks = {d: peak(d, given.device) for d in ("float32", "bfloat16")}
    dtype, _ = choose_dtype(given.dtype, peaks)
    for family in given.only:
        run = Run(dtype, 1, given.device, peaks[dtype], given.quick, given.out, interleave=looked_at)
        for record in measure(family, run):
            print(f"{record.name}: {'profiled' if record.ratio else record.note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
