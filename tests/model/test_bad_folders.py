"""Folders that are no model, or not a whole one, and tokenizers that do not fit their template: one line each, the fix named.

Good folders of the usual kinds must pass: templates like those of ChatML, Llama 3, Zephyr, Mistral and Gemma models.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests import tiny
from tests.stages.toy import Types, make
from tutelage.graph import Goals, key, plan
from tutelage.model.folder import load_model, save_model
from tutelage.spec import UserError
from tutelage.stages.model import Pretrained
from tutelage.store import Store
from tutelage.text.template import Chat, check_tokenizer, parse_template

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_model(tiny.model(), tiny.tokenizer(), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refused(path, plans=False):
    """What a folder is refused with: by the plan, or where ``plans`` only when the stage runs."""
    stage = Pretrained(name="base", path=str(path))
    goals = [Goals(recipe="r", stages=(stage.out(),))]
    if plans:
        plan(goals, lambda k: False)
    with pytest.raises(UserError) as caught:
        make(stage, Store(path.parent / "store")) if plans else plan(goals, lambda k: False)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def edit(file, **change):
    body = json.loads(file.read_text())
    file.write_text(json.dumps({**body, **change}))


def test_a_file_an_empty_folder_and_nothing(tmp_path):
    (tmp_path / "file").write_text("{}")
    assert "is a file; give the folder" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(tmp_path / "empty")
    assert "does not exist" in refused(tmp_path / "gone")


def test_files_that_are_not_there(folder):
    weights = (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no *.safetensors weights (it has pytorch_model.bin)" in refused(folder)
    weights.rename(folder / "part.safetensors")
    assert "has part.safetensors, but neither model.safetensors nor model.safetensors.index.json" in refused(folder)
    (folder / "part.safetensors").rename(folder / "model.safetensors")
    for name, says in (("chat_template.jinja", "has no chat template; save one"), ("tokenizer.json", "has no tokenizer.json")):
        (folder / name).rename(folder / "away")
        assert says in refused(folder)
        (folder / "away").rename(folder / name)
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).unlink()
        assert f"has no {name}" in refused(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_to_a_large_file_is_not_the_file(name, folder):
    (folder / name).write_bytes(POINTER)
    assert f"{name} is a Git LFS pointer" in refused(folder)


def test_weights_that_are_cut_or_foreign(folder):
    file = folder / "model.safetensors"
    good = file.read_bytes()
    for body, says in (
        (good[:-1], f"is cut short: its header speaks of {len(good)} bytes, and it has {len(good) - 1}"),
        (good + b"\0", "is too long"),
        (good[:100], "header is longer than the file"),
        (b"", "header is longer than the file"),
        (good[:8] + b"x" * (len(good) - 8), "is no safetensors file"),
        (b"\x02" + bytes(7) + b"[]", "is no safetensors file"),
    ):
        file.write_bytes(body)
        assert says in refused(folder)


def test_shards_are_all_needed(folder, tmp_path):
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    stage = Pretrained(name="base", path=str(folder))
    assert stage.infer(Types())["policy"].params > 0
    (folder / "consolidated.safetensors").write_bytes(b"another copy that nobody loads")
    params = stage.infer(Types())["policy"].params
    assert params == Pretrained(name="b", path=str(save(tmp_path / "one"))).infer(Types())["policy"].params
    shards[1].rename(tmp_path / "kept")
    assert f"has no {shards[1].name}, which model.safetensors.index.json names" in refused(folder)
    shards[0].rename(shards[1])
    shutil.copy(shards[1], shards[0])
    assert "which model.safetensors.index.json says it has" in refused(folder)


def save(path):
    save_model(tiny.model(), tiny.tokenizer(), path)
    return path


def test_a_model_that_is_not_whole_is_not_filled_with_random_weights(folder):
    from safetensors.torch import load_file, save_file

    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != name}, file, {"format": "pt"})
    assert f"lacks tensor '{name}' of its config.json" in refused(folder, plans=True)
    save_file({**weights, name: weights[name][:3].clone()}, file, {"format": "pt"})
    assert f"has another shape for tensor '{name}'" in refused(folder, plans=True)


def test_a_vocabulary_larger_than_the_embedding(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    more = {**tokenizer["added_tokens"][0], "id": tiny.VOCAB, "content": "<|more|>"}
    edit(folder / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], more])
    assert f"token '<|more|>' has id {tiny.VOCAB}, but the embedding has {tiny.VOCAB} rows" in refused(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(folder / "tokenizer_config.json", eos_token="<|nope|>")
    assert "eos_token '<|nope|>' of tokenizer_config.json is not in tokenizer.json" in refused(folder)
    edit(folder / "tokenizer_config.json", eos_token="<|end|>", extra_special_tokens=["<|more|>"])
    assert f"token '<|more|>' has id {tiny.VOCAB}" in refused(folder, plans=True)
    edit(folder / "config.json", vocab_size=tiny.VOCAB + 3)
    assert f"has vocab_size {tiny.VOCAB + 3}, the embedding {tiny.VOCAB} rows" in refused(folder)


def test_a_tokenizer_that_is_none_or_has_no_end(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)
    assert "has no end-of-sequence token; set eos_token" in refused(folder, plans=True)
    edit(folder / "tokenizer_config.json", eos_token="<|end|>")
    good = (folder / "tokenizer.json").read_text()
    for body, says in (
        ('{"model": ', "cannot be read as JSON"),
        ('{"model": {}}', "is no tokenizer of transformers (KeyError"),
    ):
        (folder / "tokenizer.json").write_text(body)
        assert says in refused(folder)
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(good), "pre_tokenizer": {"type": "None such"}}))
    assert "has no tokenizer that transformers can read" in refused(folder, plans=True)


BAD_TEMPLATES = {
    "open tag": ("a\n{% for m in messages %}{{ m }}", "chat_template.jinja: line 2 of the chat template does not parse", False),
    "no Jinja": ("{{ m ", "does not parse", False),
    "blank": (" \n", "has no chat template", False),
    "raises": ("{{ raise_exception('only in threes') }}", "fails on a question and its reply: only in threes", True),
    "leaves out": ("{{ messages[0]['content'] }}<|end|>", "leaves out a question or its reply", True),
    "never ends": ("{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}", "writes nothing after a reply", True),
    "unknown end": ("{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}", "no token for '<|im_end|>'", True),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_templates_that_cannot_be_used(name, folder):
    template, says, plans = BAD_TEMPLATES[name]
    (folder / "chat_template.jinja").write_text(template)
    assert says in refused(folder, plans=plans)


def test_a_turn_that_the_template_refuses_is_one_line():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + GEMMA
    tokenizer = bpe(template, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>")
    check_tokenizer(tokenizer, "here")
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    for ask in (lambda: Chat().prompt(tokenizer, turns), lambda: Chat().example(tokenizer, turns, turns)):
        with pytest.raises(UserError, match="refuses messages of system, user: no system here"):
            ask()


def test_a_folder_that_changes_after_it_was_keyed_is_not_stored_under_that_key(folder):
    stage = Pretrained(name="base", path=str(folder))
    key(stage)
    (folder / "notes.txt").write_text("new")
    with pytest.raises(UserError, match="changed while the run was going on"):
        make(stage, Store(folder.parent / "s"))


def test_an_older_folder_holds_templates_by_name(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "tool_use", "template": "{{"}, {"name": "default", "template": template}],
    )
    stage = Pretrained(name="base", path=str(folder))
    store = Store(folder.parent / "s")
    make(stage, store)
    assert (store.path(key(stage), "policy") / "chat_template.jinja").read_text() == template
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": template}])
    assert "has no chat template" in refused(folder)


def test_what_transformers_adds_to_jinja_parses():
    parse_template("{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}", "t")


# --- tokenizers and templates of the usual kinds -----------------------------------------------------------------------


def bpe(template, special, eos, **more):
    """A byte-level tokenizer without merges: whatever is not special is spelled in bytes and nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    rest = [t for t in special if t != eos]
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, additional_special_tokens=rest, **more)
    made.chat_template = template
    return made


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
GEMMA = "<bos>{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
GOOD = {
    "chat model of ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", ["<|im_end|>"]),
    "base model with ChatML": (
        CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|endoftext|>",
        ["<|endoftext|>", "<|im_end|>"],
    ),
    "ChatML where only its end is a token": (CHATML, ["<|im_end|>"], "<|im_end|>", ["<|im_end|>"]),
    "Llama 3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>", ["<|eot_id|>"]),
    "Zephyr": (ZEPHYR, ["</s>"], "</s>", ["</s>"]),
    "Mistral": (MISTRAL, ["<s>", "</s>"], "</s>", ["</s>"]),
    "Gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", ["<eos>", "<end_of_turn>"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_usual_templates_pass_and_replies_end_where_they_say(name):
    template, special, eos, stops = GOOD[name]
    tokenizer = bpe(template, special, eos)
    check_tokenizer(tokenizer, "here")
    assert Chat().stop_tokens(tokenizer) == frozenset(tokenizer.convert_tokens_to_ids(stops))


def test_the_end_of_a_reply_must_be_one_token():
    with pytest.raises(
        UserError, match=r"here: the chat template ends a reply with '<\|im_end\|>', which the tokenizer splits into 10"
    ):
        check_tokenizer(bpe(CHATML, ["</s>", "<|im_start|>"], "</s>"), "here")


def test_an_unknown_token_that_is_also_the_end_is_known():
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer = bpe(template, ["<|endoftext|>"], "<|endoftext|>", unk_token="<|endoftext|>")
    check_tokenizer(tokenizer, "here")
    assert Chat().stop_tokens(tokenizer) == {tokenizer.eos_token_id}


FAMILIES = ("gemma", "gemma3", "llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507")


@pytest.mark.parametrize("name", FAMILIES)
def test_real_templates_of_packable_families_pass(name):
    """Those that TRL ships, with every mark that they write for a chat as one token."""
    import re
    from pathlib import Path

    trl = pytest.importorskip("trl")
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    parse_template(template, name)
    marks = sorted(set(re.findall(r"<[a-z_|]+>", template)))
    tokenizer = bpe(template, marks, "<eos>", bos_token="<bos>")
    check_tokenizer(tokenizer, name)
    assert len(Chat().stop_tokens(tokenizer)) == 2
