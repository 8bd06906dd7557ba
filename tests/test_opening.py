"""A model that a run has made, opened by programs that know nothing of this one: transformers and lm-eval, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stages.toy import DATA, INIT
from tutelage.graph import Goals, key, plan
from tutelage.model.attention import Rows
from tutelage.model.folder import load_model, load_tokenizer
from tutelage.model.head import Head
from tutelage.run import run
from tutelage.stages.fit import Fit
from tutelage.store import Store

TEXTS = ("<|user|>a<|assistant|>b", "k:l", "letters and 12 = 3,4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model folder of a tiny Fit, as the runner leaves it, model card included."""
    fit = Fit(name="sft", model=INIT.out(), data=DATA.out(), steps=20, rows=8, checkpoints=(10,))
    store = Store(tmp_path_factory.mktemp("open") / "store")
    done = run(plan([Goals(recipe="open", stages=(fit.out(),))], store.has), store, cores=1)
    assert done.state == "done", done.failed
    return store.path(key(fit), "policy")


def elsewhere(code: str, *words: Any, **env: str) -> Any:
    """What a process without this package prints as JSON."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code += "\nassert not [m for m in sys.modules if m.partition('.')[0] == 'tutelage']"
    command = [sys.executable, "-c", "import json, sys\n" + code, *map(str, words)]
    done = subprocess.run(command, env={**clean, **offline, **env}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V] by our own forward."""
    with torch.no_grad():
        row, pos = torch.tensor(ids)[None], torch.arange(len(ids))[None]
        layout = Rows(torch.tensor([len(ids)]))
        out = model.get_decoder()(input_ids=row, position_ids=pos, use_cache=False, layout=layout)
        return Head.of(model)(out.last_hidden_state[0])


def continued(model: Any, ids: list[int], count: int, end: int) -> list[int]:
    """The likeliest next tokens, one whole forward for each."""
    made: list[int] = []
    while len(made) < count and end not in made:
        made.append(int(own_logits(model, ids + made)[-1].argmax()))
    return made


TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = []
for folder in sys.argv[2:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text in json.loads(sys.argv[1]):
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**ids).logits[0]
        made = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1]:]
        found.append([folder, text, ids["input_ids"][0].tolist(), logits.tolist(), made.tolist()])
chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False)
print(json.dumps({"found": found, "chat": chat, "type": type(model).__name__}))
"""


def test_transformers_gives_the_same_logits_and_goes_on_with_the_same_tokens(folder):
    got = elsewhere(TRANSFORMERS, json.dumps(TEXTS), folder.with_name("policy@10"), folder)
    assert got["type"] == "LlamaForCausalLM"
    assert got["chat"] == "<|user|>a<|assistant|>"
    assert len(got["found"]) == 2 * len(TEXTS)
    for place, text, ids, logits, made in got["found"]:
        model, tokenizer = load_model(Path(place)), load_tokenizer(Path(place))
        assert ids == tokenizer(text)["input_ids"]
        torch.testing.assert_close(torch.tensor(logits), own_logits(model, ids), atol=1e-5, rtol=1e-5)
        assert made == continued(model, ids, 12, tokenizer.eos_token_id)


def test_every_model_folder_has_a_card_that_the_hub_can_read(folder):
    from huggingface_hub import ModelCard

    for place in (folder, folder.with_name("policy@10")):
        found = ModelCard.load(place / "README.md")
        assert found.data.library_name == "transformers"
        assert found.data.pipeline_tag == "text-generation"
        assert {"tutelage", "fit"} <= set(found.data.tags)
        assert "base_model" not in found.data.to_dict()
    data = Store(folder.parents[2]).meta(key(DATA))
    row = next(line for line in found.text.splitlines() if line.startswith("| data | letters:rows |"))
    assert row.split(" | ")[2:] == [key(DATA), f"{data['content']['rows']} |"]
    spec = json.loads(found.text.partition("```json\n")[2].partition("\n```")[0])
    assert (spec["steps"], spec["model"]["ref"]) == (20, "init")


TASK = """
task: follows
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
LM_EVAL = """
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
model = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=4)
done = simple_evaluate(model=model, tasks=["follows"], task_manager=tasks, bootstrap_iters=0)
rows = [(s["doc"]["question"], [r[0] for r in s["filtered_resps"]], s["acc"]) for s in done["samples"]["follows"]]
print(json.dumps({"acc": done["results"]["follows"]["acc,none"], "rows": rows}))
"""


def test_lm_eval_scores_it_as_a_naive_sum_of_log_probabilities_does(folder, tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    asked = []
    for i in range(20):
        choices = [letters[(i + d) % 26] + more for d, more in ((1, ""), (2, "x"), (9, ""), (17, "qz"))]
        asked.append({"question": f"{letters[i]}:", "choices": choices[i % 4 :] + choices[: i % 4], "label": -i % 4})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(a) + "\n" for a in asked))
    (tmp_path / "follows.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    got = elsewhere(LM_EVAL, folder, tmp_path, HF_HOME=str(tmp_path / "hf"))

    model, tokenizer = load_model(folder), load_tokenizer(folder)
    right = 0
    theirs = {question: values for question, values, _ in got["rows"]}
    for one in asked:
        ids = tokenizer(one["question"])["input_ids"]
        sums = []
        for choice in one["choices"]:
            more = tokenizer(choice)["input_ids"]
            logp = own_logits(model, ids + more).log_softmax(-1)
            sums.append(sum(float(logp[len(ids) - 1 + j, token]) for j, token in enumerate(more)))
        assert theirs[one["question"]] == pytest.approx(sums, abs=1e-4)
        right += max(range(4), key=lambda c, sums=sums: sums[c]) == one["label"]
    assert 0 < right < len(asked), "a task that tells nothing"
    assert got["acc"] == pytest.approx(right / len(asked))
