"""`evaluate`: a model measured by a task's own metric, on what it predicts or on what it writes."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from fedex_lora import config
from fedex_lora.client.arguments import TrainingContext
from fedex_lora.client.training import evaluate
from fedex_lora.errors import UsageError
from fedex_lora.evaluation._generation import generate
from fedex_lora.evaluation._model import Opened, open_source
from fedex_lora.tasks import Generation, Task, load_task, usable
from fedex_lora.tasks.scoring import write_predictions


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        base: the model below an adapter or a result; None: as the folder says.
        batch_size: rows at once.
        generation: over the task's settings.
        predictions: where what the model wrote goes, as a TSV file.
        score: False: only write `predictions`, where the metrics cannot be computed.
        tell: (texts written, of how many).
    """

    base: str | None = None
    batch_size: int = 16
    generation: Mapping[str, Any] | None = None
    predictions: Path | None = None
    score: bool = True
    tell: Callable[[int, int], None] | None = None


def evaluate_source(source: str, settings: config.TaskSettings, options: Options = Options(), seed: int = 0) -> dict[str, float]:
    """The task's metrics of a model.

    Tasks with `generation` (`e2e`, `arithmetic/*`, `commonsense/*`) are measured on what the model writes, others on what it predicts;
    chats on both, where `predictions` or `generation` ask for texts.

    Args:
        source: see `open_source`.
        settings: the task; `eval_rows` of it measure, drawn with `seed`.
        options: how.
        seed: of the draw.

    Returns:
        Metric -> value, and `rows`; of written texts also `unanswered`, those without an answer (they count as wrong), and `prompts_cut`,
        prompts whose beginning did not fit the model's context. Of texts, nothing in processes of `accelerate launch` but the main one.

    Raises:
        UsageError: options that the task has no use for; predictions that exist; a metric that cannot be computed here.
        DataError, ModelError, StorageError: see `load_task` and `open_source`.
    """
    if options.predictions and os.path.lexists(options.predictions):
        raise UsageError(f"{options.predictions} exists, and is not overwritten: remove it, or give --predictions elsewhere")
    task, wanted = load_task(settings, seed), bool(options.generation or options.predictions)
    asked = task.generation
    if asked is None and wanted:
        raise UsageError(f"task {settings.name} is measured on predictions, not on texts: leave out --generate and --predictions")
    if asked is not None and options.score:
        asked.require()
    opened = open_source(source, task.kind, options.base, **task.model_config)
    numbers = _predicted(opened, task, settings, options) if options.score and (asked is None or asked.asked_for) else {}
    if asked is None or (asked.asked_for and not wanted):
        return numbers
    return numbers | _written(opened, asked, options)


def _predicted(opened: Opened, task: Task, settings: config.TaskSettings, options: Options) -> dict[str, float]:
    training = {"per_device_eval_batch_size": options.batch_size}
    work = TrainingContext(config.Config(base=config.Base(model=opened.base), task=settings, training=training), task, opened.processor)
    rows, _ = usable(task.tokenize(opened.processor, task.eval), settings, "the rows to measure on")
    return evaluate(opened.model, rows, work)


def _written(opened: Opened, asked: Generation, options: Options) -> dict[str, float]:
    """What the model writes, beside what it could have written, and the score of it."""
    model, tokenizer, rows = opened.model, opened.processor, asked.rows
    prompts = asked.prompts(tokenizer, rows)
    references = asked.references(tokenizer, rows) if asked.references else None
    ends = {"eos_token_id": asked.ends(tokenizer, model)} if asked.ends else {}
    sampling = {**asked.settings, **ends, **(options.generation or {})}
    texts, cut = generate(model, tokenizer, prompts, sampling, options.batch_size, options.tell, asked.tokens)
    if not PartialState().is_main_process:
        return {}
    if options.predictions:
        write_predictions(options.predictions, list(rows[asked.column]) if asked.column else prompts, texts, references)
    return {**(asked.score(texts, rows) if options.score else {}), "rows": float(len(texts)), "prompts_cut": float(cut)}


def task_of(source: str, name: str | None, data: Path | None, rows: int | None, file: Path | None = None) -> config.TaskSettings:
    """The task to measure: that of the configuration `file`, else of the run that `source` belongs to, else the named one.

    One that a configuration describes is meant where it has this name or none is given.

    It is measured on all its rows but for `rows`, also where the run's rounds used fewer.

    Raises:
        UsageError: no name, and `source` is no run.
    """
    folder = Path(source)
    runs = [one for one in (folder, folder.parent, folder.parent.parent) if folder.exists() and (one / "config.toml").is_file()]
    described = file or (runs[0] / "config.toml" if runs else None)
    own = config.read_config(described).task if described else None
    changes: dict[str, Any] = {"eval_rows": rows}
    if data:
        changes["data"] = data
    if own is not None and name in (None, own.name):
        return own.model_copy(update=changes)
    if name is None:
        raise UsageError(f"{source} is no run, so it does not say what to measure: give --config, --task or --lm-eval")
    if file:
        raise UsageError(f"{file} describes task {own.name if own else ''}, and --task is {name}: leave --task out")
    changes |= {} if name == "custom" else {"train": ""}  # training rows are not needed
    return config.TaskSettings.model_validate({"name": name, **changes})
