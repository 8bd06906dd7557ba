"""How quick a full store is: makes one of small artifacts in a temp folder and times listing it, with its index and without.

    python bench/store.py [ARTIFACTS] [RUNS]

Prints seconds, the start of Python and the imports included where a command is timed. Leaves out payloads of real size:
nothing timed here reads them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutelage.estimate import Estimator
from tutelage.index import summaries
from tutelage.spec import digest
from tutelage.store import Store


def fill(store: Store, artifacts: int, runs: int) -> None:
    """Chains of stages, each with an ``artifact.json`` of usual size; every run holds its share of them."""
    each = max(artifacts // runs, 1)
    for run in range(runs):
        keys: dict[str, str] = {}
        stages: dict[str, Any] = {}
        for n in range(each):
            key, name = digest([run, n]), f"stage-{n}"
            inputs = (
                [{"path": "source", "name": f"stage-{n - 1}", "key": keys[f"stage-{n - 1}"], "port": "policy", "step": None}]
                if n
                else []
            )
            stages[name] = {"kind": "stages.fit.Fit", "fields": {f"field-{i}": i for i in range(60)}}
            folder = store.root / "artifacts" / key
            (folder / "policy").mkdir(parents=True)
            (folder / "policy" / "model.safetensors").write_bytes(b"0" * 100)
            meta = {"key": key, "name": name, "kind": "stages.fit.Fit", "version": 1, "record": stages[name], "inputs": inputs}
            meta |= {"outputs": {"policy": {"kind": "model"}}, "cost": {"flops": 1e12}, "estimate": 1e12, "threads": 1}
            meta |= {"seconds": 10.0, "finished": 1e9 + n, "content": {"policy": digest(n)}}
            (folder / "artifact.json").write_text(json.dumps(meta, indent=1))
            keys[name] = key
        store.save_run(f"full-{run}", {"recipe": "full", "goals": [{"record": {"stages": stages}, "seed": run, "keys": keys}]})


def timed(what: str, call: Callable[[], Any]) -> None:
    began = time.perf_counter()
    call()
    print(f"{time.perf_counter() - began:7.2f} s  {what}", flush=True)


def command(*words: str) -> Callable[[], Any]:
    return lambda: subprocess.run([sys.executable, "-m", "tutelage", *words], check=True, stdout=subprocess.DEVNULL)


def main(artifacts: int = 10_000, runs: int = 300) -> None:
    with tempfile.TemporaryDirectory() as place:
        store = Store(Path(place) / "store")
        where = ("--store", str(store.root))
        timed(f"making {artifacts:,} artifacts and {runs:,} runs", lambda: fill(store, artifacts, runs))
        timed("summaries, without an index", lambda: summaries(store))
        timed("summaries, with one", lambda: summaries(store))
        timed("Estimator", lambda: Estimator(store))
        timed("tutelage --help", command("--help"))
        timed("tutelage store list", command("store", "list", *where))
        timed("tutelage store list --json", command("store", "list", "--json", *where))
        timed("tutelage plan quickstart", command("plan", "quickstart", *where))
        timed("tutelage store gc, showing only", command("store", "gc", *where))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
