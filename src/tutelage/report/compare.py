"""Two runs, rows of runs, or artifacts side by side, gathered from the store: `collect` is the content of ``compare --json``.

Everything speaks of B against A: differences are B − A, ratios B / A. Stages are matched by name, the two measured stages of
rows and artifacts with each other. Scores are matched by row label and domain, for artifacts by domain, task data and how they
were evaluated; then paired by task id within a seed (across seeds where the two have none in common). Where the task sets
differ nothing is paired, and that is said. An evaluation that both share is told and not tested.

The interval is `stats.resample`'s, so it covers the choice of tasks and not the training seed, and so does the test: McNemar's
for right and wrong at one seed, else random signs by task, seeds summed. Holm's correction is over all tests of a comparison.

Leaves out: drawing (compare_show.py), more than two sides but for methods of one run (`collect_methods`), and runs of several
stores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np

from tutelage.ancestry import gather
from tutelage.explain import classes, differences
from tutelage.index import summaries
from tutelage.report import data, methods, stats
from tutelage.report.measures import Measures
from tutelage.report.read import JSON, Replicate, Run, load, read_scores
from tutelage.spec import UserError, suggest
from tutelage.store import Store

Where = tuple[str, str, int | None]
"""(key, port, step)"""
Label = tuple[str, str, str]
"""(row, domain, how it was evaluated); the last where an artifact's evaluations must be told apart, else empty."""
ALONE = -1
"""Stands for the seed of an artifact, which is compared with every seed of a row and not with the one of its number."""


@dataclass
class Side:
    """One of the two: a run, a row of a run's table, or an artifact."""

    name: str
    kind: str
    """``run`` | ``row`` | ``artifact``"""
    stages: dict[str, dict[int, str]]
    """stage -> seed -> key"""
    records: dict[str, dict[int, JSON]]
    scores: dict[Label, dict[int, Where]]
    head: str = ""
    """The stage that a row or artifact is of; none for a run."""
    row: str = ""
    arguments: JSON = field(default_factory=dict)
    run: Run | None = None
    metas: dict[str, JSON] = field(default_factory=dict)
    """Of every stored stage, by key."""

    def stored(self, stage: str) -> list[JSON]:
        """A stage's artifacts, one a seed."""
        return [self.metas[k] for k in self.stages.get(stage, {}).values() if k in self.metas]


# --- sides ---------------------------------------------------------------------------------------------------------------


def side_of_run(store: Store, name: str) -> Side:
    """A run with all its stages and its whole table. Raises `UserError`."""
    run = load(store, name)
    scores: dict[Label, dict[int, Where]] = {}
    for each in run.replicates:
        for row, by_domain in each.table.rows.items():
            for domain, edge in by_domain.items():
                scores.setdefault((row, domain, ""), {})[each.seed] = (each.keys.get(edge.ref, ""), edge.port, edge.step)
    made = Side(run.name, "run", *_stages(run.replicates), scores, run=run, arguments=run.body.get("arguments") or {})
    return _read(store, made)


def side_of_row(store: Store, name: str, row: str) -> Side:
    """A row of a run's table: the checkpoint it measures, with all it was made from. Raises `UserError`."""
    whole = side_of_run(store, name)
    run = whole.run
    assert run is not None
    need_row(run, row)
    rows = run.table.rows
    source = run.first.source(row)
    assert source is not None
    # a row may measure another stage in each domain
    measures = {d: next((p.ref for p in run.first.parents(edge.ref)), source.ref) for d, edge in rows[row].items()}
    line = set().union(*map(run.first.above, {source.ref, *measures.values()}))
    scores: dict[Label, dict[int, Where]] = {}
    for (its, domain, _), by_seed in whole.scores.items():
        for seed, where in by_seed.items() if its == row else ():
            measured = whole.stages[measures[domain]].get(seed, "")
            scores.setdefault(("", domain, _how(whole.metas.get(where[0]), measured)), {})[seed] = where
    keys, records = {n: whole.stages[n] for n in whole.stages if n in line}, {n: whole.records[n] for n in line}
    return _read(
        store,
        Side(f"{run.name}:{row}", "row", keys, records, scores, head=source.ref, row=row, arguments=whole.arguments, run=run),
    )


def need_row(run: Run, row: str) -> None:
    """Raises `UserError` where the table of a run has no such row."""
    if row not in run.table.rows:
        rows = run.table.rows
        fix = suggest(row, rows) if rows else f"; the run draws no table: compare {run.name} as a whole"
        raise UserError(f"run {run.name!r} has no row {row!r}{fix}")


