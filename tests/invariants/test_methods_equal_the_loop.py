"""`Online` with corrections, KL and several updates a step against plain loops: one sequence at a time, nothing packed."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.invariants.single_file_loop import sample
from tests.stages.toy import DATA, INIT, make, rl
from tutelage.credit.group import GroupRelative
from tutelage.credit.kl import Reference
from tutelage.graph import key
from tutelage.learn.optim import AdamW
from tutelage.losses.correction import TruncatedIS
from tutelage.losses.kl import K3
from tutelage.losses.policy import DAPO
from tutelage.rollout.driver import request_seed
from tutelage.stages import methods
from tutelage.stages.fit import batch_order
from tutelage.store import Store
from tutelage.text.rows import read_tasks

STEPS, PROMPTS, GROUP, LR, SEED = 3, 4, 4, 3e-3, 2


def taste(text):
    return sum(map(ord, text)) % 7 / 7


def logps(model, tokens, start):
    """Of the reply's tokens, with gradient."""
    logp = model(input_ids=torch.tensor([tokens])).logits[0, start - 1 : -1].log_softmax(-1)
    return logp.gather(1, torch.tensor(tokens[start:])[:, None])[:, 0]


def draw(model, ref, tokenizer, tasks, step):
    """Groups of (tokens, length of the prompt, reward, log-probs at the start, log-probs of the reference)."""
    groups = []
    for i in batch_order(len(tasks), PROMPTS, step, SEED * 1009):
        prompt = tokenizer.apply_chat_template(list(tasks[i].messages), add_generation_prompt=True)
        prompt = list(prompt["input_ids"] if hasattr(prompt, "keys") else prompt)
        seeds = [request_seed(SEED * 1_000_003 + step, tasks[i].id, r) for r in range(GROUP)]
        replies = [sample(model, prompt, s, 3) for s in seeds]
        with torch.no_grad():
            both = [(logps(model, prompt + r, len(prompt)), logps(ref, prompt + r, len(prompt))) for r in replies]
        text = [tokenizer.decode(r, skip_special_tokens=True) for r in replies]
        groups.append([(prompt + r, len(prompt), taste(s), *b) for r, s, b in zip(replies, text, both, strict=True)])
    return groups


def decoupled(model, groups):
    """DAPO at the trainer's own start with k3 of 0.2, two updates; the weights are 1 since the sampler is exact."""
    for half in (groups[:2], groups[2:]):
        tokens = sum(len(x[0]) - x[1] for g in half for x in g)
        for group in half:
            mean = np.mean([x[2] for x in group])
            for ids, start, reward, old, ref in group:
                logp, a = logps(model, ids, start), reward - mean
                ratio = (logp - old).exp()
                gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
                k3 = (ref - logp).exp() - 1 - (ref - logp)
                ((0.2 * k3 - gain).sum() / tokens).backward()
        yield


def rloo(model, groups):
    """Leave-one-out with 0.1 of k1 in the reward, two updates."""
    for half in (groups[:2], groups[2:]):
        for group in half:
            rewards = np.array([x[2] - 0.1 * float((x[3] - x[4]).sum()) for x in group])
            for i, (ids, start, *_) in enumerate(group):
                a = rewards[i] - np.delete(rewards, i).mean()
                (-a * logps(model, ids, start).sum() / (2 * GROUP)).backward()
        yield


DECOUPLED = {
    "credit": (GroupRelative(scale="none", drop_uniform=False), Reference()),
    "loss": DAPO(correction=TruncatedIS(), kl=K3(beta=0.2)),
}


@pytest.mark.parametrize(
    ("fields", "updates"), [(DECOUPLED, decoupled), (methods.rloo(beta=0.1), rloo)], ids=["decoupled", "rloo"]
)
def test_online_equals_the_loop(fields, updates, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = Store(tmp_path / "s")
    small = {"steps": STEPS, "prompts": PROMPTS, "group": GROUP, "minibatches": 2, "seed": SEED, "optimizer": AdamW(lr=LR)}
    stage = rl(**small, **fields, reference=INIT.out())
    make(stage, store)
    start = store.path(key(INIT), "policy")
    model, ref = (AutoModelForCausalLM.from_pretrained(start, attn_implementation="eager") for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(start)
    tasks = [t for t in read_tasks(store.path(key(DATA), "rows")) if t.domain == "low"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(STEPS):
        for _ in updates(model, draw(model, ref, tokenizer, tasks, step)):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    mine, before = load_file(store.path(key(stage), "policy") / "model.safetensors"), load_file(start / "model.safetensors")
    theirs = model.state_dict()
    moved = max(float((mine[n] - before[n]).abs().max()) for n in mine)
    apart = max(float((mine[n] - theirs[n]).abs().max()) for n in mine)
    assert moved > 5e-3
    assert apart < 1e-3 * moved, (apart, moved)
