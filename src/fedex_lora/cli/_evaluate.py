"""Models measured after training: `evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedex_lora.cli._shared import Debug, Json, RoundOption, app, consoles, one_line_errors, print_json
from fedex_lora.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from fedex_lora.evaluation import Measured

COUNTS = ("rows", "unanswered", "prompts_cut")
MATRIX = 10  # classes that a confusion matrix is printed of


@app.command()
@one_line_errors
def evaluate(
    source: Annotated[
        str,
        typer.Argument(help="A run, round or result folder, an export, a PEFT adapter, or a model.", metavar="MODEL"),
    ],
    task: Annotated[str | None, typer.Option(help="What to measure; by default what the run learnt.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Take the task from this TOML file: one of your own, for an export, an adapter or a model."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the task's data; by default as the run says, else the hub.")] = None,
    file: Annotated[Path | None, typer.Option(help="Measure on the rows of this file, which has the columns of the task's.")] = None,
    beside: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Measure this model too, on the same rows; `base`: what the first was trained from."),
    ] = None,
    lm_eval: Annotated[str | None, typer.Option(help="Comma-separated tasks of lm-evaluation-harness, instead of --task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="--lm-eval: a folder with task files of your own.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model; by default as the folder says.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Measure on N rows, drawn at random; with --lm-eval on the first N.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 16,
    generate: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A field of GenerationConfig, such as num_beams=1, over the task's own."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Write what it wrote, or predicted of each row, to this .tsv or .jsonl; what --beside said, too."),
    ] = None,
    with_rows: Annotated[bool, typer.Option("--with-rows", help="--predictions: with the rows' own columns, such as their text.")] = False,
    score: Annotated[bool, typer.Option(help="--no-score: only write --predictions, to be scored elsewhere.")] = True,
    round: RoundOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model by official metrics. Those of a task here, or of tasks of lm-evaluation-harness."""
    own = dict(map(_setting, generate or []))
    for odd, said in (
        (task and lm_eval, "give one of --task and --lm-eval"),
        (config and lm_eval, "give one of --config and --lm-eval"),
        (include_path and not lm_eval, "--include-path is for --lm-eval: give its tasks too"),
        (not score and not predictions, "--no-score is for --predictions: give the file too"),
        (lm_eval and (own or predictions), "--generate and --predictions are for --task: lm-evaluation-harness has its own"),
        (lm_eval and (file or beside or with_rows), "--file, --beside, --with-rows are for --task: lm-evaluation-harness has its own rows"),
    ):
        if odd:
            raise UsageError(said)
    if predictions and not predictions.absolute().parent.is_dir():
        raise UsageError(f"{predictions.parent} does not exist: make it, or give --predictions elsewhere")
    from accelerate import PartialState

    from fedex_lora.client.training import silence_libraries
    from fedex_lora.evaluation import Measured, Options, evaluate_harness, measure, task_of
    from fedex_lora.storage.run_folder import folder_after

    silence_libraries()
    source = str(folder_after(Path(source), round)) if round else source
    console = consoles(as_json)
    with console.status("measuring") as status:
        if lm_eval:
            names = [name.strip() for name in lm_eval.split(",")]
            found = evaluate_harness(source, names, base, batch_size, rows, include_path)
            measured, result = {task: Measured(numbers) for task, numbers in found.items()}, {"model": source, "lm_eval": found}
        else:
            settings = task_of(source, task, data, rows, config, file)
            tell = lambda done, of: status.update(f"{done} of {of} texts")  # noqa: E731
            options = Options(base, batch_size, own, predictions, score, tell, with_rows)
            measured = {settings.name: measure(source, settings, options, beside=beside)}
            result = {"model": source, "task": settings.name, **_as_json(measured[settings.name], beside)}
    if PartialState().is_main_process:
        print_json(result) if as_json else _show(source, measured, console, beside)


def _as_json(measured: "Measured", beside: str | None) -> dict[str, Any]:
    """The metrics, each class, the confusion matrix; and those of the model beside it, with the differences."""
    made: dict[str, Any] = dict(measured.numbers)
    if measured.classes:
        made |= {"classes": [one._asdict() for one in measured.classes.classes], "confusion": measured.classes.confusion}
    if measured.notes:
        made["notes"] = list(measured.notes)
    if measured.beside:
        made["beside"] = {"model": beside, **_as_json(measured.beside, None), "difference": measured.difference}
    return made


def _show(source: str, found: Mapping[str, "Measured"], console: "Console", beside: str | None) -> None:
    from fedex_lora.cli.console import console_table

    more = [beside, "difference"] if beside else []
    lines = []
    for name, measured in found.items():
        others = (measured.beside.numbers, measured.difference) if measured.beside else ()
        for metric, value in measured.numbers.items():
            more_cells = [_cell(metric, other[metric], sign) if metric in other else "" for sign, other in enumerate(others)]
            lines.append([name, metric, _cell(metric, value), *more_cells])
    console.print(console_table(source, ["task", "metric", "value" if not beside else source, *more], lines))
    for measured in found.values():
        for note in measured.notes:
            console.print(f"! {note}", highlight=False, markup=False)
        if measured.classes:
            _show_classes(measured, console, beside)


def _cell(metric: str, value: float, sign: int = 0) -> str:
    return f"{value:.0f}" if metric in COUNTS else f"{value:+.4f}" if sign else f"{value:.4f}"


def _show_classes(measured: "Measured", console: "Console", beside: str | None) -> None:
    """A line a class; and where rows went, as a matrix where it fits, else the most frequent confusions."""
    from fedex_lora.cli.console import console_table

    scores = measured.classes
    assert scores is not None
    other = measured.beside.classes if measured.beside else None
    columns = ["class", "precision", "recall", "F1", *([f"F1 of {beside}"] if other else []), "rows"]
    names = [one.name for one in scores.classes]
    lines = [
        [one.name, *(f"{value:.4f}" for value in one[1:4]), *([f"{other.classes[index].f1:.4f}"] if other else []), str(one.support)]
        for index, one in enumerate(scores.classes)
    ]
    console.print(console_table("by class", columns, lines))
    if len(names) <= MATRIX:
        rows = [[name, *map(str, row)] for name, row in zip(names, scores.confusion, strict=True)]
        console.print(console_table("rows by label (down) and what was predicted (across)", ["", *names], rows))
    elif worst := scores.most_confused(MATRIX):
        confused = [[label, predicted, str(count)] for label, predicted, count in worst]
        console.print(console_table("most confused", ["label", "predicted", "rows"], confused))


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
