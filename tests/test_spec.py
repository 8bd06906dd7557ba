"""Specs: errors that name the nearest, fingerprints, records, overrides."""

from __future__ import annotations

import json
import sys
import types
from contextlib import suppress
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import toy
from tutelage import spec
from tutelage.graph import from_record, key, record
from tutelage.spec import Spec, SpecError, UserError, build, canonical, content_hash, load, override, parse_set, resolve_kind


def plain(value: Spec) -> None:
    """An edge function that knows no edges."""


def no_edge(value: dict) -> None:
    """The same for `load`."""


# --- errors ------------------------------------------------------------------------------------------------------------


def test_unknown_field_names_the_nearest_and_the_valid():
    with pytest.raises(SpecError, match=r"unknown field 'valu'; did you mean 'value'\? valid: shape, value"):
        build(toy.Rate, {"valu": 1.0})


def test_missing_field_is_named():
    with pytest.raises(SpecError, match=r"missing field 'one\.file'"):
        build(toy.Outside, {"name": "x"}, "one")


def test_wrong_type_is_named_with_what_was_given():
    with pytest.raises(SpecError, match=r"sft.value: .*number.*got 'fast'"):
        build(toy.Rate, {"value": "fast"}, "sft")
    with pytest.raises(SpecError, match="value"):  # strict: a truth value is no number
        build(toy.Rate, {"value": True})


def test_unknown_kind_names_the_nearest():
    with pytest.raises(SpecError, match=r"unknown kind 'DAPOO'; did you mean 'DAPO'"):
        resolve_kind("DAPOO")
    with pytest.raises(SpecError, match="unknown kind"):
        resolve_kind("losses.policy.Nothing")


def test_a_word_where_a_spec_belongs_is_an_unknown_kind():
    rec = record(toy.small())
    override(rec, "base.rates.0", "DAPOO")
    with pytest.raises(SpecError, match=r"base.rates.0: unknown kind 'DAPOO'; did you mean 'DAPO'"):
        from_record(rec)


@pytest.mark.parametrize("kind", ["Loss", "losses.base.Loss", "Credit", "Verifier", "Marked", "Env", "Domain", "graph.Stage"])
def test_a_base_is_no_kind(kind):
    with pytest.raises(SpecError, match="is abstract"):
        resolve_kind(kind)
    assert kind.rpartition(".")[2] not in spec.usable()


def test_what_does_not_fit_a_field_is_said_with_what_would():
    from tutelage.stages.fit import Fit
    from tutelage.stages.model import NewModel

    model = NewModel(name="m", alphabet="ab").out()
    for wrong, says in (
        ("AdamW", r"sft.loss: unknown kind 'AdamW'; valid: .*DAPO, "),
        (toy.Rate(), "sft.loss: Rate is no Loss; valid: "),
    ):
        with pytest.raises(SpecError, match=says) as raised:
            build(Fit, {"name": "f", "model": model, "data": model, "loss": wrong}, "sft")
        assert "Muon" not in str(raised.value)
    with pytest.raises(SpecError, match=r'sft.data: an edge is written \{"ref": "rl-sum"\}'):
        build(Fit, {"name": "f", "model": model, "data": "rl-sum"}, "sft")


def test_many_valid_words_are_cut_short_nearest_first():
    text = spec.suggest("word7", [f"word{n}" for n in range(30)])
    assert text.startswith("; did you mean 'word7'? valid: word7, ")
    assert text.endswith(" … and 18 more")
    assert text.count("word") == 13


def test_kinds_are_found_without_importing_and_resolve():
    found = spec.kinds()
    assert found["GRPO"] == "losses.policy.GRPO"
    assert resolve_kind("GRPO").kind() == "losses.policy.GRPO"
    assert resolve_kind("tests.toy.Rate") is toy.Rate


def test_specs_are_frozen_and_compare_by_identity():
    one = toy.Rate()
    with pytest.raises(ValueError, match="frozen"):
        one.value = 2.0  # type: ignore[misc]
    assert one != toy.Rate()
    assert len({one, toy.Rate()}) == 2


# --- fingerprints ------------------------------------------------------------------------------------------------------


def test_canonical_leaves_out_defaults_and_unkeyed_fields():
    form = canonical(toy.Make(name="a", threads=3, rows=4, seed=7), plain)
    assert {k: v for k, v in form.items() if k not in ("kind", "version", "code")} == {"seed": 7}


def test_a_default_in_a_tuple_is_left_out_after_a_round_trip_too():
    """Specs compare by identity: an equal default that was loaded from JSON must not change the key."""
    data = toy.Make(name="data")
    fresh = toy.Count(name="c", source=data.out())
    loaded = toy.Count(name="c", source=data.out(), rates=(toy.Rate(value=0.1),))
    assert "rates" not in canonical(loaded, lambda s: "edge" if s is loaded.source else None)
    assert key(fresh) == key(loaded)


