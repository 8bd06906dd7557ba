"""``tutelage compare``: two runs, rows of runs, or artifacts side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.commands.report import check_out
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

FORMS = "A run (or a recipe: its newest run, or `last`), RUN:ROW, or an artifact: NAME, NAME@SEED or the start of a key."


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=FORMS)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; a whole run is compared with a whole run.")],
    store: Where = STORE,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what differs: specs, scores with paired tests, cost; and write a page with the curves."""
    home = open_store(store)
    if out and not as_json:
        check_out(out)
    from tutelage.report import compare as comparison
    from tutelage.report import compare_show

    sides = [_side(home, text) for text in (a, b)]
    found = comparison.collect(home, *sides)
    if as_json:
        return print_json(found)
    say = console()
    compare_show.show(found, say)
    words = (re.sub(r"[^\w.@-]+", "-", side.name) for side in sides)
    path = out or home.root / "reports" / f"{'-and-'.join(words)}.html"
    try:
        compare_show.write(found, path)
    except OSError as error:
        raise UserError(f"cannot write the comparison to {path}: {error.strerror}; give --out FILE.html") from None
    say.print(f"page: {near(path)}", highlight=False, soft_wrap=True)


def _side(home: Store, text: str) -> Side:
    """What a word names: a run first, then a row of one, then an artifact. Raises `UserError` with the nearest name."""
    from tutelage.index import summaries
    from tutelage.report.compare import side_of_artifact, side_of_row, side_of_run

    runs = home.runs()
    known = {*runs, *(r.rpartition("-")[0] for r in runs), *(["last"] if runs else [])}
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
