"""`fedex-lora check`: every problem of rows, labels, lengths, duplicates and classes, at each client, in one go, and one of the settings.

What the rows are, problems or none, is shown by `fedex_lora.runs.data`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from datasets import Dataset

from fedex_lora.client.arguments import training_arguments
from fedex_lora.client.trainers import find_trainer
from fedex_lora.config import Config
from fedex_lora.config import TaskSettings as Settings
from fedex_lora.errors import DataError, FedexLoraError, counted
from fedex_lora.models.processor import load_processor
from fedex_lora.privacy.account import rows_digest
from fedex_lora.server.checks import require_consistent
from fedex_lora.tasks import Task, custom, load_task, usable
from fedex_lora.tasks._files import read_rows
from fedex_lora.tasks._rows import RowTable, lines_of, some, told
from fedex_lora.tasks._templates import text_of
from fedex_lora.tasks.dealt import dealt
from fedex_lora.tasks.partition import Indices

ALL = "all clients"  # of rows that cannot be dealt out


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        words: what, in one line.
        stops: would a run with this configuration refuse to begin?
    """

    words: str
    stops: bool = False


def check(config: Config) -> list[Finding]:
    """All that is to be said of a configuration's rows; what stops a run first, then what it would do without a word.

    Example:
        >>> from fedex_lora.config import parse_config
        >>> check(parse_config({"base": {"model": "demo"}, "task": {"name": "demo"}, "clients": {"count": 2}}))
        []
    """
    found: list[Finding] = []
    try:
        found.extend(_everything(config))
    except FedexLoraError as error:  # what is said so far stays
        found.append(Finding(str(error), stops=True))
    return sorted(dict.fromkeys(found), key=lambda finding: not finding.stops)


def _everything(config: Config) -> Iterator[Finding]:
    if config.task.name == "custom":
        for file in config.clients.data.values() or [config.task.train]:
            yield from _rows(config.task.model_copy(update={"train": file}))
        yield from _given_twice(config)
    lenient = config.model_copy(update={"task": config.task.model_copy(update={"on_bad_row": "drop"})})
    try:
        task, parts = dealt(lenient)
    except DataError as error:
        if config.clients.data:
            raise
        task = load_task(lenient.task, config.seed)
        yield Finding(str(error), stops=True)
        parts = {ALL: (np.arange(len(task.train)), np.arange(0))}
    yield from (Finding(note) for note in task.notes if "are left out" not in note)
    yield from _clients(config, task, parts)
    training_arguments(config, own=find_trainer(config.local.trainer))
    if ALL not in parts:
        require_consistent(config, len(parts))


def _rows(settings: Settings) -> Iterator[Finding]:
    try:
        train, held = custom.row_tables(settings)
    except DataError as error:  # what is wrong with one file must not hide what is wrong with the next
        yield Finding(str(error), stops=True)
        return
    for table in (train, held) if held.source != train.source else (train,):
        stops = settings.on_bad_row == "refuse"
        yield from (Finding(f"{table.source}: {told(problem)}", stops) for problem in table.problems)
    if not train.inputs:
        return
    yield from _repeated(train)
    if held.source != train.source:
        known = set(_keys(train))
        both = {key: line for line, key in zip(held.rows.index, _keys(held), strict=True) if key in known}
        if both:
            count = counted(len(both), "input")
            yield Finding(
                f"{held.source}: {count} of {train.source}, too {lines_of(sorted(both.values()))}: what is measured on them was trained on"
            )


def _given_twice(config: Config) -> Iterator[Finding]:
    """Rows, under one name or several, that are two clients', or are both trained on and measured on."""
    given = {f"clients.data.{client}": file for client, file in config.clients.data.items()} or {"task.train": str(config.task.train)}
    uses, files = dict[str, list[str]](), dict[str, list[str]]()
    for use, file in {**given, "task.eval": str(config.task.eval)}.items():
        digest = rows_digest(read_rows(file, config.task.data).to_dict("records"))
        uses.setdefault(digest, []).append(use)
        files.setdefault(digest, []).append(file)
    for digest, twice in uses.items():
        if len(twice) > 1:
            names = " and ".join(dict.fromkeys(files[digest]))
            yield Finding(f"{names}: the same rows are {', '.join(twice[:-1])} and {twice[-1]}: give each its own")


def _repeated(table: RowTable) -> Iterator[Finding]:
    rows, keys = table.rows, _keys(table)
    again = [line for line, twice in zip(rows.index, pd.Series(keys, dtype=object).duplicated(), strict=True) if twice]
    if again:
        verb = "repeats" if len(again) == 1 else "repeat"
        yield Finding(f"{table.source}: {counted(len(again), 'row')} {verb} the input of another {lines_of(again)}")
    if table.label:
        labels: dict[tuple[str, ...], dict[str, int]] = {}
        for line, key, label in zip(rows.index, keys, rows[table.label], strict=True):
            labels.setdefault(key, {}).setdefault(text_of(label), line)
        if torn := [lines for lines in labels.values() if len(lines) > 1]:
            where = lines_of(sorted(line for lines in torn for line in lines.values()))
            yield Finding(f"{table.source}: {counted(len(torn), 'input')} with different labels {where}")


def _keys(table: RowTable) -> list[tuple[str, ...]]:
    return [tuple(text_of(cell) for cell in row) for row in table.rows[list(table.inputs)].itertuples(index=False)]


def _clients(config: Config, task: Task, parts: Mapping[str, tuple[Indices, Indices]]) -> Iterator[Finding]:
    names: Mapping[int, str] = task.model_config.get("id2label", {})
    processor, lenient = load_processor(config.base, task.kind), config.task.model_copy(update={"on_bad_row": "drop"})
    rows, strict = task.tokenize(processor, task.train), config.task.on_bad_row == "refuse"

    def said(rows: Dataset, source: str, may_be_empty: bool = False) -> Iterator[Finding]:
        notes = usable(rows, lenient, source, may_be_empty)[1]
        return (Finding(note, strict and "nothing is left" in note) for note in notes)

    for client, (train, held) in parts.items():
        present = set(task.classes[train].tolist())
        if absent := [name for label, name in names.items() if label not in present]:
            yield Finding(f"{client}: no row of class {some(absent)}")
        batch = config.training.get("per_device_train_batch_size", 8)
        if config.training.get("dataloader_drop_last") and len(train) < batch:
            yield Finding(
                f"{client}: {counted(len(train), 'row')}: fewer than a batch of {batch}, and training.dataloader_drop_last drops them", True
            )
        yield from said(rows.select(train), client)
        yield from said(rows.select(held), f"{client}, held out", may_be_empty=True)
    yield from said(task.tokenize(processor, task.eval), "the rows to measure on")
