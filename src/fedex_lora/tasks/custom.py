"""Your own rows: classes or scores of texts, classes of images, chats (see `chat`), or a causal LM with a prompt template and the loss on
the completion only.

A configuration and a row of its file::

    [task]
    name = "custom"
    kind = "causal-lm"
    train = "trainset.csv"
    eval = "devset.csv"
    prompt = "{mr} ||"
    completion = " {ref}"

    mr,ref
    "name[The Vaults], eatType[pub]",The Vaults is a pub.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from datasets import Dataset

from fedex_lora import config
from fedex_lora.errors import DataError, require_extra
from fedex_lora.tasks._files import Rows, read_rows
from fedex_lora.tasks._images import image_rows, images_that_fail
from fedex_lora.tasks._metrics import measuring
from fedex_lora.tasks._rows import Problem, RowTable, alike, classes_of, each, empty, found, halved, outside, require_columns, usable_rows
from fedex_lora.tasks._task import Task, limit, tokenize_texts, written_task
from fedex_lora.tasks._templates import columns_of, filled, text_of
from fedex_lora.tasks.chat import chat_table, chat_task

SCORES = "set task.kind = 'regression' for scores, or name all classes in task.labels"


Reader: TypeAlias = Callable[[str, Path | None], Rows]
"""(source, the folder that files are in) -> its rows."""


def load(settings: config.TaskSettings, read: Reader = read_rows) -> Task:
    """The task that the settings describe.

    Args:
        settings: of the task.
        read: what `task.train` and `task.eval` name.

    Raises:
        DataError: a file or column is missing, rows cannot be used (`task.on_bad_row`), or none is left.
        UsageError: images without Pillow.
    """
    tables = row_tables(settings, read)
    usable = [partial(usable_rows, table.rows, table.source, table.problems, settings.on_bad_row) for table in tables]
    kept, said = zip(*each(usable), strict=True)
    notes = list(dict.fromkeys(note for table, more in zip(tables, said, strict=True) for note in [*table.notes, *more]))
    kinds = {"regression": _regression, "causal-lm": _causal_lm, config.CHAT: chat_task}
    train, held = (rows.reset_index(drop=True) for rows in kept)
    lines, eval_lines = (tuple(int(line) for line in rows.index) for rows in kept)
    made = kinds.get(settings.kind, partial(_classes, tables[0].classes))(settings, train, held, notes)
    return replace(made, eval_lines=eval_lines, lines=lines)


def row_tables(settings: config.TaskSettings, read: Reader = read_rows) -> tuple[RowTable, RowTable]:
    """The rows to learn from and the evaluation set, with all that is wrong with single ones.

    Raises:
        DataError: a file or column is missing.
    """
    if not settings.train or not settings.eval:
        raise DataError("task custom needs task.train and task.eval: files (jsonl, json, csv, tsv, parquet) or HUB_NAME:SPLIT")
    if settings.kind == config.IMAGES:
        require_extra("PIL", "images", "images")
    chats = settings.kind == config.CHAT
    names = list(dict.fromkeys([str(settings.train), str(settings.eval)]))
    sources = dict(zip(names, each(partial(read, name, settings.data) for name in names), strict=True))
    made = {source: chat_table(source, rows) for source, rows in sources.items()} if chats else _tables(settings, sources)
    told = {source: replace(table, problems=[*halved(table.rows), *table.problems]) for source, table in made.items()}
    return told[settings.train], told[settings.eval]


def _tables(settings: config.TaskSettings, sources: Mapping[str, Rows]) -> dict[str, RowTable]:
    """The files of any kind but chats."""
    written, images = settings.kind == "causal-lm", settings.kind == config.IMAGES
    columns, label = columns_read(settings), None if written else settings.label
    each(partial(require_columns, rows, columns, source) for source, rows in sources.items())
    classes = class_names(settings, sources[str(settings.train)])
    compared = [] if images else columns if written else settings.text
    made = partial(RowTable, inputs=compared, label=label, classes=classes)
    return {source: made(source, rows, _problems(settings, rows, classes)) for source, rows in sources.items()}


def columns_read(settings: config.TaskSettings) -> list[str]:
    """The columns of a table that are read, of any kind: others are names and numbers of rows."""
    if settings.kind == config.CHAT:
        return ["messages", "rejected", "tools"]
    if settings.kind == "causal-lm":
        return list(dict.fromkeys([*columns_of(settings.prompt), *columns_of(settings.completion)]))
    return [*([settings.image or "image"] if settings.kind == config.IMAGES else settings.text), settings.label]


def class_names(settings: config.TaskSettings, train: Rows) -> list[str]:
    """All classes: as the configuration names them, else those of the training rows; none of scores or texts that are written.

    Raises:
        DataError: the training rows' labels are no classes but scores.
    """
    if settings.kind in ("causal-lm", "regression"):
        return []
    if settings.labels:
        return [str(label) for label in settings.labels]
    labels = [cell for cell in train[settings.label] if isinstance(cell, str) and cell.strip()]
    names = classes_of(labels)
    if _scores(names, len(labels)) or len(names) > max(20, len(labels) // 2):
        raise DataError(
            f"{settings.train}, column {settings.label!r}, has {len(names)} different values in {len(labels)} rows: {SCORES}", "label"
        )
    return names


def _scores(names: Sequence[str], rows: int) -> bool:
    """Numbers, and fractions among them, or as many as rows."""
    numbers = pd.to_numeric(pd.Series(names, dtype=object), errors="coerce")
    return bool(len(names)) and bool(numbers.notna().all()) and (bool((numbers % 1 != 0).any()) or 4 < len(names) == rows)


def _problems(settings: config.TaskSettings, rows: Rows, classes: Sequence[str]) -> list[Problem]:
    if settings.kind == "causal-lm":
        prompts, completions = (_texts(template, rows) for template in (settings.prompt, settings.completion))
        return [
            *found("empty", "an empty prompt", rows, (not text.strip() for text in prompts)),
            *found("empty", "nothing to say: the completion is empty", rows, (not text.strip() for text in completions)),
        ]
    labelled = empty(rows, [settings.label])
    if settings.kind == "regression":
        numbers = pd.to_numeric(pd.Series(list(rows[settings.label]), dtype=object), errors="coerce").astype(float)
        bad = [not np.isfinite(number) and bool(text_of(cell).strip()) for number, cell in zip(numbers, rows[settings.label], strict=True)]
        return [
            *empty(rows, settings.text),
            *labelled,
            *found("score", f"a score in {settings.label!r} that is no finite number", rows, bad),
        ]
    labelled += outside(rows, settings.label, classes)
    if settings.kind == config.IMAGES:
        return [*images_that_fail(rows, settings.image or "image", settings.data), *labelled]
    return [*empty(rows, settings.text), *labelled]


def _texts(template: str, rows: Rows) -> list[str]:
    return [filled(template, row) for row in rows.to_dict(orient="records")]


def _reading(settings: config.TaskSettings, answers: Callable[[Rows], Sequence[float]]) -> Callable[[Any, Rows], Dataset]:
    """The text columns as tokens, with an answer a row: a class or a score."""
    return lambda tokenizer, rows: tokenize_texts(
        tokenizer, [[text_of(cell) for cell in rows[column]] for column in settings.text], list(answers(rows)), limit(settings, tokenizer)
    )


def _classes(classes: Sequence[str], settings: config.TaskSettings, train: Rows, held: Rows, notes: Sequence[str]) -> Task:
    """Classes of texts, or of images."""
    index, images = {name: position for position, name in enumerate(classes)}, settings.kind == config.IMAGES

    def labels(rows: Rows) -> list[int]:
        return [index[cell] for cell in rows[settings.label]]

    def of_images(_: Any, rows: Rows) -> Dataset:
        return image_rows(rows, settings.image or "image", settings.data, labels(rows))

    named = {"id2label": dict(enumerate(classes)), "label2id": index}
    return Task(
        kind=config.IMAGES if images else "classification",
        train=train,
        eval=held,
        tokenize=of_images if images else _reading(settings, labels),
        metrics=measuring("accuracy", "macro_f1"),
        headline="accuracy",
        model_config={"num_labels": len(classes), "problem_type": "single_label_classification", **named},
        classes=np.asarray(labels(train)),
        notes=[*notes, *_alike(classes)],
    )


def _regression(settings: config.TaskSettings, train: Rows, held: Rows, notes: Sequence[str]) -> Task:
    def scores(rows: Rows) -> list[float]:
        return [float(cell) for cell in rows[settings.label]]

    return Task(
        kind="classification",
        train=train,
        eval=held,
        tokenize=_reading(settings, scores),
        metrics=measuring("mse", "pearson", "spearman"),
        headline="mse",
        model_config={"num_labels": 1, "problem_type": "regression"},
        classes=np.asarray(pd.qcut(pd.Series(scores(train)).rank(method="first"), min(5, len(train)), labels=False)),
        greater_is_better=False,
        notes=notes,
    )


def _alike(classes: Sequence[str]) -> list[str]:
    return [f"classes {one!r} and {other!r} are two classes: if they are meant to be one, mend the rows" for one, other in alike(classes)]


def _causal_lm(settings: config.TaskSettings, train: Rows, held: Rows, notes: Sequence[str]) -> Task:
    prompts, completions = (partial(_texts, template) for template in (settings.prompt, settings.completion))
    return written_task(settings, (train, held), lambda _, rows: prompts(rows), completions, notes=notes)
