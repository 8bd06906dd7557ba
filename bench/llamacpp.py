"""llama.cpp as a peer of rollouts: not measured, and the record says why.

What is missing is the same weights as a GGUF file, which only a machine with llama-cpp-python can hold to ours.
"""

from __future__ import annotations

from importlib.util import find_spec

from bench.harness import Record, Run

NAMES = ("llama-cpp",)


def bench(run: Run) -> list[Record]:
    has = find_spec("llama_cpp") is not None
    why = "the comparison is not written yet" if has else "llama-cpp-python is not installed (it builds llama.cpp from source)"
    return [Record("llama-cpp", None, None, None, None, "x", why)]
