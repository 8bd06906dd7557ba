"""What `collect` says, against numbers taken from the files by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.report import synthetic
from tutelage.report.data import collect, plain, series, thin
from tutelage.report.read import Edge, load, read_scores, transcripts
from tutelage.spec import UserError

DOMAINS = synthetic.DOMAINS


def by_hand(store, row, domain, seed):
    """The mean of a scores file, read without this package."""
    body = json.loads((store.root / "runs" / "quickstart-1.json").read_text())
    goal = next(g for g in body["goals"] if g["seed"] == seed)
    key = goal["keys"][f"eval {row} / {domain}"]
    return float(np.mean(pq.read_table(store.root / "artifacts" / key / "scores" / "scores.parquet")["value"].to_numpy()))


def test_the_json_has_the_promised_fields_and_is_json(found):
    again = json.loads(json.dumps(found, allow_nan=False))
    wanted = {"run", "recipe", "state", "seeds", "stages", "scores", "recovery", "gaps", "controls", "lost_elsewhere", "cost"}
    assert wanted <= set(again)
    assert again["run"] == "quickstart-1"
    assert again["seeds"] == [0, 1]
    assert {"mean", "interval", "seeds", "domains"} <= set(again["recovery"])
    for entry in again["recovery"]["domains"].values():
        assert {"before", "teacher", "after", "recovery", "interval", "gap_interval"} <= set(entry)


def test_scores_equal_the_files(made, found):
    for row in synthetic.ACCURACY:
        for domain in DOMAINS:
            cell = found["scores"][row]["domains"][domain]
            means = [by_hand(made, row, domain, seed) for seed in (0, 1)]
            assert [s["mean"] for s in cell["seeds"]] == pytest.approx(means, abs=1e-6)
            assert cell["mean"] == pytest.approx(np.mean(means), abs=1e-6)
            assert cell["interval"][0] < cell["mean"] + 1e-9 < cell["interval"][1] + 2e-9
            assert cell["n"] == 500  # distinct tasks: both seeds answered the same ones


def test_recovery_equals_the_definition_by_hand(made, found):
    primary = []
    for seed in (0, 1):
        before, after = ([by_hand(made, row, d, seed) for d in DOMAINS] for row in ("sft", "student"))
        teacher = [by_hand(made, f"specialist {d}", d, seed) for d in DOMAINS]
        gain, gap = np.sum(np.subtract(after, before)), np.sum(np.subtract(teacher, before))
        primary.append(gain / gap)
    rec = found["recovery"]
    assert [s["recovery"] for s in rec["seeds"]] == pytest.approx(primary, abs=1e-5)
    assert rec["mean"] == pytest.approx(np.mean(primary), abs=1e-5)
    assert rec["interval"][0] < rec["mean"] < rec["interval"][1]
    one = rec["domains"]["sum"]
    means = [np.mean([by_hand(made, row, "sum", s) for s in (0, 1)]) for row in ("sft", "specialist sum", "student")]
    assert [one["before"], one["teacher"], one["after"]] == pytest.approx(means, abs=1e-6)
    assert one["recovery"] == pytest.approx((means[2] - means[0]) / (means[1] - means[0]), abs=1e-5)


def test_a_domain_without_a_gap_has_numbers_and_no_ratio(found):
    none = found["recovery"]["domains"]["base"]
    assert none["recovery"] is None
    assert none["interval"] is None
    assert none["gap_interval"][0] < 0 < none["gap_interval"][1]
    assert none["before"] < none["after"]
    assert set(found["recovery"]["seeds"][0]["domains"]) == set(DOMAINS)  # it stays in the primary figure


def test_checkpoints_are_named_with_their_stage_and_parent(found):
    rows = found["scores"]
    assert (rows["student"]["stage"], rows["student"]["parent"], rows["student"]["role"]) == ("mopd", "sft", "after")
    assert rows["specialist sort"]["stage"] == "rl-sort@200"
    assert rows["base"]["parent"] == "init"
    assert (rows["majority answer"]["stage"], rows["majority answer"]["parent"]) == (None, None)
    assert found["recovery"]["before"]["parent"] == "pretrain"
    assert found["recovery"]["teachers"]["sum"]["domains_taught"] == ["sum"]


def test_controls_hold_paired_differences(made, found):
    entry = found["controls"]["sft continued"]["sum"]
    for name, row in (("teacher_minus", "specialist sum"), ("student_minus", "student")):
        by_seed = [by_hand(made, row, "sum", s) - by_hand(made, "sft continued", "sum", s) for s in (0, 1)]
        assert entry[name]["difference"] == pytest.approx(np.mean(by_seed), abs=1e-6)
        assert [s["difference"] for s in entry[name]["seeds"]] == pytest.approx(by_seed, abs=1e-6)
    assert list(found["controls"]) == ["sft continued", "base", "majority answer"]
    mean = next(g for g in found["gaps"] if (g["of"], g["than"]) == ("teachers", "sft continued"))
    each = [found["controls"]["sft continued"][d]["teacher_minus"]["difference"] for d in DOMAINS]
    assert mean["difference"] == pytest.approx(np.mean(each), abs=1e-5)


def test_pairing_makes_differences_tighter_than_independent_samples(found):
    entry = found["controls"]["sft continued"]["sum"]["student_minus"]
    paired = entry["interval"][1] - entry["interval"][0]
    apart = [found["scores"][r]["domains"]["sum"]["seeds"][0]["mean"] for r in ("student", "sft continued")]
    assert paired < 2 * 1.96 * np.sqrt(sum(p * (1 - p) / 500 for p in apart))


def test_losses_elsewhere_leave_out_the_own_domain(made, found):
    lost = found["lost_elsewhere"]["specialist sum"]
    assert set(lost) == {"reverse", "sort", "base"}
    hand = np.mean([by_hand(made, "specialist sum", "reverse", s) - by_hand(made, "sft", "reverse", s) for s in (0, 1)])
    assert lost["reverse"]["difference"] == pytest.approx(hand, abs=1e-6)
    assert lost["reverse"]["interval"][1] < 0


def test_two_ledgers(found):
    cost = found["cost"]
    one = cost["by_stage"]["mopd"]["flops"]
    assert one == 350_000 * (6 * 1_200_000 + 2 * 750_000)
    assert cost["ledgers"]["consolidation"]["stages"] == ["mopd"]
    assert cost["ledgers"]["consolidation"]["flops"] == one
    assert cost["ledgers"]["with_teachers"]["stages"] == ["mopd", *sorted(f"rl-{d}" for d in DOMAINS)]
    assert cost["ledgers"]["with_teachers"]["flops"] == one + sum(cost["by_stage"][f"rl-{d}"]["flops"] for d in DOMAINS)
    assert cost["run"]["artifacts"] == len({s["key"] for s in found["stages"]})


def test_stages_list_keys_inputs_and_what_was_reused(found):
    tasks = [s for s in found["stages"] if s["name"] == "tasks"]
    assert [s["seeds"] for s in tasks] == [[0, 1]]  # one artifact, shared
    student = next(s for s in found["stages"] if s["name"] == "mopd")
    roles = {i["path"]: i["role"] for i in student["inputs"]}
    assert roles == {"model": "start", "tasks": "data", **{f"teachers.{d}": "teacher" for d in DOMAINS}}
    assert all(s["reused"] == (s["name"] == "pretrain") for s in found["stages"])
    continued = next(s for s in found["stages"] if s["name"] == "sft-continued")
    assert {i["role"] for i in continued["inputs"]} == {"start", "data", "budget"}


def test_verifier_errors_are_counted_and_not_right(found):
    cell = found["scores"]["student"]["domains"]["sum"]
    assert cell["errors"] == 4
    assert [s["errors"] for s in cell["seeds"]] == [2, 2]


def test_a_run_without_a_table_reports_its_stages(tmp_path):
    bare = collect(synthetic.build(tmp_path / "s", table=False, n=20), "quickstart")
    assert bare["recovery"] is None
    assert (bare["scores"], bare["controls"], bare["gaps"], bare["lost_elsewhere"]) == ({}, {}, [], {})
    assert bare["cost"]["by_stage"]["mopd"]["flops"] > 0
    assert bare["cost"]["ledgers"] == {}
    assert "mopd" in bare["curves"]


def test_a_run_in_progress_reports_what_there_is(tmp_path):
    store = synthetic.build(tmp_path / "s", n=40, skip=("mopd", "eval student", "eval specialist sum"))
    part = collect(store, "last")
    assert part["recovery"]["mean"] is None
    assert part["recovery"]["seeds_missing"] == [0, 1]
    assert part["scores"]["student"]["domains"] == {}
    assert next(s["status"] for s in part["stages"] if s["name"] == "mopd") == "waiting"
    assert part["cost"]["ledgers"]["consolidation"]["missing"] == ["mopd"]
    store.work(next(s["key"] for s in part["stages"] if s["name"] == "mopd"))
    assert next(s["status"] for s in collect(store, "last")["stages"] if s["name"] == "mopd") == "in progress"


def test_one_seed_measured_whole_is_reported_alone(tmp_path):
    store = synthetic.build(tmp_path / "s", n=200)
    body = json.loads((store.root / "runs" / "quickstart-1.json").read_text())
    import shutil

    shutil.rmtree(store.folder(body["goals"][1]["keys"]["eval student / sum"]))
    rec = collect(store, "last")["recovery"]
    assert [s["seed"] for s in rec["seeds"]] == [0]
    assert rec["seeds_missing"] == [1]
    assert rec["mean"] == rec["seeds"][0]["recovery"]


def test_missing_metrics_and_an_unknown_run(tmp_path):
    store = synthetic.build(tmp_path / "s", n=20)
    for file in Path(store.root / "artifacts").glob("*/metrics.jsonl"):
        file.unlink()
    assert collect(store, "last")["curves"] == {}
    with pytest.raises(UserError, match="unknown run"):
        collect(store, "nothing")


def test_a_teacher_that_is_not_the_one_measured_is_said(tmp_path):
    store = synthetic.build(tmp_path / "s", n=20)
    file = store.root / "runs" / "quickstart-1.json"
    body = json.loads(file.read_text())
    for goal in body["goals"]:
        goal["record"]["stages"]["mopd"]["teachers"]["sort"]["step"] = 100
    file.write_text(json.dumps({**body, "failed": {"sft": "out of memory"}}))
    said = collect(store, "last")["warnings"]
    assert any("'sort' was rl-sort@100, but the table measures rl-sort@200" in w for w in said)
    assert any("'sft' failed: out of memory" in w for w in said)


@pytest.mark.parametrize(
    ("path", "port", "role"),
    [
        ("model", "policy", "start"),
        ("models.0", "policy", "start"),
        ("teachers.sum", "policy", "teacher"),
        ("credit.0.judge", "policy", "scored by"),
        ("select.tasks", "dev", "data"),
        ("train", "rl", "data"),
        ("budget.1", "policy", "budget"),
        ("reference", "policy", "reference"),
        ("candidates.half the teachers' budget", "policy", "start"),
    ],
)
def test_roles_of_edges(path, port, role):
    assert Edge(path, "x", port, None).role == role


def test_a_second_round_counts_the_line_to_the_checkpoint_before(tmp_path):
    store = synthetic.build(tmp_path / "s", n=20)
    file = store.root / "runs" / "quickstart-1.json"
    body = json.loads(file.read_text())
    for goal in body["goals"]:
        goal["record"]["stages"]["warm"] = {"kind": "stages.fit.Fit", "model": synthetic.ref("sft")}
        goal["record"]["stages"]["mopd"]["model"] = synthetic.ref("warm")
    file.write_text(json.dumps(body))
    ledgers = collect(store, "last")["cost"]["ledgers"]
    assert ledgers["consolidation"]["stages"] == ["mopd", "warm"]
    assert ledgers["consolidation"]["missing"] == ["warm"]


def test_several_replies_to_a_task_are_averaged(tmp_path):
    import pyarrow as pa

    store = synthetic.build(tmp_path / "s", n=20)
    work = store.work("k" * 32) / "scores"
    work.mkdir()
    rows = {"task": ["a", "a", "b"], "value": [1.0, 0.0, None], "error": [None, None, "late"]}
    pq.write_table(pa.table(rows), work / "scores.parquet")
    store.publish("k" * 32, {"name": "e", "inputs": []})
    found = read_scores(store, "k" * 32, "scores", None)
    assert found is not None
    assert found.values == {"a": 0.5, "b": 0.0}
    assert found.errors == 1


def test_curves_are_thinned_to_means_of_bins():
    steps, values = thin(np.arange(1000.0), np.arange(1000.0) * 2, bins=10)
    assert steps.tolist() == [49.5 + 100 * i for i in range(10)]
    assert values.tolist() == [2 * s for s in steps]
    assert thin(np.arange(5.0), np.arange(5.0))[0].tolist() == [0, 1, 2, 3, 4]
    assert series([{"step": 1, "time": 3, "a": 1, "b": float("nan"), "c": "x", "d": True}]) == {"a": ([1], [1])}


def test_plain_makes_valid_json():
    assert plain({1: (np.float64(0.5), float("nan"), np.int64(3))}) == {"1": [0.5, None, 3]}


def test_transcripts_pair_the_replies_of_one_task(made):
    shown = transcripts(made, load(made, "last"))
    assert [(t["domain"], t["right"]) for t in shown] == [(d, r) for d in DOMAINS for r in (True, False)]
    for each in shown:
        assert each["prompt"][0]["content"].startswith(each["domain"])
        assert each["gold"].isdigit()
        assert each["before"]["reply"].startswith("step 1")
