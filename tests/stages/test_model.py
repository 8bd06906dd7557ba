"""Where models come from: what a folder must have is said before any work; and tables that name what is not there."""

import json

import pytest

from tests import tiny
from tests.stages.toy import DATA, INIT, Types, make
from tutelage.graph import Goals, Table, key, plan
from tutelage.spec import SpecError, UserError, build
from tutelage.stages.model import NewModel, Pretrained
from tutelage.store import Store


@pytest.fixture
def folder(tmp_path):
    from tutelage.model.folder import save_model

    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_folder_is_a_base(folder, tmp_path):
    stage = Pretrained(name="base", path=str(folder))
    found = stage.infer(Types())["policy"]
    assert (found.architecture, found.vocab) == ("llama", tiny.VOCAB)
    store = Store(tmp_path / "s")
    make(stage, store)
    assert (store.path(key(stage), "policy") / "model.safetensors").exists()


def test_the_key_is_the_content_and_not_the_path(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    before = key(Pretrained(name="base", path=str(folder)))
    folder.rename(moved)
    assert key(Pretrained(name="base", path=str(moved))) == before
    (moved / "generation_config.json").write_text("{}")
    assert key(Pretrained(name="base", path=str(moved))) != before


BROKEN = {
    "config.json": (None, "has no config.json"),
    "tokenizer_config.json": (None, "has no tokenizer_config.json"),
    "tokenizer.json": (None, "has no tokenizer.json"),
    "chat_template.jinja": (None, "no chat template"),
    "model.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "header is longer than the file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_lacks_something_is_refused_at_plan_time(name, folder):
    content, words = BROKEN[name]
    (folder / name).unlink()
    if content:
        (folder / name).write_bytes(content)
    with pytest.raises((SpecError, UserError), match=words):
        Pretrained(name="base", path=str(folder)).infer(Types())


def test_no_weights_no_object_and_another_architecture_are_refused(folder):
    stage = Pretrained(name="base", path=str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(UserError, match="'vit' is no causal decoder"):
        stage.infer(Types())
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        stage.infer(Types())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors weights"):
        stage.infer(Types())


def test_another_end_token_is_another_tokenizer(folder):
    before = Pretrained(name="base", path=str(folder)).infer(Types())["policy"].tokenizer_key
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|user|>"}))
    assert Pretrained(name="base", path=str(folder)).infer(Types())["policy"].tokenizer_key != before


@pytest.mark.parametrize("field", ["width", "layers", "heads", "mlp", "max_positions"])
def test_sizes_that_make_no_model_are_refused(field):
    with pytest.raises(SpecError, match=field):
        build(NewModel, {"name": "init", "alphabet": "ab", field: 0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"before": "sfft"}, "table.before names row 'sfft'.*did you mean 'sft'"),
        ({"teachers": {"low": "nobody"}}, "table.teachers.low"),
        ({"teachers": {"hihg": "sft"}}, "domain 'hihg'"),
        ({"controls": ("x",)}, "table.controls.0"),
    ],
)
def test_a_table_may_name_only_what_it_has(change, words):
    fields = {"rows": {"sft": {"low": DATA.out()}}, "before": "sft", "after": "sft", "teachers": {"low": "sft"}, **change}
    goals = Goals(recipe="r", stages=(INIT.out(),), table=Table(**fields))
    with pytest.raises(SpecError, match=words):
        plan([goals], lambda k: False)
