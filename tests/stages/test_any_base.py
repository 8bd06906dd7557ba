"""Bases that cannot be packed, from a Hugging Face folder through training, distillation and evaluation; what is refused."""

import json
import subprocess
import sys

import pytest

from tests import tiny
from tests.stages.test_loops import same, weights
from tests.stages.toy import DATA, ENV, SHORT, Types, make, rl
from tutelage.context import Stopped
from tutelage.credit.teacher import Teacher
from tutelage.graph import key
from tutelage.learn.optim import AdamW
from tutelage.losses.distill import SampledReverseKL
from tutelage.model.folder import load_model, matmul_params, save_model
from tutelage.model.headers import folder_params
from tutelage.model.lora import LoRA
from tutelage.spec import SpecError, UserError
from tutelage.stages.evaluate import Evaluate
from tutelage.stages.fit import Fit
from tutelage.stages.model import Pretrained
from tutelage.store import Store

FAST = AdamW(lr=0.01)


@pytest.fixture(params=["hybrid", "undeclared"])
def folder(request, tmp_path):
    save_model(tiny.model(request.param), tiny.tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def recipe(folder, **more):
    """Fit, then one more Fit as a teacher, then Online distillation of one into the other."""
    base = Pretrained(name="base", path=str(folder))
    sft = Fit(name="sft", model=base.out(), data=DATA.out(), steps=3, rows=6, optimizer=FAST)
    teacher = Fit(name="teacher", model=sft.out(), data=DATA.out(), steps=3, rows=6, optimizer=FAST, seed=1)
    fields = {"model": sft.out(), "teachers": {"low": teacher.out()}, "credit": (Teacher(want="logp"),)}
    return base, sft, rl(**{"name": "student", **fields, "loss": SampledReverseKL(), "optimizer": FAST, **more})


def test_a_recipe_runs_and_a_stopped_one_ends_in_the_same_bits(folder, tmp_path):
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    base, sft, student = recipe(folder)
    for stage in (sft, student):
        done = make(stage, whole)
        for stop_after in (1, 1):
            calls = []
            with pytest.raises(Stopped):
                make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
        resumed = make(stage, cut)
        assert same(weights(whole, stage), weights(cut, stage))
        assert not same(weights(whole, stage), weights(whole, base))
        assert done.cost == resumed.cost
    assert max(m["sampler_gap"] for m in whole.metrics(key(student))) < 1e-4
    fact = whole.meta(key(base))["facts"]["attention"]
    assert fact.startswith("padded")
    assert f"architecture {load_model(folder).config.model_type} is not declared safe to pack" in fact
    scores = Evaluate(name="e", model=student.out(), tasks=DATA.out(), domain="low", env=ENV, sampling=SHORT)
    make(scores, whole)


def test_distillation_with_an_adapter(tmp_path):
    save_model(tiny.model("hybrid", model_type="olmo_hybrid"), tiny.tokenizer(), tmp_path / "model")
    store, student = Store(tmp_path / "s"), recipe(tmp_path / "model", adapter=LoRA(rank=2, alpha=8), steps=2)[2]
    make(student, store)
    assert max(m["sampler_gap"] for m in store.metrics(key(student))) < 1e-4
    load_model(store.path(key(student), "policy"))


def test_a_packed_base_says_so(tmp_path):
    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "model")
    base = Pretrained(name="base", path=str(tmp_path / "model"))
    assert make(base, Store(tmp_path / "s")).facts == {"attention": "packed"}


def test_what_the_plan_counts_is_what_the_model_has(folder):
    found = Pretrained(name="base", path=str(folder)).infer(Types())["policy"]
    model = load_model(folder)
    assert found.architecture == model.config.model_type
    assert found.params == matmul_params(model) == folder_params(folder)


FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"tie_word_embeddings": False},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_names_for_embeddings_and_heads_are_known(name, tmp_path):
    save_model(tiny.model(model_type=name, **FAMILIES[name]), tiny.tokenizer(), tmp_path / "model")
    found = Pretrained(name="base", path=str(tmp_path / "model")).infer(Types())["policy"]
    assert (found.vocab, found.params) == (tiny.VOCAB, matmul_params(load_model(tmp_path / "model")))


# --- what is refused, before anything is loaded ---

REFUSED = [
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is an encoder, which reads both ways"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
    ({"model_type": "llava", "vision_config": {}}, "model of images or sound .*save its text model alone"),
    ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "'vit' is no causal decoder of transformers"),
    ({"model_type": "lama"}, "'lama' is no causal decoder of transformers; did you mean 'llama'"),
    (
        {"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}},
        "'mine' is no causal decoder.*code of the folder's own is not run",
    ),
    ({"model_type": None}, "'None' is no causal decoder"),
    ({"model_type": ["llama"]}, "is no causal decoder"),
    ({"use_bidirectional_attention": True}, "reads both ways"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type 'dynamic'.*set it to"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_is_no_decoder_is_refused_at_plan_time(change, words, tmp_path):
    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": None, "rope_parameters": None, **change}))
    with pytest.raises((SpecError, UserError), match=words) as error:
        Pretrained(name="base", path=str(tmp_path / "model")).infer(Types())
    assert "\n" not in str(error.value)
    assert str(tmp_path / "model") in str(error.value)


def test_a_plan_of_any_base_imports_neither_torch_nor_transformers(folder):
    code = (
        "import sys; from tests.stages.toy import Types; from tutelage.stages.model import Pretrained;"
        f"Pretrained(name='b', path={str(folder)!r}).infer(Types());"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_only_loading_can_see_is_refused_by_the_import(tmp_path):
    save_model(tiny.model(model_type="rwkv", attention_hidden_size=32), tiny.tokenizer(), tmp_path / "model")
    with pytest.raises(UserError, match=r"architecture 'rwkv'.*give another base"):
        make(Pretrained(name="base", path=str(tmp_path / "model")), Store(tmp_path / "s"))
