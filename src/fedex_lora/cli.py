"""The command line: thin. Each command reads its options, calls the library, and prints."""

import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from fedex_lora.errors import FedexLoraError, UsageError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Exact federated fine-tuning with LoRA.")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Any error becomes one line on standard error and a non-zero exit; `--debug` lets it through."""

    @wraps(command)
    def guarded(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except FedexLoraError as error:
            if options.get("debug"):
                raise
            _fail(f"error: {error}", error.exit_status)
        except typer.Exit:
            raise
        except Exception as error:
            if options.get("debug"):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            _fail(f"error: {type(error).__name__}: {reason} (unexpected; --debug shows the trace)", 1)

    return guarded


def _fail(line: str, status: int) -> None:
    print(" ".join(line.split()), file=sys.stderr)
    raise typer.Exit(status)


def _consoles(as_json: bool) -> Console:
    """Where people look: standard error when standard output carries JSON."""
    return Console(stderr=as_json, soft_wrap=True)


def _print_json(value: Any) -> None:
    from fedex_lora.storage import plain_json

    print(plain_json(value))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from fedex_lora import __version__

        print(__version__)
        raise typer.Exit


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
    """Three hospitals, four methods, offline, in about two minutes: see what exact aggregation is."""
    from fedex_lora.demo import run_demo

    console = _consoles(as_json)
    result = run_demo(out, rounds, console)
    if as_json:
        _print_json(result)


@app.command()
@one_line_errors
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file.")],
    set_: Annotated[Optional[list[str]], typer.Option("--set", metavar="A.B=V", help="Override a key of the file.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="The run folder; by default runs/NAME of the file.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted, to the same bits.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a federation on this machine, as a TOML file says."""
    from fedex_lora.config import read_config

    settings = read_config(config, set_ or [])
    out = out or Path("runs") / config.stem
    from fedex_lora.display import Display
    from fedex_lora.runner import run as run_here

    console = _consoles(as_json)
    last: dict[str, Any] = {}

    def remember(event: str, **fields: Any) -> None:
        if event in ("round_done", "run_done"):
            last.update(fields)

    def both(event: str, **fields: Any) -> None:
        remember(event, **fields)
        display(event, **fields)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Display(console) as display:
            run_here(settings, out, both, resume)
    except KeyboardInterrupt:
        _fail(f"interrupted; what was done is kept: the same command with --out {out} --resume goes on", 130)
    console.print(f"final model: {out / 'final'}   check it: fedex-lora verify {out}", highlight=False)
    if as_json:
        _print_json({"method": settings.method, "out": str(out), **last})


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
    set_: Annotated[Optional[list[str]], typer.Option("--set", metavar="A.B=V", help="Override a key of the file.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Where runs and tables go; an interrupted comparison continues.")] = None,  # noqa: UP045
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods fairly: paired seeds, a learning rate for each chosen on held-out training rows, confidence intervals."""
    from fedex_lora.compare import compare as compare_here
    from fedex_lora.compare import footnotes, table_rows, title
    from fedex_lora.config import read_config
    from fedex_lora.display import Runs, table

    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: give one or more")
    settings, console = read_config(config, set_ or []), _consoles(as_json)
    out = out or Path("compare") / config.stem
    names, rates = methods.split(","), _numbers(learning_rates, "--learning-rates", "1e-3,3e-3")
    with Runs(console) as tell:
        result = compare_here(settings, names, _seeds(seeds), out, rates, reference, target, controls, jobs, tell)
    if as_json:
        _print_json(result)
    else:
        columns, rows = table_rows(result)
        for heading, start, stop in ((title(result), 1, 5), ("costs", 5, None)):
            console.print(table(heading, [columns[0], *columns[start:stop]], [[row[0], *row[start:stop]] for row in rows]))
        console.print(f"{footnotes(result)} {out / 'compare.json'}", highlight=False)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text!r}: give comma-separated whole numbers, such as 0,1,2") from None


@app.command()
@one_line_errors
def aggregate(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT LoRA folders, one a client.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write; must not exist or be empty.")],
    weights: Annotated[Optional[str], typer.Option(help="Comma-separated numbers, one an adapter; by default uniform.")] = None,  # noqa: UP045
    method: Annotated[str, typer.Option(help="METHOD or METHOD+GAUGE; see docs/methods.md.")] = "fedex",
    state: Annotated[Optional[Path], typer.Option(help="The result folder that the adapters were trained on top of.")] = None,  # noqa: UP045
    truncate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="fedex-svd: rank=R, energy=SHARE or bytes=N; by default the adapter's rank."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Aggregate PEFT adapters from anywhere, exactly: no training, no server."""
    from fedex_lora.adapters import aggregate_folders

    result = aggregate_folders(adapters, out, method, _numbers(weights, "--weights", "0.2,0.3,0.5"), state, _truncation(truncate))
    if as_json:
        _print_json(result)
        return
    console = _consoles(False)
    shares = ", ".join(f"{client} {weight:.4g}" for client, weight in result["weights"].items())
    console.print(
        f"{result['method']}: {result['modules']} modules of {len(result['weights'])} adapters; weights {shares}", highlight=False
    )
    console.print(
        f"relative error against the fp64 ideal: {result['max_relative_error']:.1e}; plain averaging is off by {result['deviation']:.1%}",
        highlight=False,
    )
    if result["tail"]:
        console.print(f"the truncation dropped {result['tail']:.1%} of the norm of what it cut", highlight=False)
    if result["warning"]:
        console.print(f"! {result['warning']}", highlight=False)
    console.print(f"stand-alone adapter: {out / 'adapter'}   to train on: {out / 'trainable'} with base_delta.safetensors", highlight=False)


def _truncation(text: str | None) -> Any:
    from fedex_lora.config import Truncation

    if text is None:
        return None
    key, _, value = text.partition("=")
    try:
        return Truncation.model_validate({key: value})
    except ValueError:
        raise UsageError(f"--truncate {text!r}: write rank=8, energy=0.99 or bytes=1000000") from None


def _numbers(text: str | None, option: str, example: str) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}: give comma-separated numbers, such as {example}") from None


@app.command()
@one_line_errors
def verify(
    path: Annotated[Path, typer.Argument(help="A run folder, a round folder, or the OUT of aggregate.")],
    base: Annotated[Optional[str], typer.Option(help="The base model: its own weights are compared too.")] = None,  # noqa: UP045
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Recompute the ideal update in fp64 from the stored updates; print the error per module and in total."""
    from fedex_lora.client import quiet
    from fedex_lora.display import table
    from fedex_lora.verify import EXACT_BELOW
    from fedex_lora.verify import verify as verify_here

    quiet()
    result = verify_here(path, base)
    if as_json:
        _print_json(result)
    else:
        console = _consoles(False)
        for row in result["rounds"]:
            rows = [[module, f"{error:.2e}"] for module, error in row["per_module"].items()]
            console.print(table(f"{row['folder']} ({row['method']}, round {row['round']})", ["module", "relative error"], rows))
        console.print(
            f"relative error, worst module: {result['max_relative_error']:.2e}   all modules: {result['total_relative_error']:.2e}"
        )
        if base:
            console.print(f"of the model's own layers: {result['realised_error']:.2e}   floor of their precision: {result['floor']:.2e}")
            for compute, kind in ((result["compute_dtype"], ""), ("float32", "_float32")):
                error, floor = result[f"output_error{kind}"], result[f"output_floor{kind}"]
                console.print(f"of the logits, computed in {compute}: {error:.2e}   without the base delta: {floor:.2e}", highlight=False)
            if not result["base_checked"]:
                console.print("these adapters came without a fingerprint of their base: whether this is the one was not checked")
    if result["exact_method"] and result["max_relative_error"] > EXACT_BELOW:
        _fail(f"error: method {result['method']} is exact, and the stored result is off by {result['max_relative_error']:.1e}", 1)


@app.command()
@one_line_errors
def export(
    source: Annotated[Path, typer.Argument(help="A run folder, a round folder, or the OUT of aggregate.")],
    form: Annotated[str, typer.Option("--as", help="merged, adapter or base+adapter.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write; must not exist or be empty.")],
    base: Annotated[Optional[str], typer.Option(help="The base model; by default as the folder says.")] = None,  # noqa: UP045
    rank: Annotated[Optional[int], typer.Option(help="adapter: cut it to this rank; the error is printed.")] = None,  # noqa: UP045
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the model for plain transformers, PEFT or vLLM; reload it, and compare its logits with the run's."""
    from fedex_lora.client import quiet
    from fedex_lora.export import export as export_here

    quiet()
    result = export_here(source, form, out, base, rank)
    if as_json:
        _print_json(result)
        return
    console = _consoles(False)
    cut = f"; of the update {result['update_error']:.2e} is missing" if result["update_error"] else ""
    console.print(f"{form} in {out}, rank {result['rank']}{cut}", highlight=False)
    console.print(
        f"reloaded: logits within {result['output_error']:.1e} of the largest logit of the run's, "
        f"{result['change_error']:.1e} of what the update changes",
        highlight=False,
    )
    console.print(f"vLLM: {result['vllm']}", highlight=False)


@app.command()
@one_line_errors
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Versions, devices, precision, telemetry: what would go wrong on this machine."""
    from fedex_lora.doctor import examine

    console = _consoles(as_json)
    with console.status("looking") if console.is_terminal else nullcontext():
        facts, problems = examine()
    if as_json:
        _print_json({"facts": facts, "problems": problems})
    else:
        for name, value in facts.items():
            console.print(f"{name:24} {value}", highlight=False)
        for problem in problems:
            console.print(f"! {problem}", highlight=False)
        console.print("nothing would go wrong" if not problems else f"{len(problems)} to look at", highlight=False)


def main() -> None:
    """The entry point of the `fedex-lora` command."""
    app(prog_name="fedex-lora")


if __name__ == "__main__":
    main()
