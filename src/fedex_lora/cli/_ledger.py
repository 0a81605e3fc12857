"""What was ever trained on a party's rows: `ledger`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedex_lora.cli._shared import Debug, Json, app, consoles, one_line_errors, print_json
from fedex_lora.errors import UsageError


@app.command()
@one_line_errors
def ledger(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The ledger of a party.")],
    begin: Annotated[bool, typer.Option("--begin", help="Begin it: nothing was ever trained on these rows.")] = False,
    delta: Annotated[float, typer.Option(help="Of (epsilon, delta).")] = 1e-5,
    accountant: Annotated[str, typer.Option(help='"prv" or "rdp": see privacy.accountant.')] = "prv",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what was ever trained on a party's rows. Runs, rounds, and epsilon of all of it; or begin a ledger."""
    from fedex_lora.privacy.account import spendings
    from fedex_lora.privacy.ledger import begin_ledger, read_ledger

    if not 0 < delta < 1 or accountant not in ("prv", "rdp"):
        raise UsageError(f'--delta {delta:g} --accountant {accountant}: give a number between 0 and 1, and "prv" or "rdp"')
    console = consoles(False)
    if begin:
        begin_ledger(file)
        if not as_json:
            console.print(f"{file} is begun: name it as privacy.ledger, or as ledger in a node's file; never remove it", highlight=False)
            return
    listed = spendings(read_ledger(file), delta, accountant)
    if as_json:
        print_json({"ledger": str(file), "delta": delta, "accountant": accountant, "spent": [asdict(one) for one in listed]})
        return
    from rich.table import Table

    columns: dict[str, Literal["left", "right"]] = {"client": "left", "run": "left", "rows": "left"}
    columns |= dict.fromkeys(("rounds", "answered", "steps", f"epsilon at delta {delta:g}"), "right")
    table = Table(box=None, pad_edge=False)
    for name, side in columns.items():
        table.add_column(name, justify=side)
    for one in listed:
        words = (one.client or "if one party", one.run or "all runs", one.rows or "all rows")
        numbers = (str(one.rounds), str(one.answered), str(one.steps), f"{one.epsilon:.3f}")
        table.add_row(*(ascii(word)[1:-1] for word in words), *numbers)
    console.print(table if listed else "nothing was trained on these rows", highlight=False)
