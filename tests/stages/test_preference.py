"""Fit on pairs: what it learns, exact resume with the reference's answers, and what a plan refuses."""

from typing import Any, ClassVar

import pytest

from tests.stages.test_loops import same, weights
from tests.stages.toy import DATA, INIT, Types, make
from tutelage.context import Context, Stopped
from tutelage.graph import DataType, Kind, Stage, key
from tutelage.learn.optim import AdamW
from tutelage.losses.nll import NLL
from tutelage.losses.preference import DPO
from tutelage.spec import SpecError, UserError
from tutelage.stages.files import Files
from tutelage.stages.fit import Fit
from tutelage.stages.model import NewModel
from tutelage.store import Store
from tutelage.text.template import Document


class Preferences(Stage):
    """Of two letters the one that follows is preferred."""

    outputs: ClassVar[dict[str, Kind]] = {"rows": "data"}

    def infer(self, types: Any) -> Any:
        return {"rows": DataType(("id", "domain", "prompt", "chosen", "rejected"), ("low",), 12)}

    def run(self, ctx: Context) -> None:
        from tutelage.text.rows import write_tasks

        said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
        write_tasks(
            ctx.output("rows"),
            [
                {
                    "id": a,
                    "domain": "low",
                    "prompt": said("user", a),
                    "chosen": said("assistant", b),
                    "rejected": said("assistant", a * 3),
                }
                for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
            ],
        )


PAIRS = Preferences(name="pairs")


def dpo(**more):
    fields = {"name": "dpo", "model": INIT.out(), "reference": INIT.out(), "data": PAIRS.out(), "loss": DPO(), "steps": 5}
    return Fit(**{**fields, "rows": 5, "micro_tokens": 24, **more})


def test_margins_and_accuracy_rise(tmp_path):
    store = Store(tmp_path / "s")
    stage = dpo(steps=30, rows=12, optimizer=AdamW(lr=0.01))
    done = make(stage, store)
    log = store.metrics(key(stage))
    assert log[0]["margin"] == pytest.approx(0, abs=1e-5)  # the policy is its reference still
    assert log[-1]["accuracy"] == 1
    assert log[-1]["margin"] > 1
    assert log[-1]["reward_chosen"] > log[-1]["reward_rejected"]
    assert done.cost.tokens["scored"] * 30 == done.cost.tokens["trained"]  # once each, whatever the epochs


def test_a_stage_stopped_anywhere_resumes_to_the_same_bits(tmp_path):
    stage = dpo(steps=6, optimizer=AdamW(lr=0.01))
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    done = make(stage, whole)
    for stop_after in (1, 3):
        calls = []
        with pytest.raises(Stopped):
            make(stage, cut, stopping=lambda: calls.append(1) or len(calls) >= stop_after)  # noqa: B023
    resumed = make(stage, cut)
    assert same(weights(whole, stage), weights(cut, stage))
    assert done.cost == resumed.cost


def test_micro_batches_do_not_change_the_step(tmp_path):
    found = []
    for name, micro in (("small", 1), ("large", 10_000)):
        store, stage = Store(tmp_path / name), dpo(steps=2, micro_tokens=micro)
        make(stage, store)
        found.append(store.metrics(key(stage))[-1])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-4)


OTHER = NewModel(name="other", alphabet="ab", width=32, layers=1, mlp=48)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"reference": None}, "losses.preference.DPO is measured against a reference; set reference"),
        ({"loss": NLL(), "data": DATA.out()}, "measured against none; leave reference out"),
        ({"data": DATA.out()}, "data needs columns prompt, chosen, rejected; letters.rows has"),
        ({"template": Document()}, "set template to Chat"),
        ({"reference": OTHER.out()}, "the reference, 'other', has another tokenizer"),
    ],
)
def test_what_a_plan_refuses(more, says):
    with pytest.raises(SpecError, match=says):
        dpo(**more).infer(Types())


# --- a user's files --------------------------------------------------------------------------------------------------------


def test_a_file_of_preferences_is_read(tmp_path):
    from tutelage.text.rows import read_rows

    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "ab", "chosen": "c", "rejected": [{"role": "assistant", "content": "d"}]}\n' * 2)
    store, stage = Store(tmp_path / "s"), Files(name="mine", path=str(file))
    make(stage, store)
    row = read_rows(store.path(key(stage), "data"))[0]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("c", "d")
    dpo(data=stage.out()).infer(Types())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "ab", "chosen": "c"}', "has chosen and no rejected; a preference needs both"),
        ('{"chosen": "c", "rejected": "d", "text": "x"}', "has chosen and no prompt"),
        ('{"prompt": "ab", "chosen": "c", "rejected": null}', "has no rejected"),
        ('{"prompt": "ab", "chosen": "c", "rejected": ""}', "rejected is empty"),
    ],
)
def test_bad_preferences_are_named(line, says, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=says):
        make(Files(name="mine", path=str(file)), Store(tmp_path / "s"))
