"""The paper's tables and figures: `reproduce`."""

from pathlib import Path
from typing import Annotated

import typer

from fedex_lora.cli._shared import Debug, Json, Overrides, app, consoles, one_line_errors, print_json
from fedex_lora.errors import require_extra


@app.command()
@one_line_errors
def reproduce(
    target: Annotated[str, typer.Argument(help='table1, figure2 and so on, a recipe in TOML, or "list".')],
    scale: Annotated[
        str, typer.Option(help="smoke: made-up rows; small: real data, a small model; smollm2: table4 only; full: the paper's.")
    ] = "smoke",
    data: Annotated[
        Path | None,
        typer.Option(envvar="FEDEX_LORA_DATA", help="The folder that holds glue/, e2e/ and so on; without it, the hub."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A local folder of the base that the recipe names, or of folders named like the bases; without it, the hub."),
    ] = None,
    panel: Annotated[list[str] | None, typer.Option(help="Run this part only; may be repeated, as the next three.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="A method, as the recipe calls it.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="A data set, as the recipe calls it.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="A seed of the scale.")] = None,
    run: Annotated[bool, typer.Option(help="Run what is missing, or only make the tables from the records that are there.")] = True,
    set_: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where records and tables go; what is there is not run again.")] = Path("reproduce"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Reproduce a table or figure of the paper. Its runs, then the table, with the paper's numbers beside ours."""
    from fedex_lora.cli.console import console_table, runs_shown

    require_extra("scipy", "experiments", "the paper's tables")
    from fedex_lora.experiments.reproduce import Only, about, read_recipe, targets
    from fedex_lora.experiments.reproduce import reproduce as reproduce_here

    console = consoles(as_json)
    if target == "list":
        found = {name: read_recipe(name) for name in targets()}
        if as_json:
            print_json({name: recipe.title for name, recipe in found.items()})
        else:
            console.print(console_table("targets", ["target", "what"], [[name, recipe.title] for name, recipe in found.items()]))
        return
    only = Only(panel or (), row or (), column or (), seed or ())
    with runs_shown(console) as tell:
        result, grids = reproduce_here(target, scale, out, data, model, set_ or [], only, run, tell)
    if as_json:
        print_json(result)
        return
    console.print(about(result), highlight=False, markup=False)
    for grid in grids:
        console.print(f"\n{grid.markdown()}", highlight=False, markup=False)
    written = [f"{result['target']}.md, .tex and .json", *result["pictures"]]
    console.print(f"{out / scale}: {', '.join(written)}", highlight=False)
