"""``tutelage compare``: two runs, rows of runs, or artifacts side by side; or the methods of one run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutelage.commands.report import PAGES, check_out
from tutelage.commands.shared import (
    STORE,
    AsJson,
    Where,
    console,
    find,
    load_run,
    near,
    newest_of,
    open_store,
    print_json,
)
from tutelage.spec import UserError, suggest

if TYPE_CHECKING:
    from tutelage.report.compare import Side
    from tutelage.store import Store

FORMS = (
    "Two of: a run (or a recipe: its newest run, or `last`; a whole run is compared with a whole run), RUN:ROW, or an artifact "
    "(NAME, NAME@SEED or the start of a key). One run whose table names methods: all of them, against its student. "
    "More than two RUN:ROW of one run: as methods, against the first."
)
OUT = "Where the page goes; of methods .svg, .png or .pdf too: the picture alone."


def compare(
    sides: Annotated[list[str], typer.Argument(metavar="A [B]...", help=FORMS)],
    store: Where = STORE,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help=OUT)] = None,
    as_json: AsJson = False,
) -> None:
    """Show what differs: specs, scores with paired tests, cost; and write a page with the curves.

    Of methods: scores against compute, as one table and one picture.
    """
    home = open_store(store)
    from tutelage.report import compare as comparison
    from tutelage.report import compare_show, html, methods_show, scatter

    several = len(sides) != 2
    if several:
        found = comparison.collect_methods(home, *_methods(home, sides))
        words = [found["run"], *(found["methods"]["rows"] if sides[1:] else ["methods"])]
    else:
        both = [_side(home, text) for text in sides]
        found = comparison.collect(home, *both)
        words = [both[0].name, "and", both[1].name]
    if as_json:
        return print_json(found)
    if out:
        check_out(out, (*PAGES, *scatter.SUFFIXES) if found["methods"] else PAGES)
    say = console()
    if several:
        methods_show.show(found["methods"], say)
    else:
        compare_show.show(found, say)
    name = "-".join(re.sub(r"[^\w.@-]+", "-", word) for word in words)
    path = out or home.root / "reports" / f"{name[:200]}.html"
    _write(path, found, html.methods_page if several else compare_show.page)
    say.print(f"{'page' if path.suffix.lower() in PAGES else 'picture'}: {near(path)}", highlight=False, soft_wrap=True)


def _write(path: Path, found: Any, page: Any) -> None:
    from tutelage.report import html, scatter

    if path.suffix.lower() not in PAGES:
        return scatter.save(found["methods"], path)
    try:
        html.save(page(found), path)
    except OSError as error:
        raise UserError(f"cannot write the comparison to {path}: {error.strerror}; give --out FILE.html") from None


def _methods(home: Store, words: list[str]) -> tuple[str, tuple[str, ...]]:
    """(run, rows) of one run's methods. Raises `UserError`."""
    runs = _runs(home)
    if len(words) == 1:
        if words[0] in runs:
            return load_run(home, words[0])["run"], ()
        fix = "; name a second side to compare it with" if ":" in words[0] else suggest(words[0], runs)
        raise UserError(f"{words[0]!r} is no run, and one thing alone is compared by its methods{fix}")
    rows: dict[str, str] = {}
    name = ""
    for word in words:
        run, colon, row = word.partition(":")
        its = load_run(home, run)["run"] if run in runs and colon else ""
        name = name or its
        if not its or its != name:
            raise UserError(
                f"more than two are compared as rows of one run, each RUN:ROW; {word!r} is no row of {name or 'a run'}"
            )
        if row in rows:
            raise UserError(f"{word!r} is named twice; name it once")
        rows[row] = word
    return name, tuple(rows)


def _runs(home: Store) -> set[str]:
    """Words that name a run."""
    runs = home.runs()
    return {*runs, *(r.rpartition("-")[0] for r in runs), *(["last"] if runs else [])}


def _side(home: Store, text: str) -> Side:
    """What a word names: a run first, then a row of one, then an artifact. Raises `UserError` with the nearest name."""
    from tutelage.index import summaries
    from tutelage.report.compare import side_of_artifact, side_of_row, side_of_run

    known = _runs(home)
    run, colon, row = text.partition(":")
    if run in known:
        name = load_run(home, run)["run"]
        return side_of_row(home, name, row) if colon else side_of_run(home, name)
    stored = summaries(home)
    made = {s.name for s in stored.values() if not s.damaged}
    name = run.rpartition("@")[0] or run
    if not {name, run} & made and not any(k.startswith(run) for k in stored):
        raise UserError(f"no run, recipe or artifact {run!r} in {home.root}{suggest(run, known | made)}")
    key, port = find(home, text)
    several = newest_of(home, run, key).partition(" ")[0]
    return side_of_artifact(home, several or text, key, port)
