"""Runs the benches and writes results.json, tables.json, RESULTS.md and the plots: `make bench`, `make bench ONLY=rollout`.

What an earlier run measured stays where this one did not measure it again; machines stand side by side in tables.json and on
the page, a GPU under its own name. results.json has the records of the processor that was measured last. A machine that
others use at the time is named as such: its ratios are to be taken again.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.harness import Record, Run, Unequal, as_json
from bench.machine import choose_dtype, loaded, machine, peak, place
from bench.scaling import picture

FAMILIES = ("cli", "rollout", "sft", "dpo", "grpo", "distill", "memory", "llamacpp", "scaling")
ON_GPU = ("rollout", "sft", "dpo", "grpo", "distill", "memory")


def read(file: Path, empty: Any) -> Any:
    return json.loads(file.read_text("utf-8")) if file.exists() else empty


def number(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as Markdown."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(number(row.get(k, "")) for k in head) + " |" for row in rows]


HEAD = """# Benches

Written by `make bench`; how each is measured stands in the head of its file. A ratio is the peer's median time over ours,
`of peer` ours over the peer's; min and max are those of single rounds. In the tables, `of peak` is the useful FLOPs, padding
not among them, over seconds over the measured matmul peak of the dtype (on a GPU: the model FLOPs utilisation, of the peak
measured); `MiB` is what a side's first call took over what stood before it, weights not among it."""


def page(places: dict[str, Any]) -> str:
    """RESULTS.md: a section a machine."""
    lines = [HEAD]
    for name, told in places.items():
        shown = [{k: "none" if v is None else v for k, v in r.items()} for r in told["records"].values()]
        lines += ["", f"## {name}", "", *(table(shown) if shown else [])]
        for family, measured in told["families"].items():
            lines += ["", f"### {family}", "", "; ".join(f"{k}: {number(v)}" for k, v in measured["machine"].items()) + "."]
            if loaded(measured["machine"]):
                lines += ["", "**Others used this machine at the time: take these numbers again.**"]
            for title, rows in measured["tables"].items():
                lines += ["", f"#### {title}", "", *table(rows)]
                lines += ["", f"![{title}]({picture(title)})"] if "x" in rows[0] else []
    return "\n".join(lines) + "\n"


def save(place: Path, name: str, value: Any) -> None:
    (place / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def measure(family: str, run: Run) -> list[Record]:
    """A family's records; what cannot run says why."""
    module = import_module(f"bench.{family}")
    try:
        return module.bench(run)
    except (Unequal, ImportError, MemoryError) as error:
        said = str(error)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; only a GPU's memory is asked so much of
        if run.device == "cpu":
            raise
        said = str(error).partition("\n")[0]
    return [Record(name, None, None, None, None, "x", said) for name in module.NAMES]


def asked(words: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    lasts = "On two quiet cores a family should take up to eight minutes, all of them some forty."
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition("\n")[0], epilog=lasts)
    parser.add_argument("only", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all where none is named")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=f"on cuda: {', '.join(ON_GPU)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="fp32 is run where it is faster")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, and measures nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(words)
    valid = ON_GPU if given.device == "cuda" else FAMILIES
    for family in given.only:
        if family not in valid:
            parser.error(f"no family {family!r} on {given.device}; there are {', '.join(valid)}")
    given.only = given.only or valid
    if given.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch sees no GPU here; leave --device out, or install a build of PyTorch for it")
    return given


def main(words: list[str] | None = None) -> int:
    given = asked(words)
    given.out.mkdir(parents=True, exist_ok=True)
    facts = machine(given.device)
    peaks = {d: peak(d, given.device) for d in ("float32", "bfloat16")}
    dtype, why = choose_dtype(given.dtype, peaks)
    facts |= {f"peak {d} GFLOP/s": p for d, p in peaks.items()}
    places = read(given.out / "tables.json", {})
    here = places.setdefault(place(facts), {"records": {}, "families": {}})
    for family in given.only:
        run = Run(dtype, given.rounds, given.device, peaks[dtype], given.quick, given.out, why)
        found = {r["name"]: r for r in as_json(measure(family, run))}
        here["records"] |= found
        here["families"][family] = {"machine": facts, "tables": run.details}
        save(given.out, "tables.json", places)
        if given.device == "cpu":
            save(given.out, "results.json", list(here["records"].values()))
        (given.out / "RESULTS.md").write_text(page(places), "utf-8")
        for r in found.values():
            ratio = "none" if r["ratio"] is None else f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f}) {r['unit']}"
            print(f"{r['name']:20} {ratio}   {r['note']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
