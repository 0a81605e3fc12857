"""A private party's own rows: read once its ledger has an entry, and each is used, or left out, for itself alone.

So whether a party answers, and what it fails with, is the same with one row more or less, however a server sets the task.
"""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3
from datasets import Dataset, concatenate_datasets

from fedex_lora.client.arguments import TrainingContext
from fedex_lora.client.probe import fitting, positions_of
from fedex_lora.client.training import ClientData
from fedex_lora.config import CHAT, IMAGES, TaskSettings
from fedex_lora.errors import ConfigError, DataError
from fedex_lora.protocol.failures import ignored_failures, in_one_line, told_to_end
from fedex_lora.runs.context import ModelContext
from fedex_lora.tasks import Task, collator, custom, limit, usable
from fedex_lora.tasks._files import Rows, as_text, read_rows
from fedex_lora.tasks._rows import usable_rows
from fedex_lora.tasks._templates import columns_of, text_of

SAID = "the quick brown fox jumps over the lazy dog"  # long enough for a model to look from one word at another


def sample_task(settings: TaskSettings) -> Task:
    """The task with rows that are made up, for all that is tried before any row is read.

    Raises:
        ConfigError: the rows are in a published layout, which is read as a whole.
        DataError: no row could be used under these settings.
    """
    if settings.name != "custom":
        raise ConfigError(f"a private node's own rows are of task custom, and the run's task is {settings.name}", "privacy")
    made = as_text(Rows([_sample(settings, number) for number in range(max(2, len(settings.labels or [])))]))
    return custom.load(settings, lambda source, folder: made)


def _sample(settings: TaskSettings, number: int) -> dict[str, object]:
    words = SAID[: 19 if number % 2 else None]
    if settings.kind == CHAT:
        return {"messages": [{"role": role, "content": words} for role in ("user", "assistant")]}
    if settings.kind == "causal-lm":
        return dict.fromkeys([*columns_of(settings.prompt), *columns_of(settings.completion)], words)
    label = {settings.label: str(settings.labels[number % len(settings.labels)]) if settings.labels else f"0.{number + 1}"}
    if settings.kind == IMAGES:
        from PIL import Image

        Image.new("RGB", (32, 32)).save(file := io.BytesIO(), "PNG")
        return {settings.image or "image": file.getvalue(), **label}
    return {**dict.fromkeys(settings.text, words), **label}


def sample_rows(place: ModelContext) -> Dataset:
    """The made-up rows as the model sees them, and one as long as a row can be: some models read all of a batch otherwise for its sake."""
    settings, work = place.config.task, place.work
    rows = usable(work.tokens(work.task.train), settings, "this party")[0]
    if not work.task.reads_text:
        return rows
    most = min(limit(settings, work.processor), positions_of(place.model) or settings.length)
    again = {name: (cell * most)[:most] if isinstance(cell, list) else cell for name, cell in rows[0].items()}
    return concatenate_datasets([Dataset.from_list([again], features=rows.features), rows])


def file_digest(settings: TaskSettings) -> str:
    """Of the file that the rows are in, for the party's own eyes: whatever is in it, nothing fails."""
    path = Path(settings.data or "") / str(settings.train)
    return blake3(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def private_rows(place: ModelContext, client: str, log: logging.Logger) -> ClientData:
    """All rows that can be used; where none can, none: such a party trains on noise alone, and its log says so.

    Raises:
        DataError: the file cannot be read at all.
    """
    settings, work = place.config.task.model_copy(update={"on_bad_row": "drop"}), place.work
    none = work.tokens(work.task.train).select([])
    made, notes, reasons = list[Dataset](), list[str](), list[str]()
    table = read_rows(str(settings.train), settings.data)
    waiting = list(_of_one_layout(table))
    while waiting:
        part = waiting.pop()
        try:
            rows, said = _usable(place, settings, part, none, reasons)
        except DataError as error:
            notes.append(str(error))
        except BaseException as error:  # of a single row; a panic of its library is no Exception
            if told_to_end(error):
                raise
            reasons.append(in_one_line(error))
            waiting += [part.iloc[[place]] for place in range(len(part)) if len(part) > 1]
        else:
            made += [rows] * bool(len(rows))
            notes += said
    found = concatenate_datasets(made) if made else none
    if odd := len(table) - len(found):
        last = f" (the last for {reasons[-1]})" if reasons else ""
        notes.append(f"{odd} of {len(table)} rows are left out: what this run and this model cannot use{last}")
    for note in dict.fromkeys(notes):
        log.warning("%s: %s", client, note)
    if not len(found):
        log.error("%s: not one row can be used: what it answers is noise alone", client)
    return ClientData(train=found, held_out=none)


def _usable(place: ModelContext, settings: TaskSettings, part: Rows, none: Dataset, reasons: list[str]) -> tuple[Dataset, list[str]]:
    """Those of some rows that can be used, as tokens, and what is said of the others; `reasons` gets those of single rows that failed."""
    work = place.work
    alike, _ = custom.row_tables(settings, lambda source, folder: part)
    kept, dropped = usable_rows(alike.rows, alike.source, alike.problems, settings.on_bad_row)
    rows, more = usable(_each_alone(work, kept.reset_index(drop=True), none, reasons), settings, "this party")
    rows = fitting(place.model, rows) if work.task.reads_text else _decoded(rows, work, reasons)
    return rows, [*alike.notes, *dropped, *more]


def _of_one_layout(rows: Rows) -> Iterator[Rows]:
    """Rows that have values in the same columns, together: what a task makes of a table, it makes of each of them alone."""
    found: dict[tuple[object, ...], list[int]] = {}
    for place, row in enumerate(rows.to_dict(orient="records")):
        found.setdefault(tuple(name for name, cell in row.items() if text_of(cell).strip()), []).append(place)
    for columns, places in found.items():
        yield rows.iloc[places].loc[:, list(columns)]


def _decoded(rows: Dataset, work: TrainingContext, reasons: list[str]) -> Dataset:
    """Rows whose image is whole: one that is cut ends a batch, and so says that it was drawn."""
    made, kept = collator(work.task.kind, work.processor), list[int]()
    for place in range(len(rows)):
        with ignored_failures(reasons):  # of a single row
            made([rows[place]])
            kept.append(place)
    return rows.select(kept)


def _each_alone(work: TrainingContext, rows: Rows, none: Dataset, reasons: list[str]) -> Dataset:
    """Rows as tokens, without those of which there are none."""

    def tokens(some: Rows) -> Dataset:
        return work.tokens(some).select_columns(none.column_names).cast(none.features)

    with ignored_failures():  # of a single row
        return tokens(rows)
    made = list[Dataset]()
    for place in range(len(rows)):
        with ignored_failures(reasons):
            made.append(tokens(rows.iloc[[place]].reset_index(drop=True)))
    return concatenate_datasets([none, *made])
