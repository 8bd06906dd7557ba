"""The whole online stage against the single-file loop: the same parameters after several steps."""

import torch
from safetensors.torch import load_file

from tests.invariants.single_file_loop import grpo
from tests.stages.toy import DATA, INIT, make, rl
from tutelage.graph import key
from tutelage.learn.optim import AdamW
from tutelage.store import Store
from tutelage.text.rows import read_tasks


def test_online_equals_the_single_file_loop(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = Store(tmp_path / "s")
    stage = rl(steps=3, prompts=4, group=4, optimizer=AdamW(lr=3e-3), seed=2)
    make(stage, store)
    start = store.path(key(INIT), "policy")
    model = AutoModelForCausalLM.from_pretrained(start, attn_implementation="eager")
    tasks = [t for t in read_tasks(store.path(key(DATA), "rows")) if t.domain == "low"]
    taste = lambda text: sum(map(ord, text)) % 7 / 7  # noqa: E731
    tokenizer = AutoTokenizer.from_pretrained(start)
    grpo(model, tokenizer, tasks, taste, steps=3, prompts=4, group=4, max_new_tokens=3, lr=3e-3, seed=2)
    mine, before = load_file(store.path(key(stage), "policy") / "model.safetensors"), load_file(start / "model.safetensors")
    theirs = model.state_dict()
    moved = max(float((mine[n] - before[n]).abs().max()) for n in mine)
    apart = max(float((mine[n] - theirs[n]).abs().max()) for n in mine)
    assert moved > 5e-3
    assert apart < 1e-4 * moved + 1e-6, (apart, moved)
    assert torch.equal(before["model.norm.weight"], torch.ones_like(before["model.norm.weight"]))
