"""`evaluate`: a model measured by a task's own metric, on what it predicts or on what it writes."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import EvalPrediction

from fedex_lora import config
from fedex_lora.client.arguments import TrainingContext
from fedex_lora.client.training import evaluate
from fedex_lora.errors import UsageError
from fedex_lora.evaluation._classes import ClassScores, class_scores, predicted_rows, write_rows
from fedex_lora.evaluation._generation import generate
from fedex_lora.evaluation._model import BASE, Opened, labels_of, open_base, open_source, run_folders
from fedex_lora.tasks import Generation, Task, load_task, usable


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        base: the model below an adapter or a result; None: as the folder says.
        batch_size: rows at once.
        generation: over the task's settings.
        predictions: a file, .tsv or .jsonl, with a line a row: what the model wrote, or what it predicted.
        score: False: only write `predictions`, where the metrics cannot be computed.
        tell: (texts written, of how many).
        with_rows: the file of predictions has the rows' own columns, too.
    """

    base: str | None = None
    batch_size: int = 16
    generation: Mapping[str, Any] | None = None
    predictions: Path | None = None
    score: bool = True
    tell: Callable[[int, int], None] | None = None
    with_rows: bool = False


@dataclass(frozen=True)
class Measured:
    """What measuring a model gave.

    Attributes:
        numbers: metric -> value, and `rows`; of written texts also `unanswered`, those without an answer (they count as wrong), and
            `prompts_cut`, prompts whose beginning did not fit the model's context.
        classes: each class and the confusion matrix, where the task has classes.
        beside: the same of another model, on the same rows.
        rows: what `predictions` has of each row.
        notes: what is to be said of the rows: some are left out, or cut.
    """

    numbers: Mapping[str, float]
    classes: ClassScores | None = None
    beside: "Measured | None" = None
    rows: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    @property
    def difference(self) -> dict[str, float]:
        """Metric -> how much more this model has than the one beside it."""
        other = self.beside.numbers if self.beside else {}
        return {name: value - other[name] for name, value in self.numbers.items() if name in other and name != "rows"}

    @property
    def rows_of_both(self) -> list[dict[str, Any]]:
        """`rows`, with what the other model said of each as `beside`."""
        others = self.beside.rows if self.beside else ()
        said = "predicted" if "predicted" in next(iter(others), {}) else "output"  # a row's own column may be called so
        return [{**row, "beside": other[said]} for row, other in zip(self.rows, others, strict=True)]


def measure(source: str, settings: config.TaskSettings, options: Options = Options(), seed: int = 0, beside: str | None = None) -> Measured:
    """The task's metrics of a model, each class's, and if asked for the same of another model on the same rows.

    Tasks with `generation` (`e2e`, `arithmetic/*`, `commonsense/*`) are measured on what the model writes, others on what it predicts;
    chats and other texts of your own are also written, where `predictions` or `generation` ask for that.

    Args:
        source: see `open_source`.
        settings: the task; `eval_rows` of it measure, drawn with `seed`.
        options: how.
        seed: of the draw.
        beside: another source, or "base": what the model of a run or of an adapter was trained from, with the head that it began with.

    Returns:
        See `Measured`; of texts its numbers are empty in processes of `accelerate launch` but the main one.

    Raises:
        UsageError: options that the task has no use for; predictions that exist; a metric that cannot be computed here.
        DataError, ModelError, StorageError: see `load_task` and `open_source`.
    """
    if options.predictions and os.path.lexists(options.predictions):
        raise UsageError(f"{options.predictions} exists, and is not overwritten: remove it, or give --predictions elsewhere")
    task = load_task(settings, seed)
    asked = task.generation
    if asked is None and (options.generation or (options.predictions and task.kind == "causal-lm")):
        raise UsageError(f"task {settings.name} is measured on predictions, not on texts: leave out --generate and --predictions")
    if options.with_rows and (asked is not None or not options.predictions):
        raise UsageError("--with-rows is for --predictions of classes or scores: give the file, or leave it out")
    if options.predictions and options.predictions.suffix.lower() not in (".tsv", ".jsonl"):
        raise UsageError(f"--predictions {options.predictions.name}: end it in .tsv or .jsonl, which is what is written there")
    if asked is not None and options.score:
        asked.require()
    if beside is not None:
        _other(source, task, options, beside)  # what is wrong with it is said before the first is measured; two might not fit
    measured = _measured(open_source(source, task.kind, options.base, **task.model_config), task, settings, options)
    if beside is not None:
        measured = replace(measured, beside=_measured(_other(source, task, options, beside), task, settings, options))
    if measured.rows and options.predictions:
        write_rows(options.predictions, measured.rows_of_both if beside else measured.rows)
    return measured


