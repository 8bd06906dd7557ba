"""TeacherScores: what a teacher thinks of stored replies, token by token: its k likeliest and the mass that they miss.

The off-policy half of distillation. Rows with ``prompt`` and ``completion`` (or documents) come back as they were, with
``signals.parquet`` beside them (text/signals.py): ``teacher_topk`` and ``teacher_topk_logp`` at every trained token, at
temperature 1. `Fit` learns from them with a top-k loss, ``TailForwardKL()`` being the usual one; with `NLL` on a teacher's own
replies (traces.py) it is sequence distillation (Kim and Rush, arXiv 1606.07947). The teacher is asked once, however many
students and epochs follow; a position costs 8·k + 4 bytes before compression.

Leaves out: a temperature of distillation, several teachers, the probabilities of the mass that is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from tutelage.graph import At, DataType, Kind, Stage, Type
from tutelage.losses.top_k import TopKReverseKL
from tutelage.spec import SpecError
from tutelage.stages.evaluate import TEACHING, need_model
from tutelage.stages.fit import TOKENS_GUESS, examples, need_examples
from tutelage.text.template import Chat, Template
from tutelage.types import Sample

PART = 512
"""Rows scored between two checkpoints."""
NAMES = ("teacher_topk", "teacher_topk_logp")


class TeacherScores(Stage):
    """Writes the data back with a teacher's top-k at every trained token; see the module's docstring."""

    outputs: ClassVar[dict[str, Kind]] = {"data": "data"}
    verb: ClassVar[str] = "scores"
    on_device: ClassVar[bool] = True
    version: ClassVar[int] = 3

    teacher: At
    data: At
    template: Template = Chat()
    """Of the training that the signals are for."""
    k: int = Field(64, ge=1)
    """tokens kept at each position"""

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        model = need_model(types, self.teacher, TEACHING)
        data = need_examples(types, self.data, self.template, TopKReverseKL())
        if self.k >= model.vocab:
            raise SpecError(f"k is {self.k}, but the vocabulary has {model.vocab} tokens; give a smaller k")
        signals = tuple(dict.fromkeys((*data.signals, *NAMES)))
        return {"data": replace(data, signals=signals, tokenizer_key=model.tokenizer_key)}

    def estimate(self, types: Callable[[At], Type]) -> float:
        data = types(self.data)
        rows = data.rows if isinstance(data, DataType) else 0
        return 2.0 * need_model(types, self.teacher, TEACHING).params * rows * TOKENS_GUESS

    def run(self, ctx: Any) -> None:
        from tutelage.learn.learner import Scorers
        from tutelage.model.folder import load_tokenizer
        from tutelage.text.rows import read_rows, write_tasks
        from tutelage.text.signals import read_signals, write_signals

        tokenizer = load_tokenizer(ctx.input(self.teacher))
        samples = examples(ctx, self.data, self.template, tokenizer)
        teacher = Scorers(len(tokenizer), device=ctx.device).of(ctx.input(self.teacher), self.teacher.of.name)
        done, folder = ctx.resume()
        if folder:
            read_signals(folder, samples[:done], NAMES)
        while done < len(samples):
            part = samples[done : done + PART]
            self._score(teacher, part)
            done += len(part)
            ctx.cost.spend("scored", sum(len(s.tokens) for s in part), teacher.params)
            ctx.log(done, teacher_mass=_mass(part))
            ctx.progress(done, len(samples))
            ctx.boundary(done, self._saver(samples[:done]))
        folder = ctx.output("data")
        write_tasks(folder, read_rows(ctx.input(self.data)))
        write_signals(folder, samples, NAMES)

    def _score(self, teacher: Any, samples: Sequence[Sample]) -> None:
        for sample, pair in zip(samples, teacher.topk(samples, 1.0, self.k), strict=True):
            sample.signals |= dict(zip(NAMES, pair, strict=True))

    def _saver(self, samples: Sequence[Sample]) -> Callable[[Path], None]:
        from tutelage.text.signals import write_signals

        return lambda folder: write_signals(folder, samples, NAMES)


def _mass(samples: Sequence[Sample]) -> float:
    """The mean over tokens of the mass inside the top-k."""
    import numpy as np

    return float(-np.expm1(np.concatenate([s.signals["teacher_topk_logp"].values[:, -1] for s in samples])).mean())
