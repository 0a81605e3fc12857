"""A first configuration: `init`."""

from pathlib import Path
from typing import Annotated

import typer

from fedex_lora.cli._shared import Debug, app, consoles, one_line_errors
from fedex_lora.errors import UsageError


@app.command()
@one_line_errors
def init(
    file: Annotated[Path, typer.Argument(help="Training rows: jsonl, json, csv, tsv or parquet.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The TOML file; by default NAME.toml here.")] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help="The evaluation set; by default one beside it.")] = None,
    model: Annotated[str, typer.Option(help="The base: a hub name or a folder.")] = "demo",
    label: Annotated[str | None, typer.Option(help="The column of classes or scores; by default guessed.")] = None,
    debug: Debug = False,
) -> None:
    """Write a first TOML from a file's columns. Kind of task, labels, clients and lengths are guessed, and said."""
    from fedex_lora.client.training import silence_libraries
    from fedex_lora.runs.first_config import first_config
    from fedex_lora.storage.files import write_text

    target = out or Path(f"{file.name.partition('.')[0]}.toml")
    if target.exists():
        raise UsageError(f"{target} exists: give another -o")
    silence_libraries()
    text = first_config(file, eval_, model, label)
    write_text(target, text)
    console = consoles(False)
    console.print(text.partition("\nmethod")[0], highlight=False, markup=False, soft_wrap=True)
    console.print(f"{target}   look at it, then: fedex-lora data {target}; fedex-lora run {target}", highlight=False, soft_wrap=True)
