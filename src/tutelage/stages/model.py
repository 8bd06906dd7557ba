"""Where models come from: `NewModel` makes a random one with its tokenizer, `Pretrained` takes a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from tutelage.graph import At, Kind, ModelType, Stage, Type
from tutelage.spec import SpecError, UserError, content_hash, digest, outside
from tutelage.stages.files import need_unchanged
from tutelage.text.tokenizer import CHAT_TEMPLATE, SPECIAL


class NewModel(Stage):
    """A Llama-style decoder with random weights and a character tokenizer made here. Untied or tied head; no biases."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "initialises"
    holds_models: ClassVar[bool] = True

    alphabet: str = Field(min_length=1)
    width: int = Field(96, ge=2)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    mlp: int = Field(256, ge=1)
    tied: bool = True
    max_positions: int = Field(512, ge=1)
    seed: int = Field(0, ge=0)

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
    """A local Hugging Face folder of a causal decoder as the recipe's base; copied into the store and keyed by its content.

    What is not declared safe to pack takes the generic path (model/padded.py): the fact ``attention`` says so, and the import
    holds the model to what that path rests on.
    """

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "imports"
    holds_models: ClassVar[bool] = True

    path: str = outside()

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        from tutelage.model.headers import (
            SPECIAL,
            chat_template,
            check_vocabulary,
            folder_params,
            need_decoder,
            need_folder,
            read_object,
        )

        folder = Path(self.path)
        need_folder(folder)
        config, settings = (read_object(folder / f"{name}.json") for name in ("config", "tokenizer_config"))
        need_decoder(folder, config)
        template = chat_template(folder, settings)
        files = [folder / n for n in ("tokenizer.json", "tokenizer.model") if (folder / n).exists()]
        if not files:
            raise SpecError(f"{self.path} has no tokenizer.json or tokenizer.model; save the tokenizer beside the model")
        params = folder_params(folder)
        check_vocabulary(folder, config, settings)
        special = {k: settings.get(k) for k in (*SPECIAL[:3], "add_bos_token")}
        tokens = digest([special, *(content_hash(f) for f in files)])
        base = content_hash(folder)
        return {
            "policy": ModelType(config["model_type"], tokens, digest(template), params, config["vocab_size"], base_key=base)
        }

    def run(self, ctx: Any) -> None:
        from tutelage.model.folder import load_model, load_tokenizer, save_model
        from tutelage.model.headers import attention
        from tutelage.model.padded import is_packed, prove
        from tutelage.text.template import check_tokenizer

        folder = Path(self.path)
        if not folder.is_dir():
            raise UserError(f"{self.path} is gone; put the folder back or give another")
        tokenizer = load_tokenizer(folder)
        check_tokenizer(tokenizer, self.path)
        model = load_model(folder)
        rows, last = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
        if last >= rows:
            token = tokenizer.convert_ids_to_tokens(last)
            raise UserError(
                f"{self.path}: token {token!r} has id {last}, but the embedding has {rows} rows; "
                "take the model's own tokenizer, or resize its embedding"
            )
        if not is_packed(model):
            prove(model, self.path)
        config = model.config.get_text_config()
        ctx.facts["attention"] = attention(config.model_type, getattr(config, "rope_parameters", None))
        need_unchanged(self, ctx)
        save_model(model, tokenizer, ctx.output("policy"))
