"""A study's numbers as JSON, and its page's tables from that JSON.

    python docs/results/tables.py collect STORE RUN BASELINE > docs/results/NAME.json
    python docs/results/tables.py write docs/results/NAME.md         fills what stands between its markers from NAME.json

``collect`` takes what `tutelage report --json` says of a run's rows, and what `tutelage compare --json` says of each row
against the baseline row. A page holds ``<!-- accuracy -->``, ``<!-- paired -->`` and ``<!-- training -->`` lines, each ended by
``<!-- end -->``. Leaves out: what a table means; the page says that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from tutelage.report import compare, data, stats
from tutelage.spec import UserError
from tutelage.store import Store

WATCHED = ("reward", "entropy", "temperature", "length", "informative_groups")
LAST = 10
"""Points of a curve that its end is the mean of."""


def collect(store: Store, run: str, baseline: str) -> dict[str, Any]:
    found = data.collect(store, run)
    side = {row: compare.side_of_row(store, found["run"], row) for row in found["scores"]}
    pairs = {row: compare.scores(store, side[baseline], side[row])["rows"] for row in side if row != baseline}
    tests = [one for cells in pairs.values() for one in cells]
    for one, p in zip(tests, stats.holm([one["p"] for one in tests]), strict=True):
        one["p_holm"] = p  # over all tests of the study
    ends: dict[str, Any] = {}
    for stage, curves in found["curves"].items():
        for metric, series in curves.items():
            if metric in WATCHED:
                values = {str(s["seed"]): sum(s["value"][-LAST:]) / len(s["value"][-LAST:]) for s in series}
                ends.setdefault(stage, {})[metric] = values
    head = {k: found[k] for k in ("run", "recipe", "arguments", "seeds", "seconds")}
    cost = {n: {"flops": c["flops"], "tokens": c["tokens"]} for n, c in found["cost"]["by_stage"].items()}
    return {**head, "baseline": baseline, "scores": found["scores"], "paired": pairs, "ends": ends, "cost": cost}


def accuracy(of: dict[str, Any]) -> str:
    domains = list(next(iter(of["scores"].values()))["domains"])
    lines = [["", *(f"{d}: mean (95 %), seeds {', '.join(map(str, of['seeds']))}" for d in domains)]]
    for row, found in of["scores"].items():
        cells = []
        for d in domains:
            one = found["domains"].get(d)
            low, high = one["interval"]
            seeds = ", ".join(f"{100 * s['mean']:.1f}" for s in one["seeds"])
            cells.append(f"{100 * one['mean']:.1f} ({100 * low:.1f} to {100 * high:.1f}): {seeds}")
        lines.append([row, *cells])
    return table(lines)


def paired(of: dict[str, Any]) -> str:
    lines = [[f"minus {of['baseline']}", "domain", "difference (95 %)", "seeds above / below", "p", "Holm"]]
    for row, cells in of["paired"].items():
        for one in cells:
            low, high = (100 * v for v in one["interval"])
            base, mine = ({s["seed"]: s["mean"] for s in one["seeds"][side]} for side in ("a", "b"))
            over, under = (sum((mine[s] - base[s]) * sign > 0 for s in mine if s in base) for sign in (1, -1))
            test = [f"{one[k]:.3f}" if one[k] >= 0.001 else "<0.001" for k in ("p", "p_holm")]
            lines.append(
                [row, one["domain"], f"{100 * one['difference']:+.1f} ({low:+.1f} to {high:+.1f})", f"{over} / {under}", *test]
            )
    return table(lines)


def training(of: dict[str, Any]) -> str:
    lines = [["stage", *WATCHED, "sampled tokens"]]
    for stage, ends in of["ends"].items():
        if "reward" in ends:
            means = [sum(v.values()) / len(v) if (v := ends.get(m)) else None for m in WATCHED]
            sampled = of["cost"].get(stage, {}).get("tokens", {}).get("sampled", 0)
            lines.append([stage, *("–" if m is None else f"{m:.3g}" for m in means), f"{sampled / 1e3:.0f}k"])
    return table(lines)


def table(lines: list[list[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def filled(page: Path) -> str:
    """The page with the tables that its JSON gives."""
    of = json.loads(page.with_suffix(".json").read_text("utf-8"))
    text = page.read_text("utf-8")
    for name, make in (("accuracy", accuracy), ("paired", paired), ("training", training)):
        fresh = f"<!-- {name} -->\n\n{make(of)}\n\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, fresh=fresh: fresh, text, flags=re.DOTALL)
    return text


def main() -> None:
    asked = argparse.ArgumentParser(description="A study's numbers as JSON, and its page's tables from that JSON.")
    do = asked.add_subparsers(dest="do", required=True)
    collecting = do.add_parser("collect", help="print the JSON of a run")
    for word in ("store", "run", "baseline"):
        collecting.add_argument(word)
    do.add_parser("write", help="fill a page").add_argument("page", type=Path)
    given = asked.parse_args()
    try:
        if given.do == "collect":
            json.dump(collect(Store(given.store, create=False), given.run, given.baseline), sys.stdout, indent=1)
        else:
            given.page.write_text(filled(given.page), "utf-8")
    except (UserError, OSError) as error:
        asked.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
