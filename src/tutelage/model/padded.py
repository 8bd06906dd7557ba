"""The generic path: any causal decoder through its ordinary forward, in padded batches and with transformers' own cache.

Packing rests on what an architecture is declared to be (`PACKED`). This path rests on less:

- Training and scoring pad on the *right*. What stands to the right of a token cannot reach it in a causal model, be its layers
  attention, convolutions or recurrences, so that padding needs no mask.
- Drawing has to line prompts up on the *left*, and there a state carried along the sequence may take the padding in.
  Architectures declared in `PADDED` are exact under the mask; all others draw in batches of prompts of one length.

Where the angles of rotary embeddings follow the longest row of a batch (`stretches`), neighbours would matter: such models
train, score and draw in batches of one length. `prove` holds an imported model to all of this, once.

Leaves out: encoder-decoders; rows that outgrow, while they are drawn, the length at which such angles change (the cache keeps
the old ones, as in transformers' own ``generate``; ``sampler_gap`` shows it); a load-balancing loss of mixtures of experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from tutelage.model.attention import NAME, Grid, Rows, packs, register
from tutelage.model.body import lean_states
from tutelage.model.head import Head
from tutelage.model.headers import PACKED, PADDED, stretches
from tutelage.spec import UserError

TOLERANCE = 1e-3
"""Share of the largest number by which two ways to the same numbers may differ: well above rounding, well below a leak."""


def implementation(config: Any) -> str | None:
    """``attn_implementation`` for a config: ours where the architecture packs, else what transformers takes by itself."""
    if packs(config):
        return register()
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped else None  # the fused kernels know no cap


def is_packed(model: Any) -> bool:
    """Whether a loaded model takes packed rows: it does where it was given our attention."""
    return model.config._attn_implementation == NAME


def lines_up(model: Any) -> bool:
    """Whether prompts of several lengths may be drawn from in one batch."""
    config = model.config.get_text_config()
    return config.model_type in PACKED | PADDED and not _stretches(model)


def row_states(
    model: Any, tokens: torch.Tensor, pos: torch.Tensor, lengths: torch.Tensor, after: torch.Tensor | None = None
) -> torch.Tensor:
    """The last hidden states [N, D] of rows that lie one after another; tokens and pos int [N], lengths int [R]. Only
    models that pack take rows that go on where others end, ``after`` int [R] (`Rows`)."""
    if is_packed(model):
        rows = Rows(lengths, after)
        if (states := lean_states(model, tokens, pos, rows)) is not None:
            return states
        out = model.get_decoder()(input_ids=tokens[None], position_ids=pos[None], use_cache=False, layout=rows)
        return out.last_hidden_state[0]
    grid = Grid(lengths)
    if not grid.even and _stretches(model):
        alone = zip(tokens.split(lengths.tolist()), pos.split(lengths.tolist()), lengths.split(1), strict=True)
        return torch.cat([row_states(model, *row) for row in alone])
    column = grid.column.expand(grid.shape)
    states = _body(model, tokens[grid.pad].view(grid.shape), column, use_cache=False).last_hidden_state
    return states.flatten(0, 1).index_select(0, grid.unpad)


class Decoding:
    """S rows being drawn in lockstep, with the cache that the model makes. Prompts of several lengths need `lines_up`."""

    def __init__(self, model: Any):
        self.model = model
        self._takes = "cache_params" if "cache_params" in _parameters(model) else "past_key_values"

    def begin(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Prompts, one a row -> the last hidden states [S, D] of their last tokens."""
        device, longest = self.model.device, max(map(len, prompts))
        gaps = torch.tensor([[longest - len(p)] for p in prompts], device=device)
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        column = torch.arange(longest, device=device)
        self.mask = (column >= gaps).long()  # [S, L]
        return self._forward(ids, (column - gaps).clamp(min=0), attention_mask=self.mask)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The next token of each row, int [S] -> hidden states [S, D]."""
        pos = self.mask.sum(1, keepdim=True)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        mask = {} if self._takes == "cache_params" else {"attention_mask": self.mask}  # a state alone holds no padding
        return self._forward(ids[:, None], pos, **{self._takes: self.cache}, **mask)

    def take(self, rows: Sequence[int]) -> None:
        """Goes on with these rows, in this order; one may be named several times."""
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        self.cache.reorder_cache(index)

    def _forward(self, ids: torch.Tensor, pos: torch.Tensor, **how: Any) -> torch.Tensor:
        out = _body(self.model, ids, pos, use_cache=True, **how)
        self.cache = getattr(out, self._takes)
        return out.last_hidden_state[:, -1]


def _body(model: Any, ids: torch.Tensor, pos: torch.Tensor, **how: Any) -> Any:
    """The model without its head; positions are told to those that ask for them."""
    if "position_ids" in _parameters(model):
        how["position_ids"] = pos
    return model.get_decoder()(input_ids=ids, **how)


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(model.get_decoder().forward).parameters)


def _stretches(model: Any) -> bool:
    return stretches(getattr(model.config.get_text_config(), "rope_parameters", None))


# --- whether a model is what this path takes it for ---------------------------------------------------------------------


@torch.inference_mode()
def prove(model: Any, where: str) -> None:
    """Raises `UserError` for an imported model that is not causal, whose logits are not its head's of the last hidden state, or
    that draws otherwise with its cache than without."""
    vocab = model.get_input_embeddings().weight.shape[0]
    long = torch.arange(3, 3 + 7 * 9, 7, device=model.device) % vocab
    short = long.flip(0)[: 4 if lines_up(model) else 6]
    said = f"{where}: architecture {model.config.model_type!r}"
    fix = "it cannot be trained here; give another base"
    try:
        whole = [_alone(model, row) for row in (long, short)]
        padded = row_states(model, torch.cat([short, long]), *_places(short, long)).split([len(short), len(long)])
        if not _equal(padded[0], whole[1]) or not _equal(padded[1], whole[0]):
            raise UserError(f"{said} is not causal: what stands after a token changes it; {fix}")
        if not _equal(Head.of(model)(whole[0]), model(input_ids=long[None], use_cache=False).logits[0].float()):
            raise UserError(f"{said} has logits that are not its output head's of the last hidden state; {fix}")
        drawn = _drawn(model, long, short)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        text = " ".join(str(error).split())[:150]
        raise UserError(
            f"{said} does not do what a decoder of transformers does ({type(error).__name__}: {text}); {fix}"
        ) from None
    if not _equal(drawn[0], whole[0][5:]) or not _equal(drawn[1], whole[1][-1:]):
        raise UserError(f"{said} draws otherwise with its cache than without, in this version of transformers; {fix}")


def _alone(model: Any, row: torch.Tensor) -> torch.Tensor:
    return row_states(model, row, *_places(row))


def _places(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [N] and lengths [R]."""
    device = rows[0].device
    return torch.cat([torch.arange(len(r), device=device) for r in rows]), torch.tensor([len(r) for r in rows], device=device)


def _drawn(model: Any, long: torch.Tensor, short: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of ``long`` from its sixth token on, drawn, and of the end of ``short``, a prompt beside it; on the way a
    row is copied and rows change places."""
    decoding = Decoding(model)
    first = decoding.begin([short.tolist(), long[:6].tolist()])
    decoding.take([1, 0, 1])
    states = [first[1]]
    for token in long[6:]:
        states.append(decoding.step(torch.stack([token, short[0], token]))[2])
    return torch.stack(states), first[:1]


def _equal(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max())