def test_one_and_one_point_zero_and_true_differ():
    assert not spec._same(1, 1.0)
    assert not spec._same(1, True)
    assert not spec._same((1,), (True,))
    assert spec._same({"a": (1, 2)}, {"a": (1, 2)})
    assert not spec._same({"a": 1}, {"a": 1, "b": 2})


def test_a_version_bump_changes_the_key(monkeypatch):
    before = key(toy.Make(name="a"))
    monkeypatch.setattr(toy.Make, "version", 2)
    assert key(toy.Make(name="a")) != before


def test_a_version_bump_of_a_nested_spec_changes_the_key(monkeypatch):
    def one() -> str:
        return key(toy.Count(name="c", source=toy.Make(name="d").out(), rates=(toy.Schedule(warmup=1),)))

    before = one()
    monkeypatch.setattr(toy.Schedule, "version", 2)
    assert one() != before


def user_class(source: str, tmp_path: Any, name: str) -> type[Spec]:
    """A spec class from a module file, as a user writes one."""
    file = tmp_path / f"{name}.py"
    file.write_text(source)
    module = types.ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module
    exec(compile(source, str(file), "exec"), module.__dict__)
    return module.Mine


def test_user_code_is_keyed_by_its_source(tmp_path):
    source = "from tutelage.spec import Spec\nclass Mine(Spec):\n    x: int = 1\n"
    forms = []
    for text in (source, source + "# changed\n"):
        spec.foreign_code.cache_clear()
        import linecache

        linecache.clearcache()
        forms.append(canonical(user_class(text, tmp_path, "user_mine")(), plain))
    assert forms[0]["code"] != forms[1]["code"]
    assert "code" not in canonical(resolve_kind("losses.policy.GRPO")(), plain)  # ours are keyed by version


def test_outside_files_are_keyed_by_content(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("same")
    second.write_text("same")
    assert key(toy.Outside(name="x", file=str(first))) == key(toy.Outside(name="x", file=str(second)))
    second.write_text("other")
    assert key(toy.Outside(name="x", file=str(first))) != key(toy.Outside(name="x", file=str(second)))
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        key(toy.Outside(name="x", file="nowhere"))


def test_content_hash_of_folders_sees_names_and_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = content_hash(tmp_path)
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert content_hash(tmp_path) != before
    (tmp_path / "a" / "y").rename(tmp_path / "a" / "x")
    assert content_hash(tmp_path) == before
    (tmp_path / "README.md").write_text("words")
    assert content_hash(tmp_path) != before
    assert content_hash(tmp_path, leave_out=("README.md",)) == before


# --- records -----------------------------------------------------------------------------------------------------------


def test_a_record_loads_back_to_equal_keys():
    goals = toy.small(seed=3, steps=7)
    again = from_record(json.loads(json.dumps(record(goals))))
    mine, theirs = toy.stages(goals), toy.stages(again)
    assert {n: key(s) for n, s in mine.items()} == {n: key(s) for n, s in theirs.items()}
    assert again.seed == 3
    assert record(again) == record(goals)


class Holder(Spec):
    """Everything a field may hold."""

    numbers: tuple[int, ...] = (1, 2)
    names: dict[str, float] = {"a": 0.5}
    inner: toy.Rate = toy.Rate()
    many: dict[str, toy.Rate] = {"x": toy.Rate()}
    maybe: str | None = None
    KNOWN: ClassVar[int] = 3


@given(
    numbers=st.lists(st.integers()).map(tuple),
    names=st.dictionaries(
        st.text(max_size=5).filter(lambda t: t not in ("kind", "ref")), st.floats(allow_nan=False, allow_infinity=False)
    ),
    value=st.floats(allow_nan=False, allow_infinity=False),
    maybe=st.none() | st.text(max_size=8),
    warm=st.booleans(),
)
def test_round_trip_of_any_values_keeps_the_form(numbers, names, value, maybe, warm):
    inner = toy.Schedule(value=value) if warm else toy.Rate(value=value)
    one = Holder(numbers=numbers, names=names, inner=inner, many={"x": toy.Rate(), "y": inner}, maybe=maybe)
    text = json.dumps(spec.dump(one, plain))
    again = load(json.loads(text), no_edge)
    assert type(again.inner) is type(inner)
    assert canonical(again, plain) == canonical(one, plain)


# --- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "path", "value"),
    [
        ("sft.steps=200", "sft.steps", 200),
        ("sft.lr=1e-3", "sft.lr", 1e-3),
        ("sft.note=a=b", "sft.note", "a=b"),
        ("sft.note=", "sft.note", ""),
        ('sft.note="7"', "sft.note", "7"),
        ("sft.flag=true", "sft.flag", True),
        ("sft.maybe=null", "sft.maybe", None),
        ("sft.keep=[1,2]", "sft.keep", [1, 2]),
        (" base = x", "base", " x"),
    ],
)
def test_parse_set(expression, path, value):
    assert parse_set(expression) == (path, value)


