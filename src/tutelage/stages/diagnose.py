"""Diagnose: before a distillation is paid for, what teachers would say of the student's own replies.

The student answers ``prompts`` tasks of every domain, ``group`` times each, and every teacher scores the same replies. At
each token t of a reply y, with π_θ the student, π_T the teacher, and S_k the k likeliest tokens of each:

    nll            −log π_T(y_t)
    entropy        −Σ_v π_θ(v) log π_θ(v)                          of the student; nll is entropy + kl in the mean
    kl             Σ_v π_θ(v) [log π_θ(v) − log π_T(v)]            reverse, exact over the vocabulary
    advantage      log π_T(y_t) − log π_θ(y_t)                     its mean is −kl; ``spread``: its standard deviation
    clipped        |advantage| > 5                                 MOPD's clip (arXiv 2606.30406)
    overlap        |S_k(θ) ∩ S_k(T)| / k                           arXiv 2604.13016
    mass           Σ_{v ∈ S_k(θ) ∩ S_k(T)} π_θ(v)                  likewise; ``teacher_mass``: of π_T
    top1           whether both have the same likeliest token

Everything is at the temperature of the sampling. Means are over tokens; intervals (95 %) are percentiles of a bootstrap
over prompts, since tokens of one reply are no independent witnesses. ``drift`` is the mean over the second halves of the
replies less that over the first halves: both come from the same replies, so it is not told by which replies are long.
Positions are in buckets that double, from 0, 1, 2-3, 4-7, ...; those late in a reply know only of long replies.

A label of ``teachers`` that is a domain's name is measured in that domain alone, any other in all.

Port ``diagnosis``: ``samples.parquet``, a row for each reply and teacher, and ``positions.parquet``, one for each bucket,
domain and teacher. The facts hold the summary with the verdicts (verdict.py).

Leaves out: teachers with another tokenizer or template (the plan refuses them), prompts other than the tasks', and any
correction where top-p or top-k cut what was drawn.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tutelage.envs.base import Ask, Env
from tutelage.graph import At, DataType, Kind, ModelType, Stage, Type
from tutelage.rollout.base import Sampling
from tutelage.spec import SpecError, UserError
from tutelage.stages.evaluate import need_domain, need_model, tokens_guess
from tutelage.stages.verdict import judge
from tutelage.text.template import Chat, Template
from tutelage.types import Sample, Score, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

NUMBERS = ("nll", "entropy", "kl", "advantage", "clipped", "overlap", "mass", "teacher_mass", "top1")
"""Means that are reported; columns of `compare`."""
SQUARE = len(NUMBERS)
"""The column of advantage², from which the spread is told."""
COUNT = SQUARE + 1
"""The column of ones: sums become means through it."""
CLIP = 5.0
DRAWS = 2000
ENDS = {"": "mean", "_low": "low", "_high": "high"}
PLACE = {"first": "int64", "last": "int64", "prompts": "int64", "tokens": "int64"}
SAMPLE = {
    **dict.fromkeys(("teacher", "domain", "task"), "string"),
    **{"replica": "int64", "tokens": "int64", "reward": "float64", "stop": "string", "reply": "string"},
}
POSITION = {"teacher": "string", "domain": "string", **PLACE}


class Diagnose(Stage):
    """Measures teachers on the student's own replies; see the module's docstring."""

    outputs: ClassVar[dict[str, Kind]] = {"diagnosis": "data"}
    verb: ClassVar[str] = "measures"
    on_device: ClassVar[bool] = True
    version: ClassVar[int] = 5

    model: At
    """The student."""
    teachers: dict[str, At] = Field(min_length=1)
    """label, or the domain it teaches -> a teacher"""
    tasks: At
    domains: tuple[str, ...] = Field(min_length=1)
    env: Env | None = None
    """Scores the replies, for the column ``reward``; None only draws them."""
    prompts: int = Field(64, ge=2)
    """tasks a domain: the first, in the dataset's order"""
    group: int = Field(1, ge=1)
    """replies a task"""
    k: int = Field(16, ge=1)
    """likeliest tokens of each, for overlap and mass; at most the vocabulary"""
    template: Template = Chat()
    sampling: Sampling = Sampling()
    """As in the training that the diagnosis is for."""
    seed: int = Field(0, ge=0)
    slots: int = Field(256, ge=1, json_schema_extra={"unkeyed": True})

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        student = need_model(types, self.model)
        if len(set(self.domains)) < len(self.domains):
            raise SpecError(f"domains names one twice: {', '.join(self.domains)}")
        for domain in self.domains:
            need_domain(types, self.tasks, domain)
            if not any(domain in self.asked(label) for label in self.teachers):
                raise SpecError(f"domain {domain!r} has no teacher; give it one, or leave it out of domains")
        for label, at in self.teachers.items():
            for what, mine, theirs in apart(student, need_model(types, at)):
                raise SpecError(
                    f"the teacher {label!r}, {at.of.name!r}, has another {what} ({theirs[:8]}) than the student "
                    f"({mine[:8]}): both must see the same ids; give both the same tokenizer and template"
                )
        return {"diagnosis": DataType(tuple(SAMPLE), self.domains)}

    def asked(self, label: str) -> tuple[str, ...]:
        """The domains that a teacher is measured in."""
        return (label,) if label in self.domains else self.domains

    def estimate(self, types: Callable[[At], Type]) -> float:
        each = tokens_guess(self.prompts * self.group, self.sampling)
        own = 4.0 * need_model(types, self.model).params * len(self.domains)
        return each * (own + sum(2.0 * need_model(types, at).params * len(self.asked(n)) for n, at in self.teachers.items()))

    def run(self, ctx: Any) -> None:
        Measuring(self, ctx).run()


