"""vLLM as a further peer of rollouts on a GPU, where it is installed.

It draws from the same weights, saved as a folder, in the dtype of the bench; replies have their lengths given. Rounding in
bf16 keeps its greedy tokens from being ours, so what is held to is weaker: each must be the likeliest token of a full fp32
forward over what came before it, but for `TIE`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Unequal
from bench.models import tokenizer
from bench.rollout import Load, behind
from tutelage.model.folder import save_model

TIE = 0.5
"""In logits; weights that are not the same are off by several."""
MEMORY = 0.3
"""Share of the GPU that vLLM takes for itself; our models stay beside it."""


def drawn_by(ours: Any, peer: Any, work: Load, dtype: str) -> Callable[[], list[list[int]]]:
    """A call that draws the whole of a load. Raises `Unequal` for another model's tokens."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as place:
        save_model(ours, tokenizer(work.shape), Path(place))
        engine = LLM(place, dtype=dtype, skip_tokenizer_init=True, gpu_memory_utilization=MEMORY, max_num_seqs=work.slots)

    def drawn(temperature: float = 1.0, rows: int = len(work.prompts)) -> list[list[int]]:
        how = [
            SamplingParams(temperature=temperature, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
            for n in work.replies[:rows]
        ]
        asked = [{"prompt_token_ids": list(p)} for p in work.prompts[:rows]]
        return [list(out.outputs[0].token_ids) for out in engine.generate(asked, how, use_tqdm=False)]

    few = min(len(work.prompts), 4)
    gap = behind(peer, work.prompts[:few], drawn(0.0, few))
    if not gap <= TIE:
        raise Unequal(f"rollout, {work.shape}: vLLM's greedy tokens are {gap:.2g} below the likeliest; nothing was timed")
    return drawn
