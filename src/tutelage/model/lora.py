"""What a stage trains in place of all weights: low-rank adapters (LoRA, Hu et al., arXiv 2106.09685), as specs.

A linear layer with weight W [out, in] computes ``W x + alpha / rank * B A x``, with A [rank, in] and B [out, rank]; W is
frozen, A begins random and B at zero. The three kinds say what the stage begins from, so that none can be taken for another:
`LoRA` begins from whole weights, `Continue` trains the adapter that the model is, `Stack` trains a new one over it. The
fourth way, to merge an adapter into its weights and begin anew, is a stage of its own, stages/merge.py: what trains after it
shares the merged weights, which are stored once.

Leaves out: dropout (sampler, scorer and learner are one model, and their log-probs must be of the same function);
rank-stabilised scaling (set alpha to a·sqrt(rank)); DoRA and other variants; adapters on embeddings, on the output head, and on
the experts of a mixture, which transformers keep in one tensor that is no linear layer.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from tutelage.spec import Spec

Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapter(Spec):
    """Base of what a stage trains while the model's own weights stay frozen."""

    over: ClassVar[bool] = True
    """Whether the model has to be an adapter already."""

    def attach(self, model: Any, seed: int) -> None:
        """Readies a loaded model: from here on only the adapter has gradients. Raises `UserError`."""
        raise TypeError(f"{type(self).__name__} is abstract")


class LoRA(Adapter):
    """A new adapter on a whole model; peft's ``LoraConfig`` with these fields."""

    over: ClassVar[bool] = False

    rank: int = Field(16, ge=1)
    """r"""
    alpha: int = Field(32, ge=1)
    """``lora_alpha``: the product is scaled by alpha / rank."""
    targets: tuple[Linear, ...] = ()
    """``target_modules``; where none are named, every linear layer but the output head (peft's ``all-linear``)."""

    def attach(self, model: Any, seed: int) -> None:
        from tutelage.model.adapter import FIRST, activate, new_adapter

        new_adapter(model, FIRST, self.rank, self.alpha, self.targets, seed)
        activate(model, [FIRST], train=FIRST)


class Stack(LoRA):
    """A new adapter over the one that the model is: both are active and the old one is frozen.

    What is published is one ordinary adapter, A and B of both one behind the other (``combination_type="cat"`` of peft's
    ``add_weighted_adapter``): its rank is the sum of theirs.
    """

    over: ClassVar[bool] = True

    def attach(self, model: Any, seed: int) -> None:
        from tutelage.model.adapter import FIRST, SECOND, activate, new_adapter

        new_adapter(model, SECOND, self.rank, self.alpha, self.targets, seed)
        activate(model, [FIRST, SECOND], train=SECOND)


class Continue(Adapter):
    """The adapter that the model is, trained further (peft's ``is_trainable=True``); rank, alpha and targets are its own."""

    def attach(self, model: Any, seed: int) -> None:
        from tutelage.model.adapter import FIRST, activate

        activate(model, [FIRST], train=FIRST)
