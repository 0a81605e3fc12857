"""A run's numbers as one small JSON file, which tables are made from; written when the run ends."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from fedex_lora.aggregation import get_method
from fedex_lora.config import DEMO, Config, read_config, write_config
from fedex_lora.errors import StorageError, TrainingError
from fedex_lora.evaluation import Options, measure
from fedex_lora.experiments.compare._runs import nobody
from fedex_lora.experiments.reproduce._recipe import Cell, identity
from fedex_lora.runs.run import run
from fedex_lora.storage.events import Evaluated, Event, HeldOut, Metrics, RoundDone, Started, of_kind, read_events
from fedex_lora.storage.files import finite_json, write_text
from fedex_lora.storage.run_folder import EVENTS, remove, strays
from fedex_lora.tasks import Task, load_task

RUNS, WORK = "runs", "work"
FACTS = set(
    "task headline clients train_rows trainable_parameters total_parameters base_bytes base_fingerprint torch_threads versions".split()
)
SENT = {"bytes_down", "bytes_up"}
ERRORS = {"exactness_error", "realised_error", "floor", "deviation"}
ROUND = {"round", "metrics", "seconds", "modules"} | ERRORS | SENT


@dataclass(frozen=True)
class Paths:
    """Where things are on this machine.

    Attributes:
        out: records in `out/runs`; an unfinished run in `out/work`.
        data: the folder of all data; None: the hub.
        model: a local folder of the base that the recipe names, or of folders that are named like the bases; None: the hub.
    """

    out: Path
    data: Path | None = None
    model: Path | None = None

    def localised(self, cell: Cell) -> Config:
        """The run with this machine's folders."""
        task, base = cell.config.task, cell.config.base
        if self.data is not None and cell.folder:
            task = task.model_copy(update={"data": self.data / cell.folder})
        if self.model is not None and base.model != DEMO:
            one_of_many = self.model / base.model.rpartition("/")[2]
            base = base.model_copy(update={"model": str(one_of_many if one_of_many.is_dir() else self.model)})
        return cell.config.model_copy(update={"task": task, "base": base})


class Facts(BaseModel):
    """What a run said first, as far as tables read it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    headline: str = ""
    train_rows: dict[str, int] = {}
    trainable_parameters: int = 0
    base_bytes: int = 0


class Record(BaseModel):
    """What tables read of a run; of one that failed, why."""

    model_config = ConfigDict(frozen=True)
    config: dict[str, Any]
    failed: str = ""
    facts: Facts = Facts()
    before: Metrics = {}
    rounds: list[RoundDone] = []
    final: Evaluated | None = None  # records of older versions have none
    held_out: dict[int, Metrics] = {}
    tests: dict[str, Metrics] = {}

    @property
    def seconds(self) -> float:
        return math.fsum(one.seconds or 0.0 for one in self.rounds)

    def is_of(self, config: Config) -> bool:
        """Has it all that tables read, and the settings that its name stands for?"""
        if self.config != identity(config) or self.failed:
            return self.config == identity(config)
        modules = [one.modules for one in self.rounds if one.modules]
        personal = get_method(config.method).exactness == "personalised"  # without a global model to measure
        return (
            {"facts", "held_out"} <= self.model_fields_set
            and Facts.model_fields.keys() <= self.facts.model_fields_set
            and [one.round for one in self.rounds] == list(range(1, config.rounds + 1))
            and all((personal or self.facts.headline in one.metrics) and one.seconds is not None for one in self.rounds)
            and len(modules) == len(self.rounds)
            and all(len(one.module) == len(one.deviation) == len(one.ideal) == len(one.scaled) for one in modules)
        )


def find_record(out: Path, cell: Cell) -> Record | None:
    """The record of a cell's run, if it has ended.

    Raises:
        StorageError: the file is broken.
    """
    path = out / RUNS / f"{cell.name}.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        raise StorageError(f"{path} is broken: remove it, and the run is done again") from None
    try:
        if (record := Record.model_validate(found)).is_of(cell.config):
            return record
    except ValidationError:
        pass
    raise StorageError(f"{path} is no record of the run that its name says: remove it, and the run is done again")


def make_record(place: Paths, cell: Cell, tests: Sequence[str] = (), generation: Mapping[str, Any] | None = None) -> Record:
    """Run a cell, or go on with it, and write its record. Training that fails is a result too.

    Args:
        place: where.
        cell: the run.
        tests: tasks whose test rows the final model answers in writing.
        generation: how, over the tasks' settings.

    Raises:
        FedexLoraError: whatever stops a run but training itself.
    """
    folder, config = place.out / WORK / cell.name, place.localised(cell)
    asked = {test: config.task.model_copy(update={"name": test, "train": ""}) for test in tests}  # no training rows are needed
    for settings in asked.values():
        if (generated := load_task(settings, cell.seed).generation) is not None:
            generated.require()
    _move(folder, config)
    _on_the_same_rows(folder, load_task(config.task, config.seed))
    try:
        run(config, folder, nobody, resume=True)
    except TrainingError as error:
        record: dict[str, Any] = {"config": identity(cell.config), "failed": str(error)}
    else:
        options = Options(base=config.base.source, batch_size=config.training.get("per_device_eval_batch_size", 8), generation=generation)
        written = {test: _short(measure(str(folder), settings, options, cell.seed).numbers) for test, settings in asked.items()}
        record = {"config": identity(cell.config), **recorded(read_events(folder / EVENTS)), "tests": written}
    write_text(place.out / RUNS / f"{cell.name}.json", finite_json(record) + "\n")
    if folder.is_dir() and not strays(folder):
        remove(folder)
    folder.with_name(f"{folder.name}.rows").unlink(missing_ok=True)
    return Record.model_validate(record)


def _move(folder: Path, config: Config) -> None:
    """Let an unfinished run go on where data and base may lie in another folder."""
    path = folder / "config.toml"
    if not path.is_file():
        return
    there = read_config(path)
    task = there.task.model_copy(update={"data": config.task.data})
    base = there.base.model_copy(update={"model": config.base.model})
    if there != config and there.model_copy(update={"task": task, "base": base}) == config:
        write_text(path, write_config(config))


def _on_the_same_rows(folder: Path, task: Task) -> None:
    """Begin a run anew that was begun on other rows."""
    note = folder.with_name(f"{folder.name}.rows")
    rows = hashlib.sha256()
    for frame in (task.train, task.eval):
        rows.update(pd.util.hash_pandas_object(frame.astype(str), index=False).to_numpy().tobytes())
    if folder.exists() and not (note.is_file() and note.read_text(encoding="utf-8") == rows.hexdigest()):
        remove(folder)
    write_text(note, rows.hexdigest())


def recorded(events: Sequence[Event]) -> dict[str, Any]:
    """What a table can ask of a run: its facts, for every round metrics, errors, bytes, and the deviation of every module, and the bytes of
    the message that brings the final model to all clients.
    """
    started, rounds = of_kind(events, Started)[0], list({event.round: event for event in of_kind(events, RoundDone)}.values())
    return {
        "facts": started.model_dump(include=FACTS),
        "before": _short(started.metrics),
        "rounds": [{"modules": {}} | _short(event.model_dump(include=ROUND, exclude_unset=True)) for event in rounds],
        "final": of_kind(events, Evaluated)[-1].model_dump(include=SENT),
        "held_out": {str(event.round): _short(event.metrics) for event in of_kind(events, HeldOut)},
    }


def _short(value: Any) -> Any:
    """Six significant digits of every decimal."""
    if isinstance(value, Mapping):
        return {name: _short(one) for name, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
