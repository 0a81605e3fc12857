"""What privacy a run gives: `privacy`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedex_lora.cli._shared import Debug, Json, Overrides, app, consoles, one_line_errors, print_json

if TYPE_CHECKING:
    from rich.console import Console


@app.command()
@one_line_errors
def privacy(
    config: Annotated[Path, typer.Argument(help="A TOML file with a table [privacy].")],
    set_: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what privacy a run gives each party. Noise, epsilon, what the rows allow, what is left of the budget; nothing is trained."""
    from fedex_lora.client.training import silence_libraries
    from fedex_lora.config import read_config
    from fedex_lora.runs.privacy import describe_privacy

    silence_libraries()
    said = describe_privacy(read_config(config, set_ or []))
    if as_json:
        print_json(said)
    else:
        _show(said, consoles(False))


def _show(said: Mapping[str, Any], console: "Console") -> None:
    from fedex_lora.cli.console import console_table

    def cells(row: Mapping[str, Any], keys: list[str]) -> list[str]:
        return ["–" if row.get(key) is None else value if isinstance(value := row[key], str) else f"{value:.3g}" for key in keys]

    names = {
        "rows": "rows",
        "rate": "q",
        "times": "steps",
        "sigma": "sigma",
        "each": "noise of one",
        "noise": "of all",
        "epsilon": "epsilon",
    }
    names |= {"spent": "spent so far", "paid": "rounds paid"}
    rounds = said["rounds"]
    clients = {name: {**row, "times": f"{row['round_steps']} x {rounds}"} for name, row in said["clients"].items()}
    clients |= {name: {**row, "paid": f"{row['rounds_paid']} of {rounds}"} for name, row in clients.items() if "rounds_paid" in row}
    shown = [key for key in names if any(row.get(key) is not None for row in clients.values())]
    if clients:
        title = f"{said['method']}, {said['rounds']} rounds: epsilon of a record, at delta {said['delta']:g}"
        headings = ["client", *(names[key] for key in shown)]
        console.print(console_table(title, headings, [[name, *cells(row, shown)] for name, row in clients.items()]))
    else:
        console.print("privacy.epsilon is not set: this run is not private", highlight=False)
    allows = [[name, epsilon, *cells(row, list(row))] for name, each in said["allows"].items() for epsilon, row in each.items()]
    console.print(console_table("what the rows allow", ["client", "epsilon", "sigma", "noise of one", "of all"], allows))
    for line in said["notes"]:
        console.print(line, highlight=False, markup=False)
