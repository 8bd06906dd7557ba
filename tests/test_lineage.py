"""Lineage: roles of edges, descent against a search through all paths, what is gone, cards, pictures, and the command."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tutelage import cli
from tutelage.ancestry import HOW, STRENGTH, Ancestry, Link, data_of, gather, nearest_common, settings, ways
from tutelage.card import card, hub_name
from tutelage.store import Store

MODEL, DATA, SCORES = ({"kind": kind} for kind in ("model", "data", "scores"))
Edges = dict[str, tuple[str, str]]


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return Store(tmp_path / "store")


def put(store: Store, stage: str, outputs: dict[str, Any], edges: Edges | None = None, **more: Any) -> dict[str, Any]:
    """An artifact's meta, as the runner writes it; ``edges`` are field -> (stage, port)."""
    ins = [{"path": f, "key": key_of(n), "port": p, "step": None, "name": n} for f, (n, p) in (edges or {}).items()]
    kind = {"model": "stages.fit.Fit", "data": "stages.tasks.TaskSplits"}
    body = {
        **{
            "key": key_of(stage),
            "name": stage,
            "kind": kind.get(next(iter(outputs.values()))["kind"], "stages.evaluate.Evaluate"),
        },
        **{"version": 1, "inputs": ins, "outputs": outputs, "record": {"kind": "stages.fit.Fit", "name": stage}, "facts": {}},
        **{"cost": {"flops": 1e9, "tokens": {"trained": 1000}}, "seconds": 2.0, "finished": 1e9, "host": "here"},
        **{"code": "abc1234", "versions": {"torch": "2"}, "threads": 1},
        **{"content": {port: f"hash-of-{stage}-{port}" for port in outputs}},
        **more,
    }
    folder = store.folder(body["key"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "artifact.json").write_text(json.dumps(body))
    return body


def key_of(name: str) -> str:
    return (name.replace(" ", "") * 32)[:32]


def small(store: Store) -> None:
    """Two branches of one base, a student of both, data that one of them wrote, a control, a measurement."""
    put(store, "tasks", {p: {**DATA, "rows": 5} for p in ("gold", "rl", "dev", "heldout")})
    put(store, "base", {"policy": MODEL})
    put(
        store,
        "sft",
        {"policy": MODEL},
        {"model": ("base", "policy"), "data": ("tasks", "gold"), "select.tasks": ("tasks", "dev")},
    )
    for name in ("left", "right"):
        put(store, name, {"policy": MODEL}, {"model": ("sft", "policy"), "tasks": ("tasks", "rl")})
    teachers = {f"teachers.{n}": (n, "policy") for n in ("left", "right")}
    put(store, "mopd", {"policy": MODEL}, {"model": ("sft", "policy"), "tasks": ("tasks", "rl"), **teachers})
    put(store, "traces", {"rows": DATA}, {"policy": ("left", "policy")})
    put(store, "copy", {"policy": MODEL}, {"model": ("base", "policy"), "data": ("traces", "rows")})
    put(store, "control", {"policy": MODEL}, {"model": ("sft", "policy"), "budget.0": ("mopd", "policy")})
    put(store, "score", {"scores": SCORES}, {"model": ("mopd", "policy"), "tasks": ("tasks", "heldout")})


def of(store: Store, name: str) -> Ancestry:
    return gather(store, store.meta(key_of(name)))


def say(capsys: Any, *words: str) -> tuple[int, str, str]:
    """(exit code, output, errors) of a command."""
    sys.argv = ["tutelage", *words]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr()
    return ended.value.code or 0, out.out, out.err


# --- roles and descent ---------------------------------------------------------------------------------------------------


def test_a_role_tells_weights_from_words_and_training_from_choosing(store):
    small(store)
    roles = {(link.child, link.path): link.role for name in ("copy", "control", "score") for link in of(store, name)}
    assert roles[key_of("sft"), "model"] == "parent"
    assert roles[key_of("sft"), "data"] == "data"
    assert roles[key_of("sft"), "select.tasks"] == "selection"
    assert roles[key_of("mopd"), "teachers.left"] == "teacher"
    assert roles[key_of("traces"), "policy"] == "sampler"
    assert roles[key_of("score"), "model"] == "measured"
    assert roles[key_of("control"), "budget.0"] == "budget"


def chance(seed: int) -> Ancestry:
    """A random graph of stages with edges of every role."""
    rng = random.Random(seed)
    fields = ["model", "data", "teachers.x", "select.tasks", "budget.0", "reference"]
    metas: dict[str, Any] = {}
    for n in range(rng.randint(2, 9)):
        edges = (
            [(str(rng.randrange(n)), f) for f in rng.sample(fields, rng.randint(0, 3)) for _ in range(rng.randint(1, 2))]
            if n
            else []
        )
        ports = ("policy", "extra")
        ins = [{"path": f, "key": k, "port": rng.choice(ports), "step": None, "name": k} for k, f in edges]
        metas[str(n)] = {"key": str(n), "name": str(n), "outputs": {"policy": MODEL}, "inputs": ins}
    return Ancestry(max(metas, key=int), metas)


def every_path(graph: Ancestry, key: str, port: str) -> Iterator[tuple[Link, ...]]:
    """All paths from the root to a port, by exhaustion."""
    stack: list[tuple[Link, ...]] = [(link,) for link in graph.links[graph.root]]
    while stack:
        path = stack.pop()
        if path[-1].key == key and (not port or path[-1].port == port):
            yield path
        stack.extend((*path, link) for link in graph.links[path[-1].key])


def test_of_several_trials_only_the_published_one_is_a_parent(store):
    small(store)
    edges = {"candidates.teacher lr 0.1": ("left", "policy"), "candidates.lr 0.2": ("right", "policy")}
    facts = {"selected": {"candidate": "lr 0.2", "dev": 0.5}}
    put(store, "best", {"policy": MODEL}, {**edges, "select_on": ("tasks", "dev")}, facts=facts)
    assert {e.name: e.role for e in of(store, "best").links[key_of("best")]} == {
        "right": "parent",
        "left": "selection",
        "tasks": "selection",
    }


@pytest.mark.parametrize("seed", range(60))
def test_ways_are_the_strongest_then_shortest_of_all_paths(seed):
    graph = chance(seed)
    names = list(HOW)
    for key in graph.metas:
        for port in ("", "policy", "extra"):
            best: dict[str, tuple[int, int]] = {}
            for path in every_path(graph, key, port):
                value = max(STRENGTH[link.role] for link in path), len(path)
                best[path[0].role] = min(value, best.get(path[0].role, value))
            found = ways(graph, key, port)
            assert {w.links[0].role: (names.index(w.how), len(w.links)) for w in found} == best
            assert [names.index(w.how) for w in found] == sorted(names.index(w.how) for w in found)
            for way in found:
                assert way.links[0].child == graph.root
                assert all(a.key == b.child for a, b in zip(way.links, way.links[1:], strict=False))
                assert way.links[-1].key == key
                assert port in ("", way.links[-1].port)


@pytest.mark.parametrize("seed", range(40))
def test_nearest_common_ancestors_have_no_common_one_below_them(seed):
    graph = chance(seed)
    one, other = (Ancestry(key, graph.metas) for key in random.Random(seed).choices(list(graph.metas), k=2))

    def flows(above: Ancestry) -> set[str]:
        real = {k for k in above.metas for p in every_path(above, k, "") if all(e.role != "budget" for e in p)}
        return real | {above.root}

    common = flows(one) & flows(other)
    nearest = {c for c in common if not any(c in flows(Ancestry(d, graph.metas)) for d in common - {c})}
    assert set(nearest_common(one, other)) == nearest


def test_data_is_listed_once_a_port_with_what_only_bounds_compute_left_out(store):
    small(store)
    assert {link.label for link in data_of(of(store, "mopd"))} == {"tasks:gold", "tasks:dev", "tasks:rl"}
    assert {link.label for link in data_of(of(store, "control"))} == {"tasks:gold", "tasks:dev"}
    assert {link.label for link in data_of(of(store, "copy"))} == {"traces:rows", "tasks:gold", "tasks:dev", "tasks:rl"}


@pytest.mark.parametrize(
    ("one", "two", "code", "sentence", "path"),
    [
        ("mopd", "base", 0, "yes, by weights: the weights of mopd began as those of base", "mopd ← parent sft ← parent base"),
        ("mopd", "left", 0, "yes, by teaching: mopd learned from left", "mopd ← teacher left"),
        ("mopd", "tasks:gold", 0, "yes, by data: the weights of mopd were trained", "← parent sft ← data tasks:gold"),
        ("mopd", "tasks:dev", 0, "yes, by selection: tasks:dev only helped to choose", "sft ← selection tasks:dev"),
        ("copy", "left", 0, "yes, by teaching: copy learned from what was made with left", "copy ← data traces ← sampler left"),
        ("traces", "left", 0, "yes, by teaching: traces was written by left", "traces ← sampler left"),
        ("score", "mopd", 0, "yes, by measuring: score measures mopd", "score ← measured mopd"),
        ("mopd", "mopd", 0, "yes: mopd and mopd come from the same stage", ""),
        ("control", "mopd", 1, "no: control does not descend from mopd, which only bounds its", "control ← budget mopd"),
        ("control", "left", 1, "no: control does not descend from left, which only bounds", "budget mopd ← teacher left"),
        ("sft", "mopd", 1, "no, the other way round: the weights of mopd began as those of sft", "mopd ← parent sft"),
        ("left", "right", 1, "no: left does not descend from right, nor right from left", "nearest in common: sft"),
        ("mopd", "tasks:heldout", 1, "no: mopd does not descend from tasks:heldout", "tasks:dev, tasks:gold, tasks:rl of"),
    ],
)  # fmt: skip
def test_the_answer_and_its_exit_code(store, capsys, one, two, code, sentence, path):
    small(store)
    got, out, err = say(capsys, "lineage", one, "--to", two)
    assert (got, err) == (code, "")
    assert out.startswith(sentence)
    assert path in out
    got, out, _ = say(capsys, "lineage", one, "--to", two, "--json")
    body = json.loads(out)
    assert (got, body["descends"]) == (code, not code)
    assert body["answer"].startswith(sentence)


def test_every_kind_of_way_is_shown_and_which_data_both_saw(store, capsys):
    small(store)
    lines = say(capsys, "lineage", "mopd", "--to", "sft")[1].splitlines()
    assert [" ".join(line.split()) for line in lines[1:3]] == [
        "by weights: mopd ← parent sft",
        "by teaching: mopd ← teacher left ← parent sft (and 1 more by teacher)",
    ]
    shared = [" ".join(line.split()) for line in lines[lines.index("data of sft that is in mopd too:") + 1 :]]
    assert shared == [
        "tasks:gold by data: mopd ← parent sft ← data tasks:gold",
        "tasks:dev by selection: mopd ← parent sft ← selection tasks:dev",
    ]
    out = say(capsys, "lineage", "copy", "--to", "control")[1]
    assert "data of control that is in copy too:" in out, "though the two share no more than a base"
    out = say(capsys, "lineage", "base", "--to", "right")[1]
    assert out.splitlines()[-1] == "data of right that is not: tasks:rl, tasks:gold, tasks:dev"


def test_replicates_are_called_by_their_seeds(store, capsys):
    put(store, "tasks", {"gold": DATA})
    for seed in (0, 1):
        for name, edges in (("sft", {"data": ("tasks", "gold")}), ("rl", {"model": (f"sft{seed}", "policy")})):
            put(store, f"{name}{seed}", {"policy": MODEL}, edges, name=name)
        keys = {"sft": key_of(f"sft{seed}"), "rl": key_of(f"rl{seed}")}
        store.new_run("r", {"goals": [{"seed": seed, "record": {}, "keys": keys}]})
    out = say(capsys, "lineage", "rl@0", "--to", "sft@1")[1]
    assert "no: rl@0 does not descend from sft@1, nor sft@1 from rl@0" in out
    assert "rl@0 ← parent sft@0 ← data tasks" in out
    out = say(capsys, "lineage", "rl", "--to", key_of("sft0"))[1]
    assert "rl@1 (one of 2 seeds: rl@0, rl@1)" in out
    assert "no: rl does not descend from sft@0, nor sft@0 from rl" in out


# --- the tree ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_tree_has_one_line_for_each_stage_and_names_every_edge(store, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    small(store)
    code, out, _ = say(capsys, "lineage", "control", "--short")
    assert code == 0
    assert all(len(line) <= int(columns) for line in out.splitlines() if not line.startswith("files:"))
    for name in ("tasks", "base", "sft", "left", "right", "mopd", "control"):
        assert sum(f"  {key_of(name)[:8]}  " in line for line in out.splitlines()) == 1, name
    for link in of(store, "control"):
        assert f"{link.role} {link.label}" in out
    assert "2 stages" not in out
    assert "4 stages, 4.0 GFLOP, 8.0 s" in out, "what only bounds compute is no cost of what was made"
    assert "3 stages more only bound its compute" in out


def test_where_hosts_differ_every_line_has_its_own(store, capsys):
    small(store)
    assert "on here, code abc1234" in say(capsys, "lineage", "sft", "--short")[1]
    put(store, "base", {"policy": MODEL}, host="elsewhere")
    out = say(capsys, "lineage", "sft", "--short")[1]
    assert "on here" not in out
    assert next(line for line in out.splitlines() if "base:policy" in line).endswith("elsewhere")


def test_lineage_tells_the_spec_by_what_differs_and_the_content(store, capsys):
    from tutelage.graph import Goals, record
    from tutelage.learn.optim import AdamW
    from tutelage.stages.budget import Budget
    from tutelage.stages.fit import Fit
    from tutelage.stages.model import NewModel
    from tutelage.stages.tasks import TaskSplits
    from tutelage.tasks.gym import Sum

    tasks = TaskSplits(name="tasks", domains=(Sum(name="sum", share=0.5),))
    start = NewModel(name="base", alphabet="abc")
    budget = Budget(of=(start.out(),), share=0.5)
    more = {"steps": 7, "optimizer": AdamW(betas=(0.8, 0.9)), "budget": budget}
    fit = Fit(name="sft", model=start.out(), data=tasks.out("gold"), **more)
    rec = record(Goals(recipe="r", stages=(fit.out(),)))["stages"]
    told = {"steps": 7, "optimizer.betas": [0.8, 0.9], "budget": "Budget", "budget.share": 0.5}
    assert settings(rec["sft"]) == told
    assert settings(rec["tasks"]) == {"domains.0": "Sum", "domains.0.share": 0.5}
    assert settings(rec["base"]) == {"alphabet": "abc"}
    assert settings({"kind": "gone.away.Stage", "name": "x", "a": 1, "b": {"ref": "y"}}) == {"a": 1}

    put(store, "sft", {"policy": MODEL}, record=rec["sft"])
    out = say(capsys, "lineage", "sft")[1]
    for line in ("steps = 7", "optimizer.betas = [0.8, 0.9]", "content policy hash-of-sft-policy", f"key {key_of('sft')}"):
        assert line in [each.strip() for each in out.splitlines()]
    assert "code abc1234 on here" in out
    assert "with torch 2" in out


def test_what_is_gone_or_damaged_is_named_and_the_rest_is_shown(store, capsys, tmp_path):
    small(store)
    (store.folder(key_of("sft")) / "artifact.json").unlink()
    (store.folder(key_of("tasks")) / "artifact.json").write_text('{"name": "tasks", "inputs": 7}')
    code, out, err = say(capsys, "lineage", "mopd", "--short")
    assert (code, err) == (0, "")
    assert f"sft {key_of('sft')} is not in the store: what it was made from is not known" in out
    assert f"tasks {key_of('tasks')} is damaged" in out
    assert "teacher left:policy" in out.replace("teacher of", "teacher")
    code, out, _ = say(capsys, "lineage", "left", "--to", "right")
    assert code == 1
    assert "nearest in common: sft, tasks" in out
    assert f"{key_of('sft')} is not in the store: there may be more ways through it" in out
    code, out, _ = say(capsys, "lineage", "mopd", "--to", "sft")
    assert code == 0
    assert out.startswith("yes, by weights: the weights of mopd began as those of sft")
    code, out, _ = say(capsys, "lineage", "mopd", "--to", f"{key_of('tasks')[:9]}:rl", "--json")
    assert (code, json.loads(out)["to"]) == (0, {"key": key_of("tasks"), "name": "tasks", "port": "rl"})
    assert key_of("sft") in json.loads(say(capsys, "lineage", "mopd", "--json")[1])["gone"]
    assert say(capsys, "lineage", "mopd", "--out", "p.svg")[0] == 0
    assert f"sft `{key_of('sft')}` is not in the store" in card(store, store.meta(key_of("mopd")), "policy")


def test_a_thousand_stages_in_a_row(store, capsys):
    before: Edges = {}
    for n in range(1000):
        put(store, f"s{n}.", {"policy": MODEL}, before)
        before = {"model": (f"s{n}.", "policy")}
    code, out, _ = say(capsys, "lineage", "s999.", "--short")
    assert code == 0
    assert sum("GFLOP, 2.0 s" in line for line in out.splitlines() if "in all" not in line) == 1000
    assert "1,000 stages" in out
    code, out, _ = say(capsys, "lineage", "s999.", "--to", "s0.", "--json")
    assert code == 0
    assert len(json.loads(out)["ways"][0]["edges"]) == 999
    assert "cannot draw 1000 stages" in say(capsys, "lineage", "s999.", "--out", "p.svg")[2]
    assert card(store, store.meta(key_of("s999.")), "policy").count("\n| s") == 1001, "with the head"


# --- pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["svg", "html", "png", "pdf"])
def test_the_picture_shows_every_stage(store, capsys, suffix):
    small(store)
    code, out, err = say(capsys, "lineage", "copy", "--out", f"pictures/p.{suffix}")
    assert (code, err) == (0, "")
    assert out.endswith(f"picture: pictures/p.{suffix}\n")
    file = Path(f"pictures/p.{suffix}")
    if suffix in ("svg", "html"):
        text = file.read_text("utf-8")
        for name in ("tasks", "base", "sft", "left", "traces", "copy"):
            assert f">{name}</text>" in text
        assert "mopd" not in text
        assert "sampler" in text
    else:
        assert file.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF"}[suffix])


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_tree(store, capsys):
    small(store)
    Path("taken").write_text("")
    for name, why in (
        ("p.jpg", "give --out a name that ends in .svg"),
        ("taken/p.svg", "cannot write the picture to taken/p.svg"),
    ):
        code, out, err = say(capsys, "lineage", "copy", "--out", name)
        assert (code, out) == (2, "")
        assert why in err
    assert "give one of them" in say(capsys, "lineage", "copy", "--out", "p.svg", "--to", "base")[2]


# --- cards ---------------------------------------------------------------------------------------------------------------


def front(text: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def test_the_card_names_base_parent_teachers_data_and_their_content(store):
    small(store)
    path = {"record": {"kind": "stages.model.Pretrained", "path": "/hub/models--Org--Some-7B/snapshots/abc"}}
    put(store, "base", {"policy": {**MODEL, "base_key": "b"}}, **path)
    text = card(store, store.meta(key_of("mopd")), "policy")
    assert front(text)["base_model"] == "Org/Some-7B"
    assert front(text)["library_name"] == "transformers"
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line.startswith("| ")]
    assert ("parent", "sft:policy", key_of("sft"), "hash-of-sft-policy") in rows
    assert ("teacher of left", "left:policy", key_of("left"), "hash-of-left-policy") in rows
    assert ("tasks:gold", "5", "sft", key_of("tasks"), "hash-of-tasks-gold") in rows
    assert ("tasks:dev", "5", "sft (to select)", key_of("tasks"), "hash-of-tasks-dev") in rows
    assert not [r for r in rows if r[0] == "tasks:heldout"]
    assert "6 stages, 6.0 GFLOP" in text
    other = {"record": {"kind": "stages.model.Pretrained", "path": "models/other"}}
    put(store, "other", {"policy": {**MODEL, "base_key": "o"}}, **other)
    put(store, "merged", {"policy": MODEL}, {"models.0": ("mopd", "policy"), "models.1": ("other", "policy")})
    assert set(front(card(store, store.meta(key_of("merged")), "policy"))["base_model"]) == {"Org/Some-7B", "other"}


def test_the_card_of_whatever_came_from_a_quantised_file_says_so(store):
    small(store)
    assert "dequantised" not in card(store, store.meta(key_of("mopd")), "policy")
    made = {"record": {"kind": "stages.gguf.FromGGUF", "path": "a/tiny.gguf"}, "facts": {"dequantised": {"F32": 5, "Q4_1": 14}}}
    put(store, "base", {"policy": {**MODEL, "base_key": "b"}}, **made)
    text = card(store, store.meta(key_of("mopd")), "policy")
    assert front(text)["base_model"] == "tiny.gguf"
    assert "- `base` was dequantised to fp32, once, from a file with 5 tensors of F32, 14 tensors of Q4_1" in text.splitlines()


def test_the_card_of_an_adapter_names_the_model_it_fits(store):
    small(store)
    put(
        store, "base", {"policy": {**MODEL, "base_key": "b"}}, record={"kind": "stages.model.Pretrained", "path": "models/tiny"}
    )
    for name, fits in (("left", "sft"), ("sft", "tiny")):
        folder = store.work(key_of(name)) / "policy"
        folder.mkdir(parents=True)
        assert front(card(store, store.meta(key_of(name)), "policy"))["library_name"] == "transformers"
        (folder / "adapter_config.json").write_text("{}")
        text = card(store, store.meta(key_of(name)), "policy")
        assert (front(text)["library_name"], front(text)["base_model"]) == ("peft", fits)
        assert "from peft import AutoPeftModelForCausalLM" in text


def test_names_that_yaml_or_markdown_would_read_otherwise(store):
    for name in ("a | b", "yes: no", "- x", "# y"):
        put(store, "tasks", {"gold": DATA})
        put(store, name, {"policy": MODEL}, {"data": ("tasks", "gold")})
        text = card(store, store.meta(key_of(name)), "policy")
        assert front(text)["tags"] == ["tutelage", "fit"]
        assert all(
            line.count(" | ") == 6 for line in text.splitlines() if line.startswith("| ") and line.endswith(" abc1234 |")
        )


def test_hub_names():
    assert hub_name("/x/hub/models--Qwen--Qwen3-0.6B-Base/snapshots/1a2b") == "Qwen/Qwen3-0.6B-Base"
    assert hub_name("./models/my-model/") == "my-model"


def test_a_value_model_is_loaded_as_what_it_is(store):
    put(store, "ppo", {"policy": MODEL, "value": {**MODEL, "head": "value"}})
    for port, cls, does in (
        ("policy", "AutoModelForCausalLM", "text-generation"),
        ("value", "AutoModelForTokenClassification", "token-classification"),
    ):
        text = card(store, store.meta(key_of("ppo")), port)
        assert f"import {cls}," in text
        assert front(text)["pipeline_tag"] == does