def apart(student: ModelType, teacher: ModelType) -> list[tuple[str, str, str]]:
    """(what, the student's digest, the teacher's) of what must be equal and is not: tokenizer, chat template."""
    pairs = (
        ("tokenizer", student.tokenizer_key, teacher.tokenizer_key),
        ("chat template", student.template_key, teacher.template_key),
    )
    return [pair for pair in pairs if pair[1] != pair[2]]


async def unscored(task: Task, ask: Ask) -> Score:
    """Asks once and does not judge: the environment of a stage that has none."""
    await ask(task.messages)
    return Score(0.0)


@dataclass
class Found:
    """What is known of one teacher so far: a row and a block of sums for each reply."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)
    """[2 + B, COUNT + 1] each: first half of the reply, second half, and the B buckets of positions"""


class Measuring:
    """The state of one running `Diagnose`."""

    def __init__(self, stage: Diagnose, ctx: Any):
        from tutelage.learn.learner import Learner, Scorers
        from tutelage.model.head import Head
        from tutelage.rollout.policy import Policy

        self.stage, self.ctx = stage, ctx
        self.policy = Policy(ctx.input(stage.model), stage.slots, device=ctx.device)
        self.vocab = len(self.policy.tokenizer)
        self.student, self.head = Learner(self.policy.model, vocab=self.vocab), Head.of(self.policy.model, self.vocab)
        scorers = Scorers(self.vocab, device=ctx.device)
        self.teachers = {label: scorers.of(ctx.input(at), at.of.name) for label, at in stage.teachers.items()}
        env: Any = stage.env or unscored
        self.driver = self.policy.driver(stage.template, env, stage.sampling)
        self.k = min(stage.k, self.head.vocab)
        self.found = {label: Found() for label in stage.teachers}

    def run(self) -> None:
        stage, ctx = self.stage, self.ctx
        tasks = self._tasks()
        done, folder = ctx.resume()
        if folder:
            self.found = load(folder)
        part = max(1, 2 * stage.slots // stage.group)
        while done < len(tasks):
            asked = tasks[done : done + part]
            self._measure(self.driver.collect(asked, stage.group, stage.seed))
            done += len(asked)
            kl = {label: total(found.sums) for label, found in self.found.items() if found.sums}
            ctx.log(done, **{f"kl/{label}": float(sums[NUMBERS.index("kl")] / sums[COUNT]) for label, sums in kl.items()})
            ctx.progress(done, len(tasks))
            ctx.boundary(done, lambda to: save(self.found, to))
        self._publish()

    def _tasks(self) -> list[Task]:
        """The tasks asked, domain by domain. Raises `UserError` for a domain that has none."""
        from tutelage.text.rows import read_tasks

        pool, found = read_tasks(self.ctx.input(self.stage.tasks)), []
        for domain in self.stage.domains:
            mine = [task for task in pool if task.domain == domain][: self.stage.prompts]
            if len(mine) < 2:
                at, count = self.stage.tasks, len(mine) or "no"
                raise UserError(
                    f"{at.of.name}.{at.port} holds {count} task of domain {domain!r}; an interval over prompts needs 2 or more"
                )
            found += mine
        return found

    def _measure(self, drawn: Sequence[Sample]) -> None:
        """Adds what every teacher says of these replies."""
        import numpy as np

        drawn = [sample for sample in drawn if sample.mask.any()]
        temperature, longest = self.driver.sampling.scored_at, self.stage.sampling.max_new_tokens
        self.policy.charge(self.ctx.cost)
        own = self.student.score(drawn, temperature, "hidden")
        self.ctx.cost.spend("scored", sum(len(s.tokens) for s in drawn), self.policy.params)
        replicas = places(drawn)
        for label, teacher in self.teachers.items():
            mine = [i for i, sample in enumerate(drawn) if sample.domain in self.stage.asked(label)]
            if not mine:
                continue
            theirs = teacher.score([drawn[i] for i in mine], temperature, "hidden")
            ours, targets = ([own[i].values for i in mine], [drawn[i].tokens[drawn[i].mask] for i in mine])
            hidden = np.concatenate(ours), np.concatenate([signal.values for signal in theirs])
            values = compare(*hidden, (self.head, teacher.head), np.concatenate(targets), temperature, self.k)
            ends = np.cumsum([len(each) for each in targets])[:-1]
            for i, each in zip(mine, np.split(values, ends), strict=True):
                self.found[label].rows.append(self._row(drawn[i], replicas[i]))
                self.found[label].sums.append(summed(each, longest))
            self.ctx.cost.spend("scored", teacher.scored, teacher.params)
            teacher.scored = 0

    def _row(self, sample: Sample, replica: int) -> dict[str, Any]:
        assert sample.task is not None
        sound = self.stage.env is not None and not (sample.score and sample.score.error)
        facts = {"domain": sample.domain, "task": sample.task.id, "replica": replica, "tokens": int(sample.mask.sum())}
        return {**facts, "reward": sample.scalars["reward"] if sound else None, "stop": sample.stop, "reply": sample.text}

    def _publish(self) -> None:
        stage, ctx = self.stage, self.ctx
        made = []
        for label, found in self.found.items():
            for domain in stage.asked(label):
                made.append({"teacher": label, **summary(found, domain, self.k, self.head.vocab)})
        facts = {"k": self.k, "vocab": self.head.vocab, "temperature": self.driver.sampling.scored_at, "group": stage.group}
        ctx.facts["diagnosis"] = {**facts, "teachers": made}
        for each in made:
            print(f"{each['teacher']} on {each['domain']}: {each['verdict']['words']}")
        write(ctx.output("diagnosis"), self.found, made)


# --- at one token --------------------------------------------------------------------------------------------------------


def compare(
    ours: np.ndarray, theirs: np.ndarray, heads: tuple[Any, Any], targets: np.ndarray, temperature: float, k: int
) -> np.ndarray:
    """float64 [M, COUNT + 1]: `NUMBERS`, advantage² and 1 at each token, from the last hidden states of student [M, D] and
    teacher [M, D'], their output heads and the tokens int [M]. Chunked over rows: [M, V] never exists."""
    import torch

    from tutelage.learn.output import CHUNK

    rows = max(1, CHUNK // heads[0].vocab)
    chunks = zip(*(torch.from_numpy(each).split(rows) for each in (ours, theirs, targets)), strict=True)
    device = heads[0].weight.device
    with torch.inference_mode():
        made = []
        for chunk in chunks:
            mine, other, token = (each.to(device) for each in chunk)
            student, teacher = ((head(h) / temperature).log_softmax(-1) for head, h in zip(heads, (mine, other), strict=True))
            made.append(compared(student, teacher, token, k))
    return torch.cat(made).numpy()


def compared(student: torch.Tensor, teacher: torch.Tensor, token: torch.Tensor, k: int) -> torch.Tensor:
    """`compare` of log-probs [m, V] and the tokens drawn, int [m]."""
    import torch

    p, q = student.exp(), teacher.exp()
    shared = likeliest(student, k) & likeliest(teacher, k)
    wide = lambda x: x.cpu().double()  # noqa: E731  # some devices know no fp64
    mine, theirs = (wide(logp.gather(1, token[:, None])[:, 0]) for logp in (student, teacher))
    gap = theirs - mine
    columns = {
        "nll": -theirs,
        "entropy": -(p * student).sum(-1),
        "kl": (p * (student - teacher)).sum(-1),
        "advantage": gap,
        "clipped": gap.abs() > CLIP,
        "overlap": shared.sum(-1) / k,
        "mass": (p * shared).sum(-1),
        "teacher_mass": (q * shared).sum(-1),
        "top1": student.argmax(-1) == teacher.argmax(-1),
    }
    return torch.stack([*(wide(columns[name]) for name in NUMBERS), gap.square(), torch.ones_like(gap)], 1)


def likeliest(logp: torch.Tensor, k: int) -> torch.Tensor:
    """bool [m, V]: the k likeliest tokens of each row."""
    import torch

    return torch.zeros_like(logp, dtype=torch.bool).scatter_(1, logp.topk(k, -1).indices, True)


# --- over tokens ---------------------------------------------------------------------------------------------------------


def places(samples: Sequence[Sample]) -> list[int]:
    """The how-manieth reply of its group each sample is, from 0."""
    seen = Counter[str]()
    found = []
    for sample in samples:
        found.append(seen[sample.group])
        seen[sample.group] += 1
    return found


def summed(values: np.ndarray, longest: int) -> np.ndarray:
    """[2 + B, COUNT + 1]: sums of a reply's tokens [n, COUNT + 1] by half (the middle token is of the first) and by bucket
    of position (0, 1, 2-3, 4-7, ...); ``longest``: tokens that a reply may have."""
    import numpy as np

    half, n = (len(values) + 1) // 2, len(values)
    made = np.zeros((3 + (longest - 1).bit_length(), values.shape[1]))
    made[0], made[1] = values[:half].sum(0), values[half:].sum(0)
    np.add.at(made, [2 + position.bit_length() for position in range(n)], values)
    return made


def total(sums: Sequence[np.ndarray]) -> np.ndarray:
    """[COUNT + 1]: over all tokens of these replies."""
    import numpy as np

    return np.sum([each[:2].sum(0) for each in sums], 0)


# --- over prompts --------------------------------------------------------------------------------------------------------


def summary(found: Found, domain: str, k: int, vocab: int) -> dict[str, Any]:
    """What is known of a teacher in a domain: ``numbers``, ``drift``, ``positions``, ``verdict`` and counts."""
    import numpy as np

    mine = [i for i, row in enumerate(found.rows) if row["domain"] == domain]
    rows = [found.rows[i] for i in mine]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    spot = {task: i for i, task in enumerate(tasks)}
    sums = np.zeros((len(tasks), *found.sums[mine[0]].shape))  # [prompts, 2 + B, COUNT + 1]
    for row, i in zip(rows, mine, strict=True):
        sums[spot[row["task"]]] += found.sums[i]
    weights = draws(domain, len(tasks))
    halves = [means(sums[:, half], weights) for half in (0, 1)]
    whole = means(sums[:, :2].sum(1), weights)
    numbers = named(whole)
    numbers["spread"] = interval(np.sqrt(np.maximum(whole[:, SQUARE] - whole[:, NUMBERS.index("advantage")] ** 2, 0)))
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    tokens = [row["tokens"] for row in rows]
    return {
        "domain": domain,
        "prompts": len(tasks),
        "replies": len(rows),
        "tokens": sum(tokens),
        "length": sum(tokens) / len(rows),
        "reward": sum(rewards) / len(rewards) if rewards else None,
        "numbers": numbers,
        "drift": named(halves[1] - halves[0]),
        "positions": [at for at in _positions(sums[:, 2:], weights) if at["tokens"]],
        "verdict": judge(numbers, k, vocab).as_json(),
    }


def _positions(sums: np.ndarray, weights: np.ndarray) -> Iterator[dict[str, Any]]:
    """A row for each bucket, from [prompts, B, COUNT + 1]."""
    for b in range(sums.shape[1]):
        counts = sums[:, b, COUNT]
        place = {"first": 2**b // 2, "last": 2**b - 1, "prompts": int((counts > 0).sum()), "tokens": int(counts.sum())}
        yield {**place, **named(means(sums[:, b], weights))}


def draws(domain: str, prompts: int) -> np.ndarray:
    """[1 + DRAWS, prompts]: how often each prompt counts: once in row 0, which is what was seen, and as often as it is drawn
    with replacement in the others. The same for all teachers of a domain."""
    import numpy as np

    rng = np.random.default_rng(zlib.crc32(domain.encode()))
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), DRAWS)
    return np.concatenate([np.ones((1, prompts)), drawn])


def means(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[1 + DRAWS, COUNT + 1]: means over tokens of [prompts, COUNT + 1], in what was seen and in each draw; nan where a draw
    has no token."""
    import numpy as np

    drawn = weights @ sums
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(drawn / drawn[:, COUNT:])


def named(drawn: np.ndarray) -> dict[str, dict[str, Any]]:
    return {name: interval(drawn[:, i]) for i, name in enumerate(NUMBERS)}


def interval(drawn: np.ndarray) -> dict[str, Any]:
    """The mean seen and the 2.5th and 97.5th percentile of the draws; None where there is none."""
    import numpy as np

    if not np.isfinite(drawn[0]):
        return {"mean": None, "low": None, "high": None}
    low, high = np.quantile(drawn[1:][np.isfinite(drawn[1:])], (0.025, 0.975))
    return {"mean": float(drawn[0]), "low": float(low), "high": float(high)}


# --- on disk -------------------------------------------------------------------------------------------------------------


def write(folder: Path, found: Mapping[str, Found], made: Sequence[dict[str, Any]]) -> None:
    """``samples.parquet`` and ``positions.parquet``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = []
    for label, each in found.items():
        for row, sums in zip(each.rows, each.sums, strict=True):
            mean = total([sums]) / row["tokens"]
            samples.append({"teacher": label, **row, **{name: float(mean[i]) for i, name in enumerate(NUMBERS)}})
    positions = []
    for one in made:
        for at in one["positions"]:
            flat = {f"{name}{end}": at[name][key] for name in NUMBERS for end, key in ENDS.items()}
            positions.append({"teacher": one["teacher"], "domain": one["domain"], **{c: at[c] for c in PLACE}, **flat})
    numbers = dict.fromkeys(NUMBERS, "float64")
    spread = dict.fromkeys((f"{name}{end}" for name in NUMBERS for end in ENDS), "float64")
    for name, rows, columns in (("samples", samples, {**SAMPLE, **numbers}), ("positions", positions, {**POSITION, **spread})):
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items()))), folder / f"{name}.parquet")


def save(found: Mapping[str, Found], folder: Path) -> None:
    """A checkpoint of what is known so far."""
    import json

    import numpy as np

    (folder / "rows.json").write_text(json.dumps({label: each.rows for label, each in found.items()}), "utf-8")
    for i, each in enumerate(found.values()):
        np.save(folder / f"sums-{i}.npy", np.array(each.sums))


def load(folder: Path) -> dict[str, Found]:
    """`save`, read."""
    import json

    import numpy as np

    rows = json.loads((folder / "rows.json").read_text("utf-8"))
    return {label: Found(rows[label], list(np.load(folder / f"sums-{i}.npy"))) for i, label in enumerate(rows)}
