"""A diagnosis drawn: a table with the verdicts in the terminal, and one picture of how the numbers go with the position.

Reads the facts of a `Diagnose` stage and says what they say. Leaves out: what the thresholds are (stages/verdict.py), and
the replies, which are in the stage's Parquet files.
"""

from __future__ import annotations

import io
from html import escape as quoted
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tutelage.report import plots, terminal
from tutelage.report.html import save as save_page
from tutelage.report.picture import SUFFIXES
from tutelage.spec import UserError

JSON = dict[str, Any]
COLUMNS = (
    ("KL", "kl"),
    ("top-1", "top1"),
    ("overlap", "overlap"),
    ("mass", "mass"),
    ("NLL", "nll"),
    ("advantage", "advantage"),
    ("spread", "spread"),
    ("clipped", "clipped"),
)
SHARES = ("top1", "overlap", "mass", "clipped")
"""Shown in percent."""
PANELS = (("KL, nats a token", "kl"), ("Top-1 agreement", "top1"), ("Top-k overlap", "overlap"), ("Advantage", "advantage"))
LOOKS = {"teaches": "green", "warm up": "yellow", "unclear": "yellow"}


def number(name: str, found: JSON) -> str:
    """``0.512 (0.48 to 0.55)``; shares in percent."""
    if found["mean"] is None:
        return "–"
    mean, low, high = (
        f"{100 * found[end]:.1f}" if name in SHARES else f"{found[end]:.3g}".replace("-", "−")
        for end in ("mean", "low", "high")
    )
    return f"{mean} ({low} to {high})"


def measured(found: JSON) -> list[JSON]:
    """The teachers that were measured, domain by domain."""
    return sorted((each for each in found["teachers"] if each.get("numbers")), key=lambda each: str(each["domain"]))


# --- terminal ------------------------------------------------------------------------------------------------------------


def show(found: JSON, console: Console) -> None:
    """Prints a diagnosis: what ``tutelage diagnose --json`` prints."""
    rows = measured(found)
    if rows:
        made = terminal.table(f"Teachers on the replies of {found['student']}", caption(found))
        columns = COLUMNS if console.width >= terminal.ROOMY else COLUMNS[:6]
        made.add_column("teacher", overflow="fold", min_width=12)
        for head, name in columns:
            made.add_column(f"{head}\n%" if name in SHARES else head, justify="right", no_wrap=True)
        for each in rows:
            cells = (stacked(number(name, each["numbers"][name])) for _, name in columns)
            made.add_row(escape(title(each)), *cells)
        console.print(made)
        for each in rows:
            console.print(f"[dim]{escape(drifts(each))}[/]", highlight=False, soft_wrap=True)
    for each in [*rows, *(e for e in found["teachers"] if not e.get("numbers"))]:
        verdict, colour = each["verdict"], LOOKS.get(each["verdict"]["level"], "red")
        console.print(
            f"[bold]{escape(title(each))}[/]: [{colour}]{escape(verdict['words'])}[/]", highlight=False, soft_wrap=True
        )


def stacked(text: str) -> str:
    """`number`, the ends of the interval below it."""
    return text.replace(" (", "\n[dim]").replace(" to ", "\n").replace(")", "[/]")


def caption(found: JSON) -> str:
    counts = {each["domain"]: f"{each['replies']} to {each['prompts']} prompts of {each['domain']}" for each in measured(found)}
    return (
        f"means over tokens, 95 % intervals over prompts; replies: {', '.join(counts.values())}; top-{found['k']} of "
        f"{found['vocab']} tokens, temperature {found['temperature']:g}"
    )


def title(each: JSON) -> str:
    return each["teacher"] if each["domain"] in (None, each["teacher"]) else f"{each['teacher']} on {each['domain']}"


def drifts(each: JSON) -> str:
    """How KL and top-1 agreement change from the first to the second half of the replies."""
    said = [f"{head} {number(name, each['drift'][name])}" for head, name in COLUMNS[:2]]
    return f"{title(each)}, second halves of the replies less first halves: {', '.join(said)}"


