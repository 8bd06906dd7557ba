"""Between messages and tokens: the chat template of the model, or plain documents for a base model.

A reply's tokens are those that the template adds to the prompt's, so a template must leave the prompt as it was when a
reply follows (a prefix); one that does not is refused. Only reply tokens are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.spec import Spec, UserError
from tutelage.types import Message, Sample, Task


class Chat(Spec):
    """The tokenizer's own chat template."""

    def prompt(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the reply begins."""
        return _ids(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True))

    def example(self, tokenizer: Any, messages: Sequence[Message], completion: Sequence[Message]) -> Sample:
        """Prompt and reply as a sample whose mask covers the reply and what closes it."""
        prompt = self.prompt(tokenizer, messages)
        whole = _ids(tokenizer.apply_chat_template([*messages, *completion], tokenize=True))
        if whole[: len(prompt)] != prompt:
            raise UserError("the chat template changes the prompt once a reply follows; its reply tokens cannot be told apart")
        return _sample(prompt, whole[len(prompt) :])

    def stop_tokens(self, tokenizer: Any) -> frozenset[int]:
        return frozenset([tokenizer.eos_token_id])


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


def _ids(found: Any) -> list[int]:
    return list(found["input_ids"] if hasattr(found, "keys") else found)
