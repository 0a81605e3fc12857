"""Training on this machine: `demo`, `run`, `compare`."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedex_lora.cli._shared import Debug, Json, Overrides, app, consoles, fail, number_list, one_line_errors, print_json
from fedex_lora.errors import UsageError, require_extra

if TYPE_CHECKING:
    from rich.console import Console


@app.command()
@one_line_errors
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs and the table go; an earlier demo there is replaced.")] = Path(
        "fedex-lora-demo"
    ),
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each method; by default 5.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """See what exact aggregation is, offline, in about two minutes. Three hospitals, four methods."""
    from fedex_lora.cli.demo import run_demo

    console = consoles(as_json)
    result = run_demo(out, rounds, console)
    if as_json:
        print_json(result)
    _fail_without_numbers({name: (row["exactness_error"], row["realised_error"]) for name, row in result["methods"].items()})


@app.command()
@one_line_errors
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file.")],
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; by default runs/NAME of the file.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Short for --set rounds=N; with --resume a run gets more.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted, to the same bits.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check everything, and say what the run will take.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a federation on this machine, as a TOML file says."""
    from fedex_lora.config import Config, read_config

    out = out or Path("runs") / config.stem
    overrides = [*(set_ or []), *([f"rounds={rounds}"] if rounds else [])]
    settings = read_config(config, overrides, begun=out if resume else None)
    from fedex_lora.cli._around_run import dry_run_of, ending_lines, said_before
    from fedex_lora.cli.console import Display
    from fedex_lora.runs.emit import Emit
    from fedex_lora.runs.run import run as run_here
    from fedex_lora.runs.simulation import LocalSimulation
    from fedex_lora.storage.events import Event, RoundDone, RunDone, of_kind

    console, ends, places = consoles(as_json), list[Event](), list[LocalSimulation]()
    if dry_run:
        dry_run_of(settings, console, as_json)
        return

    def both(event: Event) -> None:
        if isinstance(event, RoundDone | RunDone):
            ends.append(event)
        display(event)

    def home(settings: Config, emit: Emit) -> LocalSimulation:
        places.append(said_before(settings, emit, console, begins=not resume))
        return places[0]

    try:
        with Display(console) as display:
            state = run_here(settings, out, both, resume, home)
    except KeyboardInterrupt:
        fail(f"interrupted; what was done is kept: the same command with --out {shlex.quote(str(out))} --resume goes on", 130)
    for line in ending_lines(state, out, places[0].pool.accounts):
        console.print(line, highlight=False)
    if as_json:
        last = {name: value for event in ends for name, value in event.fields().items()}
        print_json({"method": settings.method, "out": str(out), **last})
    if failed := [str(event.round) for event in of_kind(ends, RoundDone) if event.not_finite]:
        fail(f"error: the errors of round {', '.join(failed)} cannot be computed: see the warnings, and {out / 'events.jsonl'}", 1)


