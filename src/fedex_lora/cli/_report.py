"""Looking at runs: `report`, `figure`, `watch`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from fedex_lora.cli._shared import Debug, Json, app, consoles, one_line_errors, print_json

Runs = Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs (a comparison's, the demo's).")]


@app.command()
@one_line_errors
def report(
    runs: Runs,
    out: Annotated[Optional[Path], typer.Option("-o", "--out", help="The HTML file; by default report.html in the first folder.")] = None,  # noqa: UP045
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One self-contained HTML page about one run, or several side by side."""
    from fedex_lora.display import size
    from fedex_lora.report import write_report

    made = write_report(runs, out or runs[0] / "report.html")
    if as_json:
        print_json(made)
    else:
        consoles(False).print(f"{made['out']}: {made['runs']} runs, {made['charts']} charts, {size(made['bytes'])}", highlight=False)
