"""What the rows of a run are: `data`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedex_lora.cli._shared import Debug, Json, Overrides, app, consoles, one_line_errors, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from fedex_lora.runs.data import RowReport, SeenRow

MARKS = ("⟦⟧", "⟪⟫", "⦃⦄", "⦅⦆")  # the loss is on what stands between two of them that no text holds
COLOUR = "black on green"
MARGIN = "    "
COLUMNS = 8  # of classes, that a table has room for


@app.command()
@one_line_errors
def data(
    config: Annotated[Path, typer.Argument(help="A TOML file.")],
    set_: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show in all, taken from the clients in turn.")] = 3,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="Only this client's rows.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a run's rows as its model sees them. What the loss is on, lengths, classes of each client; nothing is trained."""
    from fedex_lora.client.training import silence_libraries
    from fedex_lora.config import read_config
    from fedex_lora.runs.data import describe_rows

    silence_libraries()
    report = describe_rows(read_config(config, set_ or []), rows, client)
    if as_json:
        print_json(asdict(report))
        return
    console = consoles(False)
    for line in (*_shown(console, report), *(f"{note}\n" for note in report.notes)):
        console.print(line, highlight=False, markup=False)
    if report.max_length is not None:
        heading = ["tokens of", "least", "median", "95 %", "most"]
        console.print(_table(heading, [[of, *asdict(one).values()] for of, one in report.lengths.items()]))
        console.print(_cut(report, report.max_length), highlight=False)
    _clients(console, report)


def _shown(console: "Console", report: "RowReport") -> list["Text"]:
    """A line that says how the loss is marked, and the rows."""
    from rich.text import Text

    texts = [text for row in report.shown for text, _ in row.parts] + [row.answer or "" for row in report.shown]
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    first, last = ("", "") if coloured else _marks("".join(texts))
    legend = (
        Text("the loss is on what is ").append("so", COLOUR) if coloured else Text(f"the loss is on what stands between {first} and {last}")
    )

    def marked(text: str) -> Text:
        return Text(f"{first}{_visible(text)}{last}", COLOUR if coloured else "")

    def told(row: "SeenRow") -> Text:
        line = Text(f"\n{row.client}, {row.place}")
        if row.tokens is not None:
            line.append(f", {row.tokens} tokens")
            line.append(f", {row.loss_tokens} with the loss" if row.loss_tokens is not None else "")
            line.append(f" (cut, of {row.whole})" if row.whole != row.tokens else "")
        if row.answer is not None:
            line.append(f": {report.loss} ").append_text(marked(row.answer))
        line.append(f"\n{MARGIN}")
        for text, on in row.parts:
            line.append_text(marked(text)) if on else line.append(_visible(text))
        return line

    return [legend, *map(told, report.shown), Text()] if report.shown else []


def _marks(texts: str) -> tuple[str, str]:
    """Two marks that no text holds."""
    pairs = (tuple(size * mark for mark in pair) for size in range(1, len(texts) + 2) for pair in MARKS)
    first, last = next(pair for pair in pairs if not any(mark in texts for mark in pair))
    return first, last


def _visible(text: str) -> str:
    """A text behind a margin, with what no terminal shows, or obeys, by its number."""
    shown = (char if char.isprintable() else f"\n{MARGIN}" if char == "\n" else f"<U+{ord(char):04X}>" for char in text)
    return "".join(shown)


def _cut(report: "RowReport", longest: int) -> str:
    rows = sum(one.rows + one.held_out for one in report.clients.values())
    shorter = ", ".join(f"{count:,} at {size}" for size, count in report.cut.items() if size != longest)
    line = f"cut at task.max_length = {longest}: {report.cut[longest]:,} of {rows:,} rows" + (
        f" (it would be {shorter})" if shorter else ""
    )
    return line + (f"; left out, because nothing to learn is left of them: {report.nothing_left:,}" if report.nothing_left else "")


def _clients(console: "Console", report: "RowReport") -> None:
    """What each client holds; many classes are told in words."""
    names = list(dict.fromkeys(name for one in report.clients.values() for name in one.classes))
    columns = names if len(names) <= COLUMNS else []
    sums = {"tokens": "tokens", "loss_tokens": "with the loss"}
    shown = [key for key in sums if any(getattr(one, key) is not None for one in report.clients.values())]
    rows = [
        [client, one.rows, one.held_out, *(one.classes[name] for name in columns), *(getattr(one, key) for key in shown)]
        for client, one in report.clients.items()
    ]
    console.print(_table(["client", "to train on", "held out", *columns, *(sums[key] for key in shown)], rows))
    for client, one in report.clients.items() if names != columns else ():
        classes = ", ".join(f"{count:,} {name}" for name, count in one.classes.items() if count)
        console.print(f"{client}: {classes}", highlight=False, markup=False)
    console.print(f"{report.eval_rows:,} evaluation rows", highlight=False)


def _table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """The first column is text, and the others are whole numbers."""
    from fedex_lora.cli.console import console_table

    return console_table("", heading, [[row[0], *(f"{cell:,}" for cell in row[1:])] for row in rows])
