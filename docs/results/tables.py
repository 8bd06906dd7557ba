"""A study's numbers as JSON, and its page's tables from that JSON.

    python docs/results/tables.py collect STORE RUN BASELINE [ROW=LESS ...] > docs/results/NAME.json
    python docs/results/tables.py write docs/results/NAME.md         fills what stands between its markers from NAME.json

``collect`` takes what `tutelage report --json` says of a run's rows, and what `tutelage compare --json` says of each row
against the baseline row, and of each ROW against LESS. A page holds the lines ``<!-- NAME -->`` it wants, of the names in
`TABLES`, each ended by ``<!-- end -->``. Leaves out: what a table means; the page says that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import predict

from tutelage.report import compare, data, methods_show, stats
from tutelage.report.read import load
from tutelage.spec import UserError, suggest
from tutelage.store import Store

WATCHED = ("reward", "entropy", "temperature", "length", "informative_groups")
LAST = 10
"""Points of a curve that its end is the mean of."""


def collect(store: Store, run: str, baseline: str, also: Sequence[str] = ()) -> dict[str, Any]:
    found = data.collect(store, run)
    side = {row: compare.side_of_row(store, found["run"], row) for row in found["scores"]}
    pairs = {row: compare.scores(store, side[baseline], side[row])["rows"] for row in side if row != baseline}
    tests = [one for cells in pairs.values() for one in cells]
    for one, p in zip(tests, stats.holm([one["p"] for one in tests]), strict=True):
        one["p_holm"] = p  # over all tests of the study
    others = {}
    for pair in also:
        row, _, less = pair.partition("=")
        if missing := {row, less} - set(side):
            raise UserError(f"run {run!r} has no row {min(missing)!r}{suggest(min(missing), side)}")
        others[row] = {"less": less, "cells": compare.scores(store, side[less], side[row])["rows"]}
    ends: dict[str, Any] = {}
    for stage, curves in found["curves"].items():
        for metric, series in curves.items():
            if metric in WATCHED:
                values = {str(s["seed"]): sum(s["value"][-LAST:]) / len(s["value"][-LAST:]) for s in series}
                ends.setdefault(stage, {})[metric] = values
    head = {k: found[k] for k in ("run", "recipe", "arguments", "seeds", "seconds")}
    cost = {n: {"flops": c["flops"], "tokens": c["tokens"]} for n, c in found["cost"]["by_stage"].items()}
    told = {"methods": found["methods"]} if found["methods"] else {}
    told |= {"also": others} if others else {}
    if measured := diagnosed(store, run):
        told |= {"diagnoses": measured, "predicted": predict.predictors(store, run)}
    return {**head, "baseline": baseline, "scores": found["scores"], "paired": pairs, "ends": ends, "cost": cost, **told}


def diagnosed(store: Store, run: str) -> dict[str, Any]:
    """stage -> domain -> number -> seed -> mean over tokens; ``verdict`` among the numbers."""
    found: dict[str, Any] = {}
    for each in load(store, run).replicates:
        for stage, key in each.keys.items():
            told = (store.meta(key).get("facts") or {}).get("diagnosis") if store.has(key) else None
            for one in told["teachers"] if told else ():
                numbers = {name: at["mean"] for name, at in one["numbers"].items()} | {"verdict": one["verdict"]["level"]}
                for name, value in numbers.items():
                    found.setdefault(stage, {}).setdefault(one["domain"], {}).setdefault(name, {})[str(each.seed)] = value
    return found


def accuracy(of: dict[str, Any]) -> str:
    domains = list(dict.fromkeys(d for row in of["scores"].values() for d in row["domains"]))
    lines = [["", *(f"{d}: mean (95 %), seeds {', '.join(map(str, of['seeds']))}" for d in domains)]]
    for row, found in of["scores"].items():
        cells = []
        for d in domains:
            one = found["domains"].get(d)
            if not one:
                cells.append("–")
                continue
            low, high = one["interval"]
            seeds = ", ".join(f"{100 * s['mean']:.1f}" for s in one["seeds"])
            cells.append(f"{100 * one['mean']:.1f} ({100 * low:.1f} to {100 * high:.1f}): {seeds}")
        lines.append([row, *cells])
    return table(lines)


def paired(of: dict[str, Any]) -> str:
    lines = [[f"minus {of['baseline']}", "domain", "difference (95 %)", "seeds above / below", "p", "Holm"]]
    for row, cells in of["paired"].items():
        lines += [[row, *difference(one), *(chance(one[k]) for k in ("p", "p_holm"))] for one in cells]
    return table(lines)


def also(of: dict[str, Any]) -> str:
    """Rows held to others than the baseline."""
    lines = [["row", "minus", "domain", "difference (95 %)", "seeds above / below", "p"]]
    for row, found in of["also"].items():
        lines += [[row, found["less"], *difference(one), chance(one["p"])] for one in found["cells"]]
    return table(lines)


def difference(one: dict[str, Any]) -> list[str]:
    """Domain, difference with its interval, and the seeds on each side."""
    base, mine = ({s["seed"]: s["mean"] for s in one["seeds"][side]} for side in ("a", "b"))
    over, under = (sum((mine[s] - base[s]) * sign > 0 for s in mine if s in base) for sign in (1, -1))
    return [one["domain"], spread(one["difference"], one["interval"], "+"), f"{over} / {under}"]


def training(of: dict[str, Any]) -> str:
    lines = [["stage", *WATCHED, "sampled tokens"]]
    for stage, ends in of["ends"].items():
        if "reward" in ends:
            means = [sum(v.values()) / len(v) if (v := ends.get(m)) else None for m in WATCHED]
            sampled = of["cost"].get(stage, {}).get("tokens", {}).get("sampled", 0)
            lines.append([stage, *("–" if m is None else f"{m:.3g}" for m in means), f"{sampled / 1e3:.0f}k"])
    return table(lines)


def methods(of: dict[str, Any]) -> str:
    """Scores of the methods: means over the domains taught, against the reference, and by domain."""
    found = of["methods"]
    reference, before = found["reference"], (found["before"] or {}).get("row")
    lines = [["method", "mean (95 %)", "seeds", f"minus {reference} (95 %)", "seeds, lowest to highest", "p, Holm"]]
    lines[0] += ["recovery (95 %)", *found["taught"]]
    for row, m in found["rows"].items():
        minus, rec, mean = m["minus_reference"], m["recovery"], m["mean"]
        cells = [
            row,
            spread(mean.get("mean"), mean.get("interval")),
            ", ".join(percent(s["mean"]) for s in mean.get("seeds", ())),
        ]
        cells += [spread(minus["difference"], minus["interval"], "+"), sides(minus)] if minus else ["–", "–"]
        cells.append(chance(minus.get("p_holm")) if minus else "–")
        cells.append(spread(rec["mean"], rec["interval"]) if rec else "–")
        lines.append([*cells, *(percent(m["domains"].get(d, {}).get("mean")) for d in found["taught"])])
    for name, mean in (("routed oracle", found["oracle"]), (f"before: {before}", found["before"])):
        if mean and mean.get("seeds"):
            seeds = ", ".join(percent(s["mean"]) for s in mean["seeds"])
            scored = of["scores"][before]["domains"] if mean is found["before"] else {}
            rest = [percent(scored.get(d, {}).get("mean")) for d in found["taught"]]
            lines.append([name, spread(mean["mean"], mean["interval"]), seeds, "–", "–", "–", "–", *rest])
    return table(lines)


def diagnoses(of: dict[str, Any]) -> str:
    """What was measured before a distillation: means over the seeds, and from the lowest to the highest."""
    names = ("nll", "kl", "top1", "overlap", "mass", "spread", "clipped")
    lines = [["stage", "domain", *names, "verdicts"]]
    for stage, domains in of["diagnoses"].items():
        for domain, numbers in domains.items():
            cells = []
            for values in (list(numbers[name].values()) for name in names):
                cells.append(f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            verdicts = list(numbers["verdict"].values())
            told = ", ".join(f"{v} {verdicts.count(v)}" for v in dict.fromkeys(verdicts))
            lines.append([stage, domain, *cells, told])
    return table(lines)


def predicted(of: dict[str, Any]) -> str:
    """Rank correlations of what was measured with what was recovered (predict.py)."""
    return predict.shown(of["predicted"])


def others(of: dict[str, Any]) -> str:
    """The columns that no teacher teaches, such as the same tasks in another format: every row that has them. No test."""
    found = of["methods"]
    beside = f", minus {found['before']['row']} (95 %)" if found["before"] else ""
    lines = [["", *(f"{d}{beside}" for d in found["others"])]]
    for row, m in {**found["references"], **found["rows"]}.items():
        cells = []
        for d in found["others"]:
            change = m["others"].get(d)
            minus = f", {spread(change['difference'], change['interval'], '+')}; {sides(change)}" if change else ""
            cells.append(percent(m["domains"].get(d, {}).get("mean")) + minus)
        lines.append([row, *cells])
    return table(lines)


def ledgers(of: dict[str, Any]) -> str:
    """What each method spent: TFLOP of one replicate, every seed and the mean over the seeds that are scored."""
    names = {"consolidation": "consolidation alone", "with_teachers": "with the teachers"}
    names |= {"trials": "trials, on no budget", "with_trials": "with teachers and trials"}
    lines = [["method", *(f"{words}: mean, seeds" for words in names.values())]]
    oracle = {"routed oracle": of["methods"]["oracle"]} if of["methods"]["oracle"] else {}
    for row, m in {**of["methods"]["rows"], **oracle}.items():
        cells = []
        for name in names:
            each = [tera(s[name]) for s in m["ledgers"]["seeds"]] if m["ledgers"] else []
            cells.append(f"{tera(m['ledgers']['mean'][name])}: {', '.join(each)}" if each else "–")
        lines.append([row, *cells])
    return table(lines)


def trials(of: dict[str, Any]) -> str:
    """What was picked on the development split, and how every candidate did there."""
    lines = [["method", "stage", "seed", "picked", "development scores, %"]]
    for row, m in of["methods"]["rows"].items():
        for one in m["picks"]:
            scores = ", ".join(f"{label} {percent(dev)}" for label, dev in one["trials"].items())
            picked = one["candidate"] + (f" ({one['end']})" if one["end"] else "")
            lines.append([row, one["stage"], str(one["seed"]), picked, scores])
    return table(lines)


def sides(difference: dict[str, Any]) -> str:
    """``3/3 above: +1.0 to +2.1``: the seeds on the side of the mean, and from the lowest to the highest."""
    reach = methods_show.reach(difference)
    return methods_show.sided(difference) + (f": {reach}" if reach else "")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def spread(value: float | None, interval: Any, sign: str = "") -> str:
    """``61.5 (57.1 to 65.6)``"""
    if value is None or not interval or None in interval:
        return "–" if value is None else f"{100 * value:{sign}.1f}"
    return f"{100 * value:{sign}.1f} ({100 * interval[0]:{sign}.1f} to {100 * interval[1]:{sign}.1f})"


def chance(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"


def tera(flops: float | None) -> str:
    return "–" if flops is None else f"{flops / 1e12:.2f}"


def table(lines: list[list[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


TABLES = {f.__name__: f for f in (accuracy, paired, also, training, methods, others, ledgers, trials, diagnoses, predicted)}


def filled(page: Path) -> str:
    """The page with the tables that its JSON gives."""
    of = json.loads(page.with_suffix(".json").read_text("utf-8"))
    text = page.read_text("utf-8")
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        if name == "end":
            continue
        if name not in TABLES:
            raise UserError(f"{page} wants a table {name!r}{suggest(name, TABLES)}")
        fresh = f"<!-- {name} -->\n\n{TABLES[name](of)}\n\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, fresh=fresh: fresh, text, flags=re.DOTALL)
    return text


def main() -> None:
    asked = argparse.ArgumentParser(description="A study's numbers as JSON, and its page's tables from that JSON.")
    do = asked.add_subparsers(dest="do", required=True)
    collecting = do.add_parser("collect", help="print the JSON of a run")
    for word in ("store", "run", "baseline"):
        collecting.add_argument(word)
    collecting.add_argument("also", nargs="*", metavar="ROW=LESS")
    do.add_parser("write", help="fill a page").add_argument("page", type=Path)
    given = asked.parse_args()
    try:
        if given.do == "collect":
            json.dump(collect(Store(given.store, create=False), given.run, given.baseline, given.also), sys.stdout, indent=1)
        else:
            given.page.write_text(filled(given.page), "utf-8")
    except (UserError, OSError) as error:
        asked.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
