"""Drawing: uniformity, the inverse of the distribution, and truncation against transformers' own warpers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.rollout.draw import draw, kept, uniforms


def test_uniforms_are_uniform_and_independent_of_company():
    u = uniforms(np.arange(20_000, dtype=np.uint64), np.full(20_000, 3))
    counts, _ = np.histogram(u, 20, (0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    along = uniforms(np.zeros(20_000, np.uint64), np.arange(20_000))
    assert abs(np.corrcoef(along[1:], along[:-1])[0, 1]) < 0.03
    assert uniforms(np.array([7], np.uint64), np.array([9]))[0] == uniforms(np.arange(8, dtype=np.uint64), np.full(8, 9))[7]


def test_frequencies_follow_the_distribution():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    u = torch.from_numpy(uniforms(np.arange(40_000, dtype=np.uint64), np.zeros(40_000)))
    tokens = draw(p.log().expand(40_000, 4), u)
    assert torch.allclose(torch.bincount(tokens, minlength=4) / 40_000, p, atol=0.01)
    assert (tokens != 1).all()


@pytest.mark.parametrize("vocab", [1, 7, 256, 300, 1024])
def test_a_token_is_the_inverse_of_the_whole_cumulative_distribution(vocab):
    """Block and token in it give what one sum over all tokens gives, and never a token that was cut."""
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 1::3] = -torch.inf
    logp = logits.log_softmax(-1)
    u = torch.from_numpy(uniforms(np.arange(64, dtype=np.uint64), np.zeros(64)))
    u[0], u[1] = 0.0, 1 - 2**-53
    tokens, edges = draw(logp, u), logp.double().exp().cumsum(-1)
    assert (logp.gather(1, tokens[:, None]) > -torch.inf).all()
    place = edges.gather(1, tokens[:, None])[:, 0]
    below = place - logp.double().exp().gather(1, tokens[:, None])[:, 0]
    target = u * edges[:, -1]
    assert (below <= target + 1e-6).all()
    assert (target <= place + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.integers(0, 12))
def test_truncation_equals_the_librarys_warpers(seed, top_p, top_k):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)) * 2
    want = logits
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    mine = kept(logits.log_softmax(-1), torch.full((4,), top_p), torch.full((4,), top_k))
    assert torch.equal(mine, want > -torch.inf)


@pytest.mark.parametrize("top_p", [1e-6, 0.3])
def test_the_likeliest_token_is_always_kept(top_p):
    logp = torch.randn(3, 9).log_softmax(-1)
    mine = kept(logp, torch.full((3,), top_p), torch.zeros(3, dtype=torch.long))
    assert mine.gather(1, logp.argmax(-1, keepdim=True)).all()
