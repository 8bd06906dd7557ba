"""One learner for every loss: forward and backward, global normalisation, clipping, optimizer, log-probs.

Batches lie packed; a model that cannot take them so gets its rows padded (model/padded.py), which no loss can see.

The next-token shift happens here and nowhere else: the hidden state at position ``t - 1`` speaks of token ``t``.
Losses return sums; they are divided by counts of the *global* batch, so micro-batches cannot change a result.

Leaves out: sharding, a load-balancing loss of mixtures of experts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tutelage.learn.batch import collate, counts, pack, split
from tutelage.learn.heap import settle_heap
from tutelage.learn.optim import AdamW, Muon
from tutelage.learn.output import PackedOutput
from tutelage.learn.remote import FILE as REMOTE
from tutelage.learn.remote import Remote, RemoteScorer
from tutelage.losses.base import Loss
from tutelage.model.adapter import Base, activate, is_adapter, load_adapter, load_weights, weights
from tutelage.model.folder import load_model, matmul_params, on_cpu
from tutelage.model.head import Head
from tutelage.model.padded import is_packed, row_states
from tutelage.spec import UserError
from tutelage.types import Batch, Sample, Signal

HOPELESS = 10
"""Updates in a row without a finite gradient after which a stage gives up."""


class Learner:
    """Holds a model and its optimizer. ``micro_tokens`` bounds one forward, ``clip`` the global gradient norm;
    ``vocab`` is the tokenizer's size, to which padded output rows are cut (None: not padded)."""

    def __init__(
        self,
        model: Any,
        optimizer: AdamW | Muon | None = None,
        clip: float = 1.0,
        micro_tokens: int = 16384,
        dtype: str = "float32",
        vocab: int | None = None,
    ):
        settle_heap()
        self.model, self.clip, self.micro_tokens, self.vocab = model, clip, micro_tokens, vocab
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        self.optimizers = optimizer.build(model) if optimizer else []
        self.skips = 0
        self._peaks = [[g["lr"] for g in o.param_groups] for o in self.optimizers]

    # --- forward ---

    def output(self, batch: Batch, temperature: float = 1.0) -> Any:
        """What losses read, of a batch of torch tensors: a `PackedOutput`."""
        hidden = self.hidden(batch)
        return PackedOutput(hidden, Head.of(self.model, self.vocab), batch.tokens[batch.index], temperature)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """[M, D], the last hidden states that the trained tokens are predicted from. Rows with one prompt share its forward."""
        rows = pack(batch, share=is_packed(self.model))
        with self.autocast:
            states = row_states(self.model, rows.tokens, rows.pos, rows.lengths, rows.after)
        return states.index_select(0, rows.index)

    def parts(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Micro-batches: `split`, by what a forward of this model takes."""
        return split(samples, self.micro_tokens, padded=not is_packed(self.model))

    def batch(self, samples: Sequence[Sample], needs: Sequence[str] = (), extras: dict[str, Any] | None = None) -> Batch:
        """`collate`, as tensors on the model's device."""
        batch = collate(samples, needs, extras)
        to = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(self.model.device)  # noqa: E731
        for name in ("tokens", "row", "pos", "index", "trow", "pair"):
            setattr(batch, name, to(getattr(batch, name)))
        batch.signals = {k: to(v) for k, v in batch.signals.items()}
        return batch

    # --- learning ---

    def forward_backward(
        self,
        samples: Sequence[Sample],
        loss: Loss,
        temperature: float = 1.0,
        extras: dict[str, Any] | None = None,
        weight: float = 1.0,
    ) -> dict[str, float]:
        """Adds ``weight`` times the gradient of one global batch to what is there since the last `step`; returns the means of
        what the loss reported, and ``loss``, without the weight."""
        total = counts(samples)
        sums: dict[str, tuple[float, float]] = {}
        extras = {"temperature": temperature, **(extras or {})}
        for part in self.parts(samples):
            batch = self.batch(part, sorted(loss.needs()), extras)
            batch.counts = total
            value, metrics = loss(self.output(batch, temperature), batch)
            value = value / max(1.0, total[loss.per])
            (weight * value).backward()
            metrics = {**metrics, "loss": (float(value.detach()), 0.0)}
            for name, (a, b) in metrics.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = _join(name, old, (float(a), float(b)))
        return {name: a / b if b else a for name, (a, b) in sums.items()}

    def step(self, factor: float = 1.0) -> dict[str, float]:
        """Clips, updates and clears the gradients; ``factor`` scales every learning rate. Returns ``grad_norm`` and
        ``skipped``: 1 where the gradient was not finite and nothing moved. Raises `UserError` when that goes on."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(params, self.clip or float("inf")))
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            if np.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.skips = 0 if np.isfinite(norm) else self.skips + 1
        if self.skips >= HOPELESS:
            raise UserError(
                f"the gradient was not finite {self.skips} times in a row; lower the learning rate, or look at the data"
            )
        return {"grad_norm": norm, "skipped": float(self.skips > 0)}

    # --- being asked ---

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample], temperature: float, want: Literal["logp", "hidden", "values"]) -> list[Signal]:
        """`tutelage.credit.base.Scorer.score`, or what else `output` has: in the order of the samples."""
        values = self._asked(samples, temperature, lambda out: getattr(out, want))
        return [Signal(v, s.trained, {"temperature": temperature, "kind": want}) for s, v in zip(samples, values, strict=True)]

    @torch.inference_mode()
    def topk(self, samples: Sequence[Sample], temperature: float, k: int) -> list[tuple[Signal, Signal]]:
        """`tutelage.credit.base.Scorer.topk`: in the order of the samples."""
        if k >= (vocab := Head.of(self.model, self.vocab).vocab):
            raise UserError(f"top-k asks for {k} tokens, but the vocabulary has {vocab}; give a smaller k")
        values = self._asked(samples, temperature, lambda out: out.topk(k))
        about = {"temperature": temperature, "kind": "topk"}
        return [
            (Signal(v[:, :k].astype(np.int32), s.trained, {**about}), Signal(v[:, k:], s.trained, {**about}))
            for s, v in zip(samples, values, strict=True)
        ]

    def _asked(self, samples: Sequence[Sample], temperature: float, what: Callable[[Any], torch.Tensor]) -> list[np.ndarray]:
        """What an output says [T_sel, ...] of each sample, in their order."""
        found: dict[int, np.ndarray] = {}
        for part in self.parts(samples):
            values = what(self.output(self.batch(part), temperature)).float().cpu().numpy()
            ends = np.cumsum([int(s.mask.sum()) for s in part])[:-1]
            found.update({id(s): value for s, value in zip(part, np.split(values, ends), strict=True)})
        return [found[id(s)] for s in samples]

    # --- surviving ---

    def state(self) -> dict[str, Any]:
        """Everything the next update depends on, on the CPU: what is trained, and the optimizer's memory of it."""
        return {"model": weights(self.model), "optimizers": [on_cpu(o.state_dict()) for o in self.optimizers]}

    def restore(self, state: dict[str, Any]) -> None:
        load_weights(self.model, state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


class ModelScorer:
    """A model as a `tutelage.credit.base.Scorer`; ``adapters`` are those of the model that take part in its scores. None leaves
    them as they are, for a model that is trained meanwhile: it is asked with the weights of the moment."""

    def __init__(self, name: str, model: Any, vocab: int | None = None, adapters: Sequence[str] | None = ()):
        self.name, self._learner, self._adapters = name, Learner(model, vocab=vocab), adapters
        self.head = Head.of(model, vocab)
        self.params = matmul_params(model)
        self.scored = 0
        """Tokens scored since the last reset."""

    def score(self, samples: Sequence[Sample], temperature: float, want: Literal["logp", "hidden"]) -> list[Signal]:
        self._switch()
        signals = self._learner.score(samples, temperature, want)
        self._note(samples, signals)
        return signals

    def topk(self, samples: Sequence[Sample], temperature: float, k: int) -> list[tuple[Signal, Signal]]:
        self._switch()
        pairs = self._learner.topk(samples, temperature, k)
        self._note(samples, [signal for pair in pairs for signal in pair])
        return pairs

    def _switch(self) -> None:
        if self._adapters is not None:
            activate(self._learner.model, self._adapters)

    def _note(self, samples: Sequence[Sample], signals: Sequence[Signal]) -> None:
        self.scored += sum(len(s.tokens) for s in samples)
        for signal in signals:
            signal.provenance["model"] = self.name


class PolicyScorer:
    """The policy of a learner as a `tutelage.credit.base.Scorer`: asked between updates, it answers with the weights of the
    moment, in the learner's own dtype and micro-batches."""

    name = "policy"

    def __init__(self, learner: Learner):
        self._learner, self.params = learner, matmul_params(learner.model)
        self.head: Head | None = None
        """as it was when hidden states were last asked of it: later updates of the step do not move it"""
        self.scored = 0

    def score(self, samples: Sequence[Sample], temperature: float, want: Literal["logp", "hidden"]) -> list[Signal]:
        if want == "hidden":
            self.head = _as_it_is(Head.of(self._learner.model, self._learner.vocab))
        self.scored += sum(len(s.tokens) for s in samples)
        return self._learner.score(samples, temperature, want)

    def topk(self, samples: Sequence[Sample], temperature: float, k: int) -> list[tuple[Signal, Signal]]:
        self.scored += sum(len(s.tokens) for s in samples)
        return self._learner.topk(samples, temperature, k)


class GuestScorer:
    """A scorer whose model is in memory only while others do not need the place; ``call`` brings it there. Its output head
    stays once hidden states were asked of it, since losses rebuild log-probs through it."""

    def __init__(self, name: str, call: Callable[[], ModelScorer]):
        self.name, self._call = name, call
        self.head: Head | None = None
        self.params = self.scored = 0

    def score(self, samples: Sequence[Sample], temperature: float, want: Literal["logp", "hidden"]) -> list[Signal]:
        host = self._call()
        if want == "hidden":
            self.head = host.head
        signals = host.score(samples, temperature, want)
        self._book(host)
        return signals

    def topk(self, samples: Sequence[Sample], temperature: float, k: int) -> list[tuple[Signal, Signal]]:
        host = self._call()
        pairs = host.topk(samples, temperature, k)
        self._book(host)
        return pairs

    def _book(self, host: ModelScorer) -> None:
        self.params, self.scored, host.scored = host.params, self.scored + host.scored, 0


class Scorers:
    """Scorers by folder, one each. Adapters of one base hold it together, once, and the base too where it is asked itself:
    a scorer switches to its own adapter before it scores. With ``resident`` no more than so many whole models are in memory;
    the one that was asked least recently goes, and is loaded again when it is asked."""

    def __init__(self, vocab: int | None = None, resident: int = 0, device: str = "cpu"):
        self._vocab, self._resident, self._device = vocab, resident, device
        self._bases: dict[Path, Any] = {}
        """whole models, the last one asked at the end"""
        self._loaded: dict[Path, dict[Path, ModelScorer]] = {}
        """base -> its scorers, by folder"""
        self.made: dict[Path, ModelScorer | GuestScorer | RemoteScorer] = {}

    def of(self, folder: Path, name: str) -> ModelScorer | GuestScorer | RemoteScorer:
        """The scorer of a model's folder; ``name`` is for its provenance."""
        if folder not in self.made:
            call = partial(self._load, folder, name)
            if (folder / REMOTE).exists():
                self.made[folder] = RemoteScorer(name, Remote.load(folder))
            else:
                self.made[folder] = GuestScorer(name, call) if self._resident else call()
        return self.made[folder]

    def _load(self, folder: Path, name: str) -> ModelScorer:
        base = Base.of(folder).folder
        if base not in self._bases:
            self._make_room()
            self._bases[base] = load_model(base, device=self._device)
        model = self._bases[base] = self._bases.pop(base)
        scorers = self._loaded.setdefault(base, {})
        if folder not in scorers:
            adapters = [f"adapter{len(scorers)}"] if is_adapter(folder) else []
            for each in adapters:
                load_adapter(model, folder, each)
            scorers[folder] = ModelScorer(name, model, self._vocab, adapters)
        return scorers[folder]

    def _make_room(self) -> None:
        while self._resident and len(self._bases) >= self._resident:
            oldest = next(iter(self._bases))
            del self._bases[oldest], self._loaded[oldest]
            gc.collect()  # models hold cycles


def _as_it_is(head: Head) -> Head:
    """A copy that updates do not move; what is not trained is shared."""
    copied = lambda t: t.detach().clone() if t is not None and t.requires_grad else t  # noqa: E731
    return replace(head, weight=copied(head.weight), bias=copied(head.bias))


def _join(name: str, a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """Sums; a metric whose name ends in ``max`` keeps the largest."""
    if name.endswith("max"):
        return max(a[0], b[0]), 0.0
    return a[0] + b[0], a[1] + b[1]