def side_of_artifact(store: Store, name: str, key: str, port: str) -> Side:
    """An artifact with all it was made from, and the evaluations that read it (its own scores, where it is one)."""
    stages: dict[str, dict[int, str]] = {}
    records: dict[str, dict[int, JSON]] = {}
    for meta in gather(store, store.meta(key)).metas.values():
        label = meta["name"] if meta["name"] not in stages else f"{meta['name']} ({meta['key'][:8]})"
        stages[label], records[label] = {ALONE: meta["key"]}, {ALONE: meta["record"]}
    own = store.meta(key)
    found: dict[Label, tuple[float, Where]] = {}
    for each in summaries(store).values():
        if each.damaged or "scores" not in each.outputs.values() or (each.key != key and key not in each.inputs):
            continue
        meta = store.meta(each.key)
        reads = [i for i in meta["inputs"] if i["key"] == key and i["step"] is None and (not port or i["port"] == port)]
        if each.key != key and not any(own["outputs"].get(i["port"], {}).get("kind") == "model" for i in reads):
            continue
        for its, facts in meta["outputs"].items():
            label = ("", str(facts.get("domain", "")), "" if each.key == key else _how(meta, key))
            if facts["kind"] == "scores" and found.get(label, (-1.0,))[0] < each.finished:
                found[label] = (each.finished, (each.key, its, None))
    scores = {label: {ALONE: where} for label, (_, where) in sorted(found.items())}
    return _read(store, Side(name, "artifact", stages, records, scores, head=own["name"]))


def _how(meta: JSON | None, measured: str) -> str:
    """What makes two evaluations comparable beside the domain: their settings, and what they read beside what they measure."""
    if meta is None:
        return ""
    others = [[i["path"], i["key"], i["port"], i["step"]] for i in meta["inputs"] if i["key"] != measured]
    beside = {"name", "threads", "slots", "seed", *(i["path"] for i in meta["inputs"])}
    return json.dumps([others, {k: v for k, v in meta["record"].items() if k not in beside}], sort_keys=True)


def _stages(replicates: list[Replicate]) -> tuple[dict[str, dict[int, str]], dict[str, dict[int, JSON]]]:
    keys: dict[str, dict[int, str]] = {}
    records: dict[str, dict[int, JSON]] = {}
    for each in replicates:
        for name, rec in each.record.get("stages", {}).items():
            keys.setdefault(name, {})[each.seed] = each.keys.get(name, "")
            records.setdefault(name, {})[each.seed] = rec
    return keys, records


def _seed(at: int) -> int | None:
    return None if at == ALONE else at


def _read(store: Store, side: Side) -> Side:
    wanted = {k for by_seed in side.stages.values() for k in by_seed.values()}
    wanted |= {where[0] for by_seed in side.scores.values() for where in by_seed.values()}
    side.metas = {k: store.meta(k) for k in wanted if k and store.has(k)}
    return side


# --- collect -------------------------------------------------------------------------------------------------------------


def collect(store: Store, a: Side, b: Side) -> JSON:
    """Everything a comparison says, as JSON. Raises `UserError` where a run meets something else.

    Keys: ``a`` and ``b`` (``name``, ``kind``), ``same``, ``arguments``, ``versions``, ``stages``, ``scores``, ``curves``,
    ``cost``, ``methods`` (of two rows that are methods of one run, else None).
    """
    for one, other in ((a, b), (b, a)):
        if one.kind == "run" and other.kind != "run":
            rows = list(one.run.table.rows) if one.run else []
            fix = f"one of its rows, such as {one.name}:{rows[0]}" if rows else "a run on both sides"
            raise UserError(f"{one.name} is a whole run and {other.name} is not; name {fix}")
    pairs = matched(a, b)
    specs, said = stages(a, b, pairs), scores(store, a, b)
    arguments = [c.json for c in differences(a.arguments, b.arguments)] if a.kind == b.kind == "run" else []
    made_by = versions(a, b)
    nothing = not (specs["only_a"] or specs["only_b"] or specs["changed"] or specs["inputs_only"] or arguments or made_by)
    return data.plain(
        {
            **{k: {"name": s.name, "kind": s.kind} for k, s in (("a", a), ("b", b))},
            "same": nothing and not said["rows"] and not said["refused"],
            "arguments": arguments,
            "versions": made_by,
            "stages": specs,
            "scores": said,
            "curves": curves(store, a, b, pairs),
            "cost": cost(a, b, pairs),
            "methods": _two_methods(store, a, b),
        }
    )