def _other(source: str, task: Task, options: Options, beside: str) -> Opened:
    return open_base(source, task, options.base) if beside == BASE else open_source(beside, task.kind, **task.model_config)


def _measured(opened: Opened, task: Task, settings: config.TaskSettings, options: Options) -> Measured:
    asked, wanted = task.generation, bool(options.generation or options.predictions)
    predicts = asked is None or (asked.asked_for and options.score)
    found = _predicted(opened, task, settings, options) if predicts else Measured({})
    if asked is None or (asked.asked_for and not wanted):
        return found
    texts = _written(opened, asked, options)
    return replace(texts, numbers={**found.numbers, **texts.numbers}, notes=found.notes or task.notes)


def _predicted(opened: Opened, task: Task, settings: config.TaskSettings, options: Options) -> Measured:
    """On what it predicts."""
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return task.metrics(prediction)

    training, watched = {"per_device_eval_batch_size": options.batch_size}, replace(task, metrics=metrics)
    work = TrainingContext(config.Config(base=config.Base(model=opened.base), task=settings, training=training), watched, opened.processor)
    rows, notes = usable(task.tokenize(opened.processor, task.eval), settings, "the rows to measure on")
    numbers = evaluate(opened.model, rows, work)
    wanted = options.predictions and task.generation is None and PartialState().is_main_process
    lines = predicted_rows(task, seen[0], options.with_rows) if wanted else ()
    return Measured(numbers, class_scores(task, seen[0]) if seen else None, rows=lines, notes=[*task.notes, *notes])


def _written(opened: Opened, asked: Generation, options: Options) -> Measured:
    """What the model writes, beside what it could have written, and the score of it."""
    model, tokenizer, rows = opened.model, opened.processor, asked.rows
    prompts = asked.prompts(tokenizer, rows)
    references = asked.references(tokenizer, rows) if asked.references else None
    ends = {"eos_token_id": asked.ends(tokenizer, model)} if asked.ends else {}
    sampling = {**asked.settings, **ends, **(options.generation or {})}
    texts, cut = generate(model, tokenizer, prompts, sampling, options.batch_size, options.tell, asked.tokens)
    if not PartialState().is_main_process:
        return Measured({})
    numbers = {**(asked.score(texts, rows) if options.score else {}), "rows": float(len(texts)), "prompts_cut": float(cut)}
    read = {"MR": list(rows["mr"])} if asked.column == "mr" else {"prompt": list(rows[asked.column]) if asked.column else prompts}
    columns = {**read, "output": texts, **({"reference": references} if references else {})}
    lines = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return Measured(numbers, rows=lines if options.predictions else ())


def task_of(
    source: str, name: str | None, data: Path | None, rows: int | None, file: Path | None = None, rows_file: Path | None = None
) -> config.TaskSettings:
    """The task to measure: that of the configuration `file`, else of the run that `source` belongs to, else the named one.

    One that a configuration describes is meant where it has this name or none is given.

    It is measured on all its rows but for `rows`, also where the run's rounds used fewer; with `rows_file`, on the rows of that file, and
    where the classes are known (from the configuration, or the model's folder) the training rows are not needed then.

    Raises:
        UsageError: no name, and `source` is no run; `rows_file` for a task that is not of the user's own rows.
    """
    described = file or next((one / "config.toml" for one in run_folders(source)), None)
    own = config.read_config(described) if described else None
    changes: dict[str, Any] = {"eval_rows": rows}
    if data:
        changes["data"] = data
    if own is not None and name in (None, own.task.name):
        changes |= {"train": own.task.train or next(iter(own.clients.data.values()), None)}
        return _on(own.task.model_copy(update=changes), rows_file, source)
    if name is None:
        raise UsageError(f"{source} is no run, so it does not say what to measure: give --config, --task or --lm-eval")
    if file:
        raise UsageError(f"{file} describes task {own.task.name if own else ''}, and --task is {name}: leave --task out")
    changes |= {} if name == "custom" else {"train": ""}  # training rows are not needed
    return _on(config.TaskSettings.model_validate({"name": name, **changes}), rows_file, source)


def _on(settings: config.TaskSettings, rows_file: Path | None, source: str) -> config.TaskSettings:
    """The same task, measured on the rows of a file, if there is one; its classes, where nobody names them, are the model's."""
    if settings.needs_labels:
        settings = settings.model_copy(update={"labels": labels_of(source)})
    if rows_file is None:
        return settings
    if settings.name != "custom":
        raise UsageError(f"--file is for rows of your own (task custom), and the task is {settings.name}: leave it out")
    there = str(rows_file.absolute())
    return settings.model_copy(update={"eval": there, **({} if settings.needs_labels else {"train": there, "train_rows": None})})
