"""Rows with one prompt share its forward: losses and gradients are those of each row by itself."""

import numpy as np
import pytest
import torch

from tests import tiny
from tutelage.learn.batch import collate, pack
from tutelage.learn.learner import Learner
from tutelage.losses.nll import NLL
from tutelage.model.attention import register
from tutelage.types import Sample


def groups(seed, count=6, size=4):
    """Groups on prompts of 1 to 9 tokens, replies of 1 to 15; some with gaps, some cut, some not trained at all."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = rng.integers(5, tiny.VOCAB, rng.integers(1, 10))
        for _ in range(size):
            tokens = np.concatenate([prompt, rng.integers(5, tiny.VOCAB, rng.integers(1, 16))])
            mask = (np.arange(len(tokens)) >= len(prompt)) & (
                rng.random(len(tokens)) < rng.choice([1.0, 0.7, 0.0], p=[0.6, 0.3, 0.1])
            )
            made.append(Sample(tokens, mask))
    return [made[i] for i in rng.permutation(len(made))]


def by_itself(model, samples):
    """Mean negative log-likelihood, with gradients, by transformers' own attention."""
    model.set_attn_implementation("eager")
    total = 0.0
    for s in samples:
        logp = model(torch.from_numpy(s.tokens)[None], use_cache=False).logits[0].log_softmax(-1)
        total = total - sum(logp[t - 1, s.tokens[t]] for t in s.trained)
    loss = total / sum(len(s.trained) for s in samples)
    loss.backward()
    model.set_attn_implementation(register())
    return float(loss.detach())


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("micro_tokens", [16384, 100])
def test_a_shared_prompt_changes_no_loss_and_no_gradient(name, micro_tokens):
    model, samples, found = tiny.model(name), groups(0), []
    for loss_of in (
        lambda: Learner(model, micro_tokens=micro_tokens).forward_backward(samples, NLL())["loss"],
        lambda: by_itself(model, samples),
    ):
        model.zero_grad()
        loss = loss_of()
        found.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert abs(found[0][0] - found[1][0]) < 1e-5
    for n, g in found[0][1].items():
        assert (g - found[1][1][n]).norm() < 1e-4 * found[1][1][n].norm(), n


@pytest.mark.parametrize("seed", range(5))
def test_a_pack_holds_each_prompt_once_and_nothing_behind_the_last_token_that_predicts(seed):
    samples = groups(seed)
    batch = collate(samples)
    for name in ("tokens", "row", "pos", "index", "trow"):
        setattr(batch, name, torch.from_numpy(getattr(batch, name)))
    packed = pack(batch)
    pieces = list(zip(packed.tokens.split(packed.lengths.tolist()), packed.pos.split(packed.lengths.tolist()), strict=True))
    histories = []
    for (tokens, pos), after in zip(pieces, packed.after.tolist(), strict=True):
        before = pieces[after][0].tolist() if after >= 0 else []
        assert pos.tolist() == list(range(len(before), len(before) + len(tokens)))
        histories += [before + tokens[: i + 1].tolist() for i in range(len(tokens))]
    want = [s.tokens[:t].tolist() for s in samples for t in s.trained]
    assert [histories[i] for i in packed.index.tolist()] == want
    trained = [s for s in samples if s.mask.any()]
    prompts = {s.tokens[: s.trained[0]].tobytes(): s.trained[0] for s in trained}
    untrained = {s.tokens[:1].tobytes(): 1 for s in samples if not s.mask.any()}
    assert len(packed.tokens) == sum((untrained | prompts).values()) + sum(s.trained[-1] - s.trained[0] for s in trained)