def collect_methods(store: Store, run_name: str, rows: tuple[str, ...] = ()) -> JSON:
    """The methods that a run's table names, against its ``after``; or these ``rows``, against the first of them.

    Keys: ``run``, ``recipe``, ``seeds``, ``methods`` (methods.py). Raises `UserError`.
    """
    run = load(store, run_name)
    for row in rows:
        need_row(run, row)
    metas = {k: store.meta(k) for r in run.replicates for k in r.keys.values() if store.has(k)}
    found = methods.collect(run, Measures(store, run), metas, rows, rows[0] if rows else "")
    if not found:
        raise UserError(f"the table of run {run.name!r} names no methods; name a second run, or rows such as {run.name}:ROW")
    head = {"run": run.name, "recipe": run.body.get("recipe"), "seeds": [r.seed for r in run.replicates]}
    return data.plain({**head, "methods": found})


def _two_methods(store: Store, a: Side, b: Side) -> JSON | None:
    """Two rows that are methods of one run, as methods; else None."""
    one, other = a.run, b.run
    if not (one and other and one.name == other.name and a.row != b.row and {a.row, b.row} <= set(one.table.methods)):
        return None
    return collect_methods(store, one.name, (a.row, b.row))["methods"]


def matched(a: Side, b: Side) -> list[tuple[str, str, str]]:
    """(label, stage of A, stage of B): by name, and two heads with each other unless one was made from the other's name."""
    pairs = [(n, n, n) for n in a.stages if n in b.stages]
    return pairs if not a.head or a.head in b.stages or b.head in a.stages else [*pairs, head(a, b)]


def head(a: Side, b: Side) -> tuple[str, str, str]:
    """The two heads as a pair."""
    return a.head if a.head == b.head else f"{a.head} → {b.head}", a.head, b.head


def stages(a: Side, b: Side, pairs: list[tuple[str, str, str]]) -> JSON:
    """Stages only in one, those of both whose fields, versions or code differ, and how many do not."""
    known = classes(*(rec for side in (a, b) for by_seed in side.records.values() for rec in by_seed.values()))
    changed: list[JSON] = []
    inputs_only: list[str] = []
    unchanged = 0
    for label, one, other in pairs:
        seeds = [s for s in a.stages[one] if s in b.stages[other]]
        at = [seeds[0] if seeds else next(iter(side.stages[name])) for side, name in ((a, one), (b, other))]
        keys = [a.stages[one][at[0]], b.stages[other][at[1]]]
        if keys[0] and keys[0] == keys[1] and all(a.stages[one][s] == b.stages[other][s] for s in seeds):
            unchanged += 1
            continue
        old, new = a.records[one][at[0]], b.records[other][at[1]]
        found = [c.json for c in differences(old, new, known)] + beside(
            a.metas.get(keys[0]), b.metas.get(keys[1]), not differences(old, new, known)
        )
        if found:
            changed.append({"stage": label, "kind": new.get("kind"), "changes": found})
        elif not all(keys) or keys[0] == keys[1]:
            unchanged += 1
        else:
            inputs_only.append(label)
    met = [{one for _, one, _ in pairs}, {other for _, _, other in pairs}]
    only = [[n for n in side.stages if n not in mine] for side, mine in zip((a, b), met, strict=True)]
    return {"only_a": only[0], "only_b": only[1], "changed": changed, "inputs_only": inputs_only, "unchanged": unchanged}


KEYED = {"version": "version", "library": "version", "code": "code", "content": "field"}
"""What a mark tells (explain.py) -> what kind of change it is."""


def beside(old: JSON | None, new: JSON | None, alike: bool) -> list[JSON]:
    """What differs between two artifacts beside their records: the version of the stage, what their marks tell; and where
    records (``alike``), inputs and marks are equal and the keys still differ, code that no mark tells of."""
    if not old or not new or old["key"] == new["key"]:
        return []
    ends = []
    for meta in (old, new):
        told = dict(meta.get("marks") or {})
        ends.append({**told, "": {**told.get("", {}), "version": meta.get("version", 1)}})
    found = []
    for path in (p for p in ends[0] if p in ends[1]):
        for name in (n for n in KEYED if n in ends[0][path] and n in ends[1][path]):
            was, now = ends[0][path][name], ends[1][path][name]
            if was != now:
                found.append({"what": KEYED[name], "path": path, "old": was, "new": now})
    inputs = [[(i["path"], i["key"], i["port"], i["step"]) for i in m["inputs"]] for m in (old, new)]
    untold = alike and not found and inputs[0] == inputs[1]
    return [{"what": "code", "path": "", "old": old.get("code"), "new": new.get("code")}] if untold else found


