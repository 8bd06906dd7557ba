"""Stores with files that are no good, and words that name nothing: every reading command ends with 0, 1 or 2, says so in a
line, and leaves everything that was made and everything that happened as it was."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import toy
from tests.fuzz.broken import as_text, broken, byte_edits, edited, edits, examples, texts, tried
from tests.report import synthetic
from tests.test_upkeep import make
from tutelage import cli, upkeep
from tutelage.ancestry import gather
from tutelage.estimate import Estimator
from tutelage.files import read_jsonl
from tutelage.graph import record
from tutelage.index import summaries
from tutelage.report import data
from tutelage.spec import UserError, file_hashes, joint_hash
from tutelage.store import Store, seal

WORDS = [
    "kind",
    "model",
    "data",
    "scores",
    "name",
    "key",
    "ref",
    "port",
    "policy",
    "base",
    "sft",
    "mopd",
    "step",
    "record",
    "goals",
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """A store of toy stages in a chain, with a checkpoint of unfinished work; and one of a whole recipe with its table."""
    root = tmp_path_factory.mktemp("fuzz")
    small = Store(root / "small")
    with mock.patch("os.fsync"):
        make(small, toy.small())
        make(small, toy.small(seed=1))
    small.event("something", more="happened")
    work = small.work("0" * 32) / "checkpoint-3"
    work.mkdir()
    (work / "context.json").write_text('{"step": 3, "content": ""}')
    (root / "small.json").write_text(json.dumps(record(toy.small(steps=11))))
    synthetic.build(root / "whole", n=4)
    return {"small": small.root, "whole": root / "whole"}


def files_of(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of what must not change: everything but caches and pages."""
    found = {}
    for part in ("artifacts", "work", "runs", "events"):
        for folder, _, names in os.walk(root / part):
            for stat, name in ((os.stat(f"{folder}/{name}"), name) for name in names):
                found[f"{folder}/{name}"] = (stat.st_size, stat.st_mtime_ns)
    return found


