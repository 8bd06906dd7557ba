"""PPO-ptx on one page, one sequence at a time and nothing packed: what `PPO` with a replay must be equal to, both models."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.invariants.single_file_loop import sample
from tests.invariants.test_methods_equal_the_loop import logps, taste
from tests.stages.toy import DATA, INIT, make, rl
from tutelage.graph import key
from tutelage.learn.optim import AdamW
from tutelage.rollout.driver import request_seed
from tutelage.stages.fit import batch_order
from tutelage.stages.mixture import Replay
from tutelage.stages.ppo import PPO
from tutelage.store import Store
from tutelage.text.rows import read_rows, read_tasks
from tutelage.text.template import Document

STEPS, PROMPTS, GROUP, SEED, BETA, PTX, ROWS = 3, 4, 2, 2, 0.3, 0.7, 5
FAST = AdamW(lr=3e-3, eps=1e-4)  # with a small eps Adam makes whole steps of gradients that are rounding


def worth(value, tokens, start):
    """What the value model expects before each of the reply's tokens, with gradient."""
    return value(input_ids=torch.tensor([tokens])).logits[0, start - 1 : -1, 0]


def draw(model, ref, value, tokenizer, tasks, step):
    """(tokens, length of the prompt, log-probs, values, advantages, returns), group by group."""
    rollouts = []
    for i in batch_order(len(tasks), PROMPTS, step, SEED * 1009):
        prompt = tokenizer.apply_chat_template(list(tasks[i].messages), add_generation_prompt=True)
        prompt = list(prompt["input_ids"] if hasattr(prompt, "keys") else prompt)
        for r in range(GROUP):
            reply = sample(model, prompt, request_seed(SEED * 1_000_003 + step, tasks[i].id, r), 3)
            ids, start = prompt + reply, len(prompt)
            with torch.no_grad():
                old, other, v = logps(model, ids, start), logps(ref, ids, start), worth(value, ids, start).tolist()
            rewards = (-BETA * (old - other)).tolist()
            rewards[-1] += taste(tokenizer.decode(reply, skip_special_tokens=True))
            advantages, after, value_after = [], 0.0, 0.0
            for reward, now in zip(reversed(rewards), reversed(v), strict=True):
                after = reward + value_after - now + 0.95 * after
                advantages, value_after = [after, *advantages], now
            rollouts.append((ids, start, old, torch.tensor(v), np.array(advantages), np.array(advantages) + v))
    every = np.concatenate([r[4] for r in rollouts])
    return [(*r[:4], (r[4] - every.mean()) / every.std(), r[5]) for r in rollouts]


def policy_loss(model, part):
    total = sum(len(r[2]) for r in part)
    for ids, start, old, _, advantage, _ in part:
        ratio, a = (logps(model, ids, start) - old).exp(), torch.tensor(advantage, dtype=torch.float32)
        (-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / total).backward()


def value_loss(value, part):
    total = sum(len(r[2]) for r in part)
    for ids, start, _, old, _, returns in part:
        now, goal = worth(value, ids, start), torch.tensor(returns, dtype=torch.float32)
        held = torch.maximum(torch.minimum(now, old + 0.2), old - 0.2)
        (0.5 * torch.maximum((now - goal) ** 2, (held - goal) ** 2).sum() / total).backward()


def replay_loss(model, documents, update):
    rows = [documents[i] for i in batch_order(len(documents), ROWS, update, SEED * 1009)]
    total = sum(len(ids) - 1 for ids in rows)
    for ids in rows:
        (-PTX * logps(model, ids, 1).sum() / total).backward()


def train(model, ref, value, tokenizer, tasks, documents, epochs):
    ours, theirs = ([torch.optim.AdamW(m.parameters(), FAST.lr, FAST.betas, FAST.eps, 0.0), m] for m in (model, value))
    for step in range(STEPS):
        rollouts = draw(model, ref, value, tokenizer, tasks, step)
        half = PROMPTS * GROUP // 2
        for i, part in enumerate([rollouts[:half], rollouts[half:]] * epochs):
            policy_loss(model, part)
            replay_loss(model, documents, step * 2 * epochs + i)
            value_loss(value, part)
            for optimizer, m in (ours, theirs):
                torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("epochs", [1, 2])
def test_ppo_equals_the_loop(tmp_path, epochs):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    from tutelage.credit.gae import GAE
    from tutelage.credit.kl import Reference
    from tutelage.credit.reinforce_pp import GlobalNormalization

    store = Store(tmp_path / "s")
    plain = rl()
    same = {"model": plain.model, "tasks": plain.tasks, "domains": plain.domains, "env": plain.env, "sampling": plain.sampling}
    small = {"steps": STEPS, "prompts": PROMPTS, "group": GROUP, "epochs": epochs, "minibatches": 2, "seed": SEED}
    fast = {"optimizer": FAST, "value_optimizer": FAST}
    stage = PPO(
        **{**same, **small, **fast, "name": "ppo", "value": INIT.out(), "reference": INIT.out()},
        credit=(Reference(), GAE(beta=BETA), GlobalNormalization()),
        replay=(Replay(data=DATA.out(), weight=PTX, rows=ROWS, template=Document()),),
    )
    make(stage, store)
    start = store.path(key(INIT), "policy")
    model, ref = (AutoModelForCausalLM.from_pretrained(start, attn_implementation="eager") for _ in range(2))
    value = AutoModelForTokenClassification.from_pretrained(start, num_labels=1, attn_implementation="eager")
    torch.nn.init.zeros_(value.score.weight)
    torch.nn.init.zeros_(value.score.bias)
    before = {"policy": {n: p.clone() for n, p in model.state_dict().items()}, "value": dict(value.state_dict())}
    before["value"] = {n: p.clone() for n, p in before["value"].items()}
    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = store.path(key(DATA), "rows")
    tasks = [t for t in read_tasks(rows) if t.domain == "low"]
    ends = [tokenizer.eos_token_id]
    documents = [ends + tokenizer(r["text"], add_special_tokens=False)["input_ids"] + ends for r in read_rows(rows)]
    train(model, ref, value, tokenizer, tasks, documents, epochs)
    for port, theirs in (("policy", model.state_dict()), ("value", value.state_dict())):
        mine = load_file(store.path(key(stage), port) / "model.safetensors")
        moved = max(float((mine[n] - before[port][n]).abs().max()) for n in mine)
        apart = max(float((mine[n] - theirs[n]).abs().max()) for n in mine)
        assert moved > 5e-3
        assert apart < 1e-4 * moved + 1e-6, (port, apart, moved)
