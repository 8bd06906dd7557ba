"""Where models come from: `NewModel` makes a random one with its tokenizer, `Pretrained` takes a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from tutelage.graph import At, Kind, ModelType, Stage, Type
from tutelage.spec import SpecError, UserError, content_hash, digest, outside
from tutelage.text.tokenizer import CHAT_TEMPLATE, SPECIAL


class NewModel(Stage):
    """A Llama-style decoder with random weights and a character tokenizer made here. Untied or tied head; no biases."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "initialises"

    alphabet: str
    width: int = 96
    layers: int = 3
    heads: int = 4
    mlp: int = 256
    tied: bool = True
    max_positions: int = 512
    seed: int = 0

    @property
    def vocab(self) -> int:
        return len(SPECIAL) + len(dict.fromkeys(self.alphabet))

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        if self.width % (2 * self.heads):
            raise SpecError(f"width {self.width} must be an even multiple of heads {self.heads}")
        params = self.layers * (4 * self.width**2 + 3 * self.width * self.mlp) + self.vocab * self.width
        tokens = digest([*SPECIAL, *dict.fromkeys(self.alphabet)])
        return {"policy": ModelType("llama", tokens, digest(CHAT_TEMPLATE), params, self.vocab)}

    def run(self, ctx: Any) -> None:
        from tutelage.model.folder import make_model, save_model
        from tutelage.text.tokenizer import character_tokenizer

        tokenizer = character_tokenizer(self.alphabet)
        config = {
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        save_model(make_model(config, self.seed), tokenizer, ctx.output("policy"))


class Pretrained(Stage):
    """A local Hugging Face folder as the recipe's base; copied into the store and keyed by its content."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "imports"

    path: str = outside()

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        folder = Path(self.path)
        if not (folder / "config.json").exists():
            raise SpecError(f"path {self.path!r} is no model folder: it has no config.json")
        try:
            config = json.loads((folder / "config.json").read_text())
            settings = json.loads((folder / "tokenizer_config.json").read_text())
        except (OSError, ValueError) as error:
            raise SpecError(f"path {self.path!r}: {error}") from None
        file = folder / "chat_template.jinja"
        template = file.read_text() if file.exists() else settings.get("chat_template")
        if not template:
            raise SpecError(f"path {self.path!r} has no chat template; save one with the tokenizer as chat_template.jinja")
        tokens = [content_hash(folder / n) for n in ("tokenizer.json", "tokenizer.model") if (folder / n).exists()]
        if not tokens:
            raise SpecError(f"path {self.path!r} has no tokenizer.json or tokenizer.model")
        from tutelage.model.headers import folder_params

        return {
            "policy": ModelType(
                config.get("model_type", "?"),
                digest(tokens),
                digest(template),
                folder_params(folder),
                config.get("vocab_size", 0),
                base_key=content_hash(folder),
            )
        }

    def run(self, ctx: Any) -> None:
        from tutelage.model.folder import load_model, load_tokenizer, save_model

        folder = Path(self.path)
        if not folder.is_dir():
            raise UserError(f"{self.path} is gone; put the folder back or give another")
        save_model(load_model(folder), load_tokenizer(folder), ctx.output("policy"))
