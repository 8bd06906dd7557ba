"""``tutelage recipes``: the recipes there are."""

from __future__ import annotations

from tutelage.commands.shared import AsJson, console, print_json


def recipes(as_json: AsJson = False) -> None:
    """List the recipes there are."""
    from tutelage.catalog import recipes as found

    if as_json:
        return print_json([{"name": r.name, "description": r.description, "where": r.where} for r in found().values()])
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for each in found().values():
        table.add_row(each.name, each.description)
    console().print(table, highlight=False)
