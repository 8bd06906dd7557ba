"""Relayout: the same rows, said in another layout."""

from __future__ import annotations

import pytest

from tests.stages.test_loops import refused
from tests.stages.toy import DATA, INIT, Types, make
from tutelage.graph import key
from tutelage.spec import UserError
from tutelage.stages.fit import Fit
from tutelage.stages.relayout import Relayout
from tutelage.store import Store
from tutelage.text.rows import read_rows
from tutelage.verify.layout import ReplyLayout


def test_only_the_last_reply_changes_and_it_can_be_read_back(tmp_path):
    store, layout = Store(tmp_path / "s"), ReplyLayout(opens="(", between=".", closes=")")
    stage = Relayout(name="relaid", data=DATA.out(), layout=layout)
    ctx = make(stage, store)
    before, after = (read_rows(store.path(key(s), port)) for s, port in ((DATA, "rows"), (stage, "relaid")))
    assert ctx.facts["rows"] == len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert new["completion"] == [{"role": "assistant", "content": f"({old['gold']})"}]
        assert layout.plain(new["completion"][-1]["content"]) == old["gold"]
        assert {**new, "completion": None} == {**old, "completion": None}


def test_a_text_that_holds_the_separator(tmp_path):
    with pytest.raises(UserError, match=r"row 'a'.*relaid\.layout\.between"):
        make(Relayout(name="relaid", data=DATA.out(), layout=ReplyLayout(between="b")), Store(tmp_path / "s"))


def test_a_policy_is_trained_on_them_and_what_has_no_completions_is_refused(tmp_path):
    stage = Relayout(name="relaid", data=DATA.out())
    assert stage.infer(Types())["relaid"] == DATA.infer(None)["rows"]
    assert key(Relayout(name="x", data=DATA.out(), layout=ReplyLayout(closes="/"))) != key(stage)
    Fit(name="sft", model=INIT.out(), data=stage.out()).infer(Types())
    refused(Relayout(name="relaid", data=INIT.out()), "init.policy", "gold")
