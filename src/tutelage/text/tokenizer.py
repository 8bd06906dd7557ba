"""A tokenizer made in the recipe: one token a character, written as a stock ``tokenizer.json``.

Leaves out: learned vocabularies (byte-pair merges); a model folder brings its own.
"""

from __future__ import annotations

from typing import Any

END = "<|end|>"
SPECIAL = ("<|pad|>", END, "<|user|>", "<|assistant|>", "<|unk|>")

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""user turns open with ``<|user|>``, replies with ``<|assistant|>``, and only replies are closed by ``<|end|>``"""


def character_tokenizer(alphabet: str, template: str = CHAT_TEMPLATE) -> Any:
    """A `PreTrainedTokenizerFast` with one token for each character of ``alphabet`` and the special tokens first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *dict.fromkeys(alphabet)]
    core = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token=END,
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
