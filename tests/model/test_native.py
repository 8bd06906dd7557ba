"""The compiled step of decoding against the body in PyTorch that it stands in for, and its products against PyTorch's."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.model.test_lean import MODELS, made
from tutelage.model import native
from tutelage.model.attention import Cache, Decode
from tutelage.model.lean import LeanBody
from tutelage.model.lora import LoRA
from tutelage.model.native import NativeBody, linear
from tutelage.rollout.base import Request, Sampling
from tutelage.rollout.local import LocalEngine

built = pytest.mark.skipif(native.library() is None, reason="the package was built without a C compiler")
WIDE = {
    **MODELS,
    "odd widths": {
        "hidden_size": 42,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "intermediate_size": 43,
    },
    "five queries a key": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 40},
}


def model_of(name):
    return made(name) if name in MODELS else tiny.model(**WIDE[name])


def both(model, slots, length):
    """The two bodies, and for each a cache of the same numbers, as after so many tokens."""
    lean = LeanBody.of(model)
    caches = [Cache(model.config, slots, torch.float32, "cpu") for _ in range(2)]
    for cache in caches:
        cache.restart(length)
        cache.both.copy_(torch.randn(cache.both.shape, generator=torch.Generator().manual_seed(1)))
    return NativeBody.of(lean), lean, *caches


def compiler():
    """GCC's version on Linux, elsewhere 0."""
    if sys.platform != "linux" or not shutil.which("gcc"):
        return 0
    return int(subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True, check=True).stdout.split(".")[0])


@pytest.mark.skipif(compiler() < 12, reason="no compiler that is known to do")
def test_the_package_is_built_with_it_where_a_compiler_is():
    assert native.library() is not None


@built
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 4, 53])
@pytest.mark.parametrize("name", WIDE)
@torch.inference_mode()
def test_steps_give_what_the_lean_body_gives_and_write_the_same_cache(name, rows, threads, monkeypatch):
    model, longest = model_of(name), 70
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    step, lean, a, b = both(model, rows + 1, longest)
    dice = torch.Generator().manual_seed(rows)
    pos = torch.randint(0, longest - 3, (rows,), generator=dice)
    pos[0] = 0  # nothing before it
    for _ in range(3):
        ids = torch.randint(5, tiny.VOCAB, (rows,), generator=dice)
        got = step(ids, pos, a, longest)
        torch.testing.assert_close(got, lean(ids, pos, Decode(b, pos, longest), longest), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.both, b.both, atol=1e-5, rtol=1e-5)
        pos = pos + 1


@built
@torch.inference_mode()
def test_a_row_is_the_same_whatever_stands_beside_it():
    step, _, a, b = both(made("qwen3"), 9, 20)
    ids, pos = torch.arange(5, 14), torch.arange(9)
    whole = step(ids, pos, a, 20)
    for rows in (1, 2, 7):
        assert torch.equal(step(ids[:rows], pos[:rows], b, 20), whole[:rows])


@built
@torch.inference_mode()
def test_it_reads_weights_that_were_updated_in_place():
    model = made("llama")
    step, lean, a, b = both(model, 2, 8)
    for p in model.parameters():
        p.mul_(0.9)
    ids, pos = torch.tensor([7, 9]), torch.tensor([3, 5])
    torch.testing.assert_close(step(ids, pos, a, 8), lean(ids, pos, Decode(b, pos, 8), 8), atol=1e-5, rtol=1e-5)


@built
def test_it_reads_weights_that_lie_elsewhere_now():
    model, ids, pos = made("llama"), torch.tensor([7, 9]), torch.tensor([3, 5])
    step, lean, a, b = both(model, 2, 8)
    with torch.inference_mode():
        step(ids, pos, a, 8)
    for p in model.parameters():
        p.data = p.data * 0.9
    with torch.inference_mode():
        torch.testing.assert_close(step(ids, pos, a, 8), lean(ids, pos, Decode(b, pos, 8), 8), atol=1e-5, rtol=1e-5)


