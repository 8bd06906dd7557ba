"""The harness of the benches: ratios, proofs that can fail, the choice of a dtype, and what the page says."""

import json

import pytest

from bench.__main__ import FAMILIES, main, page
from bench.harness import Record, Run, Timing, Unequal, as_json, choose_dtype, compared, interleave, prove, worst

NAMES = {"rollout-mixed", "rollout-fixed-tiny", "rollout-fixed-135m", "rollout-group", "sft-mixed", "dpo", "grpo-mixed", "opd"}
NAMES |= {"mopd-4", "memory-135m", "cli-plan", "first-step", "llama-cpp"}


def test_the_families_have_all_names_once():
    from importlib import import_module

    names = [name for family in FAMILIES for name in import_module(f"bench.{family}").NAMES]
    assert sorted(names) == sorted(NAMES)


def test_a_ratio_is_of_the_best_peer_and_its_range_of_single_rounds():
    timing = Timing({"ours": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 6.0, 4.0]}, {})
    assert timing.best("ours") == "fast"
    assert timing.ratio("ours") == (2.0, 1.0, 3.0)


def test_rounds_are_interleaved_after_one_unseen():
    calls = []
    timing = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" * 4
    assert {len(v) for v in timing.wall.values()} == {3}


def gradient(*values):
    import torch

    return {"w": torch.tensor(values, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ((1.0, gradient(1.0, 0.0)), (1.0001, gradient(1.0, 0.0))),
        ((1.0, gradient(1.0, 0.0)), (1.0, gradient(1.0, 3e-4))),
        ((1.0, gradient(1.0, 0.0)), (1.0, {})),
        ((float("nan"), gradient(1.0)), (1.0, gradient(1.0))),
    ],
)
def test_sides_that_differ_are_not_timed(mine, theirs):
    with pytest.raises(Unequal):
        prove("x", mine, theirs)


def test_equal_sides_pass():
    assert prove("x", (2.0, gradient(1.0, 0.0)), (2.0, gradient(1.0, 5e-5))) == pytest.approx((0, 5e-5))


def test_bf16_is_run_only_where_it_is_faster():
    slow, fast = {"float32": 100.0, "bfloat16": 3.0}, {"float32": 100.0, "bfloat16": 200.0}
    assert choose_dtype("bfloat16", slow)[0] == "float32"
    assert "bf16 matmuls reach 3" in choose_dtype("bfloat16", slow)[1]
    assert choose_dtype("bfloat16", fast)[0] == "bfloat16"
    assert choose_dtype("float32", fast)[0] == "float32"


def test_the_worst_shape_stands_for_all():
    found = [Record(f"a, {s}", r, r, r, 2.0, "x", "against TRL") for s, r in (("tiny", 3.0), ("135m", 1.5))]
    made = worst("a", found)
    assert (made.name, made.ratio) == ("a", 1.5)
    assert made.note == "135m against TRL; others: tiny 3.00"


def test_records_keep_what_was_not_measured_again_and_say_why_something_was_not(tmp_path):
    earlier = as_json([Record("dpo", 2.0, 1.9, 2.1, 1.8, "x", "earlier"), Record("llama-cpp", 9.0, 9.0, 9.0, None, "x", "")])
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    assert main(["llamacpp", "--quick", "--out", str(tmp_path)]) == 0
    found = {r["name"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert found["dpo"] == earlier[0]
    assert found["llama-cpp"]["ratio"] is None
    assert found["llama-cpp"]["note"]
    assert set(found["dpo"]) == {"name", "ratio", "low", "high", "target", "unit", "note"}
    assert "| dpo | 2 | 1.9 | 2.1 | 1.8 | x | earlier |" in (tmp_path / "RESULTS.md").read_text()


def test_a_loaded_machine_is_named_on_the_page():
    told = {"sft": {"machine": {"load a core": 3.0}, "tables": {}}}
    assert "take these numbers again" in page([], told)
    told["sft"]["machine"]["load a core"] = 0.0
    assert "take these numbers again" not in page([], told)


def test_compared_writes_its_table():
    run = Run(rounds=2, why="fp32 on both sides")
    made = compared(run, "a", 2.0, {"ours": lambda: None, "TRL": lambda: sum(range(10000))}, "more")
    assert made.note == "against TRL; more; fp32 on both sides"
    assert [row["side"] for row in run.details["a"]] == ["ours", "TRL"]
