"""The packed forward against transformers' own eager forward, one sequence at a time."""

import pytest
import torch

from tests import tiny
from tutelage.model import attention
from tutelage.model.attention import Cache, Decode, Prefill, Rows, packs, register
from tutelage.model.folder import matmul_params

LENGTHS = [9, 3, 14, 1]


def ids_of(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(5, tiny.VOCAB, (n,), generator=g) for n in lengths]


def alone(model, rows):
    """Hidden states of each row by itself, with the library's own attention."""
    model.set_attn_implementation("eager")
    try:
        return [model.get_decoder()(input_ids=r[None], use_cache=False).last_hidden_state[0] for r in rows]
    finally:
        model.set_attn_implementation(register())


def packed(model, rows):
    lengths = torch.tensor([len(r) for r in rows])
    pos = torch.cat([torch.arange(len(r)) for r in rows])
    out = model.get_decoder()(input_ids=torch.cat(rows)[None], position_ids=pos[None], use_cache=False, layout=Rows(lengths))
    return out.last_hidden_state[0].split(lengths.tolist())


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("plain_up_to", [256, 4])
def test_packed_rows_equal_each_row_alone(name, plain_up_to, monkeypatch):
    monkeypatch.setattr(attention, "PLAIN_UP_TO", plain_up_to)  # 4: through PyTorch's fused attention
    model, rows = tiny.model(name), ids_of(LENGTHS)
    with torch.no_grad():
        for mine, theirs in zip(packed(model, rows), alone(model, rows), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize(("plain_up_to", "cut"), [(256, 96), (256, 4), (4, 96)])
def test_packed_gradients_equal_each_row_alone(name, plain_up_to, cut, monkeypatch):
    monkeypatch.setattr(attention, "PLAIN_UP_TO", plain_up_to)
    monkeypatch.setattr(attention, "CUT", cut)
    monkeypatch.setattr(attention, "CLASS", 8)  # so that there are several
    model, rows = tiny.model(name), ids_of(LENGTHS)
    weight = torch.randn(sum(LENGTHS), model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    grads = []
    for forward in (packed, alone):
        model.zero_grad()
        (torch.cat(list(forward(model, rows))) * weight).sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], atol=1e-4, rtol=1e-4, msg=n)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_prefill_and_decode_equal_a_whole_forward(name):
    """Two prompts, the first shared by two slots, then token by token past the window of the windowed models."""
    model, whole = tiny.model(name), ids_of([18, 15])
    prompts, decoder = [whole[0][:7], whole[1][:3]], model.get_decoder()
    cache = Cache(model.config, 4, torch.float32, "cpu")
    cache.restart(8)
    owner = [0, 0, 1]
    with torch.no_grad():
        lengths = torch.tensor([7, 3])
        layout = Prefill(lengths, cache, torch.arange(3), torch.tensor(owner))
        pos = torch.cat([torch.arange(7), torch.arange(3)])
        out = decoder(input_ids=torch.cat(prompts)[None], position_ids=pos[None], use_cache=False, layout=layout)
        firsts = out.last_hidden_state[0].split([7, 3])
        cache.grow(32, 3)
        want = alone(model, whole)
        for i in range(2):
            torch.testing.assert_close(firsts[i], want[i][: len(prompts[i])], atol=1e-5, rtol=1e-5)
        for step in range(11):
            at = torch.tensor([len(prompts[o]) + step for o in owner])
            ids = torch.stack([whole[o][p] for o, p in zip(owner, at, strict=True)])
            out = decoder(
                input_ids=ids[None], position_ids=at[None], use_cache=False, layout=Decode(cache, at, int(at.max()) + 1)
            )
            for slot, o in enumerate(owner):
                torch.testing.assert_close(out.last_hidden_state[0, slot], want[o][at[slot]], atol=1e-5, rtol=1e-5)


def test_a_row_does_not_see_its_neighbour():
    model, rows = tiny.model(), ids_of(LENGTHS)
    with torch.no_grad():
        before = packed(model, rows)[1]
        rows[0], rows[2] = ids_of([9], seed=9)[0], ids_of([14], seed=8)[0]
        assert torch.equal(before, packed(model, rows)[1])


def test_architectures_that_packing_would_corrupt_are_refused():
    from transformers import AutoConfig

    assert packs(AutoConfig.for_model("llama"))
    assert packs(AutoConfig.for_model("gemma3_text"))
    for name in ("mamba", "qwen3_next", "lfm2", "falcon_h1"):
        assert not packs(AutoConfig.for_model(name)), name


@pytest.mark.parametrize("tied", [True, False])
def test_matmul_params_count_the_head_once_and_no_embedding(tied):
    model = tiny.model(tie_word_embeddings=tied)
    d, f, layers = 32, 48, 2
    assert matmul_params(model) == layers * (4 * d * d + 3 * d * f) + tiny.VOCAB * d


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("plain_up_to", [256, 4])
@pytest.mark.parametrize("waste", [1 << 14, 1])
def test_rows_that_go_on_where_a_prompt_ends_equal_whole_rows(name, plain_up_to, waste, monkeypatch):
    """Hidden states and gradients; ``waste`` 1 makes a class of every length."""
    monkeypatch.setattr(attention, "PLAIN_UP_TO", plain_up_to)
    monkeypatch.setattr(attention, "CLASS", waste)
    model, pieces, after = tiny.model(name), ids_of([9, 4, 7, 1, 12, 3, 12]), [-1, -1, 0, 0, 1, 1, -1]
    weight = torch.randn(48, model.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def shared():
        start = [0 if a < 0 else len(pieces[a]) for a in after]
        pos = torch.cat([a + torch.arange(len(p)) for a, p in zip(start, pieces, strict=True)])
        rows = Rows(torch.tensor([len(p) for p in pieces]), torch.tensor(after))
        out = model.get_decoder()(input_ids=torch.cat(pieces)[None], position_ids=pos[None], use_cache=False, layout=rows)
        return out.last_hidden_state[0]

    def whole():
        rows = [p if a < 0 else torch.cat([pieces[a], p]) for a, p in zip(after, pieces, strict=True)]
        return torch.cat([h[-len(p) :] for h, p in zip(alone(model, rows), pieces, strict=True)])

    found = []
    for forward in (shared, whole):
        model.zero_grad()
        states = forward()
        (states * weight).sum().backward()
        found.append((states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for n, g in found[0][1].items():
        assert (g - found[1][1][n]).norm() < 1e-4 * found[1][1][n].norm(), n