def versions(a: Side, b: Side) -> list[JSON]:
    """Code and libraries that made the one and not the other: ``{what, a, b}`` with every version met."""
    met: list[dict[str, set[str]]] = [{}, {}]
    for found, side in zip(met, (a, b), strict=True):
        for meta in side.metas.values():
            for what, version in {"code": meta.get("code"), **(meta.get("versions") or {})}.items():
                if version:
                    found.setdefault(what, set()).add(str(version))
    both = [w for w in met[0] if w in met[1]]
    return [{"what": w, "a": sorted(met[0][w]), "b": sorted(met[1][w])} for w in both if met[0][w] != met[1][w]]


# --- scores --------------------------------------------------------------------------------------------------------------


def scores(store: Store, a: Side, b: Side) -> JSON:
    """``rows``: what could be paired, with Holm's correction over all; ``refused`` with the reason; ``shared``: how many
    evaluations are the same artifacts; ``unmatched``: labels that only one has, none where nothing at all is measured."""
    loose = "artifact" not in (a.kind, b.kind) or not all(how for s in (a, b) for _, _, how in s.scores)
    ends = [_by_label(side, loose) for side in (a, b)]
    rows: list[JSON] = []
    refused: list[JSON] = []
    shared = 0
    for label in (k for k in ends[0] if k in ends[1]):
        where = {"row": label[0], "domain": label[1]}
        if ends[0][label] == ends[1][label]:
            shared += 1
            continue
        read = [_values(store, end[label]) for end in ends]
        if not all(read):
            refused.append({**where, "why": f"{'B' if read[0] else 'A'} is not measured yet"})
            continue
        found = paired(label[1], *read)
        (refused if "why" in found else rows).append({**where, **found})
    for row, adjusted in zip(rows, stats.holm([r["p"] for r in rows]), strict=True):
        row["p_holm"] = adjusted
    unmatched = [[" / ".join(filter(None, k[:2])) for k in one if k not in other] for one, other in (ends, ends[::-1])]
    return {"rows": rows, "refused": refused, "shared": shared, "unmatched": {"a": unmatched[0], "b": unmatched[1]}}


def _by_label(side: Side, loose: bool) -> dict[Label, dict[int, Where]]:
    """``loose``: how something was evaluated does not matter, only its tasks do."""
    found: dict[Label, dict[int, Where]] = {}
    for (row, domain, how), by_seed in side.scores.items():
        spot = found.setdefault((row, domain, "" if loose else how), {})
        spot.update({seed: where for seed, where in by_seed.items() if seed not in spot})
    return found


def _values(store: Store, by_seed: dict[int, Where]) -> dict[int, dict[str, float]]:
    read = {seed: read_scores(store, *where) for seed, where in by_seed.items()}
    return {seed: found.values for seed, found in read.items() if found is not None and found.values}


def paired(domain: str, a: dict[int, dict[str, float]], b: dict[int, dict[str, float]]) -> JSON:
    """B − A over the seeds both have, or over all of each where they share none; ``{why}`` where the tasks differ.

    Mean over seeds of the difference of means over tasks, its interval, and the p-value of the task-wise differences.
    """
    common = sorted(a.keys() & b.keys())
    seeds = [common, common] if common else [sorted(a), sorted(b)]
    tasks = [[set(side[s]) for s in at] for side, at in zip((a, b), seeds, strict=True)]
    together = zip(*tasks, strict=True) if common else ((tasks[0][0], t) for t in (*tasks[0], *tasks[1]))
    for one, other in together:
        if one != other:
            return {
                "why": f"the tasks differ: {len(one & other)} in both, {len(one - other)} and {len(other - one)} in one only"
            }
    cells = {("a", s): a[s] for s in seeds[0]} | {("b", s): b[s] for s in seeds[1]}
    drawn = stats.resample(domain, cells, {c: c[1] if common else 0 for c in cells})
    means = [stats.mean(drawn[side, s] for s in at) for side, at in zip("ab", seeds, strict=True)]
    gap = means[1] - means[0]
    weight = {"a": -1, "b": 1} if common else {"a": -len(b), "b": len(a)}  # whole, so that right and wrong stay whole
    by_task: dict[str, float] = {}
    for (side, _), values in cells.items():
        for task, value in values.items():
            by_task[task] = by_task.get(task, 0.0) + weight[side] * value
    each = np.array(list(by_task.values()))
    single = len(seeds[0]) == len(seeds[1]) == 1 and {v for c in cells.values() for v in c.values()} <= {0.0, 1.0}
    return {
        "n": len(by_task),
        "a": means[0].point,
        "b": means[1].point,
        "difference": gap.point,
        "interval": gap.interval,
        "better": int((each > 1e-12).sum()),
        "worse": int((each < -1e-12).sum()),
        "test": "McNemar" if single else "sign flip",
        "p": stats.sign_flip(each),
        "seeds": {k: [{"seed": _seed(s), "mean": drawn[k, s].point} for s in at] for k, at in zip("ab", seeds, strict=True)},
    }