@app.command()
@one_line_errors
def check(
    config: Annotated[Path, typer.Argument(help="A TOML file.")],
    set_: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List every problem of a run's rows. Labels, lengths, duplicates, classes, at each client; nothing is trained."""
    from fedex_lora.client.training import silence_libraries
    from fedex_lora.config import read_config
    from fedex_lora.runs.check import check as check_here

    silence_libraries()
    found = check_here(read_config(config, set_ or []))
    stops = sum(finding.stops for finding in found)
    if as_json:
        print_json({"findings": [vars(finding) for finding in found], "stops": stops})
    else:
        for finding in found:
            consoles(False).print(f"{'!' if finding.stops else ' '} {finding.words}", highlight=False, markup=False)
        if not found:
            consoles(False).print("no problem found; `fedex-lora data` shows the rows", highlight=False)
    if stops:
        fail(f"{stops} of {len(found)} finding{'' if len(found) == 1 else 's'} would stop a run (marked !)", 1)


Text = str | None
Texts = list[str] | None
OPTIONS = "methods variant seeds tuning_seeds grid learning_rates primary equivalent at reference target controls".split()  # of a protocol


@app.command()
@one_line_errors
def compare(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A TOML file; its method, its seed and the grid's keys are varied.")],
    methods: Annotated[
        Text,
        typer.Option(help="Comma-separated METHOD, METHOD+GAUGE, or METHOD@2r for twice the rank; by default fedex,fedit,ffa."),
    ] = None,
    variant: Annotated[
        Texts, typer.Option(metavar='"NAME: method=M KEY=V"', help="A variant with keys of its own; the grid does not vary those.")
    ] = None,
    seeds: Annotated[Text, typer.Option(help="Comma-separated; by default 0,1,2.")] = None,
    tuning_seeds: Annotated[
        Text, typer.Option(help="Seeds to choose settings on, others than --seeds; by default the first of those.")
    ] = None,
    grid: Annotated[Texts, typer.Option(metavar="KEY=V,V", help="Values to choose from, of any keys; all combinations are tried.")] = None,
    learning_rates: Annotated[
        Text,
        typer.Option(help="Short for --grid training.learning_rate=...; without a grid a third of the file's, it, and three times it."),
    ] = None,
    primary: Annotated[
        Texts, typer.Option(metavar='"A > B"', help='A primary test of two variants; "A@4 > B@8" for their rounds. Corrected by Holm.')
    ] = None,
    equivalent: Annotated[
        Texts, typer.Option(metavar='"A = B: 0.01"', help="A test of equivalence within a bound, by two one-sided tests.")
    ] = None,
    at: Annotated[Text, typer.Option(help="Comma-separated rounds after which all variants are set side by side.")] = None,
    reference: Annotated[Text, typer.Option(help="The variant that differences are from; by default fedit, or the first.")] = None,
    target: Annotated[float | None, typer.Option(help="Count rounds to this value; by default the reference's end.")] = None,
    controls: Annotated[bool | None, typer.Option(help="Also run fedit+balanced, and ffa@2r where ffa is; by default on.")] = None,
    protocol: Annotated[
        Path | None,
        typer.Option(help="A TOML file that says all of this, instead of the options above."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at once.")] = 1,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where runs and tables go; an interrupted comparison continues.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods fairly. Paired seeds, settings for each chosen on held-out training rows, confidence intervals, tests."""
    require_extra("scipy", "experiments", "comparisons")
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: give one or more")
    given = {option: context.params[option] for option in OPTIONS if context.params[option] not in (None, (), [])}
    out = out or Path("compare") / config.stem
    from fedex_lora.cli.console import runs_shown
    from fedex_lora.config import flat, read_config
    from fedex_lora.experiments import compare as comparing

    plan = comparing.read_protocol(protocol) if protocol else comparing.parse_protocol(_protocol(given))
    if protocol and given:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} beside --protocol: {protocol} says all of that; change it there")
    comparing.require_heeded(set_ or [], flat(plan.grid or {}), flat(plan.set))
    settings, console = read_config(config, set_ or []), consoles(as_json)
    with runs_shown(console) as tell:
        result = comparing.compare(settings, plan, out, jobs, tell)
    if as_json:
        print_json(result)
    else:
        _show(result, out, console)
    if lost := result["failed"]:
        who = ", ".join(f"{one['method']} with seed {one['seed']}" for one in lost)
        fail(f"error: training failed of {who}, and what they are in cannot be computed: {lost[0]['reason']}", 1)
    _fail_without_numbers({row["name"]: [row["exactness_error"]] for row in result["methods"]})


def _protocol(given: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol that options say."""
    from fedex_lora.experiments import compare as comparing

    tree = {key: given[key] for key in ("reference", "target", "controls") if key in given}
    for key in ("seeds", "tuning_seeds", "at"):
        if key in given:
            tree[key] = number_list(given[key], f"--{key.replace('_', '-')}", "0,1,2", int)
    if "methods" in given or "variant" not in given:
        tree["methods"] = given.get("methods", "fedex,fedit,ffa").split(",")
    named = [comparing.variant_option(text) for text in given.get("variant", ())]
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--variant: two are named {twice!r}: rename one")
    tree["variants"] = dict(named)
    cells = comparing.grid_option(given.get("grid", ()))
    if rates := number_list(given.get("learning_rates"), "--learning-rates", "1e-3,3e-3"):
        if comparing.RATE in cells:
            raise UsageError(f"--learning-rates is short for --grid {comparing.RATE}=...: give one of them")
        cells = {comparing.RATE: rates, **cells}
    tree |= {"grid": cells} if cells else {}
    tests = [comparing.primary_option(text) for text in given.get("primary", ())]
    return tree | {"tests": [*tests, *(comparing.equivalent_option(text) for text in given.get("equivalent", ()))]}


def _show(result: Mapping[str, Any], out: Path, console: "Console") -> None:
    """The tables of a comparison; what it costs is a table of its own."""
    from fedex_lora.cli.console import console_table
    from fedex_lora.experiments import compare as comparing

    first, *more = comparing.result_tables(result)
    costs = list(first.columns).index(comparing.COSTS)
    for heading, columns in ((first.title.rstrip("."), slice(1, costs)), ("costs", slice(costs, None))):
        console.print(console_table(heading, [first.columns[0], *first.columns[columns]], [[row[0], *row[columns]] for row in first.rows]))
    for one in more:
        console.print(console_table(one.title.rstrip(":"), one.columns, one.rows))
        if one.notes:
            console.print(*one.notes, highlight=False)
    console.print(f"{first.notes[0]} {out / 'compare.json'}", highlight=False)
    console.print(f"protocol sha256 {result['protocol_sha256']}", highlight=False)


def _fail_without_numbers(errors: Mapping[str, Iterable[float | None]]) -> None:
    """Leave with status 1 if an error of something that is named could not be computed; None is one that was not asked for."""
    from fedex_lora.exactness.algebra import failed

    odd = [name for name, values in errors.items() if any(value is not None and failed(value) for value in values)]
    if odd:
        fail(f"error: the errors of {', '.join(odd)} cannot be computed: see the warnings in its events.jsonl", 1)
