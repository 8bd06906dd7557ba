"""How cost grows, as plots: rollouts with batch and with length, an update with the number of teachers, plans with that of
stages.

Teachers are whole models, or LoRA adapters on one base; their memory is that of the tensors they hold, each counted once,
so that it is exact. All teachers are asked for their share of one batch, whose size does not change. The plots have no
peer and no target.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from bench.harness import Record, Run

NAMES: tuple[str, ...] = ()
Curve = list[dict[str, Any]]


def timed(call: Any, rounds: int) -> float:
    """The median of some calls, after one unseen."""
    call()
    found = []
    for _ in range(rounds):
        began = perf_counter()
        call()
        found.append(perf_counter() - began)
    return statistics.median(found)


def rollouts(run: Run, shape: str) -> dict[str, Curve]:
    from bench.models import model, tokenizer
    from bench.rollout import draw, load
    from tutelage.rollout.local import LocalEngine

    ours, found = model(shape), {}
    batches, longest = ((1, 4), (8, 16)) if run.quick else ((1, 2, 4, 8, 16, 32, 64, 128), (16, 32, 64, 128, 256, 512))
    cases = {
        "rollout against batch": [(b, load(shape, [32] * b, b)) for b in batches],
        "rollout against length": [(n, load(shape, [n] * 16, 16)) for n in longest],
    }
    for name, works in cases.items():
        curve: Curve = []
        for x, work in works:
            engine = LocalEngine(ours, tokenizer(shape), work.slots, run.dtype)
            seconds = timed(lambda engine=engine, work=work: draw(engine, work), run.rounds)  # type: ignore[misc]
            curve.append({"x": x, "tokens a second": sum(work.replies) / seconds})
        found[name] = curve
    return found


def bytes_of(models: list[Any]) -> float:
    """MiB of all parameters, each tensor once."""
    tensors = {p.data_ptr(): p.numel() * p.element_size() for m in models for p in m.parameters()}
    return sum(tensors.values()) / 2**20


def teachers(run: Run, shape: str) -> dict[str, Curve]:
    from bench.distill import Ours
    from bench.models import learner, lengths, model, samples
    from tutelage.learn.learner import ModelScorer
    from tutelage.model.adapter import new_adapter

    found: dict[str, Curve] = {"teachers, whole": [], "teachers, LoRA on one base": []}
    for n in (1, 2) if run.quick else (1, 2, 4, 8, 16):
        domains = tuple(f"d{i}" for i in range(n))
        rows = samples(shape, lengths(64), domains=domains)
        whole = [model(shape, seed=i + 1) for i in range(n)]
        named = {d: ModelScorer(d, m) for d, m in zip(domains, whole, strict=True)}
        mine = Ours(learner(model(shape), run.dtype), named, rows)
        found["teachers, whole"].append({"x": n, "seconds a step": timed(mine.step, run.rounds), "MiB": bytes_of(whole)})
        base = model(shape, seed=1)
        for domain in domains:
            new_adapter(base, domain, 16, 32, (), 0)
        adapted = {d: ModelScorer(d, base, adapters=[d]) for d in domains}
        light = Ours(learner(model(shape), run.dtype), adapted, rows)
        found["teachers, LoRA on one base"].append(
            {"x": n, "seconds a step": timed(light.step, run.rounds), "MiB": bytes_of([base])}
        )
    return found


def stages(run: Run) -> dict[str, Curve]:
    """A chain of SFT stages: planning it, and listing a store that holds as many."""
    from bench.store import fill
    from tutelage.graph import Goals, plan
    from tutelage.index import summaries
    from tutelage.stages.files import Files
    from tutelage.stages.fit import Fit
    from tutelage.stages.model import NewModel
    from tutelage.store import Store

    curve: Curve = []
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        for n in (3, 10) if run.quick else (10, 100, 1000):

            def planned(n: int = n) -> None:
                data, at = Files(name="data", path=str(rows)).out(), NewModel(name="init", alphabet="ab").out()
                for i in range(n):
                    at = Fit(name=f"fit-{i}", model=at, data=data).out()
                plan([Goals(recipe="chain", stages=(at,))], has=lambda key: False)

            store = Store(Path(place) / f"store-{n}")
            fill(store, n, 1)
            first = perf_counter()
            summaries(store)
            first = perf_counter() - first
            listed = timed(lambda store=store: summaries(store), run.rounds)  # type: ignore[misc]
            planning = timed(planned, run.rounds)
            curve.append({"x": n, "plan s": planning, "store, no index s": first, "store, index s": listed})
    return {"plan and store against stages": curve}


def picture(name: str) -> str:
    """The file of a plot."""
    return f"{name.replace(',', '').replace(' ', '-')}.svg"


def draw_plots(curves: dict[str, Curve], folder: Path) -> None:
    """One picture a quantity."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    for name, curve in curves.items():
        quantities = [k for k in curve[0] if k != "x"]
        figure, axes = pyplot.subplots(1, len(quantities), figsize=(4 * len(quantities), 3), squeeze=False)
        for axis, quantity in zip(axes[0], quantities, strict=True):
            axis.plot([p["x"] for p in curve], [p[quantity] for p in curve], marker="o")
            axis.set(xscale="log", yscale="log", xlabel=name.rpartition("against ")[2] or name, ylabel=quantity)
        figure.suptitle(name)
        figure.tight_layout()
        figure.savefig(folder / picture(name), metadata={"Date": None})
        pyplot.close(figure)


def bench(run: Run) -> list[Record]:
    shape = "mini" if run.quick else "tiny"
    curves = {**rollouts(run, shape), **teachers(run, shape), **stages(run)}
    draw_plots(curves, run.folder)
    run.details.update(curves)
    return []