@pytest.mark.parametrize("expression", ["sft.steps", "=3", " =3", ""])
def test_parse_set_refuses(expression):
    with pytest.raises(SpecError, match="path=value"):
        parse_set(expression)


def edited(path: str, value: Any) -> dict[str, Any]:
    rec = record(toy.small())
    override(rec, path, value)
    return toy.stages(from_record(rec))


def test_override_of_fields_lists_and_kinds():
    assert edited("base.steps", 3)["base"].steps == 3
    assert edited("base.rates.0.value", 2.5)["base"].rates[0].value == 2.5
    changed = edited("base.rates.0", {"kind": "tests.toy.Schedule", "warmup": 9})["base"].rates[0]
    assert isinstance(changed, toy.Schedule)
    assert changed.warmup == 9
    assert edited("score-left.policy.ref", "base")["score-left"].policy.of.name == "base"
    assert edited("base.keep", [2, 4])["base"].keep == (2, 4)


def test_override_takes_the_short_name_of_a_kind():
    rec = {"recipe": "r", "goals": [], "stages": {"a": {"kind": "x", "loss": {"kind": "losses.policy.DAPO"}}}}
    override(rec, "a.loss", "GRPO")
    assert rec["stages"]["a"]["loss"] == {"kind": "losses.policy.GRPO"}
    override(rec, "a.loss.kind", "DAPO")
    assert rec["stages"]["a"]["loss"] == {"kind": "losses.policy.DAPO"}


def test_override_of_a_stage_whose_name_holds_dots():
    rec = {"stages": {"eval.a.b": {"steps": 1}, "eval": {"a": 2}}}
    override(rec, "eval.a.b.steps", 5)
    assert rec["stages"] == {"eval.a.b": {"steps": 5}, "eval": {"a": 2}}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("bse.steps", r"unknown stage 'bse'.*did you mean 'base'"),
        ("base.stps", r"unknown field 'stps'.*did you mean 'steps'"),
        ("base.rates.1.value", r"unknown field '1'.*rates has 1 item \(0\)"),
        ("base.name", r"a stage's name cannot be set; it is its key in stages"),
        ("base.rates.value", r"unknown field 'value'"),
        ("base.steps.deep", r"unknown field 'deep'"),
        ("base", r"name a field of the stage"),
        ("base.", r"unknown field ''"),
    ],
)
def test_override_names_what_is_wrong(path, says):
    with pytest.raises(SpecError, match=says):
        override(record(toy.small()), path, 3)


# --- nothing else is ever raised ---------------------------------------------------------------------------------------

SMALL = record(toy.small())
words = st.sampled_from(
    ["base", "data", "rates", "0", "1", "value", "kind", "ref", "steps", "source", "keep", "name", "", "-1", "é"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | words | st.just("tests.toy.Rate"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=30))
def test_parse_set_only_raises_spec_errors(text):
    try:
        path, _ = parse_set(text)
    except SpecError:
        return
    assert path


@settings(max_examples=150, deadline=None)
@given(path=st.lists(words, min_size=1, max_size=5).map(".".join), value=anything)
def test_any_edit_loads_or_is_a_spec_error(path, value):
    rec = json.loads(json.dumps(SMALL))
    with suppress(SpecError):
        override(rec, path, value)
        from_record(rec)


parts = {"recipe": anything, "goals": anything, "stages": st.dictionaries(words, anything), "table": anything}


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*parts, "seed"]) | st.text(max_size=3), anything) | st.fixed_dictionaries(parts))
def test_any_record_loads_or_is_a_spec_error(rec):
    with suppress(SpecError):
        from_record(rec)


def test_a_raised_version_shows_even_where_the_spec_is_a_default(monkeypatch):
    """A mended default loss must invalidate what it made."""
    from tutelage.losses.nll import NLL
    from tutelage.stages.fit import Fit
    from tutelage.stages.model import NewModel

    model = NewModel(name="m", alphabet="ab").out()
    stage = lambda **more: Fit(name="f", model=model, data=model, **more)  # noqa: E731
    before, written = canonical(stage(), lambda s: None), canonical(stage(loss=NLL()), lambda s: None)
    assert before == written
    monkeypatch.setattr(NLL, "version", 2)
    assert canonical(stage(), lambda s: None) != before
    assert canonical(stage(), lambda s: None) == canonical(stage(loss=NLL()), lambda s: None)