# --- curves and cost -----------------------------------------------------------------------------------------------------


def curves(store: Store, a: Side, b: Side, pairs: list[tuple[str, str, str]]) -> list[JSON]:
    """``{stage, metrics: {metric: {a, b}}}`` of the stages that are not the same artifacts: one series a seed. For rows and
    artifacts the heads' alone."""
    found = []
    for label, one, other in [head(a, b)] if a.head else pairs:
        if a.stages[one] == b.stages[other]:
            continue
        ends = [_series(store, side.stages[name]) for side, name in ((a, one), (b, other))]
        metrics = {m: {"a": ends[0][m], "b": ends[1][m]} for m in ends[0] if m in ends[1]}
        if metrics:
            found.append({"stage": label, "metrics": metrics})
    return found


def _series(store: Store, keys: dict[int, str]) -> dict[str, list[JSON]]:
    found: dict[str, list[JSON]] = {}
    first = {key: at for at, key in reversed(keys.items())}  # seeds that share an artifact are one curve
    for at, key in keys.items():
        if not key or first[key] != at:
            continue
        for metric, (steps, values) in data.series(store.metrics(key)).items():
            step, value = data.thin(np.array(steps, float), np.array(values, float))
            entry = {"seed": _seed(at), "step": step.tolist(), "value": [float(f"{v:.5g}") for v in value]}
            found.setdefault(metric, []).append(entry)
    return found


def cost(a: Side, b: Side, pairs: list[tuple[str, str, str]]) -> list[JSON]:
    """``{what, a, b, ratio}``, each ``{flops, seconds, tokens}``; ``ratio`` is B / A, None where A spent nothing.

    Of one replicate (the mean over seeds) by stage that is not the same artifact in both, and by ledger; and of a whole run.
    """
    ends: list[list[tuple[str, JSON]]] = [[], []]
    for label, one, other in [head(a, b)] if a.head else pairs:
        spent = [side.stored(name) for side, name in ((a, one), (b, other)) if a.stages[one] != b.stages[other]]
        if all(spent) and any(m["cost"]["flops"] for metas in spent for m in metas) and not _evaluation(a, one):
            for end, metas in zip(ends, spent, strict=True):
                end.append((label, data.mean_cost(metas)))
    for end, side in zip(ends, (a, b), strict=True):
        end += ledgers(side)
    both = dict(ends[1])
    return [
        {"what": what, "a": mine, "b": both[what], "ratio": ratio(mine, both[what])} for what, mine in ends[0] if what in both
    ]


def _evaluation(side: Side, stage: str) -> bool:
    return any("scores" in [o["kind"] for o in m.get("outputs", {}).values()] for m in side.stored(stage))


def ledgers(side: Side) -> list[tuple[str, JSON]]:
    """The sums of a side: a run's two ledgers and all its artifacts; a head's whole ancestry."""
    by_stage = {n: data.mean_cost(metas) for n in side.stages if (metas := side.stored(n))}
    if side.run is None or side.kind != "run":
        return [("with all it was made from", data.ledger(by_stage, dict.fromkeys(by_stage, 1.0)))]
    names = {"consolidation": "ledger: consolidation alone", "with_teachers": "ledger: with the teachers"}
    found = [(names[n], data.ledger(by_stage, of)) for n, of in data.ledger_stages(side.run, side.metas).items()]
    whole = {m["key"]: data.mean_cost([m]) for n in side.stages for m in side.stored(n)}
    return [*found, ("the whole run, all seeds", data.ledger(whole, dict.fromkeys(whole, 1.0)))]


def ratio(a: JSON, b: JSON) -> JSON:
    kinds = [k for k in a["tokens"] if a["tokens"][k] and k in b["tokens"]]
    return {
        **{k: b[k] / a[k] if a[k] else None for k in ("flops", "seconds")},
        "tokens": {k: b["tokens"][k] / a["tokens"][k] for k in kinds},
    }
