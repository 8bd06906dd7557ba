"""Between messages and tokens: the chat template of the model, or plain documents for a base model.

A reply's tokens are those that the template adds to the prompt's, so a template must leave the prompt as it was when a
reply follows (a prefix); one that does not is refused. Only reply tokens are trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from tutelage.spec import Spec, UserError
from tutelage.types import Message, Sample, Task


class Chat(Spec):
    """The tokenizer's own chat template. A reply ends with the end-of-sequence token, or with the token that the template
    closes replies with (``<|im_end|>``, ``<end_of_turn>``): in many models these differ."""

    version: ClassVar[int] = 2

    def prompt(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the reply begins."""
        return _templated(tokenizer, messages, add_generation_prompt=True)

    def example(self, tokenizer: Any, messages: Sequence[Message], completion: Sequence[Message]) -> Sample:
        """Prompt and reply as a sample whose mask covers the reply and what closes it."""
        prompt = self.prompt(tokenizer, messages)
        whole = _templated(tokenizer, [*messages, *completion])
        if whole[: len(prompt)] != prompt:
            raise UserError("the chat template changes the prompt once a reply follows; its reply tokens cannot be told apart")
        return _sample(prompt, whole[len(prompt) :])

    def stop_tokens(self, tokenizer: Any) -> frozenset[int]:
        closes = _closing_token(tokenizer, _around_reply(tokenizer, tokenizer.name_or_path or "this tokenizer")[2])
        return frozenset([tokenizer.eos_token_id] if closes is None else [tokenizer.eos_token_id, closes])


class Document(Spec):
    """Plain text, as a base model was pretrained on: the prompt is put into ``format`` and the reply goes on from there."""

    format: str = "{prompt}"
    stop: tuple[str, ...] = ()
    """What ends a reply besides the end-of-sequence token."""

    def prompt(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        text = "\n".join(m["content"] for m in messages)
        return [tokenizer.eos_token_id, *_ids(tokenizer(self.format.format(prompt=text), add_special_tokens=False))]

    def document(self, tokenizer: Any, text: str) -> Sample:
        """A whole document between two end-of-sequence tokens; every token but the first is trained."""
        ids = _ids(tokenizer(text, add_special_tokens=False))
        return _sample([tokenizer.eos_token_id], [*ids, tokenizer.eos_token_id])

    def stop_tokens(self, tokenizer: Any) -> frozenset[int]:
        return frozenset([tokenizer.eos_token_id])


Template = Chat | Document


def reply_sample(prompt: Sequence[int], reply: Sequence[int], task: Task) -> Sample:
    """A sample whose mask covers what a policy drew."""
    sample = _sample(prompt, reply)
    sample.task, sample.group = task, task.id
    return sample


def _sample(prompt: Sequence[int], reply: Sequence[int]) -> Sample:
    import numpy as np

    tokens = np.array([*prompt, *reply], dtype=np.int64)
    return Sample(tokens, np.arange(len(tokens)) >= len(prompt))


def _templated(tokenizer: Any, messages: Sequence[Message], **how: bool) -> list[int]:
    """Token ids of messages. Raises `UserError` where the template refuses them, as some do with a system's turn."""
    from jinja2 import TemplateError

    try:
        return _ids(tokenizer.apply_chat_template(list(messages), tokenize=True, **how))
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"the chat template refuses messages of {roles}: {_line(error)}") from None


def _ids(found: Any) -> list[int]:
    return list(found["input_ids"] if hasattr(found, "keys") else found)


# --- whether a template and a tokenizer fit each other -----------------------------------------------------------------

QUESTION, REPLY = "questionqzx", "replyxzq"
"""Words that no template has of its own."""


def parse_template(source: str, where: str) -> None:
    """Raises `UserError` for a chat template that is no Jinja as transformers reads it, naming the line. Needs no torch."""
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension

    class Generation(Extension):
        """The one tag that transformers adds: what the assistant wrote."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(source)
    except (TemplateSyntaxError, RecursionError) as error:
        line = getattr(error, "lineno", "?")
        raise UserError(f"{where}: line {line} of the chat template does not parse: {_line(error)}") from None


def check_tokenizer(tokenizer: Any, where: str) -> None:
    """Raises `UserError` where a tokenizer lacks what its chat template needs.

    What closes a reply must be one token, or no policy could stop there; and nothing that the template writes may be
    unknown. Other marks may well be spelled in several tokens: some good models (of the Zephyr and Tülu kind) do so.
    """
    parts = _around_reply(tokenizer, where)
    unknown = tokenizer.unk_token_id
    for part in parts:
        if unknown is not None and tokenizer.unk_token not in part and unknown in _plain_ids(tokenizer, part):
            marks = [m for m in re.findall(r"<[^<>\s]+>|\S+", part) if unknown in _plain_ids(tokenizer, m)]
            says = f"the tokenizer has no token for {(marks or [part])[0][:40]!r}, which the chat template writes"
            raise UserError(f"{where}: {says}; add it to the tokenizer, or take the template made for it")
    end = parts[2].strip()
    fix = f"end it with {{{{ eos_token }}}}, which is {tokenizer.eos_token!r}"
    if not end:
        raise UserError(f"{where}: the chat template writes nothing after a reply, so none would ever end; {fix}")
    if _closing_token(tokenizer, parts[2]) is None:
        count = len(_plain_ids(tokenizer, end))
        says = f"the chat template ends a reply with {end[:40]!r}, which the tokenizer splits into {count} tokens"
        raise UserError(f"{where}: {says}; add it to the tokenizer as a special token, or {fix}")


def _around_reply(tokenizer: Any, where: str) -> tuple[str, str, str]:
    """What the template writes before a question, between it and its reply, and after that. Raises `UserError`."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # templates raise whatever they like
        raise UserError(f"{where}: the chat template fails on a question and its reply: {_line(error)}") from None
    before, asked, rest = text.partition(QUESTION)
    between, replied, after = rest.partition(REPLY)
    if not asked or not replied:
        raise UserError(f"{where}: the chat template leaves out a question or its reply; it must write both, in turn")
    return before, between, after


def _closing_token(tokenizer: Any, after: str) -> int | None:
    """The one token that closes a reply; None where what closes it is no token of its own."""
    after = after.strip()
    ids = _plain_ids(tokenizer, after)
    if not ids or (ids[0] == tokenizer.unk_token_id and not after.startswith(tokenizer.unk_token)):
        return None
    own = ids[0] == tokenizer.eos_token_id or ids[0] in tokenizer.added_tokens_decoder
    return ids[0] if own or len(ids) == 1 else None


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return _ids(tokenizer(text, add_special_tokens=False)) if text else []


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
