"""GRPO on one page, without packing, engine, driver, credit or learner: what `Online` must be equal to.

One sequence at a time through transformers' own eager attention, the whole sequence again for every token. Only what
*defines* a draw is shared with the project: the seed of a request, its uniform numbers and the order of the prompts.
"""

from __future__ import annotations

import numpy as np
import torch

from tutelage.rollout.draw import uniforms
from tutelage.rollout.driver import request_seed
from tutelage.stages.fit import batch_order


def grpo(model, tokenizer, tasks, reward, *, steps, prompts, group, max_new_tokens, lr, seed, clip=1.0):
    """Trains ``model`` in place; ``reward(text) -> float``. Token-level loss, one on-policy update a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        picked = [tasks[i] for i in batch_order(len(tasks), prompts, step, seed * 1009)]
        rollouts = []  # (tokens, length of the prompt, advantage)
        for task in picked:
            prompt = tokenizer.apply_chat_template(list(task.messages), add_generation_prompt=True)
            prompt = list(prompt["input_ids"] if hasattr(prompt, "keys") else prompt)
            draw_seed = seed * 1_000_003 + step
            replies = [sample(model, prompt, request_seed(draw_seed, task.id, r), max_new_tokens) for r in range(group)]
            rewards = np.array([reward(tokenizer.decode(r, skip_special_tokens=True)) for r in replies])
            advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            rollouts += [(prompt + r, len(prompt), a) for r, a in zip(replies, advantages, strict=True)]
        total = sum(len(tokens) - start for tokens, start, _ in rollouts)
        for tokens, start, advantage in rollouts:
            logits = model(input_ids=torch.tensor([tokens])).logits[0, start - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(tokens[start:])[:, None])
            (-float(advantage) * logp.sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def sample(model, prompt, seed, max_new_tokens, eos=1):
    """One reply at temperature 1, by the inverse of the cumulative distribution."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        p = model(input_ids=torch.tensor([tokens])).logits[0, -1].double().softmax(-1)
        u = uniforms(np.array([seed], np.uint64), np.array([len(tokens) - len(prompt)]))[0]
        tokens.append(int(torch.searchsorted(p.cumsum(0), torch.tensor(u, dtype=torch.float64), right=True)))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]
