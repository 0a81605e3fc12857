"""Training on this machine: `demo`, `run`, `compare`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fedex_lora.cli._shared import Debug, Json, Overrides, app, consoles, fail, fail_without_numbers, numbers, one_line_errors, print_json
from fedex_lora.errors import UsageError


@app.command()
@one_line_errors
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs and the table go; an earlier demo there is replaced.")] = Path(
        "fedex-lora-demo"
    ),
    rounds: Annotated[Optional[int], typer.Option(min=1, help="Rounds of each method.")] = None,  # noqa: UP045 (typer)
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """See what exact aggregation is, offline, in about two minutes. Three hospitals, four methods."""
    from fedex_lora.demo import run_demo

    console = consoles(as_json)
    result = run_demo(out, rounds, console)
    if as_json:
        print_json(result)
    fail_without_numbers({name: (row["exactness_error"], row["realised_error"]) for name, row in result["methods"].items()})


@app.command()
@one_line_errors
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file.")],
    set_: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="The run folder; by default runs/NAME of the file.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted, to the same bits.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a federation on this machine, as a TOML file says."""
    from fedex_lora.config import read_config

    out = out or Path("runs") / config.stem
    settings = read_config(config, set_ or [], begun=out if resume else None)
    from fedex_lora.display import Display
    from fedex_lora.runner import run as run_here

    console = consoles(as_json)
    last: dict[str, Any] = {}
    failed: list[int] = []

    def remember(event: str, **fields: Any) -> None:
        if event in ("round_done", "run_done"):
            last.update(fields)
        if fields.get("not_finite"):
            failed.append(fields["round"])

    def both(event: str, **fields: Any) -> None:
        remember(event, **fields)
        display(event, **fields)

    try:
        with Display(console) as display:
            run_here(settings, out, both, resume)
    except KeyboardInterrupt:
        fail(f"interrupted; what was done is kept: the same command with --out {out} --resume goes on", 130)
    console.print(f"final model: {out / 'final'}   check it: fedex-lora verify {out}", highlight=False)
    if as_json:
        print_json({"method": settings.method, "out": str(out), **last})
    if failed:
        fail(
            f"error: the errors of round {', '.join(map(str, failed))} cannot be computed: see the warnings, and {out / 'events.jsonl'}", 1
        )


@app.command()
@one_line_errors
def check(
    config: Annotated[Path, typer.Argument(help="A TOML file.")],
    set_: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List every problem of a run's rows. Labels, lengths, duplicates, classes, at each client; nothing is trained."""
    from fedex_lora.check import check as check_here
    from fedex_lora.client import quiet
    from fedex_lora.config import read_config

    quiet()
    found = check_here(read_config(config, set_ or []))
    stops = sum(finding.stops for finding in found)
    if as_json:
        print_json({"findings": [vars(finding) for finding in found], "stops": stops})
    else:
        for finding in found:
            consoles(False).print(f"{'!' if finding.stops else ' '} {finding.words}", highlight=False, markup=False)
    if stops:
        fail(f"{stops} of {len(found)} finding{'' if len(found) == 1 else 's'} would stop a run (marked !)", 1)


@app.command()
@one_line_errors
def compare(
    config: Annotated[Path, typer.Argument(help="A TOML file; its method, seed and learning rate are varied.")],
    methods: Annotated[
        str, typer.Option(help="Comma-separated METHOD, METHOD+GAUGE, or METHOD@2r for twice the rank.")
    ] = "fedex,fedit,ffa",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    learning_rates: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Comma-separated grid; by default a third of the file's, it, and three times it."),
    ] = None,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The method that differences are from; by default fedit, or the first."),
    ] = None,
    target: Annotated[Optional[float], typer.Option(help="Count rounds to this value; by default the reference's end.")] = None,  # noqa: UP045
    controls: Annotated[bool, typer.Option(help="Also run fedit+balanced, and ffa@2r where ffa is.")] = True,
    jobs: Annotated[int, typer.Option(help="Runs at once.")] = 1,
    set_: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="Where runs and tables go; an interrupted comparison continues.")] = None,  # noqa: UP045
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods fairly. Paired seeds, a learning rate for each chosen on held-out training rows, confidence intervals."""
    from fedex_lora.compare import compare as compare_here
    from fedex_lora.compare import footnotes, table_rows, title
    from fedex_lora.config import read_config
    from fedex_lora.display import Runs, table

    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: give one or more")
    settings, console = read_config(config, set_ or []), consoles(as_json)
    out = out or Path("compare") / config.stem
    names, rates = methods.split(","), numbers(learning_rates, "--learning-rates", "1e-3,3e-3")
    with Runs(console) as tell:
        result = compare_here(settings, names, _seeds(seeds), out, rates, reference, target, controls, jobs, tell)
    if as_json:
        print_json(result)
    else:
        columns, rows = table_rows(result)
        for heading, start, stop in ((title(result), 1, 5), ("costs", 5, None)):
            console.print(table(heading, [columns[0], *columns[start:stop]], [[row[0], *row[start:stop]] for row in rows]))
        console.print(f"{footnotes(result)} {out / 'compare.json'}", highlight=False)
    fail_without_numbers({row["name"]: [row["exactness_error"]] for row in result["methods"]})


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text!r}: give comma-separated whole numbers, such as 0,1,2") from None
