"""The ``tutelage`` command.

Every mistake of the user is one message that names the thing, what is valid and the nearest match, on standard error, with
exit code 2 and before any work. A failed stage exits with 1, a stopped run with 128 + the signal. Imports of weight stay
inside the commands, so that ``plan`` and ``--help`` answer at once.

Leaves out: the commands themselves (commands/); catalog.py finds recipes, run.py runs them.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated, NoReturn

import typer

from tutelage.commands import compare, diagnose, lineage, plan, recipes, report, run, store
from tutelage.spec import UserError

app = typer.Typer(
    name="tutelage",
    help="Whole language-model post-training recipes, from SFT to multi-teacher distillation, as one graph of stages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (run.run, plan.plan, report.report, compare.compare, lineage.lineage, diagnose.diagnose, recipes.recipes):
    app.command()(command)
app.add_typer(store.app)


def _version(asked: bool) -> None:
    if asked:
        from tutelage import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _shared(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


def _text(words: list[str]) -> None:
    """Raises `UserError` for a word that is no text: it could be neither printed nor kept with a run."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word!a} on the command line is no UTF-8 text; rename what it names") from None


def main() -> NoReturn:
    """Runs the command line and exits."""
    gc.set_threshold(200_000, 50, 50)  # plans and lists are many small objects that live to the end
    try:
        _text(sys.argv[1:])
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
