"""Runs the benches and writes results.json, tables.json, RESULTS.md and the plots: `make bench`, `make bench ONLY=rollout`.

What an earlier run measured stays where this one did not measure it again. A machine that others use at the time is named
as such on the page: its ratios are to be taken again.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.harness import Record, Run, Unequal, as_json, choose_dtype, loaded, machine, peak

FAMILIES = ("cli", "rollout", "sft", "dpo", "grpo", "distill", "memory", "llamacpp", "scaling")


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


def page(records: list[dict[str, Any]], tables: dict[str, Any]) -> str:
    """RESULTS.md"""
    lines = ["# Benches", "", "Written by `make bench`; how each is measured stands in the head of its file. A ratio is the"]
    lines += ["peer's median time over ours, `of peer` ours over the peer's; min and max are those of single rounds.", ""]
    shown = [
        {k: "none" if r[k] is None else r[k] for k in ("name", "ratio", "low", "high", "target", "unit", "note")}
        for r in records
    ]
    lines += table(shown) if shown else []
    for family, told in tables.items():
        facts = told["machine"]
        lines += ["", f"## {family}", "", "; ".join(f"{k}: {number(v)}" for k, v in facts.items()) + "."]
        if loaded(facts):
            lines += ["", "**Others used this machine at the time: take these numbers again.**"]
        for name, rows in told["tables"].items():
            lines += ["", f"### {name}", "", *table(rows)]
            picture = f"{name.replace(',', '').replace(' ', '-')}.svg"
            lines += ["", f"![{name}]({picture})"] if "x" in rows[0] else []
    return "\n".join(lines) + "\n"


def measure(family: str, run: Run) -> list[Record]:
    """A family's records; what cannot run says why."""
    module = import_module(f"bench.{family}")
    try:
        return module.bench(run)
    except (Unequal, ImportError) as error:
        return [Record(name, None, None, None, None, "x", str(error)) for name in module.NAMES]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("only", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all where none is named")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="fp32 is run where it is faster")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, and measures nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(words)
    for family in given.only:
        if family not in FAMILIES:
            parser.error(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    facts = machine()
    peaks = {d: peak(d) for d in ("float32", "bfloat16")}
    dtype, why = choose_dtype(given.dtype, peaks)
    facts |= {f"peak {d} GFLOP/s": p for d, p in peaks.items()}
    records = {r["name"]: r for r in read(given.out / "results.json", [])}
    tables = read(given.out / "tables.json", {})
    for family in given.only or FAMILIES:
        run = Run(dtype, given.rounds, given.quick, given.out, why)
        found = as_json(measure(family, run))
        records |= {r["name"]: r for r in found}
        tables[family] = {"machine": facts, "tables": run.details}
        (given.out / "results.json").write_text(
            json.dumps(list(records.values()), indent=1, ensure_ascii=False) + "\n", "utf-8"
        )
        (given.out / "tables.json").write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (given.out / "RESULTS.md").write_text(page(list(records.values()), tables), "utf-8")
        for r in found:
            ratio = "none" if r["ratio"] is None else f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f}) {r['unit']}"
            print(f"{r['name']:20} {ratio}   {r['note']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