def breakable(root: Path) -> list[str]:
    """The files that commands read, those of which there are few as often as the rest."""
    found = sorted(str(p.relative_to(root)) for p in (root / "artifacts").glob("*/*") if p.suffix in (".json", ".jsonl"))
    few = [str(p.relative_to(root)) for part in ("runs", "events", "work") for p in (root / part).rglob("*") if p.is_file()]
    return found[:: max(1, len(found) // 12)] + sorted(few) * 4 + ["format", "index.json", "index.runs.json"]


def told(words: list[str]) -> tuple[int, str, str]:
    """(exit code, output, errors) of a command, called in this process; output is strict UTF-8, as a pipe's is."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with mock.patch.object(sys, "argv", ["tutelage", *words]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    for each in (out, err):
        each.flush()
    assert isinstance(code, int)
    return code, *(each.buffer.getvalue().decode() for each in (out, err))  # type: ignore[attr-defined]


def judged(root: Path, words: list[str]) -> None:
    before = files_of(root)
    code, _, errors = told([*words, "--store", str(root)])
    assert code in (0, 1, 2)
    assert "Traceback" not in errors
    if errors.startswith("error: "):
        assert code == 2
        assert errors.count("\n") == 1
        assert len(errors) < 1010
    assert files_of(root) == before


COMMANDS = {
    "small": [
        ["lineage", "score-left"], ["lineage", "score-left", "--short"], ["lineage", "left", "--to", "right"],
        ["lineage", "left@0", "--to", "data", "--json"], ["plan", "../small.json"], ["plan", "../small.json", "--json"],
        ["store", "list"], ["store", "list", "--json"], ["store", "verify"], ["store", "verify", "base", "--json"],
        ["compare", "left", "right", "--json"], ["compare", "small-1", "small-2", "--json"], ["report", "--json"],
    ],
    "whole": [
        ["report", "--json"], ["report", "--json"], ["report"], ["lineage", "mopd"], ["store", "list"],
        ["compare", "quickstart:sft", "quickstart:student", "--json"], ["compare", "mopd@0", "mopd@1", "--json"],
    ],
}  # fmt: skip
"""Pages take half a second each, so that there are few of them here."""


def change(file: Path, how: Any, sealed: bool) -> None:
    raw = file.read_bytes() if file.exists() else b"{}"
    if isinstance(how, bytes):
        file.write_bytes(how)
    elif isinstance(how[0][0], int) or file.suffix == ".jsonl" or file.name in ("order", "index.json", "index.runs.json"):
        file.write_bytes(broken(raw, how) if isinstance(how[0][0], int) else as_text(edited(_lines(raw), how)).encode())
    else:
        made = edited(json.loads(raw), how)
        if sealed and isinstance(made, dict) and "seal" in made:
            made["seal"] = seal(made)
        file.write_text(as_text(made), "utf-8", "surrogatepass")


@examples(120)
def test_a_store_with_other_bytes_is_read_or_refused_and_never_changed(stores, tmp_path, monkeypatch, count):
    homes = {name: tmp_path / name for name in stores}
    for name, root in stores.items():
        shutil.copytree(root, homes[name])
    shutil.copy(stores["small"].parent / "small.json", tmp_path)
    monkeypatch.chdir(homes["small"])
    monkeypatch.setenv("COLUMNS", "120")
    spots = {name: breakable(root) for name, root in homes.items()}

    @tried(count)
    @given(
        st.sampled_from(["small"] * 4 + ["whole"]),
        st.integers(0, 999),
        st.integers(0, 99),
        st.binary(max_size=30) | byte_edits | edits(WORDS, 2) | edits(WORDS, 2),
        st.booleans(),
    )
    def check(name, where, which, how, sealed):
        home = homes[name]
        spot = spots[name][where % len(spots[name])]
        file = home / spot
        try:
            change(file, how, sealed)
            judged(home, COMMANDS[name][which % len(COMMANDS[name])])
        finally:
            for cache in home.glob("index*.json"):
                cache.unlink()
            if (stores[name] / spot).exists():
                shutil.copy(stores[name] / spot, file)

    check()


def _lines(raw: bytes) -> list[Any]:
    return [json.loads(line) for line in raw.decode().splitlines() if line.startswith("{")][:5]


def bytes_of(root: Path) -> str:
    """A digest of what must not change."""
    return joint_hash(
        {f"{part}/{k}": v for part in ("artifacts", "runs", "events") for k, v in file_hashes(root / part).items()}
    )


@examples(1000)
def test_what_the_commands_stand_on_reads_or_refuses_and_changes_no_byte(stores, tmp_path, count):
    """The same without drawing: every reader of runs, artifacts, events and metrics, for each broken file."""
    home = tmp_path / "small"
    shutil.copytree(stores["small"], home)
    store, key = Store(home), summaries_of(home)["score-left"]
    spots = breakable(home)
    readers: list[Callable[[], Any]] = [
        lambda: store.load_run("last"), lambda: data.collect(store, "last"), lambda: store.find("left"),
        lambda: list(gather(store, store.meta(key))),
        lambda: list(upkeep.verify(store, [key])), lambda: upkeep.survey(store, upkeep.kept_runs(store)),
        lambda: [list(read_jsonl(f)) for f in (home / "events").iterdir()], lambda: store.metrics(key),
        lambda: Estimator(Store(home, create=False)),
    ]  # fmt: skip

    @tried(count)
    @given(st.integers(0, 999), st.binary(max_size=30) | byte_edits | edits(WORDS, 2), st.booleans())
    def check(where, how, sealed):
        spot = spots[where % len(spots)]
        file = home / spot
        try:
            change(file, how, sealed)
            before = bytes_of(home)
            for read in readers:
                with suppress(UserError):
                    read()
            assert bytes_of(home) == before
        finally:
            for cache in home.glob("index*.json"):
                cache.unlink()
            if (stores["small"] / spot).exists():
                shutil.copy(stores["small"] / spot, file)

    check()


def summaries_of(root: Path) -> dict[str, str]:
    return {s.name: k for k, s in summaries(Store(root)).items()}


# --- words ---------------------------------------------------------------------------------------------------------------

NAMES = ["base", "left", "score-left", "small", "small-1", "last", "data", "left@0", "left@1", "base:policy"]
FORMS = (
    ["lineage", "{}"], ["lineage", "base", "--to", "{}"], ["compare", "{}", "left", "--json"],
    ["compare", "left", "{}", "--json"], ["store", "verify", "{}"], ["store", "list", "--name", "{}"],
    ["store", "list", "--kind", "{}"], ["report", "{}", "--json"],
)  # fmt: skip


@examples(120)
def test_words_that_name_nothing_are_refused_in_a_line(stores, monkeypatch, count):
    monkeypatch.setenv("COLUMNS", "120")
    parts = st.lists(st.sampled_from([*NAMES, ":", "@", "*", "[", "~", "-", "/", ".."]) | texts, max_size=3).map("".join)
    given_words = parts.map(lambda text: "".join(c for c in text if c != "\0" and not "\ud800" <= c <= "\udc7f"))

    @tried(count)
    @given(st.sampled_from(FORMS), given_words)
    def check(form, word):
        judged(stores["small"], [each.replace("{}", word) for each in form])

    check()
