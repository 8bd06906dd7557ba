"""Templates and the character tokenizer: masks, prefixes, round trips, and templates that cannot be trained with."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tutelage.spec import UserError
from tutelage.text.template import Chat, Document
from tutelage.text.tokenizer import SPECIAL, character_tokenizer

TOKENIZER = tiny.tokenizer()
USER, REPLY = [{"role": "user", "content": "12+30"}], [{"role": "assistant", "content": "42"}]


def test_only_the_reply_and_its_end_are_trained():
    sample = Chat().example(TOKENIZER, USER, REPLY)
    assert TOKENIZER.decode(sample.tokens) == "<|user|>12+30<|assistant|>42<|end|>"
    assert TOKENIZER.decode(sample.tokens[sample.mask]) == "42<|end|>"


def test_an_earlier_reply_in_the_prompt_is_not_trained():
    prompt = [*USER, *REPLY, {"role": "user", "content": "more"}]
    sample = Chat().example(TOKENIZER, prompt, REPLY)
    assert TOKENIZER.decode(sample.tokens[sample.mask]) == "42<|end|>"


def test_a_prompt_is_what_training_saw_before_the_reply():
    """Student, teacher and trainer see the same ids."""
    prompt, sample = Chat().prompt(TOKENIZER, USER), Chat().example(TOKENIZER, USER, REPLY)
    assert sample.tokens[: len(prompt)].tolist() == prompt


def test_a_template_that_rewrites_the_prompt_is_refused():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}+{% endif %}"
    with pytest.raises(UserError, match="changes the prompt"):
        Chat().example(character_tokenizer(tiny.ALPHABET, template), USER, REPLY)


def test_documents_open_and_close_with_the_end_token():
    sample = Document().document(TOKENIZER, "abc")
    assert TOKENIZER.decode(sample.tokens) == "<|end|>abc<|end|>"
    assert sample.mask.tolist() == [False, True, True, True, True]
    prompt = Document(format="Q: {prompt}\nA: ").prompt(character_tokenizer("QA: \n12+30"), USER)
    assert len(prompt) == 1 + len("Q: 12+30\nA: ")


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=tiny.ALPHABET, max_size=30))
def test_characters_survive_the_round_trip(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_an_unknown_character_is_one_token_and_specials_are_not_spelled_out():
    ids = TOKENIZER("a€b<|end|>", add_special_tokens=False)["input_ids"]
    assert ids == [5, TOKENIZER.unk_token_id, 6, TOKENIZER.eos_token_id]


def test_the_saved_tokenizer_is_stock(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.apply_chat_template(USER, tokenize=False, add_generation_prompt=True) == "<|user|>12+30<|assistant|>"
    assert again("12+30")["input_ids"] == TOKENIZER("12+30")["input_ids"]
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert [w for w, i in sorted(vocabulary.items(), key=lambda p: p[1])][: len(SPECIAL)] == list(SPECIAL)