# --- picture -------------------------------------------------------------------------------------------------------------


def check_out(path: Path) -> None:
    """Raises `UserError` for a picture that could not be drawn, before anything is computed."""
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise UserError(f"cannot draw {path}: give --out a name that ends in {', '.join(SUFFIXES)}")


def save(found: JSON, path: Path) -> None:
    """Draws how the numbers go with the position in the reply. Raises `UserError` where it cannot write."""
    check_out(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".html":
            save_page(page(found), path)
        else:
            path.write_bytes(paint(found, path.suffix[1:].lower()))
    except OSError as error:
        raise UserError(f"cannot write the picture to {path}: {error.strerror or error}; give another --out") from None


def page(found: JSON) -> str:
    """One self-contained HTML page."""
    name = quoted(f"Teachers on the replies of {found['student']}")
    heads = "".join(f"<th>{head}{', %' if key in SHARES else ''}</th>" for head, key in COLUMNS)
    rows = [
        f"<tr><td>{quoted(each['domain'])}</td><td>{quoted(each['teacher'])}</td>"
        + "".join(f"<td>{number(key, each['numbers'][key])}</td>" for _, key in COLUMNS)
        + "</tr>"
        for each in measured(found)
    ]
    said = "".join(f"<li><b>{quoted(title(each))}</b>: {quoted(each['verdict']['words'])}</li>" for each in found["teachers"])
    drawn = paint(found, "svg").decode()
    style = f"{plots.STYLE.read_text('utf-8')}\nmain{{overflow-x:auto}}main svg{{max-width:100%}}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{style}</style></head>"
        f"<body><header><h1>{name}</h1></header><main><ul>{said}</ul><table><tr><th>domain</th><th>teacher</th>{heads}</tr>"
        f'{"".join(rows)}</table><p class="soft">{quoted(caption(found))}</p>'
        f"{drawn[drawn.index('<svg') :]}</main></body></html>\n"
    )


def paint(found: JSON, form: str) -> bytes:
    """The picture as SVG, PNG or PDF: a panel a number, a line with its interval a teacher and domain."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = plots.light()
    rows, out = measured(found), io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "diagnosis", "text.parse_math": False, "pdf.fonttype": 42}):
        figure = Figure(figsize=(9, 6 + 0.18 * len(rows)), facecolor=colours["card"], layout="constrained")
        panels = figure.subplots(2, 2).flat
        for (head, name), axes in zip(PANELS, panels, strict=True):
            _panel(axes, head, name, rows, colours)
        figure.supxlabel("position in the reply, tokens", size=9, color=colours["soft"])
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8.5)
        figure.savefig(out, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return out.getvalue()


def _panel(axes: Any, head: str, name: str, rows: list[JSON], colours: dict[str, str]) -> None:
    places = sorted({(at["first"], at["last"]) for each in rows for at in each["positions"]})
    spot = {place: i for i, place in enumerate(places)}
    for n, each in enumerate(rows):
        at = [p for p in each["positions"] if p[name]["mean"] is not None]
        x = [spot[p["first"], p["last"]] for p in at]
        colour, dash = colours[plots.SERIES[n % len(plots.SERIES)]], "-" if n < len(plots.SERIES) else (0, (4, 3))
        ends = [[p[name][end] for p in at] for end in ("low", "high")]
        axes.fill_between(x, *ends, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, [p[name]["mean"] for p in at], "o", color=colour, linestyle=dash, ms=3, linewidth=1.4, label=title(each))
    axes.set_title(head, size=10, color=colours["ink"], loc="left")
    axes.set_xticks(range(len(places)), [str(a) if a == b else f"{a}–{b}" for a, b in places])
    axes.tick_params(colors=colours["soft"], labelsize=8, length=0)
    axes.grid(axis="y", color=colours["rule"])
    axes.set(facecolor=colours["card"], axisbelow=True)
    for side in axes.spines.values():
        side.set_visible(False)
