"""The harness of the benches: ratios, proofs that can fail, the choice of a dtype, and what the page says."""

import json

import pytest

from bench import machine
from bench.__main__ import FAMILIES, main, page
from bench.harness import Record, Run, Timing, Unequal, as_json, compared, interleave, prove, worst
from bench.machine import choose_dtype, most_memory, peak, place, reset_memory
from bench.work import Work

NAMES = {"rollout-mixed", "rollout-fixed-tiny", "rollout-fixed-135m", "rollout-group", "sft-mixed", "dpo", "grpo-mixed", "opd"}
NAMES |= {"mopd-4", "memory-135m", "cli-plan", "first-step", "llama-cpp"}


def test_the_families_have_all_names_once():
    from importlib import import_module

    names = [name for family in FAMILIES for name in import_module(f"bench.{family}").NAMES]
    assert sorted(names) == sorted(NAMES)


def test_a_ratio_is_of_the_best_peer_and_its_range_of_single_rounds():
    timing = Timing({"ours": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 6.0, 4.0]}, {})
    assert timing.best("ours") == "fast"
    assert timing.ratio("ours", "fast") == (2.0, 1.0, 3.0)
    assert timing.best("ours", aside=["fast"]) == "slow"


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


FACTS = {"processor": "a processor", "load a core": 0.0}


def test_records_keep_what_was_not_measured_again_and_say_why_something_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.__main__.machine", lambda device: dict(FACTS))
    monkeypatch.setattr("bench.sft.bench", raises(Unequal("losses differ")))
    earlier = as_json([Record("dpo", 2.0, 1.9, 2.1, 1.8, "x", "earlier"), Record("sft-mixed", 9.0, 9.0, 9.0, None, "x", "")])
    told = {"records": {r["name"]: r for r in earlier}, "families": {}}
    (tmp_path / "tables.json").write_text(json.dumps({"a processor": told}))
    assert main(["sft", "--quick", "--out", str(tmp_path)]) == 0
    found = {r["name"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert found["dpo"] == earlier[0]
    assert (found["sft-mixed"]["ratio"], found["sft-mixed"]["note"]) == (None, "losses differ")
    assert set(found["dpo"]) == {"name", "ratio", "low", "high", "target", "unit", "note"}
    assert "| dpo | 2 | 1.9 | 2.1 | 1.8 | x | earlier |" in (tmp_path / "RESULTS.md").read_text()


def raises(error):
    def call(*_):
        raise error

    return call


class GPU:
    """What the suite asks of `torch.cuda`, and what it was asked."""

    def __init__(self, monkeypatch):
        self.asked = []
        import torch

        says = {"is_available": True, "get_device_name": "a GPU", "memory_allocated": 2**20, "max_memory_allocated": 3 * 2**20}
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", *says):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self.asked.append(name) or says.get(name))


def test_a_gpu_stands_beside_the_processor_under_its_own_name(tmp_path, monkeypatch):
    GPU(monkeypatch)
    monkeypatch.setattr("bench.__main__.peak", lambda dtype, device: 100.0)
    seen = []
    monkeypatch.setattr(
        "bench.sft.bench", lambda run: seen.append(run.device) or [Record("sft-mixed", 3.0, 3.0, 3.0, 2.0, "x")]
    )
    before = {"AMD": {"records": {}, "families": {}}}
    (tmp_path / "tables.json").write_text(json.dumps(before))
    (tmp_path / "results.json").write_text("[]")
    assert main(["sft", "--device", "cuda", "--out", str(tmp_path)]) == 0
    assert seen == ["cuda"]
    assert list(json.loads((tmp_path / "tables.json").read_text())) == ["AMD", "a GPU"]
    assert json.loads((tmp_path / "results.json").read_text()) == []  # the processor's alone
    assert "## a GPU\n\n| name" in (tmp_path / "RESULTS.md").read_text()


def test_a_gpu_that_is_too_small_is_a_record_and_a_processor_s_error_is_one(tmp_path, monkeypatch):
    GPU(monkeypatch)
    monkeypatch.setattr("bench.__main__.peak", lambda dtype, device: 100.0)
    monkeypatch.setattr("bench.sft.bench", raises(RuntimeError("CUDA out of memory\nmore")))
    main(["sft", "--device", "cuda", "--out", str(tmp_path)])
    assert "CUDA out of memory |" in (tmp_path / "RESULTS.md").read_text()
    with pytest.raises(RuntimeError):
        main(["sft", "--out", str(tmp_path)])


@pytest.mark.parametrize(("words", "said"), [(["sft"], "PyTorch sees no GPU here"), (["cli"], "no family 'cli' on cuda")])
def test_what_a_gpu_run_cannot_do_is_one_line(words, said, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([*words, "--device", "cuda"])
    assert said in capsys.readouterr().err


def test_calls_on_a_gpu_end_when_it_is_done_and_its_memory_is_the_allocators(monkeypatch):
    gpu = GPU(monkeypatch)
    timing = interleave({"a": lambda: gpu.asked.append("call")}, 1, "cuda")
    whole = [a for a in gpu.asked if a in ("synchronize", "call")]
    assert whole == ["call", "synchronize", "synchronize", "call", "synchronize"]
    assert timing.memory == {"a": 2.0}


def test_memory_is_what_a_call_took_at_most():
    import torch

    if reset_memory("cpu") is None:
        pytest.skip("this system does not tell")
    before = most_memory("cpu")
    a = torch.ones(64 << 18)
    del a
    assert 60 < most_memory("cpu") - before < 80


def test_the_peak_is_that_of_a_matmul(monkeypatch):
    """0.1 s for each look at the clock: the 1024-matmul takes one."""
    clock = iter(x * 0.001 for x in range(100000))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert peak("float32", seconds=0.1) == pytest.approx(2 * 1024**3 / 0.001 / 1e9)


def test_a_place_is_the_gpu_where_one_is_used():
    assert place({"processor": "AMD"}) == "AMD"
    assert place({"gpu": "H100", "processor": "AMD"}) == "H100"


def test_a_loaded_machine_is_named_on_the_page():
    family = {"machine": {"load a core": 3.0}, "tables": {}}
    told = {"a": {"records": {}, "families": {"sft": family}}}
    assert "take these numbers again" in page(told)
    family["machine"]["load a core"] = 0.0
    assert "take these numbers again" not in page(told)


def test_compared_writes_its_tables():
    sides = {"ours": 2.0, "TRL": 4.0, "TRL in fp16": 3.0, "TRL in fp64": 8.0}

    def fake(given, rounds, device):
        assert list(given) == list(sides)
        return Timing({n: [s] for n, s in sides.items()}, {n: [s] for n, s in sides.items()}, {"ours": 7.0})

    run = Run(rounds=1, peak=10.0, why="fp32 on both sides", interleave=fake)
    made = compared(run, "a", 2.0, dict.fromkeys(sides), Work(8e9, 100, (1, 3)), "more", aside=["TRL in fp16", "TRL in fp64"])
    assert made.ratio == 2.0
    assert made.note == "against TRL; more; fp32 on both sides; faster at another precision: TRL in fp16 1.50"
    row = run.details["a"][0]
    assert (row["tokens/s"], row["of peak"], row["MiB"]) == (50.0, 0.4, 7.0)
    assert run.details["a"][1]["of peak"] == 0.2  # the same work over its own time
    assert run.details["a: lengths of replies"][0]["max"] == 3
