"""Looking at runs: `report`, `figure`, `watch`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedex_lora.cli._shared import Debug, Json, app, consoles, one_line_errors, print_json
from fedex_lora.errors import counted

Runs = Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs (a comparison's, the demo's).")]


@app.command()
@one_line_errors
def report(
    runs: Runs,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The HTML file; by default report.html in the first folder.")] = None,
    evaluated: Annotated[
        list[Path] | None,
        typer.Option(help="A file of what `evaluate RUN --json` printed: its metrics, classes and confusion matrix are shown, too."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One HTML page about one run, or several side by side. It is self-contained."""
    from rich.filesize import decimal

    from fedex_lora.report import write_report

    made = write_report(runs, out or runs[0] / "report.html", evaluated or [])
    if as_json:
        print_json(made)
    else:
        line = (
            f"{made['out']}: {counted(made['runs'], 'run')}, {counted(made['charts'], 'chart')}, {decimal(int(made['bytes']), precision=2)}"
        )
        consoles(False).print(line, highlight=False, markup=False)


@app.command()
@one_line_errors
def figure(
    number: Annotated[int, typer.Argument(help="The paper's: 2, 4, 5 (by layer, first round) or 3, 6, 7, 8, 9 (across rounds).")],
    runs: Runs,
    out: Annotated[Path | None, typer.Option("-o", "--out", help=".pdf, .svg or .png; by default figure-N.pdf.")] = None,
    value: Annotated[str, typer.Option(help="relative (to the ideal update) or scaled (divided by sqrt(out in)).")] = "relative",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw the paper's figures of what plain averaging loses. From any runs; says which of its observations hold there."""
    from fedex_lora.report import write_figure

    made = write_figure(number, runs, out or Path(f"figure-{number}.pdf"), value)  # type: ignore[arg-type]
    if as_json:
        print_json(made)
        return
    console = consoles(False)
    print_plain = partial(console.print, highlight=False, markup=False)
    print_plain(
        "the paper's observations, in these runs:" if made["observations"] else "no observations: nothing was lost, or too little ran"
    )
    for one in made["observations"]:
        print_plain(f"{one['run']}: {one['observation']}: {'yes' if one['holds'] else 'no'}, {one['number']:.3g} ({one['of']})")
    print_plain(made["out"])


@app.command()
@one_line_errors
def watch(
    run: Annotated[Path, typer.Argument(help="The folder of a run that goes on elsewhere, on this machine or a shared disk.")],
    once: Annotated[bool, typer.Option("--once", help="Show what there is by now, and leave.")] = False,
    debug: Debug = False,
) -> None:
    """Show a run that is going on elsewhere. Rounds, clients, metrics, bytes, time left."""
    from fedex_lora.cli.console import watch as show

    console = consoles(False)
    if not show(run, console, once):
        console.print("the run is not done yet", highlight=False)
