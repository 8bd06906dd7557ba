"""``tutelage report``: a run's table in the terminal, its report as a page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.commands.shared import STORE, AsJson, Where, console, load_run, near, open_store, print_json
from tutelage.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from tutelage.store import Store


def report(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="A run, a recipe (its newest run), or `last`.")] = "last",
    store: Where = STORE,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a run's table and write its report as one self-contained HTML page."""
    home = open_store(store)
    body = load_run(home, run)
    if out and not as_json:
        check_out(out)
    if as_json:
        from tutelage.report import data

        return print_json(data.collect(home, body["run"]))
    show(home, body["run"], bool(body["goals"][0]["record"].get("table")), console(), out)


PAGES = (".html", ".htm")


def check_out(path: Path, suffixes: tuple[str, ...] = PAGES) -> None:
    """Raises `UserError` where no file can be written, before anything is printed."""
    why = ""
    try:
        if path.is_dir():
            why = "it is a folder"
        elif path.suffix.lower() not in suffixes:
            why = "it is an HTML page" if suffixes == PAGES else f"it ends in none of {', '.join(suffixes)}"
        else:
            above = next(p for p in path.absolute().parents if p.exists())
            if not above.is_dir():
                why = f"{above} is not a folder"
            elif not os.access(path if path.exists() else above, os.W_OK):
                why = "no permission"
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise UserError(f"cannot write the report to {path}: {why}; give --out FILE.html")


def show(home: Store, name: str, table: bool, out: Console, to: Path | None = None) -> None:
    """The recipe's table, and the report as a file."""
    from tutelage.report import html, terminal

    if table:
        terminal.show(home, name, out)
    path = to or home.root / "reports" / f"{name}.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        html.write(home, name, path)
    except OSError as error:
        raise UserError(f"cannot write the report to {path}: {error.strerror}; give --out FILE.html") from None
    out.print(f"report: {near(path)}", highlight=False, soft_wrap=True)