@built
@torch.inference_mode()
def test_threads_do_not_change_a_bit(monkeypatch):
    def out(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        step, _, cache, _ = both(tiny.model(intermediate_size=88), 5, 8)
        return step(torch.arange(5, 9), torch.arange(4), cache, 8)

    one = out(1)
    assert all(torch.equal(out(n), one) for n in (2, 3, 5))


@built
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
@torch.inference_mode()
def test_what_is_not_a_number_stays_so(part):
    model = made("llama")
    getattr(model.get_decoder().layers[0].self_attn, part).weight[0, 0] = torch.nan
    step, _, cache, _ = both(model, 2, 8)
    assert step(torch.tensor([7, 9]), torch.tensor([3, 5]), cache, 8).isnan().all()


@built
@torch.inference_mode()
def test_scores_all_far_below_zero():
    model = made("llama")
    model.get_decoder().layers[0].self_attn.q_proj.weight.mul_(100)
    step, lean, a, b = both(model, 8, 8)
    ids, pos = torch.arange(5, 13), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    torch.testing.assert_close(step(ids, pos, a, 8), lean(ids, pos, Decode(b, pos, 8), 8), atol=1e-3, rtol=1e-4)


@built
@torch.inference_mode()
def test_the_models_epsilon_and_strided_int32_inputs():
    step, lean, a, b = both(tiny.model(rms_norm_eps=0.1), 3, 8)
    ids, pos = (torch.tensor(x, dtype=torch.int32).T[0] for x in ([[7, 1], [9, 2]], [[3, 1], [5, 2]]))
    torch.testing.assert_close(step(ids, pos, a, 8), lean(ids, pos.long(), Decode(b, pos.long(), 8), 8), atol=1e-5, rtol=1e-5)


@built
def test_large_scores_and_gates_stay_finite():
    model = made("llama")
    step, lean, a, b = both(model, 3, 40)
    for cache in (a, b):
        cache.both *= 200
    with torch.inference_mode():
        model.get_decoder().layers[0].mlp.gate_proj.weight.mul_(1000)
        ids, pos = torch.tensor([7, 9, 11]), torch.tensor([39, 5, 20])
        torch.testing.assert_close(step(ids, pos, a, 40), lean(ids, pos, Decode(b, pos, 40), 40), atol=1e-3, rtol=1e-4)


@built
@pytest.mark.parametrize(
    ("rows", "width", "columns"), [(1, 8, 4), (4, 96, 64), (5, 27, 31), (50, 64, 3), (53, 100, 67), (250, 8, 8), (257, 8, 8)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_pytorchs(rows, width, columns, biased):
    dice = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=dice, dtype=torch.float64) for s in ((rows, width), (columns, width), (columns,)))
    exact = torch.nn.functional.linear(x, w, b if biased else None)
    got = linear(x.float(), w.float(), b.float() if biased else None)
    torch.testing.assert_close(got.double(), exact, atol=2e-5, rtol=1e-5)


@built
def test_the_engine_draws_the_same_with_it_and_without(monkeypatch):
    def drawn():
        engine = LocalEngine(made("llama"), tiny.tokenizer(), slots=3)
        how = [Sampling(max_new_tokens=n, temperature=t) for n, t in ((40, 1.0), (5, 1.0), (70, 0.0), (9, 1.0), (33, 0.7))]
        futures = [engine.submit(Request((7 + i, 9, 5), h, seed=i)) for i, h in enumerate(how)]
        while engine.pump():
            pass
        return engine.native, [f.result() for f in futures]

    with_it, a = drawn()
    monkeypatch.setattr(native, "library", lambda: None)
    without, b = drawn()
    assert with_it is not None
    assert without is None
    for x, y in zip(a, b, strict=True):
        assert x.tokens.tolist() == y.tokens.tolist()
        assert abs(x.logp - y.logp).max() < 1e-5


def test_what_it_does_not_compute_goes_the_other_way():
    assert NativeBody.of(None) is None
    assert NativeBody.of(LeanBody.of(tiny.model().bfloat16())) is None
    assert NativeBody.of(LeanBody.of(tiny.model(head_dim=4))) is None  # no whole vectors
    for part in ("embed_tokens", "norm"):
        model = tiny.model()
        lean = LeanBody.of(model)
        getattr(model.model, part).bfloat16()
        assert NativeBody.of(lean) is None
    adapted = tiny.model()
    LoRA(rank=2).attach(adapted, 0)
    assert NativeBody.of(LeanBody.of(adapted)) is None


def test_strided_products_are_pytorchs():
    x, w = torch.randn(3, 16), torch.randn(16, 16)
    for a, b in ((x[:, :8], w[:, :8].contiguous()), (x[:, :8].contiguous(), w[:, :8])):
        torch.testing.assert_close(linear(a, b), torch.nn.functional.linear(a, b))
    with pytest.raises(RuntimeError):
        linear(x, w[:, :8].contiguous())


@pytest.fixture
def anew(monkeypatch):
    """The library is looked for again, in the test and after it."""
    native.library.cache_clear()
    yield
    monkeypatch.undo()
    native.library.cache_clear()


@built
@pytest.mark.parametrize("what", ["not a library", "of another version"])
def test_what_cannot_be_used_is_not(what, monkeypatch, tmp_path, anew):
    if what == "not a library":
        (tmp_path / "it.so").write_text("no")
        monkeypatch.setattr(native, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "it.so")))
    else:
        monkeypatch.setattr(native, "PARTS", native.PARTS[1:])
    assert native.library() is None


def test_without_a_library_products_are_pytorchs(monkeypatch, anew):
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    assert native.library() is None
    assert torch.equal(linear(x, w), torch.nn.functional.linear(x, w))
