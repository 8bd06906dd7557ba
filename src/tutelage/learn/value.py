"""A value model: the stock body of a causal model with one number for each token in place of the vocabulary.

It is transformers' own token classifier with one label, so its folder opens with ``AutoModelForTokenClassification``. A causal
model's folder gives the body, and a new head begins at zero: it expects nothing until it has learned. A folder with a ``score``
head (a value model, or a reward model saved as a sequence classifier with one label) gives the head too.

The value at token ``t`` is read where its log-prob is: from the hidden state at ``t - 1``, that is from what stood before the
token was chosen.

Leaves out: a body shared with the policy, adapters, architectures for which transformers has no token classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage.learn.learner import Learner
from tutelage.model.folder import moved, one_line
from tutelage.model.padded import implementation
from tutelage.spec import UserError
from tutelage.types import Batch, Sample, Signal


@dataclass
class Values:
    """What `ClippedValue` reads."""

    values: torch.Tensor
    """[M], fp32, with gradient"""


class ValueLearner(Learner):
    """A `Learner` whose output is `Values`; ``params`` is its N of the FLOP counts."""

    @property
    def params(self) -> int:
        matrices = sum(p.numel() for p in self.model.parameters() if p.ndim >= 2)
        return matrices - self.model.get_input_embeddings().weight.numel()

    def output(self, batch: Batch, temperature: float = 1.0) -> Any:
        hidden = self.hidden(batch)
        with self.autocast:
            return Values(self.model.score(hidden)[:, 0].float())

    def values(self, samples: Sequence[Sample]) -> list[Signal]:
        """``value`` [T_sel] of every sample."""
        return self.score(samples, 1.0, "values")


def load_value(folder: Path, device: str = "cpu") -> Any:
    """A value model, with the attention of `load_model`, in eval mode, from the folder of a causal model or of one with a
    ``score`` head.

    Raises `UserError` for a folder that lacks weights of the body, or whose architecture has no token classifier.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would tell of the missing head at length
    try:
        config = AutoConfig.from_pretrained(folder, num_labels=1)
        loaded: Any = AutoModelForTokenClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=implementation(config),
            output_loading_info=True,
        )
    except ValueError as error:
        raise UserError(f"{folder} cannot become a value model: {one_line(error)}; give value a base that can") from None
    finally:
        logging.set_verbosity(before)
    model, found = loaded
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(
            f"{folder} cannot become a value model: its token classifier has no head 'score'; give value another base"
        )
    head = {f"score.{name}": p for name, p in model.score.named_parameters()}
    lost = sorted(set(found["missing_keys"]) - head.keys())
    if lost:
        raise UserError(f"{folder} lacks tensor {lost[0]!r} of its config.json; give the whole folder of a model")
    with torch.no_grad():
        for name in head.keys() & set(found["missing_keys"]):
            head[name].zero_()
    return moved(model, device)
