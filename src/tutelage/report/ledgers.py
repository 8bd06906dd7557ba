"""Ledgers: which stages rows of the table are charged for, read from the graph of one replicate.

``with_teachers``: everything a row's checkpoint needs that the checkpoint before does not. ``consolidation``: the same
without its teachers and what only they need. ``trials``: what was made to choose and not chosen, and what the
choosing cost. Where a stage picks one of several candidates (edges ``candidates.LABEL``, the pick among its facts), only
the picked one's branch is needed; a branch may be picked at one seed and lost at another. What bounds compute (budgets) or
chooses a checkpoint (selection) is not needed.

Leaves out: what a `Fit` or `Online` spends on development tasks inside itself, which no artifact tells in FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from tutelage.ancestry import CANDIDATES, CHOICE
from tutelage.report.read import JSON, Edge, Replicate

Facts = Callable[[str], JSON | None]
"""The facts of a stage's artifact; None where it is not stored."""


@dataclass(frozen=True)
class Parts:
    """Stages that rows are charged for, by ledger."""

    with_teachers: set[str]
    consolidation: set[str]
    trials: set[str]
    """Losing branches beyond what the picked ones share."""
    picks: dict[str, str]
    """stage that picks -> the label it picked; of those on the way that was picked"""
    pickers: set[str] = field(default_factory=set)
    """Every stage that picks, those of losing branches too: their facts hold ``development_flops``."""
    undecided: set[str] = field(default_factory=set)
    """Stages that have not picked yet: what lies before them is not known to be needed."""


def parts(each: Replicate, rows: Collection[str], facts: Facts) -> Parts | None:
    """What rows are charged for together at one seed; None where one measures no checkpoint that the run makes."""
    sources, start = [each.source(row) for row in rows], each.source(each.table.before)
    found = [s.ref for s in sources if s is not None and s.ref not in each.evaluations]
    if not found or len(found) < len(sources):
        return None
    one = each.one_name
    old = {one.get(n, n) for n in each.above(start.ref)} if start else set()
    taught_by = {t for row in rows for t in each.table.teachers_of(row).values()}
    teachers = {one.get(s.ref, s.ref) for s in map(each.source, taught_by) if s}
    needed = reach(each, found, facts) - old
    tried = reach(each, found, facts, losers=True) - old
    alone = reach(each, found, facts, until=teachers) - old
    picks = {n: picked(each, n, facts) for n in needed if candidates(each, n)}
    return Parts(
        with_teachers=needed,
        consolidation=alone,
        trials=tried - needed,
        picks={n: label for n, label in picks.items() if label},
        pickers={n for n in tried if candidates(each, n)},
        undecided={n for n, label in picks.items() if not label},
    )


def facts_of(each: Replicate, metas: dict[str, JSON]) -> Facts:
    """The facts of a replicate's stages, by name; None where they are not stored."""
    return lambda name: (metas[each.keys[name]].get("facts") or {}) if each.keys.get(name) in metas else None


def candidates(each: Replicate, stage: str) -> dict[str, Edge]:
    """label -> what a stage may pick."""
    return {e.path.removeprefix(CANDIDATES): e for e in each.edges.get(stage, ()) if e.path.startswith(CANDIDATES)}


def picked(each: Replicate, stage: str, facts: Facts) -> str:
    """The label a stage picked; empty where it has not."""
    found = ((facts(stage) or {}).get("selected") or {}).get("candidate")
    return found if found in candidates(each, stage) else ""


def reach(each: Replicate, stages: list[str], facts: Facts, losers: bool = False, until: Iterable[str] = ()) -> set[str]:
    """Stages and what they need, without those of ``until`` and what is needed through them alone; equal ones by one name."""
    barred, done, stack = set(until), set[str](), [*stages]
    while stack:
        at = stack.pop()
        at = each.one_name.get(at, at)
        if at in done or at in barred:
            continue
        done.add(at)
        choice, label = candidates(each, at), picked(each, at, facts)
        for edge in each.edges.get(at, ()):
            if edge.path.startswith(CANDIDATES):
                wanted = losers or edge == choice.get(label)
            else:
                wanted = edge.role != "budget" and not CHOICE.search(edge.path)
            if wanted:
                stack.append(edge.ref)
    return done
