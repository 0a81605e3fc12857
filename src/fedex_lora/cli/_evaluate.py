"""Models measured after training: `evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fedex_lora.cli._shared import Debug, Json, app, consoles, one_line_errors, print_json
from fedex_lora.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

COUNTS = ("rows", "unanswered", "prompts_cut")


@app.command()
@one_line_errors
def evaluate(
    source: Annotated[
        str,
        typer.Argument(help="A run, round or result folder, an export, a PEFT adapter, or a model.", metavar="MODEL"),
    ],
    task: Annotated[Optional[str], typer.Option(help="What to measure; by default what the run learnt.")] = None,  # noqa: UP045 (typer)
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Take the task from this TOML file: one of your own, for an export, an adapter or a model."),
    ] = None,
    data: Annotated[Optional[Path], typer.Option(help="Folder of the task's data; by default as the run says, else the hub.")] = None,  # noqa: UP045
    lm_eval: Annotated[Optional[str], typer.Option(help="Comma-separated tasks of lm-evaluation-harness, instead of --task.")] = None,  # noqa: UP045
    include_path: Annotated[Optional[Path], typer.Option(help="--lm-eval: a folder with task files of your own.")] = None,  # noqa: UP045
    base: Annotated[Optional[str], typer.Option(help="The base model; by default as the folder says.")] = None,  # noqa: UP045
    rows: Annotated[Optional[int], typer.Option(min=1, help="Measure on so many rows only.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 16,
    generate: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="KEY=VALUE", help="A field of GenerationConfig, such as num_beams=1, over the task's own."),
    ] = None,
    predictions: Annotated[Optional[Path], typer.Option(help="Write what the model wrote to this TSV file.")] = None,  # noqa: UP045
    score: Annotated[bool, typer.Option(help="--no-score: only write --predictions, to be scored elsewhere.")] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model by official metrics. Those of a task here, or of tasks of lm-evaluation-harness."""
    own = dict(map(_setting, generate or []))
    _require_sense(task, config, lm_eval, include_path, predictions, score, own)
    from accelerate import PartialState

    from fedex_lora.client.training import silence_libraries
    from fedex_lora.evaluation import Options, evaluate_harness, evaluate_source, task_of

    silence_libraries()
    console = consoles(as_json)
    with console.status("measuring") as status:
        if lm_eval:
            names = [name.strip() for name in lm_eval.split(",")]
            found = evaluate_harness(source, names, base, batch_size, rows, include_path)
            result: dict[str, Any] = {"model": source, "lm_eval": found}
        else:
            settings = task_of(source, task, data, rows, config)
            options = Options(base, batch_size, own, predictions, score, lambda done, of: status.update(f"{done} of {of} texts"))
            found = {settings.name: evaluate_source(source, settings, options)}
            result = {"model": source, "task": settings.name, **found[settings.name]}
    if PartialState().is_main_process:
        print_json(result) if as_json else _show(source, found, console)


def _require_sense(
    task: str | None,
    config: Path | None,
    lm_eval: str | None,
    include_path: Path | None,
    predictions: Path | None,
    score: bool,
    own: Mapping[str, Any],
) -> None:
    """Options that go together."""
    if task and lm_eval:
        raise UsageError("give one of --task and --lm-eval")
    if config and lm_eval:
        raise UsageError("give one of --config and --lm-eval")
    if include_path and not lm_eval:
        raise UsageError("--include-path is for --lm-eval: give its tasks too")
    if not score and not predictions:
        raise UsageError("--no-score is for --predictions: give the file too")
    if lm_eval and (own or predictions):
        raise UsageError("--generate and --predictions are for --task: lm-evaluation-harness has its own")
    if predictions and not predictions.absolute().parent.is_dir():
        raise UsageError(f"{predictions.parent} does not exist: make it, or give --predictions elsewhere")


def _show(source: str, found: Mapping[str, Mapping[str, float]], console: "Console") -> None:
    from fedex_lora.cli.console import console_table

    lines = [
        [name, metric, f"{value:.0f}" if metric in COUNTS else f"{value:.4f}"]
        for name, numbers in found.items()
        for metric, value in numbers.items()
    ]
    console.print(console_table(source, ["task", "metric", "value"], lines))


def _setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE, with a value as in TOML."""
    import tomllib

    key, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return key.strip(), tomllib.loads(f"v = {value}")["v"]
    except ValueError:
        raise UsageError(f"--generate {text!r}: write it as num_beams=1") from None
